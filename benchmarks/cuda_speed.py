"""Everything that is open about speed on CUDA, answered by one command within eight minutes.

    python benchmarks/cuda_speed.py --data-dir ~/data    prints, and writes benchmarks/results/cuda.txt after every part
    … --output FILE                                      writes FILE instead
    … --seconds 300                                      in less time: the last parts, the least important ones, are left out
    … --parts others,whole_run                           these parts only, in this order

Each part is a process of its own. One that fails, or has no time left, leaves a line that says so. Steps are captured also on
those PyTorch releases on which `--capture auto` doesn't. (A file named cuda.py here would be taken for the package cuda, which
torch imports.)
"""

import argparse
import json
import math
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
from torch import nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.others import Batches, Measured, fast_public_style, timed, usual_script
from benchmarks.program import Program, make_program
from config import Config, available_cores
from model import Net
from tinycnn.runs.log import read_log
from tinycnn.training.capture import CapturedStep, Step, fused_kernels
from tinycnn.training.epoch import evaluate, train_epoch
from tinycnn.training.machine import describe_device, find_device
from tinycnn.training.optimizer import SGD
from tinycnn.training.step import TrainStep

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda.txt"
SECONDS = 480  # for everything
WAYS = {"eager": {"capture": "off"}, "captured": {"capture": "on"},  # to run the program, by its settings
        "captured, fused kernels": {"capture": "on", "kernels": "fused"}}
RESULT = "result: "  # before the lines of a part's process that are its results
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32 (TF32)": torch.float32}  # cuDNN's default for float32


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
    step.autocast = torch.autocast(device.type, DTYPES[dtype], enabled=DTYPES[dtype] != torch.float32, cache_enabled=False)
    return step if how == "eager" else CapturedStep(step, fused_kernels(step) if "fused" in how else None)


@contextmanager
def changed(how: str) -> Iterator[None]:
    """Change what `how` names: a search by cuDNN for its fastest kernels; all gradients of the fused kernels in one stream."""
    torch.backends.cudnn.benchmark = "with search" in how
    one_stream = mock.patch("tinycnn.kernels.network.side_stream", return_value=None)
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
        if "compiled" in way[0]:
            torch.compiler.reset()


def formats(options: Options) -> Iterator[str]:
    """The default, eager and captured; the fused kernels, which Triton compiles before the first step; each with one thing
    changed; and captured in other memory formats and dtypes."""
    default = ("channels_last", "bfloat16", 128)
    ways = [(how, *default) for how in ("eager", "captured", "captured, fused", "captured, fused, one stream")]
    others = [("captured", *each, 128) for each in product(MEMORY_FORMATS, DTYPES)]
    return steps_part(options, [*ways, *(way for way in others if way not in ways)])


def search(options: Options) -> Iterator[str]:
    """The default, with a search by cuDNN. In a process of its own, because PyTorch keeps what it has once found, or used
    without a search, for each convolution."""
    return steps_part(options, [("captured, with search", "channels_last", "bfloat16", 128)])


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


def train(program: Program, batches: Batches) -> None:
    """Train on these batches, as main.py does."""
    with tqdm(disable=True) as bar:
        train_epoch(program.step, batches, lambda images: 0.01, bar)


def run_epoch(options: Options, program: Program, epoch: int) -> None:
    """An epoch and its test, as main.py runs them."""
    train(program, islice(program.batches.shuffled("train", epoch), 3 if options.tiny else None))
    evaluate(program.step.net, islice(program.batches.in_order("test"), 1 if options.tiny else None), program.device)


def epochs(options: Options) -> Iterator[str]:
    """How long an epoch and its test take, and how much memory."""
    yield f"{'train and test, batches on the device':<42} {'seconds':>8} {'GB':>6}"
    for name, settings in reversed(WAYS.items()):
        if torch.cuda.is_available():  # so that the memory is this way's
            program = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        program = options.program(batches="device", **settings)
        run_epoch(options, program, 0)
        started = time.perf_counter()
        for epoch in (1, 2):
            run_epoch(options, program, epoch)
        seconds = (time.perf_counter() - started) / 2
        memory = torch.cuda.max_memory_reserved() / 1e9 if program.device.type == "cuda" else 0.0
        yield f"{name:<42} {seconds:8.3f} {memory:6.2f}   {program.step.note[:60]}"


