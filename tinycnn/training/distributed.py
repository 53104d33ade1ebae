"""Distributed training: the processes that torchrun starts for one run, and what they exchange."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Config, UserError
from tinycnn.data.dataset import Images
from tinycnn.training.errors import STOP_SIGNALS, StopRequested, as_user_errors

TIMEOUT = timedelta(hours=2)  # for an answer of the others: one of them may be decoding a large folder
CAUSE = "cause"  # key in the store for the error of another process, which the first one prints
T = TypeVar("T")


class ProcessLost(UserError):
    """Another process of this run has ended."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train one run; by default the only one."""

    rank: int = 0
    size: int = 1  # number of processes
    local_rank: int = 0
    local_size: int = 1  # number of processes on this machine
    store: "dist.Store | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def describe(self) -> dict[str, int]:
        """Return the entry for config.json: the number of processes, if there are several."""
        return {"processes": self.size} if self.size > 1 else {}

    def device_name(self, name: str) -> str:
        """Return the name of the device of this process; `name` is Config's."""
        if self.size == 1 or name == "cpu" or not torch.cuda.is_available():
            return name
        if ":" in name:
            raise UserError(f"--device is {name}, but each process has a GPU of its own: use --device cuda")
        return f"cuda:{self.local_rank}"

    def share_of(self, count: int) -> slice:
        """This process's part of a batch of `count` images. Parts are contiguous and as equal as possible."""
        small, larger = divmod(count, self.size)
        start = self.rank * small + min(self.rank, larger)
        return slice(start, start + small + (self.rank < larger))

    def sum(self, *values: float) -> list[float]:
        """The sum over all processes of each value, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with _as_process_lost(self.store):
            dist.all_reduce(sums)
        return sums.tolist()

    def broadcast(self, compute: Callable[[], T]) -> T:
        """Call `compute` in the first process, and return its result in all of them."""
        if self.size == 1:
            return compute()
        box = [compute() if self.is_first else None]
        with _as_process_lost(self.store):
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def average_gradients(self, net: nn.Module, images: int) -> None:
        """Replace the gradients of the sum over this process's part of a batch, of `images` images, by those of the mean over
        the whole batch. The parts needn't be equal; one may be empty."""
        if self.size == 1:
            return
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        flat = torch.cat([*(_gradient(parameter, images).flatten() for parameter in parameters),
                          parameters[0].new_full((1,), images)])
        with _as_process_lost(self.store):
            dist.all_reduce(flat)
        means = (flat[:-1] / flat[-1]).split([parameter.numel() for parameter in parameters])
        for parameter, mean in zip(parameters, means, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(mean.view_as(parameter))

    def broadcast_buffers(self, net: nn.Module) -> None:
        """Broadcast BatchNorm's running statistics from the first process. Evaluation and checkpoints use them."""
        self._broadcast(dict(net.named_buffers()))

    def broadcast_state(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Broadcast the network and the optimizer's state from the first process."""
        if self.size > 1:
            self._broadcast(net.state_dict())
            state = self.broadcast(lambda: _bytes(optimizer.state_dict()))
            if not self.is_first:
                optimizer.load_state_dict(torch.load(io.BytesIO(state), map_location="cpu"))

    def _broadcast(self, tensors: dict[str, Tensor]) -> None:
        if self.size > 1 and tensors:
            saved = self.broadcast(lambda: _bytes(tensors))
            if not self.is_first:
                for name, tensor in torch.load(io.BytesIO(saved), map_location="cpu").items():
                    tensors[name].copy_(tensor)

    def load_images(self, load: Callable[[str, str], Images], config: Config) -> Images:
        """Load the config's images with `load`, in one process of each machine first, so that the others find them downloaded
        or decoded. The first process resolves "auto"."""
        if self.size == 1:
            return load(config.dataset, config.data_dir)
        images = load(config.dataset, config.data_dir) if self.is_first else None
        kind = self.broadcast(lambda: images.kind if images else "")
        for turn in (self.local_rank == 0, self.local_rank > 0):
            if turn and images is None:
                with contextlib.redirect_stderr(io.StringIO()):  # the first process has told what there is to tell
                    images = load(kind, config.data_dir)
            self.sum(0)  # a barrier; gloo's all_reduce of an empty tensor doesn't wait
        assert images is not None
        fingerprint = images.fingerprint
        if self.broadcast(lambda: fingerprint) != fingerprint:
            raise UserError(f"the images in {config.data_dir} are not those of the first process: all machines need the same")
        return images


ALONE = Processes()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """The processes of this run: those that torchrun has started, or this one alone. Only the first process prints; the
    others pass their errors to it."""
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    processes = _join(rank, size)
    if not processes.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        with as_user_errors():
            yield processes
    except (UserError, OSError, StopRequested, KeyboardInterrupt) as error:
        if not processes.is_first:
            if not isinstance(error, ProcessLost | StopRequested | KeyboardInterrupt) and processes.store:
                with contextlib.suppress(RuntimeError):
                    processes.store.set(CAUSE, f"process {rank}: {error}")
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        raise
    dist.destroy_process_group()


def _join(rank: int, size: int) -> Processes:
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size} processes can't find each other ({str(error).splitlines()[0]}): start them with torchrun, "
                        "or unset WORLD_SIZE to train with one") from error
    return Processes(rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size), store)


def synchronize_norms(net: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """`net`, in which BatchNorm uses the statistics of the whole batch. PyTorch has that on CUDA only."""
    if processes.size > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net


def batch_sizes(count: int, batch_size: int) -> Iterator[int]:
    """The sizes of the batches of `count` images."""
    return (min(batch_size, count - start) for start in range(0, count, batch_size))


@contextmanager
def _as_process_lost(store: "dist.Store | None") -> Iterator[None]:
    """Raise ProcessLost where a collective operation fails. From then on signals, which torchrun sends to all processes, are
    ignored: the first one has to save what can be saved."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        cause = "another process of this run has ended"
        with contextlib.suppress(RuntimeError):
            if store is not None and store.check([CAUSE]):
                cause = store.get(CAUSE).decode(errors="replace")
        raise ProcessLost(cause) from error


def _gradient(parameter: nn.Parameter, images: int) -> Tensor:
    return parameter.grad if images and parameter.grad is not None else torch.zeros_like(parameter)


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _number(name: str, default: int) -> int:
    """An environment variable that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment, but must be a number: start with torchrun, or unset it")
    return int(text)
