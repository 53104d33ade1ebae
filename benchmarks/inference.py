"""What a prediction costs: our network and small CIFAR-10 networks of others, on one machine, in one run.

    python benchmarks/inference.py --data-dir ~/data          prints, and writes benchmarks/results/inference*.txt; the
                                                              names say vnni, and intel, of such a processor
    python benchmarks/readme.py                               draws benchmarks/results/inference.png from them

All take uint8 images, normalize them, and have BatchNorm folded into the convolutions, by tinycnn/inference/export.py. Each is
a process of its own; they take turns, and medians are compared. Ours has the weights of `best`, seed 0; those of the others are
random, which costs the same, with BatchNorm statistics from real images; their accuracies are the published ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinycnn.inference.onnx_session import LogitsFunction, compute_in_batches, make_session, session_logits

RESULTS = Path(__file__).parent / "results"
WEIGHTS = Path(__file__).parents[1] / "logs" / "reference" / "best" / "seed-0" / "final.safetensors"
OURS = "our Net"
EAGER, COMPILED, FLOAT32, INT8 = "PyTorch", "PyTorch compiled", "ONNX Runtime", "ONNX Runtime int8"
CALLS = {1: 60, 64: 6}  # in a turn, by the number of images
Facts = dict[str, Any]


# ---------------------------------------------------------------- the networks

def prepare(folder: Path, data_dir: str) -> dict[tuple[str, str], Facts]:
    """Put all networks and some images into `folder`; returns what doesn't change from one measurement to the next, by network
    and runtime."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers import peers
    from tinycnn.data.loading import load_dataset
    from tinycnn.inference.classifier import Classifier
    from tinycnn.inference.export import CALIBRATION_IMAGES, as_int8, as_onnx, calibration_images, fold, quiet
    from tinycnn.runs.weights import read_weights

    images = load_dataset("cifar10", data_dir)
    np.save(folder / "images.npy", images.test.images[:max(CALLS)])
    calibrating = calibration_images(images.train, CALIBRATION_IMAGES)
    weights, published = read_weights(WEIGHTS), peers()
    torch.manual_seed(0)
    facts: dict[tuple[str, str], Facts] = {}
    for name, each in {OURS: weights.build_net(), **{name: peer.net for name, peer in published.items()}}.items():
        classifier = Classifier(each, weights.mean, weights.std)
        if name != OURS:
            gather_statistics(classifier, calibrating)
        with FlopCounterMode(display=False) as counter:
            classifier(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        about = {"parameters": sum(each.numel() for each in classifier.net.parameters()),
                 "multiply_adds": counter.get_total_flops() // 2, "peer": published.get(name)}
        with quiet():
            folded = fold(classifier)
            models = {FLOAT32: as_onnx(folded, ["?"] * 10)}
            models[INT8] = as_int8(models[FLOAT32], calibrating)
        if name == OURS:
            torch.save(folded, folder / "ours.pt")
            kept = {"bytes": (folder / "ours.pt").stat().st_size,
                    "accuracy": accuracy(load_function(folder, name, EAGER, 0), images.test)}
            facts |= {(name, runtime): about | kept for runtime in (EAGER, COMPILED)}
        for runtime, model in models.items():
            file_of(folder, name, runtime).write_bytes(model)
            facts[name, runtime] = about | {"bytes": len(model), "accuracy": None if name != OURS else accuracy(
                session_logits(make_session(model)), images.test)}
        print(f"{name}: exported", flush=True)
    return facts


def gather_statistics(classifier: Any, images: np.ndarray) -> None:
    """Give an untrained network's BatchNorms the statistics of real images, so that int8 gets ranges as in a trained one."""
    import torch

    classifier.net.train()
    with torch.no_grad():
        for part in np.array_split(images, 10):
            classifier(torch.from_numpy(part))
    classifier.net.eval()


def accuracy(logits: LogitsFunction, test: Any) -> float:
    """In percent."""
    return 100 * float((compute_in_batches(logits, test.images).argmax(1) == test.labels).mean())


def file_of(folder: Path, name: str, runtime: str) -> Path:
    return folder / f"{name} {runtime}.onnx".replace(" ", "_")


def load_function(folder: Path, name: str, runtime: str, threads: int) -> LogitsFunction:
    """A function from uint8 images to logits; `threads` 0 changes nothing."""
    if runtime in (FLOAT32, INT8):
        return session_logits(make_session(file_of(folder, name, runtime), threads))
    import torch

    if threads:
        torch.set_num_threads(threads)
    net = torch.load(folder / "ours.pt", weights_only=False)
    if runtime == COMPILED:
        net = torch.compile(net)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images)).numpy()

    return run


# ---------------------------------------------------------------- measuring

def serve(folder: Path, name: str, runtime: str, threads: int) -> None:
    """A process of one network: measure a turn for each line on standard input, and print the seconds of its calls and the
    process's peak memory in MB as JSON."""
    run, images = load_function(folder, name, runtime, threads), np.load(folder / "images.npy")
    for _ in sys.stdin:
        seconds: dict[int, list[float]] = {}
        for batch, calls in CALLS.items():
            given, seconds[batch] = np.ascontiguousarray(images[:batch]), []
            for call in range(calls + calls // 6):
                start = time.perf_counter()
                run(given)
                if call >= calls // 6:  # the first ones find cold caches
                    seconds[batch].append(time.perf_counter() - start)
        # getrusage would count the parent's memory, from before exec, too
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "memory": peak}), flush=True)


