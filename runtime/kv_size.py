"""How large a model's key-value cache is, where its configuration says enough: nothing is guessed.

Every attention layer keeps the keys and values of every position, as our engine does (sliding windows are a matter of
the mask there). A configuration that speaks of another kind of state (latent keys, linear attention, compressed or
global layers of another shape) gives no size, but the key that stands in the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram import EngramError
from engram.builders.gguf_header import GgufHeaderError, read_metadata

_OTHER_STATE = (
    "kv_lora_rank", "q_lora_rank", "linear_", "indexer_", "compress", "global_head_dim", "num_global_", "mamba", "ssm",
    "attention_k_eq_v", "full_attention_interval", "key_length_swa", "head_count_kv_swa", "state_size",
)  # fmt: skip
_LIKE_ALL = {"full_attention", "sliding_attention"}


class KvSizeError(EngramError):
    """What a configuration lacks, or has that this arithmetic does not cover."""


def kv_bytes(place: Path | None, context: int, value_bytes: int) -> tuple[int | None, str]:
    """Bytes of keys and values for so many positions, and how that is known; None, and why not.

    `place` is a folder with a config.json, or a GGUF.
    """
    if place is not None and place.is_dir() and not (place / "config.json").is_file():
        place = next(iter(sorted(place.glob("*.gguf"))), None)
    if place is None or not place.exists():
        return None, "the backbone's configuration is not here"
    try:
        shape = _of_gguf(place) if place.is_file() else _of_config(place / "config.json")
    except (KvSizeError, OSError, GgufHeaderError) as why:
        return None, str(why)
    layers, heads, values = shape
    words = f"{layers} layers x {heads} heads x {values} values of keys and values, {value_bytes} bytes each"
    return layers * heads * values * value_bytes * context, words


def _of_config(path: Path) -> tuple[int, int, int]:
    """Layers that keep something, heads of each, values a head and position."""
    try:
        values = json.loads(path.read_bytes())
        inner = values.get("text_config") or {}
        values = {**values, **inner}
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise KvSizeError(f"{path.name} cannot be read") from None
    _refuse_other_state(values, path.name)
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and set(map(str, kinds)) <= _LIKE_ALL):
        raise KvSizeError(f"{path.name} has layers of other kinds than full and sliding attention")
    layers, heads = _number(values, "num_hidden_layers", path.name), _number(values, "num_key_value_heads", path.name)
    shared = values.get("num_kv_shared_layers") or 0
    if type(shared) is not int or not 0 <= shared < layers:
        raise KvSizeError(f"num_kv_shared_layers in {path.name} is no number of its layers")
    if values.get("head_dim") is not None:
        each = _number(values, "head_dim", path.name)
    else:
        wide, queries = _number(values, "hidden_size", path.name), _number(values, "num_attention_heads", path.name)
        if wide % queries:
            raise KvSizeError(f"{path.name} has no head_dim")
        each = wide // queries
    return layers - shared, heads, 2 * each


def _of_gguf(path: Path) -> tuple[int, int, int]:
    metadata = read_metadata(path)
    start = f"{metadata.get('general.architecture')}."
    values = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    _refuse_other_state(values, path.name)
    layers, heads = _number(values, "block_count", path.name), _number(values, "attention.head_count_kv", path.name)
    shared = values.get("attention.shared_kv_layers") or 0
    if type(shared) is not int or not 0 <= shared < layers:
        raise KvSizeError(f"attention.shared_kv_layers in {path.name} is no number of its layers")
    if "attention.key_length" in values:
        each = sum(_number(values, f"attention.{name}_length", path.name) for name in ("key", "value"))
    else:
        wide = _number(values, "embedding_length", path.name)
        queries = _number(values, "attention.head_count", path.name)
        if wide % queries:
            raise KvSizeError(f"{path.name} has no attention.key_length")
        each = 2 * (wide // queries)
    return layers - shared, heads, each


def _refuse_other_state(values: Mapping[str, Any], name: str) -> None:
    for key, value in values.items():
        if any(word.startswith(_OTHER_STATE) for word in key.split(".")) and value is not None and value is not False:
            raise KvSizeError(f"{name} has {key}: not plain keys and values")


def _number(values: Mapping[str, Any], key: str, name: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise KvSizeError(f"{name} does not say {key}")
    return value
