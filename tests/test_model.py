from pathlib import Path

import pytest
import torch
from torch import nn

import model
from model import Net, convolutions, facts

# kernel, stride, dilation, output, receptive field: the design's figures, stage by stage
STAGES = [
    (3, 1, 1, (32, 32, 32), 3),
    (3, 1, 1, (32, 32, 32), 5), (1, 1, 1, (32, 32, 32), 5), (3, 2, 1, (32, 16, 16), 7), (1, 1, 1, (64, 16, 16), 7),
    (3, 1, 1, (64, 16, 16), 11), (1, 1, 1, (64, 16, 16), 11), (3, 2, 1, (64, 8, 8), 15), (1, 1, 1, (128, 8, 8), 15),
    (3, 1, 1, (128, 8, 8), 23), (1, 1, 1, (128, 8, 8), 23), (3, 2, 1, (128, 4, 4), 31), (1, 1, 1, (192, 4, 4), 31),
    (3, 1, 1, (192, 4, 4), 47), (1, 1, 1, (192, 4, 4), 47), (3, 1, 2, (192, 4, 4), 79), (1, 1, 1, (256, 4, 4), 79),
    (1, 1, 1, (10, 1, 1), 79),
]


def test_parameters_and_multiply_adds():
    assert facts(Net()) | {"model_sha256": ""} == {
        "parameters": 155_434, "multiply_adds": 7_551_488, "receptive_field": 79, "model_sha256": ""}


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
    reached = (image.grad[0, 0] != 0).any(0).nonzero()
    assert reached.max() - reached.min() + 1 == STAGES[stage][4]


def test_an_inserted_stage_shows_in_the_figures():
    net = Net()
    net.conv_block2.append(model.separable(128, 128))
    after = {c.name: c.receptive_field for c in convolutions(net)}
    assert after["conv_block2.2.0"] == 15 + 2 * 4
    assert after["conv_block4.1.0"] == 79 + 2 * 4


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, images):
        stem = self.first(images)
        return self.last(self.left(stem) + self.right(stem)).mean((2, 3))


def test_a_branch_is_followed_to_its_join_and_then_named():
    found = {c.name: c for c in convolutions(Branching())}
    assert [found[name].receptive_field for name in ("first", "left", "right", "last")] == [3, 5, 7, None]
    assert found["last"].unknown.startswith("last is given what no layer put out")
    assert facts(Branching())["receptive_field"] is None


class Residual(nn.Module):
    """As ResNet writes it: the sum goes into the first branch's own tensor."""

    def __init__(self):
        super().__init__()
        self.near, self.wide, self.last = (nn.Conv2d(3, 3, size, padding=size // 2) for size in (3, 7, 3))

    def forward(self, images):
        features = self.near(images)
        features += self.wide(images)
        return self.last(features)


def test_a_sum_in_place_is_a_branch_too():
    assert [c.receptive_field for c in convolutions(Residual())] == [3, 7, None]


class Halves(nn.Module):
    def forward(self, images):
        return images.chunk(2, 1)


class Splitting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.halves, self.last = nn.Conv2d(3, 4, 3), Halves(), nn.Conv2d(2, 2, 3)

    def forward(self, images):
        return self.last(self.halves(self.first(images))[0])


def test_a_layer_that_gives_several_tensors_is_a_branch():
    assert [c.receptive_field for c in convolutions(Splitting())] == [3, None]


def test_an_activation_in_place_is_followed():
    found = convolutions(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3)))
    assert [c.receptive_field for c in found] == [3, 5]


@pytest.mark.parametrize(("layer", "words"), [
    (nn.Conv2d(3, 3, (3, 1), padding=(1, 0)), "0 is not square"), (nn.Upsample(scale_factor=2), "0 is a Upsample")])
def test_a_layer_that_cannot_be_followed_is_named(layer, words):
    found = convolutions(nn.Sequential(layer, nn.Conv2d(3, 3, 3)))
    assert found[-1].receptive_field is None
    assert words in found[-1].unknown


def test_pooling_is_followed():
    found = convolutions(nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3)))
    assert (found[-1].jump, found[-1].receptive_field) == (2, 8)


def test_looking_leaves_the_network_as_it_was():
    net = Net(dropout=0.5)
    net.conv_block1.eval()
    before = {name: module.training for name, module in net.named_modules()}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    convolutions(net)
    assert {name: module.training for name, module in net.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


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
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers import peers

    net = peers()[name].net.eval()
    assert sum(each.numel() for each in net.parameters()) == weights
    assert sum(each.numel() for each in net.buffers() if each.dim()) == statistics
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * multiply_adds
