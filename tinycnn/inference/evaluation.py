"""Evaluate a trained network on the test images: accuracy, loss, calibration, each class, what is confused with what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinycnn.text import printable

BINS = 15
CONFUSED_PAIRS = 10  # printed at most


@dataclass(frozen=True)
class Evaluation:
    """Accuracies and the calibration error in percent, the loss in nats per image. `confusion`: int64, classes x classes, how
    many images of a class (row) were classified as each (column)."""

    accuracy: float
    loss: float
    calibration_error: float
    confusion: Tensor

    @property
    def class_accuracies(self) -> list[float]:
        """The accuracy of each class; nan for one without images."""
        return (100 * self.confusion.diag().double() / self.confusion.sum(1)).tolist()

    @property
    def confused(self) -> list[tuple[int, int, int]]:
        """Pairs of a class and the other one that its images were taken for, with their number, the largest first."""
        wrong = self.confusion - self.confusion.diag().diag()
        pairs = [(label, predicted, int(wrong[label, predicted])) for label, predicted in wrong.nonzero().tolist()]
        return sorted(pairs, key=lambda pair: -pair[2])

    def __str__(self) -> str:
        return (f"accuracy {self.accuracy:.2f} %, loss {self.loss:.4f}, "
                f"expected calibration error {self.calibration_error:.2f} %")


def evaluate_predictions(logits: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate logits, float32 N x classes, against labels, int64 N."""
    classes, predicted = logits.shape[1], logits.argmax(1)
    return Evaluation(
        accuracy=100 * (predicted == labels).double().mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        calibration_error=100 * expected_calibration_error(logits.softmax(1), labels),
        confusion=torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes))


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error, as a fraction (Guo et al. 2017, "On calibration of modern neural networks",
    arXiv:1706.04599): the mean over all images of |accuracy - confidence| in the image's bin, of 15 bins of equal width.
    `probabilities`: float, N x classes; `labels`: int64, N."""
    confidence, predicted = probabilities.double().max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # a bin includes its upper end, as in the paper
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, (predicted == labels).double() - confidence)
    return gaps.abs().sum().item() / len(labels)


def as_text(evaluation: Evaluation, class_names: Sequence[str], mirrored: Evaluation | None = None) -> str:
    """An evaluation for a terminal. `mirrored`: that of the mean logits of each image and its mirror image."""
    names = [printable(name) for name in class_names]
    width = max(map(len, names))
    lines = [str(evaluation), ""]
    lines += [f"  {name:{width}}  {accuracy:6.2f} %"
              for name, accuracy in zip(names, evaluation.class_accuracies, strict=True)]
    if evaluation.confused:
        pairs = (f"{names[label]} as {names[predicted]} {count}"
                 for label, predicted, count in evaluation.confused[:CONFUSED_PAIRS])
        lines += ["", f"most confused: {', '.join(pairs)}"]
    if mirrored:
        lines += ["", f"with each image also mirrored: {mirrored}"]
    return "\n".join(lines)


def as_json(evaluation: Evaluation, class_names: Sequence[str], mirrored: Evaluation | None = None) -> dict[str, Any]:
    """An evaluation as JSON has it, all pairs of confused classes included. The accuracy of a class without images is None."""
    content = {
        "images": int(evaluation.confusion.sum()), **_figures(evaluation),
        "classes": [{"class": name, "accuracy": accuracy if accuracy == accuracy else None}
                    for name, accuracy in zip(class_names, evaluation.class_accuracies, strict=True)],
        "confused": [{"class": class_names[label], "as": class_names[predicted], "images": count}
                     for label, predicted, count in evaluation.confused]}
    return content | ({"mirrored": _figures(mirrored)} if mirrored else {})


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {name: getattr(evaluation, name) for name in ("accuracy", "loss", "calibration_error")}
