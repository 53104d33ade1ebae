"""Training speed on a CPU, by each way to make batches, beside the script most people write; and what bounds it.

    python benchmarks/training_speed.py --data-dir ~/data          prints, and writes benchmarks/results/training_*.txt

All train the same network on the same images with the same batch size and threads. Each measurement is a process of its
own; the paths take turns, and medians are compared. "The usual script" is a Dataset that opens one PIL image at a time and
ends in ToTensorV2, NCHW memory, and .item() on every batch. benchmarks/gpu_session.py measures on a GPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.others import WARM_UP, Measured, make_program, this_program, usual_script
from config import Config
from model import Net
from tinycnn.cores import available_cores

RESULTS = Path(__file__).parent / "results"
EPOCHS, TRAIN, TEST = 80, 50_000, 10_000


# ---------------------------------------------------------------- the paths

def paths() -> dict[str, Callable[[argparse.Namespace], Measured]]:
    """The rows of the table; the first is what the ratios are to."""
    rows: dict[str, Callable[[argparse.Namespace], Measured]] = {
        "the usual script, 2 workers": lambda arguments: usual_script(arguments, 2, available_cores())}
    for workers in (2, 4, 8):
        rows[f"main.py, {workers} workers"] = partial(ours, batches="workers", workers=workers)
    return rows | {"main.py, device": partial(ours, batches="device")}


def ours(arguments: argparse.Namespace, **settings: Any) -> Measured:
    return this_program(Config(dataset="cifar10", data_dir=arguments.data_dir, device="cpu", **settings), arguments.steps)


def measured(path: str, arguments: argparse.Namespace) -> Measured:
    """One measurement of `path` in a new process."""
    command = [sys.executable, __file__, "--measure", path, "--data-dir", arguments.data_dir, "--steps", str(arguments.steps)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


# ---------------------------------------------------------------- what bounds them

def traffic() -> int:
    """The values that an image's training step must move to and from memory at the least.

    With everything fused that batch statistics allow, a convolution's output is written and read once forwards; backwards
    it is read once, its gradient written and read once; and where BatchNorm follows, both are read once more for its sums.
    """
    net, moved = Net().eval(), 0
    layers = [layer for layer in net.modules() if not list(layer.children())]

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal moved
        normalized = layer is not layers[-1] and isinstance(layers[layers.index(layer) + 1], nn.BatchNorm2d)
        moved += output[0].numel() * (7 if normalized else 5)

    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    net(torch.zeros(1, 3, 32, 32))
    return moved


def floor() -> str:
    """The least time of an epoch's memory traffic."""
    block = torch.ones(2**26)
    other, seconds = torch.empty_like(block), []
    for _ in range(15):
        started = time.perf_counter()
        other.copy_(block)
        seconds.append(time.perf_counter() - started)
    bandwidth, size = 2 * block.numel() * 4 / min(seconds), 4 * traffic()
    return (f"memory: a step moves {size / 1e6:.1f} MB an image at least; at {bandwidth / 1e9:.0f} GB/s, which a copy reaches "
            f"here, that is {TRAIN * size / bandwidth:.2f} s an epoch")


def profile(data_dir: str, steps: int = 10) -> str:
    """Where the time of a step goes, by kind of operation, with batches made on the device."""
    step, net, _, made = make_program(Config(dataset="cifar10", data_dir=data_dir, device="cpu", batches="device"))
    batches = iter(made.train(0))
    net.train()
    for batch in islice(batches, WARM_UP):
        step(*batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for batch in islice(batches, steps):
            step(*batch)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    most = sorted(times.items(), key=lambda item: -item[1])[:12]
    return "\n".join([f"Shares of a step's time, {machine()}, the device path, {steps} steps", "",
                      *(f"{100 * spent / sum(times.values()):5.1f} %  {name[:90]}" for name, spent in most)]) + "\n"


def machine() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def proportional_memory(pid: int) -> int:
    """Bytes that a process and its descendants hold, shared pages counted once (Linux)."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total = 1024 * next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(proportional_memory(int(child)) for child in (thread / "children").read_text().split())
        return total
    except (ProcessLookupError, FileNotFoundError):  # it has just ended
        return 0


def peak_memory(arguments: argparse.Namespace, batches: str) -> float:
    """The peak, in GB, of `python main.py --epochs 1` with all its processes: loading, an epoch, a test, the final files."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, str(Path(__file__).parents[1] / "main.py"), "--dataset", "cifar10", "--data-dir",
                   arguments.data_dir, "--device", "cpu", "--batches", batches, "--log-dir", logs, "--epochs", "1",
                   "--no-pictures"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, proportional_memory(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError("python main.py failed")
    return peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=40, help="steps a measurement (default: 40)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.set_defaults(dataset="cifar10", device="cpu")
    arguments = parser.parse_args()
    rows = paths()
    if arguments.measure:
        print(json.dumps(rows[arguments.measure](arguments)))
        return
    found: dict[str, list[Measured]] = {path: [] for path in rows}
    speeds = RESULTS / "training_speed.txt"
    for _ in range(arguments.repeats):
        for path in found:
            found[path].append(measured(path, arguments))
            print(f"{path}: {found[path][-1]['train']:.0f} images/s", flush=True)
        speeds.write_text(table(found, arguments))
    shares = profile(arguments.data_dir)
    (RESULTS / "training_profile.txt").write_text(shares)
    with speeds.open("a") as lines:
        print("", floor(), sep="\n", file=lines)
        if sys.platform == "linux":
            peaks = (f"--batches {batches}: {peak_memory(arguments, batches):.2f} GB" for batches in ("workers", "device"))
            print("peak memory of python main.py --epochs 1, all processes:", ", ".join(peaks), file=lines)
    print("", speeds.read_text(), shares, sep="\n")


def table(found: dict[str, list[Measured]], arguments: argparse.Namespace) -> str:
    """The rows with their medians; the times of an epoch and of 80 epochs with a test each are worked out from them. The
    ratio is to the first row."""
    medians = {path: {key: statistics.median(each[key] for each in values) for key in values[0]}
               for path, values in found.items()}
    usual, repeats = next(iter(medians.values())), len(next(iter(found.values())))
    lines = [f"Training speed, {machine()}, batch 128, {repeats} interleaved measurements of {arguments.steps} steps", "",
             f"{'':<29} {'images/s: median':>16} {'min':>7} {'max':>7} {'ratio':>7} {'epoch, s':>9} {'80 epochs, s':>13}"]
    for path, median in medians.items():
        train, speeds = median["train"], [each["train"] for each in found[path]]
        lines.append(f"{path:<29} {train:16,.0f} {min(speeds):7,.0f} {max(speeds):7,.0f} {train / usual['train']:7.2f} "
                     f"{TRAIN / train:9.2f} {EPOCHS * (TRAIN / train + TEST / median['test']):13,.1f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
