"""A small layout of every dialect, for tests that want all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram.builders.layout import Layout

VOCAB = 40
_OF_DIALECT: dict[str, dict[str, Any]] = {
    "demo": {"rows_per_head": 5000, "token_map": np.arange(VOCAB)[::-1] // 2},
    "v41": {"rows_per_head": 5000, "token_map": np.arange(VOCAB)[::-1] // 2, "dead_ids": (4,)},
    "engram-peft": {"rows_per_head": 5000, "token_map": np.r_[np.arange(36)[::-1] // 2, 36:40], "compressed_size": 18},
    "qwen-ple": {"rows_per_head": 5000, "reset_id": 9},
    "longcat": {"moduli": (5001, 5003, 5005, 5007, 5009, 5011), "reset_id": 9, "pad_id": 0},
    "identity": {"rows_per_head": 44, "orders": (1,), "heads": 1},
}


def layout_of(dialect: str, **changes: Any) -> Layout:
    """Ids 0 to 39, two layers, three heads and orders 2 and 3 where the dialect has a choice."""
    values: dict[str, Any] = dict(orders=(2, 3), heads=3, head_dim=4, layers=(0, 5), pad_id=2, vocab_size=VOCAB)
    return Layout.build(**(values | {"dialect": dialect} | _OF_DIALECT[dialect] | changes))
