"""The picture of several runs."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from experiments.comparison import Table
from runs.drawing import BLUE, GREY, ORANGE, label, save


def draw_experiments(table: Table, path: Path) -> None:
    """Draw a row for each setting, the best on top: a point for each seed, their mean with its standard error, and the mean
    of the reference as a vertical line."""
    groups = sorted(table.groups, key=lambda group: group.mean(table.metric))
    figure = Figure(figsize=(10, 0.27 * len(groups) + 1.9), layout="constrained")
    axes = figure.subplots()
    figures = []
    for row, group in enumerate(groups):
        values, mean, error = group.values(table.metric), group.mean(table.metric), group.standard_error
        colour = ORANGE if group.is_reference else BLUE
        axes.scatter(values, [row] * len(values), s=16, facecolors="none", edgecolors=colour, linewidths=0.8, alpha=0.7)
        axes.errorbar([mean], [row], xerr=None if math.isnan(error) else [error], fmt="o", markersize=5.5, capsize=3,
                      color=colour)
        if group.is_reference:
            axes.axvline(mean, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
        figures.append(f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}"))
    axes.set_yticks(range(len(groups)), [label(group.label, 60) for group in groups], fontsize=9)
    for tick, group in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set_color(ORANGE if group.is_reference else "black")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(groups)), figures, fontsize=9)
    right.tick_params(length=0)
    axes.set(xlabel=f"{table.judged_by} accuracy, %", ylim=(-0.7, len(groups) - 0.3))
    axes.grid(axis="x", alpha=0.3)
    axes.grid(axis="y", alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    right.spines["right"].set_visible(False)
    figure.suptitle(label(table.dataset, 90), fontsize=11)
    figure.text(0.99, 0.005, "circles: seeds; dots: means and their standard errors; dashed: the reference", color=GREY,
                fontsize=8, ha="right", va="bottom")
    save(figure, path)
