"""`engram plan`: where each part of a model with a memory should live, and what its rows cost there.

The model of cost is in placement_cost.py; nothing of the model but headers is read, and nothing is run. Tables belong
on the disk: the page cache holds what is read of them. Backbone and key-value cache take VRAM first, then RAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engram import Progress
from engram.builders.backbone import BackboneRef
from engram.kernels.codecs import CodecError, find_codec, written_codecs
from engram.quantize.inspect_any import inspect_any
from engram.quantize.row_store import PAGE, Geometry, RowStoreError
from engram.runtime.doctor import examine
from engram.runtime.kv_size import kv_bytes
from engram.runtime.placement_cost import (
    ASK_S,
    DISTINCT_LEAST,
    DISTINCT_MOST,
    MEASURED_HERE,
    TOUCH_MANY_S,
    TOUCH_S,
    Disk,
    Gather,
    PlacementError,
    StoredTable,
    cost,
    measure_gather,
)
from engram.runtime.placement_words import percent, words_of, would_fit

ROOM = 2.0  # times the tables' bytes must be free before RAM is thought of
GAIN_MS = 1.0  # that a cold token must lose to the disk before RAM is worth taking
_ELEMENT_BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
_TWO_PARTS = "fp8-e8m0"  # the codec whose values and scales are two tensors where it is published


@dataclass(frozen=True)
class PlacementConfig:
    """What `engram plan` needs to know. `iops` and `measure` exclude each other; without both a default is used."""

    model: str
    ram_bytes: int
    vram_bytes: int = 0
    context: int = 8192
    iops: float | None = None
    measure: Path | None = None  # a folder on the disk to probe
    seconds: float = 1.0  # a depth of the probe, and for all gathers

    def __post_init__(self) -> None:
        """Refuse what no plan can be made for."""
        if self.ram_bytes <= 0 or self.vram_bytes < 0:
            raise PlacementError(
                f"--ram {self.ram_bytes} must be above 0 and --vram {self.vram_bytes} at least 0",
                hint="what the model may take of each, for example --ram 16GB --vram 8GB",
            )
        if self.context < 1:
            raise PlacementError(
                f"--context {self.context} must be at least 1", hint="tokens that the key-value cache holds"
            )
        if self.iops is not None and self.measure is not None:
            raise PlacementError("--disk-iops and --measure both say how fast the disk is", hint="leave one out")
        if self.iops is not None:
            Disk.given(self.iops)


def plan(config: PlacementConfig, progress: Progress | None = None) -> dict[str, Any]:
    """The fields of `engram plan --json`.

    `parts`: {part, bytes, place, vram_bytes, ram_bytes, disk_bytes, reason}, `bytes` and `place` null where not known;
    `resident`: their sums, and `cache_bytes`, the RAM left for the page cache; `fits` (null where a part's size is not
    known and the others fit) and `would_fit`; `disk` and `gather`: the figures used and where they are from; `codecs`,
    the one stored first: {codec, stored, row_bytes, disk_bytes, cached_share, reads_per_token, pages_per_token,
    bytes_per_token, cold_ms_per_token, cached_ms_per_token (the first time a process touches cached pages),
    warm_ms_per_token, and of 1,000 prompt tokens, [least, most], reads_per_1000, pages_per_1000, cold_ms_per_1000,
    cached_ms_per_1000, and warm_ms_per_1000}; `left_out`: codecs that cannot hold the rows, and why;
    `words`: the plan in sentences; `assumptions`. Raises PlacementError, and what reading and probing raise.
    """
    found = inspect_any(config.model, progress or Progress())
    stored = _stored(found)
    others, left_out = _candidates(found, stored)
    disk, gather = _figures(config, [stored, *others.values()], progress or Progress())
    costs = {name: cost(tables, disk, gather) for name, tables in others.items()}
    own = cost(stored, disk, gather)
    gain = own["cold_ms_per_token"] - own["cached_ms_per_token"]
    parts, fits = _parts(config, found, stored, gain)
    resident = {f"{place}_bytes": sum(part[f"{place}_bytes"] for part in parts) for place in ("vram", "ram", "disk")}
    cache = max(0, config.ram_bytes - resident["ram_bytes"])
    result: dict[str, Any] = {
        "model": config.model, "kind": found["kind"], "family": found["family"], "ram_bytes": config.ram_bytes,
        "vram_bytes": config.vram_bytes, "context": config.context, "parts": parts,
        "resident": resident | {"cache_bytes": cache}, "fits": fits,
        "disk": {"source": disk.source, "words": disk.words, "iops": disk.iops, "latency_ms": 1e3 * disk.latency_s,
                 "reads_per_second": dict(disk.reads_per_second)},
        "gather": {"source": gather.source, "words": gather.words,
                   "ns_per_row": {name: 1e9 * row for name, (_, row) in gather.by_codec.items()}},
    }  # fmt: skip
    result["would_fit"] = [] if fits is not False else would_fit(result, found)
    entries = [_entry(_name(stored), True, stored, cache, own)]
    entries += [_entry(name, False, others[name], cache, found_cost) for name, found_cost in costs.items()]
    result |= {"codecs": entries, "left_out": left_out}
    return result | {"words": words_of(result), "assumptions": _assumptions(disk, gather)}


def _stored(found: dict[str, Any]) -> list[StoredTable]:
    """The tables as they lie there."""
    tables = []
    for layer in found["layers"]:
        row_bytes, width, rows = layer["row_bytes"], layer["width"], layer["rows"]
        size = round(rows * row_bytes)
        parts: tuple[float, ...] = (row_bytes,)
        codec = layer.get("codec") or layer["dtype"]
        if "other" in found:  # a published checkpoint
            values = width * _ELEMENT_BYTES.get(layer["dtype"], 0)
            if values and row_bytes - values >= 1:
                parts = values, row_bytes - values
        elif layer["bytes"] < 0.99 * size:  # a map: the rows are in foreign files
            parts = (width, row_bytes - width) if codec == _TWO_PARTS else parts
        else:
            size = layer["bytes"]
            parts = parts if found["kind"] == "float checkpoint" else ()
        tables.append(
            StoredTable(layer["layer"], tuple(layer["orders"]), layer["heads"], width, codec, row_bytes, size,
                        max(1, -(-size // PAGE)), parts)
        )  # fmt: skip
    return tables


def _candidates(
    found: dict[str, Any], stored: Sequence[StoredTable]
) -> tuple[dict[str, list[StoredTable]], dict[str, str]]:
    """The same rows in table files of ours, by codec, the largest first; the codecs that cannot hold them, and why."""
    packed = not any(table.parts for table in stored)
    out: dict[str, list[StoredTable]] = {}
    left_out = {}
    for name in written_codecs():
        if packed and {table.codec for table in stored} == {name}:
            continue
        try:
            files = [Geometry(find_codec(name), layer["rows"], layer["width"], layer["layer"])
                     for layer in found["layers"]]  # fmt: skip
        except (CodecError, RowStoreError) as why:
            left_out[name] = str(why)
            continue
        out[name] = [
            replace(table, codec=name, row_bytes=file.row_bytes, file_bytes=file.file_bytes, rows_pages=file.pages,
                    parts=())
            for table, file in zip(stored, files, strict=True)
        ]  # fmt: skip
    return dict(sorted(out.items(), key=lambda item: -sum(table.file_bytes for table in item[1]))), left_out


def _figures(
    config: PlacementConfig, ways: Sequence[Sequence[StoredTable]], progress: Progress
) -> tuple[Disk, Gather]:
    """How fast disk and gather are: measured, told, or a default that says so."""
    if config.measure is not None:
        curve = examine(config.measure, config.seconds, progress)["curve"]
        disk = Disk.of_curve(curve["reads_per_second"], "measured", f"measured in {config.measure}")
        wanted = []
        for table in (table for tables in ways for table in tables):
            for name in table.codec.split("+"):
                try:
                    wanted.append((find_codec(name), table.width, table.columns))
                except CodecError:  # dropped rows, or a type that is only read elsewhere
                    continue
        with progress.task("time gathers"):
            return disk, measure_gather(wanted, config.seconds)
    gather = Gather("default", "fitted to benchmarks/results/rows_kernels.json, the same for every codec of a size")
    if config.iops is not None:
        return Disk.given(config.iops), gather
    words = "a cloud disk measured for benchmarks/results/rows_disk.json"
    return Disk.of_curve(MEASURED_HERE, "default", words), gather


def _parts(
    config: PlacementConfig, found: dict[str, Any], stored: Sequence[StoredTable], gain: float
) -> tuple[list[dict[str, Any]], bool | None]:
    """Every part with its place; whether all that needs memory fits (None: the sizes that are known do)."""
    place, dtype = _backbone(config.model, found)
    cache, how = kv_bytes(place, config.context, 4 if dtype == "float32" else 2)
    missing = found.get("missing_files", ())
    weights = found["backbone"].get("bytes") if "backbone" in found else None if missing else found["other"]["bytes"]
    rooms = {"vram": config.vram_bytes, "ram": config.ram_bytes}
    parts = [_taken(f"KV cache, {config.context:,} tokens", cache, rooms, how)]
    name = "other tensors" if "other" in found else "backbone"
    absent = f"{len(missing)} of its files are not here" if missing else "its files are not here"
    why = absent if weights is None else "every token reads what it uses of it"
    parts.append(_taken(name, weights, rooms, why) | {"disk_bytes": weights or 0})
    fits = rooms["ram"] >= 0
    size = sum(table.file_bytes for table in stored)
    in_ram = fits and ROOM * size <= rooms["ram"] and gain >= GAIN_MS
    if in_ram:
        reason = f"fits twice over, and spares a cold token {gain:.1f} ms of this disk"
    elif size <= rooms["ram"]:
        reason = f"the page cache will hold it all; RAM of its own would spare a cold token {gain:.1f} ms, once"
    else:
        reason = f"read by the row; {percent(max(0, rooms['ram']) / size)} of the tables fit the page cache"
    for table in stored:
        parts.append(
            {"part": f"table, layer {table.layer}", "bytes": table.file_bytes, "place": "ram" if in_ram else "disk",
             "vram_bytes": 0, "ram_bytes": table.file_bytes if in_ram else 0, "disk_bytes": table.file_bytes,
             "reason": reason}
        )  # fmt: skip
    known = all(part["bytes"] is not None for part in parts)
    return parts, (True if known else None) if fits else False


def _taken(name: str, size: int | None, rooms: dict[str, int], why: str) -> dict[str, Any]:
    """A part that needs memory: VRAM as far as it goes, then RAM; what was taken is subtracted from `rooms`."""
    if size is None:
        return {"part": name, "bytes": None, "place": None, "vram_bytes": 0, "ram_bytes": 0, "disk_bytes": 0,
                "reason": f"not known: {why}"}  # fmt: skip
    vram = min(size, rooms["vram"])
    ram = size - vram
    short = ram > rooms["ram"]
    rooms["vram"] -= vram
    rooms["ram"] -= ram
    place = "vram" if not ram else "vram+ram" if vram else "ram"
    reason = why + ("; what VRAM does not hold goes to RAM" if place == "vram+ram" else "")
    reason += "; more than there is" if short else ""
    return {"part": name, "bytes": size, "place": place, "vram_bytes": vram, "ram_bytes": ram, "disk_bytes": 0,
            "reason": reason}  # fmt: skip


def _backbone(name: str, found: dict[str, Any]) -> tuple[Path | None, str]:
    """Where the backbone's configuration lies, and what it computes in."""
    model = Path(name)
    if "other" in found:
        return model if "source" not in found else None, "bfloat16"
    reference = BackboneRef(found["backbone"]["kind"], found["backbone"]["path"])
    place = model / reference.path if reference.kind == "embedded" else Path(reference.path)
    return place, found["backbone"]["dtype"]


