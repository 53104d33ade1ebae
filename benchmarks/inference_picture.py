"""The picture of accuracy against latency, from benchmarks/results/inference.txt. `python benchmarks/readme.py` draws it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.inference import FLOAT32, OURS
from tinycnn.runs.drawing import BLUE, DPI, ORANGE, spread

LOOKS = {"ours": ("o", BLUE, BLUE, "this network by recipe, trained and measured here (±: standard deviation over seeds)"),
         "published": ("o", ORANGE, "white", "others: latency measured here, accuracy as published"),
         "required": ("^", ORANGE, "white", "others: the accuracy that their benchmark requires")}


@dataclass(frozen=True)
class Point:
    """A network in the picture. `kind`: ours; published, as its accuracy is; or required, where that is all that is known."""

    label: str
    kind: str
    latency: float  # of one image on one thread, in ms
    accuracy: float
    std: float = 0.0  # over seeds; 0 where there is one


def read_rows(text: str) -> list[dict[str, str]]:
    """The rows of an inference.txt: network, runtime, parameters, multiply_adds, ms and accuracy, as they stand there."""
    rows = []
    for line in text.splitlines():
        cells = line[36:].split()
        if len(cells) == 9 and cells[1].endswith("M"):
            rows.append({"network": line[:18].strip(), "runtime": line[18:36].strip(), "parameters": cells[0],
                         "multiply_adds": cells[1], "ms": cells[4], "accuracy": cells[8]})
    return rows


def make_points(rows: Sequence[Mapping[str, str]], recipes: Mapping[str, tuple[float, float]]) -> list[Point]:
    """The networks in float32 of a table's `rows`; ours once for each of the `recipes`, given by accuracy and std."""
    points = []
    for row in (row for row in rows if row["runtime"] == FLOAT32):
        latency, figure = float(row["ms"]), row["accuracy"]
        if row["network"] == OURS:
            points += [Point(name, "ours", latency, *figures) for name, figures in recipes.items()]
        else:
            kind = "required" if figure.startswith(">") else "published"
            words = f"{row['network']}\n{row['multiply_adds'].replace('M', ' M')} multiply-adds"
            points.append(Point(words, kind, latency, float(figure.strip(">*"))))
    return points


def draw(points: Sequence[Point], path: Path) -> None:
    """Accuracy against the latency of one image on one thread. The file's description holds the points."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots()
    for kind, (marker, edge, face, words) in LOOKS.items():
        own = [point for point in points if point.kind == kind]
        axes.plot([point.latency for point in own], [point.accuracy for point in own], marker, markersize=10,
                  markeredgecolor=edge, markerfacecolor=face, markeredgewidth=2, label=words, zorder=3)
    ours = sorted((point for point in points if point.kind == "ours"), key=lambda point: point.accuracy)
    for point, height in zip(ours, spread([point.accuracy for point in ours], 0.5, 0, 100), strict=True):
        axes.errorbar(point.latency, point.accuracy, point.std or None, color=BLUE, capsize=5, linewidth=2)
        error = f" ± {point.std:.2f}" if point.std else ""
        axes.annotate(f"{point.label}  {point.accuracy:.2f}{error}", (point.latency, point.accuracy),
                      (0.93 * point.latency, height), ha="right", va="center", fontsize=13, color=BLUE)
    others = [point for point in points if point.kind != "ours"]
    for point in others:
        close = [other for other in others if other is not point and abs(other.accuracy - point.accuracy) < 1.5
                 and 0.6 < other.latency / point.latency < 1.7]
        above = bool(close) and all(point.accuracy > other.accuracy for other in close)
        offset, across, down = ((0, 10 if above else -10), "center", "bottom" if above else "top") if close else (
            (12, 0), "left", "center")
        axes.annotate(point.label, (point.latency, point.accuracy), offset, textcoords="offset points", ha=across, va=down,
                      fontsize=13, color=ORANGE)
    axes.set_xscale("log")
    axes.set_xlim(0.27 * min(point.latency for point in points), 1.75 * max(point.latency for point in points))
    axes.set_ylim(min(point.accuracy for point in points) - 1, max(point.accuracy for point in points) + 1.3)
    axes.set_xticks(ticks := [0.2, 0.3, 0.5, 1, 2], map(str, ticks), fontsize=13)
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="y", labelsize=13)
    axes.set_xlabel("milliseconds for one image: ONNX Runtime, float32, one CPU thread", fontsize=14)
    axes.set_ylabel("CIFAR-10 test accuracy, %", fontsize=14)
    figure.legend(loc="outside upper left", fontsize=13, frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, metadata={"Description": json.dumps([asdict(point) for point in points])})
