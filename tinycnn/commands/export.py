"""python main.py export: write a trained network as one file that runs without this program."""

from argparse import Namespace

from tinycnn.commands.parser import Parser, check_settings
from tinycnn.text import printable

HELP = """Write a trained network as one file that runs without this program, into the folder of its run. Input: image, uint8,
N x 32 x 32 x 3, RGB. Output: logits. The file normalizes the images itself. It is loaded back and compared with the network
on the test images before it is written.

    python main.py export                       model.onnx, for ONNX Runtime
    python main.py export --to int8             model.int8.onnx, in 8 bits, calibrated on training images
    python main.py export --to torch RUN        model.pt2, for torch.export.load
    python main.py export --to web              model.html, a page that classifies pictures in a browser, to send to someone
"""


def parse(line: list[str]) -> Namespace:
    """Parse the arguments of `export`."""
    parser = Parser("export", HELP)
    parser.add_run("log_dir", "data_dir")
    parser.add_argument("--to", default="onnx", choices=("onnx", "int8", "torch", "web"),
                        help="the kind of file (default: onnx)")
    return check_settings(parser.parse(line))


def run(arguments: Namespace) -> None:
    """Write the file beside the weights, and print its path and how near it comes to the network."""
    from tinycnn.inference.classifier import Classifier
    from tinycnn.inference.export import EXPORT_SUFFIXES, check_packages, export_network
    from tinycnn.inference.loading import load_trained
    from tinycnn.runs.files import write
    from tinycnn.runs.record import FINAL

    check_packages(arguments.to)
    trained = load_trained(Namespace(**vars(arguments), device="cpu"))
    weights, images = trained.weights, trained.dataset
    logits, _ = trained.predict()
    classifier = Classifier(trained.net, weights.mean, weights.std)
    data, comparison = export_network(arguments.to, classifier, weights.class_names, images.train, images.test, logits)
    stem = "model" if weights.path.name == FINAL else weights.path.stem
    path = weights.path.with_name(stem + EXPORT_SUFFIXES[arguments.to])
    write(path, data, durable=True)
    print(printable(f"{path}: {len(data):,} bytes"))
    print(comparison)
