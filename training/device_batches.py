"""Batches made on the device: the images lie there as uint8, and the policy runs on whole batches."""

from collections.abc import Iterator

import albumentations as A
import numpy as np
import torch
from torch import Tensor

from training.batches import ORDER, WHOLE_BATCHES, random_stream
from training.device_policy import DevicePolicy, Unsupported
from training.images import Split

AT_ONCE = 4096  # images that a GPU augments together
TEST_BATCH = {"cpu": 500, "cuda": 2500}  # images a step of a test


def settled(wanted: str, policies: dict[str, A.Compose], split: Split, device: torch.device) -> str:
    """Config's `batches` as it can be had: "device", or else "workers", with a line that says why."""
    if wanted == "workers":
        return wanted
    height, width = split.images.shape[1:3]
    try:
        if device.type == "mps":
            raise Unsupported("64-bit arithmetic")
        for policy in policies.values():
            DevicePolicy(policy, height, width, torch.device("cpu"))
    except Unsupported as reason:
        print(f"Batches are made by workers: {reason} can't be had for whole batches on device {device}.")
        return "workers"
    return "device"


class DeviceBatches:
    """All batches of a run, from images that lie on the device as uint8. The same calls as training.batches.Batches."""

    def __init__(self, splits: dict[str, Split], policies: dict[str, A.Compose], batch_size: int, seed: int,
                 device: torch.device) -> None:
        """`splits` and `policies` have the same keys. Raises Unsupported."""
        height, width = next(iter(splits.values())).images.shape[1:3]
        self.policies = {name: DevicePolicy(policy, height, width, device) for name, policy in policies.items()}
        self.images = {name: torch.from_numpy(split.images).to(device) for name, split in splits.items()}
        self.labels = {name: torch.from_numpy(split.labels).to(device) for name, split in splits.items()}
        self.batch_size, self.seed, self.device = batch_size, seed, device

    def shuffled(self, split: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch of training: every image once, in an order drawn from (seed, epoch)."""
        order = random_stream(self.seed, ORDER, epoch).permutation(len(self.images[split]))
        return self._run(split, epoch, order, self.batch_size)

    def in_order(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a test."""
        return self._run(split, 0, np.arange(len(self.images[split])), TEST_BATCH[self.device.type])

    def close(self) -> None:
        """Nothing to end."""

    def _run(self, split: str, epoch: int, order: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Row i of the random numbers is image i's, whatever the order and the batch size."""
        policy, images, labels = self.policies[split], self.images[split], self.labels[split]
        uniform = random_stream(self.seed, WHOLE_BATCHES, epoch).random((len(labels), policy.draws))
        parameters = policy.sample(self._moved(uniform))
        # A GPU waits for kernels to be launched, so it makes many batches at once; a CPU keeps one in its cache.
        at_once = batch_size * max(1, AT_ONCE // batch_size) if self.device.type == "cuda" else batch_size
        for indices in self._moved(order).split(at_once):
            made = policy(images[indices], [values[indices] for values in parameters])
            yield from zip(made.split(batch_size), labels[indices].split(batch_size), strict=True)

    def _moved(self, array: np.ndarray) -> Tensor:
        """On the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
