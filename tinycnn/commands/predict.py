"""python main.py predict: classify image files with a trained network."""

from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from config import UserError
from tinycnn.data.decoding import LISTED_ERRORS, REMEDY
from tinycnn.inference.classifier import Classifier
from tinycnn.inference.network import build_trained_net
from tinycnn.inference.prediction import Prediction, as_json, as_text, image_files, predict_files
from tinycnn.runs.weights import find_weights, read_weights
from tinycnn.training.machine import find_device


def run(arguments: Namespace) -> None:
    """Print the most probable classes of each file. Files that can't be read are reported at the end."""
    files, device = image_files(arguments.images), find_device(arguments.device)
    weights = read_weights(find_weights(Path(arguments.log_dir), arguments.run))
    classifier = Classifier(build_trained_net(weights, arguments.model), weights.mean, weights.std).to(device)
    predictions: list[tuple[Path, Prediction]] = []
    errors: list[UserError] = []
    for path, result in predict_files(files, classifier, weights.class_names, device):
        if isinstance(result, UserError):
            errors.append(result)
        elif arguments.json:
            predictions.append((path, result))
        else:
            with tqdm.external_write_mode():  # above the bar
                print(as_text(path, result, arguments.top))
    if arguments.json:
        print(as_json(predictions, arguments.top))
    if errors:
        others = f", and {len(errors) - LISTED_ERRORS:,} more of {len(files):,} files" if len(errors) > LISTED_ERRORS else ""
        raise UserError("; ".join(str(error).removesuffix(REMEDY) for error in errors[:LISTED_ERRORS]) + others + REMEDY)
