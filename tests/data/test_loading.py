"""Which images a config gets; CIFAR-10, there or not."""

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import NO_NETWORK, REFERENCE, ROOT, write_folder
from test_dataset import assert_whole

from config import Config, UserError
from tinycnn.data import cifar10 as cifar10_module
from tinycnn.data.loading import BANNER, load_images, resolve_dataset
from tinycnn.runs.record import read_record


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and a working directory without data."""
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- without CIFAR-10

@pytest.mark.usefixtures("offline")
def test_without_data_and_network_cifar10_ends_with_one_error(tmp_path):
    with pytest.raises(UserError, match=r"could not be downloaded .*--data-dir.*--dataset folder or --dataset synthetic"):
        load_images("cifar10", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("offline")
def test_without_data_and_network_auto_is_a_demonstration(tmp_path, capsys):
    images = load_images("auto", Config.data_dir)
    assert images.kind == "synthetic"
    out, err = capsys.readouterr()
    assert "could not be downloaded" in err
    assert BANNER in out
    resolved = resolve_dataset(Config(), images)
    assert (resolved.dataset, resolved.epochs) == ("synthetic", 5)
    assert resolve_dataset(Config(epochs=3), images).epochs == 3
    assert resolve_dataset(Config(dataset="synthetic"), images).epochs == 80


@pytest.mark.usefixtures("offline")
def test_a_named_folder_without_cifar10_is_an_error_not_a_demonstration(tmp_path):
    for name in (tmp_path / "none" / "within", tmp_path):
        with pytest.raises(UserError, match=r"CIFAR-10 is not in .* and could not be downloaded .*--dataset synthetic"):
            load_images("auto", str(name))
    assert not list(tmp_path.iterdir())  # of the folders that were made


@pytest.mark.usefixtures("offline")
def test_a_folder_of_images_is_recognized(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "data", 2, 1)
    with pytest.raises(UserError, match=r"could not be downloaded .*: add --dataset folder"):
        load_images("cifar10", str(root))
    load_images("auto", "data")
    assert "add --dataset folder" in capsys.readouterr().err
    monkeypatch.setattr("tinycnn.data.loading.cifar10", lambda root: pytest.fail("170 MB were about to be downloaded into it"))
    with pytest.raises(UserError, match=r"data holds train/<class>, not CIFAR-10: add --dataset folder"):
        load_images("auto", str(root))


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_a_damaged_batch_is_an_error_never_a_demonstration(tmp_path, dataset, inner):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="data_batch_1 is missing"):
        load_images(dataset, str(tmp_path / inner))
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cifar-10-batches-py.data_batch_1 is damaged"):
        load_images(dataset, str(tmp_path / inner))


@pytest.mark.usefixtures("offline")
def test_leftovers_of_killed_downloads_are_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".download-old", tmp_path / ".download-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "cifar-10-python.tar.gz").write_bytes(b"x")
        os.utime(folder, (time.time() - 25 * 3600,) * 2)
    os.utime(old / "cifar-10-python.tar.gz", (time.time() - 25 * 3600,) * 2)
    with pytest.raises(UserError):
        load_images("cifar10", str(tmp_path))
    assert not old.exists()
    assert young.exists()


def test_only_a_download_needs_torchvision(tmp_path):
    """A torchvision that doesn't match torch raises when it is imported."""
    broken = tmp_path / "broken" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    write_folder(tmp_path / "pictures", 2, 1)
    code = f"""if True:
        import sys; sys.path[:0] = [{str(tmp_path / "broken")!r}, {str(ROOT)!r}]
        import tinycnn.data.batches
        from config import UserError
        from tinycnn.data.loading import load_images
        print(len(load_images("folder", {str(tmp_path / "pictures")!r}).train), len(load_images("synthetic", "data").train))
        try:
            load_images("auto", {str(tmp_path)!r})
        except UserError as error:
            print(error)"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "6 5000"
    assert "torchvision, which can't be imported (operator torchvision::nms does not exist)" in out[1]


def take_for_official(monkeypatch, contents: dict[str, dict]) -> dict[str, bytes]:
    """Pickle these files, and have the program take them for CIFAR-10's: "test", "names", and all others for training."""
    batches = {name: pickle.dumps(content) for name, content in contents.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in batches.items()}
    monkeypatch.setattr(cifar10_module, "TRAIN_FILES", {name: md5[name] for name in md5 if name not in ("test", "names")})
    monkeypatch.setattr(cifar10_module, "TEST_FILES", {"test": md5["test"]})
    monkeypatch.setattr(cifar10_module, "NAMES_FILE", ("names", md5["names"]))
    return batches


