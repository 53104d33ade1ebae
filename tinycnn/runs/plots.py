"""The pictures of one run, as PNG files."""

from collections.abc import Sequence
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
from tinycnn.data.dataset import Images, Split
from tinycnn.runs.drawing import BLUE, COLOURS, GREEN, GREY, LIGHT_GREY, ORANGE, label, label_line_ends, save
from tinycnn.runs.record import Run

SPLITS = {"train": (BLUE, "training"), "val": (GREEN, "validation"), "test": (ORANGE, "test")}
MOST_NUMBERS = 20  # classes, up to which a confusion matrix has numbers in its cells


def draw_all(run: Run, images: Images, policy: A.Compose, probabilities: np.ndarray, stages: dict[str, int]) -> list[str]:
    """Draw all pictures of a finished run into its folder, and return their names.

    `policy` is that of the training images, `probabilities` are those of the test images, float N x classes, and `stages` are
    the receptive fields behind the stages of the network, in pixels.
    """
    names, labels = images.class_names, images.test.labels
    draw_accuracy(run, run.folder / "accuracy.png")
    draw_confusion_matrix(labels, probabilities.argmax(1), names, run.folder / "confusion_matrix.png")
    draw_mistakes(images.test, probabilities, names, run.folder / "mistakes.png")
    draw_augmentation(images.train, policy, names, run.folder / "augmentation.png")
    draw_receptive_field(images.test.images[0], stages, run.folder / "receptive_field.png")
    return ["accuracy.png", "confusion_matrix.png", "mistakes.png", "augmentation.png", "receptive_field.png"]


def draw_accuracy(run: Run, path: Path) -> None:
    """Draw accuracy and loss by epoch, and the learning rate below."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    epochs = [row["epoch"] for row in run.rows]
    for axes, metric in ((upper, "acc"), (middle, "loss")):
        _draw_curves(axes, run, metric)
    upper.set(ylabel="accuracy, %")
    upper.set_title(f"{label(run.folder.name, 50)} on {label(run.record['dataset']['kind'])}", loc="left", fontsize=13)
    middle.set(ylabel="loss, nats per image")
    lower.plot(epochs, [row["lr"] for row in run.rows], color=GREY, marker="o" if len(epochs) == 1 else None)
    lower.set(ylabel="learning rate", xlabel="epoch", ylim=(0, None))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.supxlabel("training is measured on augmented images", x=0.99, ha="right", fontsize=10, color=GREY)
    for axes in (upper, middle, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _draw_curves(axes: Axes, run: Run, metric: str) -> None:
    """Draw the metric, acc or loss, of every split by epoch, with its last value at the line's end."""
    epochs, ends = [row["epoch"] for row in run.rows], []
    for split, (colour, words) in SPLITS.items():
        values = np.array([row.get(f"{split}_{metric}", np.nan) for row in run.rows])
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            # where settings are chosen by validation, the test after the last epoch is a point by itself
            axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o" if len(known) == 1 else None, clip_on=False)
            ends.append((epochs[known[-1]], values[known[-1]], f"{words} {values[known[-1]]:.2f}", colour))
    margin = 0.01 * len(epochs) if len(epochs) > 1 else 0.5
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    label_line_ends(axes, ends)


