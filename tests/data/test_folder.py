"""Folders of the user's own images, and their cache."""

import os
import shutil
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image
from test_dataset import assert_whole

from config import UserError
from tinycnn.data import folder
from tinycnn.data.dataset import Dataset
from tinycnn.data.folder import image_folder

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


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


def test_other_sizes_are_resized_with_one_notice(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    for number in range(3):
        Image.new("RGB", (100, 50), "green").save(root / "train" / "disc" / f"big{number}.jpeg")
    assert len(image_folder(root).train) == 9
    assert capsys.readouterr().err.count("3 of 12 images had another size") == 1


def test_jpeg_has_several_names(tmp_path):
    root = write_folder(tmp_path, 2, 1)
    for name in ("a.jfif", "b.jpe", "c.JPG"):
        Image.new("RGB", (32, 32), "red").save(root / "train" / "disc" / name, "JPEG")
    assert len(image_folder(root).train) == 9


def test_what_is_left_out_is_named_in_one_line(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    (root / "train" / "disc" / "notes.txt").write_text("x")
    (root / "train" / "disc" / "IMG_1.heic").write_text("x")
    (root / "train" / "disc" / ".hidden").write_text("x")
    (root / "train" / "stray.png").write_text("x")
    (root / "test" / "ring" / "folder.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "test" / "ring" / "pipe.png")
    assert len(image_folder(root).train) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out {5 if hasattr(os, 'mkfifo') else 4} in ")
    for name in ("train/disc/notes.txt", "train/disc/IMG_1.heic", "train/stray.png", "test/ring/folder.png"):
        assert name in line
    assert "hidden" not in line


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
    ("no train", r"train: there is no such folder\. --dataset folder needs DIR/train"),
    ("lone class", r"in \S*train only: extra; in \S*test only: none; every class needs a folder"),
    ("renamed class", r"in \S*train only: ring; in \S*test only: rings; every class needs a folder"),
    ("empty class", "void holds no PNG or JPEG"), ("one class", "holds 1 class folder,"),
    ("truncated", r"broken.jpg is not a whole image"), ("text", r"text.png is not a whole image")])
def test_a_wrong_folder_is_refused_by_name(tmp_path, kind, words):
    root = write_folder(tmp_path, 2, 1)
    damage(kind, root)
    with pytest.raises(UserError, match=words):
        image_folder(root)
    assert not list(root.glob(".*"))


@needs_links
@pytest.mark.parametrize(("places", "words"), [
    (["train/cat", "test/cat"], "train holds 1 link to what is not there: cat; repair or remove them"),
    (["test/cat"], "test holds 1 link to what is not there: cat"),
    (["train/ring/b.png", "train/ring/a.png"], "ring holds 2 links to what is not there: a.png, b.png"),
    (["train/ring/loop.png"], "ring holds 1 link to what is not there: loop.png")])
def test_links_to_what_is_not_there_are_named(tmp_path, places, words):
    root = write_folder(tmp_path, 2, 1)
    for place in places:
        (root / place).symlink_to(root / place if "loop" in place else "/gone/disk")
    with pytest.raises(UserError, match=words):
        image_folder(root)
    for place in places:
        (root / place).unlink()
    shutil.rmtree(root / "train")
    (root / "train").symlink_to("/gone/disk")
    with pytest.raises(UserError, match="train: the link leads nowhere"):
        image_folder(root)


@needs_links
def test_links_to_what_is_there_are_followed(tmp_path):
    root, other = write_folder(tmp_path / "a", 2, 1), write_folder(tmp_path / "b", 3, 1)
    shutil.rmtree(root / "train" / "ring")
    (root / "train" / "ring").symlink_to(other / "train" / "ring")
    (root / "train" / "disc" / "link.png").symlink_to(other / "train" / "disc" / "0.png")
    assert np.bincount(image_folder(root).train.labels).tolist() == [3, 3, 2]


@pytest.mark.parametrize(("other", "spelled"), [
    (unicodedata.normalize("NFD", "café"), r"'caf\\xe9'.*'cafe\\u0301'"), ("café ", r"'caf\\xe9'.*'caf\\xe9 '")])
def test_names_that_look_alike_are_spelled_out(tmp_path, other, spelled):
    root = write_folder(tmp_path, 2, 1)
    (root / "train" / "ring").rename(root / "train" / "café")
    (root / "test" / "ring").rename(root / "test" / other)
    if {entry.name for entry in (root / "test").iterdir()} != {"disc", "square", other}:
        pytest.skip("the file system changes such names")
    with pytest.raises(UserError, match=spelled):
        image_folder(root)


def test_one_error_names_up_to_ten_broken_images_and_their_count(tmp_path):
    root = write_folder(tmp_path, 20, 1)
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
    assert r"train/red\x1b[31m\nline/notes.txt" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"class red\\x1b\[31m\\nline has only 2"):
        Dataset("folder", (name, "other"), data.train, data.test, data.validation).hold_out(6)
    (root / "test" / name).rename(root / "test" / "blue")
    with pytest.raises(UserError, match=r"train only: red\\x1b\[31m\\nline; in"):
        image_folder(root)


