"""On CUDA an epoch and a test wait for nothing, mix no devices, run in bfloat16, and launch no more than they need. Without a
GPU: see fake_cuda.py."""

from unittest import mock

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Launches, fake_cuda, second_streams, to_fake_cuda
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm import tqdm

from augmentation import test_policy as normalization
from augmentation import train_policy
from config import Config
from model import Net
from tinycnn.data import device_batches
from tinycnn.data.dataset import Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.training import capture
from tinycnn.training.capture import CapturedStep, make_step
from tinycnn.training.distillation import Distillation
from tinycnn.training.epoch import evaluate, predict, train_epoch
from tinycnn.training.metrics import Metrics
from tinycnn.training.optimizer import SGD

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA"),
    pytest.mark.filterwarnings("ignore"),  # of autocast and cuDNN, which miss their driver
]
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    """A recorded step runs as its eager twin, after one step of warm-up."""
    monkeypatch.setattr(capture, "_graph", capture._eager_twin)
    monkeypatch.setattr(capture, "_warm_up", lambda run, times, device: run())


def fake_step(config: Config, distill: bool = False):
    net = to_fake_cuda(Net())
    optimizer = SGD(net.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, fused=True)
    distillation = Distillation([to_fake_cuda(Net(width=2))], 0.9, 4.0) if distill else None
    return make_step(net, optimizer, CUDA, config, distillation)


def fake_batches(config: Config, train: int = 208, test: int = 50, fused: bool = False) -> DeviceBatches:
    splits = {name: Split(np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int64))
              for name, count in (("train", train), ("test", test))}
    policies = {"train": train_policy(config, MEAN, STD), "test": normalization(MEAN, STD)}
    return DeviceBatches(splits, policies, config.batch_size, 0, CUDA, fused=fused)


def run_epoch(step, batches: DeviceBatches, epoch: int = 0) -> None:
    with tqdm(disable=True) as bar:
        train_epoch(step, batches.shuffled("train", epoch), lambda images: 0.1 / (1 + images), bar)


@pytest.mark.parametrize("captured", ["on", "off"])
@pytest.mark.parametrize("distill", [False, True])
def test_an_epoch_and_a_test_stay_on_the_gpu_and_wait_once_each(captured, distill):
    config = Config(batches="device", capture=captured, crop_padding=2)
    with fake_cuda() as reads, Launches() as launches:
        step, batches = fake_step(config, distill), fake_batches(config)
        launches.waits.clear()  # of setting up
        run_epoch(step, batches)
        checks = [(len(list(capture.step_state(step.step))), 2)] * 2 if captured == "on" else []  # full and short batches
        assert reads == [*checks, (2,)]  # the epoch's metrics
        evaluate(step.net, batches.in_order("test"), CUDA)
        assert reads == [*checks, (2,), (2,)]
        logits, labels = predict(step.net, batches.in_order("test"), CUDA)
    assert (logits.device, logits.dtype, labels.device) == (CUDA, torch.float32, CUDA)
    assert launches.waits == []
    assert set(launches.mixed) <= {"_to_copy"}  # images, labels, the epoch's order and random numbers, on their way there
    assert launches.kernels["native_batch_norm"] > 0  # what bfloat16 has; float32 has cuDNN's
    assert launches.kernels["cudnn_batch_norm"] == 0
    if captured == "on":
        assert step.possible, step.note
        assert len(step.recordings) == 2


def test_small_crops_and_whole_images_are_captured_each():
    config = Config(batches="device", capture="on", crop_size=24)
    with fake_cuda(), Launches() as launches:
        step, crops, whole = fake_step(config), fake_batches(config), fake_batches(Config(batches="device"))
        launches.waits.clear()  # of setting up
        run_epoch(step, crops)
        run_epoch(step, whole, epoch=1)
    assert step.possible, step.note
    assert {tuple(shape) for shape in step.recordings} == {(count, 3, side, side) for count in (128, 80) for side in (24, 32)}
    assert launches.waits == []


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