def draw_confusion_matrix(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw how many images of each class (rows) were predicted as which (columns), and the accuracy of each class. `labels`
    and `predicted` are int, N."""
    classes = len(class_names)
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = np.clip(0.55 * classes, 3, 11)  # inches
    figure = Figure(figsize=(side + 4.2, side + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(side, 1.6))
    _draw_cells(left, counts, shares)
    names = [label(name) for name in class_names]
    every = -(-classes // 60)  # above 60 classes, some names only
    size = float(np.clip(side * 72 / classes * every * 0.7, 5, 10))
    left.set_xticks(range(0, classes, every), names[::every], rotation=90 if classes > MOST_NUMBERS else 45,
                    ha="center" if classes > MOST_NUMBERS else "right", rotation_mode="default" if classes > MOST_NUMBERS
                    else "anchor", fontsize=size)
    left.set_yticks(range(0, classes, every), names[::every], fontsize=size)
    left.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle("Test images: right predictions in blue, mistakes in orange")
    own = 100 * shares.diagonal()
    right.barh(range(classes), own, color=BLUE, height=0.8)
    for row, value in enumerate(own if classes <= MOST_NUMBERS else []):
        inside = value > 50
        right.text(value + (-3 if inside else 3), row, f"{value:.1f}", ha="right" if inside else "left", va="center",
                   color="white" if inside else "black", fontsize=9)
    right.set(xlabel="accuracy, %", xlim=(0, 100))
    right.set_title(f"all: {100 * (labels == predicted).mean():.2f} %", fontsize=11)
    right.tick_params(axis="y", which="both", left=False)
    right.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _draw_cells(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    """Blue cells on the diagonal; orange ones beside it, with a scale of their own: they are small beside the diagonal's."""
    classes = len(counts)
    diagonal = np.eye(classes, dtype=bool)
    orange = LinearSegmentedColormap.from_list("mistakes", ["white", "#F5B78A", ORANGE, "#7A3500"])
    most = max(shares[~diagonal].max(initial=0), 0.01)
    cells = axes.imshow(np.ma.array(shares, mask=diagonal), cmap=orange, vmin=0, vmax=most, aspect="auto")
    blue = LinearSegmentedColormap.from_list("right", ["white", BLUE])
    axes.imshow(np.ma.array(shares, mask=~diagonal), cmap=blue, vmin=0, vmax=1, aspect="auto")
    if classes > MOST_NUMBERS:
        axes.figure.colorbar(cells, ax=axes, location="top", shrink=0.5, aspect=40,
                             format=lambda share, _: f"{100 * share:.0f} %", label="of the class mistaken for another one")
        return
    axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=LIGHT_GREY, linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for row, column in zip(*counts.nonzero(), strict=True):
        dark = shares[row, column] > (0.5 if row == column else 0.5 * most)
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=9,
                  color="white" if dark else "black")


