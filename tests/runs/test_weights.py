"""safetensors files of runs: what is believed."""

import json
import random

import pytest
import torch
from conftest import REFERENCE, example_record, synthetic

from config import Config, UserError
from model import Net
from tinycnn.network.identity import network_identity
from tinycnn.runs.weights import find_teachers, read_weights, save_weights

METADATA = {"class_names": ["a", "b"], "mean": [0.5] * 3, "standard_deviation": [0.25] * 3, "images": "0" * 64,
            "network": network_identity(Net(2)), "config": {"dropout": 0.0, "width": 1}}


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


def test_2000_mutated_files_are_refused_or_the_same(path):
    whole, rng, believed = path.read_bytes(), random.Random(0), 0
    tensors = read_weights(path).tensors
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(2000):
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
    assert believed < 200


@pytest.mark.parametrize(("key", "value"), [
    ("class_names", "ab"), ("class_names", [1, 2]), ("mean", [0.5]), ("mean", "abc"), ("standard_deviation", [0.25, 0.25, 0.0]),
    ("mean", [0.5, 0.5, float("nan")]), ("config", []), ("config", {"width": "1"}), ("config", {"width": 99}), ("images", 1),
    ("network", [])])
def test_wrong_metadata_is_refused(path, key, value):
    save_weights(path, Net(2).state_dict(), METADATA | {key: value})
    with pytest.raises(UserError, match="is damaged, or holds no weights of this program"):
        read_weights(path)


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


def test_other_weights_than_the_networks_are_refused(path):
    with pytest.raises(UserError, match=r"does not hold weights of the network in model\.py for 2 classes.*undo the edits"):
        read_weights(path).load_into(Net(3))


def test_weights_of_another_network_with_the_same_shapes_are_refused(monkeypatch):
    class Negated(Net):
        def forward(self, images):
            return -super().forward(images)

    weights = read_weights(REFERENCE / "best" / "seed-0" / "final.safetensors")
    weights.build_net()
    monkeypatch.setattr("tinycnn.runs.weights.Net", Negated)
    with pytest.raises(UserError, match=r"holds weights of another network than that of model\.py: name a run"):
        weights.build_net()


def test_a_missing_teacher_is_named(tmp_path, path):
    assert find_teachers(Config()) == []
    with pytest.raises(UserError, match="--teacher: there is no run 'nobody'"):
        find_teachers(Config(teacher=f"{path},nobody", log_dir=str(tmp_path)))


def test_weights_know_the_images_they_were_trained_on(tmp_path):
    images, record = synthetic(), example_record()
    about = METADATA | {"class_names": record["dataset"]["class_names"], "images": images.fingerprint}
    save_weights(tmp_path / "x.safetensors", Net().state_dict(), about)
    assert read_weights(tmp_path / "x.safetensors").trained_on(images)
    assert not read_weights(tmp_path / "x.safetensors").trained_on(images.hold_out(10))
