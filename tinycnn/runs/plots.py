"""The pictures of one run. Each function returns a figure; call it, and tinycnn.runs.drawing.save, within `drawing`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import albumentations as A
import numpy as np
from albumentations.pytorch import ToTensorV2
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from config import SIDE
from tinycnn.data.dataset import Split
from tinycnn.runs.drawing import BLUE, COLOURS, GREEN, GREY, LIGHT_GREY, ORANGE, label, label_line_ends, save
from tinycnn.runs.record import SavedRun

MOST_NUMBERS = 20  # classes, up to which a confusion matrix has numbers in its cells
MOST_PAIRS, MOST_OF_A_PAIR = 9, 4  # mistakes that are drawn


def accuracy(run: SavedRun, reference: SavedRun | None = None) -> Figure:
    """Accuracy, loss and learning rate by epoch. `reference`: a run on the same images, drawn in grey."""
    epochs = [row["epoch"] for row in run.rows]
    figure = Figure(figsize=(8, 8), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    lower.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lines = [(run.rows, "train", BLUE, "training"), (run.rows, "val", GREEN, "validation"), (run.rows, "test", ORANGE, "test")]
    if reference:
        lines.insert(0, (reference.rows[:len(epochs)], "test", GREY, "reference, test"))
    for axes, metric in ((upper, "acc"), (middle, "loss")):
        ends = []
        for rows, split, colour, words in lines:
            points = [(row["epoch"], row[f"{split}_{metric}"]) for row in rows
                      if np.isfinite(row.get(f"{split}_{metric}", np.nan))]
            if points:
                _draw_line(axes, points, colour)
                axes.plot((points[-1][0], epochs[-1]), (points[-1][1],) * 2, ":", color=colour)  # of a shorter reference
                ends.append((epochs[-1], points[-1][1], f"{words} {points[-1][1]:.2f}", colour))
        axes.margins(y=0.1)
        label_line_ends(axes, ends)
    _draw_line(lower, [(row["epoch"], row["lr"]) for row in run.rows], GREY)
    upper.set(ylabel="accuracy, %", title=f"{label(run.folder.name, 50)} on {label(run.record['dataset']['kind'])}")
    middle.set(ylabel="loss, nats per image")
    lower.set(ylabel="learning rate", xlabel="epoch", ylim=(0, None))
    figure.supxlabel("training is measured on augmented images", x=0.99, ha="right", fontsize=10, color=GREY)
    for axes in (upper, middle, lower):
        axes.grid()
    return figure


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A line through (x, y) points; a single one, as the test is where settings are chosen by validation, is a dot."""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker="o" if len(points) == 1 else None)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> Figure:
    """How many images of each class (rows) were predicted as which (columns), and the accuracy of each class. `labels` and
    `predicted` are int, N."""
    classes = len(class_names)
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.55 * classes, 4, 11))  # inches
    figure = Figure(figsize=(side + 3, side + 2), layout="constrained")
    axes = figure.subplots()
    diagonal = np.eye(classes, dtype=bool)
    most = max(shares[~diagonal].max(initial=0), 1)  # mistakes have a scale of their own: they are rare
    orange = LinearSegmentedColormap.from_list("mistakes", ["white", "#F5B78A", ORANGE, "#7A3500"])
    mistakes = axes.imshow(np.ma.array(shares, mask=diagonal), cmap=orange, vmin=0, vmax=most)
    blue = LinearSegmentedColormap.from_list("right", ["white", BLUE])
    axes.imshow(np.ma.array(shares, mask=~diagonal), cmap=blue, vmin=0, vmax=100)
    if classes <= MOST_NUMBERS:
        for row, column in zip(*counts.nonzero(), strict=True):
            dark = shares[row, column] > (50 if row == column else most / 2)
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=9,
                      color="white" if dark else "black")
    else:
        figure.colorbar(mistakes, shrink=0.5, format="%.1f %%", label="of the class mistaken for another one")
    every = -(-classes // 60)  # above 60 classes, some names only
    shown, size = range(0, classes, every), float(np.clip(side * 50 / classes * every, 5, 10))
    axes.set_xticks(shown, [label(class_names[number]) for number in shown], rotation=90, fontsize=size)
    axes.set_yticks(shown, [f"{label(class_names[number])}  {shares[number, number]:.1f} %" for number in shown], fontsize=size)
    axes.spines[:].set(visible=True, color=LIGHT_GREY)
    axes.set(xlabel="predicted class", ylabel="true class, and its accuracy",
             title=f"Test images: {100 * (labels == predicted).mean():.2f} % right (blue); mistakes in orange")
    return figure


def confused_pairs(labels: np.ndarray, probabilities: np.ndarray) -> list[list[int]]:
    """The wrong predictions by pair of true and predicted class, the most frequent pair first: indices of images, the most
    confident first. `labels` are int, N; `probabilities` float, N x classes."""
    predicted = probabilities.argmax(1)
    pairs: dict[tuple[int, int], list[int]] = {}
    for index in np.argsort(-probabilities.max(1), kind="stable"):
        if predicted[index] != labels[index]:
            pairs.setdefault((labels[index], predicted[index]), []).append(int(index))
    return sorted(pairs.values(), key=len, reverse=True)


def drawn_mistakes(pairs: Sequence[Sequence[int]]) -> list[int]:
    """The indices of the images that `mistakes` draws."""
    return [index for pair in pairs[:MOST_PAIRS] for index in pair[:MOST_OF_A_PAIR]]


def mistakes(test: Split, probabilities: np.ndarray, class_names: Sequence[str], pairs: Sequence[Sequence[int]],
             maps: Mapping[int, np.ndarray]) -> Figure:
    """The most frequently confused pairs of classes, a row each: images with their index in the test set, and what the network
    found of the predicted and of the true class where. `pairs` are those of `confused_pairs`, `maps` the class activation maps
    of each drawn image, float, classes x h x w; empty where the network has none."""
    names, drawn = [label(name, 13) for name in class_names], pairs[:MOST_PAIRS]
    figure, axes = _canvas(width=MOST_OF_A_PAIR * 112 - 10, height=55 * len(drawn) or 20, scale=32)
    for row, pair in enumerate(drawn):
        top, true, predicted = 55 * row + 8, test.labels[pair[0]], probabilities[pair[0]].argmax()
        axes.text(0, top - 2, f"{label(class_names[true])} taken for {label(class_names[predicted])}: {len(pair)}", fontsize=11)
        for column, index in enumerate(pair[:MOST_OF_A_PAIR]):
            left, image = 112 * column, test.images[index]
            most = maps[index][[predicted, true]].max() if maps else 1
            _show(axes, image, left, top)
            axes.text(left + SIDE / 2, top + SIDE + 1.5, f"image {index}", fontsize=9, ha="center", va="top")
            for x, number, colour in ((left + 34, predicted, ORANGE), (left + 68, true, BLUE)):
                if maps:
                    _show(axes, image, x, top, maps[index][number], most)
                axes.text(x + SIDE / 2, top + SIDE + 1.5, f"{names[number]}\n{100 * probabilities[index, number]:.1f} %",
                          color=colour, fontsize=9, ha="center", va="top")
    figure.suptitle(f"{sum(map(len, pairs)):,} mistakes: the most frequent kinds, and the most confident ones of each" + (
        "\nbeside each image: where the network saw the predicted class (orange) and the true one (blue)" if maps else ""))
    return figure


def draw_explanation(image: np.ndarray, class_names: Sequence[str], probabilities: np.ndarray, maps: np.ndarray,
                     path: Path) -> None:
    """Write a picture of an image as the network sees it, uint8 SIDE x SIDE x 3, and of where it saw the three most probable
    classes. `probabilities` are float, classes; `maps` the class activation maps, float, classes x h x w."""
    best = np.argsort(-probabilities, kind="stable")[:3]
    figure, axes = _canvas(width=35 * (1 + len(best)) - 3, height=SIDE + 8, scale=14)
    _show(axes, image, 0, 0)
    axes.text(SIDE / 2, SIDE + 1, "the image as\nthe network sees it", ha="center", va="top")
    for place, number in enumerate(best, start=1):
        _show(axes, image, 35 * place, 0, maps[number], maps[best].max())
        axes.text(35 * place + SIDE / 2, SIDE + 1, f"{label(class_names[number])}\n{100 * probabilities[number]:.1f} %",
                  ha="center", va="top")
    figure.suptitle("Bright: where the network saw its three most probable classes")
    save(figure, path)


def augmentation(train: Split, policy: A.Compose, class_names: Sequence[str], rows: int = 10, columns: int = 8) -> Figure:
    """An image of each of the first `rows` classes, and `columns` images that the policy makes of it, before they are
    normalized."""
    visible = A.Compose([step for step in policy.transforms if not isinstance(step, A.Normalize | ToTensorV2)], seed=0)
    classes = np.unique(train.labels)[:rows]
    originals = [train.images[np.flatnonzero(train.labels == number)[0]] for number in classes]
    copies = [[visible(image=image)["image"] for _ in range(columns)] for image in originals]
    step = max(SIDE, *copies[0][0].shape[:2]) + 3
    figure, axes = _canvas(width=step * (columns + 1), height=step * len(classes), scale=30)
    for row, (original, made) in enumerate(zip(originals, copies, strict=True)):
        for column, picture in enumerate([original, *made]):
            margin = (step - len(picture)) / 2
            _show(axes, picture, step * column + margin, step * row + margin)
    axes.set_yticks([step * (row + 0.5) for row in range(len(classes))], [label(class_names[number], 20) for number in classes])
    axes.set_xticks([step / 2], ["original"])
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False, labelsize=11)
    which = "each class" if len(classes) == len(class_names) else f"{len(classes)} of the {len(class_names)} classes"
    figure.suptitle(f"A training image of {which}, and {columns} augmented copies of it")
    return figure


