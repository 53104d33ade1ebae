"""Predict the classes of image files of any shape, mode and orientation."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from tinycnn.data.decoding import decode_each, report_resized
from tinycnn.inference.classifier import Classifier, check_finite
from tinycnn.text import printable

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # Pillow's names
# of the files in a folder
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
BATCH_SIZE = 256
Prediction = list[tuple[str, float]]  # classes and their probabilities, the most probable first


def image_files(names: Sequence[str]) -> list[Path]:
    """The files of `names`: files as they are, whether they are there or not, and of a folder the image files, by suffix, in it
    and below it, without the hidden ones. Prints one line on stderr about what else is in the folders."""
    if not all(names):
        raise UserError("the name of an image is empty")
    files: list[Path] = []
    left_out: list[Path] = []

    def unreadable(error: OSError) -> None:
        left_out.append(Path(error.filename))

    for path in map(Path, names):
        if not path.is_dir():
            files.append(path)
            continue
        inside: list[Path] = []
        for folder, folders, entries in os.walk(path, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            left_out += [each for name in folders if (each := Path(folder, name)).is_symlink()]  # they may form a ring
            inside += [Path(folder, name) for name in entries if not name.startswith(".")]
        images = sorted(each for each in inside if each.suffix.lower() in SUFFIXES)
        left_out += [each for each in inside if each.suffix.lower() not in SUFFIXES]
        files += images or [path]  # a folder without any becomes an error
    if left_out:
        print(printable(f"left out {len(left_out)} entries of the folders, such as {min(left_out)}: links to folders, "
                        "unreadable folders, and files without an image's extension"), file=sys.stderr)
    return files


def predict_files(files: Sequence[Path], classifier: Classifier, class_names: Sequence[str],
                  device: torch.device) -> Iterator[tuple[Path, Prediction | UserError]]:
    """Predict each file, with `classifier` on `device`; an error stands in for the prediction of a file that can't be read.
    Prints one line on stderr at the end where images were resized."""
    resized = 0
    with tqdm(total=len(files), desc="predicting", unit="image", disable=None if len(files) > BATCH_SIZE else True,
              leave=False) as bar:
        for start in range(0, len(files), BATCH_SIZE):
            chunk = files[start:start + BATCH_SIZE]
            decoded = list(decode_each([*map(str, chunk)], FORMATS))
            readable = [result for result in decoded if not isinstance(result, UserError)]
            resized += sum(was_resized for _, was_resized in readable)
            rows = iter(_probabilities(classifier, np.stack([image for image, _ in readable]), device) if readable else ())
            for path, result in zip(chunk, decoded, strict=True):
                yield path, result if isinstance(result, UserError) else _ranked(next(rows), class_names)
            bar.update(len(chunk))
    report_resized(resized, len(files))


@torch.no_grad()
def _probabilities(classifier: Classifier, images: np.ndarray, device: torch.device) -> Tensor:
    probabilities = classifier(torch.from_numpy(images).to(device)).softmax(1)
    check_finite(probabilities)
    return probabilities.cpu()


def _ranked(probabilities: Tensor, class_names: Sequence[str]) -> Prediction:
    return [(class_names[label], probabilities[label].item()) for label in probabilities.argsort(descending=True).tolist()]


def as_text(path: Path, prediction: Prediction, top: int) -> str:
    """The `top` most probable classes as a line for a terminal."""
    classes = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in prediction[:top])
    return printable(f"{path}: {classes}")


def as_json(predictions: Sequence[tuple[Path, Prediction]], top: int) -> str:
    """The `top` most probable classes of each file as a JSON array of objects, in ASCII."""
    return json.dumps([{"file": str(path), "classes": [{"class": name, "probability": probability}
                                                       for name, probability in prediction[:top]]}
                       for path, prediction in predictions], indent=1)
