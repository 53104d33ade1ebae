"""Decode image files into arrays of one size."""

import io
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from tqdm import tqdm

from config import SIDE, UserError
from tinycnn.cores import available_cores
from tinycnn.text import printable

TRAINING_FORMATS = ("PNG", "JPEG")  # Pillow's names
JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
MAX_PIXELS = 25_000_000  # of a file; 200 MB while it is decoded, 400 where it is transparent
MAX_SHRUNK_PIXELS = 200_000_000  # of a JPEG that can be decoded at an eighth of its size
MAX_SIDE = 65_500  # pixels, the longest of a JPEG; resizing takes memory that grows with the side
MAX_THREADS = 8  # that decode
CHUNK_FILES = 4096  # given to the threads at once
LISTED_ERRORS = 10
REMEDY = ": replace or remove it"
Image.MAX_IMAGE_PIXELS = None  # decode() has a lower limit, and doesn't warn

ORIENTATION = 0x0112  # the tag in EXIF data
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
           6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}  # what an orientation is turned by
PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # of a PNG
KEPT_SEGMENTS = {0xE0: 14, 0xE1: 0, 0xEE: 12}  # of a JPEG's metadata: JFIF, EXIF, Adobe, and the bytes that a whole one has
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis"}


def decode(path: str, formats: tuple[str, ...] = TRAINING_FORMATS) -> tuple[np.ndarray, bool]:
    """Decode the first frame of a regular file of at most MAX_PIXELS pixels, or MAX_SHRUNK_PIXELS where it is a JPEG that is
    not progressive. `formats` are Pillow's names of the formats that it may have; others of Pillow's can start programs.
    Metadata at fault count as absent. Returns the image, uint8 32 x 32 x 3, RGB, upright by its EXIF data, on white where it is
    transparent; and whether it was resized. Raises UserError where the file can't be used."""
    data = b""
    if Path(path).is_dir():
        raise UserError(printable(f"{path} holds no image files"))
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for its writer
            raise UserError("is not a regular file")
        try:
            return _decode(path, formats)
        except (MemoryError, UserError):
            raise
        except Exception:  # Pillow raises nearly anything, also on parts that don't matter
            with open(path, "rb") as file:
                data = file.read(8 * MAX_PIXELS)
            return _decode(io.BytesIO(_without_metadata(data)), formats)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise UserError(printable(f"there is no file {path}")) from error
    except UserError as error:
        reason = str(error)
    except Image.UnidentifiedImageError:
        is_heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
        reason = ("is a HEIC or AVIF picture (convert it to JPEG)" if is_heif else
                  f"is not a whole image (no {' or '.join(formats)} data)")
    except Exception as error:
        reason = f"is not a whole image ({error})"
    raise UserError(printable(f"{path} {reason}") + REMEDY)


def _decode(file: str | io.BytesIO, formats: tuple[str, ...]) -> tuple[np.ndarray, bool]:
    with Image.open(file, formats=formats) as image:
        width, height = image.size
        if MAX_PIXELS < width * height <= MAX_SHRUNK_PIXELS and "progressive" not in image.info:
            image.draft(None, (SIDE, SIDE))  # does nothing unless it is a JPEG; a progressive one is held in memory whole
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million (shrink it)")
        if max(width, height) > MAX_SIDE:
            raise UserError(f"has {width} x {height} pixels, more than {MAX_SIDE:,} on a side (shrink it)")
        if image.mode in ("I", "F"):
            raise UserError("has pixels of 32 bits, whose range is unknown (convert it)")
        rgb = _to_rgb(image)
        resized = (width, height) != (SIDE, SIDE)
        return np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if resized else rgb), resized


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn `image` upright and convert it to RGB."""
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):  # grey, which convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------- metadata at fault

def _orientation(image: Image.Image) -> int:
    """The orientation by the EXIF data, whatever the state of their other tags, or by XMP; 1 is upright."""
    exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    order = ">" if exif[:2] == b"MM" else "<"
    with suppress(struct.error):
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == ORIENTATION:
                return value
    with suppress(Exception):
        return image.getexif().get(ORIENTATION, 1)
    return 1


def _without_metadata(data: bytes) -> bytes:
    """Remove from a PNG or JPEG file what says nothing of its pixels or their orientation. Others are returned as they are."""
    kept = []
    if data.startswith(PNG_SIGNATURE):
        position = len(PNG_SIGNATURE)
        while position < len(data):
            chunk = data[position:position + 12 + int.from_bytes(data[position:position + 4], "big")]
            is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            if chunk[4:8] in PIXEL_CHUNKS or (chunk[4:8] == b"eXIf" and is_sound):
                kept.append(chunk)
            position += len(chunk)
        return PNG_SIGNATURE + b"".join(kept)
    if data.startswith(JPEG_SIGNATURE):
        position = len(JPEG_SIGNATURE)
        while position < len(data) and data[position:position + 2] != b"\xff\xda":  # the start of the pixels
            segment = data[position:position + 2 + int.from_bytes(data[position + 2:position + 4], "big")]
            is_metadata = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE
            if not is_metadata or len(segment) - 4 >= KEPT_SEGMENTS.get(segment[1], len(segment)):
                kept.append(segment)
            position += len(segment)
        return JPEG_SIGNATURE + b"".join(kept) + data[position:]
    return data


# ---------------------------------------------------------------- many files

def decode_each(paths: Sequence[str],
                formats: tuple[str, ...] = TRAINING_FORMATS) -> Iterator[tuple[np.ndarray, bool] | UserError]:
    """Decode files in threads, as Pillow decodes without Python's lock. Yields for each, in order, what decode() returns or the
    UserError that it raises."""
    def attempt(path: str) -> tuple[np.ndarray, bool] | UserError:
        try:
            return decode(path, formats)
        except UserError as error:
            return error

    with (warnings.catch_warnings(action="ignore"),  # Pillow's, of odd metadata
          ThreadPoolExecutor(min(MAX_THREADS, available_cores())) as pool):
        for start in range(0, len(paths), CHUNK_FILES):
            yield from pool.map(attempt, paths[start:start + CHUNK_FILES])


def decode_all(paths: Sequence[str]) -> np.ndarray:
    """Decode PNG and JPEG files to uint8, N x 32 x 32 x 3. Raises UserError, which names up to ten of the files that can't be
    used."""
    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    count, errors = 0, []
    results = tqdm(decode_each(paths), total=len(paths), desc="decoding", unit="image", disable=None, leave=False)
    for number, result in enumerate(results):
        if isinstance(result, UserError):
            errors.append(str(result).removesuffix(REMEDY))
        else:
            images[number], resized = result
            count += resized
    if errors:
        total = f"{len(errors)} of {len(paths)} files can't be used: " if len(errors) > 1 else ""
        more = f"; and {len(errors) - LISTED_ERRORS} more" if len(errors) > LISTED_ERRORS else ""
        raise UserError(total + "; ".join(errors[:LISTED_ERRORS]) + more + REMEDY)
    report_resized(count, len(paths))
    return images


def report_resized(resized: int, images: int) -> None:
    """Print one line on stderr where images were resized."""
    if resized:
        print(f"{resized:,} of {images:,} images had another size and were resized to {SIDE}x{SIDE}", file=sys.stderr)
