"""torch_summary.log."""

import torch
from conftest import REFERENCE
from torch import nn

from model import Net
from tinycnn.network.summary import torch_summary


def test_the_summary_is_the_committed_one():
    text = torch_summary(Net(), "cpu (AMD EPYC)")
    assert text.splitlines()[1:] == (REFERENCE / "torch_summary.log").read_text().splitlines()[1:]
    assert text.startswith("device: cpu (AMD EPYC)\n")


def test_an_unknown_receptive_field_has_its_reason_below_the_table():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1))
    table, reasons = torch_summary(net, "cpu").split("Multiply-adds\n")[1].split("?: ", 1)
    assert [line.split()[-2] for line in table.splitlines()] == ["3", "?", "?"]
    assert reasons == "1 is a Upsample, whose receptive field is not known\n"


class Scaled(nn.Module):
    """With parameters that torchsummary's table does not count, and a layer that it counts twice."""

    def __init__(self, calls: int = 1):
        super().__init__()
        self.calls, self.layer, self.scale = calls, nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, images):
        for _ in range(self.calls):
            images = self.layer(images)
        return self.scale * images


def test_parameters_that_the_table_leaves_out_are_told_below_it():
    for calls, total in ((1, 12), (2, 24)):
        text = torch_summary(Scaled(calls), "cpu")
        assert f"Total params: {total}\n" in text
        assert "The network has 15 parameters." in text
        assert "leaves out scale (3).\n\nConvolution" in text
    assert "leaves out" not in torch_summary(Net(), "cpu")


def test_a_summary_leaves_the_network_and_the_random_generator_as_they_were():
    net = Net().train()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch_summary(net, "cpu")
    assert net.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    net = Net()
    before = torch.get_rng_state()
    torch_summary(net, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
