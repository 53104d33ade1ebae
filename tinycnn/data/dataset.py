"""A dataset in memory, whatever it was read from."""

import dataclasses
import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from config import SIDE, UserError
from tinycnn.text import printable


class DatasetMissing(UserError):
    """The dataset is not on this machine."""


@dataclass(frozen=True)
class Split:
    """Images with their labels. `images`: uint8, N x 32 x 32 x 3, RGB. `labels`: int64, N, indices into the class names."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory. `kind`: "cifar10", "folder" or "synthetic". `validation` is empty unless held out of `train`."""

    kind: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    validation: Split

    @cached_property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels of `train`, as fractions of 255; the latter is at least
        1/255. From integer sums, so the same to the bit on every machine."""
        parts = np.array_split(self.train.images, len(self.train) // 5000 + 1)  # calcHist's float32 counts to 2**24 exactly
        means, stds = [], []
        for channel in range(3):
            counts = [cv2.calcHist([part.reshape(-1, SIDE, 3)], [channel], None, [256], [0, 256]) for part in parts]
            histogram = np.sum(counts, axis=0, dtype=np.int64).ravel().tolist()
            pixels, total = sum(histogram), sum(value * count for value, count in enumerate(histogram))
            squares = sum(value * value * count for value, count in enumerate(histogram))
            means.append(total / (255 * pixels))
            stds.append(max(math.sqrt(squares * pixels - total * total) / (255 * pixels), 1 / 255))
        return tuple(means), tuple(stds)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all pixels, labels and class names: the same for the same data, whatever folder it lies in."""
        digest = hashlib.sha256(os.fsencode("\0".join(self.class_names)))
        for split in (self.train, self.validation, self.test):
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()

    def hold_out(self, count: int) -> "Dataset":
        """Move `count` training images to `validation`: the same ones every time, equally many of each class. Where `count` is
        no multiple of the number of classes, the first classes give one more."""
        if not count:
            return self
        classes = len(self.class_names)
        order = np.random.Generator(np.random.Philox(key=2718)).permutation(len(self.train))
        held: list[np.ndarray] = []
        for label, name in enumerate(self.class_names):
            share = count // classes + (label < count % classes)
            members = order[self.train.labels[order] == label]
            if len(members) <= share:
                raise UserError(f"--validation {count} takes {share} images of each class, but class {printable(name)} has "
                                f"only {len(members)} training images; lower --validation")
            held.append(members[:share])
        is_held = np.zeros(len(self.train), dtype=bool)
        is_held[np.concatenate(held)] = True
        return dataclasses.replace(self, train=_select(self.train, ~is_held), validation=_select(self.train, is_held))


def _select(split: Split, mask: np.ndarray) -> Split:
    return Split(split.images[mask], split.labels[mask])


def empty_split() -> Split:
    """A split without images."""
    return Split(np.zeros((0, SIDE, SIDE, 3), dtype=np.uint8), np.zeros(0, dtype=np.int64))
