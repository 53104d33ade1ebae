"""Train one epoch; evaluate a network."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import SIDE, UserError
from tinycnn.training.capture import Step
from tinycnn.training.distributed import ALONE, Processes
from tinycnn.training.machine import memory_format
from tinycnn.training.metrics import Result
from tinycnn.training.schedule import set_learning_rate
from tinycnn.training.step import autocast

BatchStream = Iterable[tuple[Tensor, Tensor]]  # images float32 N x 3 x H x W, labels int64 N


def train_epoch(step: Step, batches: BatchStream, learning_rate: Callable[[int], float], bar: tqdm,
                sizes: Iterator[int] | None = None) -> Result:
    """Train on each batch, with the network in training mode. `learning_rate` is given the number of images that this epoch
    has trained on so far. Returns the mean loss and the accuracy of the epoch. Raises Diverged when the loss is not finite.

    `sizes`: those of the whole batches, where `batches` are this process's parts of them.
    """
    step.net.train()
    metrics, shown, trained = step.metrics, time.monotonic(), 0
    metrics.reset()
    for images, labels in batches:
        set_learning_rate(step.optimizer, learning_rate(trained))
        step(*_to_device(images, labels, step.device))
        step.first_done = step.first_done or time.perf_counter()
        metrics.images += len(labels)
        count = next(sizes) if sizes else len(labels)
        trained += count
        bar.update(count)
        if step.processes.is_first and time.monotonic() - shown > 1:
            shown = time.monotonic()
            latest = metrics.latest()
            if latest is not None:
                bar.set_postfix_str(f"loss {latest.checked().loss:.4f}, accuracy {latest.accuracy:.2f} %", refresh=False)
    step.processes.broadcast_buffers(step.net)
    return metrics.result().checked()


def evaluate(net: nn.Module, batches: BatchStream, device: torch.device, processes: Processes = ALONE) -> Result:
    """Mean cross-entropy and accuracy over the batches of all processes. The forward pass runs in bfloat16 where `autocast`
    does. Leaves the network in evaluation mode. Raises Diverged when the loss is not finite."""
    logits, labels = predict(net, batches, device)
    if processes.size > 1:
        loss, correct, images = processes.sum(F.cross_entropy(logits, labels, reduction="sum").item(),
                                              (logits.argmax(1) == labels).sum().item(), len(labels))
        return Result(loss / images, 100 * correct / images).checked()
    sums = torch.stack((F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum().float()))
    loss, correct = sums.tolist()  # one copy from the device
    return Result(loss, 100 * correct / len(labels)).checked()


@torch.no_grad()
def predict(net: nn.Module, batches: BatchStream, device: torch.device) -> tuple[Tensor, Tensor]:
    """The network's logits, float32 N x classes, and the labels, int64 N, of all batches, on the device. Leaves the network in
    evaluation mode."""
    net.eval()
    precision, outputs = autocast(device), []
    for images, labels in batches:
        images, labels = _to_device(images, labels, device)
        with precision:
            outputs.append((net(images).float(), labels))
    return torch.cat([logits for logits, _ in outputs]), torch.cat([labels for _, labels in outputs])


@torch.no_grad()
def check_output(net: nn.Module, num_classes: int, crop_size: int = SIDE) -> None:
    """Raise UserError unless the network, on the CPU, turns N images into N x num_classes logits, whole images and crops of
    `crop_size` pixels. Leaves it in evaluation mode."""
    for side in sorted({SIDE, crop_size}, reverse=True):
        try:
            output = net.eval()(torch.zeros(2, 3, side, side))
        except RuntimeError as error:
            if side == SIDE:
                raise
            raise UserError(f"the network takes images of {SIDE} x {SIDE} pixels only ({error}), but --crop-size is {side}: "
                            f"use --crop-size {SIDE}, or pool the last map in model.py") from error
        found = " x ".join(map(str, output.shape)) if isinstance(output, Tensor) else type(output).__name__
        wanted = f"2 x {num_classes}"
        if found != wanted:
            raise UserError(f"the network returns {found} for 2 images of {side} x {side} pixels, but must return "
                            f"{wanted}, a logit for each class: see forward() in model.py")


def _to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    pinned = device.type == "cuda"  # so the copy needn't be waited for
    return (images.to(device, non_blocking=pinned, memory_format=memory_format(device)),
            labels.to(device, non_blocking=pinned))
