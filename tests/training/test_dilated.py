"""Dilated convolutions computed without dilation are PyTorch's own, up to rounding."""

import copy

import pytest
import torch
from torch import nn

from model import Net
from tinycnn.training.dilated import FastDilatedConv2d, use_fast_dilated_convs

CPU = torch.device("cpu")


def depthwise(dilation: int = 2, bias: bool = False, **changes) -> nn.Conv2d:
    return nn.Conv2d(6, **({"out_channels": 6, "kernel_size": 3, "padding": dilation, "dilation": dilation, "groups": 6,
                            "bias": bias, "dtype": torch.double} | changes))


@pytest.mark.parametrize(("dilation", "bias", "size", "channels"), [
    (2, False, (4, 4), 6), (2, True, (8, 6), 6), (3, False, (9, 3), 12), (2, False, (5, 4), 6)])
def test_results_and_gradients_are_pytorchs_own(dilation, bias, size, channels):
    torch.manual_seed(0)
    plain = depthwise(dilation, bias, out_channels=channels)
    fast = copy.deepcopy(plain)
    use_fast_dilated_convs(fast, CPU)
    assert type(fast) is FastDilatedConv2d
    maps = torch.randn(3, 6, *size, dtype=torch.double)
    one, other = (maps.clone().to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    expected, found = plain(one), fast(other)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    factors = torch.randn_like(expected)
    (expected * factors).sum().backward()
    (found * factors).sum().backward()
    torch.testing.assert_close(other.grad, one.grad)
    for fast_one, plain_one in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(fast_one.grad, plain_one.grad)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = depthwise()
    use_fast_dilated_convs(layer, CPU)
    assert torch.autograd.gradcheck(layer, torch.randn(2, 6, 4, 4, dtype=torch.double, requires_grad=True))


def test_the_networks_dilated_convolution_is_replaced_and_no_other():
    net = Net()
    use_fast_dilated_convs(net, CPU)
    assert [name for name, layer in net.named_modules() if type(layer) is FastDilatedConv2d] == ["conv_block4.1.0"]


@pytest.mark.parametrize("changes", [
    {"groups": 1}, {"dilation": 1, "padding": 1}, {"stride": 2}, {"padding": 1}, {"kernel_size": 5},
    {"padding_mode": "reflect"}, {"dilation": (2, 1), "padding": (2, 1)}])
def test_what_it_is_not_made_for_is_left_alone(changes):
    layer = depthwise(**changes)
    use_fast_dilated_convs(layer, CPU)
    assert type(layer) is nn.Conv2d


def test_on_a_gpu_pytorchs_own_is_kept():
    layer = depthwise()
    use_fast_dilated_convs(layer, torch.device("cuda"))
    assert type(layer) is nn.Conv2d


def test_evaluation_and_weights_are_those_of_a_plain_network():
    torch.manual_seed(0)
    plain = Net().eval()
    fast = copy.deepcopy(plain)
    use_fast_dilated_convs(fast, CPU)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fast(images), plain(images))
    assert fast.state_dict().keys() == plain.state_dict().keys()
