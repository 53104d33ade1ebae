"""Image files of any kind as arrays of one size."""

import multiprocessing
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from config import UserError
from training.shapes import SIDE

ALONE = 5000  # files; fewer are decoded sooner than other processes start


def decode(path: str) -> tuple[np.ndarray, bool]:
    """The image of a file as uint8, 32 x 32 x 3, upright by its EXIF data, transparent parts on white, and whether it was
    resized. Of several frames the first. Raises UserError naming a file that can't be read."""
    try:
        with Image.open(path) as opened:
            upright: Image.Image = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # grey, which convert() would clip instead of scaling
                upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
            elif upright.mode in ("I", "F"):
                raise ValueError("its pixels are numbers of 32 bits, of an unknown range")
            elif upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            upright = upright.convert("RGB")
            resized = upright.size != (SIDE, SIDE)
            return np.asarray(upright.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if resized else upright), resized
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise UserError(f"{path} is not a whole image ({error}): replace or remove it") from error


def _decode_chunk(paths: list[str]) -> tuple[np.ndarray, int]:
    decoded = [decode(path) for path in paths]
    return np.stack([image for image, _ in decoded]), sum(resized for _, resized in decoded)


def decode_all(paths: list[str]) -> np.ndarray:
    """uint8, N x 32 x 32 x 3. Several processes where there is enough work to pay for starting them."""
    chunks = [paths[i:i + 16] for i in range(0, len(paths), 16)]
    with tqdm(total=len(paths), desc="decoding", unit="image", disable=None, leave=False) as bar:
        if len(paths) < ALONE:
            done = _watch(map(_decode_chunk, chunks), bar)
        else:
            # Ctrl-C is the parent's to answer; it then waits for the chunks at work, and drops the others.
            pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"),
                                       initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
            try:
                done = _watch(pool.map(_decode_chunk, chunks), bar)
            except BrokenProcessPool as error:
                raise UserError("a process that decoded images was killed, most likely because memory ran out") from error
            finally:
                pool.shutdown(cancel_futures=True)
    tell_resized(sum(count for _, count in done), len(paths))
    return np.concatenate([images for images, _ in done])


def _watch(results: Iterable[tuple[np.ndarray, int]], bar: tqdm) -> list[tuple[np.ndarray, int]]:
    done = []
    for result in results:
        done.append(result)
        bar.update(len(result[0]))
    return done


def tell_resized(resized: int, images: int) -> None:
    """One line, where some were."""
    if resized:
        print(f"{resized:,} of {images:,} images had another size and were resized to {SIDE}x{SIDE}", file=sys.stderr)
