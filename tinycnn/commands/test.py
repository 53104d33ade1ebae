"""python main.py test: evaluate trained weights on the test images of their run."""

import contextlib
import json
import sys
from argparse import Namespace

from tinycnn.commands.parser import Parser, check_settings
from tinycnn.text import printable

HELP = """Print accuracy, loss, calibration and each class's accuracy of trained weights on the test images of their run.

    python main.py test                         the newest finished run
    python main.py test logs/reference          the reference run
    python main.py test RUN/best.safetensors --flip
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of `test`."""
    parser = Parser("test", HELP)
    parser.add_run("log_dir", "data_dir", "device")
    parser.add_argument("--flip", action="store_true", help="also average the predictions for each image and its mirror image")
    parser.add_argument("--json", action="store_true", help="print JSON, with all confused pairs")
    return check_settings(parser.parse(line))


def run(arguments: Namespace) -> None:
    """Print accuracy, loss and calibration on the test images, the accuracy of each class, and the most confused pairs."""
    from tinycnn.inference.evaluation import as_json, as_text, evaluate_predictions
    from tinycnn.inference.loading import load_trained

    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):  # what it prints is no JSON
        trained = load_trained(arguments)
    logits, labels = trained.predict()
    evaluation, mirrored = evaluate_predictions(logits, labels), None
    if arguments.flip:
        mirrored = evaluate_predictions((logits + trained.predict(mirrored=True)[0]) / 2, labels)
    path, names = str(trained.weights.path), trained.weights.class_names
    if arguments.json:
        print(json.dumps({"weights": path} | as_json(evaluation, names, mirrored), indent=1))
    else:
        print(printable(f"{path} on the {len(labels):,} test images of {trained.config.dataset}:"))
        print(as_text(evaluation, names, mirrored))
