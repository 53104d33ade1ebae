"""Training speed of every path, side by side with the script most people write, and what bounds it.

    python benchmarks/training_speed.py --data-dir ~/data          prints, and writes benchmarks/results/training_speed*.txt

All train the same network on the same images with the same batch size and threads. Each measurement is a process of its
own; the paths take turns, and medians are compared. "The usual script" is a Dataset that opens one PIL image at a time and
ends in ToTensorV2, NCHW memory, and .item() on every batch. On CUDA "the fast public style" joins: images on the GPU,
torch.compile with max-autotune, an epoch flipped and cropped at once and cut into slices. It augments less than the others.
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
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.others import WARM_UP, Measured, fast_public_style, timed, usual_script
from benchmarks.program import make_program
from config import Config, available_cores
from model import Net
from training.capture import CapturedStep
from training.epoch import evaluate, train_epoch

RESULTS = Path(__file__).parent / "results"
EPOCHS, TRAIN, TEST = 80, 50_000, 10_000
FAST = "the fast public style"


# ---------------------------------------------------------------- the paths

def this_program(arguments: argparse.Namespace, **settings: object) -> Measured:
    """main.py's own parts."""
    config = Config(dataset="cifar10", data_dir=arguments.data_dir, device=arguments.device, **settings)  # type: ignore[arg-type]
    program = make_program(config)
    step, batches, device, epochs = program.step, program.batches, program.device, iter(range(100))
    with closing(batches), tqdm(disable=True) as bar:
        measured = timed(lambda each: train_epoch(step, each, lambda images: config.lr, bar),
                         lambda: batches.shuffled("train", next(epochs)), arguments.steps, device)
        measured["test"] = timed(lambda each: evaluate(step.net, each, device), lambda: batches.in_order("test"),
                                 10, device)["train"]
    if config.capture == "on" and not (isinstance(step, CapturedStep) and step.possible):
        raise RuntimeError(f"steps were not captured: {step.note}")
    if device.type == "cuda":
        measured["memory"] = torch.cuda.max_memory_reserved()
    return measured


def paths(cuda: bool) -> dict[str, Callable[[argparse.Namespace], Measured]]:
    """The rows of the table; the first is what the ratios are to."""
    usual = 8 if cuda else 2
    rows: dict[str, Callable[[argparse.Namespace], Measured]] = {
        f"the usual script, {usual} workers": lambda arguments: usual_script(arguments, usual, available_cores())}
    for workers in (2, 4, 8):
        rows[f"main.py, {workers} workers"] = lambda arguments, workers=workers: this_program(  # type: ignore[misc]
            arguments, batches="workers", workers=workers)
    rows["main.py, device"] = lambda arguments: this_program(arguments, batches="device", capture="off")
    if cuda:
        rows["main.py, device, captured"] = lambda arguments: this_program(arguments, batches="device", capture="on")
        rows[FAST] = fast_public_style
    return rows


def measured(path: str, arguments: argparse.Namespace) -> Measured:
    """One measurement of `path` in a new process."""
    command = [sys.executable, __file__, "--measure", path, "--data-dir", arguments.data_dir, "--steps", str(arguments.steps),
               "--device", arguments.device]
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


