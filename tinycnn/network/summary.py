"""Describe a network: in figures, and layer by layer as text, torchsummary's table and the receptive fields that it lacks."""

import contextlib
import copy
import io
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchsummary import summary

from config import SIDE
from tinycnn.device import one_thread
from tinycnn.network.receptive_field import Convolution, convolutions


@one_thread()
def describe_network(net: nn.Module) -> dict[str, Any]:
    """What config.json says of `net`: its trainable parameters, the multiply-adds of its convolutions for one image, and the
    receptive field, in pixels, of the last convolution that slides over a map (None where it can't be followed)."""
    layers = convolutions(net)
    sliding = [layer for layer in layers if layer.output[1:] != (1, 1)] or layers
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        "multiply_adds": sum(layer.multiply_adds for layer in layers),
        "receptive_field": sliding[-1].receptive_field if sliding else None,
    }


@one_thread()
def torch_summary(net: nn.Module, device: str) -> str:
    """The text of torch_summary.log: the device; torchsummary's own table; for each convolution kernel, stride, dilation,
    output size, receptive field and multiply-adds."""
    # torchsummary runs a forward pass in training mode, draws random numbers, and knows two devices only
    twin, table = copy.deepcopy(net).cpu().eval(), io.StringIO()
    with contextlib.redirect_stdout(table), torch.random.fork_rng(devices=[]):
        try:
            summary(twin, (3, SIDE, SIDE), device="cpu")
        except Exception as error:  # it knows layers that take and return one tensor
            print(f"torchsummary can't describe this network ({type(error).__name__}: {error})")
    text = table.getvalue()
    return f"device: {device}\n{text}{_left_out(net, text)}\n{receptive_field_table(convolutions(net))}"


def _left_out(net: nn.Module, table: str) -> str:
    """A line where the total of torchsummary's table, which counts the weight and bias of each call of a layer, is not that of
    the network; "" where it is."""
    total, found = sum(parameter.numel() for parameter in net.parameters()), re.search(r"Total params: ([\d,]+)", table)
    if found and found[1] == f"{total:,}":
        return ""
    others = [f"{name} ({parameter.numel():,})" for name, parameter in net.named_parameters()
              if "." not in name or name.rpartition(".")[2] not in ("weight", "bias")]
    return (f"The network has {total:,} parameters. The table counts the weight and bias of each layer, once a call"
            + (f", so it leaves out {', '.join(others)}" if others else "") + ".\n")


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
