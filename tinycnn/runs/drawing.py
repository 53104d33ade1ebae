"""Draw with Matplotlib whatever its settings on this machine; colours, plain text and files of pictures."""

import io
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tinycnn.runs.files import write
from tinycnn.text import printable

if TYPE_CHECKING:  # loaded by `drawing`, where a failure is a note
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which colour-blind people can tell apart
COLOURS = BLUE, ORANGE, GREEN, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
GREY, LIGHT_GREY = "#666666", "#DDDDDD"
DPI = 150
FONT = "DejaVu Sans"  # comes with Matplotlib
SETTINGS: dict[Any, Any] = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
            "grid.alpha": 0.3, "axes.titlelocation": "left"}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw the picture `name` in the body, with Matplotlib's defaults and SETTINGS instead of the user's. Where that fails,
    print one line on stderr: what is finished stays finished without a picture."""
    failure: Exception | None = None
    with ExitStack() as settings:
        try:
            try:
                _enter_own_settings(settings)
            except Exception as error:  # Matplotlib can't be loaded; the body can't load it either
                failure = error
            yield
        except Exception as error:
            reason = str(failure or error).partition("\n")[0] or type(error).__name__
            print(printable(f"{name} could not be drawn ({reason})"), file=sys.stderr)


def _enter_own_settings(stack: ExitStack) -> None:
    """Load Matplotlib, and have SETTINGS until `stack` ends. Matplotlib can't be loaded where MPLBACKEND names no backend, and
    pictures need none: a known one stays the user's."""
    backend = "" if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", "")
    import matplotlib
    if backend:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    stack.enter_context(matplotlib.rc_context())
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(SETTINGS)


def label(name: str, width: int = 24) -> str:
    """`name` as it can be drawn: characters that aren't printable, or that no installed font has, are escaped, and the middle
    of a name of more than `width` columns is left out."""
    text = "".join(character if _family(character) else character.encode("unicode_escape").decode()
                   for character in printable(name))
    if any(unicodedata.east_asian_width(character) in "WF" for character in text):
        width //= 2  # these take two columns
    return text if len(text) <= width else f"{text[:width // 2 - 1]}…{text[len(text) - (width - width // 2):]}"


def save(figure: "Figure", path: Path) -> None:
    """Write `figure` to `path` as a PNG, atomically."""
    from matplotlib.text import Text
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # sets the text of labels that are names
    texts = figure.findobj(Text)
    others = {_family(character) or FONT for text in texts for character in text.get_text()} - {FONT}
    for text in texts:
        text.set_fontfamily([FONT, *sorted(others)])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, bbox_inches="tight")  # tight: a label that sticks out widens the picture
    write(path, picture.getvalue())


def label_line_ends(axes: "Axes", ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Write beside the ends of lines what they are: (x, y, text, colour) for each line. Labels that would overlap are moved
    apart. The limits of `axes` must be final."""
    low, high = sorted(axes.get_ylim())
    gap = 15 * (high - low) / (axes.bbox.height * 72 / axes.figure.dpi)  # 15 points, in data units
    ends = sorted(ends, key=lambda end: end[1])
    heights = spread([end[1] for end in ends], gap, low, high)
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(text, (x, y), (1.02, height), textcoords=axes.get_yaxis_transform(), color=colour, fontsize=11,
                      va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)})


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


@cache
def _family(character: str) -> str | None:
    """The family of an installed font that has `character`: Matplotlib's own, else the first by name."""
    from matplotlib.font_manager import findfont, fontManager
    if character == "\n" or ord(character) in _characters(findfont(FONT)):
        return FONT
    upright = sorted((font.name, font.fname) for font in fontManager.ttflist if font.style == "normal" and font.weight == 400)
    return next((name for name, file in upright if not name.startswith("Last Resort") and ord(character) in _characters(file)),
                None)  # Last Resort has a box for every character


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font
    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):  # a font that FreeType can't read
        return frozenset()
