"""The pictures of a finished run, drawn into its folder."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from augmentation import train_policy
from config import UserError
from tinycnn.data.dataset import Dataset
from tinycnn.inference.loading import Trained
from tinycnn.network.activation_maps import class_maps
from tinycnn.network.receptive_field import convolutions
from tinycnn.runs.drawing import drawing, save
from tinycnn.runs.finding import REFERENCE
from tinycnn.runs.record import SavedRun, read_run

if TYPE_CHECKING:  # loaded by `drawing`
    from matplotlib.figure import Figure


def draw_pictures(trained: Trained) -> None:
    """Draw the pictures of a finished run into its folder, and print their names. One that can't be drawn is a line on
    stderr."""
    folder, net, dataset = trained.weights.path.parent, trained.net, trained.dataset
    finished, names = read_run(folder), dataset.class_names
    labels, probabilities = dataset.test.labels, trained.predict()[0].softmax(1).numpy()
    policy = train_policy(trained.config, 0, *dataset.statistics)
    drawn: list[str] = []
    with drawing(f"the pictures of {folder.name}"):
        from tinycnn.runs import plots  # loads Matplotlib

        pairs = plots.confused_pairs(labels, probabilities)
        figures: dict[str, Callable[[], Figure]] = {
            "accuracy.png": lambda: plots.accuracy(finished, _reference(finished)),
            "confusion_matrix.png": lambda: plots.confusion_matrix(labels, probabilities.argmax(1), names),
            "mistakes.png": lambda: plots.mistakes(dataset.test, probabilities, names, pairs,
                                                   _class_maps(net, dataset, plots.drawn_mistakes(pairs))),
            "augmentation.png": lambda: plots.augmentation(dataset.train, policy, names),
            "receptive_field.png": lambda: plots.receptive_fields(dataset.test.images[0], _receptive_fields(net)),
            "filters.png": lambda: plots.filters(*_first_kernels(net)),
        }
        for name, make_figure in figures.items():
            with drawing(f"{folder.name}/{name}"):
                save(make_figure(), folder / name)
                drawn.append(name)
    print(f"Pictures: {', '.join(drawn) or 'none'}")


def _reference(run: SavedRun) -> SavedRun | None:
    """The reference run, where it had the images of `run`."""
    with suppress(UserError):  # it is damaged or gone
        reference = read_run(REFERENCE)
        if reference.record["dataset"]["sha256"] == run.record["dataset"]["sha256"]:
            return reference
    return None


def _class_maps(net: nn.Module, dataset: Dataset, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """The class activation maps of these test images; none, and a line on stderr, where the network has none."""
    if not indices:
        return {}
    mean, std = dataset.statistics
    images = torch.tensor((dataset.test.images[indices] / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    try:
        return dict(zip(indices, class_maps(net, images.to(next(net.parameters()).device)).cpu().numpy(), strict=True))
    except UserError as error:
        print(f"mistakes.png has no activation maps: {error}", file=sys.stderr)
        return {}


def _receptive_fields(net: nn.Module) -> dict[str, int]:
    """The layers that widen the receptive field, with it."""
    fields: dict[str, int] = {}
    for layer in convolutions(net):
        field = layer.receptive_field or 0  # 0 where it is unknown
        if layer.output[1:] != (1, 1) and field > max(fields.values(), default=1):
            fields[layer.name] = field
    return fields


def _first_kernels(net: nn.Module) -> tuple[np.ndarray, str]:
    """The weights of the first convolution of images, float32 N x 3 x height x width, and its name."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] == 3:
            return layer.weight.detach().float().cpu().numpy(), name
    raise UserError("the network has no convolution of 3 channels")
