"""Dilated depthwise convolutions that train fast on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FastDilatedConv2d(nn.Conv2d):
    """A 3x3 convolution with padding = dilation, computed without dilation: the same figures, up to rounding.

    A convolution dilated by d meets each of the map's d x d phases (every d-th pixel) by itself. With the phases side by
    side, a column and a row of zeros between them, one plain convolution does them all (as the "algorithme a trous" of
    Holschneider et al. 1989 and TensorFlow's space_to_batch). On a CPU PyTorch's own gradients of a dilated depthwise
    convolution take several times as long: docs/speed.md.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Float N x C x H x W, in and out. Uses the fast path in training mode only."""
        step = self.dilation[0]
        number, channels, height, width = maps.shape
        if not self.training:
            return super().forward(maps)
        down, across = -(-height // step), -(-width // step)  # of the largest phase: zeros fill the others
        filled = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 0, across * step - width, 0, down * step - height))
        phases = filled.reshape(number, down, step, across, step, channels)
        spaced = F.pad(phases.permute(0, 2, 1, 4, 3, 5), (0, 0, 0, 1, 0, 0, 0, 1))
        output = F.conv2d(spaced.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2), self.weight, self.bias, padding=1,
                          groups=self.groups)
        phases = output.permute(0, 2, 3, 1).reshape(*spaced.shape[:-1], -1)[:, :, :-1, :, :-1]
        whole = phases.permute(0, 2, 1, 4, 3, 5).reshape(number, down * step, across * step, -1)
        return whole[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def use_fast_dilated_convs(net: nn.Module, device: torch.device) -> None:
    """Replace the dilated depthwise convolutions of `net` by FastDilatedConv2d on a CPU, where that is faster."""
    if device.type != "cpu":
        return
    for layer in net.modules():
        if type(layer) is nn.Conv2d and _is_dilated_depthwise(layer):
            layer.__class__ = FastDilatedConv2d


def _is_dilated_depthwise(layer: nn.Conv2d) -> bool:
    step = layer.dilation[0]
    return (step > 1 and layer.groups == layer.in_channels and layer.kernel_size == (3, 3) and layer.stride == (1, 1)
            and layer.dilation == layer.padding == (step, step) and layer.padding_mode == "zeros")
