"""What a benchmark leaves: the machine that it ran on, a JSON file, tables for people, and a picture."""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram import __version__
from engram.builders.atomic import write_whole
from engram.kernels import dispatch
from engram.runtime.bench_kernels import versions
from engram.runtime.bench_race import BenchError

_DISTRIBUTIONS = ("numpy", "torch", "transformers", "engramdb-python", "fbgemm-gpu-cpu", "xllamacpp")


def machine() -> dict[str, Any]:
    """What the figures depend on, without names: processor, cores, memory, kernel, load, versions."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(), "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache_bytes": last_level_cache(), "memory": _line("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}", "load": os.getloadavg()[0],
        "python": platform.python_version(), "engram": __version__, "kernels": dispatch.name(),
        "versions": versions(*_DISTRIBUTIONS),
    }  # fmt: skip


def _line(file: str, name: str) -> str | None:
    try:
        with open(file, encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
    except OSError:
        return None


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 0 where the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1) if text[:-1].isdigit() else 0)
    return max(sizes)


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be written, before anything is measured."""
    if path.suffix.lower() != ".png":
        raise BenchError(f"--plot {path} does not end in .png, the one kind of picture that is written")
    if not path.parent.is_dir():
        raise BenchError(f"--plot {path}: the folder {path.parent} does not exist")


def save_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole; NaN and infinity become null."""
    write_whole(path, (json.dumps(_plain(result), indent=1) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return value.name
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rates(results: Sequence[Mapping[str, Any]], trace: str) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of a table: contenders down, rows a call across, rows a second in the cells."""
    counts = sorted({result["rows"] for result in results})
    names = dict.fromkeys((result["name"], result["kind"]) for result in results if result["trace"] == trace)
    found = {(r["name"], r["rows"]): r["rows_per_second"] for r in results if r["trace"] == trace}
    lines = [
        [name, kind, *(f"{found[name, count]:,.0f}" if (name, count) in found else "-" for count in counts)]
        for name, kind in names
    ]
    return ["rows a second", "gives", *(f"R = {count:,}" for count in counts)], lines


def draw(result: Mapping[str, Any], trace: str = "text") -> bytes:
    """A PNG of 1760 x 880 pixels (880 for one state): rows/s over rows a call, log-log, with the limits drawn in.

    The device limit is its best rate of 4 KiB reads over the distinct pages that a row of the trace takes.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    states = [state for state in ("warm", "cold") if state in result]
    figure = Figure(figsize=(5.5 * len(states), 5.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(states), squeeze=False, sharey=True)[0]
    entries = [entry for state in states for entry in result[state]["results"] if entry["trace"] == trace]
    names = list(dict.fromkeys(entry["name"] for entry in entries if not entry["limit"]))
    counts = sorted({entry["rows"] for entry in entries})
    for axis, state in zip(axes, states, strict=True):
        here = [entry for entry in result[state]["results"] if entry["trace"] == trace]
        for place, name in enumerate(names):
            own = name.startswith("engram")
            axis.plot(
                *_points(here, name), label=name, color=colormaps["tab20"](place % 20), linestyle="-" if own else ":",
                linewidth=2.4 if own else 1.4, marker="o" if own else ".", zorder=3 if own else 2,
            )  # fmt: skip
        for name in dict.fromkeys(entry["name"] for entry in here if entry["limit"]):
            axis.plot(*_points(here, name), label=f"memory limit ({name})", color="black", linestyle="--")
        if state == "cold" and "device" in result:
            best = result["device"]["best"]
            pages = {entry["rows"]: entry["pages_per_row"] for entry in here}
            axis.plot(counts, [best / pages[count] for count in counts], color="black", linestyle="-.",
                      label=f"device limit ({best:,.0f} pages of 4 KiB a second)")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="rows a call", title=f"{state}, rows of {trace}")
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    shown = dict(pair for axis in axes for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), fontsize="x-small", loc="outside lower center", ncols=2 * len(states))
    axes[0].set_ylabel("rows a second")
    table = result.get("table", {})
    figure.suptitle(f"{table.get('codec', '')} rows of {table.get('row_bytes', '?')} bytes, "
                    f"{table.get('rows', 0):,} in the table")  # fmt: skip
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = sorted((entry["rows"], entry["rows_per_second"]) for entry in entries if entry["name"] == name)
    return [rows for rows, _ in found], [rate for _, rate in found]


def save_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Draw and write whole."""
    check_plot(path)
    write_whole(path, draw(result))
