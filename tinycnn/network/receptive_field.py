"""Compute the receptive field and the multiply-adds of every convolution from a forward pass."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import SIDE


@dataclass(frozen=True)
class Convolution:
    """One convolution in a forward pass. Sizes are in pixels, `output` is (channels, height, width).

    `jump` is the distance in the input image between neighbours in the output. Where `jump` and `receptive_field` can't be
    computed they are None, and `unknown` says why. A receptive field behind a global pooling is at least the
    side of the image.
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


# Layers that leave each pixel where it is, and the receptive field as it was.
PIXELWISE = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
             nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh)
SLIDING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class _Field:
    """What one pixel of a tensor sees of the image. Jump and size are None once unknown."""

    jump: int | None = None
    size: int | None = None
    unknown: str = ""


def convolutions(net: nn.Module) -> list[Convolution]:
    """Describe every convolution of `net`, in the order in which a forward pass of one 3 x 32 x 32 image meets them.

    The pass is recorded by hooks: a layer continues the receptive field of the layer whose output tensor it is given. A layer
    that is given another tensor (a sum of branches, the result of a function), or one that was changed in place since, has an
    unknown receptive field, and so have all that follow it; the reason is recorded. Per layer, jump *= stride and
    field += (kernel - 1) * dilation * jump (Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural
    Networks", Distill 2019).

    `net` is left as it was. Raises what its forward pass raises.
    """
    net = copy.deepcopy(net).eval()
    images = torch.zeros(1, 3, SIDE, SIDE, device=next(net.parameters()).device)
    fields = {_state(images): _Field(jump=1, size=1)}
    alive = [images]  # an id is only unique while its tensor lives
    arrived: dict[nn.Module, _Field] = {}
    found: list[Convolution] = []
    names = {module: name for name, module in net.named_modules()}

    def arrive(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lost = _Field(unknown=f"{names[module]} gets an input that no layer returned: a sum of branches or a function's result")
        arrived[module] = fields.get(_state(inputs[0]), lost) if inputs else lost

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        field = _after(module, arrived[module], names[module])
        fields[_state(output)] = field
        alive.append(output)
        if isinstance(module, nn.Conv2d):
            found.append(_describe(module, names[module], field, output))

    for leaf in (module for module in net.modules() if not list(module.children())):
        leaf.register_forward_pre_hook(arrive)
        leaf.register_forward_hook(leave)
    with torch.no_grad():
        net(images)
    return found


def _state(value: object) -> tuple[int, int]:
    """Which tensor it is, and its version: a tensor changed in place counts as another."""
    return id(value), getattr(value, "_version", 0)


def _after(layer: nn.Module, field: _Field, name: str) -> _Field:
    """The field after `layer`, given the field before it."""
    if field.jump is None or field.size is None or isinstance(layer, PIXELWISE):
        return field
    if isinstance(layer, GLOBAL) and layer.output_size in (1, (1, 1)):
        return _Field(jump=field.jump, size=max(field.size, SIDE))
    if not isinstance(layer, SLIDING):
        return _Field(unknown=f"{name} is a {type(layer).__name__}, whose receptive field is not known")
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
