"""A picture of where a network saw the classes of an image."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TextIO

import torch

from tinycnn.data.decoding import decode
from tinycnn.inference.classifier import Classifier
from tinycnn.inference.prediction import FORMATS
from tinycnn.network.activation_maps import class_maps
from tinycnn.runs.drawing import drawing
from tinycnn.text import printable


def explain(file: Path, classifier: Classifier, class_names: Sequence[str], device: torch.device, taken: set[Path],
            output: TextIO) -> None:
    """Write a picture of where the network saw the three most probable classes of an image file into the current folder, and
    print its name to `output`. `taken` are the paths that must not be written; the new one is added. Raises UserError where the
    network has no class activation maps."""
    image, _ = decode(str(file), FORMATS)
    maps = class_maps(classifier, torch.tensor(image[None], device=device))[0].cpu()
    names = (f"{file.stem}.explained{f'-{number}' if number > 1 else ''}.png" for number in count(1))
    path = next(path for path in map(Path, names) if path.resolve() not in taken)
    taken.add(path.resolve())
    with drawing(path.name):
        from tinycnn.runs.plots import draw_explanation  # loads Matplotlib

        draw_explanation(image, class_names, maps.mean((1, 2)).softmax(0).numpy(), maps.numpy(), path)
        print(printable(str(path)), file=output)
