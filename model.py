"""The network, and what can be read off it: parameters, multiply-adds, receptive fields.

A depthwise-separable CNN for 32x32 pictures, after MobileNet (Howard et al. 2017, arXiv:1704.04861): each 3x3
convolution is split into a depthwise one (each channel by itself) and a pointwise one (1x1, across channels).
It has 155,434 parameters and 7.55 million multiply-adds. Strided convolutions halve the size; nothing is pooled but
the last 4x4 map. Needs torch alone.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


def separable(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3x3 convolution, then a pointwise one with BatchNorm and ReLU: N x channels_in x H x W in,
    N x channels_out x H/stride x W/stride out, float. No activation between the two."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, kernel_size=3, stride=stride, padding=dilation, dilation=dilation,
                  groups=channels_in, bias=False),
        nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Net(nn.Module):
    """Float images N x 3 x 32 x 32, normalized, in; float logits N x num_classes out.

    `dropout` is the probability that one of the 256 features is dropped before the classifier; at 0 the layer is absent.
    `width` multiplies the channels of every stage, for a teacher; the sizes below are those of width 1.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.0, width: int = 1) -> None:
        super().__init__()
        c32, c64, c128, c192, c256 = (width * channels for channels in (32, 64, 128, 192, 256))
        self.input_block = nn.Sequential(                 # output 32 x 32 x 32, receptive field  3
            nn.Conv2d(3, c32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(c32),
            nn.ReLU(),
        )
        self.conv_block1 = nn.Sequential(
            separable(c32, c32),                          # output 32 x 32 x 32, receptive field  5
            separable(c32, c64, stride=2),                # output 64 x 16 x 16, receptive field  7
        )
        self.conv_block2 = nn.Sequential(
            separable(c64, c64),                          # output 64 x 16 x 16, receptive field 11
            separable(c64, c128, stride=2),               # output 128 x 8 x 8,  receptive field 15
        )
        self.conv_block3 = nn.Sequential(
            separable(c128, c128),                        # output 128 x 8 x 8,  receptive field 23
            separable(c128, c192, stride=2),              # output 192 x 4 x 4,  receptive field 31
        )
        self.conv_block4 = nn.Sequential(
            separable(c192, c192),                        # output 192 x 4 x 4,  receptive field 47
            separable(c192, c256, dilation=2),            # output 256 x 4 x 4,  receptive field 79: the whole image
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),                      # output 256 x 1 x 1
            *([nn.Dropout(dropout)] if dropout else []),
            nn.Conv2d(c256, num_classes, kernel_size=1),  # output num_classes x 1 x 1
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.input_block(images)
        features = self.conv_block1(features)
        features = self.conv_block2(features)
        features = self.conv_block3(features)
        features = self.conv_block4(features)
        return self.head(features).flatten(1)


@dataclass(frozen=True)
class Convolution:
    """One convolution as it was met in a forward pass. Sizes in pixels, `output` as (channels, height, width).

    `jump` is the distance in the input image between neighbours in the output. `jump` and `receptive_field` are None
    where they could not be followed, and `unknown` then says why; a receptive field behind a global pooling is the
    whole image's side.
    """

    name: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output: tuple[int, int, int]
    multiply_adds: int
    jump: int | None
    receptive_field: int | None
    unknown: str = ""


# What leaves each pixel where it is, so that receptive fields pass through.
PIXELWISE = (nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU,
             nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh)
SLIDING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class _Field:
    """What one pixel of a tensor sees of the image: both None once unknown."""

    jump: int | None = None
    size: int | None = None
    unknown: str = ""


def convolutions(net: nn.Module, image_size: int = 32) -> list[Convolution]:
    """Every convolution of `net`, in the order in which a forward pass of one 3 x image_size x image_size image
    meets them.

    The layers are watched, not believed: a layer continues the field of the layer whose output tensor it is given. One
    that is given another tensor (a sum of branches, the result of a function call), or one that was changed in place
    since, has an unknown field, and so has all that follows; the reason is named. Per layer, jump *= stride and
    field += (kernel - 1) * dilation * jump (Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural
    Networks", Distill 2019).

    `net` is left as it was. Raises what its forward pass raises.
    """
    images = torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device)
    fields = {_identity(images): _Field(jump=1, size=1)}
    alive = [images]  # an id is only unique while its tensor lives
    arrived: dict[nn.Module, _Field] = {}
    found: list[Convolution] = []
    names = {module: name for name, module in net.named_modules()}

    def arrive(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lost = _Field(unknown=f"{names[module]} is given what no layer put out: a sum of branches or a function's result")
        arrived[module] = fields.get(_identity(inputs[0]), lost) if inputs else lost

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        field = _through(module, arrived[module], names[module], image_size)
        fields[_identity(output)] = field
        alive.append(output)
        if isinstance(module, nn.Conv2d):
            found.append(_describe(module, names[module], field, output))

    training = {module: module.training for module in net.modules()}
    leaves = [module for module in net.modules() if not list(module.children())]
    hooks = [hook for leaf in leaves for hook in (leaf.register_forward_pre_hook(arrive), leaf.register_forward_hook(leave))]
    try:
        with torch.no_grad():
            net.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return found


def _identity(value: object) -> tuple[int, int]:
    """Which tensor it is, and in which state: one that is changed in place is another from then on."""
    return id(value), getattr(value, "_version", 0)


def _through(layer: nn.Module, field: _Field, name: str, image_size: int) -> _Field:
    """The field behind `layer`, given the field before it."""
    if field.jump is None or field.size is None or isinstance(layer, PIXELWISE):
        return field
    if isinstance(layer, GLOBAL) and layer.output_size in (1, (1, 1)):
        return _Field(jump=field.jump, size=max(field.size, image_size))
    if not isinstance(layer, SLIDING):
        return _Field(unknown=f"{name} is a {type(layer).__name__}, whose receptive field this does not know")
    kernel, stride, dilation = (_pair(getattr(layer, key, 1)) for key in ("kernel_size", "stride", "dilation"))
    if any(sides[0] != sides[-1] for sides in (kernel, stride, dilation)):
        return _Field(unknown=f"{name} is not square")
    return _Field(jump=field.jump * stride[0], size=field.size + (kernel[0] - 1) * dilation[0] * field.jump)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _describe(layer: nn.Conv2d, name: str, field: _Field, output: Tensor) -> Convolution:
    taps = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    return Convolution(
        name=name, kernel=layer.kernel_size, stride=layer.stride, dilation=layer.dilation,
        output=(output.shape[1], output.shape[2], output.shape[3]), multiply_adds=output[0].numel() * taps,
        jump=field.jump, receptive_field=field.size, unknown=field.unknown)


def facts(net: nn.Module) -> dict[str, int | str | None]:
    """What tells one network from another, for a run's records: trainable parameters; multiply-adds an image, of the
    convolutions; the receptive field in pixels (None if unknown) of the last convolution that still has a map to slide
    over; and the SHA-256 of this file."""
    layers = convolutions(net)
    mapped = [layer for layer in layers if layer.output[1:] != (1, 1)] or layers
    return {
        "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "multiply_adds": sum(layer.multiply_adds for layer in layers),
        "receptive_field": mapped[-1].receptive_field if mapped else None,
        "model_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
