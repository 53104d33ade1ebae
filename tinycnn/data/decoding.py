"""Decode image files into arrays of one size."""

import multiprocessing
import signal
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from config import SIDE, UserError
from tinycnn.text import printable

TRAINING_FORMATS = ("PNG", "JPEG")  # Pillow's names
MAX_PIXELS = 25_000_000  # of a file; 200 MB while it is decoded
MAX_SIDE = 65_500  # pixels, the longest of a JPEG; resizing takes memory that grows with the side
BAND_PIXELS = 1_000_000  # composited at once
SINGLE_PROCESS_FILES = 5000  # fewer are decoded sooner than other processes start
CHUNK_FILES = 16
LISTED_ERRORS = 10
REMEDY = ": replace or remove it"
Image.MAX_IMAGE_PIXELS = None  # decode() has a lower limit, and doesn't warn


def decode(path: str, formats: tuple[str, ...] = TRAINING_FORMATS) -> tuple[np.ndarray, bool]:
    """Decode the first frame of a regular file of at most MAX_PIXELS pixels. `formats` are Pillow's names of the formats that
    it may have; others of Pillow's can start programs. Returns the image, uint8 32 x 32 x 3, RGB, upright by its EXIF data, on
    white where it is transparent; and whether it was resized."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for its writer
            raise _unusable(f"{path} is not a regular file")
        with Image.open(path, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _unusable(f"{path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} million")
            if max(image.size) > MAX_SIDE:
                raise _unusable(f"{path} has {image.width} x {image.height} pixels, more than {MAX_SIDE:,} on a side")
            if image.mode in ("I", "F"):
                raise _unusable(f"{path} has pixels of 32 bits, whose range is unknown")
            rgb = _to_rgb(image)
            resized = rgb.size != (SIDE, SIDE)
            return np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if resized else rgb), resized
    except (MemoryError, UserError):
        raise
    except UnidentifiedImageError as error:
        raise _unusable(f"{path} is not a whole image (no {' or '.join(formats)} data)") from error
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise _unusable(f"{path} is not a whole image ({error})") from error


def _unusable(reason: str) -> UserError:
    return UserError(printable(reason) + REMEDY)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn `image` upright and convert it to RGB. May change `image`, which saves a copy."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # grey, which convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite `image` on white, some rows at a time: as RGBA a whole one would take twelve bytes a pixel."""
    result = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


@dataclass
class _Chunk:
    """Some decoded files. `images`: uint8, N x 32 x 32 x 3, of those that could be read; `errors`: one for each other."""

    images: np.ndarray
    resized: int
    errors: list[str]


def _decode_chunk(paths: list[str]) -> _Chunk:
    images, resized, errors = [np.empty((0, SIDE, SIDE, 3), dtype=np.uint8)], 0, []
    for path in paths:
        try:
            image, was_resized = decode(path)
            images.append(image[None])
            resized += was_resized
        except UserError as error:
            errors.append(str(error).removesuffix(REMEDY))
    return _Chunk(np.concatenate(images), resized, errors)


def decode_all(paths: list[str]) -> np.ndarray:
    """Decode PNG and JPEG files to uint8, N x 32 x 32 x 3, in several processes where there are many. An error names up to ten
    of the files that can't be read."""
    chunks = [paths[start:start + CHUNK_FILES] for start in range(0, len(paths), CHUNK_FILES)]
    with tqdm(total=len(paths), desc="decoding", unit="image", disable=None, leave=False) as bar:
        if len(paths) < SINGLE_PROCESS_FILES:
            done = _collect(map(_decode_chunk, chunks), bar)
        else:
            # The parent answers Ctrl-C: it waits for the chunks at work and drops the others.
            pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"),
                                       initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
            try:
                with _interrupts_wait():
                    results = pool.map(_decode_chunk, chunks)
                done = _collect(results, bar)
            except BrokenProcessPool as error:
                raise UserError("a process that decoded images was killed, most likely for lack of memory") from error
            finally:
                pool.shutdown(cancel_futures=True)
    errors = [error for chunk in done for error in chunk.errors]
    if errors:
        count = f"{len(errors)} of {len(paths)} files can't be used: " if len(errors) > 1 else ""
        more = f"; and {len(errors) - LISTED_ERRORS} more" if len(errors) > LISTED_ERRORS else ""
        raise UserError(count + "; ".join(errors[:LISTED_ERRORS]) + more + REMEDY)
    report_resized(sum(chunk.resized for chunk in done), len(paths))
    return np.concatenate([chunk.images for chunk in done])


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Block SIGINT in the body, where the system can. Processes that are started there have it blocked from their beginning;
    this one receives it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(chunks: Iterable[_Chunk], bar: tqdm) -> list[_Chunk]:
    done = []
    for chunk in chunks:
        done.append(chunk)
        bar.update(len(chunk.images) + len(chunk.errors))
    return done


def report_resized(resized: int, images: int) -> None:
    """Print one line on stderr where images were resized."""
    if resized:
        print(f"{resized:,} of {images:,} images had another size and were resized to {SIDE}x{SIDE}", file=sys.stderr)
