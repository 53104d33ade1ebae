"""On CUDA an epoch and a test wait for nothing but their sums, mix no devices, run in bfloat16, and launch no more than they
need. Without a GPU: see fake_cuda.py."""

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Launches, fake_cuda, second_streams, to_fake_cuda
from torch.optim.lr_scheduler import ConstantLR

import main
from augmentation import test_policy as normalization
from augmentation import train_policy
from config import Config
from model import Net
from tinycnn.data import device_batches
from tinycnn.data.batches import make_policies
from tinycnn.data.dataset import Dataset, Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.training import capture
from tinycnn.training.capture import CapturedStep
from tinycnn.training.distillation import CrossEntropy, Distillation
from tinycnn.training.optimizer import SGD
from tinycnn.training.self_check import step_state
from tinycnn.training.steps import fastest_step

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA"),
    pytest.mark.filterwarnings("ignore"),  # of autocast and cuDNN, which miss their driver
]
STATISTICS = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    """A recorded step runs as its eager twin, after one step of warm-up, and is checked on one batch."""
    monkeypatch.setattr(capture, "_graph", capture._eager_twin)
    monkeypatch.setattr(capture, "_warm_up", lambda run, times, device: run())
    monkeypatch.setattr(capture, "BATCHES", 1)


class Training:
    """What a run trains with, on the fake GPU: one full batch of training images."""

    def __init__(self, distill: bool = False, train: int = 128, test: int = 50, **settings) -> None:
        config = Config(**{"batches": "device"} | settings)
        self.net = to_fake_cuda(Net())
        self.optimizer = SGD(self.net.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
        self.scheduler = ConstantLR(self.optimizer, factor=1)
        self.criterion = Distillation([to_fake_cuda(Net(width=2))], 0.9, 4.0) if distill else CrossEntropy(0.0)
        self.notes: list[str] = []
        self.step = fastest_step(main.train_step, self.net, self.optimizer, self.criterion, config, self.notes.append)
        self.batches = fake_batches(config, train, test)

    def epoch(self, number: int = 0) -> None:
        main.train_epoch(self.step, self.net, self.batches.train(number), self.scheduler)

    def test(self) -> None:
        main.test_epoch(self.net, self.batches.test())


def fake_batches(config: Config, train: int = 208, test: int = 50) -> DeviceBatches:
    splits = [Split(np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int64)) for count in (train, test, 0)]
    return DeviceBatches(Dataset("folder", ("any",), *splits), *make_policies(config, STATISTICS, train_policy, normalization),
                         config, CUDA)


@pytest.mark.parametrize(("captured", "distill"), [("on", False), ("off", True)])
def test_an_epoch_and_a_test_stay_on_the_gpu_and_wait_once_each(captured, distill):
    with fake_cuda() as reads, Launches() as launches:
        training = Training(distill, capture=captured, crop_padding=2)
        launches.waits.clear()  # of setting up
        training.epoch()
        tensors = len(step_state(training.net, training.optimizer)) + 2
        checks = [(tensors,)] if captured == "on" else []
        assert reads == [*checks, (3,)]  # the epoch's sums
        training.test()
        assert reads == [*checks, (3,), (3,)]
        assert launches.waits == 3 * ["_to_copy"]  # of both sums; and the policy's table, once
    assert set(launches.mixed) <= {"_to_copy"}  # images, labels, the epoch's order and random numbers, on their way there
    assert launches.kernels["native_batch_norm"] > 0  # what bfloat16 has; float32 has cuDNN's
    if captured == "on":
        assert training.step.can_capture, training.notes
        assert len(training.step.recordings) == 1
    else:
        assert launches.kernels["cudnn_batch_norm"] == 0  # there is a float32 step in the check of captured ones


def test_a_copy_that_waits_is_seen():
    with fake_cuda(), Launches() as launches:
        there = torch.empty(3).to(CUDA, non_blocking=True)
        torch.empty(3, device=CUDA).copy_(there)
        torch.empty(3).copy_(there, non_blocking=True)
        assert launches.waits == []
        there.cpu()
        torch.empty(3).to(CUDA)
        torch.empty(3).copy_(there)
    assert launches.waits == ["_to_copy", "_to_copy", "copy_"]


def test_the_loss_is_computed_in_float32():
    with fake_cuda(), Launches() as launches:
        Training(distill=True, capture="off").epoch()
    assert launches.dtypes["convolution"] == {torch.bfloat16}
    assert launches.dtypes["_log_softmax"] == {torch.float32}  # autocast would leave it in bfloat16


