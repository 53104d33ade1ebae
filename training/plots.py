"""Pictures for a person to look at, as PNG files. Colours are those of Okabe and Ito, which colour-blind people can tell apart;
no display is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from training.records import Run

if TYPE_CHECKING:  # a comparison of runs is drawn without loading these
    import albumentations as A

    from training.comparison import Table
    from training.images import Images, Split

COLOURS = BLUE, ORANGE, GREEN, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"
GREY = "#777777"
SPLITS = {"train": (BLUE, "training, augmented images"), "val": (GREEN, "validation"), "test": (ORANGE, "test")}


def draw_all(run: Run, images: "Images", policy: "A.Compose", probabilities: np.ndarray, stages: dict[str, int]) -> list[str]:
    """All pictures of a finished run, into its folder; returns their names. `policy` is that of the training images,
    `probabilities` are those of the test images, float N x classes; `stages` the receptive field behind each, in pixels."""
    names, labels = images.class_names, images.test.labels
    drawings = {
        "accuracy.png": lambda path: accuracy(run, path),
        "confusion_matrix.png": lambda path: confusion_matrix(labels, probabilities.argmax(1), names, path),
        "mistakes.png": lambda path: mistakes(images.test, probabilities, names, path),
        "augmentation.png": lambda path: augmentation(images.train, policy, path),
        "receptive_field.png": lambda path: receptive_field(images.test.images[0], stages, path),
    }
    for name, draw in drawings.items():
        draw(run.folder / name)
    return list(drawings)


def accuracy(run: Run, path: Path) -> None:
    """Accuracy and loss by epoch, and the learning rate below."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    epochs = [row["epoch"] for row in run.rows]
    for name, (colour, words) in SPLITS.items():
        for axes, figures in ((upper, "acc"), (middle, "loss")):
            values = [row.get(f"{name}_{figures}", np.nan) for row in run.rows]
            if not np.isnan(values).all():
                lone = np.isfinite(values).sum() == 1  # the test after the last epoch, where settings are chosen by validation
                axes.plot(epochs, values, color=colour, label=f"{words}: {values[-1]:.2f} at the end", linewidth=1.5,
                          marker="o" if lone else None)
    upper.set(ylabel="accuracy, %", title=f"{run.folder.name}: {run.record['dataset']['kind']}")
    upper.legend(loc="lower right")
    middle.set(ylabel="loss, nats an image")
    middle.legend(loc="upper right")
    lower.plot(epochs, [row["lr"] for row in run.rows], color=GREY)
    lower.set(ylabel="learning rate", xlabel="epoch", ylim=(0, None))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, middle, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """How many images of each class (rows) were taken for which (columns), and each class's accuracy. `labels` and
    `predicted` are int, N."""
    classes = len(class_names)
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(5 + 0.5 * classes, 3.5 + 0.5 * classes), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(classes, classes):
        if counts[row, column]:
            left.text(column, row, counts[row, column], ha="center", va="center", fontsize=8,
                      color="white" if shares[row, column] > 0.6 else "black")
    left.set(xlabel="predicted class", ylabel="true class", title="test images")
    left.set_xticks(range(classes), class_names, rotation=45, ha="right")
    left.set_yticks(range(classes), class_names)
    own = 100 * shares.diagonal()
    right.barh(range(classes), own, color=BLUE)
    for row, value in enumerate(own):
        inside = value > 50
        right.text(value + (-2 if inside else 2), row, f"{value:.1f}", ha="right" if inside else "left", va="center",
                   color="white" if inside else "black", fontsize=8)
    right.set(xlabel="accuracy of the class, %", xlim=(0, 100), title=f"all: {100 * (labels == predicted).mean():.2f} %")
    figure.savefig(path, dpi=100)


