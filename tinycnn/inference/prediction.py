"""Predict the classes of image files of any shape, mode and orientation."""

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError, available_cores
from tinycnn.data.decoding import decode, report_resized
from tinycnn.inference.classifier import Classifier
from tinycnn.text import printable

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # Pillow's names
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"}  # of the files in a folder
BATCH_SIZE = 256
Prediction = list[tuple[str, float]]  # classes and their probabilities, the most probable first


def image_files(names: Sequence[str]) -> list[Path]:
    """The files of `names`: files as they are, and of a folder the image files, by suffix, in it and below it, without the
    hidden ones."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not name:
            raise UserError("the name of an image is empty")
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
                            and not any(part.startswith(".") for part in file.relative_to(path).parts))
            if not inside:
                raise UserError(printable(f"{path} holds no image files"))
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(printable(f"there is no file {path}"))
    return files


def predict_files(files: Sequence[Path], classifier: Classifier, class_names: Sequence[str],
                  device: torch.device) -> Iterator[tuple[Path, Prediction | UserError]]:
    """Predict each file, with `classifier` on `device`; an error stands in for the prediction of a file that can't be read.
    Prints one line on stderr at the end where images were resized."""
    resized = 0
    with (ThreadPoolExecutor(min(8, available_cores())) as pool,  # a large image takes 200 MB while it is decoded
          warnings.catch_warnings(action="ignore"),  # Pillow's, of odd metadata
          tqdm(total=len(files), desc="predicting", unit="image", disable=None if len(files) > BATCH_SIZE else True,
               leave=False) as bar):
        for start in range(0, len(files), BATCH_SIZE):
            chunk = files[start:start + BATCH_SIZE]
            decoded = list(pool.map(_decode_or_error, chunk))
            readable = [result for result in decoded if not isinstance(result, UserError)]
            resized += sum(was_resized for _, was_resized in readable)
            rows = iter(_probabilities(classifier, np.stack([image for image, _ in readable]), device) if readable else ())
            for path, result in zip(chunk, decoded, strict=True):
                yield path, result if isinstance(result, UserError) else _ranked(next(rows), class_names)
            bar.update(len(chunk))
    report_resized(resized, len(files))


def _decode_or_error(path: Path) -> tuple[np.ndarray, bool] | UserError:
    try:
        return decode(str(path), FORMATS)
    except UserError as error:
        return error


@torch.no_grad()
def _probabilities(classifier: Classifier, images: np.ndarray, device: torch.device) -> Tensor:
    return classifier(torch.from_numpy(images).to(device)).softmax(1).cpu()


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