def test_an_empty_part_of_a_batch_stays_in_float32():
    """As do the sums of SyncBatchNorm, which takes the dtype of its input for those of an empty part."""
    with fake_cuda(), Launches() as launches:
        fake_step(Config(batches="device", capture="off"))(torch.empty(0, 3, 32, 32, device=CUDA),
                                                           torch.empty(0, dtype=torch.long, device=CUDA))
    assert launches.dtypes["convolution"] == {torch.float32}


def test_the_loss_is_computed_in_float32():
    config = Config(batches="device", capture="off")
    with fake_cuda(), Launches() as launches:
        run_epoch(fake_step(config, distill=True), fake_batches(config))
    assert launches.dtypes["convolution"] == {torch.bfloat16}
    assert launches.dtypes["_log_softmax"] == {torch.float32}  # autocast would leave it in bfloat16


def test_a_gpu_without_bfloat16_trains_in_float32_and_contiguous_memory():
    config = Config(batches="device", capture="on")
    with fake_cuda(bfloat16=False), Launches() as launches, mock.patch.object(Metrics, "add") as add:
        step, batches = fake_step(config), fake_batches(config)
        launches.waits.clear()  # of setting up
        seen = []
        step.net.input_block[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        run_epoch(step, batches)
        evaluate(step.net, batches.in_order("test"), CUDA)
    assert isinstance(step, CapturedStep)
    assert step.possible, step.note
    assert all(images.is_contiguous() and images.dtype == torch.float32 for images in seen)
    assert all(parameter.is_contiguous() for parameter in step.net.parameters())
    assert add.call_args.args[1].dtype == torch.float32
    assert launches.kernels["cudnn_batch_norm"] > 0
    assert launches.waits == []


# ---------------------------------------------------------------- how much is launched

def test_a_step_launches_no_more_than_it_needs():
    config = Config(batches="device", capture="off")
    with fake_cuda():
        step = fake_step(config)
        images = torch.empty(128, 3, 32, 32, device=CUDA).to(memory_format=torch.channels_last)
        labels = torch.empty(128, dtype=torch.long, device=CUDA)
        step(images, labels)  # which makes the momentum
        with Launches() as launches:
            step(images, labels)
    kernels, megabytes = launches.total
    assert launches.kernels["convolution"] == 18
    assert launches.kernels["_foreach_add_"] == 2  # the optimizer's one kernel, and all counts of batches in one
    assert launches.kernels["add_"] == 2  # the metrics; no count of batches by itself
    assert kernels <= 184, launches.kernels  # 174
    assert megabytes <= 600, launches.bytes  # 588


def test_a_test_launches_no_more_than_it_needs_and_unpacks_its_images_once():
    config = Config(batches="device", capture="off")
    with fake_cuda():
        net, batches = to_fake_cuda(Net()), fake_batches(config, test=10_000)
        with Launches() as first:
            evaluate(net, batches.in_order("test"), CUDA)
        with Launches() as second:
            evaluate(net, batches.in_order("test"), CUDA)
    assert second.kernels["index_select"] == 0
    assert "_to_copy" not in second.mixed  # nothing comes from the host
    assert second.total[0] <= 250, second.kernels  # 241, for four batches
    assert second.total[1] <= 18_700, second.bytes  # 18,369
    assert first.total[0] - second.total[0] <= 100, first.kernels - second.kernels  # 86


@pytest.mark.parametrize(("changes", "kernels", "megabytes"), [
    ({}, 1_930, 58_000), ({"affine_p": 0.0, "coarse_dropout_p": 0.0, "crop_padding": 2}, 870, 22_500)])  # 1,895 and 832
def test_an_epochs_augmentation_launches_no_more_than_it_needs(changes, kernels, megabytes):
    config = Config(batches="device", **changes)
    with fake_cuda():
        batches = fake_batches(config, train=50_000)
        with Launches() as launches:
            for _ in batches.shuffled("train", 0):
                pass
    assert launches.total[0] <= kernels, launches.kernels
    assert launches.total[1] <= megabytes, launches.bytes
    assert launches.waits == []


def test_an_epochs_augmentation_in_one_kernel(monkeypatch):
    """One for each part of the epoch, beside the steps; besides, PyTorch launches what makes parameters of random numbers."""
    triton = pytest.importorskip("triton")
    from tinycnn.kernels.policy import FusedPolicy

    ran = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **__: ran.append(streams.current))
    with fake_cuda(), second_streams() as streams:
        batches = fake_batches(Config(batches="device"), train=50_000, fused=True)
        policy = FusedPolicy(batches.to_fuse["train"], 32, 32, CUDA)
        monkeypatch.setattr(device_batches, "_faster", lambda *_: policy)
        with Launches() as launches:
            for images, labels in batches.shuffled("train", 0):
                assert (images.shape[1:], images.stride()[1:]) == ((3, 32, 32), (1, 96, 3))
                (images.sum(), labels.sum())
    assert ran == 13 * [streams.batches]
    assert launches.total[0] - launches.kernels["sum"] <= 270, launches.kernels  # 259, of two epochs' parameters
    assert launches.waits == []
    assert streams.races == []


