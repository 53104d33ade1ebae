"""The network, stage by stage, as the design has it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
from benchmarks.peers import peers
from model import Net
from tinycnn.network.receptive_field import convolutions

# kernel, stride, dilation, output, receptive field: the design's figures, stage by stage
STAGES = [
    (3, 1, 1, (32, 32, 32), 3),
    (3, 1, 1, (32, 32, 32), 5), (1, 1, 1, (32, 32, 32), 5), (3, 2, 1, (32, 16, 16), 7), (1, 1, 1, (64, 16, 16), 7),
    (3, 1, 1, (64, 16, 16), 11), (1, 1, 1, (64, 16, 16), 11), (3, 2, 1, (64, 8, 8), 15), (1, 1, 1, (128, 8, 8), 15),
    (3, 1, 1, (128, 8, 8), 23), (1, 1, 1, (128, 8, 8), 23), (3, 2, 1, (128, 4, 4), 31), (1, 1, 1, (192, 4, 4), 31),
    (3, 1, 1, (192, 4, 4), 47), (1, 1, 1, (192, 4, 4), 47), (3, 1, 2, (192, 4, 4), 79), (1, 1, 1, (256, 4, 4), 79),
    (1, 1, 1, (10, 1, 1), 79),
]


def test_every_stage_is_as_designed():
    found = [(c.kernel[0], c.stride[0], c.dilation[0], c.output, c.receptive_field) for c in convolutions(Net())]
    assert found == STAGES


def test_the_comments_in_the_code_tell_the_computed_figures():
    source = Path(model.__file__).read_text()
    for channels, height, width, field in {(*output, field) for kernel, _, _, output, field in STAGES if kernel == 1}:
        if (height, width) != (1, 1):
            assert any(f"{channels} x {height} x {width}" in line and f"receptive field {field:>2}" in line
                       for line in source.splitlines())


@pytest.mark.parametrize("stage", [i for i, row in enumerate(STAGES) if row[0] == 3])
def test_a_receptive_field_is_what_the_gradient_reaches(stage):
    """The field computed from kernels and strides is the extent of the input that moves one output pixel."""
    net = Net().double().eval()
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
    image = torch.zeros(1, 3, 161, 161, dtype=torch.float64, requires_grad=True)
    output, met = image, -1
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            met += 1
            with torch.no_grad():
                layer.weight.fill_(0.01)
            output = layer(output)
        if met == stage:
            break
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    assert image.grad is not None
    reached = (image.grad[0, 0] != 0).any(0).nonzero()
    assert reached.max() - reached.min() + 1 == STAGES[stage][4]


def test_dropout_at_zero_is_absent():
    assert not any(isinstance(layer, nn.Dropout) for layer in Net().modules())
    assert [layer.p for layer in Net(dropout=0.3).modules() if isinstance(layer, nn.Dropout)] == [0.3]
    assert sum(p.numel() for p in Net(dropout=0.3).parameters()) == 155_434


def test_logits_have_a_column_for_each_class():
    assert Net(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("name", "weights", "statistics", "multiply_adds"), [
    ("ResNet-8", 78_186, 480, 12_501_632), ("ResNet-20", 272_474, 1568, 40_813_184),
    ("MobileNetV2 x0.5", 700_490, 18_544, 27_969_024), ("ShuffleNetV2 x0.5", 352_042, 7952, 10_902_016)])
def test_the_networks_we_compare_with_are_the_published_ones(name, weights, statistics, multiply_adds):
    """Published: 78,666 with BatchNorm's statistics and 12.5 M; 0.27 M and 40.81 M; 0.70 M and 27.97 M; 0.35 M and 10.90 M."""
    net = peers()[name].net.eval()
    assert sum(each.numel() for each in net.parameters()) == weights
    assert sum(each.numel() for each in net.buffers() if each.dim()) == statistics
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * multiply_adds
