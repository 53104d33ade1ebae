"""Mix the images of a batch with one another, for a teacher to label: mixup and CutMix."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from batches.randomness import MIXING, random_stream

Batches = Iterable[tuple[Tensor, Tensor]]  # images float32 N x 3 x H x W, labels int64 N, which stay as they are


def mix(batches: Batches, mixup: float, cutmix: float, seed: int, epoch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mix each image with the one at the same place from the end of its batch. The random numbers are functions of (seed, epoch,
    place in the epoch's order of `count` images).

    mixup (Zhang et al. 2018, arXiv:1710.09412): blend; the other's share is uniform in 0 to `mixup`. CutMix (Yun et al. 2019,
    arXiv:1905.04899): with probability `cutmix`, a square of the other image replaces what was there; its area is uniform in 0
    to half of the image's."""
    draws = torch.from_numpy(random_stream(seed, MIXING, epoch).random((count, 5), dtype="float32"))
    start = 0
    for images, labels in batches:
        share, applied, area, top, left = draws[start:start + len(images), :, None, None, None].to(images.device).unbind(1)
        start += len(images)
        other = images.flip(0)
        if mixup:
            images = torch.lerp(images, other, share * mixup)
        if cutmix:
            size = images.shape[-1]
            side = (area / 2).sqrt().mul(size).round()
            y, x = (torch.arange(size, device=images.device).view(shape) - (place * (size - side + 1)).floor()
                    for shape, place in (((-1, 1), top), ((1, -1), left)))
            pasted = (applied < cutmix) & (y >= 0) & (y < side) & (x >= 0) & (x < side)
            images = torch.where(pasted, other, images)
        yield images, labels
