"""The picture of a text's gates: tokens as columns, layers as rows, wrapped in lines like the text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from engram import EngramError, Progress
from engram.runtime.gates_scale import background, ends, ink, share

FONT = "DejaVu Sans Mono"  # comes with matplotlib
DPI = 160
COLUMNS = 118  # characters of a line
ROWS = 240  # of text and of cells, at most: 8,000 to 14,000 pixels
_SIZE = 9.0  # points
_ADVANCE = _SIZE * 0.602 / 72  # inches of one character of that font
_ROW, _GAP, _LEFT, _TOP, _BOTTOM = 0.21, 0.16, 0.85, 0.75, 0.3  # inches
_SIGNS = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


class PictureError(EngramError):
    """A text that is too long for a picture."""


def label(text: str) -> str:
    """A token as a picture or a terminal shows it in one line: signs for line ends and tabs, a dot for nothing."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.translate(_SIGNS)) or "·"
    return shown if cell_len(shown) <= COLUMNS - 2 else set_cell_size(shown, COLUMNS - 3) + "…"


def wrap(texts: Sequence[str]) -> list[list[tuple[int, int, int]]]:
    """Lines of (token, first column, columns); a token that ends in a line end is the last of its line."""
    lines: list[list[tuple[int, int, int]]] = [[]]
    column = 0
    for number, text in enumerate(texts):
        width = max(cell_len(label(text)) + 1, 4)  # 100 has three digits
        if column + width > COLUMNS or (number and texts[number - 1].endswith("\n")):
            lines.append([])
            column = 0
        lines[-1].append((number, column, width))
        column += width
    return lines


def check_room(texts: Sequence[str], layers: int) -> None:
    """PictureError where a picture would have more than ROWS rows."""
    lines = len(wrap(texts))
    most = max(1, ROWS // (layers + 1))
    if lines > most:
        raise PictureError(
            f"the text takes {lines:,} lines, a picture of {layers} layers holds {most}",
            hint="cut the text, or write --html",
        )


def draw(result: dict[str, Any], progress: Progress | None = None) -> bytes:
    """A PNG of about 1,750 pixels across; its height follows from the text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    notes, layers = result["tokens"], result["layers"]
    texts = [_drawable(label(note["text"])) for note in notes]
    if lacking := sum(shown != label(note["text"]) for shown, note in zip(texts, notes, strict=True)):
        (progress or Progress()).say(f"{FONT} has no sign for a character of {lacking} tokens: --html shows them")
    lines = wrap([note["text"] for note in notes])
    step = _ROW * (len(layers) + 1) + _GAP
    width, height = _LEFT + COLUMNS * _ADVANCE + 0.3, _TOP + step * len(lines) + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")

    def say(x: float, y: float, words: str, size: float = _SIZE, **more: Any) -> None:
        axes.text(x, y, words, size=size, family=FONT, parse_math=False, va="center", **more)

    boxes, colours = [], []

    def box(x: float, y: float, across: float, part: float) -> tuple[float, ...]:
        boxes.append([(x, y), (x + across, y), (x + across, y + _ROW), (x, y + _ROW)])
        colours.append(tuple(value / 255 for value in background(part)))
        return tuple(value / 255 for value in ink(background(part)))

    title = f"How far the gates open: {result['package']}, {result['backbone']}, rows in {', '.join(result['codecs'])}"
    say(0.15, 0.2, _drawable(label(title)), weight="bold")
    _legend(result, say, box)
    for place, line in enumerate(lines):
        top = _TOP + place * step
        for row, name in enumerate(layers):
            say(_LEFT - 0.08, top + _ROW * (row + 1.5), f"layer {name}", 7.5, ha="right", color="#50555f")
        for number, column, columns in line:
            x, across = _LEFT + column * _ADVANCE, columns * _ADVANCE
            say(x + across / 2, top + _ROW / 2, texts[number].strip(), ha="center", color="black")
            for row, (name, figures) in enumerate(layers.items()):
                value = notes[number]["gates"][name]
                y = top + _ROW * (row + 1)
                colour = box(x, y, across, share(value, *ends(figures, result["scale"])))
                say(x + across / 2, y + _ROW / 2, f"{100 * value:.0f}", 7, ha="center", color=colour)
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=0.8), autolim=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _legend(result: dict[str, Any], say: Any, box: Any) -> None:
    """What the colours mean, in a line under the title."""
    steps = 24
    for number in range(steps):
        box(_LEFT + 0.4 + number * 0.06, 0.38, 0.06, number / (steps - 1))
    full = result["scale"] == "full"
    say(_LEFT + 0.32, 0.38 + _ROW / 2, "0" if full else "lowest", 7.5, ha="right")
    words = "100   numbers are percent, 100 is wide open"
    if not full:
        each = (
            f"layer {name}: {100 * part['lowest']:.2f} to {100 * part['highest']:.2f}"
            for name, part in result["layers"].items()
        )
        words = "highest of each layer, in percent: " + ", ".join(each)
    say(_LEFT + 0.4 + steps * 0.06 + 0.08, 0.38 + _ROW / 2, words, 7.5)


def _drawable(text: str) -> str:
    """The text with a box for what the font has no sign for."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=FONT)))
    return "".join(c if font.get_char_index(ord(c)) else "□" * max(cell_len(c), 1) for c in text)
