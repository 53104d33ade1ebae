"""How long the launches of the fused kernels take, and how long with other settings than those of tinycnn/kernels/launches.py.

    python benchmarks/fused_launches.py                                  writes benchmarks/results/fused_launches.txt
    python benchmarks/fused_launches.py --settings SUM --output FILE     one setting; all take more than ten minutes

Each launch of a step on 128 images is timed by itself: replayed from a CUDA graph, so its data may come from the cache. A row
adds up those of one function, with the sums over programs that follow. Triton compiles each setting first, which takes minutes.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model import Net
from tinycnn.training.machine import describe_device

RESULTS = Path(__file__).parent / "results" / "fused_launches.txt"
Setting = tuple[int, dict[str, int]]  # rows at once, and how Triton compiles
Call = tuple[str, tuple[Any, ...]]  # a function of launches.py, and its arguments


def ways(rows: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]) -> list[Setting]:
    """All combinations."""
    return [(each, {"num_warps": warp, "num_stages": stage}) for each in rows for warp in warps for stage in stages]


# The settings of launches.py: whose they are, and others to try
TRIED: dict[str, tuple[tuple[str, ...], list[Setting]]] = {
    "INPUT": (("input_forward",), ways((32, 64), (4, 8), (1, 2))),
    "SEPARABLE": (("separable_forward",), [(rows, {"num_stages": stages}) for rows in (16, 32, 64) for stages in (1, 2)]),
    "POINTWISE": (("pointwise_backward",), ways((16, 32, 64), (4, 8), (1, 2, 3))),
    "FILTER": (("depthwise_backward", "pool_backward"), ways((16, 32), (1, 2, 4, 8), (1,))),
    "SUM": (("pointwise_weights",), ways((32, 64, 128), (4, 8), (1, 2, 3))),
    "INPUT_SUM": (("input_weights",), ways((32, 64, 128), (2, 4, 8), (1, 2)))}


def recorded(side: int, device: str) -> list[Call]:
    """The calls of launches.py in a forward and a backward pass on images of this side."""
    from tinycnn.kernels import launches
    from tinycnn.kernels.network import fuse

    net = Net().to(device).to(memory_format=torch.channels_last)
    images = torch.empty(128, 3, side, side, device=device).normal_().to(memory_format=torch.channels_last)
    names = [name for functions, _ in TRIED.values() for name in functions]
    forward = fuse(net)
    assert forward
    with ExitStack() as patches:
        wrapped = {name: patches.enter_context(mock.patch.object(launches, name, wraps=getattr(launches, name)))
                   for name in names}
        forward(images).square().sum().backward()
    return [(name, call.args) for name, function in wrapped.items() for call in function.call_args_list]


def microseconds(name: str, arguments: tuple[Any, ...]) -> float:
    """The median time of a call."""
    from triton.testing import do_bench_cudagraph

    from tinycnn.kernels import launches
    return 1e3 * do_bench_cudagraph(lambda: getattr(launches, name)(*arguments), return_mode="median")


def rows(settings: list[str]) -> Iterator[str]:
    """A row for each function, image size and way of the settings; that of launches.py is marked."""
    from tinycnn.kernels import launches

    for side in (32, 24):
        calls = recorded(side, "cuda")
        for setting in settings:
            names, others = TRIED[setting]
            now = getattr(launches, setting)
            for name in names:
                yield f"{name}, {side} x {side}, {sum(call == name for call, _ in calls)} launches, us"
                for way in (now, *(other for other in others if other != now)):
                    with mock.patch.object(launches, setting, way):
                        try:
                            took = f"{sum(microseconds(*call) for call in calls if call[0] == name):8.1f}"
                        except Exception as error:  # of shared memory that is too small, say: the other rows go on
                            took = f"   left out: {type(error).__name__}"
                    yield f"{took}   {way[0]} rows, {way[1]}{'  as it is' if way is now else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(TRIED), default=list(TRIED), help="those to time; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write; default: %(default)s")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/fused_launches.py measures on a CUDA GPU, and this PyTorch finds none")
    lines = [f"Launches of the fused kernels, {describe_device(torch.device('cuda'))}, PyTorch {torch.__version__}", ""]
    for row in rows(options.settings):
        print(row, flush=True)
        lines.append(row)
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
