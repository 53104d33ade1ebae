"""python main.py export: files that load elsewhere and give what the network gives."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from test_program import only_run
from torch import nn
from torch.nn import functional as F

import main
import model
from inference import export
from inference.classifier import Classifier
from training import weights
from training.dilated import quicken
from training.images import load

onnx = pytest.importorskip("onnx", reason="requirements-test.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="requirements-test.txt is not installed")


@pytest.fixture
def exported(run, tmp_path, pictures, capsys):
    """A function that exports a run of one epoch: exported("onnx") -> (status, stdout, stderr, path)."""
    assert run("--epochs", "1")[0] == 0

    def make(to: str):
        capsys.readouterr()
        status = main.main(["export", "--to", to, "--log-dir", str(tmp_path / "logs"), "--data-dir", str(pictures)])
        return status, *capsys.readouterr(), only_run(tmp_path) / f"model{export.SUFFIXES[to]}"

    return make


def logits_of(tmp_path, images: np.ndarray) -> np.ndarray:
    """What the trained network itself says."""
    found = weights.read(only_run(tmp_path) / "final.safetensors")
    net = model.Net(3)
    found.load_into(net)
    with torch.no_grad():
        return Classifier(net, found.mean, found.deviation)(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_an_exported_network_is_the_network(exported, tmp_path, pictures, to):
    status, out, err, path = exported(to)
    assert (status, err) == (0, "")
    assert out.startswith(f"{path}: {path.stat().st_size:,} bytes\naccuracy ")
    assert str(main.REFERENCE.parents[1]).encode() not in path.read_bytes()
    if to == "onnx":
        session = onnxruntime.InferenceSession(path)
        (image,), (logits,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(uint8)", [32, 32, 3])
        assert (logits.name, logits.type) == ("logits", "tensor(float)")
        assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["disc", "ring", "square"]
        graph = onnx.load(path).graph
        onnx.checker.check_model(path)
        operators = [node.op_type for node in graph.node]
        assert "BatchNormalization" not in operators
        assert operators.count("Conv") == 18
        def run(images):
            return session.run(None, {"image": images})[0]
    else:
        extra = {"class_names.json": ""}
        program = torch.export.load(path, extra_files=extra)
        assert json.loads(extra["class_names.json"]) == ["disc", "ring", "square"]
        assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
        def run(images):
            return program.module()(torch.from_numpy(images)).detach().numpy()
    images = load("folder", str(pictures)).test.images
    if to == "onnx":  # the README's lines
        lines = next(block for block in re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
                     if "onnxruntime" in block).replace("model.onnx", str(path))
        names = {"images": images}
        exec(lines, names)
        np.testing.assert_array_equal(names["logits"], run(images))
    for count in (1, 7, 24):
        found = run(images[:count])
        assert found.shape == (count, 3)
        np.testing.assert_allclose(found, logits_of(tmp_path, images[:count]), atol=1e-4)
    assert not list(path.parent.glob(".tmp-*"))


def test_int8_holds_weights_of_8_bits_and_is_near(exported, tmp_path, pictures):
    status, out, err, path = exported("int8")
    assert (status, err) == (0, "")
    assert "accuracy" in out
    graph = onnx.load(path).graph
    sizes = {each.name: np.prod(each.dims) for each in graph.initializer if each.data_type == onnx.TensorProto.INT8}
    assert sum(sizes.values()) > 140_000
    assert {node.op_type for node in graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["disc", "ring", "square"]
    images = load("folder", str(pictures)).test.images
    expected = logits_of(tmp_path, images)
    found = session.run(None, {"image": images})[0]
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    assert path.stat().st_size < 250_000


def test_calibration_images_are_class_balanced(pictures):
    train = load("folder", str(pictures)).train
    chosen = export.calibration(train, 12)
    assert len(chosen) == 12
    for label in range(3):
        ours = train.images[train.labels == label][:4]
        assert np.array_equal(chosen[4 * label:4 * label + 4], ours)


def test_what_is_not_near_enough_is_not_written(exported, monkeypatch):
    monkeypatch.setattr(export, "INT8_BOUND", -101.0)
    status, out, err, path = exported("int8")
    assert (status, out) == (2, "")
    assert "int8 loses more than -101.0 points" in one_line(err)
    assert not path.exists()
    monkeypatch.setattr(export, "fold", lambda classifier: classifier.requires_grad_(False).apply(
        lambda module: module.weight.mul_(1.5) if isinstance(module, nn.Conv2d) else None))
    status, _, err, path = exported("torch")
    assert status == 2
    assert "the exported network is not the same" in one_line(err)
    assert not path.exists()


class Choosing(model.Net):
    def forward(self, images):
        return super().forward(images) if images.mean() > 0 else super().forward(-images)


class Widening(model.Net):
    def forward(self, images):
        return super().forward(images.double().round().float() + F.adaptive_avg_pool2d(images, 3).sum())


class Doubting(model.Net):
    def forward(self, images):
        return F.conv2d(super().forward(images)[..., None, None].double(), torch.ones(3, 3, 1, 1).double()).flatten(1).float()


@pytest.mark.parametrize(("edited", "to", "reason"), [
    (Choosing, "onnx", "symbolically traced variables"), (Choosing, "torch", "symbolically traced variables"),
    (Choosing, "int8", "symbolically traced variables"), (Widening, "onnx", "an adaptive average to more than one pixel"),
    (Doubting, "onnx", "Could not find an implementation for Conv")])
def test_a_network_that_cannot_be_exported_is_named(exported, monkeypatch, edited, to, reason):
    monkeypatch.setattr(model, "Net", edited)
    status, out, err, path = exported(to)
    assert (status, out) == (2, "")
    assert "the network in model.py can't be exported" in one_line(err)
    assert reason in err
    assert "\x1b" not in err
    assert not path.exists()


def test_a_full_disk_leaves_nothing(exported, monkeypatch):
    from training import records

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    status, _, err, path = exported("torch")
    assert status == 2
    assert "model.pt2 could not be written (No space left on device): make room" in one_line(err)
    assert not path.exists()
    assert not list(path.parent.glob(".tmp-*"))


def test_missing_packages_are_asked_for(exported, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else "there")
    status, _, err, _ = exported("onnx")
    assert status == 2
    assert "--to onnx needs the package onnxscript: python -m pip install onnx onnxscript onnxruntime" in one_line(err)


def test_folding_finds_a_quickened_convolution_too():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, bias=False), nn.BatchNorm2d(3)).eval()
    quicken(net, torch.device("cpu"))
    folded = export.fold(Classifier(net, (0.5,) * 3, (0.5,) * 3).eval())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
