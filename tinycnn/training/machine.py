"""The machine: devices, instruction set, memory, and torch's random numbers."""

import ctypes
import os
import platform
import sys
from contextlib import suppress

import numpy as np
import torch

from config import Config, UserError


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
        raise UserError(f"device is {name}, but this PyTorch finds {there} {kind} devices: "
                        "use --device cpu, or install a PyTorch that fits the hardware")
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


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that computes bfloat16 in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def memory_format(device: torch.device) -> torch.memory_format:
    """The fastest order of dimensions in memory. On a GPU without bfloat16 cuDNN's float32 depthwise kernels for channels_last
    are slower than PyTorch's own, which need contiguous images."""
    return torch.contiguous_format if device.type == "cuda" and not has_bfloat16(device) else torch.channels_last


def seed_torch(seed: int, epoch: int, rank: int = 0) -> None:
    """Make torch's own random numbers (the network's initialization, dropout) a function of (seed, epoch), and of
    the process where there are several.

    They are hashed because torch's CPU generator looks at 32 bits of its seed only.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]))


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step, instead of returning and fetching the pages of every
    activation again. Does nothing on other systems."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)   # M_MMAP_MAX: no block in a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back
