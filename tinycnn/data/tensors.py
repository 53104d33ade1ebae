"""Images and labels of splits, as tensors; what a policy has made, as an array."""

import numpy as np
import torch
from torch import Tensor

from tinycnn.data.dataset import Split


def as_tensors(splits: dict[str, Split], device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Images, uint8 N x H x W x 3, and labels, int64 N, of each of `splits`, on `device`. A split with two names, because two
    policies augment it, lies there once. On the CPU the memory is the split's own."""
    once = {id(split): tuple(torch.from_numpy(array).to(device) for array in (split.images, split.labels))
            for split in splits.values()}
    images, labels = ({name: once[id(split)][part] for name, split in splits.items()} for part in (0, 1))
    return images, labels


def as_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """What a policy has made of an image, as H x W x 3 also after ToTensorV2."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else image
