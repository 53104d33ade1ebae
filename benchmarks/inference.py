"""What a prediction costs: our network and small CIFAR-10 networks of others, on one machine, in one run.

    python benchmarks/inference.py --data-dir ~/data          prints, and writes benchmarks/results/inference*

All take uint8 images and normalize them themselves, exported by the same code with BatchNorm folded. The networks take turns,
round after round, and medians are compared. Ours has the reference run's weights; those of the others are random, which costs
the same, with BatchNorm statistics from real images; their accuracies are the published ones.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:  # a process that measures the memory of ONNX Runtime must not load torch
    from inference.classifier import Classifier

RESULTS = Path(__file__).parent / "results"
WEIGHTS = Path(__file__).parents[1] / "logs" / "reference" / "final.safetensors"
OURS = "our Net"
EAGER, COMPILED, FLOAT32, INT8 = "PyTorch", "PyTorch compiled", "ONNX Runtime", "ONNX Runtime int8"
BATCHES = (1, 64)
Run = Callable[[np.ndarray], Any]


# ---------------------------------------------------------------- the networks

def our_classifier() -> "Classifier":
    from inference import weights
    from inference.classifier import Classifier
    from model import Net

    found = weights.read(WEIGHTS)
    net = Net(len(found.class_names))
    found.load_into(net)
    return Classifier(net, found.mean, found.deviation)


def prepare(folder: Path, data_dir: str) -> dict[str, dict[str, Any]]:
    """Export all networks into `folder`, and put images there; returns what doesn't change from one measurement to the next."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers import peers
    from inference import weights
    from inference.classifier import Classifier
    from inference.export import AT_ONCE, CALIBRATION, as_int8, as_onnx, calibration, fold, onnx_runner, quiet
    from training.images import load

    images = load("cifar10", data_dir)
    np.save(folder / "images.npy", images.test.images[:max(BATCHES)])
    shown = calibration(images.train, CALIBRATION)
    trained, published = weights.read(WEIGHTS), peers()
    classifiers = {OURS: our_classifier()}
    for name, peer in published.items():
        torch.manual_seed(0)
        classifiers[name] = classifier = Classifier(peer.net, trained.mean, trained.deviation)
        peer.net.train()
        with torch.no_grad():
            for part in np.array_split(shown, 10):
                classifier(torch.from_numpy(part))
        peer.net.eval()
    facts = {}
    for name, classifier in classifiers.items():
        with FlopCounterMode(display=False) as counter:
            classifier(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        about = {"parameters": sum(each.numel() for each in classifier.net.parameters()),
                 "multiply_adds": counter.get_total_flops() // 2}
        with quiet():
            float32 = as_onnx(fold(classifier), ["?"] * 10)
            for runtime, model in ((FLOAT32, float32), (INT8, as_int8(float32, shown))):
                file_of(folder, name, runtime).write_bytes(model)
                row = facts[f"{name}|{runtime}"] = about | {"bytes": len(model), "accuracy": None, "published": False}
                if name == OURS:
                    run, test = onnx_runner(model), images.test
                    found = [run(test.images[start:start + AT_ONCE]).argmax(1) for start in range(0, len(test), AT_ONCE)]
                    row["accuracy"] = 100 * float((np.concatenate(found) == test.labels).mean())
                elif runtime == FLOAT32:
                    row |= {"accuracy": published[name].accuracy, "published": True}
        print(f"{name}: exported", flush=True)
    kept = {"bytes": WEIGHTS.stat().st_size, "accuracy": facts[f"{OURS}|{FLOAT32}"]["accuracy"]}
    return {f"{OURS}|{runtime}": facts[f"{OURS}|{FLOAT32}"] | kept for runtime in (EAGER, COMPILED)} | facts


def file_of(folder: Path, name: str, runtime: str) -> Path:
    return folder / f"{name} {runtime}.onnx".replace(" ", "_")


def runner(folder: Path, row: str, threads: int) -> Run:
    """A function from uint8 images to logits."""
    name, runtime = row.split("|")
    if runtime in (FLOAT32, INT8):
        return session_run(session(file_of(folder, name, runtime), threads))
    import torch

    torch.set_num_threads(threads)
    classifier: Any = our_classifier()
    if runtime == COMPILED:
        classifier = torch.compile(classifier)

    @torch.inference_mode()
    def run(images: np.ndarray) -> Any:
        return classifier(torch.from_numpy(images))

    return run


def session(path: Path, threads: int, profile: str = "") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def session_run(ready: Any) -> Run:
    return lambda images: ready.run(None, {"image": images})


# ---------------------------------------------------------------- measuring, each in a process of its own

def latencies(folder: Path, rows: list[str], threads: int, rounds: int) -> dict[str, list[float]]:
    """The median seconds of a call for each row, for each of BATCHES; with the rows taking turns."""
    images = np.load(folder / "images.npy")
    runs = {row: runner(folder, row, threads) for row in rows}
    seconds: dict[str, dict[int, list[float]]] = {row: {batch: [] for batch in BATCHES} for row in rows}
    for turn in range(rounds + 1):
        for row, run in runs.items():
            for batch in BATCHES:
                given = np.ascontiguousarray(images[:batch])
                times = []
                for _ in range(60 if batch == 1 else 6):
                    start = time.perf_counter()
                    run(given)
                    times.append(time.perf_counter() - start)
                if turn:  # the first round warms up: compiles, allocates
                    seconds[row][batch] += times[len(times) // 6:]
    return {row: [statistics.median(seconds[row][batch]) for batch in BATCHES] for row in rows}


def peak_memory(folder: Path, row: str) -> float:
    """MB of this process at the most, after it has loaded the network and run it on batches of 64 on one thread."""
    run, images = runner(folder, row, 1), np.load(folder / "images.npy")
    for _ in range(5):
        run(images)
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent before exec too
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def in_a_process(arguments: argparse.Namespace, folder: Path, *request: str) -> Any:
    """What this script prints, as JSON, when it is asked for one measurement."""
    command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--folder", str(folder), "--measure", *request]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


# ---------------------------------------------------------------- where the time goes

def profile(folder: Path) -> str:
    """The time of every convolution, in float32 and in int8, by ONNX Runtime's own profiler; one image, one thread."""
    from model import Net, convolutions

    times = {runtime: node_times(folder, runtime) for runtime in (FLOAT32, INT8)}
    kernels = {runtime: [each for each in nodes if each[0] in ("Conv", "QLinearConv")] for runtime, nodes in times.items()}
    net = Net()
    layers = dict(net.named_modules())
    lines = [f"Microseconds of one image on one thread, {processor()}", "",
             f"{'':34} {'multiply-adds':>14} {'float32':>8} {'int8':>8} {'float32 / int8':>15}"]
    sums: dict[str, list[float]] = {}
    for number, layer in enumerate(convolutions(net)):
        kind = "depthwise" if layers[layer.name].groups > 1 else "pointwise" if layer.kernel == (1, 1) else "full 3x3"
        before, after = (kernels[runtime][number][1] for runtime in (FLOAT32, INT8))
        lines.append(f"{layer.name:20} {kind:13} {layer.multiply_adds:14,} {before:8.1f} {after:8.1f} {before / after:15.2f}")
        total = sums.setdefault(kind, [0, 0, 0])
        for place, value in enumerate((layer.multiply_adds, before, after)):
            total[place] += value
    lines.append("")
    for kind, (work, before, after) in sums.items():
        lines.append(f"{'all ' + kind:34} {work:14,.0f} {before:8.1f} {after:8.1f} {before / after:15.2f}")
    others = [sum(time for kind, time in times[runtime] if kind not in ("Conv", "QLinearConv")) for runtime in (FLOAT32, INT8)]
    lines.append(f"{'all else':34} {'':14} {others[0]:8.1f} {others[1]:8.1f} {others[0] / others[1]:15.2f}")
    return "\n".join(lines) + "\n"


def node_times(folder: Path, runtime: str) -> list[tuple[str, float]]:
    """Each node's kind and its median microseconds, in the order they run."""
    ready = session(file_of(folder, OURS, runtime), 1, profile=str(folder / "profile"))
    image = np.load(folder / "images.npy")[:1]
    for _ in range(1000):
        ready.run(None, {"image": image})
    events = json.loads(Path(ready.end_profiling()).read_text())
    found: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["name"], (event["args"]["op_name"], []))[1].append(event["dur"])
    return [(kind, statistics.median(times)) for kind, times in found.values()]


def processor() -> str:
    """The processor's model, and whether it has instructions for products of 8 bits."""
    model, vnni = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        said = Path("/proc/cpuinfo").read_text()
        model = next((line.split(":")[1].strip() for line in said.splitlines() if line.startswith("model name")), model)
        vnni = ", with VNNI" if "vnni" in said else ", without VNNI"
    return f"{model} ({platform.machine()}{vnni})"


# ---------------------------------------------------------------- written down

def table(facts: dict[str, dict[str, Any]], threads: int) -> str:
    import onnxruntime
    import torch

    lines = [f"Inference, {processor()}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}; medians", "",
             f"{'':36} {'':>10} {'mult-':>6} {'':>7} {'peak':>6}   {'1 thread:':>17}   {f'{threads} threads:':>17} {'test':>8}",
             f"{'':36} {'parameters':>10} {'adds':>6} {'file kB':>7} {'MB':>6}   {'ms':>8} {'images/s':>8}   "
             f"{'ms':>8} {'images/s':>8} {'%':>8}"]
    for row, each in facts.items():
        name, runtime = row.split("|")
        accuracy = "-" if each["accuracy"] is None else f"{each['accuracy']:.2f}" + ("*" if each["published"] else " ")
        (one, many), (one_all, many_all) = each["latency"]
        lines.append(f"{name:18}{runtime:18} {each['parameters']:10,} {each['multiply_adds'] / 1e6:5.1f}M "
                     f"{each['bytes'] / 1e3:7,.0f} {each['memory']:6,.0f}   {1e3 * one:8.3f} {BATCHES[1] / many:8,.0f}   "
                     f"{1e3 * one_all:8.3f} {BATCHES[1] / many_all:8,.0f} {accuracy:>8}")
    return "\n".join([*lines, "", "ms: a call with one image; images/s: calls with 64. *: published, not measured here", "",
                      *verdicts(facts)]) + "\n"


def verdicts(facts: dict[str, dict[str, Any]]) -> list[str]:
    """Our network beside the fastest one that is at least as accurate, and beside itself in int8; one image, one thread."""
    latency = {row: each["latency"][0][0] for row, each in facts.items()}
    ours = f"{OURS}|{FLOAT32}"
    better = [row for row, each in facts.items()
              if each["published"] and each["accuracy"] >= facts[ours]["accuracy"]]
    fastest = min(better, key=lambda row: latency[row])
    lost = facts[ours]["accuracy"] - facts[f"{OURS}|{INT8}"]["accuracy"]
    return [f"float32, one image, one thread: {latency[fastest] / latency[ours]:.2f} times as fast as {fastest.split('|')[0]}, "
            "the fastest of at least our accuracy",
            f"int8, one image, one thread: {latency[ours] / latency[f'{OURS}|{INT8}']:.2f} times as fast as float32, "
            f"and {lost:.2f} points less accurate"]


def picture(facts: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against the latency of one image on one thread."""
    from matplotlib.figure import Figure

    from training.plots import BLUE, ORANGE

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row, each in facts.items():
        name, runtime = row.split("|")
        if each["accuracy"] is None or runtime == EAGER:
            continue
        colour, latency = ORANGE if each["published"] else BLUE, 1e3 * each["latency"][0][0]
        axes.plot(latency, each["accuracy"], "o", color=colour, fillstyle="none" if each["published"] else "full", markersize=8)
        words = name if each["published"] else f"{name}, {runtime}"
        axes.annotate(words, (latency, each["accuracy"]), textcoords="offset points", xytext=(8, -12), fontsize=9)
    axes.set(xscale="log", xlabel="latency of one image on one CPU thread, ms", ylabel="CIFAR-10 test accuracy, %",
             title="Full: measured. Hollow: ONNX Runtime float32, the accuracy as published")
    axes.margins(x=0.3, y=0.15)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each network (default: 20)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, *rest = arguments.measure
        if what == "memory":
            print(json.dumps(peak_memory(arguments.folder, rest[0])))
        else:
            print(json.dumps(latencies(arguments.folder, rest[1:], int(rest[0]), arguments.rounds)))
        return
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        facts = prepare(folder, arguments.data_dir)
        for count in (1, threads):
            found = in_a_process(arguments, folder, "latency", str(count), *facts)
            for row, each in facts.items():
                each.setdefault("latency", []).append(found[row])
            print(f"{count} threads: measured", flush=True)
        for row, each in facts.items():
            each["memory"] = in_a_process(arguments, folder, "memory", row)
        shares = profile(folder)
    text = table(facts, threads)
    print("\n" + text + "\n" + shares)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "inference.txt").write_text(text)
    (RESULTS / "inference_profile.txt").write_text(shares)
    picture(facts, RESULTS / "inference.png")


if __name__ == "__main__":
    main()
