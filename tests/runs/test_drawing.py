"""Plain text, places of labels, and pictures whatever Matplotlib's settings are."""

import errno
import os
import subprocess
import sys

import matplotlib
import pytest
from conftest import ROOT, one_line, raising
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font

from tinycnn.errors import StopRequested
from tinycnn.runs import files
from tinycnn.runs.drawing import drawing, label, save, spread

DRAW = """
import sys
from tinycnn.runs.drawing import drawing, save
with drawing("it.png"):
    from matplotlib.figure import Figure
    figure = Figure()
    figure.subplots().plot([1, 2], label="$x_{")
    save(figure, __import__("pathlib").Path(sys.argv[1]))
"""


def draw(path) -> None:
    """Draw a little figure."""
    with drawing("it.png"):
        figure = Figure()
        figure.subplots().set(title="$x_{", xlabel="x")
        save(figure, path)


def test_the_settings_of_the_user_change_no_pixel(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "before.png")
    for name, value in {"text.usetex": True, "font.size": 30, "figure.dpi": 30, "savefig.transparent": True,
                        "axes.facecolor": "black", "savefig.format": "pdf"}.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    draw(tmp_path / "after.png")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "after.png").read_bytes() == (tmp_path / "before.png").read_bytes()
    assert matplotlib.rcParams["text.usetex"]


@pytest.mark.parametrize("backend", ["nonsense", "TkAgg"])
def test_any_backend_of_the_user_will_do(backend, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"MPLBACKEND": backend}
    process = subprocess.run([sys.executable, "-c", DRAW, tmp_path / "it.png"], cwd=ROOT, env=environment, text=True,
                             capture_output=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "it.png").exists()


def test_settings_that_cannot_be_read_are_a_line(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"font.size: \xff\n")
    process = subprocess.run([sys.executable, "-c", DRAW, tmp_path / "it.png"], cwd=ROOT, text=True, capture_output=True,
                             env=os.environ | {"MATPLOTLIBRC": str(tmp_path)}, timeout=60)
    assert process.returncode == 0
    assert process.stderr.splitlines()[-1].startswith("it.png could not be drawn (")
    assert "Traceback" not in process.stderr


def test_a_picture_that_fails_is_a_line_and_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "it.png").write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", lambda source, target: raising(OSError(errno.ENOSPC, "No space left"))())
    draw(tmp_path / "it.png")
    assert "it.png could not be drawn (" in one_line(capsys.readouterr().err)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("it.png", b"old")]
    with drawing("it.png"):
        raise RuntimeError("two\nlines")
    assert one_line(capsys.readouterr().err) == "it.png could not be drawn (two)\n"
    with pytest.raises(StopRequested), drawing("it.png"):
        raise StopRequested(15)


def test_a_label_is_the_name_as_it_can_be_drawn():
    assert label("$cat$ été") == "$cat$ été"
    assert label(os.fsdecode(b"b\xff")) == "b\\xff"
    assert label("two\nlines\x1b") == "two\\nlines\\x1b"
    assert label("\U000e01f0\ue000") == "\\U000e01f0\\ue000"  # in no font, private use


def test_a_long_name_loses_its_middle():
    assert label("abcdefghij", 10) == "abcdefghij"
    assert label("abcdefghijk", 10) == "abcd…ghijk"
    assert label("the same beginning, number 1", 12) != label("the same beginning, number 2", 12)


def test_characters_that_the_first_font_lacks_are_taken_from_another():
    """Of the fonts that come with Matplotlib: STIX has this character, DejaVu Sans has not."""
    file = {font.name: font.fname for font in fontManager.ttflist if font.style == "normal" and font.weight == 400}
    missing = set(get_font(file["STIXGeneral"]).get_charmap()) - set(get_font(file["DejaVu Sans"]).get_charmap())
    character = next(chr(code) for code in sorted(missing) if chr(code).isprintable() and not 0xE000 <= code <= 0xF8FF)
    assert label(character) == character


@pytest.mark.parametrize(("values", "places"), [
    ([], []), ([5], [5]), ([1, 5, 9], [1, 5, 9]),
    ([5, 5], [4.5, 5.5]), ([5, 5, 5], [4, 5, 6]), ([2, 5, 5.5], [2, 4.75, 5.75]),
    ([0, 0], [0, 1]), ([10, 10], [9, 10]),
    ([4, 5, 5, 6], [3.5, 4.5, 5.5, 6.5]),
])
def test_labels_are_spread_as_little_as_needed(values, places):
    assert spread(values, gap=1, low=0, high=10) == pytest.approx(places)


def test_too_many_labels_for_the_room_still_keep_apart():
    assert spread([1, 1, 1], gap=1, low=0, high=1) == [0, 1, 2]
