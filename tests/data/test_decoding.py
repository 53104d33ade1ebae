"""Image files of all kinds, broken and hostile ones included."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from config import UserError
from tinycnn.data import decoding
from tinycnn.data.decoding import decode, decode_each
from tinycnn.text import listed, printable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of odd metadata; decode_each() ignores them, too
ALL_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")


@pytest.mark.parametrize(("mode", "value", "expected"), [
    ("L", 100, (100, 100, 100)), ("RGBA", (1, 2, 3, 255), (1, 2, 3)), ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
    ("P", 0, (0, 0, 0)), ("1", 1, (255, 255, 255)),
    ("I;16", 65535, (255, 255, 255)), ("I;16", 256 * 40, (40, 40, 40))])
def test_every_mode_of_png_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (32, 32), value).save(path)
    image, resized = decode(str(path))
    assert image.dtype == np.uint8
    assert image.shape == (32, 32, 3)
    assert not resized
    assert tuple(image[5, 7]) == expected


@pytest.mark.parametrize("size", [(100, 60), (20, 24)])
def test_other_sizes_are_resized_bicubically(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "noise.png")
    ours, resized = decode(str(tmp_path / "noise.png"))
    assert resized
    assert np.array_equal(ours, image.resize((32, 32), Image.Resampling.BICUBIC))
    assert not np.array_equal(ours, image.resize((32, 32), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("palette", [False, True])
def test_transparent_parts_are_white(tmp_path, palette):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8))
    if palette:
        noise.convert("RGB").quantize(16).save(tmp_path / "noise.png", transparency=bytes(range(0, 256, 16)))
    else:
        noise.save(tmp_path / "noise.png")
    with Image.open(tmp_path / "noise.png") as opened:
        rgba = np.asarray(opened.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    assert abs(decode(str(tmp_path / "noise.png"))[0] - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


# ---------------------------------------------------------------- metadata

UPRIGHT = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def bytes_of(pixels: np.ndarray, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF data with these tags: number, type, count, value."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries) + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def decoded(path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    return decode(str(path), ALL_FORMATS)[0]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "turned"), [
    (1, UPRIGHT), (2, UPRIGHT[:, ::-1]), (3, UPRIGHT[::-1, ::-1]), (4, UPRIGHT[::-1]), (5, UPRIGHT.swapaxes(0, 1)),
    (6, np.rot90(UPRIGHT)), (7, np.rot90(UPRIGHT, 2).swapaxes(0, 1)), (8, np.rot90(UPRIGHT, -1)), (9, UPRIGHT)])
def test_exif_orientation_is_obeyed(tmp_path, kind, orientation, turned):
    tags = Image.Exif()
    tags[0x0112] = orientation
    how = {"lossless": True} if kind == "WEBP" else {}
    image = decoded(tmp_path / "turned", bytes_of(np.ascontiguousarray(turned), kind, exif=tags, **how))
    assert np.array_equal(image, UPRIGHT)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("odd", [
    (0x110, 2, 20, b"\xff\xff\0\0"), (0x128, 2, 4, b"abc\0"), (0x128, 4, 1, b"\1\1\1\1"), (0x132, 5, 1, b"\x08\0\0\0"),
    (0x8825, 2, 4, b"abc\0"), (0x8769, 4, 1, b"\xff\xff\0\0"), (0x10E, 99, 1, b"abcd")])
def test_other_tags_at_fault_do_not_hide_the_orientation(tmp_path, odd, order):
    upside_down = (0x112, 3, 1, struct.pack(order + "HH", 3, 0))
    whole, turned = bytes_of(UPRIGHT, "JPEG"), bytes_of(UPRIGHT, "PNG")
    for entries in ((odd, upside_down), (upside_down, odd)):
        tags = exif(*entries, order=order)
        assert np.array_equal(decoded(tmp_path / "a.png", turned[:33] + chunk(b"eXIf", tags) + turned[33:]),
                              UPRIGHT[::-1, ::-1])
        assert np.array_equal(decoded(tmp_path / "a.jpg", whole[:2] + segment(0xE1, b"Exif\0\0" + tags) + whole[2:]),
                              decoded(tmp_path / "b.jpg", whole)[::-1, ::-1])


FAULTY_CHUNKS = [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**21))),
                 chunk(b"sRGB", b""), chunk(b"cHRM", b"x"), chunk(b"pHYs", b"x"), chunk(b"gAMA", b"x"), chunk(b"iCCP", b"x"),
                 chunk(b"acTL", b"x"), chunk(b"tEXt", b"a\0b")[:-1] + b"x", chunk(b"eXIf", b"II")[:-1] + b"x",
                 chunk(b"eXIf", b"junk")]
FAULTY_SEGMENTS = [segment(0xE2, b"ICC_PROFILE\0"), segment(0xEE, b"Adobe"), segment(0xE0, b"JFIF\0"), segment(0xE2, b"MPF\0x"),
                   segment(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed")]


def test_metadata_at_fault_count_as_absent(tmp_path):
    turned = exif((0x112, 3, 1, b"\3\0\0\0"))
    png, jpeg = bytes_of(UPRIGHT, "PNG"), bytes_of(UPRIGHT, "JPEG")
    for fault in FAULTY_CHUNKS:
        assert np.array_equal(decoded(tmp_path / "a.png", png[:33] + fault + png[33:]), UPRIGHT), fault[:8]
    assert np.array_equal(decoded(tmp_path / "a.png", png[:33] + FAULTY_CHUNKS[0] + chunk(b"eXIf", turned) + png[33:]),
                          UPRIGHT[::-1, ::-1])
    expected = decoded(tmp_path / "a.jpg", jpeg)
    for fault in FAULTY_SEGMENTS:
        assert np.array_equal(decoded(tmp_path / "a.jpg", jpeg[:2] + fault + jpeg[2:]), expected), fault[:8]
    both = FAULTY_SEGMENTS[0] + segment(0xE1, b"Exif\0\0" + turned)
    assert np.array_equal(decoded(tmp_path / "a.jpg", jpeg[:2] + both + jpeg[2:]), expected[::-1, ::-1])


def test_colours_that_only_metadata_explain_stay_right(tmp_path):
    """A JPEG of RGB, not YCbCr, says so in its Adobe segment. Here, the names of its components don't tell."""
    named = bytes_of(UPRIGHT, "JPEG", keep_rgb=True, quality=100)
    frame, scan = named.index(b"\xff\xc0") + 10, named.index(b"\xff\xda") + 5
    jpeg = bytearray(named)
    for number in range(3):
        jpeg[frame + 3 * number] = jpeg[scan + 2 * number] = number + 1
    marked = jpeg[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\0") + segment(0xE2, b"ICC_PROFILE\0") + jpeg[2:]
    assert abs(decoded(tmp_path / "a.jpg", marked).astype(int) - UPRIGHT).max() < 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_at_fault_are_no_metadata(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = bytes_of(noise, kind)
    for broken in (whole[:len(whole) // 2], whole[:40], whole[:2]):
        with pytest.raises(UserError, match="is not a whole image"):
            decoded(tmp_path / "broken", broken)
    if kind == "PNG":
        flipped = bytearray(whole)
        flipped[1000] ^= 1
        with pytest.raises(UserError, match="is not a whole image"):
            decoded(tmp_path / "broken", bytes(flipped))


# ---------------------------------------------------------------- large and hostile files

def test_pictures_of_phones_have_their_own_words(tmp_path):
    for name in ("photo.heic", "photo.jpg"):
        with pytest.raises(UserError, match=rf"{name} is a HEIC or AVIF picture \(convert it to JPEG\): replace or remove it"):
            decoded(tmp_path / name, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_a_large_jpeg_is_decoded_at_a_smaller_size(tmp_path, monkeypatch):
    pixels = np.asarray(Image.fromarray(UPRIGHT[:4, :4]).resize((320, 288), Image.Resampling.BICUBIC))
    monkeypatch.setattr(decoding, "MAX_SHRUNK_PIXELS", 320 * 288)
    whole = decoded(tmp_path / "large.jpg", bytes_of(pixels, "JPEG", quality=95)).astype(int)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 2000)  # more than an eighth of each side has
    assert decode(str(tmp_path / "large.jpg"))[1]
    assert abs(decode(str(tmp_path / "large.jpg"))[0] - whole).mean() < 4
    (tmp_path / "eight.jpg").write_bytes(bytes_of(pixels[:256, :256], "JPEG"))  # at an eighth, it has the right size
    assert decode(str(tmp_path / "eight.jpg"))[1]
    for refused in (bytes_of(pixels, "JPEG", progressive=True), bytes_of(pixels, "PNG")):
        with pytest.raises(UserError, match=r"has 320 x 288 pixels, more than .* \(shrink it\)"):
            decoded(tmp_path / "refused", refused)
    monkeypatch.setattr(decoding, "MAX_SHRUNK_PIXELS", 320 * 288 - 1)
    with pytest.raises(UserError, match="has 320 x 288 pixels"):
        decode(str(tmp_path / "large.jpg"))


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, recwarn):
    Image.new("P", (5001, 5000)).save(tmp_path / "bomb.png", compress_level=1)
    Image.new("P", (70_000, 1)).save(tmp_path / "line.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=r"bomb\.png has 5001 x 5000 pixels, more than 25 million"):
        decode(str(tmp_path / "bomb.png"))
    with pytest.raises(UserError, match="more than 65,500 on a side"):  # resizing takes memory for it
        decode(str(tmp_path / "line.png"))
    assert not recwarn.list


def test_only_the_named_formats_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "gif.png", "GIF")
    for formats in (("PNG", "JPEG"), ALL_FORMATS):
        with pytest.raises(UserError, match=rf"eps\.png is not a whole image \(no {' or '.join(formats)} data\)"):
            decode(str(tmp_path / "eps.png"), formats)
    with pytest.raises(UserError, match="no PNG or JPEG data"):
        decode(str(tmp_path / "gif.png"))
    assert tuple(decode(str(tmp_path / "gif.png"), ALL_FORMATS)[0][0, 0]) == (255, 0, 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the pipe was opened"))
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file: replace or remove it"):
        decode(str(tmp_path / "pipe.png"))


# ---------------------------------------------------------------- many files

def test_many_files_are_decoded_in_order_with_their_errors(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(decoding, "CHUNK_FILES", 3)
    paths = [str(tmp_path / f"{number}.png") for number in range(10)]
    for number, path in enumerate(paths):
        if number != 4:
            Image.new("L", (32, 32), number).save(path)
    jpeg = bytes_of(np.full((32, 32), 5, dtype=np.uint8), "JPEG")
    (tmp_path / "5.png").write_bytes(jpeg[:2] + segment(0xE2, b"MPF\0x") + jpeg[2:])  # Pillow warns of it
    warnings.simplefilter("always")
    results = list(decode_each(paths))
    assert str(results.pop(4)) == f"there is no file {paths[4]}"
    assert [result[0][0, 0, 0] for result in results] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert not recwarn.list


# ---------------------------------------------------------------- names

@pytest.mark.parametrize(("text", "expected"), [
    ("plain é 猫 🐈.png", "plain é 猫 🐈.png"), ("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb\tc\r", r"a\nb\tc\r"),
    (os.fsdecode(b"a\xffb"), r"a\xffb"), ("a\u202eb", r"a\u202eb"), ("a\x9bb", r"a\x9bb"), ("a\U000e0001", r"a\U000e0001")])
def test_what_is_not_printable_is_escaped(text, expected):
    assert printable(text) == expected
    assert printable(text).isprintable()


def test_lists_of_names_have_an_end():
    assert listed([]) == "none"
    assert listed({"b", "a"}) == "a, b"
    assert listed([str(number) for number in range(10, 22)]) == "10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 2 more"


@pytest.mark.parametrize("content", [None, b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_errors_show_names_escaped(tmp_path, content):
    path = tmp_path / "a\x1b[31m\nb.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        decode(str(path))
    assert str(caught.value).isprintable()
    assert r"a\x1b[31m\nb.png" + (" is not a whole image" if content else "") in str(caught.value)
