"""Using trained weights: python main.py test and predict."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_program import only_run
from torch import nn

import inference.predict
import main
from config import UserError
from inference.classifier import Classifier
from inference.test import expected_calibration_error, figures, report
from model import Net
from training import weights
from training.decoding import decode
from training.records import read_run
from training.weights import save_weights


@pytest.fixture
def used(run, tmp_path, pictures, capsys):
    """A function that runs a verb on a run of two epochs: used("test", "--flip") -> (status, stdout, stderr)."""
    assert run("--epochs", "2")[0] == 0

    def use(verb: str, *arguments: str):
        capsys.readouterr()
        data = [] if verb == "predict" else ["--data-dir", str(pictures)]
        status = main.main([verb, "--log-dir", str(tmp_path / "logs"), *data, *arguments])
        return status, *capsys.readouterr()

    return use


# ---------------------------------------------------------------- test

def test_the_test_gives_the_figures_of_the_log(used, tmp_path):
    status, out, err = used("test", "--device", "cpu")
    assert (status, err) == (0, "")
    last = read_run(only_run(tmp_path)).rows[-1]
    assert f"accuracy {last['test_acc']:.2f} %, loss {last['test_loss']:.4f}, expected calibration error" in out
    assert "24 test images of folder" in out
    by_class = [float(line.split()[-2]) for line in out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == ["disc", "ring", "square"]
    assert sum(by_class) / 3 == pytest.approx(last["test_acc"], abs=0.01)  # as many of each
    assert "mirrored" not in out
    plain = out
    status, out, err = used("test", str(only_run(tmp_path) / "final.safetensors"), "--flip", "--device", "cpu")
    assert (status, err) == (0, "")
    assert out.startswith(plain.rstrip("\n"))
    assert "with each image also mirrored: accuracy" in out


def test_best_weights_are_tested_on_the_test_images(run, tmp_path, pictures, capsys):
    assert run("--epochs", "2", "--validation", "9")[0] == 0
    best = only_run(tmp_path) / "best.safetensors"
    capsys.readouterr()
    named = f"{best.parent.name}/{best.name}"
    assert main.main(["test", named, "--log-dir", str(tmp_path / "logs"), "--data-dir", str(pictures)]) == 0
    assert "24 test images" in capsys.readouterr().out


def test_figures_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    found = figures(logits, torch.tensor([0, 0, 1, 0]))
    assert found.accuracy == 75
    assert found.by_class == [pytest.approx(200 / 3), 100]
    assert found.loss == pytest.approx((np.log(1 + np.exp(-2)) + np.log(1 + np.exp(-1)) + np.log(1 + np.exp(-3))
                                        + np.log(1 + np.exp(1))) / 4)


@pytest.mark.parametrize(("confidences", "right", "expected"), [
    ([0.9] * 10, [True] * 9 + [False], 0.0),                      # as sure as it may be
    ([0.9] * 10, [True] * 5 + [False] * 5, 0.4),
    ([0.61, 0.99], [True, False], 0.69),                          # (0.39 + 0.99) / 2: bins don't make up for one another
    ([1.0, 1.0], [True, True], 0.0)])
def test_the_calibration_error_by_hand(confidences, right, expected):
    probabilities = torch.tensor([[value, 1 - value] for value in confidences])
    labels = torch.tensor([0 if each else 1 for each in right])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_mirroring_averages_the_logits_of_both():
    class Left(nn.Module):
        """Says 0 where the left half is brighter than the right one."""

        def forward(self, images):
            return torch.stack([images[..., :16].mean((1, 2, 3)), images[..., 16:].mean((1, 2, 3))], 1)

    images = torch.zeros(4, 3, 32, 32)
    images[:2, ..., :16] = 1
    images[2:, ..., 16:] = 3
    labels = torch.tensor([0, 0, 1, 1])

    class Batches:
        def in_order(self, split):
            return iter([(images, labels)])

    text = report(Left(), Batches(), torch.device("cpu"), ("left", "right"), flip=True)
    assert text.startswith("accuracy 100.00 %")
    assert "mirrored: accuracy 50.00 %, loss 0.6931" in text  # both logits alike: the first class for all


# ---------------------------------------------------------------- predict

def variants(folder, pixels):
    """One picture in many guises that should all be read as the same 32 x 32 pixels; bar the big ones."""
    picture, grey = Image.fromarray(pixels), Image.fromarray(pixels).convert("L")
    folder.mkdir()
    picture.save(folder / "plain.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=turned)
    picture.convert("RGBA").transpose(Image.Transpose.ROTATE_90).save(folder / "turned_alpha.png", exif=turned)
    picture.save(folder / "clear_colour.png", transparency=(1, 2, 3))
    picture.save(folder / "two_frames.tiff", save_all=True, append_images=[grey.convert("RGB")])
    grey.save(folder / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "grey16.png")
    grey.convert("P").save(folder / "grey_palette.png")
    grey.save(folder / "grey_animated.gif", save_all=True, append_images=[Image.new("L", (32, 32))])


def test_every_kind_of_file_is_read_as_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    variants(tmp_path / "it", pixels)
    grey = np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, axis=2)
    for path in (tmp_path / "it").iterdir():
        found, resized = decode(str(path))
        assert np.array_equal(found, grey if path.name.startswith("grey") else pixels), path.name
        assert not resized


def test_what_is_transparent_is_white(tmp_path):
    clear = np.zeros((32, 32, 4), dtype=np.uint8)
    clear[:16, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "half.png")
    found, _ = decode(str(tmp_path / "half.png"))
    assert (found[:16] == 0).all()
    assert (found[16:] == 255).all()


@pytest.mark.parametrize("at_once", [5, 256])
def test_predictions_are_the_networks(used, tmp_path, pictures, monkeypatch, at_once):
    monkeypatch.setattr(inference.predict, "AT_ONCE", at_once)
    status, out, err = used("predict", str(pictures / "test"), "--json", "--top", "3", "--device", "cpu")
    assert (status, err) == (0, "")
    found = json.loads(out)
    files = sorted((pictures / "test").rglob("*.png"))
    assert [each["file"] for each in found] == [str(path) for path in files]
    read = weights.read(only_run(tmp_path) / "final.safetensors")
    net = Net(3)
    net.load_state_dict(load_file(read.path))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    normalized = (images / 255 - read.mean) / read.deviation
    with torch.no_grad():
        expected = net.eval()(torch.tensor(normalized, dtype=torch.float32).permute(0, 3, 1, 2)).softmax(1)
    for each, row in zip(found, expected, strict=True):
        assert [part["class"] for part in each["classes"]] == [read.class_names[i] for i in row.argsort(descending=True)]
        assert [part["probability"] for part in each["classes"]] == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-5)
    status, out, _ = used("predict", str(files[0]), "--top", "1", "--device", "cpu")
    best = found[0]["classes"][0]
    assert out == f"{files[0]}: {best['class']} {100 * best['probability']:.1f} %\n"


def test_a_file_that_is_no_image_costs_the_others_nothing(used, tmp_path, monkeypatch):
    monkeypatch.setattr(inference.predict, "AT_ONCE", 4)
    folder = tmp_path / "mixed"
    variants(folder, np.zeros((32, 32, 3), dtype=np.uint8))
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (6000, 4000), "red").save(folder / "large.jpg")
    (folder / "a_text.png").write_text("not an image")
    (folder / "large_cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:5000])
    (folder / "notes.txt").write_text("no image by its name, so not looked at")
    (folder / ".hidden.png").write_text("not looked at")
    Image.fromarray(np.zeros((32, 32), dtype=np.int32)).save(folder / "numbers.tiff")
    status, out, err = used("predict", str(folder))
    assert status == 2
    assert len(out.splitlines()) == len(list(folder.iterdir())) - 5
    notice, error = err.splitlines()
    assert notice == "2 of 15 images had another size and were resized to 32x32"
    assert "a_text.png is not a whole image" in error
    assert error.endswith(", and 2 more of 15 files")
    status, out, err = used("predict", str(folder / "a_text.png"), "--json")
    assert status == 2
    assert json.loads(out) == []
    assert "a_text.png is not a whole image" in one_line(err)


# ---------------------------------------------------------------- what can't be used

def test_wrong_input_is_one_line(used, tmp_path, pictures, capsys):
    def refused(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        status, out, err = used(*arguments)
        assert (status, out) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before
        return one_line(err)

    image = str(next((pictures / "test").rglob("*.png")))
    (tmp_path / "empty").mkdir()
    assert "there is no run 'nothing'" in refused("test", "nothing")
    assert "there is no file nothing.safetensors" in refused("test", "nothing.safetensors")
    assert "there is no file" in refused("predict", str(tmp_path / "nothing.png"))
    assert "holds no image files" in refused("predict", str(tmp_path / "empty"))
    assert "the following arguments are required: IMAGE" in refused("predict")
    assert "top is 0" in refused("predict", image, "--top", "0")
    assert "device is cuda:9" in refused("predict", image, "--device", "cuda:9")
    for verb in (("predict", image), ("test",), ("plot",)):
        assert "device is 'tpu', but must be one of" in refused(*verb, "--device", "tpu")
    assert "is no run: pictures are drawn of a run" in refused("plot", str(only_run(tmp_path) / "final.safetensors"))
    assert "invalid choice: 'pdf'" in refused("export", "--to", "pdf")
    assert "the following arguments are required: --to" in refused("export")
    whole = only_run(tmp_path) / "final.safetensors"
    flipped = bytearray(whole.read_bytes())
    flipped[-1000] ^= 1
    for name, data in (("cut", whole.read_bytes()[:-100]), ("text", b"not weights"), ("empty", b""), ("flipped", flipped)):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        assert "is damaged, or holds no weights of this program" in refused("predict", image, "--run",
                                                                           str(tmp_path / f"{name}.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    assert "holds no weights of this program" in refused("test", str(tmp_path / "foreign.safetensors"))
    about = {"class_names": ["disc", "ring", "square"], "mean": [0.5] * 3, "standard_deviation": [0.5] * 3,
             "config": {"dropout": 0.0}}
    save_weights(tmp_path / "ten.safetensors", Net(10), about)
    assert "does not hold weights of the network in model.py for 3 classes" in refused("predict", image, "--run",
                                                                                     str(tmp_path / "ten.safetensors"))
    for name, wrong in (("grey", {"mean": [0.5]}), ("words", {"mean": ["a", "b", "c"]}), ("bare", {"config": 1}),
                        ("wide", {"config": {"width": "2"}})):
        save_weights(tmp_path / f"{name}.safetensors", Net(3), about | wrong)
        assert "holds no weights of this program" in refused("predict", image, "--run", str(tmp_path / f"{name}.safetensors"))
    broken = Net(3)
    broken.head[1].bias.data[0] = float("nan")
    save_weights(tmp_path / "nan.safetensors", broken, about)
    assert "not all its weights are finite" in refused("predict", image, "--run", str(tmp_path / "nan.safetensors"))
    save_weights(tmp_path / "other.safetensors", nn.Linear(2, 2), about)
    assert "does not hold weights of the network" in refused("predict", image, "--run", str(tmp_path / "other.safetensors"))
    capsys.readouterr()
    assert main.main(["test", "--log-dir", str(tmp_path / "nowhere")]) == 2
    assert "there is no finished run in" in one_line(capsys.readouterr().err)


def test_weights_from_before_fingerprints_are_known_by_their_statistics(used, tmp_path, pictures):
    from training.images import load

    found = weights.read(only_run(tmp_path) / "final.safetensors")
    images = load("folder", str(pictures))
    older = dataclasses.replace(found, fingerprint=None)
    assert found.trained_on(images)
    assert older.trained_on(images)
    assert not dataclasses.replace(older, mean=(0.1, 0.2, 0.3)).trained_on(images)


def test_a_run_is_used_that_had_a_setting_which_there_no_longer_is(used, tmp_path):
    path = only_run(tmp_path) / "final.safetensors"
    before = used("test", str(path), "--device", "cpu")
    with safe_open(path, "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items() if key != "sha256"}
    about["config"]["deleted_since"] = 0.5
    net = Net(3)
    net.load_state_dict(load_file(path))
    save_weights(path, net, about)
    assert weights.read(path).config["deleted_since"] == 0.5
    assert used("test", str(path), "--device", "cpu") == before
    assert before[0] == 0


def test_an_unfinished_run_is_not_used(used, tmp_path):
    folder = only_run(tmp_path)
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match="is no finished run"):
        weights.find(tmp_path / "logs", folder.name)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="there is no finished run"):
        weights.find(tmp_path / "logs", None)


def test_the_classifier_normalizes_as_the_policy_does():
    from training.augment import test_policy

    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    mean, deviation = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    made = Classifier(nn.Identity(), mean, deviation)(torch.from_numpy(images))
    policy = test_policy(mean, deviation)
    expected = np.stack([policy(image=image)["image"] for image in images]).transpose(0, 3, 1, 2)
    assert made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), expected, atol=2e-6)


def test_predicting_does_not_load_what_only_training_needs():
    code = "import sys, inference.verbs; sys.exit('albumentations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
