"""Colours, plain text and saving for pictures. No display is needed."""

import io
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text

from tinycnn.runs.files import write
from tinycnn.text import printable

# The colours of Okabe and Ito, which colour-blind people can tell apart
COLOURS = BLUE, ORANGE, GREEN, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"
GREY, LIGHT_GREY = "#666666", "#DDDDDD"
DPI = 150
FONT = "DejaVu Sans"  # comes with matplotlib


def label(name: str, width: int = 24) -> str:
    """`name` as it can be drawn: characters that aren't printable, or that no installed font has, are escaped, and the middle
    of a name of more than `width` columns is left out."""
    text = printable(name)
    text = "".join(character if _family(character) else character.encode("unicode_escape").decode() for character in text)
    if _columns(text) <= width:
        return text
    start = end = ""
    while _columns(start + end) < width - 2:
        start += text[len(start)]
        end = text[-1 - len(end):]
    return f"{start}…{end}"


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG, atomically. All text is drawn as it stands: a $ begins no formula."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # sets the text of labels that are names
    texts = figure.findobj(Text)
    characters = {character for text in texts for character in text.get_text()}
    families = [FONT, *sorted({_family(character) or FONT for character in characters} - {FONT})]
    for text in texts:
        text.set(parse_math=False, fontfamily=families)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, bbox_inches="tight")  # tight: a label that sticks out widens the picture
    write(path, picture.getvalue())


def label_line_ends(axes: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Write beside the ends of lines what they are: (x, y, text, colour) for each line. Labels that would overlap are moved
    apart. The limits of `axes` must be final."""
    low, high = sorted(axes.get_ylim())
    gap = 15 * (high - low) / (axes.bbox.height * 72 / axes.figure.dpi)  # 15 points, in data units
    ends = sorted(ends, key=lambda end: end[1])
    heights = spread([end[1] for end in ends], gap, low, high)
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(text, (x, y), (1.02, height), textcoords=axes.get_yaxis_transform(), color=colour, fontsize=11,
                      va="center", annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6})


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted `values` moved as little as needed to lie `gap` apart, and between `low` and `high` where there is room."""
    groups: list[list[float]] = []  # of values that end up side by side: isotonic regression by pooling adjacent violators
    for index, value in enumerate(values):
        groups.append([value - index * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    highest = max(low, high - (len(values) - 1) * gap)
    moved = [fmean(group) for group in groups for _ in group]
    return [min(max(value, low), highest) + index * gap for index, value in enumerate(moved)]


def _columns(text: str) -> int:
    """The width of `text` in columns: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


@cache
def _family(character: str) -> str | None:
    """The family of an installed font that has `character`: matplotlib's own, else the first by name."""
    if character == "\n" or ord(character) in _characters(findfont(FONT)):
        return FONT
    upright = sorted((font.name, font.fname) for font in fontManager.ttflist if font.style == "normal" and font.weight == 400)
    return next((name for name, file in upright if not name.startswith("Last Resort") and ord(character) in _characters(file)),
                None)  # Last Resort has a box for every character


@cache
def _characters(file: str) -> frozenset[int]:
    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):  # a font that FreeType can't read
        return frozenset()
