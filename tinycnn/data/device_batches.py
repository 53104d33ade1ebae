"""Batches made on the device: the images lie there as uint8, and the policy runs on whole batches."""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise, starmap

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinycnn.data.dataset import Split
from tinycnn.data.device_policy import DevicePolicy
from tinycnn.data.randomness import ORDER, WHOLE_BATCHES, random_stream
from tinycnn.data.tensors import as_tensors
from tinycnn.streams import after_this, side_stream, wait_for
from tinycnn.timing import milliseconds

AUGMENTED_FIRST = 512  # images that a GPU augments together at the start of an epoch; the first step waits for them
AUGMENTED_TOGETHER = 4224  # then, beside the steps on those before: 33 batches of 128, so 50,000 images are 13 parts
TEST_BATCH = {"cpu": 500, "cuda": 2500}  # images per step of a test
KEPT_BYTES = 2**28  # of a split's normalized images, 12 kB each, that may stay on a GPU

Batch = tuple[Tensor, Tensor]  # images float32 N x 3 x H x W, labels int64 N
Drawn = tuple[Tensor, list[Tensor]]  # an epoch's order, int64 N, and each policy step's parameters, in the images' own order


class DeviceBatches:
    """All batches of a run, from images that lie on the device as uint8. The same calls as WorkerBatches."""

    def __init__(self, splits: dict[str, Split], policies: dict[str, A.Compose], batch_size: int, seed: int,
                 device: torch.device, share_of: Callable[[int], slice] = slice, fused: bool = False) -> None:
        """`splits` and `policies` have the same keys; `share_of(n)` is the slice of a batch of n images that this process
        makes; `fused`: try to augment in one kernel on CUDA. Raises Unsupported."""
        height, width = next(iter(splits.values())).images.shape[1:3]
        self.policies = {name: DevicePolicy(policy, height, width, device) for name, policy in policies.items()}
        self.images, self.labels = as_tensors(splits, device)
        self.batch_size, self.seed, self.device, self.share_of = batch_size, seed, device, share_of
        self.to_fuse = dict(policies) if fused and device.type == "cuda" else {}
        self.drawn: dict[tuple[str, int], Drawn] = {}  # of a GPU: for the next epoch, drawn while this one runs
        self.kept: dict[str, list[Batch]] = {}  # of a GPU: normalized images, by policy

    def shuffled(self, name: str, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch of training, by a policy: every image once, in an order drawn from (seed, epoch)."""
        if name in self.to_fuse:
            self.policies[name] = _faster(self.to_fuse.pop(name), self.policies[name], self.images[name])
        yield from self._run(name, epoch, None, self.batch_size)
        if self.device.type == "cuda":  # which is still at work on the last batches
            self.drawn = {(name, epoch + 1): self._draw(name, epoch + 1, None)}

    def in_order(self, name: str) -> Iterator[Batch]:
        """The batches of a split in its own order, for evaluation. On a GPU, those of a policy without random transforms are
        made once and kept."""
        if name in self.kept:
            return iter(self.kept[name])
        batches = self._run(name, 0, np.arange(len(self.labels[name])), TEST_BATCH[self.device.type])
        keep = self.device.type == "cuda" and not self.policies[name].draws and 4 * self.images[name].numel() <= KEPT_BYTES
        return iter(self.kept.setdefault(name, list(batches))) if keep else batches

    def close(self) -> None:
        """Do nothing."""

    def _draw(self, name: str, epoch: int, order: np.ndarray | None) -> Drawn:
        """An epoch's random numbers, and its order where none is given. Row i is image i's, whatever the order."""
        count, policy = len(self.labels[name]), self.policies[name]
        order = random_stream(self.seed, ORDER, epoch).permutation(count) if order is None else order
        uniform = random_stream(self.seed, WHOLE_BATCHES, epoch).random((count, policy.draws))
        return self._to_device(order), policy.sample(self._to_device(uniform))

    def _run(self, name: str, epoch: int, order: np.ndarray | None, batch_size: int) -> Iterator[Batch]:
        policy, images, labels = self.policies[name], self.images[name], self.labels[name]
        drawn = self.drawn.pop((name, epoch)) if (name, epoch) in self.drawn else self._draw(name, epoch, order)
        on_device, parameters = drawn
        # A GPU waits for kernels to be launched, so it makes many batches at once; a CPU keeps one in its cache.
        first, together = (max(1, limit // batch_size) if self.device.type == "cuda" else 1
                           for limit in (AUGMENTED_FIRST, AUGMENTED_TOGETHER))
        parts = [whole[self.share_of(len(whole))] for whole in on_device.split(batch_size)]

        def make(start: int, end: int) -> Iterator[Batch]:
            sizes = [len(part) for part in parts[start:end]]
            indices = torch.cat(parts[start:end])
            made = policy.apply(images, indices, parameters)
            return zip(made.split(sizes), labels[indices].split(sizes), strict=True)

        groups = starmap(make, pairwise([0, *range(first, len(parts), together), len(parts)]))
        beside = side_stream(self.device, "batches")
        try:
            yield from _made_ahead(groups, beside) if beside else chain.from_iterable(groups)
        finally:  # even if not all batches were taken: what the other stream reads is kept until this one has waited for it
            wait_for(beside)

    def _to_device(self, array: np.ndarray) -> Tensor:
        """On the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


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


def _made_ahead(parts: Iterator[Iterator[Batch]], beside: torch.cuda.Stream) -> Iterator[Batch]:
    """The batches of all parts. Each part is made in the stream `beside` while the current stream trains on the one before."""
    def launch() -> Iterator[Batch] | None:
        with after_this(beside):
            return next(parts, None)

    following = launch()
    while following is not None:
        wait_for(beside)  # while no more than this part is launched there
        current, following = following, launch()
        yield from current
