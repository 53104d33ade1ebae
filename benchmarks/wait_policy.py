"""Threads that spin while they wait for each other, beside threads that sleep: steps alone and beside busy programs.

    python benchmarks/wait_policy.py

OpenMP reads OMP_WAIT_POLICY when it is loaded, so each measurement is a process of its own. All take turns; the rows have
medians, and the median ratio to spinning threads within a turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinycnn.cores import available_cores

BUSY = "while True: pass"
STEPS = 12


def steps(threads: int) -> None:
    """Print the median milliseconds of a step."""
    import time

    import torch

    from main import train_step
    from model import Net
    from tinycnn.training.distillation import CrossEntropy
    from tinycnn.training.optimizer import SGD

    torch.set_num_threads(threads)
    net = Net().to(memory_format=torch.channels_last).train()
    optimizer, criterion = SGD(net.parameters(), lr=0.01, momentum=0.9), CrossEntropy(0.0)
    images, labels = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(0, 10, (128,))
    taken = []
    for _ in range(STEPS + 3):
        began = time.perf_counter()
        train_step(net, optimizer, criterion, images, labels)
        taken.append(time.perf_counter() - began)
    print(1000 * statistics.median(taken[3:]))


def measured(threads: int, policy: dict[str, str]) -> float:
    """Milliseconds of a step in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--steps", str(threads)], env=os.environ | policy, check=True,
                          capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        return steps(options.steps)
    cores = available_cores()
    ways = {f"{cores} threads that spin": (cores, {}), f"{cores} threads that sleep": (cores, {"OMP_WAIT_POLICY": "PASSIVE"}),
            "1 thread": (1, {})}
    found: dict[tuple[int, str], list[float]] = {}
    for _ in range(options.repeats):
        for load in (0, cores):
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
            for way, (threads, policy) in ways.items():
                found.setdefault((load, way), []).append(measured(threads, policy))
            for process in busy:
                process.kill()
    print(f"Steps of 128 images on a CPU of {cores} cores, median of {options.repeats} turns\n\n"
          f"{'busy programs beside':22}{'steps by':24}{'ms':>8}{'ratio':>8}")
    for (load, way), values in found.items():
        ratios = [value / base for value, base in zip(values, found[load, next(iter(ways))], strict=True)]
        print(f"{load:<22}{way:24}{statistics.median(values):8.0f}{statistics.median(ratios):8.2f}")


if __name__ == "__main__":
    main()
