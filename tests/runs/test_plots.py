"""The pictures of a run: that they come, and show what they should; each was looked at by a person."""

import dataclasses
import itertools
import math
import os

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import REFERENCE, one_line, only_run, synthetic
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from augmentation import train_policy
from config import Config
from model import Net
from tinycnn.data.dataset import Dataset, Split
from tinycnn.inference.loading import Trained
from tinycnn.inference.pictures import draw_pictures
from tinycnn.runs import plots
from tinycnn.runs.drawing import drawing, save
from tinycnn.runs.record import SavedRun, read_run
from tinycnn.runs.weights import Weights

NAMES = {"accuracy.png", "confusion_matrix.png", "mistakes.png", "augmentation.png", "receptive_field.png", "filters.png"}


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


def made_up(classes: tuple[str, ...]) -> tuple[Dataset, A.Compose]:
    """Drawn images with the names of these classes, and a policy."""
    images, labels = synthetic(), np.arange(40) % len(classes)
    train, test = Split(images.train.images[:40], labels), Split(images.test.images[:40], labels)
    policy = train_policy(Config(), 0, *images.statistics)
    return dataclasses.replace(images, class_names=classes, train=train, test=test), policy


def reference_run(folder) -> SavedRun:
    folder.mkdir()
    return dataclasses.replace(read_run(REFERENCE), folder=folder)


def test_a_run_ends_with_its_pictures_and_plot_draws_them_again(run, command, tmp_path):
    status, out, err = run("--epochs", "1", "--pictures")
    assert (status, err) == (0, "")
    assert "Pictures: accuracy.png, confusion_matrix.png" in out
    folder = only_run(tmp_path)
    assert {path.name for path in folder.glob("*.png")} == NAMES
    first = {}
    for path in folder.glob("*.png"):
        picture = Image.open(path)
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        first[path.name] = np.asarray(picture.convert("RGB"))
        assert min(first[path.name].shape[:2]) >= 300
        assert len(picture.convert("RGB").getcolors(first[path.name].size)) > 20
        path.unlink()
    assert command("plot", "--log-dir", tmp_path / "logs", "--device", "cpu")[0] == 0
    for name, pixels in first.items():
        assert np.array_equal(pixels, np.asarray(Image.open(folder / name).convert("RGB"))), name


def test_pictures_that_cannot_be_drawn_are_lines_and_the_run_is_finished(run, tmp_path, monkeypatch):
    def fail(*arguments: object) -> Figure:
        raise RuntimeError("no LaTeX")

    monkeypatch.setattr(plots, "accuracy", fail)
    status, out, err = run("--epochs", "1", "--pictures")
    assert status == 0
    assert one_line(err).endswith("accuracy.png could not be drawn (no LaTeX)\n")
    assert "Next: python main.py" in out
    assert {path.name for path in only_run(tmp_path).glob("*.png")} == NAMES - {"accuracy.png"}


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
    assert "holds weights, but pictures are drawn of a run" in plot(folder / "final.safetensors")
    assert "nowhere: name the folder that holds them with --data-dir" in plot("--data-dir", tmp_path / "nowhere")
    other = tmp_path / "other"
    for source in pictures.rglob("*.png"):
        target = other / source.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).rotate(90).save(target)
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


def test_the_confusion_matrix_counts():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    figure = plots.confusion_matrix(labels, predicted, ("cat", "dog", "frog"))
    assert {"Test images: 66.67 % right (blue); mistakes in orange", "cat", "cat  66.7 %", "dog  100.0 %", "frog  0.0 %"
            } <= words(figure)
    cells = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in figure.axes[0].texts}
    assert cells == {(0, 0): "2", (0, 1): "1", (1, 1): "2", (2, 0): "1"}  # (true, predicted)


def test_rare_mistakes_can_be_told_apart_in_the_confusion_matrix():
    """Of a class that is right in 94 % of cases: no, 1 %, 2 % and 3 % mistakes have colours that differ."""
    predicted = np.repeat([0, 1, 2, 3], [94, 1, 2, 3])
    figure = plots.confusion_matrix(np.zeros(100, dtype=int), predicted, ("a", "b", "c", "d", "e"))
    mistaken = figure.axes[0].images[0]
    colours = mistaken.to_rgba(mistaken.get_array())[0, 1:, :3]
    assert all(abs(one - other).sum() > 0.3 for one, other in itertools.combinations(colours, 2))


