"""What tinycnn/training/dilated.py gains on a CPU: for the dilated convolution alone, and for a whole training step.

    python benchmarks/dilated.py        prints, and writes benchmarks/results/dilated.txt

Forward and backward pass, batch 128, one thread. The two take turns, and their medians are compared.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from config import Config  # noqa: E402 (after the path is set)
from model import Net  # noqa: E402
from tinycnn.training.dilated import use_fast_dilated_convs  # noqa: E402
from tinycnn.training.machine import describe_device, keep_freed_memory  # noqa: E402
from tinycnn.training.step import TrainStep  # noqa: E402

CPU, BATCH, ROUNDS = torch.device("cpu"), 128, 30


def convolution_step(layer: nn.Conv2d) -> Callable[[], None]:
    maps = torch.randn(BATCH, layer.in_channels, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    gradients = torch.randn_like(maps)
    return lambda: layer(maps).backward(gradients)


def training_step(net: nn.Module) -> Callable[[], None]:
    config = Config()
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    step = TrainStep(net.train(), optimizer, CPU, config.label_smoothing)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 10
    return lambda: step(images, labels)


def medians(ways: list[Callable[[], None]]) -> list[float]:
    """Seconds of each way. They take turns; the first three rounds are warm-up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 3):
        for way, times in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[3:]) for times in seconds]


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    plain = Net().to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    use_fast_dilated_convs(fast, CPU)
    lines = [f"Dilated convolution, {describe_device(CPU)}, one thread, medians of {ROUNDS} interleaved rounds", "",
             f"{'forward and backward, ms':<30} {'PyTorch':>8} {'fast':>8} {'ratio':>6}"]
    for name, make in (("the dilated convolution", lambda net: convolution_step(net.conv_block4[1][0])),
                       ("a whole training step", training_step)):
        plain_seconds, fast_seconds = medians([make(plain), make(fast)])
        lines.append(f"{name:<30} {1e3 * plain_seconds:8.1f} {1e3 * fast_seconds:8.1f} {plain_seconds / fast_seconds:6.2f}")
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "dilated.txt").write_text(text)


if __name__ == "__main__":
    main()
