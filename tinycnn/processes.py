"""The processes of this run: those that torchrun has started, or this one alone; and what they tell each other."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from config import UserError
from tinycnn.errors import STOP_SIGNALS

CAUSE = "cause"  # key in the store for the error of another process, which the first one prints
T = TypeVar("T")


class ProcessLost(UserError):
    """Another process of this run has ended."""


@dataclass
class Processes:
    """This process among those that train one run; by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    store: Any = None  # of torch.distributed

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def share_of(self, count: int) -> slice:
        """This process's part of a batch of `count` images. Parts are contiguous and as equal as possible."""
        small, larger = divmod(count, self.size)
        start = self.rank * small + min(self.rank, larger)
        return slice(start, start + small + (self.rank < larger))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in float64, on the CPU."""
        values = values.detach().to("cpu", torch.float64)
        if self.size > 1:
            with self.detect_loss():
                dist.all_reduce(values)
        return values

    def broadcast(self, compute: Callable[[], T]) -> T:
        """Call `compute` in the first process, and return its result in all of them."""
        if self.size == 1:
            return compute()
        box = [compute() if self.is_first else None]
        with self.detect_loss():
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    @contextmanager
    def detect_loss(self) -> Iterator[None]:
        """Raise ProcessLost where a collective operation in the body fails because another process has ended. From then on
        signals, which torchrun sends to all processes, are ignored: the first one has to save what can be saved."""
        try:
            yield
        except RuntimeError as error:
            words = re.search("gloo|nccl|TCPStore|process group", str(error), re.IGNORECASE)
            if not isinstance(error, dist.DistError) and not words:
                raise
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            cause = "another process of this run has ended"
            with suppress(RuntimeError):
                if self.store.check([CAUSE]):
                    cause = self.store.get(CAUSE).decode(errors="replace")
            raise ProcessLost(cause) from error


world = Processes()  # changed in place by tinycnn.training.distributed.join_processes


def environment_number(name: str, default: int) -> int:
    """An environment variable that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment, but must be a number: start with torchrun, or unset it")
    return int(text)
