"""How accurate trained networks are on disturbed test images: compressed, noisy, blurred.

    python benchmarks/robustness.py RUN ... --data-dir ~/data

Report these figures of final runs; don't choose settings by them, since they are made of the test images.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import Config, UserError
from tinycnn.commands.start import report
from tinycnn.data.dataset import Split
from tinycnn.inference.evaluation import evaluate_predictions
from tinycnn.inference.loading import load_trained


def compress(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """JPEG at quality 75, with its colours at half the resolution."""
    content = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR))[:, :, ::-1]


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with a standard deviation of 10 of 255."""
    return (image + rng.normal(0, 10, image.shape)).round().clip(0, 255).astype(np.uint8)


def blur(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """A Gaussian filter with a standard deviation of 0.7 pixels."""
    return cv2.GaussianBlur(image, (0, 0), 0.7)


DISTURBANCES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as they are": lambda image, _: image, "JPEG 75": compress, "noise 10": add_noise, "blur 0.7": blur}


def disturbed(split: Split, disturb: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Split:
    """The images uint8 N x H x W x 3, each disturbed; the same for every network."""
    rng = np.random.default_rng(0)
    return Split(np.stack([disturb(image, rng) for image in split.images]), split.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", help="default: where the runs had their images")
    parser.add_argument("--log-dir", default=Config.log_dir)
    options = parser.parse_args()
    common = {"log_dir": options.log_dir, "data_dir": options.data_dir}
    print(f"Test accuracy in %, of each run's final weights\n\n{'run':32}" + "".join(f"{name:>13}" for name in DISTURBANCES))
    for name in options.runs:
        try:
            trained = load_trained(Namespace(run=name, device="auto", model=None, **common))
        except UserError as error:
            sys.exit(report(error))
        reached = []
        for disturb in DISTURBANCES.values():
            images = replace(trained.dataset, test=disturbed(trained.dataset.test, disturb))
            reached.append(evaluate_predictions(*replace(trained, dataset=images).predict()).accuracy)
        print(f"{name.removeprefix('logs/reference/'):32}" + "".join(f"{accuracy:13.2f}" for accuracy in reached), flush=True)


if __name__ == "__main__":
    main()
