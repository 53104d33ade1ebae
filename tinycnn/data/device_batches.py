"""Batches made on the device: the images lie there as uint8, and the policy runs on whole batches."""

from collections.abc import Callable, Iterator
from itertools import chain

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError
from tinycnn.data.dataset import Dataset
from tinycnn.data.device_policy import DevicePolicy, Unsupported
from tinycnn.data.randomness import ORDER, WHOLE_BATCHES, random_stream
from tinycnn.data.tensors import Batch, Epoch, split_tensors
from tinycnn.device import after_this, memory_format, milliseconds, side_stream, wait_for
from tinycnn.processes import world

AUGMENTED_TOGETHER = 4224  # images that a GPU augments together: 33 batches of 128, so 50,000 images are 12 parts
TEST_BATCH = {"cpu": 500, "cuda": 2500}  # images per step of a test


class DeviceBatches:
    """All batches of a run, from images that lie on the device as uint8. The same calls as WorkerBatches."""

    def __init__(self, dataset: Dataset, train_policy: Callable[[int], A.Compose], test_policy: A.Compose, config: Config,
                 device: torch.device) -> None:
        """`train_policy` is a function of the epoch."""
        self.train_policy, self.config, self.device = train_policy, config, device
        self.per_epoch = -(-len(dataset.train) // config.batch_size)
        self.splits = {name: (images.to(device), labels.to(device))
                       for name, (images, labels) in split_tensors(dataset).items()}
        self.policies: list[tuple[dict, DevicePolicy]] = []  # those so far, each with Albumentations' description of it
        self.normalize = self._as_device_policy(test_policy)

    def __enter__(self) -> "DeviceBatches":
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: there are no workers."""

    def train(self, epoch: int) -> Epoch:
        """The batches of an epoch of training: every image once, in an order drawn from (seed, epoch). Images float32
        N x 3 x H x W in the device's memory format, labels int64 N, on the device."""
        policy, count = self._as_device_policy(self.train_policy(epoch)), len(self.splits["train"][1])
        order = random_stream(self.config.seed, ORDER, epoch).permutation(count)
        # Row i is image i's, whatever the order
        uniform = random_stream(self.config.seed, WHOLE_BATCHES, epoch).random((count, policy.draws))
        return self._run("train", order, self.config.batch_size, policy, policy.sample(self._to_device(uniform)))

    def validation(self) -> Epoch:
        """The batches of the images held out, normalized, in their own order."""
        return self._in_order("validation")

    def test(self) -> Epoch:
        """The batches of the test images, normalized, in their own order."""
        return self._in_order("test")

    def _in_order(self, name: str) -> Epoch:
        return self._run(name, np.arange(len(self.splits[name][1])), TEST_BATCH[self.device.type], self.normalize, [])

    def _as_device_policy(self, compose: A.Compose) -> DevicePolicy:
        """The policy on whole batches, made once for all epochs that have it; in one kernel, where that is faster."""
        described, images = compose.to_dict(), self.splits["train"][0]
        height, width = images.shape[1:3]
        for known, policy in self.policies:
            if known == described:
                return policy
        try:
            policy = DevicePolicy(compose, height, width, self.device)
        except Unsupported as reason:
            raise UserError(f"augmentation.py: {reason} can't run on whole batches: use --batches workers") from reason
        if self.config.kernels == "fused" and self.device.type == "cuda" and policy.draws:
            policy = _faster(compose, policy, images)
        self.policies.append((described, policy))
        return policy

    def _run(self, name: str, order: np.ndarray, batch_size: int, policy: DevicePolicy, parameters: list[Tensor]) -> Epoch:
        return Epoch(self._batches(name, self._to_device(order), batch_size, policy, parameters), len(order))

    def _batches(self, name: str, order: Tensor, batch_size: int, policy: DevicePolicy, parameters: list[Tensor]
                 ) -> Iterator[Batch]:
        """The images of a split in this order, by a policy with these parameters, of which row i is image i's."""
        images, labels = self.splits[name]
        batches = [whole[world.share_of(len(whole))] for whole in order.split(batch_size)]
        # A GPU waits for kernels to be launched, so it makes many batches at once; a CPU keeps one in its cache.
        together = max(1, AUGMENTED_TOGETHER // batch_size) if self.device.type == "cuda" else 1

        def make(start: int) -> Iterator[Batch]:
            part = batches[start:start + together]
            sizes, indices = [len(batch) for batch in part], torch.cat(part)
            made = policy.apply(images, indices, parameters).contiguous(memory_format=memory_format(self.device))
            return zip(made.split(sizes), labels[indices].split(sizes), strict=True)

        parts, beside = map(make, range(0, len(batches), together)), side_stream(self.device, "batches")
        yield from _made_ahead(parts, beside) if beside else chain.from_iterable(parts)

    def _to_device(self, array: np.ndarray) -> Tensor:
        """On the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)


def _made_ahead(parts: Iterator[Iterator[Batch]], beside: torch.cuda.Stream) -> Iterator[Batch]:
    """The batches of all parts. Each part is made in the stream `beside`, while the current stream trains on the one before:
    an epoch took 205 ms in place of 183 + 46 (docs/speed.md)."""
    def launch() -> Iterator[Batch] | None:
        with after_this(beside):
            return next(parts, None)

    try:
        following = launch()
        while part := following:
            wait_for(beside)  # while no more than this part is launched there
            following = launch()
            yield from part
    finally:  # even if not all batches were taken: what the other stream reads is kept until this one has waited for it
        wait_for(beside)


def _faster(compose: A.Compose, policy: DevicePolicy, images: Tensor) -> DevicePolicy:
    """The policy in one kernel, if a check on some of the images finds the same bits, and less time. Prints which it is."""
    images, reason = images[:AUGMENTED_TOGETHER], ""
    chosen = torch.arange(len(images), device=images.device).flip(0)
    uniform = torch.rand(len(images), policy.draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = uniform.to(images.device)
    try:
        from tinycnn.kernels.policy import FusedPolicy  # loads Triton

        height, width = images.shape[1:3]
        policies = (FusedPolicy(compose, height, width, images.device), policy)
        calls = [lambda each=each: each.apply(images, chosen, each.sample(uniform)) for each in policies]
        if not torch.equal(*(call() for call in calls)):
            reason = "it makes other images"
        else:
            times = [milliseconds(call, images.device) for call in calls]
            reason = "" if times[0] < times[1] else "it takes {:.2f} ms, PyTorch's {:.2f}".format(*times)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    tqdm.write(f"Images are augmented by PyTorch's kernels, not by the fused one: {reason}." if reason else
               "Images are augmented by the fused kernel.")
    return policy if reason else policies[0]
