"""DeepSeek-V4.1's tables as antirez/ds4 reads them: GGUF tensors `blk.L.engram_embd.weight`, I8 [rows, 264].

A row is 256 E4M3 bytes, then its 8 E8M0 scales, one for each 32 values in turn: as our codec fp8-e8m0 has it. So say
ds4_engram.h and ds4_engram_read of antirez/ds4 at ec37a83b, and write_engram of gguf-tools/deepseek41_quantize.py at
30ac654f, which also puts the tables last in the file and everything at multiples of 16384, and refuses NaN. The keys
`deepseek41.engram.*` are those of its deepseek41_metadata.py. ds4 has 2 layers, orders to 4, 8 heads and 256 values a
row compiled in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.families.config import Header
from engram.builders.gguf_header import read_pairs
from engram.quantize.export.gguf_file import Entry, check_file, copied, number, numbers, open_backbone, text, write_gguf
from engram.quantize.export.target import Converted, ExportError, TargetConfig, open_converted

ARCH = "deepseek41"
ENCODING = "e4m3_e8m0_32_row264"
CODEC = "fp8-e8m0"
ALIGNMENT = 16384
ORDERS, HEADS, WIDTH, LAYERS = (2, 3, 4), 8, 256, 2
_KEYS = f"{ARCH}.engram."


def export(config: TargetConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write a GGUF with the package's tables; the fields of `engram export --json`.

    `config.backbone`: ds4's GGUF of the model, of which everything else is copied; without one the file holds tables
    alone. Raises ExportError for a package or a backbone that does not fit.
    """
    begin, progress = time.monotonic(), progress or Progress()
    check_file(config)
    with open_converted(config.source) as held:
        _check(held)
        pairs = {"general.architecture": text("general.architecture", ARCH)}
        tensors: list[Entry] = []
        tables = {f"blk.{layer}.engram_embd.weight": layer for layer in held.package.layout.layers}
        if config.backbone is not None:
            files = open_backbone(config.backbone)
            _check_backbone(Header(config.backbone, files.metadata), held)
            pairs = {k: pair for k, pair in read_pairs(config.backbone).items() if not k.startswith(_KEYS)}
            tensors = [copied(name, tensor) for name, tensor in files.tensors.items() if name not in tables]
        tensors += [_table(held, layer, name) for name, layer in tables.items()]
        size = write_gguf(config, pairs | _constants(held), tensors, ALIGNMENT, progress)
    if config.backbone is None:
        progress.say(f"{config.out} holds no backbone: ds4 does not run it (--backbone FILE.gguf)")
    return {
        "format": "ds4", "out": str(config.out), "files": 1, "bytes": size, "encoding": ENCODING,
        "backbone": None if config.backbone is None else str(config.backbone), "seconds": time.monotonic() - begin,
    }  # fmt: skip


def _check(held: Converted) -> None:
    """Refuse what ds4 has not compiled in."""
    layout = held.package.layout
    if held.family != "deepseek_v41":
        raise ExportError(f"{held.folder} is of the family {held.family}, ds4 reads tables of deepseek_v41",
                          hint="llama.cpp reads Qwen's and Gemma's: --format gguf")  # fmt: skip
    for layer, table in held.tables.items():
        if table.codec_name != CODEC or table.width != WIDTH:
            raise held.refuse_codec(layer, f"ds4 reads {ENCODING}: {CODEC!r} of width {WIDTH}",
                                    "convert the checkpoint without --tables")  # fmt: skip
    found = layout.orders, layout.heads, len(layout.layers)
    if found != (ORDERS, HEADS, LAYERS):
        raise ExportError(
            f"{held.folder} has the orders {list(layout.orders)}, {layout.heads} heads and {len(layout.layers)} "
            f"layers; ds4 has {list(ORDERS)}, {HEADS} and {LAYERS} compiled in"
        )


def _check_backbone(header: Header, held: Converted) -> None:
    """Refuse a GGUF of another model, or of another dialect of V4.1."""
    if header.architecture != ARCH or "engram.encoding" not in header.values:
        raise ExportError(
            f"{header.path} is of the architecture {header.architecture!r} and has "
            f"{'a' if 'engram.encoding' in header.values else 'no'} key {_KEYS}encoding: ds4 did not make it",
            hint="give a GGUF that ds4 reads",
        )
    layers = held.package.layout.layers
    if (theirs := header.numbers("engram.layer_ids")) != layers:
        raise ExportError(f"{header.path} has memory in the layers {list(theirs)}, the package in {list(layers)}")


def _constants(held: Converted) -> dict[str, bytes]:
    """What the hash is made of. The pad id is a compressed one, as the token map's values are."""
    layout = held.package.layout
    assert layout.token_map is not None
    layers = layout.layers
    arrays = {
        "layer_ids": layers, "rows": [layout.table_rows[layer] for layer in layers], "token_map": layout.token_map,
        "primes": [prime for layer in layers for heads in layout.primes[layer] for prime in heads],
    }  # fmt: skip
    multipliers = [factor for layer in layers for factor in layout.multipliers[layer]]
    out = {
        "encoding": text(_KEYS + "encoding", ENCODING),
        "multipliers": numbers(_KEYS + "multipliers", multipliers, "u8"),
        "compressed_vocab_size": number(_KEYS + "compressed_vocab_size", layout.compressed_size),
        "pad_id": number(_KEYS + "pad_id", int(layout.token_map[layout.pad_id])),
    }  # fmt: skip
    out |= {name: numbers(_KEYS + name, values, "u4") for name, values in arrays.items()}
    return {_KEYS + name: pair for name, pair in out.items()}


def _table(held: Converted, layer: int, name: str) -> Entry:
    table = held.tables[layer]

    def blocks() -> Iterator[memoryview]:
        for first, rows in table.blocks():
            wrong = ((rows[:, :WIDTH] & 127) == 127).any(axis=1) | (rows[:, WIDTH:] == 255).any(axis=1)
            if wrong.any():
                row = first + int(np.flatnonzero(wrong)[0])
                raise ExportError(
                    f"layer {layer}: row {row:,} holds a NaN, which ds4 refuses to read",
                    hint="the checkpoint was damaged before it was converted: fetch it again",
                )
            yield rows.data

    return Entry(name, "I8", (table.rows, table.row_bytes), blocks)
