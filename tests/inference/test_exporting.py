"""python main.py export: files that load elsewhere and give what the network gives."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from learned_run import CHANCE, copy_learned_run, learned_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from config import UserError
from tinycnn.data.dataset import Split
from tinycnn.data.loading import load_dataset
from tinycnn.inference import export
from tinycnn.inference.classifier import Classifier
from tinycnn.runs.weights import Weights, read_weights, save_weights

SHARED: dict = {}
onnx = pytest.importorskip("onnx", reason="requirements-test.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="requirements-test.txt is not installed")


@pytest.fixture
def exported(command, tmp_path):
    """Export the run that has learned: exported("onnx") -> (status, stdout, stderr, path)."""
    folder = copy_learned_run(tmp_path)

    def run(to: str, *line: object):
        return *command("export", "--to", to, folder, *line), folder / f"model{export.EXPORT_SUFFIXES[to]}"

    return run


@pytest.fixture
def shared(command, tmp_path_factory):
    """The same, exported once for all tests."""
    def run(to: str):
        if to not in SHARED:
            folder = copy_learned_run(tmp_path_factory.mktemp("exported"))
            SHARED[to] = (*command("export", "--to", to, folder), folder / f"model{export.EXPORT_SUFFIXES[to]}")
        return SHARED[to]

    return run


def pictures_of(split: str) -> Split:
    """The images of the run that has learned."""
    return getattr(load_dataset("folder", str(learned_run() / "pictures")).hold_out(30), split)


def network_logits(weights: Weights, images: np.ndarray) -> np.ndarray:
    """What the trained network itself gives."""
    with torch.no_grad():
        return Classifier(weights.build_net(), weights.mean, weights.std)(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_an_exported_network_is_the_network(shared, to):
    status, out, err, path = shared(to)
    assert (status, err) == (0, "")
    assert out.startswith(f"{path}: {path.stat().st_size:,} bytes\naccuracy ")
    assert str(ROOT).encode() not in path.read_bytes()
    if to == "onnx":
        session = onnxruntime.InferenceSession(path)
        (image,), (logits,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(uint8)", [32, 32, 3])
        assert (logits.name, logits.type) == ("logits", "tensor(float)")
        assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["disc", "ring", "square"]
        onnx.checker.check_model(path)
        operators = [node.op_type for node in onnx.load(path).graph.node]
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
    test = pictures_of("test")
    if to == "onnx":  # the lines of docs/inference.md
        lines = next(block for block in re.findall("```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), re.DOTALL)
                     if "onnxruntime" in block).replace("model.onnx", str(path))
        names = {"images": test.images}
        exec(lines, names)
        np.testing.assert_array_equal(names["logits"], run(test.images))
    expected = network_logits(read_weights(path.with_name("final.safetensors")), test.images)
    assert 100 * (expected.argmax(1) == test.labels).mean() > CHANCE + 15
    for count in (1, 7, 60):
        found = run(test.images[:count])
        assert found.shape == (count, 3)
        np.testing.assert_allclose(found, expected[:count], atol=1e-4)
    assert not list(path.parent.glob(".tmp-*"))


def test_int8_holds_weights_of_8_bits_and_is_near(exported, shared, monkeypatch):
    model = shared("onnx")[-1].read_bytes()
    monkeypatch.setattr(export, "as_onnx", lambda *_: model)
    calibrated_on, as_int8 = [], export.as_int8
    monkeypatch.setattr(export, "as_int8", lambda model, images: calibrated_on.append(images) or as_int8(model, images))
    monkeypatch.setattr(export, "INT8_TOLERANCE", 5.0)  # of 60 images; test_what_is_not_near_enough_is_refused has the limit
    status, out, err, path = exported("int8")
    assert (status, err) == (0, "")
    assert "accuracy" in out
    (images,) = calibrated_on
    assert np.array_equal(images, export.calibration_images(pictures_of("train"), 1000))
    graph = onnx.load(path).graph
    sizes = {each.name: np.prod(each.dims) for each in graph.initializer if each.data_type == onnx.TensorProto.INT8}
    assert sum(sizes.values()) > 140_000
    assert {node.op_type for node in graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["disc", "ring", "square"]
    test = pictures_of("test")
    expected = network_logits(read_weights(path.with_name("final.safetensors")), test.images)
    found = session.run(None, {"image": test.images})[0]
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    assert 100 * (found.argmax(1) == test.labels).mean() > CHANCE + 15
    assert path.stat().st_size < 250_000


def test_calibration_images_are_class_balanced():
    train = pictures_of("train")
    chosen = export.calibration_images(train, 12)
    assert len(chosen) == 12
    for label in range(3):
        assert np.array_equal(chosen[4 * label:4 * label + 4], train.images[train.labels == label][:4])


@pytest.mark.parametrize(("to", "shift", "wrong", "error"), [
    ("int8", 1.0, 5, ""), ("int8", 0.0, 6, "int8 loses more than 0.5 points: accuracy 99.40 % on 1,000 test images"),
    ("int8", np.nan, 0, "int8 loses more than"), ("onnx", 0.9e-4, 0, ""), ("torch", 0.9e-4, 0, ""),
    ("onnx", 1.1e-4, 0, "logits differ from the network's by more than"),
    ("torch", 1.1e-4, 0, "logits differ from the network's by more than"),
    ("onnx", np.nan, 0, "logits differ from the network's by more than")])
def test_what_is_not_near_enough_is_refused(to, shift, wrong, error):
    """`shift` is added to all logits, and `wrong` images are given to another class."""
    labels = np.arange(1000) % 4
    logits = np.eye(4)[labels]
    other = logits + shift
    other[:wrong] = np.roll(other[:wrong], 1, axis=1)
    if error:
        with pytest.raises(UserError, match=error):
            export.compare_logits(to, other, logits, labels)
    else:
        accuracy = f"accuracy {100 - wrong / 10:.2f} % on 1,000 test images, of the network itself 100.00 %"
        assert export.compare_logits(to, other, logits, labels).startswith(accuracy)


def test_one_logit_that_is_off_is_too_many():
    logits = np.eye(4)[np.arange(1000) % 4]
    other = logits.copy()
    other[123, 2] += 1.1e-4
    with pytest.raises(UserError, match=r"logits differ by at most 0\.00011"):
        export.compare_logits("onnx", other, logits, np.arange(1000) % 4)


@pytest.mark.parametrize(("to", "maker"), [("torch", "as_torch"), ("onnx", "as_onnx")])
def test_the_file_itself_is_compared_and_not_written_where_refused(shared, exported, tmp_path, monkeypatch, to, maker):
    data = shared(to)[-1].read_bytes()
    monkeypatch.setattr(export, maker, lambda *_: data)
    path = next((tmp_path / "logs" / "runs").iterdir()) / "final.safetensors"
    tensors = load_file(path)
    tensors["head.1.bias"][1] += 2e-4
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if "sha256" not in key}
    save_weights(path, tensors, metadata)
    status, out, err, path = exported(to)
    assert (status, out) == (2, "")
    assert "the exported network's logits differ from the network's by more than" in one_line(err)
    assert not path.exists()


EDITED = """
from model import Net as OurNet


