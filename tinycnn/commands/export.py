"""python main.py export: write a trained network as one file that runs without this program."""

from argparse import Namespace
from contextlib import closing

from tinycnn.inference.classifier import Classifier
from tinycnn.inference.export import EXPORT_SUFFIXES, check_packages, export_network
from tinycnn.inference.loading import load_trained
from tinycnn.runs.files import write
from tinycnn.runs.record import FINAL
from tinycnn.text import printable
from tinycnn.training.epoch import predict


def run(arguments: Namespace) -> None:
    """Write the file beside the weights, and print its path and how near it comes to the network."""
    check_packages(arguments.to)
    trained = load_trained(Namespace(**vars(arguments), device="cpu"))
    weights, images = trained.weights, trained.images
    with closing(trained.make_batches()) as batches:
        logits, _ = predict(trained.net, batches.in_order("test"), trained.device)
    classifier = Classifier(trained.net, weights.mean, weights.std)
    data, comparison = export_network(arguments.to, classifier, weights.class_names, images.train, images.test, logits)
    stem = "model" if weights.path.name == FINAL else weights.path.stem
    path = weights.path.with_name(stem + EXPORT_SUFFIXES[arguments.to])
    write(path, data, durable=True)
    print(printable(f"{path}: {len(data):,} bytes"))
    print(comparison)