def receptive_fields(image: np.ndarray, fields: Mapping[str, int]) -> Figure:
    """What a unit in the middle of each layer's map sees of an image, uint8 SIDE x SIDE x 3. `fields` are the receptive fields
    of the layers, in pixels."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image, extent=(0, SIDE, SIDE, 0))
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[], title=f"What a unit in the middle of each layer sees of a {SIDE} x {SIDE} image")
    ends = []
    for number, (name, field) in enumerate(fields.items()):
        corner, side, colour = max((SIDE - field) / 2, 0), min(field, SIDE), COLOURS[number % len(COLOURS)]
        axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor=colour, linewidth=2.5,
                                 path_effects=[withStroke(linewidth=4.5, foreground="white")]))
        ends.append((corner + side, corner, f"{label(name)}: {field} x {field}", colour))
    label_line_ends(axes, ends[::-1])
    return figure


def filters(weights: np.ndarray, name: str) -> Figure:
    """The kernels of the first convolution as colours, each scaled by itself. `weights` are float, N x 3 x height x width."""
    low, high = (end(weights, axis=(1, 2, 3), keepdims=True) for end in (np.min, np.max))
    kernels = ((weights - low) / np.maximum(high - low, 1e-12)).transpose(0, 2, 3, 1)
    step = max(weights.shape[2:]) + 0.5
    rows = -(-len(kernels) // 8)
    figure, axes = _canvas(width=8 * step, height=rows * step, scale=1.25 * step)
    for number, kernel in enumerate(kernels):
        _show(axes, kernel, number % 8 * step, number // 8 * step)
    figure.suptitle(f"The {len(kernels)} filters of {label(name)}, each scaled by itself")
    return figure


def _canvas(width: float, height: float, scale: float) -> tuple[Figure, Axes]:
    """Empty axes for `_show`, `width` x `height` pixels of pictures, of which `scale` are an inch."""
    figure = Figure(figsize=(width / scale, height / scale + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(height, 0), anchor="N", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def _show(axes: Axes, picture: np.ndarray, x: float, y: float, heat: np.ndarray | None = None, most: float = 1) -> None:
    """Show a picture, height x width x 3, with its upper left corner at (x, y); with `heat`, a class activation map, as a grey
    one with the map over it, from 0 (dark) to `most` (bright)."""
    extent = (x, x + picture.shape[1], y + picture.shape[0], y)
    if heat is None:
        axes.imshow(picture, extent=extent)
    else:
        axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255, extent=extent)
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=max(most, 1e-6), alpha=0.6, interpolation="bilinear", extent=extent)