@pytest.mark.parametrize(("classes", "numbers"), [(20, 20), (21, 0)])
def test_a_confusion_matrix_of_many_classes_has_a_scale_instead_of_numbers(classes, numbers):
    labels = np.arange(2 * classes) % classes
    axes, *scale = plots.confusion_matrix(labels, labels, [f"class {number}" for number in range(classes)]).axes
    assert len(axes.texts) == numbers
    assert bool(scale) is not bool(numbers)


def test_mistakes_are_grouped_by_confused_pair():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1], [0.1, 0.0, 0.9], [0.7, 0.2, 0.1]])
    labels = np.array([1, 1, 1, 0, 1])
    pairs = plots.confused_pairs(labels, probabilities)
    assert pairs == [[2, 4, 0], [3]]  # two pairs; the more frequent first, its most confident image first
    assert plots.drawn_mistakes([[*range(10)]] * 12) == [0, 1, 2, 3] * 9
    test = Split(synthetic().test.images[:5], labels)
    maps = {index: np.arange(12.0).reshape(3, 2, 2) + index for index in (2, 4, 0, 3)}
    figure = plots.mistakes(test, probabilities, ("cat", "dog", "frog"), pairs, maps)
    assert {"dog taken for cat: 3", "cat taken for frog: 1", "image 2", "cat\n80.0 %", "dog\n10.0 %"} <= words(figure)
    assert "image 1" not in words(figure)
    image, _, of_predicted, _, of_true = figure.axes[0].images[:5]  # each map lies on a grey image
    assert np.array_equal(image.get_array(), test.images[2])
    assert np.array_equal(of_predicted.get_array(), maps[2][0])
    assert np.array_equal(of_true.get_array(), maps[2][1])
    assert len(plots.mistakes(test, probabilities, ("cat", "dog", "frog"), pairs, {}).axes[0].images) == 4
    assert any(text.startswith("0 mistakes") for text in words(plots.mistakes(test, probabilities, ("a", "b", "c"), [], {})))


def test_pictures_of_another_head_have_no_maps_and_say_why(tmp_path, capsys):
    images, _ = made_up(("cat", "dog"))
    run = reference_run(tmp_path / "it")
    for name in ("config.json", "model_accuracy.log"):
        (run.folder / name).write_bytes((REFERENCE / name).read_bytes())
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))

    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch):
            return self.net(batch[:, :1])

    mean, std = images.statistics
    weights = Weights(run.folder / "final.safetensors", {}, images.class_names, mean, std, {}, None, None, "")
    draw_pictures(Trained(weights, Grey(), images, Config(batches="device"), torch.device("cpu")))
    out, err = capsys.readouterr()
    assert {path.name for path in run.folder.glob("*.png")} == NAMES - {"filters.png"}
    assert "mistakes.png" in out
    first, second = err.splitlines()
    assert first.startswith("mistakes.png has no activation maps: the network has no class activation maps")
    assert second == "it/filters.png could not be drawn (the network has no convolution of 3 channels)"


@pytest.mark.parametrize("side", [24, 32, 40])
def test_augmentation_shows_copies_of_any_size(side):
    images, _ = made_up(tuple(f"kind {number}" for number in range(12)))
    policy = A.Compose([A.Resize(side, side), A.InvertImg(p=1.0), A.Normalize()])
    figure = plots.augmentation(images.train, policy, images.class_names, columns=2)
    assert {"original", "kind 0", "kind 9", "A training image of 10 of the 12 classes, and 2 augmented copies of it"
            } <= words(figure)
    original, copy = (image.get_array() for image in figure.axes[0].images[:2])
    assert np.array_equal(original, images.train.images[0])
    assert np.array_equal(copy, 255 - A.Resize(side, side)(image=images.train.images[0])["image"])
    extents = [image.get_extent() for image in figure.axes[0].images]  # left, right, bottom, top
    assert all(one[1] < other[0] or one[2] < other[3] for one, other in itertools.pairwise(extents))


