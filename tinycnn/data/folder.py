"""A folder of the user's own images: DIR/train/<class>/* and DIR/test/<class>/*."""

import hashlib
import math
import os
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from config import SIDE, UserError
from tinycnn.data.dataset import DatasetMissing, Images, Split, empty_split
from tinycnn.data.decoding import decode_all
from tinycnn.data.leftovers import remove_leftovers
from tinycnn.text import plural, printable

TRAINING_SUFFIXES = {".png", ".jpg", ".jpeg"}
SPLITS = ("train", "test")
LISTED_CLASSES = 10
CACHE_HEADERS = 10_000  # bytes at most that the cache holds beside the pixels


@dataclass
class _Listing:
    """The image files of both splits, those of train first. `labels`: int64. `state`: a hash of names, sizes and times."""

    class_names: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray
    train_count: int
    state: str


def image_folder(root: Path) -> Images:
    """Load `root`/train/<class>/* and `root`/test/<class>/*, PNG or JPEG; images of other sizes are resized to 32x32.

    The decoded images are kept in `root`/.cache.npz, until a file is added, removed or changed.
    """
    listing = _list_files(root)
    remove_leftovers(root, ".cache-*.npz")
    cache = root / ".cache.npz"
    images = _read_cache(cache, listing)
    if images is None:
        images = decode_all(listing.paths)
        _write_cache(cache, listing, images)
    train, test = (Split(images[part], listing.labels[part])
                   for part in (slice(listing.train_count), slice(listing.train_count, None)))
    return Images("folder", listing.class_names, train, test, empty_split())


def has_training_classes(root: Path) -> bool:
    """Whether there is a folder `root`/train/<class>."""
    try:
        return any(entry.is_dir() for entry in os.scandir(root / "train"))
    except OSError:
        return False


def _list_files(root: Path) -> _Listing:
    class_names = _class_names(root)
    digest = hashlib.sha256(f"{SIDE} {PIL.__version__} white".encode())  # another decoder, another cache
    paths: list[str] = []
    labels: list[int] = []
    counts = []
    for split in SPLITS:
        for label, name in enumerate(class_names):
            for entry in _image_files(root / split / name):
                stat = entry.stat()
                digest.update(os.fsencode(f"{split}/{name}/{entry.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
                paths.append(entry.path)
                labels.append(label)
        counts.append(len(paths))
    return _Listing(class_names, paths, np.array(labels, dtype=np.int64), counts[0], digest.hexdigest())


def _class_names(root: Path) -> tuple[str, ...]:
    train, test = (_class_folders(root / split) for split in SPLITS)
    if set(train) != set(test):
        raise UserError(printable(
            f"the classes differ: in {root / 'train'} only: {_some(set(train) - set(test))}; in {root / 'test'} only: "
            f"{_some(set(test) - set(train))}; every class needs a folder of its name in both"))
    if len(train) < 2:
        raise UserError(printable(f"{root / 'train'} holds {plural(len(train), 'class folder')}, but training needs at least "
                                  "two"))
    return tuple(train)


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DatasetMissing(printable(f"there is no folder {folder}: --dataset folder needs DIR/train/<class>/* and "
                                       "DIR/test/<class>/* in the DIR that --data-dir names"))
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _some(names: set[str]) -> str:
    more = f" and {len(names) - LISTED_CLASSES} more" if len(names) > LISTED_CLASSES else ""
    return (", ".join(sorted(names)[:LISTED_CLASSES]) or "none") + more


def _image_files(folder: Path) -> list[os.DirEntry[str]]:
    """The PNG and JPEG files in `folder`, by name. Prints how many other entries are left out; hidden ones don't count."""
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    files = [entry for entry in entries if Path(entry.name).suffix.lower() in TRAINING_SUFFIXES and entry.is_file()]
    if not files:
        raise UserError(printable(f"{folder} holds no PNG or JPEG files: put the images of its class directly there"))
    if len(files) < len(entries):
        print(printable(f"{folder}: left out {len(entries) - len(files)} of {len(entries)} entries, which are no PNG or JPEG "
                        "files"), file=sys.stderr)
    return files


# ---------------------------------------------------------------- the cache

def _pixel_hash(images: np.ndarray) -> str:
    return hashlib.sha256(images.data).hexdigest()


def _read_cache(cache: Path, listing: _Listing) -> np.ndarray | None:
    """The images of all files, uint8, N x 32 x 32 x 3; None where the cache doesn't fit the files or is damaged.

    Labels are not cached: the names of the folders say them.
    """
    shape = (len(listing.paths), SIDE, SIDE, 3)
    if not cache.is_file():
        return None
    with suppress(Exception), np.load(cache, allow_pickle=False) as stored:  # NumPy raises nearly anything on a damaged file
        unpacked = sum(member.file_size for member in stored.zip.infolist())
        if unpacked > math.prod(shape) + CACHE_HEADERS or str(stored["state"]) != listing.state:
            return None
        images = stored["images"]
        if images.dtype == np.uint8 and images.shape == shape and str(stored["hash"]) == _pixel_hash(images):
            return images
    return None


def _write_cache(cache: Path, listing: _Listing, images: np.ndarray) -> None:
    temporary = cache.with_name(f".cache-{secrets.token_hex(4)}.npz")
    try:
        np.savez(temporary, state=np.array(listing.state), hash=np.array(_pixel_hash(images)), images=images)
        os.replace(temporary, cache)
    except OSError as error:
        print(printable(f"the decoded images could not be kept in {cache} ({error.strerror}): "
                        "they will be decoded again next time"), file=sys.stderr)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
