"""A run that has learned something, trained once for all tests of this folder."""

import functools
import json
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from conftest import SMALL, run_line, write_folder
from safetensors import safe_open
from safetensors.torch import load_file

from tinycnn.runs.weights import save_weights

CHANCE = 100 / 3  # percent of the test images, of which each of three classes has as many
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def learned_run() -> Path:
    """A folder with logs/runs/<a run that held images out, and learned> and the pictures that it was trained on."""
    folder, threads = Path(FOLDER.name), torch.get_num_threads()
    write_folder(folder / "pictures", train=110, test=20)
    line = ["--dataset", "folder", "--data-dir", str(folder / "pictures"), "--log-dir", str(folder / "logs"), "--epochs", "5",
            "--lr", "0.05", "--affine-p", "0", "--coarse-dropout-p", "0", "--validation", "30", *SMALL]
    assert run_line(line) == 0
    torch.set_num_threads(threads)
    return folder


def copy_learned_run(tmp_path: Path) -> Path:
    """The folder of a copy of that run, in tmp_path/logs/runs. Its images are where they were."""
    shutil.copytree(learned_run() / "logs", tmp_path / "logs")
    (folder,) = (tmp_path / "logs" / "runs").iterdir()
    return folder


def arguments(run: Path, **others) -> Namespace:
    """What the command line hands to a command that uses a run."""
    return Namespace(**{"run": str(run), "log_dir": "logs", "data_dir": None, "device": "cpu", "model": None} | others)


def rewrite_metadata(path: Path, **changes) -> None:
    """Change the metadata of a run's weights; None removes a key."""
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if key != "sha256"}
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    save_weights(path, load_file(path), metadata)
