"""GGUF backbones in another type: llama.cpp's own quantizer, called through llama-cpp-python; results are read back."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.gguf_header import read_tensors
from engram.quantize.backbone_config import FOLDER, INT_KINDS, BackboneConfig, QuantizeBackboneError
from engram.quantize.backbone_imatrix import Importance, read_importance

TARGET = "model.gguf"
_FLOAT = ("F32", "F16", "BF16", "F64")
_NOT_STORED = ("F64", "Q8_1", "Q8_K")  # ggml's intermediates, and what its kernels do not multiply
_ERROR, _CONTINUED = 4, 5  # ggml_log_level of ggml.h (the binding's comment is older)


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as wrong:
        raise QuantizeBackboneError(
            f"GGUF types need llama-cpp-python, which cannot be imported: {wrong}",
            hint="run: make gguf, or pip install 'engram-lm[gguf]' (it compiles llama.cpp: 10 to 40 minutes); "
            "int8 and int4 do without it",
        ) from None
    return llama_cpp


def gguf_types() -> dict[str, int]:
    """Every file type that the installed llama.cpp knows, by name: q8_0, q4_k_m, iq4_nl, bf16, …"""
    library = _llama_cpp()
    prefix = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    found = {name: prefix.fullmatch(name) for name in dir(library)}
    return {match[1].lower(): int(getattr(library, name)) for name, match in sorted(found.items()) if match}


def check_kind(kind: str) -> None:
    """QuantizeBackboneError for a type that is neither int8 nor int4 nor one of llama.cpp's; loads no model."""
    if kind not in INT_KINDS and kind.lower() not in (known := gguf_types()):
        raise QuantizeBackboneError(
            f"--backbone {kind!r} is not known", hint=f"use one of: {', '.join([*INT_KINDS, *sorted(known)])}"
        )


def tensor_types() -> dict[str, int]:
    """Every type that one tensor can be stored in, by ggml's name in lower case."""
    from gguf import GGMLQuantizationType as Types

    return {t.name.lower(): int(t) for t in Types if t.name not in _NOT_STORED and not re.fullmatch(r"I\d+", t.name)}


def types_in(path: Path) -> dict[str, str]:
    """Tensor name → ggml's name of its type, from the file's header."""
    from gguf import GGMLQuantizationType as Types

    known = {int(t): t.name for t in Types}
    if importlib.util.find_spec("llama_cpp"):  # a newer llama.cpp knows types that the gguf package does not
        library = _llama_cpp()
        prefix = "GGML_TYPE_"
        known |= {getattr(library, name): name.removeprefix(prefix) for name in dir(library) if name.startswith(prefix)}
    return {name: known.get(number, f"type {number}") for name, (_, number) in read_tensors(path).items()}


def to_gguf(config: BackboneConfig, progress: Progress) -> dict[str, Any]:
    """Write `backbone/model.gguf`; returns "bytes_before", "modules", "left", "importance", "importance_tensors".

    importance: the file of the importance matrix, or None; importance_tensors: the matrices it names. The types are
    those found in the written file: llama.cpp takes another type than asked where a width is no multiple of 256. Raises
    as quantize_backbone.
    """
    source = _source(config)
    importance = read_importance(config.importance) if config.importance else None
    settings, kept = _settings(config, source, importance)
    target = config.out / FOLDER / TARGET
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress.task(f"backbone to {config.kind}", len(read_tensors(source)), "tensors") as task:
        failed, lines = _call(_llama_cpp(), source, target, settings, task.advance)
    del kept
    if failed:
        reason = lines[-1].removeprefix("llama_model_quantize: failed to quantize: ") if lines else "it gives no reason"
        raise QuantizeBackboneError(
            f"llama.cpp cannot store {source} as {config.kind}: {reason}",
            hint="give an importance matrix, collected over your text" if "matrix" in reason else "choose another type",
        )
    after = types_in(target)
    return {
        "bytes_before": source.stat().st_size,
        "modules": {name: kind for name, kind in after.items() if kind not in _FLOAT},
        "left": {name: kind for name, kind in after.items() if kind in _FLOAT},
        "importance": str(config.importance) if importance else None,
        "importance_tensors": len(importance.means) if importance else 0,
    }


def check_gguf(config: BackboneConfig) -> None:
    """Raise what to_gguf would raise for its options, from headers alone."""
    _settings(config, _source(config), read_importance(config.importance) if config.importance else None)


def quantized_in(gguf: Path) -> dict[str, int]:
    """Type → how many tensors of a GGUF file are quantized so; empty for a float one."""
    return dict(Counter(kind for kind in types_in(gguf).values() if kind not in _FLOAT))


