"""Everything that is open about speed on CUDA, answered by one command within eight minutes.

    python benchmarks/cuda_speed.py --data-dir ~/data    prints, and writes benchmarks/results/cuda.txt after every part
    … --seconds 300                                      in less time: the last parts, the least important ones, are left out
    … --parts others,whole_run                           these parts only, in this order

Each part is a process of its own. One that fails, or has no time left, leaves a line that says so. Steps are captured also on
those PyTorch releases on which `--capture auto` doesn't. (A file named cuda.py here would be taken for the package cuda, which
torch imports.)
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.others import Batches, Measured, fast_public_style, timed, usual_script
from benchmarks.program import Program, make_program
from config import Config, available_cores
from model import Net
from runs.log import read_log
from training.capture import CapturedStep, Step, fused_kernels
from training.epoch import evaluate, train_epoch
from training.machine import describe_device, find_device
from training.optimizer import SGD
from training.step import TrainStep

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda.txt"
SECONDS = 480  # for everything
WAYS = {"eager": {"capture": "off"}, "captured": {"capture": "on"},  # to run the program, by its settings
        "captured, fused kernels": {"capture": "on", "kernels": "fused"}}
RESULT = "result: "  # before the lines of a part's process that are its results
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What the parts measure. `tiny`: a few steps on the CPU, to try the benchmark itself."""

    data_dir: str
    tiny: bool

    @property
    def device(self) -> torch.device:
        """The device, set up as main.py does."""
        return find_device("cpu" if self.tiny else "cuda")

    @property
    def flags(self) -> dict[str, str]:
        """The settings of main.py that say on what to train."""
        dataset, device = ("synthetic", "cpu") if self.tiny else ("cifar10", "cuda")
        return {"dataset": dataset, "data_dir": self.data_dir, "device": device}

    def program(self, **settings: object) -> Program:
        """What main.py makes of these settings."""
        return make_program(Config(**self.flags, **settings))  # type: ignore[arg-type]

    def command(self, **settings: object) -> list[str]:
        """The command line of main.py with these settings."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (self.flags | settings).items()]
        return [sys.executable, str(ROOT / "main.py"), *flags, "--no-pictures"]


def wait(device: torch.device) -> None:
    """Wait for what the device is doing."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- single steps

def variant_step(device: torch.device, how: str, memory_format: str, dtype: str) -> Step:
    """A step of the baseline: eager; captured, also with the fused kernels; or captured and compiled."""
    plain = Net().to(device).to(memory_format=MEMORY_FORMATS[memory_format])
    net: nn.Module = torch.compile(plain, dynamic=False) if "compiled" in how else plain  # type: ignore[assignment]
    optimizer = SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=device.type == "cuda")
    step = TrainStep(net.train(), optimizer, device, 0.0)
    # without loss scaling: this is about speed alone
    step.autocast = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32", cache_enabled=False)
    return step if how == "eager" else CapturedStep(step, fused_kernels(step) if "fused" in how else None)


@contextmanager
def changed(how: str) -> Iterator[None]:
    """Change what `how` names: a search by cuDNN for its fastest kernels; all gradients of the fused kernels in one stream."""
    torch.backends.cudnn.benchmark = "with search" in how
    one_stream = mock.patch("training.fused.network.side_stream", return_value=None)
    with one_stream if "one stream" in how else nullcontext():
        yield


def step_seconds(options: Options, how: str, memory_format: str, dtype: str, batch_size: int) -> str:
    """Milliseconds of a step and images per second, medians, and seconds of the first steps; or why there are none."""
    device, steps, repeats, batch_size = options.device, *((1, 1, 2) if options.tiny else (100, 5, batch_size))
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=MEMORY_FORMATS[memory_format])
    labels = torch.arange(batch_size, device=device) % 10
    try:
        step = variant_step(device, how, memory_format, dtype)
        began = time.perf_counter()
        for _ in range(3):
            step(images, labels)
        wait(device)
        once, rounds = time.perf_counter() - began, []
        for _ in range(repeats):
            started = time.perf_counter()
            for _ in range(steps):
                step(images, labels)
            wait(device)
            rounds.append((time.perf_counter() - started) / steps)
    except Exception as error:  # a compiler that is missing, memory: the other rows go on
        return f"left out: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    seconds, note = statistics.median(rounds), step.note if step.note.startswith("not") or "fused" in how else ""
    return f"{1e3 * seconds:9.3f} {batch_size / seconds:12,.0f} {once:9.1f}   {note}".rstrip()


def steps_part(options: Options, ways: Iterable[tuple[str, str, str, int]]) -> Iterator[str]:
    """A row for each way to run a step."""
    yield f"{'a step on images that are there':<58} {'ms':>9} {'images/s':>12} {'first, s':>9}"
    for way in ways:
        with changed(way[0]):
            yield f"{'{}, {}, {}, batch {}'.format(*way):<58} {step_seconds(options, *way)}"
        torch.compiler.reset()


