"""What the tests share: a small folder of images, and the program run in this process or in one of its own."""

import os

# Before torch is loaded: threads that spin while they wait would keep the other tests from the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import copy
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from config import UserError
from tinycnn.data.synthetic import synthetic as draw_synthetic
from tinycnn.runs.finding import find_runs

ROOT = Path(__file__).parents[1]
synthetic = functools.cache(draw_synthetic)  # takes a second
REFERENCE = ROOT / "logs" / "reference"
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
SMALL = ["--workers", "0", "--threads", "1", "--batch-size", "16", "--device", "cpu", "--no-pictures"]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="minutes long: pytest -m slow"))


def write_folder(root: Path, train: int = 16, test: int = 8, classes: int = 3) -> Path:
    """Write root/train/<class>/*.png and root/test/<class>/*.png: that many drawn images of each class."""
    images = synthetic()
    for split, part, count in (("train", images.train, train), ("test", images.test, test)):
        for label, name in enumerate(images.class_names[:classes]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(part.labels == label)[:count]):
                Image.fromarray(part.images[index]).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 48 training and 24 test images in three classes."""
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on."""
    figures, save = [], Figure.savefig

    def savefig(figure, path, **how):
        figures.append(figure)
        save(figure, path, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.fixture
def cifar10() -> Path:
    """The folder of the real CIFAR-10."""
    folder = os.environ.get("CIFAR10_DIR")
    if not folder:
        pytest.skip("CIFAR10_DIR does not name a folder with cifar-10-batches-py")
    return Path(folder)


def run_line(line: list[str]) -> int:
    """Run a command line in this process, without ending it. Returns the exit status."""
    import main
    from tinycnn.commands import start

    try:
        arguments = start.parse(line)
        start.cap_instruction_set(arguments)
    except UserError as error:
        return start.report(error)
    return start.run(arguments, main.train, main.build, main.train_step)


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command line in this process: command("compare", "--log-dir", ...) -> (status, stdout, stderr)."""
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()

    def command(*arguments: object):
        capsys.readouterr()
        status = run_line([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    yield command
    torch.set_num_threads(threads)


@pytest.fixture
def run(command, pictures, tmp_path):
    """Train on the small folder in this process: run("--epochs", "2") -> (status, stdout, stderr); logs in tmp_path/logs."""
    def run(*arguments: object):
        base = ["--dataset", "folder", "--data-dir", pictures, "--log-dir", tmp_path / "logs", *SMALL]
        if "--resume" in arguments:
            base = ["--log-dir", tmp_path / "logs"]
        return command(*base, *arguments)

    return run


def start_program(*arguments: str, interval: float | None = None, before: str = "") -> subprocess.Popen:
    """Start main.py in a process of its own, with pipes. `interval` replaces the seconds between checkpoints, `before` is
    Python to run first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import main\n"
    code += "from tinycnn.commands.start import parse_or_exit, run_or_exit\n"
    if interval is not None:
        code += f"from tinycnn.runs import run; run.INTERVAL = {interval}\n"
    code += f"{before}\nif __name__ == '__main__': run_or_exit(parse_or_exit(), main.train, main.build, main.train_step)"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | NO_NETWORK, start_new_session=True)


def at_epoch(monkeypatch, number: int, action) -> None:
    """Call `action` before the epoch of training that is the `number`th from now, the next being 0."""
    import main

    train_epoch, calls = main.train_epoch, iter(range(100))

    def acting(*arguments):
        if next(calls) == number:
            action()
        return train_epoch(*arguments)

    monkeypatch.setattr(main, "train_epoch", acting)


@pytest.fixture
def edited(monkeypatch):
    """Edit a file as it was read at import: edited("main.py", pattern, replacement) -> what it is now."""
    from tinycnn import sources

    def edited(name: str, pattern: str, replacement: str) -> bytes:
        changed, count = re.subn(pattern, replacement, sources.CODE_FILES[name].decode())
        assert count, f"{name} has no {pattern!r} any more: name what it has"
        changed = changed.encode()
        monkeypatch.setitem(sources.CODE_FILES, name, changed)
        if name in sources.COPIED_FILES:
            monkeypatch.setitem(sources.COPIED_FILES, name, changed)
        sources._edited.cache_clear()
        return changed

    yield edited
    monkeypatch.undo()
    sources._edited.cache_clear()


def raising(error: BaseException):
    """An action that raises `error`."""
    def action():
        raise error

    return action


def one_line(stderr: str) -> str:
    """stderr, after checking that it is one line without a traceback."""
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    return stderr


def only_run(tmp_path: Path) -> Path:
    """The folder of the one run in tmp_path/logs."""
    (folder,) = find_runs(tmp_path / "logs")
    return folder


def figures(folder: Path) -> str:
    """The log's table of a run without its seconds."""
    lines = (folder / "model_accuracy.log").read_text().splitlines()
    return "\n".join(line.rsplit(maxsplit=1)[0] for line in lines if not line.startswith("#"))


def weights_of(folder: Path) -> bytes:
    """The final weights of a run with their metadata, byte for byte."""
    return (folder / "final.safetensors").read_bytes()


def example_inputs(**changes):
    """What a run of these settings on the ten classes of drawn images begins with."""
    from config import Config
    from tinycnn.runs.inputs import Inputs

    config = Config(dataset="synthetic", batches="device", threads=1, **changes)
    return Inputs(config, synthetic().hold_out(config.validation), {"init": [], "teacher": []}, torch.device("cpu"))


def example_record(**changes) -> dict:
    """A config.json of a run of these settings."""
    return copy.deepcopy(_example_record(tuple(changes.items())))


@functools.cache
def _example_record(changes: tuple) -> dict:
    from model import Net
    from tinycnn.network.summary import describe_network
    from tinycnn.runs.inputs import make_record

    return make_record(example_inputs(**dict(changes)), describe_network(Net()), 1)


def example_row(epoch: int) -> dict[str, float]:
    """An epoch's row of the log."""
    return {"epoch": epoch, "lr": 0.01 / (epoch + 1), "train_loss": 1.5, "train_acc": 45.678, "test_loss": 1.25,
            "test_acc": 1.0, "seconds": 9.876}
