"""Second streams of a GPU, for work that runs beside the training steps."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch


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
