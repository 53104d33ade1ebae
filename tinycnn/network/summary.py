"""Describe a network layer by layer, as text: torchsummary's table, and the receptive fields that it lacks."""

import contextlib
import copy
import io
from collections.abc import Sequence

import torch
from torch import nn
from torchsummary import summary

from config import SIDE
from tinycnn.network.receptive_field import Convolution, convolutions


def torch_summary(net: nn.Module, device: str) -> str:
    """The text of torch_summary.log: the device; torchsummary's own table; for each convolution kernel, stride, dilation,
    output size, receptive field and multiply-adds."""
    # torchsummary runs a forward pass in training mode, draws random numbers, and knows two devices only
    twin, table = copy.deepcopy(net).cpu().eval(), io.StringIO()
    with contextlib.redirect_stdout(table), torch.random.fork_rng(devices=[]):
        summary(twin, (3, SIDE, SIDE), device="cpu")
    return f"device: {device}\n{table.getvalue()}\n{receptive_field_table(convolutions(net))}"


def receptive_field_table(layers: Sequence[Convolution]) -> str:
    """A row for each of `layers`. Where a receptive field is unknown, the reason stands below the table."""
    line = "{:<20} {:>7} {:>7} {:>9} {:>16} {:>5} {:>16} {:>14}\n".format
    text = line("Convolution", "Kernel", "Stride", "Dilation", "Output Shape", "Jump", "Receptive Field", "Multiply-adds")
    for layer in layers:
        kernel, stride, dilation = ("x".join(map(str, pair)) for pair in (layer.kernel, layer.stride, layer.dilation))
        text += line(layer.name, kernel, stride, dilation, str(list(layer.output)), layer.jump or "?",
                     layer.receptive_field or "?", f"{layer.multiply_adds:,}")
    reasons = dict.fromkeys(layer.unknown for layer in layers if layer.unknown)
    return text + "".join(f"?: {reason}\n" for reason in reasons)
