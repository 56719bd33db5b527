"""How far a gate opened as a colour: the ends of the scale, and what lies between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALES = ("full", "fit")  # 0 to 1, or the lowest to the highest of each layer
_STOPS = ((255, 250, 240), (245, 165, 36), (120, 45, 0))  # closed, half open, open: lightness falls all the way


def ends(figures: Mapping[str, Any], scale: str) -> tuple[float, float]:
    """The gate that is drawn as closed and the one that is drawn as open, from a layer's figures."""
    return (0.0, 1.0) if scale == "full" else (figures["lowest"], figures["highest"])


def share(value: float, low: float, high: float) -> float:
    """Where a value lies between two ends, 0 … 1; 0 where they are one."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def background(part: float) -> tuple[int, int, int]:
    """Red, green and blue of a share, 0 … 255."""
    first = min(int(part * 2), 1)
    rest = part * 2 - first
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(_STOPS[first], _STOPS[first + 1], strict=True))
    return red, green, blue


def ink(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white: whichever is read better on that ground (WCAG's contrast)."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(ground, black) >= contrast(ground, white) else white


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """WCAG's contrast of two colours, 1 … 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: tuple[int, int, int]) -> float:
    red, green, blue = (
        part / 12.92 if (part := value / 255) <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for value in colour
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
