"""The picture of several runs."""

import math
import statistics
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinycnn.experiments.comparison import SettingGroup, Table
from tinycnn.runs.drawing import BLUE, GREY, ORANGE, label, save


def draw_experiments(table: Table, path: Path) -> None:
    """Draw a row for each setting, the best on top: a point for each seed, their mean with its standard error, and the mean
    of the reference as a vertical line."""
    groups = sorted(table.groups, key=lambda group: group.mean(table.metric))
    means = [group.mean(table.metric) for group in groups]
    labels = ["\n".join(textwrap.wrap(label(group.label, 96), 50)) for group in groups]
    height = 0.11 + 0.17 * max(words.count("\n") + 1 for words in labels)  # inches, of a row
    figure = Figure(figsize=(10, height * len(groups) + 1.6), layout="constrained")
    axes = figure.subplots()
    lowest = means[-1] - max(4 * (means[-1] - statistics.median(means)), 5.0)  # a failure must not squeeze all others
    for row, group in enumerate(groups):
        if means[row] < lowest:
            axes.plot([0.01], [row], "<", color=BLUE, transform=axes.get_yaxis_transform())
        else:
            _draw_group(axes, row, group, table.metric)
    axes.set_yticks(range(len(groups)), labels)
    for tick, group in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set_color(ORANGE if group.is_reference else "black")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(groups)), [_accuracy(mean, group.standard_error)
                                          for mean, group in zip(means, groups, strict=True)])
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    axes.set(xlabel=f"{table.judged_by} accuracy, %", ylim=(-0.7, len(groups) - 0.3))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(label(table.dataset, 90))
    figure.supxlabel("circles: seeds; dots: means with standard errors; dashed: the reference"
                     + ("; ◂: out of the picture" if means[0] < lowest else ""), color=GREY, fontsize=9)
    save(figure, path)


def _draw_group(axes: Axes, row: int, group: SettingGroup, metric: str) -> None:
    values, mean, error = group.values(metric), group.mean(metric), group.standard_error
    colour = ORANGE if group.is_reference else BLUE
    if len(values) > 1:
        axes.scatter(values, [row] * len(values), s=22, facecolors="none", edgecolors=colour, linewidths=0.9)
    axes.errorbar([mean], [row], xerr=None if math.isnan(error) else [error], fmt="o", markersize=5.5, capsize=3.5,
                  color=colour)
    if group.is_reference:
        axes.axvline(mean, color=ORANGE, linewidth=1.2, linestyle="--", zorder=0)


def _accuracy(mean: float, error: float) -> str:
    return f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
