"""What saved weights are worth on the test images: accuracy, loss, calibration, each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.loop import predict

if TYPE_CHECKING:
    from training.batches import Batches
    from training.device_batches import DeviceBatches

BINS = 15


@dataclass(frozen=True)
class Figures:
    """Accuracies and the calibration error in percent, the loss in nats an image."""

    accuracy: float
    loss: float
    calibration_error: float
    by_class: list[float]  # nan for a class without images

    def __str__(self) -> str:
        return (f"accuracy {self.accuracy:.2f} %, loss {self.loss:.4f}, "
                f"expected calibration error {self.calibration_error:.2f} %")


def figures(logits: Tensor, labels: Tensor) -> Figures:
    """Of logits float32 N x classes and labels int64 N."""
    right = (logits.argmax(1) == labels).double()
    of_class = [right[labels == label] for label in range(logits.shape[1])]
    return Figures(100 * right.mean().item(), F.cross_entropy(logits, labels).item(),
                   100 * expected_calibration_error(logits.softmax(1), labels), [100 * each.mean().item() for each in of_class])


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """How far confidence is from accuracy, as a fraction: the mean over all images of |accuracy - confidence| in the image's
    bin, of 15 equally wide bins by confidence (Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599).
    `probabilities` is float N x classes, `labels` int64 N."""
    confidence, predicted = probabilities.double().max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64, device=labels.device)
    gaps.index_add_(0, bins, (predicted == labels).double() - confidence)
    return gaps.abs().sum().item() / len(labels)


def report(net: nn.Module, batches: "Batches | DeviceBatches", device: torch.device, class_names: Sequence[str],
           flip: bool) -> str:
    """The figures of `net` on the test images, as text; with `flip` also those of the mean of its logits for each image and for
    the mirrored one."""
    logits, labels = (each.cpu() for each in predict(net, batches.in_order("test"), device))
    plain, width = figures(logits, labels), max(map(len, class_names))
    lines = [str(plain), ""]
    lines += [f"  {name:{width}}  {accuracy:6.2f} %" for name, accuracy in zip(class_names, plain.by_class, strict=True)]
    if flip:
        mirrored = ((images.flip(3), labels) for images, labels in batches.in_order("test"))
        logits = (logits + predict(net, mirrored, device)[0].cpu()) / 2
        lines += ["", f"with each image also mirrored: {figures(logits, labels)}"]
    return "\n".join(lines)
