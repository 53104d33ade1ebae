"""Batches made on the device: functions of (seed, epoch, image), and nothing waits for the device."""

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from conftest import only_run, synthetic
from test_device_policy import CPU, MEAN, STD, whole_policy
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from augmentation import test_policy as normalizing_policy
from model import Net
from tinycnn.data.dataset import Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.randomness import ORDER, random_stream
from tinycnn.data.worker_batches import WorkerBatches
from tinycnn.training.capture import CapturedStep
from tinycnn.training.epoch import evaluate, train_epoch
from tinycnn.training.step import TrainStep


def device_batches(batch_size: int = 7, seed: int = 0, count: int = 40, policy: A.Compose | None = None) -> DeviceBatches:
    train = synthetic().train
    split = Split(train.images[:count], train.labels[:count])
    policy = whole_policy() if policy is None else policy
    return DeviceBatches({"train": split, "test": split}, {"train": policy, "test": A.Compose([])}, batch_size, seed, CPU)


def order_of(seed: int, epoch: int, batch_size: int = 7) -> list[int]:
    """The order of an epoch's images, read off their pixels."""
    batches = device_batches(batch_size, seed, policy=A.Compose([]))
    places = {image.astype(np.float32).tobytes(): place for place, image in enumerate(synthetic().train.images[:40])}
    return [places[image.permute(1, 2, 0).numpy().tobytes()]
            for images, _ in batches.shuffled("train", epoch) for image in images]


def by_image(batches: DeviceBatches, seed: int, epoch: int) -> np.ndarray:
    """The pixels of an epoch's images, in the order of the split."""
    pixels = np.concatenate([images.numpy() for images, _ in batches.shuffled("train", epoch)])
    return pixels[np.argsort(order_of(seed, epoch))]


# ---------------------------------------------------------------- batches

def test_the_order_depends_on_seed_and_epoch_only():
    orders = {(seed, epoch): order_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    assert order_of(0, 1, batch_size=16) == orders[0, 1]
    assert orders[1, 2] == random_stream(1, ORDER, 2).permutation(40).tolist()


def test_the_augmentation_of_an_image_depends_on_seed_epoch_and_image_only():
    pixels = by_image(device_batches(7), 0, 3)
    other = device_batches(16)
    list(other.shuffled("train", 0))
    list(other.in_order("test"))
    assert np.array_equal(pixels, by_image(other, 0, 3))

    def changed(seed: int, epoch: int) -> float:
        """The share of images that come out otherwise; one in eight is not augmented at all."""
        return (by_image(device_batches(7, seed), seed, epoch) != pixels).any((1, 2, 3)).mean()

    assert changed(0, 3) == 0
    assert changed(0, 4) > 0.7
    assert changed(1, 3) > 0.7


def test_the_images_of_a_split_are_augmented_each_in_its_own_way():
    image = synthetic().train.images[:1]
    split = Split(np.repeat(image, 40, 0), np.zeros(40, np.int64))
    batches = DeviceBatches({"train": split}, {"train": whole_policy()}, 40, 0, CPU)
    [(images, _)] = batches.shuffled("train", 0)
    assert len({made.numpy().tobytes() for made in images}) > 20


def test_an_image_is_augmented_the_same_whatever_else_there_is():
    few, many = device_batches(count=40), device_batches(count=50)
    numbers = [next(iter(b._run("train", 2, np.array([5, 0, 39]), 3)))[0] for b in (few, many)]
    assert torch.equal(*numbers)


def test_every_image_comes_once_with_its_label():
    batches = device_batches(policy=A.Compose([]))
    split = synthetic().train
    seen = {images.permute(1, 2, 0).numpy().astype(np.uint8).tobytes(): int(label)
            for batch in batches.shuffled("train", 0) for images, label in zip(*batch, strict=True)}
    assert seen == {image.tobytes(): int(label) for image, label in zip(split.images[:40], split.labels[:40], strict=True)}
    assert [len(labels) for _, labels in batches.shuffled("train", 0)] == [7] * 5 + [5]


def test_both_paths_give_the_same_test_images():
    split = Split(synthetic().test.images[:30], synthetic().test.labels[:30])
    policy = normalizing_policy(MEAN, STD)
    workers, device = WorkerBatches({"test": split}, {"test": policy}, 8, 0, 0), DeviceBatches(
        {"test": split}, {"test": policy}, 8, 0, CPU)
    (images, labels), (own_images, own_labels) = (
        [torch.cat(part) for part in zip(*batches.in_order("test"), strict=True)] for batches in (workers, device))
    assert torch.equal(images, own_images)
    assert torch.equal(labels, own_labels)
    assert next(iter(device.in_order("test")))[0].is_contiguous(memory_format=torch.channels_last)


def test_workers_take_a_policy_that_ends_in_tensors():
    split = Split(synthetic().test.images[:4], synthetic().test.labels[:4])
    plain, tensors = ([A.Normalize(MEAN, STD), *end] for end in ([], [ToTensorV2()]))
    made = [next(iter(WorkerBatches({"test": split}, {"test": A.Compose(transforms)}, 4, 0, 0).in_order("test")))[0]
            for transforms in (plain, tensors)]
    assert torch.equal(*made)


# ---------------------------------------------------------------- nothing is waited for

class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device: reading a number, results of unknown size, and copies to
    the host, which on a CPU only their methods show."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
    COPYING = ("cpu", "numpy", "tolist")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.methods = pytest.MonkeyPatch()

    def __enter__(self):
        for name in self.COPYING:
            method = getattr(torch.Tensor, name)

            def counted(tensor, *arguments, method=method, **keywords):
                self.count += 1
                return method(tensor, *arguments, **keywords)

            self.methods.setattr(torch.Tensor, name, counted)
        return super().__enter__()

    def __exit__(self, *error):
        self.methods.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        masks = function.__name__.startswith("index.") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
        self.count += masks or any(word in function.__name__ for word in self.WAITING)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("captured", [False, True])
def test_the_batches_and_steps_of_an_epoch_wait_for_nothing(monkeypatch, captured):
    monkeypatch.setattr("tinycnn.training.epoch.time.monotonic", lambda: 0.0)  # nobody looks at the bar
    reads = []
    for count in (16, 64):
        net = Net().to(memory_format=torch.channels_last)
        step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True), CPU, 0.0)
        wrapped = CapturedStep(step) if captured else step
        batches = device_batches(8, count=count)
        with HostReads() as host, tqdm(disable=True) as bar:
            train_epoch(wrapped, batches.shuffled("train", 0), lambda images: 0.1, bar)
            evaluate(net, batches.in_order("test"), CPU)
        assert not captured or wrapped.possible
        reads.append(host.count)
    # the sums at the end of training and of the test; once, how near a recording is to the step that it was made of
    assert reads[0] == reads[1] == (3 if captured else 2)


def test_a_wait_would_be_counted():
    ones = torch.ones(3)
    for number, wait in enumerate((lambda: ones[0].item(), lambda: bool(ones[0]), lambda: ones.nonzero(), lambda: ones.cpu(),
                                   lambda: ones[ones > 0], lambda: ones.numpy(), lambda: ones.tolist())):
        with HostReads() as host:
            wait()
        assert host.count >= 1, number


def test_the_log_says_which_path_ran(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    assert "batches='device'" in (only_run(tmp_path) / "model_accuracy.log").read_text()
