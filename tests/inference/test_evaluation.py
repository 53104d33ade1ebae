"""python main.py test: the figures, and the program around them."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import one_line
from learned_run import CHANCE, copy_learned_run, learned_run
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import paired_images
from tinycnn.inference.evaluation import as_json, as_text, evaluate_predictions, expected_calibration_error
from tinycnn.inference.loading import Trained
from tinycnn.runs.record import read_run
from tinycnn.runs.weights import save_weights


def test_the_command_gives_the_figures_of_the_log(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    status, out, err = command("test", folder.name, "--log-dir", tmp_path / "logs", "--device", "cpu")
    assert (status, err) == (0, "")
    last = read_run(folder).rows[-1]
    assert last["test_acc"] > CHANCE + 15
    assert f"accuracy {last['test_acc']:.2f} %, loss {last['test_loss']:.4f}, expected calibration error" in out
    assert "60 test images of folder" in out
    classes = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in classes] == ["disc", "ring", "square"]
    assert sum(float(words[1]) for words in classes) / 3 == pytest.approx(last["test_acc"], abs=0.01)  # as many of each
    assert "mirrored" not in out
    status, flipped, err = command("test", folder / "final.safetensors", "--flip", "--device", "cpu")
    assert (status, err) == (0, "")
    assert flipped.startswith(out.rstrip("\n"))
    assert "with each image also mirrored: accuracy" in flipped


def test_best_weights_are_tested_on_the_test_images(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    status, out, err = command("test", f"{folder.name}/best.safetensors", "--log-dir", tmp_path / "logs", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "60 test images" in out


def test_figures_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    evaluation = evaluate_predictions(logits, torch.tensor([0, 0, 1, 0]))
    assert evaluation.accuracy == 75
    assert evaluation.class_accuracies == [pytest.approx(200 / 3), 100]
    assert evaluation.loss == pytest.approx((np.log(1 + np.exp(-2)) + np.log(1 + np.exp(-1)) + np.log(1 + np.exp(-3))
                                             + np.log(1 + np.exp(1))) / 4)


@pytest.mark.parametrize(("confidences", "correct", "expected"), [
    ([0.9] * 10, [True] * 9 + [False], 0.0),                      # as sure as it may be
    ([0.9] * 10, [True] * 5 + [False] * 5, 0.4),
    ([0.61, 0.99], [True, False], 0.69),                          # (0.39 + 0.99) / 2: bins don't make up for one another
    ([0.71, 0.79], [True, False], 0.54),                          # (0.29 + 0.79) / 2: 15 bins tell them apart, 10 don't
    ([0.75, 0.8], [True, False], 0.275),                          # |0.25 - 0.8| / 2: a bin includes its upper end
    ([0.8, 0.85], [True, False], 0.525),                          # (0.2 + 0.85) / 2: and not its lower one
    ([0.99, 1.0], [True, False], 0.495),                          # |0.01 - 1| / 2: the last bin too
    ([1.0, 1.0], [True, True], 0.0)])
def test_the_calibration_error_by_hand(confidences, correct, expected):
    probabilities = torch.tensor([[value, 1 - value] for value in confidences], dtype=torch.float64)
    labels = torch.tensor([0 if each else 1 for each in correct])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_mirroring_averages_the_logits_of_both(command, tmp_path, monkeypatch):
    """The sum in place of the mean would keep the accuracy and change the loss."""
    labels, outputs = torch.tensor([0, 1, 2]), [10 * torch.eye(3), torch.tensor([[0.0, 8, 0], [0, 2, 0], [0, 0, 4]])]
    monkeypatch.setattr(Trained, "predict", lambda self, mirrored=False: (outputs[mirrored], labels))
    status, out, _ = command("test", copy_learned_run(tmp_path), "--flip")
    assert status == 0
    loss = np.log([1 + np.exp(-1) + np.exp(-5), 1 + 2 * np.exp(-6), 1 + 2 * np.exp(-7)]).mean()
    assert f"mirrored: accuracy 100.00 %, loss {loss:.4f}" in out


def test_the_most_confused_pairs_are_told(monkeypatch):
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 0, 1, 0, 0, 2])
    evaluation = evaluate_predictions(torch.eye(3)[predicted], labels)
    assert evaluation.confused == [(0, 1, 2), (1, 0, 1), (2, 0, 1)]
    assert "most confused: cat as dog 2, dog as cat 1, frog as cat 1" in as_text(evaluation, ("cat", "dog", "frog"))
    monkeypatch.setattr("tinycnn.inference.evaluation.CONFUSED_PAIRS", 1)
    assert as_text(evaluation, ("cat", "dog", "frog")).endswith("most confused: cat as dog 2")
    assert "confused" not in as_text(evaluate_predictions(torch.eye(3)[labels], labels), ("cat", "dog", "frog"))


def test_json_has_the_figures_of_the_text(command, tmp_path):
    folder = copy_learned_run(tmp_path)
    _, text, _ = command("test", folder, "--flip", "--device", "cpu")
    status, out, err = command("test", folder, "--flip", "--device", "cpu", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["weights"] == str(folder / "final.safetensors")
    assert found["images"] == 60
    for each in (found, found["mirrored"]):
        assert f"accuracy {each['accuracy']:.2f} %, loss {each['loss']:.4f}, " in text
        assert f"calibration error {each['calibration_error']:.2f} %" in text
    for each in found["classes"]:
        assert f"  {each['class']:6}  {each['accuracy']:6.2f} %\n" in text
    assert sum(each["images"] for each in found["confused"]) == round(60 * (1 - found["accuracy"] / 100))
    first = found["confused"][0]
    assert f"most confused: {first['class']} as {first['as']} {first['images']}" in text


def test_a_class_without_images_has_no_accuracy():
    evaluation = evaluate_predictions(torch.eye(3)[:2], torch.tensor([0, 1]))
    assert "c     nan %" in as_text(evaluation, "abc")
    assert as_json(evaluation, "abc")["classes"][2] == {"class": "c", "accuracy": None}


def test_names_of_classes_are_escaped():
    text = as_text(evaluate_predictions(torch.eye(2), torch.tensor([0, 1])), ("a\x1b[31m\nb", "\udcff"))
    assert [line.split() for line in text.splitlines()[2:]] == [["a\\x1b[31m\\nb", "100.00", "%"], ["\\xff", "100.00", "%"]]


def test_outputs_that_are_not_finite_are_no_figures(command, tmp_path):
    path, image = copy_learned_run(tmp_path) / "final.safetensors", learned_run() / "pictures" / "test" / "disc" / "0.png"
    tensors = load_file(path)
    tensors["conv_block1.0.1.weight"] *= 1e38  # finite itself
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if "sha256" not in key}
    save_weights(path, tensors, metadata)
    predict = ["predict", image, "--run", path]
    for line in (["test", path], predict, [*predict, "--json"], ["export", path]):
        status, out, err = command(*line)
        assert (status, out) == (2, ""), line
        assert "outputs are not finite numbers" in one_line(err)


def test_accuracies_on_the_same_images_are_compared_image_by_image():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(400, generator=generator) < share for share in (0.8, 0.7))
    each = first.double() - second.double()
    only_first, only_second = (int(each.eq(sign).sum()) for sign in (1, -1))
    assert paired_images.compared(first, second) == (
        f"{100 * first.double().mean():.2f} and {100 * second.double().mean():.2f} % of 400 images: "
        f"{only_first} by the first only, {only_second} by the second only, "
        f"{100 * each.mean():+.2f} ± {100 * each.std(correction=0) / 20:.2f}")


def test_runs_are_compared_on_the_images_that_they_held_out(tmp_path, monkeypatch, capsys):
    folder = copy_learned_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["paired_images.py", str(folder), str(folder)])
    capsys.readouterr()  # of its training
    paired_images.main()
    accuracy = f"{read_run(folder).rows[-1]['val_acc']:.2f}"
    assert capsys.readouterr().out == (f"{accuracy} and {accuracy} % of 30 images: 0 by the first only, 0 by the second only, "
                                       "+0.00 ± 0.00\n")
    results = iter([(torch.ones(3, dtype=torch.bool), torch.tensor(labels)) for labels in ([0, 1, 2], [0, 2, 1])])
    monkeypatch.setattr(paired_images, "predicted", lambda arguments: next(results))
    with pytest.raises(SystemExit, match="2"):
        paired_images.main()
    assert "not judged by the same images" in one_line(capsys.readouterr().err)