def formats(options: Options) -> Iterator[str]:
    """The default, eager and captured; the fused kernels, which Triton compiles before the first step; each with one thing
    changed; and captured in other memory formats and dtypes."""
    default = ("channels_last", "bfloat16", 128)
    ways = [(how, *default) for how in ("eager", "captured", "captured, with search", "captured, fused",
                                        "captured, fused, one stream")]
    others = [("captured", *each, 128) for each in product(MEMORY_FORMATS, DTYPES)]
    return steps_part(options, [*ways, *(way for way in others if way not in ways)])


def compiled(options: Options) -> Iterator[str]:
    """Captured and compiled steps, in both memory formats."""
    return steps_part(options, [] if options.tiny else [("captured and compiled", name, "bfloat16", 128)
                                                        for name in MEMORY_FORMATS])


def batch_sizes(options: Options) -> Iterator[str]:
    """Larger batches."""
    return steps_part(options, [(how, "channels_last", "bfloat16", size) for size in (512, 1024)
                                for how in ("captured", "captured, fused")])


# ---------------------------------------------------------------- the program

def start_up(options: Options) -> Iterator[str]:
    """Seconds from starting Python to the end of the first step, on images that are in memory."""
    yield f"{'from starting Python, seconds':<34} {'imports':>8} {'data, net':>10} {'first step':>11}"
    code = ("import time; began = time.perf_counter(); import sys, json; sys.path.insert(0, sys.argv[1])\n"
            "from benchmarks.cuda_speed import Options, wait; imported = time.perf_counter()\n"
            "program = Options(sys.argv[2], sys.argv[3] == 'True').program(batches='device', **json.loads(sys.argv[4]))\n"
            "batch = next(iter(program.batches.shuffled('train', 0))); made = time.perf_counter()\n"
            "program.step(*batch); wait(program.device)\n"
            "print(json.dumps([imported - began, made - began, time.perf_counter() - began]))")
    for name, settings in WAYS.items():
        command = [sys.executable, "-c", code, str(ROOT), options.data_dir, str(options.tiny), json.dumps(settings)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        yield f"{name:<34} " + "{:8.2f} {:10.2f} {:11.2f}".format(*json.loads(out))


def epochs(options: Options) -> Iterator[str]:
    """Epochs with their tests, as main.py runs them: how long, and how long the GPU has nothing to do."""
    yield f"{'train and test, batches on the device':<42} {'seconds':>8} {'GPU idle':>9} {'longest gap, ms':>16} {'GB':>6}"
    for name, settings in WAYS.items():
        if torch.cuda.is_available():  # so that the memory is this way's
            program = step = run = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        program = options.program(batches="device", **settings)
        step, device = program.step, program.device

        def run(epoch: int, step=step, batches=program.batches, device=device) -> None:
            part = islice(batches.shuffled("train", epoch), 3 if options.tiny else None)
            with tqdm(disable=True) as bar:
                train_epoch(step, part, lambda images: 0.01, bar)
            evaluate(step.net, islice(batches.in_order("test"), 1 if options.tiny else None), device)

        run(0)
        started = time.perf_counter()
        for epoch in (1, 2):
            run(epoch)
        seconds = (time.perf_counter() - started) / 2
        memory = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
        idle, gap = idle_time([partial(run, 3), partial(run, 4)], device)
        yield f"{name:<42} {seconds:8.3f} {100 * idle:7.1f} % {1e3 * gap:16.2f} {memory:6.2f}   {step.note[:60]}"


def idle_time(runs: list[Callable[[], None]], device: torch.device) -> tuple[float, float]:
    """The share of the time between the first kernel of `runs` and the last in which none runs, and the longest gap in
    seconds. Profiling itself makes eager steps slower."""
    if device.type != "cuda":
        return 0.0, 0.0
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for run in runs:
            run()
        wait(device)
    kernels = sorted((event.start_ns(), event.duration_ns()) for event in profiler.profiler.kineto_results.events()
                     if event.device_type() == torch.profiler.DeviceType.CUDA)
    busy, gap, end = 0, 0, kernels[0][0]
    for start, duration in kernels:
        gap = max(gap, start - end)
        busy += max(0, start + duration - max(end, start))
        end = max(end, start + duration)
    return 1 - busy / (end - kernels[0][0]), gap / 1e9


def kernels(options: Options) -> Iterator[str]:
    """Where the time of a step goes, by kernel."""
    for name, settings in WAYS.items():
        program, steps = options.program(batches="device", **settings), 2 if options.tiny else 50
        step, on_gpu = program.step, program.device.type == "cuda"
        step.net.train()
        batches: list[tuple[Tensor, Tensor]] = list(islice(program.batches.shuffled("train", 0), steps))
        for batch in batches:
            step(*batch)
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            for batch in batches:
                step(*batch)
            wait(program.device)
        times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
                 for event in profiler.key_averages() if not event.is_user_annotation
                 and (event.device_type == torch.profiler.DeviceType.CUDA) == on_gpu}  # not the host's calls
        total = sum(spent for spent, _ in times.values()) or 1.0
        most = sorted(times.items(), key=lambda item: -item[1][0])[:20]
        title = f"a step, {name}: {sum(count for _, count in times.values()) // steps} kernels, {total / steps:.0f} us"
        yield f"{title:<90} {'us':>8} {'%':>6}"
        for kernel, (spent, times_run) in most:
            yield f"{f'{times_run / steps:.0f} x {kernel}'[:90]:<90} {spent / steps:8.1f} {100 * spent / total:6.1f}"


