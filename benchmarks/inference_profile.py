"""Where the time of a prediction goes, in float32 and in int8, by ONNX Runtime's own profiler."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import Net
from tinycnn.inference.onnx_session import make_session
from tinycnn.network.receptive_field import convolutions
from tinycnn.training.machine import describe_device

CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv")


def profile(float32: Path, int8: Path) -> str:
    """The microseconds of every convolution and of all else, of our network as these two ONNX models; one image, one thread."""
    times = node_times(float32, int8)
    kernels = [[time for kind, time in nodes if kind in CONVOLUTIONS] for nodes in times]
    net = Net()
    layers = dict(net.named_modules())
    lines = [f"Microseconds of one image on one thread, {processor()}", "",
             f"{'':34} {'multiply-adds':>14} {'float32':>8} {'int8':>8} {'float32 / int8':>15}"]
    sums: dict[str, np.ndarray] = {}
    for layer, before, after in zip(convolutions(net), *kernels, strict=True):
        kind = "depthwise" if layers[layer.name].groups > 1 else "pointwise" if layer.kernel == (1, 1) else "full 3x3"
        lines.append(row(f"{layer.name:20} {kind}", layer.multiply_adds, before, after))
        sums[kind] = sums.get(kind, np.zeros(3)) + np.array([layer.multiply_adds, before, after])
    lines += ["", *(row(f"all {kind}", *values) for kind, values in sums.items())]
    others = [sum(time for kind, time in nodes if kind not in CONVOLUTIONS) for nodes in times]
    return "\n".join([*lines, row("all else", 0, *others)]) + "\n"


def row(name: str, multiply_adds: float, before: float, after: float) -> str:
    return f"{name:34} {multiply_adds:14,.0f} {before:8.1f} {after:8.1f} {before / after:15.2f}"


def node_times(*models: Path) -> list[list[tuple[str, float]]]:
    """For each model its nodes' kinds and median microseconds, in the order they run; the models take turns."""
    sessions = [make_session(model, 1, profile=str(model.with_suffix(""))) for model in models]
    image = np.load(models[0].with_name("images.npy"))[:1]
    for _ in range(100):
        for ready in sessions:
            for _ in range(10):
                ready.run(None, {"image": image})
    return [_medians(json.loads(Path(ready.end_profiling()).read_text())) for ready in sessions]


def _medians(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    found: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["name"], (event["args"]["op_name"], []))[1].append(event["dur"])
    return [(kind, statistics.median(times)) for kind, times in found.values()]


def processor() -> str:
    """The processor's model, and whether it has the instructions for sums of products of 8 bits."""
    vnni = ""
    if Path("/proc/cpuinfo").exists():
        vnni = ", with VNNI" if "vnni" in Path("/proc/cpuinfo").read_text() else ", without VNNI"
    return f"{describe_device(torch.device('cpu'))}{vnni}"
