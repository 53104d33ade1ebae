"""The pictures: that they come, and show what they should; each was looked at by a person."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, one_line
from matplotlib.figure import Figure
from PIL import Image
from test_program import only_run

from training import plots
from training.images import Split, synthetic
from training.records import read_run

NAMES = {"accuracy.png", "confusion_matrix.png", "mistakes.png", "augmentation.png", "receptive_field.png"}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, with all their words."""
    figures, save = [], Figure.savefig

    def savefig(figure, path, **how):
        figures.append({text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))})
        save(figure, path, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_a_run_ends_with_its_pictures_and_plot_draws_them_again(run, tmp_path, pictures, capsys):
    import main

    status, out, _ = run("--epochs", "1", "--pictures")
    assert status == 0
    assert "Pictures: accuracy.png, confusion_matrix.png" in out
    folder = only_run(tmp_path)
    assert {path.name for path in folder.glob("*.png")} == NAMES
    first = {}
    for path in folder.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) >= 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        first[path.name] = pixels
        path.unlink()
    assert main.main(["plot", "--log-dir", str(tmp_path / "logs"), "--data-dir", str(pictures), "--device", "cpu"]) == 0
    for name, pixels in first.items():
        assert np.array_equal(pixels, np.asarray(Image.open(folder / name).convert("RGB"))), name


def test_a_run_without_pictures_has_none(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    assert not list(only_run(tmp_path).glob("*.png"))


def test_what_cannot_be_plotted_is_one_line(run, tmp_path, pictures, capsys):
    import main

    def plot(*arguments: str) -> str:
        capsys.readouterr()
        assert main.main(["plot", "--log-dir", str(tmp_path / "logs"), *arguments]) == 2
        return one_line(capsys.readouterr().err)

    assert "there is no finished run" in plot()
    assert run("--epochs", "1")[0] == 0
    folder = only_run(tmp_path)
    assert "there is no run 'nothing'" in plot("nothing")
    assert "there is no" in plot("--data-dir", str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    for source in pictures.rglob("*.png"):
        target = other / source.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).rotate(90).save(target)
    assert "was trained on: name their folder" in plot("--data-dir", str(other))
    (folder.parent / "9999-holiday").mkdir()  # newest by its name, and no run
    assert "was trained on: name their folder" in plot("--data-dir", str(other))
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(whole[:100])
    assert "config.json is damaged" in plot("--data-dir", str(pictures))
    (folder / "config.json").write_text(whole)
    weights = folder / "final.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is damaged, or holds no weights" in plot("--data-dir", str(pictures))
    (folder / "summary.json").unlink()
    assert "is no finished run" in plot(folder.name)


def test_training_does_not_load_matplotlib(pictures, tmp_path):
    code = ("import sys, main, training.loop as loop\n"
            "def stop(*_):\n  assert 'matplotlib' not in sys.modules\n  raise KeyboardInterrupt\n"
            "loop.train_epoch = stop\n"
            "sys.exit(main.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "--dataset", "folder", "--data-dir", pictures, "--log-dir", tmp_path],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr


def test_the_confusion_matrix_counts(tmp_path, drawn):
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    plots.confusion_matrix(labels, predicted, ("cat", "dog", "frog"), tmp_path / "it.png")
    assert {"66.7", "100.0", "0.0", "all: 66.67 %", "cat", "dog", "frog"} <= drawn[0]


def test_mistakes_are_the_most_confident_wrong_ones(tmp_path, drawn):
    test = Split(synthetic().test.images[:50], np.zeros(50, dtype=np.int64))
    probabilities = np.tile([0.6, 0.4], (50, 1))
    probabilities[:40] = [[1 - p, p] for p in np.linspace(0.501, 0.9, 40)]
    plots.mistakes(test, probabilities, ("cat", "dog"), tmp_path / "it.png")
    assert {"dog 90.0 %", "is cat", "The 36 wrong predictions made with most confidence, of 40 wrong ones"} <= drawn[0]
    assert "dog 50.1 %" not in drawn[0]
    assert not any(words.startswith("cat ") for words in drawn[0])


def test_curves_show_a_validation_too(tmp_path, drawn, run):
    assert run("--epochs", "2", "--validation", "9", "--pictures")[0] == 0
    assert {"accuracy, %", "loss, nats an image", "learning rate", "epoch"} <= drawn[0]
    final = read_run(only_run(tmp_path)).rows[-1]
    assert {f"validation: {final['val_acc']:.2f} at the end", f"test: {final['test_loss']:.2f} at the end",
            f"training, augmented images: {final['train_acc']:.2f} at the end"} <= drawn[0]


def test_receptive_fields_are_drawn_to_size(tmp_path, drawn):
    plots.receptive_field(synthetic().test.images[0], {"first": 3, "last": 79}, tmp_path / "it.png")
    assert {"first: 3 x 3", "last: 79 x 79"} <= drawn[0]
