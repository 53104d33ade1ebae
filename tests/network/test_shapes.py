"""A network whose shapes don't fit is explained by its layer."""

import pytest
import torch
from torch import nn

from config import UserError
from model import Net
from tinycnn.network.shapes import explain_shape_error
from tinycnn.training.machine import check_network

IMAGES = torch.zeros(2, 3, 32, 32)


def broken(block: str, index: int, layer: nn.Module) -> Net:
    net = Net().eval()
    getattr(net, block)[1][index] = layer
    return net


def test_the_layer_is_named_with_both_shapes():
    net = broken("conv_block3", 1, nn.Conv2d(64, 192, 1))
    assert explain_shape_error(net, IMAGES).startswith(
        "conv_block3.1.1 (Conv2d with a weight of 192 x 64 x 1 x 1) can't take 2 x 128 x 4 x 4: Given groups=1")
    with pytest.raises(UserError, match=r"the network in model\.py fails: conv_block3\.1\.1 \(Conv2d"):
        check_network(net, 10)


def test_batchnorms_error_is_a_shape_error_too():
    with pytest.raises(UserError, match=r"conv_block2\.1\.2 \(BatchNorm2d with a weight of 64\) can't take 2 x 128 x 8 x 8"):
        check_network(broken("conv_block2", 2, nn.BatchNorm2d(64)), 10)


def test_an_error_in_forward_names_the_network():
    class Flat(Net):
        def forward(self, images):
            return super().forward(images).view(7, -1)

    assert explain_shape_error(Flat(), IMAGES).startswith("net (Flat) can't take 2 x 3 x 32 x 32: shape '[7, -1]'")


def test_a_sound_network_has_nothing_to_explain_and_keeps_no_hooks():
    net = Net()
    assert explain_shape_error(net, IMAGES) == ""
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())
