"""What training/dilated.py gains on a CPU: the dilated convolution alone, and a whole step of training.

    python benchmarks/dilated.py        prints, and writes benchmarks/results/dilated.txt

Forwards and backwards, batch 128, one thread; both ways take turns, and medians are compared.
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
from training.dilated import quicken  # noqa: E402
from training.loop import TrainStep, describe, keep_freed_memory  # noqa: E402

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
    """Seconds of each way, which take turns; the first three rounds don't count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 3):
        for way, found in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            way()
            found.append(time.perf_counter() - started)
    return [statistics.median(found[3:]) for found in seconds]


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    plain = Net().to(memory_format=torch.channels_last)
    quick = copy.deepcopy(plain)
    quicken(quick, CPU)
    lines = [f"Dilated convolution, {describe(CPU)}, one thread, medians of {ROUNDS} interleaved rounds", "",
             f"{'forwards and backwards, ms':<30} {'PyTorch':>8} {'quick':>8} {'ratio':>6}"]
    for name, make in (("the dilated convolution", lambda net: convolution_step(net.conv_block4[1][0])),
                       ("a whole step of training", training_step)):
        theirs, ours = medians([make(plain), make(quick)])
        lines.append(f"{name:<30} {1e3 * theirs:8.1f} {1e3 * ours:8.1f} {theirs / ours:6.2f}")
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "dilated.txt").write_text(text)


if __name__ == "__main__":
    main()