def mistakes(test: "Split", probabilities: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """The 36 wrong predictions with the highest probability, float N x classes: predicted class in orange, true class in
    blue."""
    predicted, labels = probabilities.argmax(1), test.labels
    sure = np.where(predicted != labels, probabilities.max(1), -1)
    worst = [index for index in np.argsort(-sure, kind="stable")[:36] if sure[index] >= 0]
    figure = Figure(figsize=(10, 11.5), layout="constrained")
    figure.suptitle(f"The {len(worst)} wrong predictions made with most confidence, of {(sure >= 0).sum():,} wrong ones")
    for axes, index in zip(figure.subplots(6, 6).flat, [*worst, *[None] * (36 - len(worst))], strict=True):
        axes.set(xticks=[], yticks=[])
        if index is None:
            axes.axis("off")
            continue
        axes.imshow(test.images[index], interpolation="nearest")
        axes.set_title(f"{class_names[predicted[index]]} {100 * sure[index]:.1f} %", color=ORANGE, fontsize=9)
        axes.set_xlabel(f"is {class_names[labels[index]]}", color=BLUE, fontsize=9)
    figure.savefig(path, dpi=100)


def augmentation(train: "Split", policy: "A.Compose", path: Path, rows: int = 8, columns: int = 9) -> None:
    """An image of each class, of the first eight, and what the policy makes of it, before it is normalized."""
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    visible = A.Compose([step for step in policy.transforms if not isinstance(step, (A.Normalize, ToTensorV2))], seed=0)
    originals = [train.images[np.flatnonzero(train.labels == label)[0]] for label in np.unique(train.labels)[:rows]]
    copies = [[visible(image=image)["image"] for _ in range(columns)] for image in originals]
    rows = len(originals)
    figure = Figure(figsize=(1.1 * (columns + 1), 1.1 * rows + 0.6), layout="constrained")
    for row, line in enumerate(np.atleast_2d(figure.subplots(rows, columns + 1))):
        for column, axes in enumerate(line):
            axes.imshow(originals[row] if column == 0 else copies[row][column - 1], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set(color=BLUE if column == 0 else "none", linewidth=2)
            if row == 0:
                axes.set_title("original" if column == 0 else f"copy {column}", fontsize=8)
    figure.savefig(path, dpi=100)


def receptive_field(image: np.ndarray, stages: dict[str, int], path: Path) -> None:
    """Over an image, uint8 H x W x 3, the square that a unit in the middle of each stage's map sees: `stages` are receptive
    fields in pixels."""
    size, largest = image.shape[0], max(stages.values(), default=0)
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots()
    edge = (max(size, largest) - size) / 2 + 2
    axes.imshow(image, interpolation="nearest", extent=(0, size, size, 0))
    for number, (name, field) in enumerate(stages.items()):
        colour = COLOURS[number % len(COLOURS)]
        corner = (size - field) / 2
        axes.add_patch(Rectangle((corner, corner), field, field, fill=False, edgecolor=colour, linewidth=2,
                                 label=f"{name}: {field} x {field}",
                                 path_effects=[withStroke(linewidth=4, foreground="white")]))
    axes.set(xlim=(-edge, size + edge), ylim=(size + edge, -edge), xlabel="pixels", ylabel="pixels", aspect="equal",
             title=f"What a unit in the middle sees of a {size} x {size} image")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=100)


def experiments(table: "Table", path: Path) -> None:
    """The rows of a comparison: accuracy against multiply-adds, and the accuracy of the newest run of each by epoch. The first
    eight have colours and names."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, row in reversed(list(enumerate(table.rows))):
        named = number < len(COLOURS)
        style = {"color": COLOURS[number] if named else "#BBBBBB", "label": row.change(table.shared) if named else None}
        values, run = row.values(row.metric), row.runs[0]
        left.errorbar([run.record["network"]["multiply_adds"] / 1e6], [np.mean(values)], fmt="o", capsize=4, **style,
                      yerr=[np.std(values, ddof=1)] if len(values) > 1 else None)
        right.plot([each["epoch"] for each in run.rows], [each[row.metric] for each in run.rows], linewidth=1.2, **style)
    left.set(xlabel="multiply-adds of an image, millions", ylabel=f"{table.judged_by} accuracy, %",
             title="means, and standard deviations over seeds")
    right.set(xlabel="epoch", ylabel=f"{table.judged_by} accuracy, %", title="the newest run of each")
    handles, words = right.get_legend_handles_labels()
    right.legend(handles[::-1], words[::-1], fontsize=8, loc="lower right", title="differs from the reference")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    shared = ", ".join(f"{key} {value}" for key, value in table.shared.items())
    figure.suptitle(table.dataset + (f"\nall differ from the reference in: {shared}" if shared else ""), wrap=True)
    figure.savefig(path, dpi=100)
