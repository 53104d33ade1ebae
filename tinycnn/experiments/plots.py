"""The picture of several runs."""

import math
import statistics
import textwrap

from matplotlib.figure import Figure

from tinycnn.experiments.comparison import Table
from tinycnn.runs.drawing import BLUE, GREY, ORANGE, label


def experiments(table: Table) -> Figure:
    """A row for each setting, the best on top: a point for each seed, their mean with its standard error, and the mean of the
    reference, where it is in the table, as a vertical line."""
    groups = table.groups[::-1]
    means = [group.mean(table.metric) for group in groups]
    labels = ["\n".join(textwrap.wrap(label(group.label, 96), 50)) for group in groups]
    height = 0.11 + 0.17 * max(words.count("\n") + 1 for words in labels)  # inches, of a row
    figure = Figure(figsize=(10, height * len(groups) + 1.6), layout="constrained")
    axes = figure.subplots()
    lowest = means[-1] - max(4 * (means[-1] - statistics.median(means)), 5)  # a failure must not squeeze all others
    legend = ["circles: seeds", "dots: means with standard errors"]
    for row, (group, mean) in enumerate(zip(groups, means, strict=True)):
        colour, values = ORANGE if group.is_reference else BLUE, group.values(table.metric)
        if mean < lowest:
            axes.plot([0.01], [row], "<", color=colour, transform=axes.get_yaxis_transform())
            continue
        if len(values) > 1:
            axes.plot(values, [row] * len(values), "o", color=colour, fillstyle="none", markersize=4.5)
        error = None if math.isnan(group.standard_error) else [group.standard_error]
        axes.errorbar([mean], [row], xerr=error, fmt="o", color=colour, capsize=3.5)
        if group.is_reference:
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--", zorder=0)
            legend.append("dashed: the reference")
    if means[0] < lowest:
        legend.append("◂: out of the picture")
    axes.set_yticks(range(len(groups)), labels)
    figures = [f"{mean:.2f}" + ("" if math.isnan(group.standard_error) else f" ± {group.standard_error:.2f}")
               for group, mean in zip(groups, means, strict=True)]
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(groups)), figures)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    axes.set(xlabel=f"{table.judged_by} accuracy, %", ylim=(-0.7, len(groups) - 0.3))
    axes.grid()
    figure.suptitle(label(table.dataset, 90))
    figure.supxlabel("; ".join(legend), color=GREY, fontsize=9)
    return figure
