"""What depends on the device: precision, memory format, second streams of a GPU; and a timer."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that computes bfloat16 in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def memory_format(device: torch.device) -> torch.memory_format:
    """The fastest order of dimensions in memory. On a GPU without bfloat16 cuDNN's float32 depthwise kernels for channels_last
    are slower than PyTorch's own, which need contiguous images."""
    return torch.contiguous_format if device.type == "cuda" and not has_bfloat16(device) else torch.channels_last


def side_stream(device: torch.device, work: str = "steps") -> torch.cuda.Stream | None:
    """A GPU's second stream for this kind of work, always the same one; None on other devices, which have none.

    Launch there by `after_this`. Tensors allocated in it then need no `record_stream`: their memory is reused only by later
    work of that stream, which first waits for the current stream."""
    return _stream(device.index or 0, work) if device.type == "cuda" else None  # cuda is cuda:0


@cache
def _stream(index: int, work: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextmanager
def after_this(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch on `stream`, to run after what has been launched so far; None is the current stream."""
    if stream:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream) if stream else nullcontext():  # with None it would start CUDA
        yield


def wait_for(stream: torch.cuda.Stream | None) -> None:
    """Have the current stream, and not the host, wait for what has been launched on `stream`."""
    if stream:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have PyTorch use one CPU thread in the body, for passes on one or two images: threads that wait for each other take many
    times as long where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a call of `run`, the median of three rounds of ten. Waits for the device."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = []
    for _ in range(3):
        wait()
        started = time.perf_counter()
        for _ in range(10):
            run()
        wait()
        rounds.append(time.perf_counter() - started)
    return 100 * statistics.median(rounds)
