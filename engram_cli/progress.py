"""Progress as a person sees it: bars on a terminal, one line every ten seconds elsewhere. Both honour NO_COLOR."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from engram import Progress, Task
from engram.cli import ui
from engram.cli.sizes import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PLAIN_EVERY_S = 10.0
DRAW_EVERY_S = 0.1
WORTH_A_LINE_S = 1.0


def on_screen() -> Progress:
    """Bars if stderr is a terminal, otherwise plain lines."""
    drawn = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return BarProgress() if drawn else PlainProgress()


class _Clock:
    """Counts one task's amount and time."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.words = ""
        self.began = time.monotonic()

    def amount(self, number: float) -> str:
        return show_bytes(number) if self.unit in ("B", "bytes") else f"{show_count(number)} {self.unit}".rstrip()

    def line(self) -> str:
        """`tokenize: 12% of 44.00M tokens, 1.20M tokens/s, 0:31 left — loss 3.2`."""
        spent = time.monotonic() - self.began
        rate = self.done / spent if spent > 0 else 0.0
        parts = [f"{self.done / self.total:.0%} of {self.amount(self.total)}" if self.total else self.amount(self.done)]
        if rate > 0:
            parts.append(f"{self.amount(rate)}/s" if rate >= 10 or self.unit in ("B", "bytes") else f"{rate:.2f}/s")
            if self.total and self.done < self.total:
                parts.append(f"{show_seconds((self.total - self.done) / rate)} left")
        return f"{self.label}: {', '.join(parts)}" + (f" — {self.words}" if self.words else "")

    def last_line(self) -> str:
        spent = time.monotonic() - self.began
        amount = f"{self.amount(self.done)} in " if self.done else ""
        return f"{self.label}: {amount}{show_seconds(spent)}" + (f" — {self.words}" if self.words else "")


class PlainTask(Task):
    """A task for logs and pipes: a line every ten seconds and one at the end, if it took long enough to matter."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._said = clock.began

    def advance(self, amount: float = 1) -> None:
        self._clock.done += amount
        if time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._said = time.monotonic()
            ui.say(self._clock.line())

    def note(self, text: str) -> None:
        self._clock.words = text

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and time.monotonic() - self._clock.began >= WORTH_A_LINE_S:
            ui.say(self._clock.last_line())


class PlainProgress(Progress):
    """Words without a terminal."""

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        return PlainTask(_Clock(label, total, unit))

    def say(self, text: str) -> None:
        ui.say(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        ui.table(title, columns, rows, to_stderr=True)


class BarTask(Task):
    """One bar; when it ends, one line saying how much and how long takes its place."""

    def __init__(self, owner: BarProgress, clock: _Clock) -> None:
        self._owner, self._clock = owner, clock
        self._bar = owner.open(clock)
        self._drawn = 0.0

    def advance(self, amount: float = 1) -> None:
        self._clock.done += amount
        if time.monotonic() - self._drawn >= DRAW_EVERY_S:
            self._drawn = time.monotonic()
            self._owner.draw(self._bar, self._clock)

    def note(self, text: str) -> None:
        self._clock.words = text

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._owner.close(self._bar)
        if kind is None and time.monotonic() - self._clock.began >= WORTH_A_LINE_S:
            self._owner.say(self._clock.last_line())


class BarProgress(Progress):
    """Bars with share, rate and time left on a terminal's stderr; they go when the last task ends."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._open = 0

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        return BarTask(self, _Clock(label, total, unit))

    def open(self, clock: _Clock) -> TaskID:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        if self._bars is None:
            words = TextColumn("{task.description}", markup=False)
            screen = Console(stderr=True, highlight=False)
            self._bars = Bars(BarColumn(bar_width=24), words, console=screen, transient=True)
            self._bars.start()
        self._open += 1
        return self._bars.add_task(clock.line(), total=clock.total)

    def draw(self, bar: TaskID, clock: _Clock) -> None:
        if self._bars is not None:
            self._bars.update(bar, completed=clock.done, description=clock.line())

    def close(self, bar: TaskID) -> None:
        if self._bars is None:
            return
        self._bars.remove_task(bar)
        self._open -= 1
        if self._open == 0:
            self._bars.stop()
            self._bars = None

    def say(self, text: str) -> None:
        if self._bars is None:
            ui.say(text)
        else:
            self._bars.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        ui.table(title, columns, rows, to_stderr=True)
