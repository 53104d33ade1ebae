"""A network's identity is what it computes, not how its file is written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

import model
from model import Net
from tinycnn.network.identity import describe_network, network_identity

SOURCE = Path(model.__file__).read_text(encoding="utf-8")
BATCH_NORM = "nn.BatchNorm2d(channels_out)"
STEM_RELU = "            nn.ReLU(),\n        )\n        self.conv_block1"
BLOCK2 = "features = self.conv_block2(features)"
BLOCKS_3_4 = "        features = self.conv_block3(features)\n        features = self.conv_block4(features)\n"
HEAD = "self.head(features).flatten(1)"


def edited(folder: Path, *changes: tuple[str, str]) -> type[nn.Module]:
    """Net from a model.py with every occurrence of these texts replaced, each of which must occur."""
    text = SOURCE
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / f"model_{len(list(folder.iterdir()))}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net


@pytest.mark.parametrize("changes", [
    [("        return ", "        # the logits\n        return ")],
    [("features", "maps")],
    [("class Net", "def helper() -> int:\n    return 1\n\n\nclass Net")],
    [('    """Float images', '    """Pictures')],
    [("separable(", "depthwise_separable(")],
    [(HEAD, "torch.flatten(self.head(features), 1)"), ("from torch import", "import torch\nfrom torch import")],
])
def test_what_computes_the_same_is_the_same(changes, tmp_path):
    assert network_identity(edited(tmp_path, *changes)()) == network_identity(Net())


@pytest.mark.parametrize("change", [
    ("kernel_size=3, stride=stride", "kernel_size=5, stride=stride"),
    ("separable(c192, c256, dilation=2)", "separable(c192, c256, dilation=1)"),
    ("separable(c192, c256, dilation=2)", "separable(c192, c256, stride=2, dilation=2)"),
    ("kernel_size=3, padding=1", "kernel_size=3, padding=0"),
    ("kernel_size=3, padding=1", "kernel_size=3, padding=1, padding_mode='reflect'"),
    ("groups=channels_in", "groups=1"),
    ("nn.Conv2d(3, c32, kernel_size=3, padding=1, bias=False)", "nn.Conv2d(3, c32, kernel_size=3, padding=1)"),
    (STEM_RELU, STEM_RELU.replace("ReLU", "GELU")),
    (STEM_RELU, STEM_RELU.replace("nn.ReLU(),", "")),
    (BATCH_NORM, "nn.BatchNorm2d(channels_out, eps=1e-3)"),
    (BATCH_NORM, "nn.BatchNorm2d(channels_out, momentum=0.2)"),
    (BATCH_NORM, "nn.BatchNorm2d(channels_out, track_running_stats=False)"),
    (BATCH_NORM, "nn.Identity()"),
    (BLOCK2, "features = features + self.conv_block1(self.input_block(images))"),
    (BLOCKS_3_4, BLOCKS_3_4.replace("3", "x").replace("4", "3").replace("x", "4")),
    (HEAD, "self.head(features).mean((2, 3))"),
    (HEAD, "2 * self.head(features).flatten(1)"),
    (HEAD, "self.head(features.flip(3)).flatten(1)"),
    (HEAD, "self.head(features * (2 if self.training else 1)).flatten(1)"),  # in one of the two modes
    (HEAD, "self.head(features if self.training else 2 * features).flatten(1)"),
    ("nn.AdaptiveAvgPool2d(1)", "nn.AdaptiveMaxPool2d(1)"),
    ("nn.AdaptiveAvgPool2d(1)", "nn.AdaptiveAvgPool2d(2)"),
    ("self.head", "self.classifier"),
    ("    def forward(self, images", "        self.input_block.requires_grad_(False)\n\n    def forward(self, images"),
])
def test_what_computes_something_else_differs(change, tmp_path):
    assert network_identity(edited(tmp_path, change)()) != network_identity(Net())


def test_the_order_of_layers_with_the_same_weights_counts():
    class Pair(nn.Module):
        def __init__(self, swapped: bool = False) -> None:
            super().__init__()
            self.first, self.second, self.swapped = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), swapped

        def forward(self, maps):
            return self.first(self.second(maps)) if self.swapped else self.second(self.first(maps))

    assert network_identity(Pair()) != network_identity(Pair(swapped=True))


def test_arguments_of_net_count():
    nets = [Net(), Net(num_classes=7), Net(width=2), Net(dropout=0.1), Net(dropout=0.2), Net().half()]
    assert len({network_identity(net) for net in nets}) == len(nets)


def test_settings_of_functions_and_constants_count():
    class Functional(nn.Module):
        def __init__(self, p: float, scale: float) -> None:
            super().__init__()
            self.weight, self.p, self.scale = nn.Parameter(torch.ones(4, 3, 3, 3)), p, torch.tensor([scale])

        def forward(self, images):
            return F.dropout(F.conv2d(images, self.weight), self.p, self.training) * self.scale

    identities = [network_identity(Functional(*settings)) for settings in ((0.1, 1.0), (0.2, 1.0), (0.1, 2.0))]
    assert len(set(identities)) == 3
    assert network_identity(Functional(0.1, 1.0)) == identities[0]


def test_weights_modes_and_memory_formats_do_not_count():
    net, before = Net(), network_identity(Net())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    net.to(memory_format=torch.channels_last)
    assert network_identity(net) == before
    net.eval().conv_block1.train()
    assert network_identity(net) == before
    assert not net.training
    assert net.conv_block1.training
    assert not any(module._forward_hooks for module in net.modules())


def test_it_is_the_same_in_every_process():
    code = ("from model import Net; from tinycnn.network.identity import network_identity\n"
            "print(network_identity(Net()), network_identity(Net(dropout=0.1, width=2)))")
    outputs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={"PYTHONHASHSEED": seed, "PATH": ""}).stdout for seed in ("1", "2")}
    assert outputs == {f"{network_identity(Net())} {network_identity(Net(dropout=0.1, width=2))}\n"}


def test_it_is_the_one_that_records_hold():
    """Across versions of torch and of this program: with another value here, earlier runs would be of another network."""
    assert network_identity(Net()) == "28a9690f33e3d473"


DRAWING = "self.head(features if torch.rand(()) < 0.5 else 2 * features).flatten(1)"


def test_the_random_generator_neither_counts_nor_changes(tmp_path):
    net_class = edited(tmp_path, (HEAD, DRAWING), ("from torch import", "import torch\nfrom torch import"))
    before = torch.get_rng_state()
    assert len({network_identity(net_class()) for _ in range(8)}) == 1
    torch.set_rng_state(before)
    net = net_class()
    drawn = torch.get_rng_state()
    network_identity(net)
    assert torch.equal(torch.get_rng_state(), drawn)


BRANCH = ("        return self.head",
          "        if features.sum() > 0:\n            features = 2 * features\n        return self.head")


def test_where_the_code_cannot_be_traced_its_source_counts(tmp_path):
    original = network_identity(edited(tmp_path, BRANCH)())
    comment = edited(tmp_path, BRANCH, ("        return ", "        # the logits\n\n        return "))
    docstring = edited(tmp_path, BRANCH, ('    """Float images', '    """Pictures'))
    assert {network_identity(net_class()) for net_class in (comment, docstring)} == {original}
    factor = edited(tmp_path, (BRANCH[0], BRANCH[1].replace("2 *", "3 *")))
    eps = edited(tmp_path, BRANCH, (BATCH_NORM, "nn.BatchNorm2d(channels_out, eps=1e-3)"))
    dropouts = [edited(tmp_path, BRANCH)(dropout=p) for p in (0.1, 0.2)]
    others = [network_identity(net) for net in (Net(), factor(), eps(), *dropouts)]
    assert len({original, *others}) == 6


def test_parameters_multiply_adds_and_receptive_field():
    assert describe_network(Net()) == {"parameters": 155_434, "multiply_adds": 7_551_488, "receptive_field": 79,
                                       "identity": network_identity(Net())}


def test_a_frozen_layer_is_no_trainable_parameter():
    net = Net()
    net.input_block.requires_grad_(False)
    assert describe_network(net)["parameters"] == 155_434 - 864 - 64