def _entry(
    name: str, stored: bool, tables: Sequence[StoredTable], cache: int, found: dict[str, Any]
) -> dict[str, Any]:
    size = sum(table.file_bytes for table in tables)
    return {
        "codec": name, "stored": stored, "row_bytes": max(table.row_bytes for table in tables), "disk_bytes": size,
        "cached_share": min(1.0, cache / size), **found,
    }  # fmt: skip


def _name(tables: Sequence[StoredTable]) -> str:
    return "+".join(dict.fromkeys(table.codec for table in tables))


def _assumptions(disk: Disk, gather: Gather) -> dict[str, Any]:
    return {
        "token": "columns x layers rows, all asked for at once; cold: none of their pages cached, a 4 KiB read each",
        "disk": "n pages take one read's latency and (n - 1) / reads a second, or their touching if that is longer; "
                + disk.words,
        "layout": "no row of our table files crosses a page; rows of safetensors files in place may, and those with "
                  "scales in a tensor of their own are two reads; rows are drawn evenly",
        "prompt": "1,000 tokens, each row read once; of the look-ups this share is distinct, by order: [least, most]",
        "distinct_share": {order: [DISTINCT_LEAST.get(order, DISTINCT_LEAST[4]), most]
                           for order, most in DISTINCT_MOST.items()},
        "touch": f"a page that is new to the process costs {1e6 * TOUCH_S:g} µs among a token's, "
                 f"{1e6 * TOUCH_MANY_S:g} µs among a prompt's (fault and checksum); a table that asks for such pages "
                 f"{1e6 * ASK_S:g} µs",
        "warm": "every look-up is gathered and decoded by one thread; " + gather.words,
        "kv_cache": "every attention layer keeps every position, 2 bytes a value (4 for a float32 backbone)",
        "ram": "RAM and VRAM are what the model may take; tables go to RAM only where they fit "
               f"{ROOM:g} times over and a cold token loses {GAIN_MS:g} ms or more",
    }  # fmt: skip
