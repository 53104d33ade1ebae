"""A first convolution that begins with what the images are made of."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = 5000  # whose patches are looked at


@torch.no_grad()
def whiten(net: nn.Module, images: Tensor) -> None:
    """Have the first convolution of `net` begin with the principal components of the patches of `images`, float N x 3 x H x W,
    each with both signs: those of most variance first. BatchNorm behind it makes them whitened (Page 2018, "How to train your
    ResNet"; Jordan 2024, arXiv:2404.00498). The filters' norm stays that of PyTorch's own beginning."""
    first = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
    patches = F.unfold(images, first.kernel_size).transpose(1, 2).flatten(0, 1)
    _, components = torch.linalg.eigh(patches.T.cov())  # ascending variances
    filters = components.flip(1).T.repeat_interleave(2, 0)
    filters[1::2] *= -1
    size = min(len(filters), len(first.weight))
    first.weight[:size] = (filters[:size] / 3 ** 0.5).view(-1, *first.weight.shape[1:])
