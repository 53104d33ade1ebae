"""The trained networks by torch.hub, in programs that have modules of the same names."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REFERENCE, ROOT
from learned_run import copy_learned_run
from PIL import Image

NAMES = ("config", "model", "augmentation", "main", "runs", "tinycnn", "tinycnn.runs")


def load(**arguments):
    return torch.hub.load(str(ROOT), "tiny_cifar10", source="local", **arguments)


def modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in NAMES}


def test_the_module_gives_what_predict_gives(command, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        for name in NAMES:
            context.setitem(sys.modules, name, ModuleType(name))
        before, path = modules(), list(sys.path)
        net = load(weights="best")
        assert modules() == before
        assert sys.path == path
        for name in [*before]:
            context.delitem(sys.modules, name)
        load(weights="best")
        assert not modules()  # so that a program's own config can still be loaded
    rng = np.random.default_rng(0)
    wide, small = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((2, 50, 70, 3), (2, 32, 32, 3)))
    assert isinstance(net, torch.nn.Module)
    assert not net.training
    for batch in (wide, small):
        files = [tmp_path / f"{batch.shape[1]}-{number}.png" for number in range(2)]
        for file, image in zip(files, batch, strict=True):
            Image.fromarray(image).save(file)
        _, out, _ = command("predict", *files, "--json", "--top", "10", "--run", REFERENCE / "best" / "seed-0")
        logits = net(batch)
        assert (logits.dtype, logits.shape) == (torch.float32, (2, 10))
        for row, each in zip(logits.softmax(1), json.loads(out), strict=True):
            assert [part["class"] for part in each["classes"]] == [net.classes[i] for i in row.argsort(descending=True)]
            found = [part["probability"] for part in each["classes"]]
            assert found == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-6)
        assert torch.allclose(net(torch.from_numpy(batch)), logits)
        assert torch.allclose(net(batch[1]), logits[1:], atol=1e-5)
        assert torch.allclose(net(Image.fromarray(batch[1])), logits[1:], atol=1e-5)


def test_what_is_no_image_is_refused():
    net = load(weights="baseline")
    for wrong in (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8)):
        with pytest.raises(ValueError, match="images must be uint8, N x H x W x 3 or H x W x 3, not"):
            net(wrong)
    with pytest.raises(ValueError, match="weights is 'nothing', but must be one of baseline, best, "):
        load(weights="nothing")


def test_a_run_of_ones_own_is_loaded_by_its_path(tmp_path):
    folder = copy_learned_run(tmp_path)
    assert load(weights=str(folder)).classes == ("disc", "ring", "square")
    edited = (ROOT / "model.py").read_text().replace("nn.ReLU(),", "nn.LeakyReLU(0.5),")
    (tmp_path / "edited.py").write_text(edited)
    black = np.zeros((32, 32, 3), np.uint8)
    other = load(weights=str(folder), model_file=str(tmp_path / "edited.py"))
    assert not torch.equal(other(black), load(weights=str(folder))(black))
