"""The table as llama.cpp reads it: tensor `per_layer_token_embd.weight` and, for qwen4exp, the hash's constants.

llama.cpp loads whole models only: `backbone` is a GGUF of the model (with any table), of which everything else is
copied. Without one, the file holds a qwen4exp table alone, for our own commands and for engines that read a sidecar.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from engram import Progress
from engram.builders.families import per_token, qwen4_exp
from engram.builders.families.config import Header
from engram.builders.gguf_header import read_pairs
from engram.builders.layout import Layout
from engram.builders.tensor_files import TensorFiles, read_header
from engram.quantize.export.gguf_file import (
    ALIGNMENT,
    check_file,
    copied,
    number,
    numbers,
    open_backbone,
    table_entry,
    text,
    write_gguf,
)
from engram.quantize.export.target import Converted, ExportError, TargetConfig, open_converted
from engram.quantize.source_parts import DENSE, SOURCE

TABLE = "per_layer_token_embd.weight"
TYPES = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "iq4_nl": "IQ4_NL"}  # our codec → ggml's type
REASONS = {
    "deepseek_v41": "no release of llama.cpp has an architecture for it (deepseek41 is an open pull request)",
    "longcat_flash_ngram": "llama.cpp has no architecture for it",
}
_ARCH = qwen4_exp.ARCHITECTURES[0]


def export(config: TargetConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write a GGUF with the package's table; the fields of `engram export --json`.

    Raises ExportError for a package or a backbone that does not fit, GgufHeaderError for a backbone that is damaged.
    """
    begin, progress = time.monotonic(), progress or Progress()
    check_file(config)
    with open_converted(config.source) as held:
        if held.family in REASONS:
            raise ExportError(f"{config.source} is of the family {held.family}: {REASONS[held.family]}",
                              hint="safetensors holds it; ds4 reads DeepSeek's: --format ds4")  # fmt: skip
        layer = held.one_layer("a GGUF")
        kind = _kind(held, layer)
        make = _qwen if held.family == "qwen4_exp" else _per_token
        files = None if config.backbone is None else open_backbone(config.backbone)
        pairs, shape = make(held, layer, files)
        table = table_entry(held, layer, TABLE, kind, shape)
        tensors = {} if files is None else {name: copied(name, tensor) for name, tensor in files.tensors.items()}
        tensors[TABLE] = table  # in its place, or the last
        size = write_gguf(config, pairs, list(tensors.values()), _alignment(files), progress)
    if files is None:
        progress.say(f"{config.out} holds no backbone: llama.cpp does not load it (--backbone FILE.gguf)")
    return {
        "format": "gguf", "out": str(config.out), "files": 1, "bytes": size, "type": kind,
        "backbone": None if config.backbone is None else str(config.backbone), "seconds": time.monotonic() - begin,
    }  # fmt: skip


def _kind(held: Converted, layer: int) -> str:
    """ggml's type of the rows."""
    name = held.tables[layer].codec_name
    if name not in TYPES:
        raise held.refuse_codec(
            layer, f"llama.cpp reads rows of {', '.join(TYPES.values())}",
            "convert the checkpoint again with --tables bf16, q8_0, q4_0 or iq4_nl",
        )  # fmt: skip
    return TYPES[name]


def _alignment(files: TensorFiles | None) -> int:
    return 32 if files is None else int(files.metadata.get(ALIGNMENT, 32))


