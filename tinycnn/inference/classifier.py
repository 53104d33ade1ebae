"""A trained network that takes images as they are: normalization is part of it."""

import torch
from torch import Tensor, nn

from config import SIDE


class Classifier(nn.Module):
    """Normalize uint8 images, N x 32 x 32 x 3, RGB, and return the network's logits, float32 N x classes."""

    mean: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Put `net` into evaluation mode. `mean` and `std` are each channel's, as fractions of 255."""
        super().__init__()
        self.net = net.eval()
        # As large as an image, because runtimes are slow to spread three numbers over the pixels of channels-last memory.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1).repeat(1, SIDE, SIDE))
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(3, 1, 1).repeat(1, SIDE, SIDE)))

    def forward(self, image: Tensor) -> Tensor:
        return self.net((image.permute(0, 3, 1, 2).float() - self.mean) * self.scale)
