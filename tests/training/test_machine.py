"""Devices, determinism, memory format, random numbers."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from config import Config
from tinycnn.training import machine
from tinycnn.training.machine import find_device, instruction_set, memory_format, seed_torch, set_determinism

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_random_numbers_are_a_function_of_seed_and_epoch():
    drawn = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**32 - 1, 5)):
        for _ in range(2):
            seed_torch(seed, epoch)
            drawn.add(torch.rand(1).item())
    assert len(drawn) == 4


def test_auto_finds_a_device():
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    assert find_device("cpu") == CPU


def test_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(machine.torch, "ones", lambda *sizes, device: torch.zeros(*sizes))
    assert find_device("auto").type == "cuda"


@pytest.mark.skipif("torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512')", reason="has no AVX2")
def test_the_instruction_set_is_what_is_really_used():
    assert instruction_set() in ("AVX2", "AVX512")
    check = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tinycnn.training.machine import *; print(instruction_set())"
    capped = subprocess.run([sys.executable, "-c", check], env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, text=True,
                            capture_output=True, check=True)
    assert capped.stdout.strip() == "AVX2"


@pytest.fixture
def settings():
    """Puts torch's settings back."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield cudnn
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]
    torch.utils.deterministic.fill_uninitialized_memory = True


def pretend_cuda(monkeypatch) -> None:
    """Have find_device find a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(machine.torch, "ones", lambda *sizes, device: torch.zeros(*sizes))


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_set_before_cuda_starts(monkeypatch, settings, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_determinism(Config(deterministic=wanted))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
    pretend_cuda(monkeypatch)
    find_device("cuda")
    assert torch.are_deterministic_algorithms_enabled() == settings.deterministic == wanted
    assert not settings.benchmark  # a search for the fastest kernels takes seconds and gains nothing
    if wanted:  # in a sweep, the next run may want none
        set_determinism(Config())
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("device", "bfloat16", "expected"), [
    (CPU, False, torch.channels_last), (CUDA, True, torch.channels_last), (CUDA, False, torch.contiguous_format)])
def test_gpus_without_bfloat16_have_contiguous_memory(monkeypatch, device, bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    assert memory_format(device) == expected
