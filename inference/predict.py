"""What a network takes image files for: of any size, mode and orientation."""

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from inference.classifier import Classifier
from training.decoding import decode, tell_resized
from training.loop import cores

SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"}  # what is looked for in folders
AT_ONCE = 256  # images
Prediction = list[tuple[str, float]]  # classes and their probabilities, the most probable first


def image_files(names: Sequence[str]) -> list[Path]:
    """The files that `names` name: files as they are, and of a folder those in it and below it that are images by their suffix,
    but for hidden ones. Raises UserError for what isn't there, and a folder without images."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not name:
            raise UserError("the name of an image is empty")
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file()
                            and not any(part.startswith(".") for part in each.relative_to(path).parts))
            if not inside:
                raise UserError(f"{path} holds no image files")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no file {path}")
    return files


def predictions(files: Sequence[Path], classifier: Classifier, class_names: Sequence[str], device: torch.device,
                unreadable: list[UserError]) -> Iterator[tuple[Path, Prediction]]:
    """Each file with what `classifier`, on `device`, takes it for. A file that can't be read is left out and its error added to
    `unreadable`. Says in one line on stderr how many had to be resized."""
    resized = 0
    with (ThreadPoolExecutor(min(8, cores())) as pool,  # a large image takes 300 MB while it is decoded
          warnings.catch_warnings(action="ignore"),  # Pillow's, of large images and odd metadata
          tqdm(total=len(files), desc="predicting", unit="image", disable=None if len(files) > AT_ONCE else True,
               leave=False) as bar):
        for start in range(0, len(files), AT_ONCE):
            chunk = files[start:start + AT_ONCE]
            images = []
            for path, decoded in zip(chunk, pool.map(_decoded, chunk), strict=True):
                if isinstance(decoded, UserError):
                    unreadable.append(decoded)
                else:
                    images.append((path, decoded[0]))
                    resized += decoded[1]
            if images:
                probabilities = _probabilities(classifier, torch.from_numpy(np.stack([image for _, image in images])), device)
                for (path, _), row in zip(images, probabilities, strict=True):
                    yield path, [(class_names[label], row[label].item()) for label in row.argsort(descending=True).tolist()]
            bar.update(len(chunk))
    tell_resized(resized, len(files))


def _decoded(path: Path) -> tuple[np.ndarray, bool] | UserError:
    try:
        return decode(str(path))
    except UserError as error:
        return error


@torch.no_grad()
def _probabilities(classifier: Classifier, images: Tensor, device: torch.device) -> Tensor:
    return classifier(images.to(device)).softmax(1).cpu()


def as_text(path: Path, prediction: Prediction, top: int) -> str:
    """A line for a terminal: the `top` most probable classes."""
    return f"{path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in prediction[:top])


def as_json(found: Sequence[tuple[Path, Prediction]], top: int) -> str:
    """For programs: an array with an object for each file."""
    return json.dumps([{"file": str(path), "classes": [{"class": name, "probability": probability}
                                                       for name, probability in prediction[:top]]}
                       for path, prediction in found], indent=1)