def test_batches_are_read_where_their_md5_is_the_official_one(tmp_path, monkeypatch):
    """Small batches in the format of the official ones: pixels in the order channel, row, column."""
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    pixels, labels = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), rng.integers(0, 3, 9)
    contents = {name: {"data": pixels[part].transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": labels[part].tolist()}
                for name, part in (("one", slice(0, 4)), ("two", slice(4, 7)), ("test", slice(7, 9)))}
    batches = take_for_official(monkeypatch, contents | {"names": {"label_names": ["a", "b", "c"]}})
    for name, data in batches.items():
        (folder / name).write_bytes(data)
    images = load_images("cifar10", str(tmp_path))
    assert images.class_names == ("a", "b", "c")
    for split, part in ((images.train, slice(0, 7)), (images.test, slice(7, 9))):
        assert np.array_equal(split.images, pixels[part])
        assert np.array_equal(split.labels, labels[part])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
    for name, whole in batches.items():
        (folder / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_images("cifar10", str(tmp_path))
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("broken", [False, True])
def test_cifar10_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, broken):
    contents = {"one": {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]},
                "test": {"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, "names": {"label_names": ["a", "b"]}}
    batches, timeouts = take_for_official(monkeypatch, contents), []

    def download(root, download):
        assert download
        timeouts.append(socket.getdefaulttimeout())
        (Path(root) / "cifar-10-batches-py").mkdir()
        for name, data in batches.items():
            (Path(root) / "cifar-10-batches-py" / name).write_bytes(data)
            if broken:
                raise OSError("the connection was lost")

    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR10=download))
    if broken:
        with pytest.raises(UserError, match="could not be downloaded"):
            load_images("cifar10", str(tmp_path / "data"))
        assert not (tmp_path / "data").exists()
    else:
        assert len(load_images("cifar10", str(tmp_path / "data")).train) == 2
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]
    assert timeouts == [cifar10_module.TIMEOUT]
    assert socket.getdefaulttimeout() is None


# ---------------------------------------------------------------- with CIFAR-10

def test_the_real_cifar10(cifar10, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for data_dir in (cifar10, cifar10 / "cifar-10-batches-py"):
        data = load_images("auto", str(data_dir))
        assert_whole(data, 10)
        assert (data.kind, len(data.train), len(data.test)) == ("cifar10", 50_000, 10_000)
    assert data.class_names[3] == "cat"
    assert data.fingerprint == read_record(REFERENCE)["dataset"]["sha256"]
    mean, std = data.statistics
    assert np.allclose(mean, (0.4914, 0.4822, 0.4465), atol=1e-4)  # the figures that everybody prints
    assert np.allclose(std, (0.2470, 0.2435, 0.2616), atol=1e-4)
    assert np.bincount(data.hold_out(5000).validation.labels).tolist() == [500] * 10


def test_a_flipped_byte_in_a_real_batch_is_named(cifar10, tmp_path):
    target = tmp_path / "cifar-10-batches-py"
    target.mkdir()
    for file in (cifar10 / "cifar-10-batches-py").iterdir():
        (target / file.name).symlink_to(file)
    content = bytearray((cifar10 / "cifar-10-batches-py" / "data_batch_3").read_bytes())
    content[1_000_000] ^= 1
    (target / "data_batch_3").unlink()
    (target / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        load_images("cifar10", str(tmp_path))
