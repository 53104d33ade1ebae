"""safetensors files of runs: what is believed."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from torch import nn

from config import Config, UserError
from model import Net
from tinycnn.data.dataset import Dataset, Split, empty_split
from tinycnn.runs.weights import load_weights, read_weights, save_weights
from tinycnn.sources import COPIED_FILES, code_hash

METADATA = {"class_names": ["a", "b"], "mean": [0.5] * 3, "standard_deviation": [0.25] * 3, "images": "0" * 64,
            "model": code_hash(COPIED_FILES["model.py"]), "config": {"dropout": 0.0, "width": 1}}


@pytest.fixture
def path(tmp_path):
    save_weights(tmp_path / "final.safetensors", Net(2).state_dict(), METADATA)
    return tmp_path / "final.safetensors"


def test_the_same_weights_give_the_same_bytes(path, tmp_path):
    weights = read_weights(path)
    save_weights(tmp_path / "again.safetensors", dict(reversed(weights.tensors.items())), METADATA)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    for name, tensor in weights.build_net().state_dict().items():
        assert torch.equal(tensor, weights.tensors[name])


def test_500_mutated_files_are_refused_or_the_same(path):
    layer = nn.Conv2d(3, 8, 3)  # small, as every file is hashed
    save_weights(path, layer.state_dict(), METADATA)
    whole, rng, believed = path.read_bytes(), random.Random(0), 0
    tensors = read_weights(path).tensors
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(500):
        at = rng.randrange(header if rng.random() < 0.7 else len(whole))
        content = bytearray(whole)
        if rng.random() < 0.5:
            content[at] ^= 1 << rng.randrange(8)
        else:
            content[at:at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(0, 9))
        path.write_bytes(content)
        try:
            weights = read_weights(path)
        except UserError:
            continue
        believed += 1
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights.tensors.items())
    assert believed < 50


@pytest.mark.parametrize(("key", "value"), [
    ("class_names", "ab"), ("class_names", [1, 2]), ("class_names", []), ("mean", [0.5]), ("mean", "abc"),
    ("standard_deviation", [0.25, 0.25, 0.0]), ("standard_deviation", [1e-320] * 3), ("mean", [1e300] * 3),
    ("mean", [10**400] * 3), ("mean", [0.5, 0.5, float("nan")]), ("config", []), ("config", {"width": "1"}),
    ("config", {"width": 99}), ("images", 1), ("model", [])])
def test_wrong_metadata_is_refused(path, key, value, recwarn):
    save_weights(path, Net(2).state_dict(), METADATA | {key: value})
    with pytest.raises(UserError, match="is damaged, or holds no weights of this program"):
        read_weights(path)
    assert not recwarn.list


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    net = Net(2)
    net.conv_block1[0][0].weight.data[3, 0, 1, 1] = value
    save_weights(path, net.state_dict(), METADATA)
    with pytest.raises(UserError, match="some of its weights are not finite numbers"):
        read_weights(path)


def test_a_missing_tensor_is_told(path):
    tensors = Net(2).state_dict()
    del tensors["conv_block1.0.1.weight"]
    save_weights(path, tensors, METADATA)
    with pytest.raises(UserError, match=r"does not hold weights of Net in model\.py for 2 classes.*conv_block1\.0\.1\.weight"):
        read_weights(path).build_net()


def test_metadata_nested_100_000_deep_is_refused(path):
    """A header that safetensors reads, with a value that JSON can't."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header["__metadata__"]["config"] = "[" * 100_000
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    with pytest.raises(UserError, match="is damaged, or holds no weights of this program"):
        read_weights(path)


def test_committed_weights_of_before_are_readable():
    for path in REFERENCE.rglob("*.safetensors"):
        assert read_weights(path).build_net()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_missing_teacher_is_named(tmp_path, path):
    assert load_weights(Config()) == {"init": [], "teacher": []}
    with pytest.raises(UserError, match="--teacher: there is no run 'nobody'"):
        load_weights(Config(teacher=f"{path},nobody", log_dir=str(tmp_path)))


def test_weights_know_the_images_they_were_trained_on(path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, np.arange(40) % 2)
    images = Dataset("folder", ("a", "b"), split, split, empty_split())
    mean, std = images.statistics
    by_hash = METADATA | {"images": images.fingerprint}
    by_figures = METADATA | {"images": None, "mean": mean, "standard_deviation": std}  # as in files from before it was kept
    for about in (by_hash, by_figures):
        save_weights(path, Net(2).state_dict(), about)
        assert read_weights(path).trained_on(images)
        assert not read_weights(path).trained_on(images.hold_out(10))