def fastest(run: Callable[[], object], times: int, device: str) -> float:
    """Seconds of one call, the best of five rounds of `times`."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(times):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / times)
    return best


def floor(device: str, kernels: int) -> list[str]:
    """The least time of an epoch's memory traffic, and of the launches of an eager step's `kernels`."""
    block = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    other = torch.empty_like(block)
    bandwidth = 2 * block.numel() * 4 / fastest(lambda: other.copy_(block), 3, device)
    size = traffic() * (4 if device == "cpu" else 2)
    lines = [f"memory: a step moves {size / 1e6:.1f} MB an image at least; at {bandwidth / 1e9:.0f} GB/s, which a copy reaches "
             f"here, that is {TRAIN * size / bandwidth:.2f} s an epoch"]
    if device != "cpu":
        launch = fastest(lambda: block[:1].add_(1), 1000, device)
        lines.append(f"launches: {kernels} kernels a step, {1e6 * launch:.1f} us each when launched one by one: "
                     f"{1e3 * kernels * launch:.2f} ms a step")
    return lines


def profile(arguments: argparse.Namespace) -> tuple[str, int]:
    """Where the time of a step goes, by kind of operation, on the device path; and the kernels of a step on a GPU."""
    program = make_program(Config(dataset="cifar10", data_dir=arguments.data_dir, device=arguments.device, batches="device",
                                  capture="off"))
    step, on_gpu = program.step, program.device.type == "cuda"
    steps = 100 if on_gpu else 10  # on a GPU with batches that are augmented many at once
    batches = iter(program.batches.shuffled("train", 0))
    step.net.train()
    for batch in islice(batches, WARM_UP):
        step(*batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for batch in islice(batches, steps):
            step(*batch)
    events = list(profiler.key_averages())
    if on_gpu:  # the kernels themselves: operations contain them
        events = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    kernels = sum(event.count for event in events)
    most = sorted(times.items(), key=lambda item: -item[1])[:12]
    text = "\n".join([f"Shares of a step's time, {machine(arguments.device)}, the device path, {steps} steps", "",
                      *(f"{100 * spent / sum(times.values()):5.1f} %  {name[:90]}" for name, spent in most)])
    return text + "\n", kernels // steps


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
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
                   arguments.data_dir, "--device", arguments.device, "--batches", batches, "--log-dir", logs, "--epochs", "1",
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=40, help="steps a measurement (default: 40)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = paths(arguments.device == "cuda")
    if arguments.measure:
        print(json.dumps(rows[arguments.measure](arguments)))
        return
    found: dict[str, list[Measured]] = {path: [] for path in rows}
    RESULTS.mkdir(exist_ok=True)
    ending = "" if arguments.device == "cpu" else "_cuda"
    speeds, shares = RESULTS / f"training_speed{ending}.txt", RESULTS / f"training_profile{ending}.txt"
    for _ in range(arguments.repeats):
        for path in list(found):
            try:
                found[path].append(measured(path, arguments))
            except subprocess.CalledProcessError:  # its own words are above
                if path != FAST:  # which needs a compiler
                    raise
                print(f"{path}: left out, because it failed")
                del found[path]
                continue
            print(f"{path}: {found[path][-1]['train']:.0f} images/s", flush=True)
        speeds.write_text(table(found, arguments))
    text, kernels = profile(arguments)
    shares.write_text(text)
    with speeds.open("a") as lines:
        print("", *floor(arguments.device, kernels), sep="\n", file=lines)
        if sys.platform == "linux":
            peaks = (f"--batches {batches}: {peak_memory(arguments, batches):.2f} GB" for batches in ("workers", "device"))
            print("peak memory of python main.py --epochs 1, all processes:", ", ".join(peaks), file=lines)
    print("", speeds.read_text(), text, sep="\n")


def table(found: dict[str, list[Measured]], arguments: argparse.Namespace) -> str:
    """The rows with their medians; the times of an epoch and of 80 epochs with a test each are worked out from them. The
    ratio is to the first row, on a GPU also to the last."""
    medians = {path: {key: statistics.median(each[key] for each in values) for key in values[0]}
               for path, values in found.items()}
    usual, last, repeats = next(iter(medians.values())), list(medians)[-1], len(next(iter(found.values())))
    lines = [f"Training speed, {machine(arguments.device)}, batch 128, {repeats} interleaved measurements of "
             + (f"{arguments.steps} steps" if arguments.device == "cpu" else "a whole epoch"), "",
             f"{'':<29} {'images/s: median':>16} {'min':>7} {'max':>7} {'ratio':>7} {'epoch, s':>9} {'80 epochs, s':>13}"]
    for path, median in medians.items():
        train, speeds = median["train"], [each["train"] for each in found[path]]
        lines.append(f"{path:<29} {train:16,.0f} {min(speeds):7,.0f} {max(speeds):7,.0f} {train / usual['train']:7.2f} "
                     f"{TRAIN / train:9.2f} {EPOCHS * (TRAIN / train + TEST / median['test']):13,.1f}")
    if arguments.device == "cuda":
        lines += ["", *(f"{path}: {median['train'] / medians[last]['train']:.2f} times {last}; once {median['once']:.1f} s"
                        + (f"; {median['memory'] / 1e9:.2f} GB of the GPU" if "memory" in median else "")
                        for path, median in medians.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