def test_the_next_epochs_numbers_are_drawn_while_this_one_runs(monkeypatch):
    drawn, config = [], Config(batches="device")
    stream = device_batches.random_stream
    monkeypatch.setattr(device_batches, "random_stream", lambda *key: drawn.append(key[2]) or stream(*key))
    with fake_cuda():
        batches = fake_batches(config)
        for _ in batches.shuffled("train", 0):
            assert drawn == [0, 0]  # order and augmentation
        assert drawn == [0, 0, 1, 1]
        del drawn[:]
        for _ in batches.shuffled("train", 1):
            assert drawn == []
        assert drawn == [2, 2]
        del drawn[:]
        next(iter(batches.shuffled("train", 5)))  # resumed elsewhere
        assert drawn == [5, 5]


# ---------------------------------------------------------------- what runs beside the steps

def test_each_part_of_an_epoch_is_augmented_beside_the_steps_on_the_one_before(monkeypatch):
    for name in ("AUGMENTED_FIRST", "AUGMENTED_TOGETHER"):
        monkeypatch.setattr(device_batches, name, 64)
    with fake_cuda(), second_streams() as streams:
        batches, main, beside = fake_batches(Config(batches="device", batch_size=32), train=300), streams.main, streams.batches
        for epoch in (0, 1):
            before, launched, waited_for, parts = beside.launched, [], [], []
            for images, labels in batches.shuffled("train", epoch):
                assert streams.current is main
                launched.append(beside.launched - before)
                waited_for.append(main.done[beside] - before)
                parts.append(StorageWeakRef(images.untyped_storage()))
                assert sum(not part.expired() for part in parts[::2]) == 1
                (images.sum(), labels.sum())
            part = launched[-1] // 5
            assert part > 0
            assert launched == [part * following for following in (2, 2, 3, 3, 4, 4, 5, 5, 5, 5)]
            assert waited_for == [part * current for current in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]
            for images, labels in batches.in_order("test"):
                (images.sum(), labels.sum())
    assert streams.races == []


def test_an_epoch_that_ends_early_frees_nothing_that_is_read_beside(monkeypatch):
    for name in ("AUGMENTED_FIRST", "AUGMENTED_TOGETHER"):
        monkeypatch.setattr(device_batches, name, 64)
    with fake_cuda(), second_streams() as streams:
        batches = fake_batches(Config(batches="device", batch_size=32))
        for epoch in (0, 1):
            next(batches.shuffled("train", epoch))
            torch.ones(3, device=CUDA)
    assert streams.races == []


@pytest.mark.parametrize("captured", ["on", "off"])
def test_teachers_predict_beside_the_network_that_learns(captured):
    beside_done = []
    with fake_cuda(), second_streams() as streams:
        config = Config(batches="device", batch_size=32, capture=captured)
        step, batches = fake_step(config, distill=True), fake_batches(config)
        step.net.register_forward_hook(
            lambda *_: beside_done.append(streams.main.done[streams.steps] == streams.steps.launched))
        for images, labels in batches.shuffled("train", 0):
            step(images, labels)
    assert set(beside_done) == {False}
    assert streams.races == []


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
