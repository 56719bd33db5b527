"""Headers and indexes that lie, and what each is refused for, from a disk as from a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from engram.builders.tensor_files import INDEX


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "a.weight": generator.normal(size=(6, 5)).astype(np.float32), "b": np.arange(7, dtype=np.int64),
        "rows": generator.integers(0, 255, size=(40, 3), dtype=np.uint8), "none": np.zeros((0, 4), np.float32),
    }  # fmt: skip


def split(folder: Path) -> Path:
    folder.mkdir()
    names, shards = list(arrays()), {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        save_file({name: arrays()[name] for name in part}, folder / f"model-{number}.safetensors")
        shards |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (lambda m: m["weight_map"].update(b="../model-1.safetensors"), "a shard is a file beside the index"),
    "absolute": (lambda m: m["weight_map"].update(b="/etc/passwd"), "a shard is a file beside the index"),
    "backslash": (lambda m: m["weight_map"].update(b="..\\x.safetensors"), "a shard is a file beside the index"),
    "dots": (lambda m: m["weight_map"].update(b=".."), "a shard is a file beside the index"),
    "number": (lambda m: m["weight_map"].update(b=3), "a shard is a file beside the index"),
    "wrong shard": (lambda m: m["weight_map"].update(b="model-2.safetensors"), "it is in model-1.safetensors"),
    "not held": (lambda m: m["weight_map"].update(c="model-2.safetensors"), "holds 'c', it does not"),
    "no map": (lambda m: m.pop("weight_map"), "no index with a weight_map"),
    "a list": (lambda m: m.update(weight_map=[1, 2]), "no index with a weight_map"),
}


def with_header(header: Any, body: bytes, text: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "states a header of 0 bytes"),
    "gigantic": ((1 << 62).to_bytes(8, "little") + b"{}", "states a header of 4,611,686"),
    "no JSON": (with_header(None, b"", b"{]"), "no JSON"),
    "a list": (with_header([], b""), "no JSON object"),
    "deep": (with_header(None, b"", b"[" * 100_000), "no JSON"),
    "twice": (with_header(None, b"\0" * 16, b'{"a":1,"a":2}'), "the key 'a' occurs twice"),
    "overlap": (with_header({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24), "'b' overlaps 'a'"),
    "gap": (with_header({"a": entry(), "b": entry(offsets=(20, 36))}, b"\0" * 36), "leaves a gap"),
    "behind": (with_header({"a": entry()}, b"\0" * 20), "its tensors end at"),
    "beyond": (with_header({"a": entry()}, b"\0" * 12), "the file has"),
    "dtype": (with_header({"a": entry("F33")}, b"\0" * 16), "dtype 'F33'"),
    "dtype list": (with_header({"a": entry(["F32"])}, b"\0" * 16), "has the dtype"),
    "size": (with_header({"a": entry(shape=(2, 3))}, b"\0" * 16), "needs 24 bytes"),
    "overflow": (with_header({"a": entry(shape=(1 << 62, 8))}, b"\0" * 16), "needs 1.4757"),
    "negative": (with_header({"a": entry(shape=(-2, -2))}, b"\0" * 16), "cannot be"),
    "negative offset": (with_header({"a": entry(offsets=(-16, 0))}, b"\0" * 16), "cannot be"),
    "fraction": (with_header({"a": entry(shape=(2.0, 2))}, b"\0" * 16), "cannot be"),
    "truth": (with_header({"a": entry("U8", (True,), (0, 1))}, b"\0"), "cannot be"),
    "nine": (with_header({"a": entry("U8", (1,) * 9, (0, 1))}, b"\0"), "cannot be"),
    "lacking": (with_header({"a": {"dtype": "F32"}}, b""), "lacks dtype, shape or data_offsets"),
    "half a byte": (with_header({"a": entry("F4", (3,), (0, 1))}, b"\0"), "needs 1.5 bytes"),
}
