"""Loss and accuracy, summed on the device while an epoch runs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tinycnn.training.distributed import ALONE, Processes
from tinycnn.training.errors import Diverged


class Result(NamedTuple):
    """Mean loss, in nats per image, and accuracy, in percent. In training both are means over an epoch in which the weights
    change, and with a teacher the loss includes the distillation loss."""

    loss: float
    accuracy: float

    def checked(self) -> "Result":
        """Return this result. Raises Diverged where its loss is not finite."""
        if not math.isfinite(self.loss):
            raise Diverged(f"the loss became {self.loss}: training has diverged, lower --lr")
        return self


class Metrics:
    """Sums of the loss and of correct predictions, kept on the device so that adding to them never waits for it."""

    def __init__(self, device: torch.device, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.sums = torch.zeros(2, device=device)  # loss, correct predictions
        self.images = 0
        self.on_cuda = device.type == "cuda"
        self.copy: Tensor | None = None  # of the sums, on the host
        self.copied: torch.cuda.Event | None = None
        self.copied_images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, its logits N x classes and its labels N. The caller counts `images`, because a CUDA graph
        may replay this method without running its Python."""
        self.sums[0] += loss.detach().float() * len(labels)
        self.sums[1] += (logits.detach().argmax(1) == labels).sum()

    def reset(self) -> None:
        """Set the sums to zero, in the same memory."""
        self.sums.zero_()
        self.images, self.copied = 0, None

    def result(self) -> Result:
        """Loss and accuracy so far, of all processes. Waits for the device, and for them."""
        loss, correct, images = self.processes.sum(*self.sums.tolist(), self.images)
        return Result(loss=loss / images, accuracy=100 * correct / images)

    def latest(self) -> Result | None:
        """Loss and accuracy so far, of this process, without waiting: on CUDA those of the previous call, or None while their
        copy is under way."""
        if not self.on_cuda:
            return self._result(self.sums, self.images) if self.images else None
        if self.copy is None:
            self.copy = torch.zeros(2, pin_memory=True)
        arrived = self.copied is not None and self.copied.query()
        result = self._result(self.copy, self.copied_images) if arrived else None
        if arrived or self.copied is None:
            self.copy.copy_(self.sums, non_blocking=True)
            self.copied, self.copied_images = torch.cuda.Event(), self.images
            self.copied.record()
        return result

    @staticmethod
    def _result(sums: Tensor, images: int) -> Result:
        loss, correct = sums.tolist()  # one copy from the device
        return Result(loss=loss / images, accuracy=100 * correct / images)
