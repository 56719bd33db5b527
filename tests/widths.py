"""Row widths for tests that go over all codecs."""

from __future__ import annotations

from engram.kernels.codecs import CODECS, CodecError


def fitting(codec: str, width: int) -> int:
    """The width, or the next multiple of 32 for a codec that stores blocks only."""
    try:
        CODECS[codec].row_bytes(width)
    except CodecError:
        return -(-width // 32) * 32
    return width
