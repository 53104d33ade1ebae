"""Plain text and places of labels in pictures."""

import os

import pytest
from matplotlib.font_manager import fontManager, get_font

from tinycnn.runs.drawing import label, spread


def test_a_label_is_the_name_as_it_can_be_drawn():
    assert label("$cat$ été") == "$cat$ été"
    assert label(os.fsdecode(b"b\xff")) == "b\\xff"
    assert label("two\nlines\x1b") == "two\\nlines\\x1b"
    assert label("\U000e01f0\ue000") == "\\U000e01f0\\ue000"  # in no font, private use


def test_a_long_name_loses_its_middle():
    assert label("abcdefghij", 10) == "abcdefghij"
    assert label("abcdefghijk", 10) == "abcd…hijk"
    assert label("the same beginning, number 1", 12) != label("the same beginning, number 2", 12)


def test_characters_that_the_first_font_lacks_are_taken_from_another():
    """Of the fonts that come with matplotlib: STIX has this character, DejaVu Sans has not."""
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