def measure(folder: Path, rows: list[tuple[str, str]], threads: int, rounds: int) -> dict[tuple[str, str], Facts]:
    """For each row the median seconds of a call in each turn, by the number of images, and the peak memory."""
    with ExitStack() as stack:
        servers = {row: stack.enter_context(subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), *row, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)) for row in rows}
        found: dict[tuple[str, str], list[Facts]] = {row: [] for row in rows}
        for turn in range(rounds + 1):
            for row, server in servers.items():
                print(file=server.stdin, flush=True)
                answer = json.loads(server.stdout.readline())  # type: ignore[union-attr]
                if turn:  # the first one warms up: compiles, allocates
                    found[row].append(answer)
        for server in servers.values():
            server.communicate()
    return {row: {"turns": [[statistics.median(answer["seconds"][str(batch)]) for answer in answers] for batch in CALLS],
                  "memory": answers[-1]["memory"]} for row, answers in found.items()}


# ---------------------------------------------------------------- written down

def table(facts: dict[tuple[str, str], Facts], threads: int, machine: str) -> str:
    import onnxruntime
    import torch

    lines = [f"Inference, {machine}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}; medians", "",
             f"{'':36} {'':>10} {'mult-':>6} {'':>7} {'peak':>6}   {'1 thread:':>17}   {f'{threads} threads:':>17} {'test':>8}",
             f"{'':36} {'parameters':>10} {'adds':>6} {'file kB':>7} {'MB':>6}   {'ms':>8} {'images/s':>8}   "
             f"{'ms':>8} {'images/s':>8} {'%':>8}"]
    for (name, runtime), each in facts.items():
        (one, many), (one_all, many_all) = ([statistics.median(turns) for turns in measured] for measured in each["turns"])
        lines.append(f"{name:18}{runtime:18} {each['parameters']:10,} {each['multiply_adds'] / 1e6:5.1f}M "
                     f"{each['bytes'] / 1e3:7,.0f} {each['memory']:6,.0f}   {1e3 * one:8.3f} {64 / many:8,.0f}   "
                     f"{1e3 * one_all:8.3f} {64 / many_all:8,.0f} {accuracy_of(each, runtime):>8}")
    return "\n".join([*lines, "", "ms: a call with one image; images/s: calls with 64; MB: of the whole process on one thread",
                      "%: measured here; or *: as published; or >: what its benchmark requires, for want of a figure", "",
                      *verdicts(facts)]) + "\n"


def accuracy_of(each: Facts, runtime: str) -> str:
    if each["peer"] is None:
        return f"{each['accuracy']:.2f} "
    if runtime == INT8:
        return "- "
    return f">{each['peer'].accuracy:.2f} " if each["peer"].required else f"{each['peer'].accuracy:.2f}*"


def verdicts(facts: dict[tuple[str, str], Facts]) -> list[str]:
    """Our network beside each of the others, and beside itself in int8, on one thread: medians of the ratios within a turn."""

    def times(slow: tuple[str, str], fast: tuple[str, str], batch: int = 0) -> float:
        pairs = zip(facts[slow]["turns"][0][batch], facts[fast]["turns"][0][batch], strict=True)
        return statistics.median(before / after for before, after in pairs)

    ours, int8 = (OURS, FLOAT32), (OURS, INT8)
    others = [f"{name} {times((name, runtime), ours):.2f}" for name, runtime in facts if name != OURS and runtime == FLOAT32]
    return [f"float32, one image, one thread: times our latency: {', '.join(others)}",
            f"int8, one thread: {times(ours, int8):.2f} times as fast as float32 with one image, {times(ours, int8, 1):.2f} "
            f"times with 64, and {facts[ours]['accuracy'] - facts[int8]['accuracy']:.2f} points less accurate"]


def processor() -> str:
    """The processor's model, and whether it has the instructions for sums of products of 8 bits."""
    import torch

    from tinycnn.training.machine import describe_device

    path = Path("/proc/cpuinfo")
    vnni = (", with VNNI" if "vnni" in path.read_text() else ", without VNNI") if path.exists() else ""
    return f"{describe_device(torch.device('cpu'))}{vnni}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each network (default: 20)")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, name, runtime, threads = arguments.serve
        serve(Path(folder), name, runtime, int(threads))
        return
    from tinycnn.cores import available_cores

    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare(Path(scratch), arguments.data_dir)
        alone, together = (measure(Path(scratch), list(facts), threads, arguments.rounds) for threads in (1, available_cores()))
    for row, each in facts.items():
        each |= {"turns": [alone[row]["turns"], together[row]["turns"]], "memory": alone[row]["memory"]}
    text = table(facts, available_cores(), processor())
    print("\n" + text)
    RESULTS.mkdir(exist_ok=True)
    kind = ("_intel" if "Intel" in processor() else "") + ("_vnni" if "with VNNI" in processor() else "")
    (RESULTS / f"inference{kind}.txt").write_text(text)


if __name__ == "__main__":
    main()