# ---------------------------------------------------------------- others, and a whole run

def ours(options: Options, settings: dict[str, str]) -> Measured:
    """The program's own epochs and tests, measured as the others'."""
    program = options.program(batches="device", **settings)
    step, batches, device, epoch = program.step, program.batches, program.device, count()

    def train(batches: Batches) -> None:
        with tqdm(disable=True) as bar:
            train_epoch(step, batches, lambda images: 0.01, bar)

    measured = timed(train, lambda: batches.shuffled("train", next(epoch)), 0, device)
    return measured | {"test": timed(lambda parts: evaluate(step.net, parts, device), lambda: batches.in_order("test"), 0,
                                     device)["train"]}


def others(options: Options) -> Iterator[str]:
    """The program beside the script most people write, and a loop in the style of the fastest, on the same network."""
    if options.tiny:
        yield "the usual script and the fastest public style: left out, they need CIFAR-10"
        return
    arguments = argparse.Namespace(data_dir=options.data_dir, device="cuda", steps=40)
    yield f"{'a whole epoch, images/s':<34} {'train':>10} {'test':>10} {'train, ratio':>13}"
    usual = 0.0
    measures: dict[str, Callable[[], Measured]] = {
        "the usual script, 8 workers": lambda: usual_script(arguments, 8, available_cores()),
        **{f"main.py, {name}": partial(ours, options, settings) for name, settings in WAYS.items()},
        "the fastest public style": lambda: fast_public_style(arguments)}
    for name, measure in measures.items():
        try:
            measured = measure()
            usual = usual or measured["train"]
            yield f"{name:<34} {measured['train']:10,.0f} {measured['test']:10,.0f} {measured['train'] / usual:13.1f}"
        except Exception as error:  # of a compiler that is missing
            yield f"{name:<34} left out: {type(error).__name__}: {str(error).splitlines()[0][:80]}"


def whole_run(options: Options) -> Iterator[str]:
    """python main.py, 80 epochs end to end."""
    number = 1 if options.tiny else 80
    for settings in (WAYS["captured, fused kernels"], WAYS["captured"]):
        with tempfile.TemporaryDirectory() as logs:
            started = time.perf_counter()
            subprocess.run(options.command(epochs=number, log_dir=logs, **settings), check=True, stdout=subprocess.DEVNULL)
            seconds, rows = time.perf_counter() - started, read_log(Path(logs) / "model_accuracy.log")[1]
        flags = " ".join(f"--{name} {value}" for name, value in settings.items())
        yield (f"python main.py --epochs {number} {flags}: {seconds:.1f} s in all, {rows[0]['seconds']:.1f} s in the first "
               f"epoch; {rows[-1]['test_acc']} % of the test images correct")


PARTS: dict[str, tuple[Callable[[Options], Iterator[str]], int]] = {  # the most important first; seconds that each may take
    "formats": (formats, 130), "whole_run": (whole_run, 150), "epochs": (epochs, 60), "kernels": (kernels, 60),
    "others": (others, 150), "start_up": (start_up, 80), "batch_sizes": (batch_sizes, 60), "compiled": (compiled, 120)}


def run_part(name: str, options: Options, seconds: float) -> list[str]:
    """The lines of a part, run in a process of its own for at most that long; where it fails, those before, and why."""
    command = [sys.executable, __file__, "--part", name, "--data-dir", options.data_dir, *(["--tiny"] if options.tiny else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ending = ""
    try:
        out, err = process.communicate(timeout=seconds)
        if process.returncode:
            ending = f"{name}: failed: {(err.strip().splitlines() or ['it said nothing'])[-1][:120]}"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        out, ending = process.communicate()[0], f"{name}: stopped, it took more than {seconds:.0f} s"
    lines = [line.removeprefix(RESULT) for line in out.splitlines() if line.startswith(RESULT)]
    return [*lines, *([ending] if ending else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, and in which order")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tries the parts on a CPU, writes nothing
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, but may have {', '.join(PARTS)}")
    options = Options(arguments.data_dir, arguments.tiny)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("benchmarks/cuda_speed.py measures on a CUDA GPU, and this PyTorch finds none")
    if arguments.part:
        for line in PARTS[arguments.part][0](options):
            print(RESULT + line, flush=True)
        return
    began = time.monotonic()
    lines = [f"CUDA, {describe_device(options.device)}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    for name in arguments.parts.split(","):
        limit = PARTS[name][1]
        left = arguments.seconds - (time.monotonic() - began)
        part = run_part(name, options, min(limit, left)) if left > 10 else [f"{name}: left out, no time is left"]
        print("\n".join(part), end="\n\n", flush=True)
        lines += [*part, ""]
        if not options.tiny:
            RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
