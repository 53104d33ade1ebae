"""Folders of the user's own images, and their cache."""

import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image
from test_dataset import assert_whole

from config import UserError
from tinycnn.data import decoding, folder
from tinycnn.data.dataset import Images
from tinycnn.data.folder import image_folder


def test_a_folder_gives_the_same_thing(pictures):
    data = image_folder(pictures)
    assert_whole(data, 3)
    assert (len(data.train), len(data.test)) == (48, 24)
    assert data.class_names == ("disc", "ring", "square")
    for split, part in (("train", data.train), ("test", data.test)):
        files = sorted((label, path.name, path) for label, name in enumerate(data.class_names)
                       for path in (pictures / split / name).iterdir())
        assert part.labels.tolist() == [label for label, _, _ in files]
        assert all(np.array_equal(image, Image.open(path)) for image, (_, _, path) in zip(part.images, files, strict=True))


def test_many_files_are_decoded_by_several_processes_alike(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 4, 2)
    alone = image_folder(root)
    (root / ".cache.npz").unlink()
    monkeypatch.setattr(decoding, "SINGLE_PROCESS_FILES", 0)
    assert image_folder(root).fingerprint == alone.fingerprint


def test_other_sizes_are_resized_with_one_notice(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    for number in range(3):
        Image.new("RGB", (100, 50), "green").save(root / "train" / "disc" / f"big{number}.jpeg")
    assert len(image_folder(root).train) == 9
    assert capsys.readouterr().err.count("3 of 12 images had another size") == 1


def test_other_files_are_left_out_with_a_notice(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    (root / "train" / "disc" / "notes.txt").write_text("x")
    (root / "train" / "disc" / ".hidden").write_text("x")
    (root / "test" / "ring" / "folder.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "test" / "ring" / "pipe.png")
    assert len(image_folder(root).train) == 6
    err = capsys.readouterr().err
    assert "disc: left out 1 of 3 entries, which are no PNG or JPEG files" in err
    assert f"ring: left out {2 if hasattr(os, 'mkfifo') else 1} of" in err


# ---------------------------------------------------------------- what is refused

def damage(kind: str, root: Path) -> None:
    if kind == "no train":
        (root / "train").rename(root / "training")
    elif kind == "lone class":
        (root / "train" / "extra").mkdir()
    elif kind == "renamed class":
        (root / "test" / "ring").rename(root / "test" / "rings")
    elif kind == "empty class":
        for split in ("train", "test"):
            (root / split / "void").mkdir()
    elif kind == "one class":
        for split in ("train", "test"):
            for name in ("ring", "square"):
                (root / split / name).rename(root / f"{split}-{name}")
    elif kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "test" / "ring" / "broken.jpg")
        whole = (root / "test" / "ring" / "broken.jpg").read_bytes()
        (root / "test" / "ring" / "broken.jpg").write_bytes(whole[:len(whole) // 2])
    elif kind == "text":
        (root / "train" / "ring" / "text.png").write_text("not a picture")


@pytest.mark.parametrize(("kind", "words"), [
    ("no train", "there is no folder .*train"),
    ("lone class", r"in \S*train only: extra; in \S*test only: none; every class needs a folder"),
    ("renamed class", r"in \S*train only: ring; in \S*test only: rings; every class needs a folder"),
    ("empty class", "void holds no PNG or JPEG"), ("one class", "holds 1 class folder,"),
    ("truncated", r"broken.jpg is not a whole image"), ("text", r"text.png is not a whole image")])
def test_a_wrong_folder_is_refused_by_name(tmp_path, kind, words):
    root = write_folder(tmp_path, 2, 1)
    damage(kind, root)
    with pytest.raises(UserError, match=words):
        image_folder(root)
    assert not list(root.glob(".cache*"))


@pytest.mark.parametrize("processes", [False, True])
def test_one_error_names_up_to_ten_broken_images_and_their_count(tmp_path, monkeypatch, processes):
    root = write_folder(tmp_path, 20, 1)
    monkeypatch.setattr(decoding, "SINGLE_PROCESS_FILES", 0 if processes else 5000)
    for number in range(12):
        (root / "train" / "ring" / f"{number}.png").write_text("not a picture")
    with pytest.raises(UserError) as caught:
        image_folder(root)
    message = str(caught.value)
    assert message.startswith("12 of 63 files can't be used: ")
    assert message.count(".png is not a whole image") == 10
    assert message.endswith("; and 2 more: replace or remove it")
    for number in range(2, 12):
        Image.new("RGB", (32, 32)).save(root / "train" / "ring" / f"{number}.png")
    with pytest.raises(UserError, match=r"^2 of 63 .*ring.0\.png is .*ring.1\.png is .*\): replace or remove it$"):
        image_folder(root)


def test_names_of_classes_are_escaped_where_they_are_shown(tmp_path, capsys):
    root, name = write_folder(tmp_path, 2, 1), "red\x1b[31m\nline"
    for split in ("train", "test"):
        (root / split / "ring").rename(root / split / name)
    (root / "train" / name / "notes.txt").write_text("x")
    data = image_folder(root)
    assert name in data.class_names
    assert r"red\x1b[31m\nline: left out 1 of 3" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"class red\\x1b\[31m\\nline has only 2"):
        Images("folder", (name, "other"), data.train, data.test, data.validation).hold_out(6)
    (root / "test" / name).rename(root / "test" / "blue")
    with pytest.raises(UserError, match=r"train only: red\\x1b\[31m\\nline; in"):
        image_folder(root)


# ---------------------------------------------------------------- the cache

def test_the_cache_is_used_until_the_folder_changes(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 2, 1)
    before = image_folder(root)
    monkeypatch.setattr(folder, "decode_all", lambda paths: pytest.fail("decoded again"))
    assert image_folder(root).fingerprint == before.fingerprint
    monkeypatch.undo()

    Image.new("RGB", (32, 32), "red").save(root / "train" / "ring" / "new.png")
    after = image_folder(root)
    assert len(after.train) == 7
    changed = root / "test" / "disc" / "0.png"
    Image.new("RGB", (32, 32), "blue").save(changed)
    assert (image_folder(root).test.images == [0, 0, 255]).all((1, 2, 3)).any()
    (root / "train" / "ring" / "new.png").unlink()
    assert len(image_folder(root).train) == 6


def test_a_file_changed_at_the_same_size_is_decoded_again(tmp_path):
    root = write_folder(tmp_path, 2, 1)
    path = root / "test" / "disc" / "0.png"
    Image.new("RGB", (32, 32), "red").save(path, compress_level=0)
    size = path.stat().st_size
    assert (image_folder(root).test.images[0] == [255, 0, 0]).all()
    Image.new("RGB", (32, 32), "blue").save(path, compress_level=0)
    os.utime(path, (time.time() + 5,) * 2)
    assert path.stat().st_size == size
    assert (image_folder(root).test.images[0] == [0, 0, 255]).all()


def tampered(kind: str, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A cache whose hash of the folder is right, and that of the pixels too but for "pixels"."""
    images = stored["images"]
    changes = {
        "pixels": lambda: images ^ 1, "floats": lambda: images.astype(np.float32), "too few": lambda: images[:-1],
        "too many": lambda: np.concatenate([images, images]), "16 pixels": lambda: images[:, ::2, ::2].copy(),
        "signed": lambda: images.astype(np.int8), "by columns": lambda: np.asfortranarray(images),
        "objects": lambda: images.astype(object), "flat": lambda: images.ravel(), "nothing": lambda: np.zeros(0, np.uint8)}
    images = changes[kind]()
    return {"state": stored["state"], "images": images,
            "hash": stored["hash"] if kind == "pixels" else np.array(folder._pixel_hash(np.ascontiguousarray(images)))}


@pytest.mark.parametrize("kind", ["pixels", "floats", "too few", "too many", "16 pixels", "signed", "by columns", "objects",
                                  "flat", "nothing"])
def test_a_cache_that_does_not_fit_the_files_is_not_believed(tmp_path, kind):
    root = write_folder(tmp_path, 2, 1)
    before = image_folder(root)
    with np.load(root / ".cache.npz") as stored:
        changed = tampered(kind, dict(stored))
    np.savez(root / ".cache.npz", allow_pickle=kind == "objects", **changed)
    after = image_folder(root)
    assert_whole(after, 3)
    assert after.fingerprint == before.fingerprint
    with np.load(root / ".cache.npz") as stored:
        assert np.array_equal(stored["images"][:6], before.train.images)  # it was made anew


def test_labels_come_from_the_folders_not_from_the_cache(tmp_path):
    """A cache of an earlier release, which held labels, is made anew too."""
    root = write_folder(tmp_path, 2, 1)
    before = image_folder(root)
    with np.load(root / ".cache.npz") as stored:
        state = stored["state"]
    arrays = {f"{name}_{what}": getattr(split, what) for name, split in (("train", before.train), ("test", before.test))
              for what in ("images", "labels")}
    np.savez(root / ".cache.npz", state=state, **arrays | {"train_labels": np.full(6, 99)})
    assert image_folder(root).fingerprint == before.fingerprint


def test_a_cache_that_would_unpack_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 2, 1)
    before = image_folder(root)
    with zipfile.ZipFile(root / ".cache.npz", "a", zipfile.ZIP_DEFLATED) as cache:
        cache.writestr("more.npy", bytes(10**7))
    opened = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: opened.append(key))
    assert image_folder(root).fingerprint == before.fingerprint
    assert not opened


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_in_place_of_the_cache_is_not_waited_for(tmp_path):
    root = write_folder(tmp_path, 2, 1)
    os.mkfifo(root / ".cache.npz")
    assert len(image_folder(root).train) == 6


def test_no_mutated_cache_is_believed(tmp_path, capfd):
    root = write_folder(tmp_path, 2, 1)
    before, rng = image_folder(root).fingerprint, np.random.default_rng(0)
    whole = (root / ".cache.npz").read_bytes()
    for number in range(100):
        mutated = bytearray(whole)
        place = int(rng.integers(len(whole)))
        if number % 4 == 0:
            mutated = mutated[:place]
        elif number % 4 == 1:
            mutated[place:place + 8] = rng.bytes(8)
        else:
            mutated[place] ^= 1 << int(rng.integers(8))
        (root / ".cache.npz").write_bytes(mutated)
        assert image_folder(root).fingerprint == before
    assert capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path, 2, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(image_folder(root).train) == 6
    assert "could not be kept" in capsys.readouterr().err
    assert not list(root.glob(".cache*"))


def test_leftovers_of_killed_runs_are_removed_after_a_day(tmp_path):
    root = write_folder(tmp_path, 2, 1)
    old, young, other = root / ".cache-0123abcd.npz", root / ".cache-4567abcd.npz", root / "cache-0.npz"
    for path in (old, young, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    os.utime(young, (time.time() - 23 * 3600,) * 2)
    image_folder(root)
    assert not old.exists()
    assert young.exists()
    assert other.exists()
    assert (root / ".cache.npz").exists()
