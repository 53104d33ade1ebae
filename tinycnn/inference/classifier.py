"""A trained network that takes images as they are: resizing and normalization are part of it."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from config import SIDE, UserError
from tinycnn.runs.weights import Weights


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


class AnySizeClassifier(nn.Module):
    """Classify images of any size. `classes`: the class of each logit.

    Takes a uint8 tensor or array, N x H x W x 3 or H x W x 3, RGB, as of an image of Pillow. Resizes as `predict` does, and
    returns logits, float32 N x classes (N = 1 for a single image), on the module's device. Raises ValueError for other input.
    """

    def __init__(self, weights: Weights, model: str | None = None) -> None:
        """`model`: a model.py to run, as in Weights.build_net, which may raise UserError."""
        super().__init__()
        self.classifier, self.classes = Classifier(weights.build_net(model), weights.mean, weights.std), weights.class_names
        self.eval()

    def forward(self, images: Any) -> Tensor:
        pixels = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(f"images must be uint8, N x H x W x 3 or H x W x 3, not {pixels.dtype}, "
                             f"{' x '.join(map(str, pixels.shape))}")
        batch = pixels if pixels.ndim == 4 else pixels[None]
        if batch.shape[1:3] != (SIDE, SIDE):
            batch = np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
                              for image in batch])
        return self.classifier(torch.from_numpy(batch.copy()).to(self.classifier.mean.device))


def check_finite(outputs: Tensor) -> None:
    """Raise UserError where an output of the network is not a finite number."""
    if not outputs.isfinite().all():
        raise UserError("the network's outputs are not finite numbers: its weights are damaged, or training diverged; name "
                        "another run")
