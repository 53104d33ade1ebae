"""Class activation maps."""

import pytest
import torch
from torch import nn

from config import UserError
from model import Net
from tinycnn.network.activation_maps import class_maps


@pytest.mark.parametrize(("width", "dropout", "side"), [(1, 0.0, 32), (1, 0.5, 24), (2, 0.0, 32)])
def test_the_average_of_a_map_is_the_logit(width, dropout, side):
    torch.manual_seed(0)
    net, images = Net(7, dropout, width), torch.randn(5, 3, side, side)
    net(images)  # statistics for BatchNorm
    maps = class_maps(net, images)
    assert maps.shape == (5, 7, side // 8, side // 8)
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.mean((2, 3)), net.eval()(images), rtol=0, atol=1e-5)
    assert not torch.equal(maps[0, 0], maps[0, 0].mean().expand_as(maps[0, 0]))


def test_maps_follow_what_is_seen():
    """A network whose one class is how red a pixel is: its map is the red channel."""
    net, images = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(3, 1, 1, bias=False)), torch.randn(2, 3, 8, 8)
    net[1].weight.data = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    assert torch.equal(class_maps(net, images), images[:, :1])


class Doubled(Net):
    """A network that does something else to the logits."""

    def forward(self, images):
        return 2 * super().forward(images) + 1


class Linear(nn.Module):
    """A network with a linear layer at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("net", [Doubled(7), Linear(), nn.Flatten()])
def test_another_head_has_none_and_is_told_why(net):
    with pytest.raises(UserError, match=r"has no class activation maps: its last layers must be nn\.AdaptiveAvgPool2d"):
        class_maps(net, torch.randn(2, 3, 32, 32))
