"""A folder of the user's own images: DIR/train/<class>/* and DIR/test/<class>/*."""

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL

from config import SIDE, UserError
from tinycnn.data.dataset import Dataset, DatasetMissing, Split, empty_split
from tinycnn.data.decoding import JPEG_SUFFIXES, decode_all
from tinycnn.text import listed, plural, printable

TRAINING_SUFFIXES = {".png", *JPEG_SUFFIXES}
SPLITS = ("train", "test")
CACHE = ".images.cache"
FORMER_CACHE = ".cache.npz"
HASH_BYTES = 32
HAS_CHANGE_TIME = os.name != "nt"  # in st_ctime, which is when a file was made there


def image_folder(root: Path) -> Dataset:
    """Load `root`/train/<class>/* and `root`/test/<class>/*, PNG or JPEG; images of other sizes are resized to 32x32.

    The decoded images are kept in `root`/.images.cache, until a file is added, removed or changed. Raises UserError where the
    folders or files can't be used, DatasetMissing where there are none.
    """
    class_names, left_out = _class_names(root)
    paths: list[str] = []
    labels: list[int] = []
    counts = []
    for split in SPLITS:
        for label, name in enumerate(class_names):
            files, others = _image_files(root / split / name)
            paths += files
            labels += [label] * len(files)
            left_out += [f"{split}/{name}/{other}" for other in others]
        counts.append(len(paths))
    if left_out:
        print(printable(f"left out {len(left_out):,} in {root} that are no PNG or JPEG files in train/<class> or test/<class>: "
                        f"{listed(left_out)}"), file=sys.stderr)
    images = _load_images(root, paths)
    train, test = (Split(images[part], np.array(labels[part], dtype=np.int64))
                   for part in (slice(counts[0]), slice(counts[0], None)))
    return Dataset("folder", class_names, train, test, empty_split())


def has_training_classes(root: Path) -> bool:
    """Whether there is a folder `root`/train/<class>."""
    try:
        return any(entry.is_dir() for entry in os.scandir(root / "train"))
    except OSError:
        return False


def _class_names(root: Path) -> tuple[tuple[str, ...], list[str]]:
    """The names of the classes; what else lies in `root`/train and `root`/test."""
    names, left_out = {}, []
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            state = "the link leads nowhere" if folder.is_symlink() else "there is no such folder"
            raise DatasetMissing(printable(f"{folder}: {state}. --dataset folder needs DIR/train/<class>/* and "
                                           "DIR/test/<class>/* in the DIR that --data-dir names"))
        entries = _visible_entries(folder)
        names[split] = [entry.name for entry in entries if entry.is_dir()]
        left_out += [f"{split}/{entry.name}" for entry in entries if not entry.is_dir()]
    train, test = set(names["train"]), set(names["test"])
    if train != test:
        raise UserError(printable(
            f"the classes differ: in {root / 'train'} only: {listed([*map(_exactly, train - test)])}; in {root / 'test'} only: "
            f"{listed([*map(_exactly, test - train)])}; every class needs a folder of its name in both"))
    if len(train) < 2:
        raise UserError(printable(f"{root / 'train'} holds {plural(len(train), 'class folder')}, but training needs at least "
                                  "two"))
    return tuple(names["train"]), left_out


def _exactly(name: str) -> str:
    """`name`, spelled out where another one may look the same: spaces at its ends, composed and decomposed letters."""
    return name if name.isascii() and name == name.strip() else f"{name} ({name!a})"


def _image_files(folder: Path) -> tuple[list[str], list[str]]:
    """The paths of the PNG and JPEG files in `folder`, and the names of what else it holds."""
    files, others = [], []
    for entry in _visible_entries(folder):
        if os.path.splitext(entry.name)[1].lower() in TRAINING_SUFFIXES and entry.is_file():
            files.append(entry.path)
        else:
            others.append(entry.name)
    if not files:
        only = f", only {listed(others)}" if others else ""
        raise UserError(printable(f"{folder} holds no PNG or JPEG files{only}: put the images of its class directly there"))
    return files, others


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What `folder` holds, by name, without what is hidden. Raises UserError where links lead nowhere."""
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    broken = [entry.name for entry in entries if entry.is_symlink() and not os.path.exists(entry.path)]
    if broken:
        raise UserError(printable(f"{folder} holds {plural(len(broken), 'link')} to what is not there: {listed(broken)}; "
                                  "repair or remove them"))
    return entries


# ---------------------------------------------------------------- the cache

def _load_images(root: Path, paths: list[str]) -> np.ndarray:
    """The images of all files, uint8, N x 32 x 32 x 3, from the cache where it holds those.

    The cache is a SHA-256 of the files' state and of the pixels, then the pixels: one that is cut short, or of other files, is
    not believed.
    """
    cache, state = root / CACHE, _state(paths)
    shape = (len(paths), SIDE, SIDE, 3)
    with suppress(OSError):
        if cache.is_file() and cache.stat().st_size == HASH_BYTES + np.prod(shape):
            content = np.fromfile(cache, dtype=np.uint8)
            if content[:HASH_BYTES].tobytes() == _hash(state, content[HASH_BYTES:]):
                return content[HASH_BYTES:].reshape(shape)
    images = decode_all(paths)
    try:
        cache.unlink(missing_ok=True)  # another run may be reading it
        with cache.open("xb") as file:
            file.write(_hash(state, images))
            images.tofile(file)
        (root / FORMER_CACHE).unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            cache.unlink(missing_ok=True)
        print(printable(f"the decoded images could not be kept in {cache} ({error.strerror}): they will be decoded again next "
                        "time"), file=sys.stderr)
    return images


def _hash(state: bytes, pixels: np.ndarray) -> bytes:
    digest = hashlib.sha256(state)
    digest.update(pixels.data)
    return digest.digest()


def _state(paths: list[str]) -> bytes:
    """A hash that changes with the files, even where names, sizes and times are kept: nobody can set a change time or an inode.
    Where the system has no change times, the files are read. Of 60,000 small ones that takes eight times as long (3.0 against
    0.4 CPU seconds), and decoding them eight times as long again."""
    digest = hashlib.sha256(f"{SIDE} {PIL.__version__} white".encode())  # another decoder, another cache
    for path in paths:
        if HAS_CHANGE_TIME:
            status = os.stat(path)
            digest.update(f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        else:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.digest()
