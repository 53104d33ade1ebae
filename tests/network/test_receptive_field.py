"""Receptive fields and multiply-adds, of networks of any shape."""

import pytest
import torch
from torch import nn

import model
from model import Net
from tinycnn.network.receptive_field import convolutions
from tinycnn.network.summary import describe_network


def test_parameters_multiply_adds_and_receptive_field():
    assert describe_network(Net()) == {"parameters": 155_434, "multiply_adds": 7_551_488, "receptive_field": 79}
    net = Net()
    net.input_block.requires_grad_(False)
    assert describe_network(net)["parameters"] == 155_434 - 864 - 64


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
    assert found["last"].unknown.startswith("last gets an input that no layer returned")
    assert describe_network(Branching())["receptive_field"] is None


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
    found = convolutions(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)))
    assert found[-1].receptive_field == 32


def test_a_network_of_several_processes_has_the_same_figures():
    assert convolutions(nn.SyncBatchNorm.convert_sync_batchnorm(Net())) == convolutions(Net())


def test_looking_leaves_the_network_as_it_was():
    net = Net(dropout=0.5)
    net.conv_block1.eval()
    before = {name: module.training for name, module in net.named_modules()}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    convolutions(net)
    assert {name: module.training for name, module in net.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