def _qwen(held: Converted, layer: int, files: TensorFiles | None) -> tuple[dict[str, bytes], tuple[int, ...]]:
    """The pairs with our layout's constants, and the table's shape."""
    layout = held.package.layout
    shape = held.tables[layer].rows, layout.head_dim
    own = _constants(layout, layer)
    if files is None:
        pairs = {"general.architecture": text("general.architecture", _ARCH)}
        pairs |= {key: make(key) for key, make in own.items()}
        pairs[f"{_ARCH}.vocab_size"] = number(f"{_ARCH}.vocab_size", layout.vocab_size)
        if (kernel := _conv_kernel(held)) is not None:
            pairs[f"{_ARCH}.ple.conv_kernel"] = number(f"{_ARCH}.ple.conv_kernel", kernel)
        return pairs, shape
    header = Header(files.path, files.metadata)
    if header.architecture not in qwen4_exp.ARCHITECTURES:
        raise ExportError(
            f"{files.path} is of the architecture {header.architecture!r}, {held.family} is {_ARCH!r}",
            hint="give a GGUF of the same model",
        )
    ours = {
        "ple.layers": (layer,), "ple.ngram_size": layout.orders[-1], "ple.heads_per_ngram": layout.heads,
        "embedding_length_per_layer_input": layout.head_dim,
    }  # fmt: skip
    for name, value in ours.items():
        found = header.numbers(name) if isinstance(value, tuple) else header.number(name)
        if found != value:
            raise ExportError(
                f"{files.path}: {_ARCH}.{name} is {found}, the package has {value}: its projections are for other rows",
                hint="give a GGUF of the same model",
            )
    pairs = read_pairs(files.path)
    return pairs | {key: make(key) for key, make in own.items() if key.removeprefix(_ARCH + ".") not in ours}, shape


def _constants(layout: Layout, layer: int) -> dict[str, Callable[[str], bytes]]:
    """What the hash is made of, as llama.cpp names and types it."""
    primes = [prime for heads in layout.primes[layer] for prime in heads]
    assert layout.reset_id is not None
    end = layout.reset_id
    return {
        f"{_ARCH}.embedding_length_per_layer_input": lambda key: number(key, layout.head_dim),
        f"{_ARCH}.ple.layers": lambda key: numbers(key, [layer], "i4"),
        f"{_ARCH}.ple.ngram_size": lambda key: number(key, layout.orders[-1]),
        f"{_ARCH}.ple.heads_per_ngram": lambda key: number(key, layout.heads),
        f"{_ARCH}.ple.layer_multipliers": lambda key: numbers(key, layout.multipliers[layer], "u8"),
        f"{_ARCH}.ple.head_vocab_sizes": lambda key: numbers(key, primes, "u8"),
        f"{_ARCH}.ple.head_offsets": lambda key: numbers(key, layout.offsets(layer), "u8"),
        f"{_ARCH}.ple.eos_token_id": lambda key: number(key, end),
    }


def _conv_kernel(held: Converted) -> int | None:
    """Taps of the convolution, where the package keeps its weight."""
    if not held.dense:
        return None
    for name, tensor in read_header(held.folder / SOURCE / DENSE).items():
        if name.endswith("conv1d.weight"):
            return tensor.shape[-1]
    return None


def _per_token(held: Converted, layer: int, files: TensorFiles | None) -> tuple[dict[str, bytes], tuple[int, ...]]:
    """The backbone's own pairs, and the shape of its table, which must be ours."""
    if files is None:
        raise ExportError(f"{held.family}: nothing but a table makes no GGUF that anything reads",
                          hint="give a GGUF of the model: --backbone FILE.gguf")  # fmt: skip
    header, layout = Header(files.path, files.metadata), held.package.layout
    if header.architecture not in per_token.ARCHITECTURES:
        raise ExportError(
            f"{files.path} is of the architecture {header.architecture!r}, not {' or '.join(per_token.ARCHITECTURES)}",
            hint="give a GGUF of the same model",
        )
    shape = held.tables[layer].rows // layout.heads, layout.heads * layout.head_dim
    theirs = files.find(TABLE).shape
    each = header.number("embedding_length_per_layer_input")
    if theirs != shape or each != layout.head_dim:
        raise ExportError(
            f"{files.path}: {TABLE} is {list(theirs)}, {each} for each layer; the package's is {list(shape)}, "
            f"{layout.head_dim} for each",
            hint="give a GGUF of the same model",
        )
    return read_pairs(files.path), shape
