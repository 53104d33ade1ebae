"""All that only a GPU can tell about this program, by one command within eight minutes.

    python benchmarks/gpu_session.py --data-dir ~/data --output FILE    a Markdown table for each part
    … --parts steps,start                                               these parts only, in this order
    … --tiny                                                            a few steps of each part on the CPU

The parts come in the order of what they are worth. Each is a process of its own with a limit of its own. One that fails, or
that is stopped at its limit, leaves the rows that it has made, and a line that says so.
"""

import argparse
import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.others import fast_public_style, make_program, this_program, usual_script
from config import SMALL_CROPS, Config, flag
from tinycnn.cores import available_cores
from tinycnn.device import milliseconds
from tinycnn.runs.log import ACCURACY_LOG, read_log
from tinycnn.training.machine import describe_device

ROOT = Path(__file__).parents[1]
SECONDS = 480  # for all parts
KINDS = ("pytorch", "fused")  # of kernels
SIDES: dict[int, dict[str, Any]] = {32: {}, 24: SMALL_CROPS}
TABLE = sys.stdout  # where rows go; whatever else a part prints goes to stderr


def row(*cells: object) -> None:
    """A row of the part's table, at once: the part may be stopped."""
    print("|", " | ".join(f"{cell:,.2f}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in cells), "|",
          file=TABLE, flush=True)


def header(*names: str) -> None:
    row(*names)
    row(*("---" for _ in names))


def settings(options: argparse.Namespace, kernels: str = "pytorch") -> dict[str, Any]:
    """The settings of main.py on what to train."""
    if options.tiny:
        return {"dataset": "synthetic", "device": "cpu", "threads": 1, "kernels": kernels}
    return {"dataset": "cifar10", "data_dir": options.data_dir, "device": "cuda", "capture": "on", "kernels": kernels}


def run_main(options: argparse.Namespace, kernels: str, *more: str, **variables: str) -> tuple[float, list[str], list[Any]]:
    """Train by main.py. Returns the seconds of the command, and the comments and rows of its log."""
    line = [f"{flag(name)}={value}" for name, value in settings(options, kernels).items()]
    with tempfile.TemporaryDirectory() as logs:
        began = time.monotonic()
        subprocess.run([sys.executable, ROOT / "main.py", *line, "--no-pictures", "--log-dir", logs, *more],
                       check=True, stdout=sys.stderr, env=os.environ | variables)
        return time.monotonic() - began, *read_log(Path(logs) / ACCURACY_LOG)


def notes(comments: list[str]) -> str:
    """What a log says of the start, and of how steps ran."""
    return "; ".join(line for line in comments if line.startswith(("start:", "captured", "not captured")))


# ---------------------------------------------------------------- the parts

def versions(_: argparse.Namespace) -> None:
    header("what", "which")
    row("device", describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    row("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    row("Python, cores", f"{platform.python_version()}, {available_cores()}")
    for what, command in (("Triton", [sys.executable, "-c", "import triton; print(triton.__version__)"]),
                          ("commit", ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
                          ("driver, use, memory", ["nvidia-smi", "--query-gpu=driver_version,utilization.gpu,memory.used",
                                                   "--format=csv,noheader"])):
        if shutil.which(command[0]):
            row(what, subprocess.run(command, capture_output=True, text=True).stdout.strip())


def show_tests(command: list[str], words: tuple[str, ...]) -> None:
    """A row for each line of the tests' output that has one of these words, and the last line."""
    header("test")
    line = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            if any(word in line for word in words):
                row(line.strip()[:160])
    row(line.strip())


def tests(options: argparse.Namespace) -> None:
    files = ["tests/kernels/test_policy.py"] if options.tiny else ["tests/kernels", "tests/training"]
    show_tests([sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=line", *files],
               ("PASSED", "FAILED", "ERROR", "Error"))


def sanitizer(options: argparse.Namespace) -> None:
    checker = shutil.which("compute-sanitizer")
    if not checker:
        row("left out: compute-sanitizer is not on PATH")
        return
    show_tests([checker, sys.executable, "-m", "pytest", "-m", "gpu", "-v", "tests/kernels/test_network.py", "-k", "1-24-128"],
               ("PASSED", "FAILED", "=========   ", "ERROR SUMMARY"))


def start(options: argparse.Namespace) -> None:
    """An epoch of main.py, twice: with empty caches of compiled kernels, and with those that the first has filled."""
    header("kernels", "caches", "whole command, s", "the log")
    for kernels in KINDS[:1] if options.tiny else KINDS:
        with tempfile.TemporaryDirectory() as cache:
            for caches in ("cold", "warm"):
                seconds, comments, _ = run_main(options, kernels, "--epochs=1", TRITON_CACHE_DIR=cache, CUDA_CACHE_PATH=cache)
                row(kernels, caches, seconds, notes(comments))


def steps(options: argparse.Namespace, kernels: str) -> None:
    """Steps on the first batch, and the kernels that take most of their time. A process for each kind of kernels: PyTorch keeps
    those that it has used first."""
    said: list[str] = []
    header("step", "ms", "GB reserved", "the log")
    for side, crops in SIDES.items():
        step, net, _, batches = make_program(Config(**settings(options, kernels), **crops), said.append)
        device, batch = next(net.parameters()).device, next(iter(batches.train(0)))
        net.train()
        step(*batch)
        times = [milliseconds(lambda batch=batch, step=step: step(*batch), device)  # type: ignore[misc]
                 for _ in range(1 if options.tiny else 15)]
        reserved = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
        row(f"{kernels}, {side} x {side}", f"{statistics.median(times):.3f}", reserved, "; ".join(said[-1:]))
        with torch.profiler.profile() as profiler:
            for _ in range(2 if options.tiny else 20):
                step(*batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
        times_of = {event.key: (event.self_device_time_total or event.self_cpu_time_total * (device.type == "cpu"), event.count)
                    for event in profiler.key_averages()}
        whole = sum(spent for spent, _ in times_of.values())
        for name, (spent, calls) in sorted(times_of.items(), key=lambda item: -item[1][0])[:15]:
            row(f"{side} x {side}: {name[:80]}", f"{spent / calls / 1e3:.4f}", f"{100 * spent / whole:.1f} %", f"{calls} calls")


def seeds(options: argparse.Namespace) -> None:
    header("kernels", "seed", "test accuracy, %", "train accuracy, %", "epochs, s")
    found: dict[str, list[float]] = {kernels: [] for kernels in (KINDS[:1] if options.tiny else KINDS)}
    for seed in range(1 if options.tiny else 3):
        for kernels, reached in found.items():
            line = ["--recipe=fast", f"--seed={seed}", *(["--epochs=1"] if options.tiny else [])]
            _, _, rows = run_main(options, kernels, *line)
            reached.append(rows[-1]["test_acc"])
            row(kernels, seed, reached[-1], rows[-1]["train_acc"], sum(each["seconds"] for each in rows))
    for kernels, reached in found.items():
        row(kernels, "mean", statistics.mean(reached), "", "")


def others(options: argparse.Namespace) -> None:
    """Whole epochs of this program, of the usual script, and of the fastest public style."""
    header("a whole epoch", "images/s in training", "in the test", "first, s more")
    arguments = argparse.Namespace(data_dir=options.data_dir, dataset=settings(options)["dataset"],
                                   device=settings(options)["device"], steps=2 if options.tiny else 40)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        f"this program, {kernels}": partial(this_program, Config(**settings(options, kernels)), arguments.steps)
        for kernels in reversed(KINDS)}
    ways["the usual script, 8 workers"] = lambda: usual_script(arguments, 0 if options.tiny else 8, available_cores())
    if not options.tiny:
        ways["the fastest public style"] = lambda: fast_public_style(arguments)
    for name, measure in ways.items():
        measured = measure()
        row(name, measured["train"], measured.get("test", ""), measured["once"])


def whole(options: argparse.Namespace) -> None:
    header("kernels", "epochs", "epochs, s", "whole command, s", "test accuracy, %", "the log")
    for kernels in KINDS[:1] if options.tiny else reversed(KINDS):
        seconds, comments, rows = run_main(options, kernels, f"--epochs={1 if options.tiny else 80}")
        row(kernels, len(rows), sum(each["seconds"] for each in rows), seconds, rows[-1]["test_acc"], notes(comments))


# What is worth most first, with the seconds that each may take
PARTS: dict[str, tuple[Callable[[argparse.Namespace], None], int]] = {
    "versions": (versions, 40), "tests": (tests, 120), "start": (start, 120), "steps": (partial(steps, kernels="pytorch"), 40),
    "steps-fused": (partial(steps, kernels="fused"), 60), "seeds": (seeds, 160), "sanitizer": (sanitizer, 40),
    "others": (others, 120), "whole": (whole, 90)}


def run_part(command: list[str], seconds: float) -> str:
    """What a part's process has printed, run for at most so many seconds; and why it ended early, if it did."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)  # with those that it starts
        ending = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ending = f"\nstopped after {seconds:.0f} s\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in (out, err):
            file.seek(0)
        if process.returncode and not ending:
            ending = f"\nfailed: {(err.read().strip().splitlines() or ['it said nothing'])[-1][:160]}\n"
        return out.read() + ending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--output", type=Path, help="file to write, after each part")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="try the parts on the CPU")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, but may have {', '.join(PARTS)}")
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("benchmarks/gpu_session.py measures on a CUDA GPU, and this PyTorch finds none")
    if options.part:
        with contextlib.redirect_stdout(sys.stderr):
            PARTS[options.part][0](options)
        return
    began, text = time.monotonic(), ""
    for name in options.parts.split(","):
        left = SECONDS - (time.monotonic() - began)
        limit = 10 * PARTS[name][1] if options.tiny else min(PARTS[name][1], left)
        command = [sys.executable, __file__, "--part", name, "--data-dir", options.data_dir, *(["--tiny"] * options.tiny)]
        made = run_part(command, limit) if limit > 5 else "left out: no time was left\n"
        print(f"### {name}\n\n{made}", flush=True)
        text += f"### {name}\n\n{made}\n"
        if options.output:
            options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
