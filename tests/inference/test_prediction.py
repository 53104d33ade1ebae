"""python main.py predict: files in, classes out."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import one_line
from learned_run import CHANCE, copy_learned_run, learned_run
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file
from torch import nn

from augmentation import test_policy as make_test_policy
from config import UserError
from model import Net
from tinycnn.data import decoding
from tinycnn.data.decoding import decode
from tinycnn.inference import prediction
from tinycnn.inference.classifier import Classifier
from tinycnn.inference.prediction import FORMATS, as_json, as_text, image_files, predict_files
from tinycnn.runs.weights import read_weights

CPU = torch.device("cpu")


def classifier() -> Classifier:
    """A network of two classes that has seen nothing."""
    return Classifier(Net(2), (0.5,) * 3, (0.25,) * 3)


def guises(folder, pixels) -> None:
    """One picture in many guises that should all be read as the same 32 x 32 pixels."""
    picture, grey = Image.fromarray(pixels), Image.fromarray(pixels).convert("L")
    folder.mkdir()
    picture.save(folder / "plain.png")
    picture.save(folder / "plain.bmp")
    picture.save(folder / "plain.webp", lossless=True)
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
    guises(tmp_path / "it", pixels)
    grey = np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, axis=2)
    for path in (tmp_path / "it").iterdir():
        found, resized = decode(str(path), FORMATS)
        assert np.array_equal(found, grey if path.name.startswith("grey") else pixels), path.name
        assert not resized


@pytest.mark.parametrize("batch_size", [7, 256])
def test_predictions_are_the_networks(command, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(prediction, "BATCH_SIZE", batch_size)
    run, folder = copy_learned_run(tmp_path), learned_run() / "pictures" / "test"
    line = ("--run", run, "--device", "cpu")
    status, out, err = command("predict", folder, "--json", "--top", "3", *line)
    assert (status, err) == (0, "")
    predicted = json.loads(out)
    files = sorted(folder.rglob("*.png"))
    assert [each["file"] for each in predicted] == [str(path) for path in files]
    weights = read_weights(run / "final.safetensors")
    net = Net(3)
    net.load_state_dict(load_file(weights.path))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    normalized = (images / 255 - weights.mean) / weights.std
    with torch.no_grad():
        expected = net.eval()(torch.tensor(normalized, dtype=torch.float32).permute(0, 3, 1, 2)).softmax(1)
    for each, row in zip(predicted, expected, strict=True):
        assert [part["class"] for part in each["classes"]] == [weights.class_names[i] for i in row.argsort(descending=True)]
        assert [part["probability"] for part in each["classes"]] == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-5)
    right = np.mean([each["classes"][0]["class"] == path.parent.name for each, path in zip(predicted, files, strict=True)])
    assert 100 * right > CHANCE + 15
    status, out, _ = command("predict", files[0], "--top", "1", *line)
    best = predicted[0]["classes"][0]
    assert out == f"{files[0]}: {best['class']} {100 * best['probability']:.1f} %\n"


def test_a_file_that_is_no_image_costs_the_others_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "BATCH_SIZE", 4)
    run, folder = copy_learned_run(tmp_path), tmp_path / "mixed"
    guises(folder, np.zeros((32, 32, 3), dtype=np.uint8))
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (6000, 4000), "red").save(folder / "large.jpg")
    (folder / "a_text.png").write_text("not an image")
    (folder / "large_cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:5000])
    (folder / ".hidden.png").write_text("not looked at")
    Image.fromarray(np.zeros((32, 32), dtype=np.int32)).save(folder / "numbers.tiff")
    status, out, err = command("predict", folder, "--run", run)
    assert status == 2
    assert len(out.splitlines()) == len(list(folder.iterdir())) - 4
    notice, error = err.splitlines()
    assert notice == "2 of 17 images had another size and were resized to 32x32"
    assert "a_text.png is not a whole image" in error
    assert all(name in error for name in ("a_text.png", "large_cut.jpg", "numbers.tiff"))
    assert error.count(": replace or remove it") == 1
    monkeypatch.setattr(decoding, "LISTED_ERRORS", 1)
    assert command("predict", folder, "--run", run)[2].endswith(", and 2 more of 17 files: replace or remove it\n")
    status, out, err = command("predict", folder / "a_text.png", "--json", "--run", run)
    assert status == 2
    assert json.loads(out) == []
    assert "a_text.png is not a whole image" in one_line(err)


def test_what_a_folder_holds_beside_images_is_told(command, tmp_path):
    run, folder = copy_learned_run(tmp_path), tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "below" / "a.png")
    for suffix in ("jpg", "JPEG", "jpe", "jfif", "jfi", "jif"):
        Image.new("RGB", (32, 32)).save(folder / f"b.{suffix}", "JPEG")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c.png").write_text("not looked at")
    status, out, err = command("predict", folder, "--run", run)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 7
    (folder / "notes.txt").write_text("no image by its name")
    (folder / "link").symlink_to(folder)
    status, out, err = command("predict", folder, "--run", run)
    assert status == 0
    assert len(out.splitlines()) == 7
    assert f"left out 2 entries of the folders, such as {folder / 'link'}: " in one_line(err)


def test_a_path_that_is_missing_costs_the_others_nothing(command, tmp_path):
    run, image = copy_learned_run(tmp_path), learned_run() / "pictures" / "test" / "disc" / "0.png"
    missing, empty = tmp_path / "no\x1bthing.png", tmp_path / "empty"
    empty.mkdir()
    status, out, err = command("predict", missing, empty, image, "--run", run)
    assert status == 2
    assert out.startswith(f"{image}: ")
    assert out.count("\n") == 1
    assert one_line(err) == f"error: there is no file {tmp_path}/no\\x1bthing.png; {empty} holds no image files\n"
    status, out, err = command("predict", missing, image, "--json", "--run", run)
    assert (status, [each["file"] for each in json.loads(out)]) == (2, [str(image)])


def test_formats_that_start_programs_and_files_that_are_none_are_refused(tmp_path, monkeypatch):
    """Pillow knows an EPS file by its content, whatever its name, and hands it to Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **others: started.append(arguments))
    Image.new("RGB", (32, 32)).save(tmp_path / "0.eps")
    (tmp_path / "0.eps").rename(tmp_path / "0.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.ppm")
    os.mkfifo(tmp_path / "2.png")
    files = image_files([str(tmp_path / name) for name in ("0.png", "1.ppm", "2.png")])
    errors = [str(result) for _, result in predict_files(files, classifier(), ["a", "b"], CPU)]
    assert not started
    assert ["is not a whole image" in error for error in errors[:2]] == [True, True]
    assert "is not a regular file" in errors[2]


