"""One run in several processes that torchrun has started: DistributedDataParallel, batches shared by all, sums of all."""

import contextlib
import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.lr_scheduler import LRScheduler

from config import UserError
from tinycnn.errors import Diverged, StopRequested, as_user_errors
from tinycnn.processes import CAUSE, ProcessLost, environment_number, world
from tinycnn.training.machine import float32_steps

MEETING = timedelta(minutes=10)  # until all processes are there
ANSWER = timedelta(hours=2)  # of the others: one of them may be decoding a large folder
SILENCE = 3.0  # seconds of waiting for the others, after which a line says so


def averages(sums: Tensor, count: int) -> tuple[float, float]:
    """The mean loss, in nats per image, and the accuracy, in percent, of all processes, from this one's sums (float32, 2) over
    its `count` images. Waits for the device. Raises Diverged where the loss is not finite."""
    loss, correct, images = world.sum(torch.stack((*sums.cpu().double(), torch.tensor(count, dtype=torch.float64)))).tolist()
    if not math.isfinite(loss):
        raise Diverged(f"the loss became {loss / images}: training has diverged, lower --lr")
    return loss / images, 100 * correct / images


def distribute(net: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> nn.Module:
    """The network to train: DistributedDataParallel of `net` where there are several processes, with SyncBatchNorm on CUDA,
    where PyTorch has it; otherwise `net`. All processes get the states of the first one's."""
    if world.size == 1:
        return net
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    states = world.broadcast(buffer.getvalue)
    if not world.is_first:
        for_optimizer, for_scheduler = torch.load(io.BytesIO(states), map_location="cpu")
        optimizer.load_state_dict(for_optimizer)
        scheduler.load_state_dict(for_scheduler)
    device = next(net.parameters()).device
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with world.detect_loss():  # without the search for unused parameters, a resumed run of three processes got other bits
        return Parallel(net, find_unused_parameters=True, device_ids=[device] if device.type == "cuda" else None)


class Parallel(nn.parallel.DistributedDataParallel):
    """Raises ProcessLost where another process has ended."""

    def forward(self, images: Tensor) -> Tensor:
        with world.detect_loss():  # BatchNorm's statistics are exchanged here, also for a test
            return super().forward(images)


class _ScaledGradient(torch.autograd.Function):
    """A loss as it is, and its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def step_on_parts(train_step: Callable[..., Tensor], net: nn.Module, optimizer: torch.optim.Optimizer,
                  criterion: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`train_step` on this process's part of each batch. The gradients are those of the whole batch's mean loss:
    DistributedDataParallel averages over processes, so each part's are scaled by its images times the processes, divided by the
    batch's images. A part may be empty."""

    def step(images: Tensor, labels: Tensor) -> Tensor:
        whole = torch.tensor(float(len(labels)), dtype=torch.float64, device=images.device)
        with world.detect_loss():
            dist.all_reduce(whole)
            if not len(labels):
                return _without_images(train_step, net, optimizer, images, labels)

            def scaled(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
                return _ScaledGradient.apply(criterion(images, logits, labels), len(labels) * world.size / whole)

            return train_step(net, optimizer, scaled, images, labels)

    return step


def _without_images(train_step: Callable[..., Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor,
                    labels: Tensor) -> Tensor:
    """Take part in a step with an empty part: its gradients are zero."""
    synchronized = images.device.type == "cuda"  # SyncBatchNorm needs every process; BatchNorm would divide by zero
    net.train(synchronized)
    # SyncBatchNorm exchanges float32, but for an empty part the dtype of its input, which autocast would change
    with float32_steps():
        sums = train_step(net, optimizer, lambda images, logits, labels: logits.sum() * 0, images, labels)
    net.train()
    return sums


@contextmanager
def join_processes() -> Iterator[None]:
    """Join the processes that torchrun has started for this run, if it has. Only the first process prints; the others pass
    their errors to it."""
    rank, size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    if size == 1:
        yield
        return
    _join(rank, size)
    if not world.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        with as_user_errors():
            yield
    except (UserError, OSError, StopRequested, KeyboardInterrupt) as error:
        if not world.is_first:
            if not isinstance(error, ProcessLost | StopRequested | KeyboardInterrupt):
                with contextlib.suppress(RuntimeError):
                    world.store.set(CAUSE, f"process {rank}: {error}")
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        raise
    dist.destroy_process_group()
    world.rank, world.size = rank, 1  # what follows is this process's alone


def _join(rank: int, size: int) -> None:
    """Meet the other processes. Waits in a thread, so that signals are answered."""
    result: list[Any] = []

    def meet() -> None:
        try:
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=MEETING)))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                                    world_size=size, timeout=ANSWER)
            result.append((store, rank, size))
        except Exception as error:
            result.append(error)

    waiting = threading.Thread(target=meet, daemon=True)
    waiting.start()
    waiting.join(SILENCE)
    if waiting.is_alive():
        print(f"waiting for the other {size - 1} of {size} processes (WORLD_SIZE and RANK are set in the environment): start "
              "them with torchrun, or press Ctrl-C and unset WORLD_SIZE to train with one process", file=sys.stderr)
    limit = time.monotonic() + MEETING.total_seconds()
    while waiting.is_alive() and time.monotonic() < limit:
        waiting.join(0.2)
    outcome = result[0] if result else TimeoutError(f"not within {MEETING}")
    if isinstance(outcome, Exception):
        raise UserError(f"the {size} processes can't find each other ({str(outcome).splitlines()[0]}): start them with "
                        "torchrun, or unset WORLD_SIZE to train with one") from outcome
    world.store, world.rank, world.size = outcome
    world.local_rank, world.local_size = environment_number("LOCAL_RANK", rank), environment_number("LOCAL_WORLD_SIZE", size)
