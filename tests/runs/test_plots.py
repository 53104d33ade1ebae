"""The pictures of a run: that they come, and show what they should; each was looked at by a person."""

import dataclasses
import errno
import itertools
import math
import os

import albumentations as A
import numpy as np
import pytest
from conftest import REFERENCE, one_line, only_run, synthetic
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from augmentation import train_policy
from config import Config, UserError
from tinycnn.data.dataset import Images, Split
from tinycnn.runs import files, plots
from tinycnn.runs.record import Run, read_run

NAMES = {"accuracy.png", "confusion_matrix.png", "mistakes.png", "augmentation.png", "receptive_field.png"}
STAGES = {"first": 3, "second": 7, "third": 31, "last": 79}


def words(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts, other than those of ticks, that lie on one another by more than a pixel."""
    figure.draw_without_rendering()
    ticks = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
             for text in tick.findobj(Text)}
    boxes = {text: Text.get_window_extent(text).padded(-1) for text in figure.findobj(Text)
             if text.get_text() and text not in ticks}
    return [(one.get_text(), other.get_text()) for one, other in itertools.combinations(boxes, 2)
            if boxes[one].overlaps(boxes[other])]


def made_up(classes: tuple[str, ...]) -> tuple[Images, A.Compose, np.ndarray]:
    """Drawn images with the names of these classes, a policy, and probabilities that are wrong for a third of them."""
    images, count = synthetic(), 40
    labels = np.arange(count) % len(classes)
    train, test = Split(images.train.images[:count], labels), Split(images.test.images[:count], labels)
    probabilities = np.full((count, len(classes)), 0.5 / len(classes))
    probabilities[np.arange(count), (labels + (np.arange(count) % 3 == 0)) % len(classes)] += 0.5
    mean, std = images.statistics
    images = dataclasses.replace(images, class_names=classes, train=train, test=test)
    return images, train_policy(Config(), mean, std), probabilities


def reference_run(folder) -> Run:
    folder.mkdir()
    return dataclasses.replace(read_run(REFERENCE), folder=folder)


def test_a_run_ends_with_its_pictures_and_plot_draws_them_again(run, command, tmp_path):
    status, out, _ = run("--epochs", "1", "--pictures")
    assert status == 0
    assert "Pictures: accuracy.png, confusion_matrix.png" in out
    folder = only_run(tmp_path)
    assert {path.name for path in folder.glob("*.png")} == NAMES
    first = {}
    for path in folder.glob("*.png"):
        picture = Image.open(path)
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) >= 300
        assert len(picture.convert("RGB").getcolors(pixels.size)) > 20
        first[path.name] = pixels
        path.unlink()
    assert command("plot", "--log-dir", tmp_path / "logs", "--device", "cpu")[0] == 0
    for name, pixels in first.items():
        assert np.array_equal(pixels, np.asarray(Image.open(folder / name).convert("RGB"))), name


def test_a_run_without_pictures_has_none(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    assert not list(only_run(tmp_path).glob("*.png"))


def test_what_cannot_be_plotted_is_one_line(run, command, tmp_path, pictures):
    def plot(*arguments: object) -> str:
        status, _, err = command("plot", "--log-dir", tmp_path / "logs", *arguments)
        assert status == 2
        return one_line(err)

    assert "there is no finished run" in plot()
    assert run("--epochs", "1")[0] == 0
    folder = only_run(tmp_path)
    assert "there is no run 'nothing'" in plot("nothing")
    assert "nowhere: name the folder that holds them with --data-dir" in plot("--data-dir", tmp_path / "nowhere")
    other = tmp_path / "other"
    for source in pictures.rglob("*.png"):
        target = other / source.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).rotate(90).save(target)
    assert "was trained on: name their folder" in plot("--data-dir", other)
    (folder.parent / "9999-holiday").mkdir()  # newest by its name, and no run
    assert "was trained on: name their folder" in plot("--data-dir", other)
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(whole[:100])
    assert "config.json" in plot("--data-dir", pictures)
    (folder / "config.json").write_text(whole)
    weights = folder / "final.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is damaged, or holds no weights" in plot("--data-dir", pictures)
    (folder / "summary.json").unlink()
    assert "is not finished" in plot(folder.name)


def test_the_confusion_matrix_counts(tmp_path, saved):
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    plots.draw_confusion_matrix(labels, predicted, ("cat", "dog", "frog"), tmp_path / "it.png")
    assert {"66.7", "100.0", "0.0", "all: 66.67 %", "cat", "dog", "frog"} <= words(saved[0])
    left = saved[0].axes[0]
    cells = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in left.texts}
    assert cells == {(0, 0): "2", (0, 1): "1", (1, 1): "2", (2, 0): "1"}  # (true, predicted)


def test_rare_mistakes_can_be_told_apart_in_the_confusion_matrix(tmp_path, saved):
    """Of a class that is right in 94 % of cases: no, 1 %, 2 % and 3 % mistakes have colours that differ."""
    predicted = np.repeat([0, 1, 2, 3], [94, 1, 2, 3])
    plots.draw_confusion_matrix(np.zeros(100, dtype=int), predicted, ("a", "b", "c", "d", "e"), tmp_path / "it.png")
    mistaken = saved[0].axes[0].images[0]
    colours = mistaken.to_rgba(mistaken.get_array())[0, 1:, :3]
    assert all(abs(one - other).sum() > 0.3 for one, other in itertools.combinations(colours, 2))


@pytest.mark.parametrize(("classes", "numbers"), [(20, 40), (21, 0)])
def test_a_confusion_matrix_of_many_classes_has_no_numbers(classes, numbers, tmp_path, saved):
    labels = np.arange(40 * classes) % classes
    predicted = np.where(np.arange(40 * classes) < classes, 0, labels)
    plots.draw_confusion_matrix(labels, predicted, [f"class {number}" for number in range(classes)], tmp_path / "it.png")
    left, right, *scale = saved[0].axes
    assert len(left.texts) == max(numbers - 1, 0)  # a class is never mistaken for the first but by the others
    assert len(right.texts) == (classes if numbers else 0)
    assert bool(scale) is not bool(numbers)
    assert f"class {classes - 1}" in words(saved[0])


def test_mistakes_are_the_most_confident_wrong_ones(tmp_path, saved):
    test = Split(synthetic().test.images[:50], np.zeros(50, dtype=np.int64))
    probabilities = np.tile([0.6, 0.4], (50, 1))
    probabilities[:40] = [[1 - p, p] for p in np.linspace(0.501, 0.9, 40)]
    plots.draw_mistakes(test, probabilities, ("cat", "dog"), tmp_path / "it.png")
    drawn = words(saved[0])
    assert {"predicted dog\nwith 90.0 %", "is cat",
            "The 36 wrong predictions made with most confidence, of 40 wrong ones"} <= drawn
    assert "predicted dog\nwith 50.1 %" not in drawn
    assert not any(text.startswith("predicted cat") for text in drawn)
    (picture,) = saved[0].axes[0].images
    assert np.array_equal(picture.get_array()[:32, :32], test.images[39])  # the most confident one comes first
    plots.draw_mistakes(test, probabilities[:, ::-1] * 0 + [0.9, 0.1], ("cat", "dog"), tmp_path / "none.png")
    assert "The 0 wrong predictions made with most confidence, of 0 wrong ones" in words(saved[1])


def test_augmentation_names_the_classes(tmp_path, saved):
    images, policy, _ = made_up(tuple(f"kind {number}" for number in range(12)))
    plots.draw_augmentation(images.train, policy, images.class_names, tmp_path / "it.png", columns=4)
    assert {"original", "kind 0", "kind 9",
            "A training image of 10 of the 12 classes, and 4 augmented copies of it"} <= words(saved[0])
    assert "kind 10" not in words(saved[0])
    pixels = saved[0].axes[0].images[0].get_array()
    first = images.train.images[0]
    assert np.array_equal(pixels[:32, :32], first)
    assert not all(np.array_equal(pixels[:32, x:x + 32], first) for x in (35, 70, 105, 140))


@pytest.mark.parametrize("side", [24, 40])
def test_augmentation_may_change_the_size(tmp_path, saved, side):
    images, _, _ = made_up(("cat", "dog"))
    plots.draw_augmentation(images.train, A.Compose([A.Resize(side, side)]), images.class_names, tmp_path / "it.png", columns=2)
    (axes,) = saved[0].axes
    pixels, largest = axes.images[0].get_array(), max(side, 32)
    margins = [(largest - each) // 2 for each in (32, side)]
    assert pixels.shape == (2 * largest + 3, 3 * largest + 6, 3)
    assert [patch.get_xy() for patch in axes.patches] == [(margins[0], margins[0]), (margins[0], margins[0] + largest + 3)]
    assert np.array_equal(pixels[margins[0]:, margins[0]:][:32, :32], images.train.images[0])
    resized = A.Resize(side, side)(image=images.train.images[0])["image"]
    assert np.array_equal(pixels[margins[1]:, largest + 3 + margins[1]:][:side, :side], resized)


def test_curves_show_a_validation_too(tmp_path, saved, run):
    assert run("--epochs", "2", "--validation", "9", "--pictures")[0] == 0
    drawn = words(saved[0])
    assert {"accuracy, %", "loss, nats per image", "learning rate", "epoch"} <= drawn
    final = read_run(only_run(tmp_path)).rows[-1]
    assert {f"validation {final['val_acc']:.2f}", f"test {final['test_loss']:.2f}",
            f"training {final['train_acc']:.2f}"} <= drawn


@pytest.mark.parametrize("epochs", [1, 2, 80])
def test_curves_are_labelled_at_their_ends(epochs, tmp_path, saved):
    run = reference_run(tmp_path / "it")
    rows = [row | {"val_acc": row["test_acc"] + 0.01, "val_loss": row["test_loss"]} for row in run.rows[:epochs]]
    plots.draw_accuracy(dataclasses.replace(run, rows=rows), tmp_path / "it.png")
    upper, middle, lower = saved[0].axes
    for axes, metric in ((upper, "acc"), (middle, "loss")):
        ends = {text.get_text(): text.xy for text in axes.texts}
        assert ends == {f"{name} {rows[-1][f'{split}_{metric}']:.2f}": (epochs - 1, rows[-1][f"{split}_{metric}"])
                        for split, name in (("train", "training"), ("val", "validation"), ("test", "test"))}
    assert not overlapping(saved[0])
    assert all(tick == round(tick) for tick in lower.get_xticks())


def test_receptive_fields_are_drawn_to_size(tmp_path, saved):
    plots.draw_receptive_field(synthetic().test.images[0], STAGES, tmp_path / "it.png")
    (axes,) = saved[0].axes
    assert {"first: 3 x 3", "last: 79 x 79", "padding"} <= words(saved[0])
    padding, *squares = axes.patches
    assert [(square.get_x() + square.get_width() / 2, square.get_width()) for square in squares] == [
        (16, field) for field in STAGES.values()]
    assert padding.get_hatch()
    left, right = axes.get_xlim()
    assert left <= 16 - 79 / 2
    assert right >= 16 + 79 / 2
    assert not overlapping(saved[0])


def test_receptive_fields_within_the_image_have_no_padding_and_huge_ones_leave_it_large(tmp_path, saved):
    image = synthetic().test.images[0]
    plots.draw_receptive_field(image, {"first": 3}, tmp_path / "it.png")
    assert "padding" not in words(saved[0])
    plots.draw_receptive_field(image, {"first": 3, "last": 427}, tmp_path / "it.png")
    assert "last: 427 x 427, beyond the picture" in words(saved[1])
    left, right = saved[1].axes[0].get_xlim()
    assert right - left < 100


ODD_NAMES = ("$cat$", "$x_{", "猫\U0001f9f6", os.fsdecode(b"b\xff"), "two\nlines", "\x1b[31m", "%d {} \\frac",
             "a name of more than twenty-four letters, and then some")


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_plain_text(tmp_path, saved, capfd):
    images, policy, probabilities = made_up(ODD_NAMES)
    run = reference_run(tmp_path / "2026-01-01-$\\frac{猫")
    run.record["dataset"]["kind"] = "folder"
    assert set(plots.draw_all(run, images, policy, probabilities, {"$a$": 3})) == NAMES
    assert {path.name for path in run.folder.iterdir()} == NAMES
    assert capfd.readouterr() == ("", "")
    accuracy, matrix, mistakes, augmentation, field = map(words, saved)
    names = {"$cat$", "$x_{", "b\\xff", "two\\nlines", "\\x1b[31m", "%d {} \\frac"}
    assert names <= matrix
    assert names <= augmentation
    assert {f"is {name}" for name in names} <= mistakes
    assert any(text.startswith("2026-01-01-$\\frac{") for text in accuracy)
    assert "$a$: 3 x 3" in field
    assert not any(text.get_parse_math() for figure in saved for text in figure.findobj(Text) if "$" in text.get_text())


def test_a_full_disk_names_the_picture_and_leaves_the_old_one(tmp_path, monkeypatch):
    images, policy, probabilities = made_up(("cat", "dog"))
    run = reference_run(tmp_path / "it")
    (run.folder / "mistakes.png").write_bytes(b"old")
    real = os.replace

    def full(source, target):
        if str(target).endswith("mistakes.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"mistakes\.png could not be written \(No space left on device\)"):
        plots.draw_all(run, images, policy, probabilities, STAGES)
    assert (run.folder / "mistakes.png").read_bytes() == b"old"
    assert {path.name for path in run.folder.iterdir()} == {"accuracy.png", "confusion_matrix.png", "mistakes.png"}


def test_the_texts_of_mistakes_and_augmentation_keep_apart(tmp_path, saved):
    images, policy, probabilities = made_up(("an automobile", "a name of more than twenty-four letters", "猫" * 20))
    plots.draw_mistakes(images.test, probabilities, images.class_names, tmp_path / "it.png")
    plots.draw_augmentation(images.train, policy, images.class_names, tmp_path / "it.png")
    assert not overlapping(saved[0])
    assert not overlapping(saved[1])


def test_a_diverged_loss_leaves_a_gap(tmp_path, saved):
    run = reference_run(tmp_path / "it")
    rows = [*run.rows[:3], run.rows[3] | {"train_loss": math.nan, "test_loss": math.inf}]
    plots.draw_accuracy(dataclasses.replace(run, rows=rows), tmp_path / "it.png")
    assert f"training {rows[2]['train_loss']:.2f}" in words(saved[0])
