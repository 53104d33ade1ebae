"""Train one epoch, test once."""

import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError
from training.faults import Diverged
from training.teacher import Teacher

BatchStream = Iterable[tuple[Tensor, Tensor]]


class Result(NamedTuple):
    """Mean loss, in nats an image, and accuracy, in percent."""

    loss: float
    accuracy: float


class Figures:
    """Sums of the loss and of right predictions, kept on the device, so that adding to them waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # loss, right predictions
        self.images = 0
        self.on_cuda = device.type == "cuda"
        self.copy = torch.zeros(2, pin_memory=self.on_cuda)
        self.copied: torch.cuda.Event | None = None
        self.copied_images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch to the sums: its mean loss, its logits N x classes and its labels N. `images` is counted by the
        caller, because this may be replayed on the device without coming through here."""
        right = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack((loss.detach().float() * len(labels), right.float()))

    def reset(self) -> None:
        """Begin again, in the same memory."""
        self.sums.zero_()
        self.images, self.copied = 0, None

    def result(self) -> Result:
        """The figures so far. Waits for the device."""
        return self._result(self.sums.cpu(), self.images)

    def glance(self) -> Result | None:
        """The figures so far, or on CUDA those at the last glance, if their copy has arrived: waits for nothing."""
        if not self.on_cuda:
            return self.result()
        arrived = self.copied is not None and self.copied.query()
        result = self._result(self.copy, self.copied_images) if arrived else None
        if arrived or self.copied is None:
            self.copy.copy_(self.sums, non_blocking=True)
            self.copied, self.copied_images = torch.cuda.Event(), self.images
            self.copied.record()
        return result

    @staticmethod
    def _result(sums: Tensor, images: int) -> Result:
        return Result(loss=sums[0].item() / images, accuracy=100 * sums[1].item() / images)


class Step(Protocol):
    """What trains on one batch: a TrainStep, or one that is captured."""

    net: nn.Module
    device: torch.device
    figures: Figures

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Images float32 N x 3 x H x W and labels int64 N, on the device."""


class TrainStep:
    """Called with images float32 N x 3 x H x W and labels int64 N on the device: one step of the optimizer, and the batch
    added to the figures. It waits for nothing."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device,
                 label_smoothing: float, teacher: Teacher | None = None) -> None:
        self.net, self.optimizer, self.device = net, optimizer, device
        self.label_smoothing, self.teacher = label_smoothing, teacher
        self.figures, self.autocast = Figures(device), _autocast(device)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        with self.autocast:
            logits = self.net(images)
            # on CUDA autocast would leave its softmax in bfloat16
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
            if self.teacher:
                loss = self.teacher.join(loss, logits, images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.figures.add(loss, logits, labels)


def train_epoch(step: Step, batches: BatchStream, bar: tqdm) -> Result:
    """One step for each batch (images float32 N x 3 x H x W, labels int64 N). Returns the figures of the epoch as it went,
    with the network in training mode. Raises Diverged when the loss is not finite."""
    step.net.train()
    figures, shown = step.figures, time.monotonic()
    figures.reset()
    for images, labels in batches:
        step(*_move(images, labels, step.device))
        figures.images += len(labels)
        bar.update(len(labels))
        if time.monotonic() - shown > 1:
            shown = time.monotonic()
            _show(figures.glance(), bar)
    return _finite(figures.result())


def test(net: nn.Module, batches: BatchStream, device: torch.device) -> Result:
    """The figures of the network in evaluation mode; the loss is plain cross-entropy. Raises Diverged when it is not
    finite."""
    logits, labels = predict(net, batches, device)
    right = (logits.argmax(1) == labels).sum().item()
    return _finite(Result(F.cross_entropy(logits, labels).item(), 100 * right / len(labels)))


@torch.no_grad()
def predict(net: nn.Module, batches: BatchStream, device: torch.device) -> tuple[Tensor, Tensor]:
    """The network's logits, float32 N x classes, and the true labels, int64 N, of all batches, on the device."""
    net.eval()
    autocast, found = _autocast(device), []
    for images, labels in batches:
        images, labels = _move(images, labels, device)
        with autocast:
            found.append((net(images).float(), labels))
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def _move(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    pinned = device.type == "cuda"  # so the copy needn't be waited for
    return (images.to(device, non_blocking=pinned, memory_format=torch.channels_last),
            labels.to(device, non_blocking=pinned))


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on GPUs that have it in hardware. Nothing is cached: each weight is used once in a pass, and a cache would
    outlive a capture."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast, cache_enabled=False)


def _show(result: Result | None, bar: tqdm) -> None:
    if result is not None:
        _finite(result)
        bar.set_postfix_str(f"loss {result.loss:.4f}, accuracy {result.accuracy:.2f} %", refresh=False)


def _finite(result: Result) -> Result:
    if not math.isfinite(result.loss):
        raise Diverged(f"the loss became {result.loss}: training has diverged, lower --lr")
    return result


# ---------------------------------------------------------------- the machine

def find_device(name: str) -> torch.device:
    """The device of Config's name for it. Raises UserError when it isn't there, or this PyTorch can't use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        raise UserError(f"device is {name}, but this PyTorch finds {there} {kind} devices: "
                        "use --device cpu, or install a PyTorch that fits the hardware")
    device = torch.device(name)
    try:
        if kind == "cuda":
            torch.cuda.set_device(int(index or 0))  # events and pinned memory belong to the current device
            torch.backends.cudnn.benchmark = True
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:  # a GPU that is too old for this build, say
        raise UserError(f"this PyTorch can't use device {name} ({str(error).splitlines()[0]}): use --device cpu, or install "
                        "a PyTorch that fits the hardware") from error
    return device


def describe(device: torch.device) -> str:
    """The device with the model of its processor, for the records."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    processor = platform.processor()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:  # Linux names the model here only
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{device} ({processor or platform.machine()})"


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_torch(seed: int, epoch: int) -> None:
    """Make torch's own random numbers (the network's initialization, dropout) a function of (seed, epoch).

    The two are hashed because torch's CPU generator looks at 32 bits of its seed only.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step, instead of returning and fetching the pages of every
    activation anew. Elsewhere, nothing."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)   # M_MMAP_MAX: no block in a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back