@pytest.mark.parametrize("epochs", [1, 2, 80])
def test_curves_are_labelled_at_their_ends(epochs, tmp_path):
    run, reference = reference_run(tmp_path / "it"), read_run(REFERENCE)
    rows = [row | {"val_acc": row["test_acc"] + 0.01, "val_loss": row["test_loss"]} for row in run.rows[:epochs]]
    figure = plots.accuracy(dataclasses.replace(run, rows=rows), reference)
    upper, middle, lower = figure.axes
    lines = {"training": "train", "validation": "val", "test": "test", "reference, test": "test"}
    for axes, metric in ((upper, "acc"), (middle, "loss")):
        ends = {text.get_text(): text.xy for text in axes.texts}
        last = {name: rows[-1][f"{split}_{metric}"] for name, split in lines.items()}
        assert ends == {f"{name} {value:.2f}": (epochs - 1, value) for name, value in last.items()}
    with drawing("it"):
        assert not overlapping(figure)
    assert all(tick == round(tick) for tick in lower.get_xticks())


def test_a_shorter_reference_and_a_diverged_loss(tmp_path):
    run, reference = reference_run(tmp_path / "it"), read_run(REFERENCE)
    rows = [*run.rows[:3], run.rows[3] | {"train_loss": math.nan, "test_loss": math.inf}]
    drawn = words(plots.accuracy(dataclasses.replace(run, rows=rows), dataclasses.replace(reference, rows=reference.rows[:2])))
    assert {f"training {rows[2]['train_loss']:.2f}", f"reference, test {rows[1]['test_acc']:.2f}"} <= drawn
    assert not any(text.startswith("reference") for text in words(plots.accuracy(run)))


def test_receptive_fields_fill_the_image_and_are_clipped_at_it():
    figure = plots.receptive_fields(synthetic().test.images[0], {"first": 3, "second": 31, "third": 47, "last": 79})
    (axes,) = figure.axes
    assert [(square.get_xy(), square.get_width()) for square in axes.patches] == [
        ((14.5, 14.5), 3), ((0.5, 0.5), 31), ((0, 0), 32), ((0, 0), 32)]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 32), (32, 0))
    assert {"first: 3 x 3", "last: 79 x 79"} <= words(figure)
    with drawing("it"):
        assert not overlapping(figure)


def test_filters_are_the_kernels_of_the_first_convolution_each_scaled_by_itself():
    weights = Net().input_block[0].weight.detach().numpy()
    images = plots.filters(weights, "input_block.0").axes[0].images
    assert len(images) == 32
    kernel, drawn = weights[5], images[5].get_array()
    assert (drawn.min(), drawn.max()) == (0, 1)
    assert np.allclose(drawn, ((kernel - kernel.min()) / (kernel.max() - kernel.min())).transpose(1, 2, 0))


ODD_NAMES = ("$cat$", "$x_{", "猫\U0001f9f6", os.fsdecode(b"b\xff"), "two\nlines", "\x1b[31m", "%d {} \\frac",
             "a name of more than twenty-four letters, and then some")


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_plain_text(tmp_path, saved, capsys):
    images, policy = made_up(ODD_NAMES)
    run = reference_run(tmp_path / "2026-01-01-$\\frac{猫")
    run.record["dataset"]["kind"] = "folder"
    labels, probabilities = images.test.labels, np.eye(8)[(images.test.labels + 1) % 8]
    with drawing("them"):
        for figure in (plots.accuracy(run), plots.confusion_matrix(labels, labels, ODD_NAMES),
                       plots.mistakes(images.test, probabilities, ODD_NAMES, plots.confused_pairs(labels, probabilities), {}),
                       plots.augmentation(images.train, policy, ODD_NAMES),
                       plots.receptive_fields(images.test.images[0], {"$a$": 3})):
            save(figure, tmp_path / "it.png")
        assert not overlapping(saved[2])
        assert not overlapping(saved[3])
    assert capsys.readouterr() == ("", "")
    accuracy, matrix, mistakes, augmentation, field = map(words, saved)
    names = {"$cat$", "$x_{", "b\\xff", "two\\nlines", "\\x1b[31m", "%d {} \\frac"}
    assert names <= matrix
    assert names <= augmentation
    assert {f"{name}\n0.0 %" for name in names} <= mistakes
    assert any(text.startswith("2026-01-01-$\\frac{") for text in accuracy)
    assert "$a$: 3 x 3" in field
    assert not any(text.get_parse_math() for figure in saved for text in figure.findobj(Text) if "$" in text.get_text())
