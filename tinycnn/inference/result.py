"""What is shown of a run that has just been trained: figures and pictures."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from config import Config, UserError
from tinycnn.data.dataset import Dataset
from tinycnn.inference.loading import Trained
from tinycnn.inference.pictures import draw_pictures
from tinycnn.runs.finding import REFERENCE
from tinycnn.runs.inputs import Inputs, load_inputs
from tinycnn.runs.record import FINAL, read_run
from tinycnn.runs.run import Run
from tinycnn.runs.weights import NamedWeights, read_weights
from tinycnn.text import plural, printable
from tinycnn.training.machine import move


def train_and_show(train: Callable[..., Path], config: Config, run: Run | None, dataset: Dataset,
                   weights: NamedWeights | None = None) -> None:
    """Train a run of a sweep, whose `dataset` and `weights` are loaded, and show what came out."""
    inputs = load_inputs(config, dataset, weights)
    show(train(config, inputs, run), inputs)


def show(folder: Path, inputs: Inputs) -> None:
    """Print the final accuracies of the run in `folder`, first the one to choose by, and where it stands beside the reference
    run; draw its pictures."""
    run = read_run(folder)
    final, dataset = run.rows[-1], run.record["dataset"]["sha256"]
    accuracies = [f"{name} {final[column]:.2f} %" for name, column in (
        ("validation", "val_acc"), ("test", "test_acc"), ("train", "train_acc")) if column in final]
    print(f"\nFinal accuracy: {', '.join(accuracies)}, after {plural(len(run.rows), 'epoch')} in "
          f"{sum(row['seconds'] for row in run.rows):,.0f} s, at {time.strftime('%H:%M')}")
    if "val_acc" in final:
        best = max(run.rows, key=lambda row: row["val_acc"])
        print(f"Best validation accuracy: {best['val_acc']:.2f} %, in epoch {best['epoch']} (best.safetensors)")
    with suppress(UserError):  # a reference run that is damaged or gone is no reason to end here
        reference = read_run(REFERENCE)
        if reference.record["dataset"]["sha256"] == dataset and len(reference.rows) == len(run.rows):
            accuracy = reference.rows[-1]["test_acc"]
            print(f"That is {final['test_acc'] - accuracy:+.2f} percentage points from the reference run, {accuracy:.2f} %")
    print(f"Everything is in {printable(str(folder))}")
    if inputs.config.pictures:
        weights = read_weights(folder / FINAL)
        net = move(weights.build_net(), inputs.device)
        draw_pictures(Trained(weights, net, inputs.dataset, inputs.config, inputs.device))
