"""python main.py predict: classify image files with a trained network."""

import sys
from argparse import Namespace
from pathlib import Path

from config import UserError
from tinycnn.commands.parser import Parser, check_settings

HELP = """Classify images with a trained network: PNG, JPEG, GIF, BMP, WEBP or TIFF files of up to 25 million pixels, and
folders of them.

    python main.py predict cat.jpg              with the newest finished run
    python main.py predict cat.jpg --explain    also draw where the network saw the classes
    python main.py predict pictures/ --run logs/reference --json
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of `predict`."""
    parser = Parser("predict", HELP)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of them")
    parser.add_run("log_dir", "device", argument="--run")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="print the N most probable classes (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--explain", action="store_true", help="write a picture of where the network saw the three most "
                        "probable classes, IMAGE.explained.png, into the current folder")
    arguments = check_settings(parser.parse(line))
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}, but must be 1 or more")
    return arguments


def run(arguments: Namespace) -> None:
    """Print the most probable classes of each file. Files that can't be read, or aren't there, are named at the end."""
    from tqdm import tqdm

    from tinycnn.data.decoding import LISTED_ERRORS, REMEDY
    from tinycnn.inference.classifier import Classifier
    from tinycnn.inference.explanation import explain
    from tinycnn.inference.prediction import Prediction, as_json, as_text, image_files, predict_files
    from tinycnn.runs.weights import find_weights, read_weights
    from tinycnn.training.machine import find_device

    files, device = image_files(arguments.images), find_device(arguments.device)
    weights = read_weights(find_weights(Path(arguments.log_dir), arguments.run))
    classifier = Classifier(weights.build_net(arguments.model), weights.mean, weights.std).to(device)
    predictions: list[tuple[Path, Prediction]] = []
    errors: list[UserError] = []
    taken = {path.resolve() for path in files}
    for path, result in predict_files(files, classifier, weights.class_names, device):
        if isinstance(result, UserError):
            errors.append(result)
            continue
        predictions.append((path, result))
        with tqdm.external_write_mode():  # above the bar
            if not arguments.json:
                print(as_text(path, result, arguments.top))
            if arguments.explain:
                explain(path, classifier, weights.class_names, device, taken, sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(as_json(predictions, arguments.top))
    if errors:
        lines = [str(error) for error in errors]
        more = f", and {len(errors) - LISTED_ERRORS:,} more of {len(files):,} files" if len(errors) > LISTED_ERRORS else ""
        remedy = REMEDY if any(line.endswith(REMEDY) for line in lines) else ""
        raise UserError("; ".join(line.removesuffix(REMEDY) for line in lines[:LISTED_ERRORS]) + more + remedy)
