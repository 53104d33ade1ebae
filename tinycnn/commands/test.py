"""python main.py test: evaluate trained weights on the test images of their run."""

from argparse import Namespace
from contextlib import closing

from tinycnn.inference.evaluation import report_evaluation
from tinycnn.inference.loading import load_trained
from tinycnn.text import printable


def run(arguments: Namespace) -> None:
    """Print accuracy, loss and calibration on the test images, and the accuracy of each class."""
    trained = load_trained(arguments)
    with closing(trained.make_batches()) as batches:
        report = report_evaluation(trained.net, batches, trained.device, trained.weights.class_names, arguments.flip)
    print(printable(f"{trained.weights.path} on the {len(trained.images.test):,} test images of {trained.config.dataset}:"))
    print(report)