# ---------------------------------------------------------------- the cache

def paint(root: Path, values: dict[str, int]) -> None:
    """Write an image of one value as 0.png of both splits of each class; all files have the same size and times."""
    for split in ("train", "test"):
        for name, value in values.items():
            path = root / split / name / "0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (value,) * 3).save(path, compress_level=0)
            os.utime(path, (0, 0))


def test_the_cache_is_used_until_the_folder_changes(tmp_path, monkeypatch):
    root = write_folder(tmp_path, 2, 1)
    (root / ".cache.npz").write_bytes(b"of a former version")
    before = image_folder(root)
    assert [path.name for path in root.glob(".*")] == [folder.CACHE]
    with monkeypatch.context() as context:
        context.setattr(folder, "decode_all", lambda paths: pytest.fail("decoded again"))
        assert image_folder(root).fingerprint == before.fingerprint
    Image.new("RGB", (32, 32), "red").save(root / "train" / "ring" / "new.png")
    assert len(image_folder(root).train) == 7
    (root / "train" / "ring" / "new.png").unlink()
    assert len(image_folder(root).train) == 6


@pytest.mark.parametrize("has_change_time", [True, False])
@pytest.mark.parametrize("change", ["overwritten", "replaced", "classes swapped", "files swapped", "link turned"])
def test_changes_that_keep_names_sizes_and_times_are_seen(tmp_path, monkeypatch, change, has_change_time):
    """As tar --mtime, rsync -t and mv make them. Where there is no change time, the files are read."""
    if has_change_time and not folder.HAS_CHANGE_TIME:
        pytest.skip("no change times")
    monkeypatch.setattr(folder, "HAS_CHANGE_TIME", has_change_time)
    root, expected = tmp_path / "pictures", [9, 90]
    paint(root, {"cat": 0, "dog": 90})
    if change == "link turned":
        paint(tmp_path / "versions", {"0": 0, "9": 9})
        (root / "train" / "cat" / "0.png").unlink()
        (root / "train" / "cat" / "0.png").symlink_to(tmp_path / "versions" / "train" / "0" / "0.png")
    assert image_folder(root).train.images[:, 0, 0, 0].tolist() == [0, 90]
    first = root / "train" / "cat" / "0.png"
    if change == "overwritten":
        paint(root, {"cat": 9})
    elif change == "replaced":
        paint(tmp_path / "other", {"cat": 9})
        os.replace(tmp_path / "other" / "train" / "cat" / "0.png", first)
    elif change == "link turned":
        first.unlink()
        first.symlink_to(tmp_path / "versions" / "train" / "9" / "0.png")
    else:
        expected = [90, 0]
        one, two = (root / "train" / name / ("" if change == "classes swapped" else "0.png") for name in ("cat", "dog"))
        one.rename(root / "x")
        two.rename(one)
        (root / "x").rename(two)
    assert image_folder(root).train.images[:, 0, 0, 0].tolist() == expected


def test_files_of_the_same_moment_are_told_apart(monkeypatch):
    def stat(path):
        return SimpleNamespace(st_ino=int(path), st_size=9, st_mtime_ns=0, st_ctime_ns=0)

    monkeypatch.setattr(folder, "os", SimpleNamespace(stat=stat))
    monkeypatch.setattr(folder, "HAS_CHANGE_TIME", True)
    assert folder._state(["1", "2"]) != folder._state(["2", "1"])


def test_no_damaged_cache_is_believed(tmp_path, capfd):
    root, rng = write_folder(tmp_path, 2, 1), np.random.default_rng(0)
    before, cache = image_folder(root).fingerprint, root / folder.CACHE
    whole = cache.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
               for place in (0, 31, 32, *rng.integers(len(whole), size=9))]
    for damaged in (*flipped, b"", whole[:31], whole[:-1], whole + b"x", whole[:32] + bytes(len(whole) - 32)):
        cache.write_bytes(damaged)
        assert image_folder(root).fingerprint == before
        assert cache.read_bytes() == whole  # it was made anew
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_in_place_of_the_cache_is_not_waited_for(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    os.mkfifo(root / folder.CACHE)
    assert len(image_folder(root).train) == 6
    assert (root / folder.CACHE).is_file()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    root = write_folder(tmp_path, 2, 1)
    (root / folder.CACHE).mkdir()
    assert len(image_folder(root).train) == 6
    assert "could not be kept" in capsys.readouterr().err
