"""The batches of an epoch; the images of a dataset as tensors; what a policy has made of an image."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinycnn.data.dataset import Dataset

Batch = tuple[Tensor, Tensor]  # images float32 N x 3 x H x W in the device's memory format, labels int64 N, on the device


@dataclass
class Epoch:
    """The batches of one pass, to be taken once, and how many images they hold, of all processes."""

    batches: Iterator[Batch]
    images: int

    def __iter__(self) -> Iterator[Batch]:
        return self.batches


def split_tensors(dataset: Dataset) -> dict[str, tuple[Tensor, Tensor]]:
    """The images, uint8 N x H x W x 3, and labels, int64 N, of each split. Their memory is the dataset's own."""
    return {name: (torch.from_numpy(split.images), torch.from_numpy(split.labels)) for name, split in
            (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test))}


def as_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """What a policy has made of an image, as H x W x 3 also after ToTensorV2."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else image
