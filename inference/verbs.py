"""python main.py test, predict and export, told in order. `make_net` is model.Net."""

from argparse import Namespace
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from config import Config, UserError
from inference.classifier import Classifier
from inference.predict import as_json, as_text, image_files, predictions
from inference.test import report
from training import weights
from training.checkpoint import config_of
from training.loop import find_device
from training.loop import predict as logits_of
from training.records import FINAL, write
from training.weights import MakeNet

if TYPE_CHECKING:  # predicting needs none of it, and it takes seconds to load
    from training.parts import Parts


def trained(asked: Namespace, make_net: MakeNet) -> "tuple[weights.Weights, Parts]":
    """The weights that are asked for, and the parts of their run with these weights and on the device that is asked for. Raises
    UserError, also where the images are not those that the weights were trained on."""
    from training.parts import build

    found = weights.read(weights.find(Path(asked.log_dir), asked.run))
    here = {"data_dir": asked.data_dir, "log_dir": asked.log_dir, "device": asked.device, "threads": 0, "batches": "auto",
            "capture": False, "teacher": ""}
    known = {name: value for name, value in found.config.items() if hasattr(Config, name)}  # others were for its training
    parts = build(config_of({"config": known}, here, found.path.parent), make_net)
    if not found.trained_on(parts.images):
        raise UserError(f"the images in {asked.data_dir} are not those that {found.path} was trained on: name their folder "
                        "with --data-dir")
    found.load_into(parts.net)
    return found, parts


def test(asked: Namespace, make_net: MakeNet) -> None:
    """What trained weights are worth on the test images of their run."""
    found, parts = trained(asked, make_net)
    with closing(parts.batches()) as batches:
        print(f"{found.path} on the {len(parts.images.test):,} test images of {parts.config.dataset}:\n"
              + report(parts.net, batches, parts.device, found.class_names, asked.flip))


def predict(asked: Namespace, make_net: MakeNet) -> None:
    """What a trained network takes images for. Raises UserError at the end for files that can't be read."""
    files, device = image_files(asked.images), find_device(asked.device)
    found = weights.read(weights.find(Path(asked.log_dir), asked.run))
    classifier, unreadable = Classifier(found.network(make_net), found.mean, found.deviation).to(device), list[UserError]()
    predicted = predictions(files, classifier, found.class_names, device, unreadable)
    if asked.json:
        print(as_json(list(predicted), asked.top))
    else:
        for path, prediction in predicted:
            with tqdm.external_write_mode():  # above the bar
                print(as_text(path, prediction, asked.top))
    if unreadable:
        others = f", and {len(unreadable) - 1:,} more of {len(files):,} files" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{others}")


def export(asked: Namespace, make_net: MakeNet) -> None:
    """A trained network as one file that runs without this program."""
    from inference import export as exporting  # which needs packages that not everybody has

    exporting.check_packages(asked.to)
    found, parts = trained(Namespace(**vars(asked), device="cpu"), make_net)
    with closing(parts.batches()) as batches:
        logits, _ = logits_of(parts.net, batches.in_order("test"), parts.device)
    data, comparison = exporting.export(asked.to, Classifier(parts.net, found.mean, found.deviation), found.class_names,
                                        parts.images.train, parts.images.test, logits)
    stem = "model" if found.path.name == FINAL else found.path.stem
    path = found.path.with_name(stem + exporting.SUFFIXES[asked.to])
    write(path, data, durable=True)
    print(f"{path}: {len(data):,} bytes\n{comparison}")
