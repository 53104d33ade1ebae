"""The machine: devices, instruction set, memory, and torch's random numbers."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from config import SIDE, Config, UserError
from tinycnn.cores import default_threads
from tinycnn.device import has_bfloat16, memory_format, one_thread
from tinycnn.network.shapes import explain_shape_error
from tinycnn.processes import world


def prepare(config: Config) -> torch.device:
    """Set up this process for training, and return the device. Raises UserError where that isn't there."""
    set_determinism(config)
    name = config.device
    if world.size > 1 and name != "cpu" and torch.cuda.is_available():
        if ":" in name:
            raise UserError(f"--device is {name}, but each process has a GPU of its own: use --device cuda")
        name = f"cuda:{world.local_rank}"
    device = find_device(name)
    keep_freed_memory()
    torch.set_num_threads(threads_of(config))
    return device


_libraries: Thread | None = None


def load_libraries(device: torch.device) -> None:
    """Load cuBLAS and cuDNN in a thread, while the program goes on, on CUDA. A capture must wait: `wait_for_libraries`."""
    global _libraries
    if device.type == "cuda" and _libraries is None:
        _libraries = Thread(target=_use_libraries, args=(device,))
        _libraries.start()


@torch.no_grad()
def _use_libraries(device: torch.device) -> None:
    with suppress(RuntimeError):  # what fails here fails in training, too
        ones = torch.ones(8, 8, 8, 8, device=device)
        torch.mm(ones[0, 0], ones[0, 0]) + functional.conv2d(ones, ones).sum()


def wait_for_libraries() -> None:
    """Wait for `load_libraries`."""
    if _libraries:
        _libraries.join()


def threads_of(config: Config) -> int:
    """CPU threads of this process."""
    return config.threads or default_threads(world.local_size)


def set_determinism(config: Config) -> None:
    """Have CUDA compute the same bits in every run where `config.deterministic` asks for it. Call it before `find_device`:
    cuBLAS reads its setting when CUDA starts. An operation that can't be deterministic then raises RuntimeError."""
    if config.deterministic != torch.are_deterministic_algorithms_enabled():  # the call loads torch's compiler
        torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check that costs time


def find_device(name: str) -> torch.device:
    """The device of Config's name for it. Raises UserError when it isn't there, or this PyTorch can't use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        way = "install a PyTorch that fits the hardware, or use --device cpu"
        if there:
            way = "use --nproc-per-node=gpu" if world.size > 1 else f"use one of {kind}:0 to {kind}:{there - 1}"
        raise UserError(f"there is no device {name}, as this PyTorch finds {there} {kind} devices: {way}")
    device = torch.device(name)
    try:
        if kind == "cuda":
            torch.cuda.set_device(int(index or 0))  # events and pinned memory belong to the current device
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:  # a GPU that is too old for this build, say
        raise UserError(f"this PyTorch can't use device {name} ({str(error).splitlines()[0]}): use --device cpu, or install "
                        "a PyTorch that fits the hardware") from error
    return device


def describe_device(device: torch.device) -> str:
    """The device with the model of its processor, for the records."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    processor = platform.processor()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:  # Linux names the model here only
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{device} ({processor or platform.machine()})"


def instruction_set() -> str:
    """The CPU instructions that PyTorch's own kernels use, such as "AVX2" or "AVX512": sums, and so the bits of a CPU run,
    depend on it. ATEN_CPU_CAPABILITY, when set before torch is loaded, lowers it."""
    return torch.backends.cpu.get_cpu_capability()


_in_float32 = False  # see float32_steps


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on GPUs that have it in hardware. No cache: each weight is used once in a pass, and a cache would outlive a
    capture."""
    enabled = has_bfloat16(device) and not _in_float32
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextmanager
def float32_steps() -> Iterator[None]:
    """Have `autocast` do nothing in the body. (An inner autocast overrides an outer one that is off.)"""
    global _in_float32
    _in_float32 = True
    try:
        yield
    finally:
        _in_float32 = False


def move(net: nn.Module, device: torch.device) -> nn.Module:
    """`net` on the device, in its fastest order of dimensions."""
    return net.to(device).to(memory_format=memory_format(device))


@one_thread()
@torch.no_grad()
def check_network(net: nn.Module, num_classes: int, crop_size: int = SIDE) -> None:
    """Raise UserError unless the network, on the CPU, turns N images into N x num_classes logits, whole images and crops of
    `crop_size` pixels. Leaves it in evaluation mode."""
    for side in sorted({SIDE, crop_size}, reverse=True):
        images = torch.zeros(2, 3, side, side)
        try:
            output = net.eval()(images)
        except (RuntimeError, ValueError, IndexError) as error:
            if side == SIDE:
                raise UserError(f"the network in model.py fails: {explain_shape_error(net, images)}") from error
            raise UserError(f"the network takes images of {SIDE} x {SIDE} pixels only ({error}), but --crop-size is {side}: "
                            f"use --crop-size {SIDE}, or pool the last map in model.py") from error
        found = " x ".join(map(str, output.shape)) if isinstance(output, Tensor) else type(output).__name__
        wanted = f"2 x {num_classes}"
        if found != wanted:
            raise UserError(f"the network returns {found} for 2 images of {side} x {side} pixels, but must return "
                            f"{wanted}, a logit for each class: see forward() in model.py")


def seed_torch(seed: int, epoch: int) -> None:
    """Make torch's own random numbers (the network's initialization, dropout) a function of (seed, epoch), and of
    the process where there are several.

    They are hashed because torch's CPU generator looks at 32 bits of its seed only.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, world.rank)).generate_state(1)[0]))


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step, instead of returning and fetching the pages of every
    activation again. Does nothing on other systems."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)   # M_MMAP_MAX: no block in a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back
