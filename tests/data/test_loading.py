"""Which dataset a config gets; CIFAR-10, there or not."""

import errno
import hashlib
import io
import os
import pickle
import shutil
import socket
import ssl
import tarfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from conftest import NO_NETWORK, REFERENCE, synthetic, write_folder
from test_dataset import assert_whole

from config import Config, UserError
from tinycnn.data import cifar10 as cifar10_module
from tinycnn.data import loading
from tinycnn.data.cifar10 import NoConnection
from tinycnn.data.loading import BANNER, load_ahead, load_dataset, resolve_auto
from tinycnn.runs.record import read_record


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and a working directory without data."""
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would keep the proxies of before
    monkeypatch.setattr("tinycnn.data.loading.synthetic", synthetic)  # drawn already
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- without CIFAR-10

@pytest.mark.usefixtures("offline")
def test_without_data_and_network_cifar10_ends_with_one_error(tmp_path):
    with pytest.raises(UserError, match=r"could not be downloaded .*--data-dir.*--dataset folder or --dataset synthetic"):
        load_dataset("cifar10", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("offline")
def test_without_data_and_network_auto_is_a_demonstration(tmp_path, capsys):
    dataset = load_dataset("auto", Config.data_dir)
    assert dataset.kind == "synthetic"
    out, err = capsys.readouterr()
    assert "could not be downloaded" in err
    assert BANNER in out
    resolved = resolve_auto(Config(), dataset)
    assert (resolved.dataset, resolved.epochs) == ("synthetic", 5)
    assert resolve_auto(Config(epochs=3), dataset).epochs == 3
    assert resolve_auto(Config(warmup=20), dataset).warmup == 4
    assert resolve_auto(Config(dataset="synthetic"), dataset).epochs == 80


@pytest.mark.usefixtures("offline")
def test_a_named_folder_without_cifar10_is_an_error_not_a_demonstration(tmp_path):
    for name in (tmp_path / "none" / "within", tmp_path):
        with pytest.raises(UserError, match=r"CIFAR-10 is not in .* and could not be downloaded .*--dataset synthetic"):
            load_dataset("auto", str(name))
    assert not list(tmp_path.iterdir())  # of the folders that were made


@pytest.mark.usefixtures("offline")
def test_a_folder_of_images_is_recognized(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "data", 2, 1)
    with pytest.raises(UserError, match=r"could not be downloaded .*: add --dataset folder"):
        load_dataset("cifar10", str(root))
    load_dataset("auto", "data")
    assert "add --dataset folder" in capsys.readouterr().err
    monkeypatch.setattr("tinycnn.data.loading.cifar10", lambda root: pytest.fail("170 MB were about to be downloaded into it"))
    with pytest.raises(UserError, match=r"data holds train/<class>, not CIFAR-10: add --dataset folder"):
        load_dataset("auto", str(root))


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_a_damaged_batch_is_an_error_never_a_demonstration(tmp_path, dataset, inner):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="data_batch_1 is missing"):
        load_dataset(dataset, str(tmp_path / inner))
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cifar-10-batches-py.data_batch_1 is damaged"):
        load_dataset(dataset, str(tmp_path / inner))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.usefixtures("offline")
def test_a_link_to_cifar10_that_is_not_there_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-batches-py").symlink_to("/gone/disk")
    with pytest.raises(UserError, match="cifar-10-batches-py is a link to what is not there: repair or remove it"):
        load_dataset("auto", "data")


@pytest.mark.usefixtures("offline")
def test_leftovers_of_killed_downloads_are_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".download-old", tmp_path / ".download-young"
    for folder, hours in ((old, 25), (young, 23)):
        folder.mkdir()
        (folder / "cifar-10-python.tar.gz").write_bytes(b"x")
        os.utime(folder, (time.time() - hours * 3600,) * 2)
    with pytest.raises(UserError):
        load_dataset("cifar10", str(tmp_path))
    assert not old.exists()
    assert young.exists()


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
    images = load_dataset("cifar10", str(tmp_path))
    assert images.class_names == ("a", "b", "c")
    for split, part in ((images.train, slice(0, 7)), (images.test, slice(7, 9))):
        assert np.array_equal(split.images, pixels[part])
        assert np.array_equal(split.labels, labels[part])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
    for name, whole in batches.items():
        (folder / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_dataset("cifar10", str(tmp_path))
        (folder / name).write_bytes(whole)


def test_loading_ahead_gives_and_raises_the_same(tmp_path, monkeypatch):
    contents = {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 2]}
    batches = take_for_official(monkeypatch, {"one": contents, "test": contents, "names": {"label_names": ["a", "b", "c"]}})
    config = Config(data_dir=str(tmp_path))
    load_ahead(config)  # nothing is there, and nothing is downloaded
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, data in batches.items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
    images = load_dataset("auto", str(tmp_path))
    load_ahead(config)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "cifar10", lambda _: pytest.fail("read twice"))
        assert load_dataset("auto", str(tmp_path)).fingerprint == images.fingerprint
    (tmp_path / "cifar-10-batches-py" / "one").write_bytes(b"")
    load_ahead(config)
    with pytest.raises(UserError, match="one is damaged"):
        load_dataset("auto", str(tmp_path))


# ---------------------------------------------------------------- downloads

@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server in the place of CIFAR-10's. Its `answer` is a status, the bytes to send, and how many bytes it announces."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, content, length = server.answer
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(cifar10_module, "URL", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    for name in NO_NETWORK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def archive(monkeypatch) -> bytes:
    """A small archive like the official one, taken for it."""
    contents = {"one": {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]},
                "test": {"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, "names": {"label_names": ["a", "b"]}}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in take_for_official(monkeypatch, contents).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(cifar10_module, "ARCHIVE_MD5", hashlib.md5(file.getvalue()).hexdigest())
    return file.getvalue()


def test_cifar10_is_downloaded_where_it_is_absent(server, archive):
    server.answer = 200, archive, len(archive)
    for _ in range(2):
        dataset = load_dataset("auto", Config.data_dir)
        assert (dataset.kind, len(dataset.train), len(dataset.test)) == ("cifar10", 2, 1)
        assert [path.name for path in Path("data").iterdir()] == ["cifar-10-batches-py"]
        server.answer = 404, b"", 0  # it is there now


@pytest.mark.parametrize(("fault", "words"), [
    ("error 503", "HTTP Error 503"), ("error 404", "HTTP Error 404"), ("other content", "is not the official archive"),
    ("lost connection", "is not the official archive"), ("file in its place", "File exists|cannot find|Not a directory"),
    ("full disk", "No space left on device")])
def test_a_failed_download_is_an_error_and_no_demonstration(server, archive, monkeypatch, fault, words):
    size = len(archive)
    answers = {"error 503": (503, b"", 0), "error 404": (404, b"", 0), "other content": (200, b"x" + archive[1:], size),
               "lost connection": (200, archive[:100], size)}
    server.answer = answers.get(fault, (200, archive, size))
    if fault == "file in its place":
        Path("data").write_text("x")
    if fault == "full disk":
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=rf"could not be downloaded \(.*({words}).*\): try again, put cifar-10-batches-py"):
        load_dataset("auto", Config.data_dir)
    assert not Path("data").is_dir()


def answering(monkeypatch, error: Exception) -> None:
    def urlopen(*_, timeout):
        assert timeout == cifar10_module.TIMEOUT
        raise error

    monkeypatch.setattr(cifar10_module, "urlopen", urlopen)


@pytest.mark.parametrize("reason", [
    socket.gaierror(-3, "name resolution"), ConnectionRefusedError(), TimeoutError("timed out"),
    OSError(errno.ENETUNREACH, "x"), OSError(errno.EHOSTUNREACH, "x")])
def test_no_connection_is_a_demonstration(monkeypatch, tmp_path, reason, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinycnn.data.loading.synthetic", lambda: "the built-in set")
    answering(monkeypatch, URLError(reason))
    assert load_dataset("auto", Config.data_dir) == "the built-in set"
    assert BANNER in capsys.readouterr().out
    with pytest.raises(NoConnection):
        load_dataset("cifar10", Config.data_dir)


@pytest.mark.parametrize("error", [
    URLError(ssl.SSLCertVerificationError("self-signed")), URLError(OSError("Tunnel connection failed: 403 Forbidden")),
    URLError(ConnectionResetError()), TimeoutError("timed out"), ConnectionResetError(), OSError(errno.EROFS, "read-only")])
def test_a_connection_that_fails_later_is_an_error(monkeypatch, tmp_path, error):
    monkeypatch.chdir(tmp_path)
    answering(monkeypatch, error)
    with pytest.raises(UserError, match=r"could not be downloaded .*: try again"):
        load_dataset("auto", Config.data_dir)


# ---------------------------------------------------------------- with CIFAR-10

def test_the_real_cifar10(cifar10):
    for data_dir in (cifar10, cifar10 / "cifar-10-batches-py"):
        data = load_dataset("auto", str(data_dir))
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
        load_dataset("cifar10", str(tmp_path))
