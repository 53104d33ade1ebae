"""The network layer by layer, as text: torchsummary's table, and the receptive fields that it lacks."""

import contextlib
import copy
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchsummary import summary

if TYPE_CHECKING:
    from model import Convolution


def torch_summary(net: nn.Module, layers: "Iterable[Convolution]", device: str) -> str:
    """The text of torch_summary.log: the device; torchsummary's own table; and for each convolution kernel, stride,
    dilation, output size and receptive field, from `layers`, what model.convolutions(net) found.

    torchsummary runs a forward pass on random numbers and knows two devices only, so it gets a copy of the network in
    evaluation mode on the CPU, under a forked generator.
    """
    twin, out = copy.deepcopy(net).cpu().eval(), io.StringIO()
    with contextlib.redirect_stdout(out), torch.random.fork_rng(devices=[]):
        summary(twin, (3, 32, 32), device="cpu")
    return f"device: {device}\n{out.getvalue()}\n{receptive_fields(layers)}"


def receptive_fields(layers: "Iterable[Convolution]") -> str:
    """A row for each of `layers`, with what could not be followed named below it."""
    line = "{:<20} {:>7} {:>7} {:>9} {:>16} {:>5} {:>16} {:>14}\n".format
    text = line("Convolution", "Kernel", "Stride", "Dilation", "Output Shape", "Jump", "Receptive Field", "Multiply-adds")
    reasons = []
    for layer in layers:
        kernel, stride, dilation = ("x".join(map(str, pair)) for pair in (layer.kernel, layer.stride, layer.dilation))
        text += line(layer.name, kernel, stride, dilation, str(list(layer.output)), layer.jump or "?",
                     layer.receptive_field or "?", f"{layer.multiply_adds:,}")
        if layer.unknown and layer.unknown not in reasons:
            reasons.append(layer.unknown)
    return text + "".join(f"?: {reason}\n" for reason in reasons)
