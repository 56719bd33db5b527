"""What a benchmark script leaves: targets with bound, value and whether it was met, printed and written as JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram import Progress, Task
from engram.runtime import bench_report

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """One bound of the table of targets. `value` is None where it could not be measured; `note` says why."""

    what: str
    bound: str  # "<= 1.7" or ">= 4"
    value: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value keeps the bound; None where there is no value."""
        if self.value is None:
            return None
        relation, number = self.bound.split()
        return self.value <= float(number) if relation == "<=" else self.value >= float(number)


class Lines(Progress):
    """Progress as lines on stderr, one at the end of every step."""

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        return _Line(label)

    def say(self, text: str) -> None:
        say(text)


class _Line(Task):
    def __init__(self, label: str) -> None:
        self._label, self._began = label, time.monotonic()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and time.monotonic() - self._began > 1:
            say(f"{self._label}: {time.monotonic() - self._began:.1f} s")


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(targets: Sequence[Target]) -> None:
    """The table of targets on stdout."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    width = max((len(target.what) for target in targets), default=0)
    for target in targets:
        value = "-" if target.value is None else f"{target.value:,.3f}"
        note = f"  ({target.note})" if target.note else ""
        print(f"{target.what:<{width}}  {target.bound:>8}  {value:>12}  {words[target.met]}{note}")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tables, few rounds: shows that it runs, no figures")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: results/; with --quick nowhere)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def finish(
    name: str, chosen: argparse.Namespace, targets: Sequence[Target], method: dict[str, Any], results: Any
) -> list[Target]:
    """Print the targets and write results/NAME.json; a quick run writes only where it is told to."""
    show(targets)
    out = chosen.out if chosen.out or chosen.quick else RESULTS / f"{name}.json"
    if out is not None:
        lines = [{**asdict(target), "met": target.met} for target in targets]
        content = {"machine": bench_report.machine(), "quick": chosen.quick, "method": method, "targets": lines,
                   "results": results}  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        bench_report.save_json(out, content)
        say(f"wrote {out}")
    return list(targets)


def attempt(make: Callable[[], Any], name: str) -> tuple[Any, str]:
    """A peer, or why there is none."""
    from engram import EngramError

    try:
        return make(), ""
    except (EngramError, ImportError, RuntimeError, AttributeError) as wrong:
        say(f"left out: {name}: {wrong}")
        return None, str(wrong)