class Net(OurNet):
    def forward(self, images):
        {}
"""
CHOOSING = "return super().forward(images) if images.mean() > 0 else super().forward(-images)"


@pytest.mark.parametrize("to", ["onnx", "torch", "int8"])
def test_a_network_that_cannot_be_exported_is_named(exported, tmp_path, to):
    (tmp_path / "edited.py").write_text(EDITED.format(CHOOSING))
    status, out, err, path = exported(to, "--model", tmp_path / "edited.py")
    assert (status, out) == (2, "")
    assert "the network can't be exported (" in one_line(err)
    assert "symbolically traced variables" in err
    assert "\x1b" not in err
    assert not path.exists()


def test_a_file_that_does_not_load_is_one_line(exported, monkeypatch):
    monkeypatch.setattr(export, "as_onnx", lambda *_: b"\0")
    status, out, err, path = exported("onnx")
    assert (status, out) == (2, "")
    assert "the network can't be exported ([ONNXRuntimeError]" in one_line(err)
    assert not path.exists()


def test_an_average_to_several_pixels_is_no_global_one():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten())
    with pytest.raises(UserError, match="an adaptive average to more than one pixel"), export.exporting("onnx"):
        export.as_onnx(Classifier(net, (0.5,) * 3, (0.5,) * 3), "ab")


def raise_from(error: Exception, cause: Exception):
    raise error from cause


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
    (Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"), "out of memory"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (ValueError("\x1b[31mred\nand more"), "the network can't be exported (red): undo the edits of model.py that made it so; if "
     "there are none, reinstall torch")])
def test_errors_of_the_exporters_say_what_is_wrong(exported, monkeypatch, error, words):
    monkeypatch.setattr(export, "as_torch", lambda *arguments: raise_from(KeyError("the exporter's own"), error))
    status, out, err, path = exported("torch")
    assert (status, out) == (2, "")
    assert words in one_line(err)
    assert not path.exists()


def test_a_full_disk_leaves_nothing(exported, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinycnn.inference.export.export_network", lambda *arguments: (b"content", ""))
    monkeypatch.setattr("tinycnn.runs.files.os.fsync", full)
    status, _, err, path = exported("torch")
    assert status == 2
    assert "model.pt2 could not be written (No space left on device): make room" in one_line(err)
    assert not path.exists()
    assert not list(path.parent.glob(".tmp-*"))


@pytest.mark.parametrize(("content", "words"), [
    (None, "needs the package onnxscript: python -m pip install onnx onnxscript onnxruntime"),
    ("raise TypeError('Descriptors cannot be created directly')",
     "needs onnxscript, which is installed and broken (TypeError: Descriptors cannot be created directly): reinstall it with "),
    ("import onnxscript_part_that_is_gone", "needs the package onnxscript_part_that_is_gone: ")])
def test_a_package_that_is_missing_or_broken_is_named(exported, tmp_path, monkeypatch, content, words):
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxscript"]:
        monkeypatch.delitem(sys.modules, name)
    if content is None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    else:
        (tmp_path / "onnxscript.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    status, _, err, _ = exported("onnx")
    assert status == 2
    assert f"--to onnx {words}" in one_line(err)
