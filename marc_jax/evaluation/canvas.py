"""A page to draw on: its unit is a pixel of a 1200 wide page, downwards, so a layout is plain arithmetic.

Text goes through matplotlib, which brings its own font: accents, arrows, Greek and Cyrillic work everywhere, and CJK
where such a font is installed.
"""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from marc_jax.evaluation import plots

WIDTH, MARGIN = 1200.0, 28.0
INK, MUTED, PALE, RULE = "#1c2733", "#66717e", "#dde3ea", "#e9edf2"
FAMILIES = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "SimHei")
_INCHES = 10.0
_POINT = 72 * _INCHES / WIDTH  # typographic points in a page pixel


class Page:
    """A canvas in page pixels; the height is set at the end, when the text has been laid out."""

    def __init__(self):
        self.fig = plots.figure(_INCHES, _INCHES, plots.LIGHT)
        self.ax = self.fig.add_axes((0, 0, 1, 1))
        self.ax.axis("off")
        self.families = _installed(FAMILIES)
        self._renderer = self.fig.canvas.get_renderer()

    def text(self, x: float, y: float, text: str, size: float = 15, **style) -> None:
        """Text whose size is in page pixels; y is the top unless `va` says otherwise."""
        style = {"va": "top", "color": INK, "family": self.families, "parse_math": False, **style}
        self.ax.text(x, y, text, fontsize=size * _POINT, **style)

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Width of one line of text in page pixels."""
        from matplotlib.font_manager import FontProperties

        if not text:
            return 0.0
        font = FontProperties(family=self.families, weight=weight, size=size * _POINT)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # drawn as a box, as every reader of the text would
            pixels = self._renderer.get_text_width_height_descent(text, font, False)[0]
        return pixels * WIDTH / (_INCHES * self.fig.dpi)

    def lines(self, text: str, size: float, width: float, most: int, weight: str = "normal") -> list[str]:
        """The text broken into at most `most` lines of that width; what does not fit is counted on the last line."""
        text = str(text)
        broken = _break(text, lambda part: self.width(part, size, weight) <= width)
        lines = list(itertools.islice(broken, most + 1))
        if len(lines) <= most:
            return lines
        cut = max(1, len(text) - sum(len(line) + 1 for line in lines[:most]))
        last = lines[most - 1]
        while last and self.width(f"{last} … +{cut} characters", size, weight) > width:
            last, cut = last[:-1], cut + 1
        return [*lines[: most - 1], f"{last} … +{cut} characters"]

    def box(self, x: float, y: float, width: float, height: float, colour: str, **style) -> None:
        """A filled rectangle; (x, y) is its upper left corner."""
        from matplotlib.patches import Rectangle

        style = {"linewidth": 0, **style}
        self.ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, **style))

    def image(self, x: float, y: float, width: float, height: float, image: np.ndarray, alpha: float = 1.0) -> None:
        """An image scaled into a rectangle; small synthetic frames keep their hard pixels."""
        smooth = "nearest" if image.shape[1] <= 96 else "antialiased"
        self.ax.imshow(image, extent=(x, x + width, y + height, y), interpolation=smooth, alpha=alpha, aspect="auto")

    def ribbon(self, top: tuple[float, float, float], bottom: tuple[float, float, float], colour: str) -> None:
        """A band from (x0, x1, y) above to (x0, x1, y) below, with vertical ends."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Outline

        (a, b, y0), (c, d, y1) = top, bottom
        mid = (y0 + y1) / 2
        points = [(a, y0), (a, mid), (c, mid), (c, y1), (d, y1), (d, mid), (b, mid), (b, y0), (a, y0)]
        move, line, curve = Outline.MOVETO, Outline.LINETO, Outline.CURVE4
        outline = Outline(points, [move, curve, curve, curve, line, curve, curve, curve, line])
        self.ax.add_patch(PathPatch(outline, facecolor=colour, alpha=0.28, linewidth=0))

    def paragraph(self, x: float, y: float, lines: Sequence[str], size: float, **style) -> float:
        """Lines of text under each other: the y after the last."""
        for line in lines:
            self.text(x, y, line, size, **style)
            y += size * 1.38
        return y

    def save(self, path: str | os.PathLike, height: float, dpi: int) -> tuple[int, int]:
        """Fixes the height and writes the PNG."""
        inches = _INCHES * height / WIDTH
        self.fig.set_size_inches(_INCHES, inches)
        self.ax.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")
            plots.save(self.fig, path, dpi)
        return int(_INCHES * dpi), int(inches * dpi)


def _installed(families: Sequence[str]) -> list[str]:
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in families if name in known] or ["sans-serif"]


def _break(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Greedy line breaking at blanks, a line at a time; a word too long for a line is cut where it must be."""
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.replace("\t", " ").split(" "):  # a wide blank (U+2003) holds its words apart
            if fits(f"{line} {word}" if line else word):
                line = f"{line} {word}" if line else word
                continue
            if line:
                yield line
            while len(word) > 1 and not fits(word):
                cut = _longest(word, fits)
                yield word[:cut]
                word = word[cut:]
            line = word
        yield line


def _longest(word: str, fits: Callable[[str], bool]) -> int:
    """How many characters of the word fit, at least one: the step doubles, then halves."""
    low, high = 1, 2
    while high < len(word) and fits(word[:high]):
        low, high = high, 2 * high
    high = min(high, len(word))
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if fits(word[:mid]) else (low, mid)
    return low
