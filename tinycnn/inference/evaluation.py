"""Evaluate a trained network on the test images: accuracy, loss, calibration, each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinycnn.data.batches import Batches
from tinycnn.text import printable
from tinycnn.training.epoch import predict

BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """Accuracies and the calibration error in percent, the loss in nats per image."""

    accuracy: float
    loss: float
    calibration_error: float
    class_accuracies: list[float]  # nan for a class without images

    def __str__(self) -> str:
        return (f"accuracy {self.accuracy:.2f} %, loss {self.loss:.4f}, "
                f"expected calibration error {self.calibration_error:.2f} %")


def evaluate_predictions(logits: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate logits, float32 N x classes, against labels, int64 N."""
    correct = (logits.argmax(1) == labels).double()
    return Evaluation(
        accuracy=100 * correct.mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        calibration_error=100 * expected_calibration_error(logits.softmax(1), labels),
        class_accuracies=[100 * correct[labels == label].mean().item() for label in range(logits.shape[1])])


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error, as a fraction (Guo et al. 2017, "On calibration of modern neural networks",
    arXiv:1706.04599): the mean over all images of |accuracy - confidence| in the image's bin, of 15 bins of equal width.
    `probabilities`: float, N x classes; `labels`: int64, N."""
    confidence, predicted = probabilities.double().max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # a bin includes its upper end, as in the paper
    gaps = torch.zeros(BINS, dtype=torch.float64, device=labels.device)
    gaps.index_add_(0, bins, (predicted == labels).double() - confidence)
    return gaps.abs().sum().item() / len(labels)


def report_evaluation(net: nn.Module, batches: Batches, device: torch.device, class_names: Sequence[str], flip: bool) -> str:
    """Evaluate `net` on the test images, as text. With `flip`, also the mean of its logits for each image and its mirror
    image."""
    logits, labels = (values.cpu() for values in predict(net, batches.in_order("test"), device))
    evaluation, names = evaluate_predictions(logits, labels), [printable(name) for name in class_names]
    width = max(map(len, names))
    lines = [str(evaluation), ""]
    lines += [f"  {name:{width}}  {accuracy:6.2f} %" for name, accuracy in zip(names, evaluation.class_accuracies, strict=True)]
    if flip:
        mirrored = ((images.flip(3), labels) for images, labels in batches.in_order("test"))
        logits = (logits + predict(net, mirrored, device)[0].cpu()) / 2
        lines += ["", f"with each image also mirrored: {evaluate_predictions(logits, labels)}"]
    return "\n".join(lines)
