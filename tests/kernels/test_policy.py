"""The policy in one kernel makes the same images: in Triton's interpreter, and, where there is one, on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import albumentations as A
import pytest
import torch

from augmentation import test_policy as normalization
from augmentation import train_policy
from config import RECIPES, Config
from tinycnn.data import device_batches
from tinycnn.data.batches import make_policies
from tinycnn.data.dataset import Dataset, Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.device_policy import DevicePolicy, Unsupported

triton = pytest.importorskip("triton")

from tinycnn.kernels import policy as fused_policy  # noqa: E402
from tinycnn.kernels.policy import FusedPolicy  # noqa: E402

ROOT = Path(__file__).parents[2]
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.mark.skipif(VERSION < (3, 8), reason="the interpreter of Triton before 3.8 fails with NumPy 2.4")
def test_the_kernel_makes_the_same_bits():
    """In a process of its own: Triton decides at its import whether it interprets."""
    out = subprocess.run([sys.executable, "tests/kernels/policies_interpreted.py"], cwd=ROOT, check=True, capture_output=True,
                         text=True, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    found = json.loads(out.stdout)
    assert len(found["policies"]) == 9
    assert found["different"] == []


@pytest.mark.parametrize("transforms", [
    [A.RandomCrop(24, 24), A.HorizontalFlip(p=0.5)], [A.HorizontalFlip(p=0.5), A.HorizontalFlip(p=0.5)],
    [A.ColorJitter()]])
def test_other_transforms_and_another_order_are_refused(transforms):
    with pytest.raises(Unsupported):
        FusedPolicy(A.Compose(transforms), 32, 32, CPU)


# ---------------------------------------------------------------- when it is used

class Wrong(DevicePolicy):
    def apply(self, images, chosen, parameters):
        return super().apply(images, chosen, parameters) + 1e-7


class Failing(DevicePolicy):
    def apply(self, images, chosen, parameters):
        raise RuntimeError("no kernel\n  for this GPU")


class OutOfMemory(DevicePolicy):
    def apply(self, images, chosen, parameters):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("kind", "times", "reason"), [
    (DevicePolicy, (1.0, 2.0), ""), (DevicePolicy, (2.0, 1.0), "it takes 2.00 ms, PyTorch's 1.00"),
    (Wrong, (1.0, 2.0), "it makes other images"), (Failing, (1.0, 2.0), "RuntimeError: no kernel for this GPU"),
    (FusedPolicy, (1.0, 2.0), "Unsupported: ColorJitter")])
def test_it_is_used_where_it_is_right_and_faster(monkeypatch, capsys, kind, times, reason):
    compose = A.Compose([A.HorizontalFlip(p=0.5), A.Normalize(MEAN, STD)])
    images = torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8)
    policy, measured = DevicePolicy(compose, 8, 8, CPU), iter(times)
    monkeypatch.setattr(device_batches, "milliseconds", lambda *_: next(measured))
    if kind is FusedPolicy:
        compose = A.Compose([A.ColorJitter()])
    else:
        monkeypatch.setattr(fused_policy, "FusedPolicy", kind)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    chosen = device_batches._faster(compose, policy, images)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (chosen is policy) == bool(reason)
    out = capsys.readouterr()
    line = f"Images are augmented by PyTorch's kernels, not by the fused one: {reason}"
    assert (out.out + out.err).startswith(line if reason else "Images are augmented by the fused kernel.\n")


def test_memory_that_runs_out_is_not_taken_for_something_else(monkeypatch):
    monkeypatch.setattr(fused_policy, "FusedPolicy", OutOfMemory)
    policy = DevicePolicy(A.Compose([]), 8, 8, CPU)
    with pytest.raises(torch.OutOfMemoryError):
        device_batches._faster(A.Compose([]), policy, torch.zeros(9, 8, 8, 3, dtype=torch.uint8))


def launched(monkeypatch, config: Config) -> list[tuple]:
    """What the policies of a config launch: kernel, arguments, constants and options."""
    calls: list[tuple] = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run",
                        lambda kernel, *args, grid, warmup, **options: calls.append((kernel, args, options)))
    images = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    for policy in (train_policy(config, 0, MEAN, STD), normalization(MEAN, STD)):
        fused = FusedPolicy(policy, 32, 32, CPU)
        fused.apply(images, torch.arange(8), fused.sample(torch.rand(8, fused.draws, dtype=torch.float64)))
    return calls


def test_a_policy_is_one_launch(monkeypatch):
    assert len(launched(monkeypatch, Config())) == 2  # of training, and of all others


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("changes", [{}, {"affine_p": 0.0, "crop_size": 24}])
def test_the_kernel_compiles(monkeypatch, capability, changes):
    types = {torch.float32: "*fp32", torch.uint8: "*u8", torch.long: "*i64", torch.int32: "*i32", torch.bool: "*i1",
             torch.float64: "*fp64"}
    for kernel, args, options in launched(monkeypatch, Config(crop_padding=4, **changes)):
        names = [parameter.name for parameter in kernel.params]
        signature = {name: types[value.dtype] for name, value in zip(names, args, strict=False)}
        constants = {name: options.pop(name) for name in names if name in options}
        source = triton.compiler.ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, {})
        triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [*RECIPES.values(), {"crop_padding": 4, "affine_p": 0.0}], ids=[*RECIPES, "whole crop"])
def test_a_gpu_makes_the_same_bits(settings):
    torch.manual_seed(0)
    train = Split(torch.randint(0, 256, (5000, 32, 32, 3), dtype=torch.uint8).numpy(), torch.arange(5000).numpy() % 10)
    dataset = Dataset("folder", ("any",), train, train, train)
    made = []
    for kernels in ("pytorch", "fused"):
        config = Config(**settings | {"teacher": "", "batches": "device", "kernels": kernels, "device": "cuda"})
        policies = make_policies(config, (MEAN, STD), train_policy, normalization)
        made.append(DeviceBatches(dataset, *policies, config, torch.device("cuda")))
    for epoch in (0, 1, config.epochs - 1):
        for expected, fused in zip(*(batches.train(epoch) for batches in made), strict=True):
            assert all(map(torch.equal, expected, fused))
    assert all(isinstance(policy, FusedPolicy) for _, policy in made[1].policies if policy.draws)