def draw_mistakes(test: Split, probabilities: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw the 36 wrong predictions with the highest probability, float N x classes: the predicted class in orange, the true
    one in blue."""
    predicted, labels = probabilities.argmax(1), test.labels
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")[:36]]
    names = [label(name, 13) for name in class_names]
    figure = Figure(figsize=(11, 2.31 * max(-(-len(worst) // 6), 1) + 0.5), layout="constrained")
    axes = figure.subplots()
    corners = _tile(axes, [test.images[index] for index in worst], columns=6, gaps=(14, 5))
    for index, (x, y) in zip(worst, corners, strict=True):
        middle = x + SIDE / 2
        axes.text(middle, y - 0.7, f"predicted {names[predicted[index]]}\nwith {100 * probabilities[index].max():.1f} %",
                  color=ORANGE, fontsize=9, ha="center", va="bottom", linespacing=1.1)
        axes.text(middle, y + SIDE + 0.5, f"is {names[labels[index]]}", color=BLUE, fontsize=9, ha="center", va="top")
    figure.suptitle(f"The {len(worst)} wrong predictions made with most confidence, of {len(wrong):,} wrong ones")
    save(figure, path)


def draw_augmentation(train: Split, policy: A.Compose, class_names: Sequence[str], path: Path, rows: int = 10,
                      columns: int = 8) -> None:
    """Draw an image of each of the first `rows` classes, and `columns` images that the policy makes of it, before they are
    normalized."""
    visible = A.Compose([step for step in policy.transforms if not isinstance(step, A.Normalize | ToTensorV2)], seed=0)
    classes = np.unique(train.labels)[:rows]
    pictures = []
    for number in classes:
        original = train.images[np.flatnonzero(train.labels == number)[0]]
        pictures += [original, *(visible(image=original)["image"] for _ in range(columns))]
    figure = Figure(figsize=(1.1 * (columns + 1) + 1.6, 1.1 * len(classes) + 1), layout="constrained")
    axes = figure.subplots()
    corners = _tile(axes, pictures, columns + 1, gaps=(3, 3))
    for x, y in corners[::columns + 1]:
        axes.add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor=BLUE, linewidth=3, clip_on=False))
    axes.set_yticks([y + SIDE / 2 for _, y in corners[::columns + 1]], [label(class_names[number], 20) for number in classes],
                    fontsize=11)
    axes.set_xticks([SIDE / 2], ["original"], color=BLUE, fontsize=11)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    which = "each class" if len(classes) == len(class_names) else f"{len(classes)} of the {len(class_names)} classes"
    figure.suptitle(f"A training image of {which}, and {columns} augmented copies of it")
    save(figure, path)


def _tile(axes: Axes, pictures: Sequence[np.ndarray], columns: int, gaps: tuple[int, int]) -> list[tuple[int, int]]:
    """Draw pictures, uint8 H x W x 3, row by row, with `gaps` between the rows and the columns. Returns the upper left corners
    of the SIDE x SIDE pixels in the middle of each, (x, y). All lengths are in pixels of the pictures."""
    side = max([SIDE, *(length for picture in pictures for length in picture.shape[:2])])
    down, across = side + gaps[0], side + gaps[1]
    rows = max(-(-len(pictures) // columns), 1)
    corners = [(index % columns * across, index // columns * down) for index in range(len(pictures))]
    canvas = np.full((rows * down - gaps[0], columns * across - gaps[1], 3), 255, dtype=np.uint8)
    for picture, (x, y) in zip(pictures, corners, strict=True):
        top, left = (y + (side - picture.shape[0]) // 2, x + (side - picture.shape[1]) // 2)
        canvas[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
    axes.imshow(canvas, interpolation="nearest", extent=(0, canvas.shape[1], canvas.shape[0], 0))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return [(x + (side - SIDE) // 2, y + (side - SIDE) // 2) for x, y in corners]


def draw_receptive_field(image: np.ndarray, stages: dict[str, int], path: Path) -> None:
    """Draw over an image, uint8 SIDE x SIDE x 3, the square that a unit in the middle of each stage's map sees. `stages` are
    receptive fields in pixels. The padding around the image is shaded."""
    size, largest = image.shape[0], max(stages.values(), default=0)
    view = min(max(size, largest), 3 * size)  # beyond, the image would be small
    figure = Figure(figsize=(11.6, 9.7), layout="constrained")
    axes = figure.subplots()
    edge = (view - size) / 2 + (1 if view > size else 0)
    axes.set(xlim=(-edge, size + edge), ylim=(size + edge, -edge), xticks=[], yticks=[], aspect="equal")
    axes.add_patch(Rectangle((-edge, -edge), size + 2 * edge, size + 2 * edge, facecolor="#F2F2F2", edgecolor="#D8D8D8",
                             hatch="//", linewidth=0, zorder=0))
    axes.imshow(image, interpolation="nearest", extent=(0, size, size, 0), zorder=1)
    ends = []
    for number, (name, field) in enumerate(stages.items()):
        colour = COLOURS[number % (len(COLOURS) - 1)]  # the last one, yellow, can't be read on white
        corner = (size - field) / 2
        if field <= view:
            axes.add_patch(Rectangle((corner, corner), field, field, fill=False, edgecolor=colour, linewidth=2.5, zorder=2,
                                     path_effects=[withStroke(linewidth=4.5, foreground="white")]))
        words = f"{label(name)}: {field} x {field}" + ("" if field <= view else ", beyond the picture")
        ends.append((min(size - corner, size + edge), max(corner, -edge), words, colour))
    label_line_ends(axes, ends)
    if largest > size:
        axes.text(size / 2, size + edge / 2, "padding", ha="center", va="center", color=GREY,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 3})
    axes.set_title(f"What a unit in the middle of each stage sees of a {size} x {size} image", loc="left", fontsize=13)
    save(figure, path)
