"""Image files of all kinds, broken and hostile ones included."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from conftest import ROOT
from PIL import EpsImagePlugin, Image

from config import UserError
from tinycnn.data import decoding
from tinycnn.data.decoding import decode, decode_all
from tinycnn.text import printable

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


def test_exif_orientation_is_obeyed(tmp_path):
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(upright[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    assert (decode(str(tmp_path / "turned.png"))[0] == upright).all()


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
def test_transparent_parts_are_white_whatever_the_size_of_a_band(tmp_path, monkeypatch, palette):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 4), dtype=np.uint8))
    if palette:
        noise.convert("RGB").quantize(16).save(tmp_path / "noise.png", transparency=bytes(range(0, 256, 16)))
    else:
        noise.save(tmp_path / "noise.png")
    with Image.open(tmp_path / "noise.png") as opened:
        whole = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA")).convert("RGB")
    monkeypatch.setattr(decoding, "BAND_PIXELS", 50 * 9)
    assert np.array_equal(decode(str(tmp_path / "noise.png"))[0], whole.resize((32, 32), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------- hostile files

def test_a_long_side_takes_memory_in_resizing_and_is_refused(tmp_path):
    Image.new("P", (70_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match="more than 65,500 on a side"):
        decode(str(tmp_path / "line.png"))


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_small_file_of_many_pixels_takes_little_memory(tmp_path):
    """A palette PNG with transparency, beyond the limit and just within it."""
    sizes = {"bomb.png": 13_000, "large.png": 5000}
    for name, side in sizes.items():
        Image.new("P", (side, side), 1).save(tmp_path / name, transparency=0, compress_level=1)
    code = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from config import UserError
        from tinycnn.data.decoding import decode
        for name in sys.argv[1:]:
            try:
                print(decode(name)[0].shape)
            except UserError as error:
                print(error)
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])"""
    out = subprocess.run([sys.executable, "-c", code, *(str(tmp_path / name) for name in sizes)], capture_output=True,
                         text=True, check=True).stdout.splitlines()
    assert out[0].endswith("bomb.png has 13000 x 13000 pixels, more than 25 million: replace or remove it")
    assert int(out[1]) < 150_000  # kB, Python with NumPy and Pillow included
    assert out[2] == "(32, 32, 3)"
    assert int(out[3]) < 350_000


def test_the_limit_of_pixels(tmp_path, monkeypatch, recwarn):
    Image.new("L", (50, 40)).save(tmp_path / "image.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 2000)
    assert decode(str(tmp_path / "image.png"))[1]
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1999)
    with pytest.raises(UserError, match="50 x 40 pixels"):
        decode(str(tmp_path / "image.png"))
    assert not recwarn.list


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
def test_processes_that_decode_are_started_with_sigint_blocked(tmp_path, monkeypatch):
    """Ctrl-C reaches them before their initializer has run."""
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    blocked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, **_) -> None:
            super().__init__(1)

        def map(self, *arguments):
            blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            return super().map(*arguments)

    monkeypatch.setattr(decoding, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(decoding, "SINGLE_PROCESS_FILES", 1)
    assert decode_all([str(tmp_path / "image.png")]).shape == (1, 32, 32, 3)
    assert blocked == [{signal.SIGINT}]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


# ---------------------------------------------------------------- names

@pytest.mark.parametrize(("text", "expected"), [
    ("plain é 猫 🐈.png", "plain é 猫 🐈.png"), ("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb\tc\r", r"a\nb\tc\r"),
    (os.fsdecode(b"a\xffb"), r"a\xffb"), ("a\u202eb", r"a\u202eb"), ("a\x9bb", r"a\x9bb"), ("a\U000e0001", r"a\U000e0001")])
def test_what_is_not_printable_is_escaped(text, expected):
    assert printable(text) == expected
    assert printable(text).isprintable()


@pytest.mark.parametrize("content", [None, b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_errors_show_names_escaped(tmp_path, content):
    path = tmp_path / "a\x1b[31m\nb.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        decode(str(path))
    assert str(caught.value).isprintable()
    assert r"a\x1b[31m\nb.png is not a whole image" in str(caught.value)


def test_a_decoding_process_that_is_killed_is_named(tmp_path, monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, **_):
            super().__init__(1)

        def map(self, *_):
            raise BrokenProcessPool

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(decoding, "SINGLE_PROCESS_FILES", 1)
    with pytest.raises(UserError, match="a process that decoded images was killed"):
        decoding.decode_all([str(tmp_path / "a.png")])