def profile(way: str, options: Options) -> Iterator[str]:
    """Where the GPU's time goes in two epochs with their tests, and how long it has nothing to do between the first kernel and
    the last. In a process of its own, because a profiler slows down what runs after it, and may miss kernels the second time.
    Profiling itself makes eager steps slower."""
    program = options.program(batches="device", **WAYS[way])
    run_epoch(options, program, 0)
    processor = program.device.type.upper()  # as PyTorch's profiler names it
    with torch.profiler.profile(activities=[ProfilerActivity.__members__[processor]]) as profiler:
        for epoch in (1, 2):
            run_epoch(options, program, epoch)
        wait(program.device)
    events = sorted((event.start_ns(), event.duration_ns(), event.name())
                    for event in profiler.profiler.kineto_results.events()
                    if event.device_type().name == processor and not event.is_user_annotation())
    if not events:
        yield f"{way}: the profiler recorded no kernel"
        return
    busy, gap, end = 0, 0, events[0][0]
    times: dict[str, list[int]] = {}
    for start, duration, name in events:
        gap = max(gap, start - end)
        busy += max(0, start + duration - max(end, start))
        end = max(end, start + duration)
        times.setdefault(name, []).append(duration)
    whole = end - events[0][0]
    yield (f"{way}, two epochs and tests under the profiler: {whole / 1e9:.3f} s, idle {100 * (1 - busy / whole):.1f} %, "
           f"longest gap {gap / 1e6:.2f} ms, {len(events):,} kernels and copies")
    for name, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:20]:
        yield f"{100 * sum(spent) / whole:6.1f} % {sum(spent) / len(spent) / 1e3:8.1f} us x {len(spent):<7,} {name[:80]}"


# ---------------------------------------------------------------- others, and a whole run

def ours(options: Options, settings: dict[str, str]) -> Measured:
    """The program's own epochs and tests, measured as the others'."""
    program = options.program(batches="device", **settings)
    batches, device, epoch = program.batches, program.device, count()
    measured = timed(partial(train, program), lambda: batches.shuffled("train", next(epoch)), 0, device)
    return measured | {"test": timed(lambda parts: evaluate(program.step.net, parts, device),
                                     lambda: batches.in_order("test"), 0, device)["train"]}


def others(options: Options) -> Iterator[str]:
    """The program beside the script most people write, and a loop in the style of the fastest, on the same network."""
    if options.tiny:
        yield "the usual script and the fastest public style: left out, they need CIFAR-10"
        return
    arguments = argparse.Namespace(data_dir=options.data_dir, device="cuda", steps=40)
    yield f"{'a whole epoch, images/s':<34} {'train':>10} {'test':>10} {'train, ratio':>13}"
    usual = math.nan
    measures: dict[str, Callable[[], Measured]] = {
        "the usual script, 8 workers": lambda: usual_script(arguments, 8, available_cores()),
        **{f"main.py, {name}": partial(ours, options, settings) for name, settings in WAYS.items()},
        "the fastest public style": lambda: fast_public_style(arguments)}
    for name, measure in measures.items():
        try:
            measured = measure()
            if name.startswith("the usual"):
                usual = measured["train"]
            yield (f"{name:<34} {measured['train']:10,.0f} {measured.get('test', math.nan):10,.0f} "
                   f"{measured['train'] / usual:13.1f}")
        except Exception as error:  # of a compiler that is missing
            yield f"{name:<34} left out: {type(error).__name__}: {str(error).splitlines()[0][:80]}"


def whole_run(options: Options) -> Iterator[str]:
    """python main.py, 80 epochs end to end."""
    number = 1 if options.tiny else 80
    for settings in (WAYS["captured, fused kernels"], WAYS["captured"]):
        with tempfile.TemporaryDirectory() as logs:
            started = time.perf_counter()
            subprocess.run(options.command(epochs=number, log_dir=logs, **settings), check=True, stdout=subprocess.DEVNULL)
            seconds, (comments, rows) = time.perf_counter() - started, read_log(Path(logs) / "model_accuracy.log")
        flags = " ".join(f"--{name} {value}" for name, value in settings.items())
        yield (f"python main.py --epochs {number} {flags}: {seconds:.1f} s in all, {rows[0]['seconds']:.1f} s in the first "
               f"epoch; {rows[-1]['test_acc']} % of the test images correct")
        yield from (f"    {line}" for line in comments if "captured" in line or "first step" in line)


PARTS: dict[str, tuple[Callable[[Options], Iterator[str]], int]] = {  # the most important first; seconds that each may take
    "formats": (formats, 130), "whole_run": (whole_run, 150), "epochs": (epochs, 100),
    "profile_fused": (partial(profile, "captured, fused kernels"), 60), "others": (others, 150), "start_up": (start_up, 120),
    "batch_sizes": (batch_sizes, 60), "search": (search, 60), "profile_captured": (partial(profile, "captured"), 60),
    "profile_eager": (partial(profile, "eager"), 60), "compiled": (compiled, 120)}


def run_part(name: str, options: Options, seconds: float) -> list[str]:
    """The lines of a part, run in a process of its own for at most that long; where it fails, those before, and why."""
    command = [sys.executable, __file__, "--part", name, "--data-dir", options.data_dir, *(["--tiny"] if options.tiny else [])]
    # In a process group, so that those that it starts are stopped, too
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    ending = ""
    try:
        out, err = process.communicate(timeout=seconds)
        if process.returncode:
            ending = f"{name}: failed: {(err.strip().splitlines() or ['it said nothing'])[-1][:120]}"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, ending = process.communicate()[0], f"{name}: stopped, it took more than {seconds:.0f} s"
    lines = [line.removeprefix(RESULT) for line in out.splitlines() if line.startswith(RESULT)]
    return [*lines, *([ending] if ending else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write; default: %(default)s")
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
            arguments.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