def _source(config: BackboneConfig) -> Path:
    files = [path for path in config.source.files(config.beside).values() if path.suffix == ".gguf"]
    if len(files) != 1:
        raise QuantizeBackboneError(
            f"backbone {config.source.path} is no GGUF file, type {config.kind} needs one",
            hint="use int8 or int4, or convert it first with llama.cpp's convert_hf_to_gguf.py --outtype bf16",
        )
    return files[0]


def _lookup(known: dict[str, int], name: str, option: str) -> int:
    if name.lower() not in known:
        raise QuantizeBackboneError(f"{option} {name!r} is not known", hint=f"use one of: {', '.join(sorted(known))}")
    return known[name.lower()]


def _settings(config: BackboneConfig, source: Path, importance: Importance | None) -> tuple[Any, list[Any]]:
    """llama.cpp's C struct, and what must outlive its use."""
    library = _llama_cpp()
    settings = library.llama_model_quantize_default_params()
    settings.nthread = config.threads or os.cpu_count() or 1
    settings.ftype, settings.allow_requantize = gguf_types()[config.kind.lower()], config.requantize
    return settings, _fill(library, settings, config, source, importance)


def _fill(
    library: Any, settings: Any, config: BackboneConfig, source: Path, importance: Importance | None
) -> list[Any]:
    """Put types, overrides and importance into the C struct; what is returned must outlive the call."""
    known, kept = tensor_types(), list[Any]()
    for option, field in (("embedding_type", "token_embedding_type"), ("output_type", "output_tensor_type")):
        if name := getattr(config, option):
            setattr(settings, field, _lookup(known, name, option))
    if config.tensor_types:
        overrides = (library.llama_model_tensor_override * (len(config.tensor_types) + 1))()
        names = list(read_tensors(source))
        for place, (pattern, name) in enumerate(config.tensor_types):
            _check_pattern(pattern, names)
            overrides[place].pattern, overrides[place].type = pattern.encode(), _lookup(known, name, pattern)
        settings.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(library.llama_model_tensor_override))
        kept.append(overrides)
    if importance is not None:
        rows = (library.llama_model_imatrix_data * (len(importance.means) + 1))()
        sizes = {name: shape[0] * (shape[2] if len(shape) > 2 else 1)
                 for name, (shape, _) in read_tensors(source).items() if shape}  # fmt: skip
        for place, (name, means) in enumerate(importance.means.items()):
            if name in sizes and sizes[name] != means.size:
                raise QuantizeBackboneError(
                    f"importance matrix {config.importance}: {name} has {means.size} values, the tensor {sizes[name]}",
                    hint="it was collected with another backbone",
                )
            values = np.ascontiguousarray(means, dtype=np.float32)
            rows[place].name, rows[place].size = name.encode(), values.size
            rows[place].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            kept.append(values)
        if not sizes.keys() & importance.means.keys():
            raise QuantizeBackboneError(f"importance matrix {config.importance} names no tensor of {source}")
        settings.imatrix = ctypes.cast(rows, ctypes.POINTER(library.llama_model_imatrix_data))
        kept.append(rows)
    return kept


def _check_pattern(pattern: str, names: list[str]) -> None:
    try:
        found = any(re.search(pattern, name) for name in names)
    except re.error as wrong:
        raise QuantizeBackboneError(f"tensor pattern {pattern!r} is no regular expression: {wrong}") from None
    if not found:
        raise QuantizeBackboneError(f"tensor pattern {pattern!r} matches no tensor", hint=f"names are like {names[-1]}")


def _call(library: Any, source: Path, target: Path, settings: Any, advance: Any) -> tuple[bool, list[str]]:
    """Run the quantizer with its log in our hands: (whether it failed, the lines of its errors)."""
    lines: list[str] = []
    last = 0

    @library.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, user_data: Any) -> None:
        nonlocal last
        last = last if level == _CONTINUED else level
        words = text.decode("utf-8", "replace").strip()
        if last == _ERROR and words:
            lines.append(words)
        if re.match(r"\[\s*\d+/\s*\d+\]", words):
            advance()

    library.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        code = library.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    finally:
        library.llama_log_set(_silent(library), ctypes.c_void_p(0))
    return code != 0, lines


def _silent(library: Any) -> Any:
    """A callback that says nothing and is never collected: llama.cpp keeps a bare pointer to it."""
    if "silent" not in _KEPT:
        _KEPT["silent"] = library.llama_log_callback(lambda level, text, user_data: None)
    return _KEPT["silent"]


_KEPT: dict[str, Any] = {}
