"""engram: build, train, quantize, export and run language models whose memory lives on disk."""

from __future__ import annotations

from types import TracebackType
from typing import Self

__version__ = "0.5.0"


class EngramError(Exception):
    """An error that a user can act on.

    The message names the value, the rule it breaks and the field or file; the hint says what to do about it.
    Everything else that is raised is a defect of ours.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Task:
    """One piece of work with a known or unknown total; silent here, drawn by the command line."""

    def advance(self, amount: float = 1) -> None:
        """Record that `amount` units (of the task's unit) are done."""

    def note(self, text: str) -> None:
        """Show a short text (loss, rate, …) beside the bar."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the task off the screen."""


class Progress:
    """How workers speak while they work. This base class is silent; nothing below the command line prints."""

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        """Begin a task of `total` units (None: unknown)."""
        return Task()

    def say(self, text: str) -> None:
        """Say one line of words (stderr in the command line)."""

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Show a small table of results."""
