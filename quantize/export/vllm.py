"""Qwen's table as vLLM's VLLM_PLE_DISK_OFFLOAD_DIR maps it (pull request 54070, open).

Rows in order, nothing else, in `LAYER.PARAMETER.bin`, and beside it `LAYER.PARAMETER.done.json` with "shape" and
"dtype", without which vLLM writes the file again from the checkpoint. The names are those of its modules: it calls
`model.language_model.layers.…` of the checkpoint `language_model.model.layers.…`. So in the worker.py of
opengfx1030/vllm-rdna at 27d236f1 (_ple_disk_attach, _ple_disk_finalize), and scripts/ple-bf16-assemble.py of
johnmosesventura06/qwen38-hybrid-vmm-lru at 20625ffe, which makes such a file. The factor of FP8 rows stays in the
checkpoint, from which vLLM takes it.

Of DeepSeek-V4.1's files (pull request 56757, closed) names are known, but not what their .done.json says.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from engram import Progress
from engram.builders.atomic import MARK, atomic_folder
from engram.quantize.export.target import (
    Converted,
    ExportError,
    TargetConfig,
    open_converted,
    rows_of,
    write_behind,
)
from engram.quantize.folder import check_target

SMALLEST = 1 << 30  # bytes: vLLM keeps smaller tables in memory
_DTYPES = {"bf16": "torch.bfloat16", "fp8-tensor": "torch.float8_e4m3fn"}
_THEIRS, _OURS = "model.language_model.", "language_model.model."
_TABLE = "ple.ple_embedding.ngram_embedding."


def export(config: TargetConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write the folder for VLLM_PLE_DISK_OFFLOAD_DIR; the fields of `engram export --json`.

    Raises ExportError for another family, and for rows or names of which vLLM's are not known.
    """
    begin, progress = time.monotonic(), progress or Progress()
    check_target(config.source, config.out, force=config.force, error=ExportError)
    with open_converted(config.source) as held:
        plan = {layer: (_name(held, layer), _dtype(held, layer)) for layer in held.package.layout.layers}
        with atomic_folder(config.out, force=config.force, error=ExportError) as folder:
            for layer, (name, dtype) in plan.items():
                table = held.tables[layer]
                with (folder / f"{name}.bin").open("wb", buffering=0) as file:
                    for first, rows in rows_of(table, progress):
                        write_behind(file, rows.data, first * table.row_bytes)
                    os.fsync(file.fileno())
                said = {"shape": [table.rows, table.width], "dtype": dtype}
                (folder / f"{name}.done.json").write_text(json.dumps(said), "utf-8")
                if table.rows * table.row_bytes < SMALLEST:
                    progress.say(f"layer {layer}: vLLM keeps a table below 1 GiB in memory, it will not read this one")
            sizes = [path.stat().st_size for path in folder.iterdir() if path.name != MARK]
    return {
        "format": "vllm", "out": str(config.out), "files": len(sizes), "bytes": sum(sizes),
        "seconds": time.monotonic() - begin,
    }  # fmt: skip


def _name(held: Converted, layer: int) -> str:
    """What vLLM calls the table's parameter."""
    if held.family == "deepseek_v41":
        raise ExportError(
            f"{held.folder} is of the family deepseek_v41: vLLM's files for it (pull request 56757, closed) end in a "
            ".done.json whose fields are not known",
            hint="vLLM loads the tables from safetensors: --format safetensors",
        )
    if held.family != "qwen4_exp":
        raise ExportError(f"{held.folder} is of the family {held.family}, vLLM maps tables of qwen4_exp",
                          hint="vLLM loads its checkpoint: --format safetensors")  # fmt: skip
    name = held.places[layer][0].name
    start, found, _ = name.partition(_TABLE)
    if not found or not name.startswith(_THEIRS):
        raise ExportError(
            f"layer {layer}: the checkpoint calls its table {name}; what vLLM calls it is known of names that begin "
            f"with {_THEIRS}",
            hint="vLLM reads the shards in place: --format safetensors",
        )
    return _OURS + start.removeprefix(_THEIRS) + _TABLE + "weight"


def _dtype(held: Converted, layer: int) -> str:
    name = held.tables[layer].codec_name
    kind = name.partition(":")[0]
    published = held.places[layer][0].dtype
    if kind not in _DTYPES or (kind == "fp8-tensor" and published != "F8_E4M3"):
        raise held.refuse_codec(layer, "vLLM maps rows of BF16, or of FP8 as the checkpoint has them",
                                "convert the checkpoint without --tables, or with --tables bf16")  # fmt: skip
    return _DTYPES[kind]
