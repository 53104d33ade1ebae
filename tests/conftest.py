"""What the tests share: a small folder of images, and the program run inside this process or in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.images import synthetic

ROOT = Path(__file__).parents[1]
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
SMALL = ["--workers", "0", "--threads", "1", "--batch-size", "16", "--device", "cpu", "--no-pictures"]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="minutes long: pytest -m slow"))


def write_folder(root: Path, train: int = 16, test: int = 8, classes: int = 3) -> Path:
    """root/train/<class>/*.png and root/test/<class>/*.png: that many drawn images of each class."""
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
def cifar10() -> Path:
    """The folder of the real CIFAR-10."""
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("CIFAR10_DIR does not name a folder with cifar-10-batches-py")
    return Path(os.environ["CIFAR10_DIR"])


@pytest.fixture
def run(pictures, tmp_path, capsys, monkeypatch):
    """Run main.py in this process on the small folder: run("--epochs", "2") -> (status, stdout, stderr); logs in
    tmp_path/logs."""
    import main

    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()

    def run(*arguments: str):
        base = ["--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"), *SMALL]
        if "--resume" in arguments:
            base = ["--log-dir", str(tmp_path / "logs")]
        capsys.readouterr()
        status = main.main([*base, *arguments])
        return status, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


def start(*arguments: str, interval: float | None = None, before: str = "") -> subprocess.Popen:
    """main.py in a process of its own, with pipes; `interval` replaces the seconds between checkpoints, `before` is
    Python to run first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import main; from training import checkpoint\n"
    if interval is not None:
        code += f"checkpoint.INTERVAL = {interval}\n"
    code += f"{before}\nif __name__ == '__main__': sys.exit(main.main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | NO_NETWORK, start_new_session=True)


def at_epoch(monkeypatch, number: int, action) -> None:
    """Call `action` before the epoch of training that is the `number`th from now, the next being 0."""
    from training import loop

    train_epoch, calls = loop.train_epoch, iter(range(100))

    def acting(*arguments):
        if next(calls) == number:
            action()
        return train_epoch(*arguments)

    monkeypatch.setattr(loop, "train_epoch", acting)


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