def test_names_are_escaped_for_a_terminal_and_exact_for_programs(tmp_path):
    path = tmp_path / "a\x1b[31m\nb\udcff.png"
    Image.new("RGB", (32, 32)).save(path)
    ((found, predicted),) = predict_files(image_files([str(tmp_path)]), classifier(), ["x\x07", "y"], CPU)
    assert found == path
    assert not isinstance(predicted, UserError)
    line = as_text(found, predicted, 2)
    assert line.isprintable()
    assert f"{tmp_path}/a\\x1b[31m\\nb\\xff.png: " in line
    assert "x\\x07 " in line
    (each,) = json.loads(as_json([(found, predicted)], 1))
    assert each["file"] == str(path)


def test_exhausted_memory_is_not_taken_for_a_damaged_image(command, tmp_path, monkeypatch):
    run, image = copy_learned_run(tmp_path), learned_run() / "pictures" / "test" / "disc" / "0.png"

    def exhausted(*arguments):
        raise MemoryError

    monkeypatch.setattr("tinycnn.data.decoding.decode", exhausted)
    status, out, err = command("predict", image, "--run", run)
    assert (status, out) == (2, "")
    assert "out of memory" in one_line(err)


def test_the_classifier_normalizes_as_the_policy_does():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    normalized = Classifier(nn.Identity(), mean, std)(torch.from_numpy(images))
    policy = make_test_policy(mean, std)
    expected = np.stack([policy(image=image)["image"] for image in images]).transpose(0, 3, 1, 2)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy(), expected, atol=2e-6)
