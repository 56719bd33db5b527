"""A zstd file as a stream of bytes."""

from __future__ import annotations

import io
from typing import IO, Any

INPUT_BYTES = 4096  # 4 bytes of zstd can stand for 128 KiB: a small input bounds what a hostile file unpacks at once


class ZstdStream(io.RawIOBase):
    """Reads one or several frames; unlike the library's own reader it notices a file that ends too early.

    Raises EOFError for a truncated or corrupt file, as gzip does. Owns and closes `file`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.frame: Any = None
        self.ready = memoryview(b"")
        self.input = b""

    def readable(self) -> bool:
        """True: this stream is read only."""
        return True

    def close(self) -> None:
        """Close the file too."""
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the next piece of output goes; 0 at the end."""
        while not self.ready:
            self.input = self.input or self.file.read(INPUT_BYTES)
            if not self.input:
                if self.frame is not None:
                    raise EOFError("the zstd frame ends too early")
                return 0
            self.ready = memoryview(self._decompress())
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def _decompress(self) -> bytes:
        import zstandard

        if self.frame is None:
            self.frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            out: bytes = self.frame.decompress(self.input)
        except zstandard.ZstdError as wrong:
            raise EOFError(str(wrong)) from None
        self.input = b""
        if self.frame.eof:
            self.input, self.frame = self.frame.unused_data, None
        return out