def test_a_gpu_without_bfloat16_trains_in_float32_and_contiguous_memory():
    seen = []
    with fake_cuda(bfloat16=False), Launches() as launches:
        training = Training(capture="on")
        training.net.input_block[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        training.epoch()
        training.test()
    assert isinstance(training.step, CapturedStep)
    assert training.step.can_capture, training.notes
    assert all(images.is_contiguous() and images.dtype == torch.float32 for images in seen)
    assert all(parameter.is_contiguous() for parameter in training.net.parameters())
    assert launches.dtypes["convolution"] == {torch.float32}
    assert launches.kernels["cudnn_batch_norm"] > 0


# ---------------------------------------------------------------- how much is launched

def test_a_step_launches_no_more_than_it_needs():
    with fake_cuda():
        training = Training(capture="off")
        images = torch.empty(128, 3, 32, 32, device=CUDA).to(memory_format=torch.channels_last)
        labels = torch.empty(128, dtype=torch.long, device=CUDA)
        training.step(images, labels)  # which makes the momentum
        with Launches() as launches:
            training.step(images, labels)
    kernels, megabytes = launches.total
    assert launches.kernels["convolution"] == 18
    assert launches.kernels["_foreach_add_"] == 1  # the optimizer's one kernel
    assert kernels <= 184, launches.kernels  # 174
    assert megabytes <= 600, launches.bytes  # 588


@pytest.mark.parametrize(("changes", "kernels", "megabytes"), [
    ({}, 1_930, 58_000), ({"affine_p": 0.0, "coarse_dropout_p": 0.0, "crop_padding": 2}, 870, 22_500)])  # 1,895 and 832
def test_an_epochs_augmentation_launches_no_more_than_it_needs(changes, kernels, megabytes):
    with fake_cuda():
        batches = fake_batches(Config(batches="device", batch_size=1024, **changes), train=50_000)
        batches.train(0)  # which makes the policy
        with Launches() as launches:
            assert len(list(batches.train(1))) == 49
    assert launches.total[0] <= kernels, launches.kernels
    assert launches.total[1] <= megabytes, launches.bytes
    assert launches.waits == []


def test_an_epochs_augmentation_in_one_kernel(monkeypatch):
    """One for each part of the epoch, beside the steps; besides, PyTorch launches what makes parameters of random numbers."""
    triton = pytest.importorskip("triton")
    from tinycnn.kernels.policy import FusedPolicy

    ran = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **__: ran.append(streams.current))
    monkeypatch.setattr(device_batches, "_faster", lambda compose, policy, images: FusedPolicy(compose, 32, 32, CUDA))
    with fake_cuda(), second_streams() as streams:
        batches = fake_batches(Config(batches="device", kernels="fused", batch_size=1024), train=50_000)
        batches.train(0)
        with Launches() as launches:
            for images, labels in batches.train(1):
                assert (images.shape[1:], images.stride()[1:]) == ((3, 32, 32), (1, 96, 3))
                (images.sum(), labels.sum())
    assert ran == 13 * [streams.batches]
    assert launches.total[0] - launches.kernels["sum"] <= 170, launches.kernels
    assert launches.waits == []
    assert streams.races == []


# ---------------------------------------------------------------- what runs beside the steps

def test_each_part_of_an_epoch_is_augmented_beside_the_steps_on_the_one_before(monkeypatch):
    monkeypatch.setattr(device_batches, "AUGMENTED_TOGETHER", 64)
    with fake_cuda(), second_streams() as streams:
        batches, main_stream, beside = (fake_batches(Config(batches="device", batch_size=32), train=172), streams.main,
                                        streams.batches)
        for epoch in (0, 1):
            before, launched, waited_for = beside.launched, [], []
            for images, labels in batches.train(epoch):
                assert streams.current is main_stream
                launched.append(beside.launched - before)
                waited_for.append(main_stream.done[beside] - before)
                (images.sum(), labels.sum())
            part = launched[-1] // 3
            assert part > 0
            assert launched == [part * following for following in (2, 2, 3, 3, 3, 3)]
            assert waited_for == [part * current for current in (1, 1, 2, 2, 3, 3)]
            for images, labels in batches.test():
                (images.sum(), labels.sum())
    assert streams.races == []


def test_an_epoch_that_ends_early_frees_nothing_that_is_read_beside(monkeypatch):
    monkeypatch.setattr(device_batches, "AUGMENTED_TOGETHER", 64)
    with fake_cuda(), second_streams() as streams:
        batches = fake_batches(Config(batches="device", batch_size=32))
        for epoch in (0, 1):
            next(iter(batches.train(epoch)))
            torch.ones(3, device=CUDA)
    assert streams.races == []


def test_an_epoch_with_a_teacher_has_no_races():
    with fake_cuda(), second_streams() as streams:
        training = Training(distill=True, train=64, batch_size=32, capture="off")
        training.epoch()
        training.test()
    assert streams.races == []
    assert streams.batches.launched > 0


@pytest.mark.parametrize("bfloat16", [True, False])
def test_teachers_keep_the_weights_that_they_compute_with(bfloat16):
    """In bfloat16 those that autocast would cast in each step."""
    with fake_cuda(bfloat16=bfloat16):
        [teacher] = Distillation([to_fake_cuda(Net())], 0.9, 4.0).teachers
    for layer in teacher.modules():
        for parameter in layer.parameters(recurse=False):
            cast = bfloat16 and isinstance(layer, torch.nn.Conv2d)
            assert parameter.dtype == (torch.bfloat16 if cast else torch.float32)


def test_races_of_streams_are_seen():
    with fake_cuda(), second_streams() as streams:
        ones = torch.ones(3, device=CUDA)
        with torch.cuda.stream(streams.steps):
            doubled = 2 * ones
        doubled.sum()
        ones.zero_()
        assert streams.races == ["mul reads", "sum reads", "zero_ writes"]
        del doubled, streams.races[:]
        with torch.cuda.stream(streams.steps):
            2 * torch.ones(3, device=CUDA)
        assert streams.races == ["freed"]
        streams.steps.wait_stream(streams.main)
        with torch.cuda.stream(streams.steps):
            doubled = 2 * ones
        streams.main.wait_stream(streams.steps)
        doubled.sum()
        ones.zero_()
    assert streams.races == ["freed"]
