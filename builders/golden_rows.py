"""Row ids that are known of the published models, and constants that follow from a layout's own fields.

The ids come from the published constants and algorithms of each model; a machine or a build that finds others reads
other rows of every table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engram.builders.hash_constants import is_prime, pcg_multipliers, power_multipliers, splitmix_multipliers
from engram.builders.layout import Layout


class Golden(NamedTuple):
    """Rows of the last of some tokens: by layer, the first heads of every order; `local` within each head."""

    model: str
    layout: dict[str, Any]
    ids: tuple[int, ...]
    rows: dict[int, tuple[tuple[int, ...], ...]]
    local: bool = False


GOLDEN = {
    "demo": Golden(
        "the paper's demo",
        {"dialect": "demo", "orders": (2, 3), "heads": 8, "head_dim": 64, "layers": (1, 15), "rows_per_head": 646400,
         "pad_id": 2, "vocab_size": 98627},
        (1134,),
        {1: ((456765, 210478, 187734, 544258, 252852, 282891, 108062, 155083),
             (343064, 407438, 7028, 590054, 214638, 601304, 88782, 507090))},
        local=True,
    ),
    "v41": Golden(
        "DeepSeek-V4.1-Flash",
        {"dialect": "v41", "orders": (2, 3, 4), "heads": 8, "head_dim": 256, "layers": (1, 14),
         "rows_per_head": 16_000_000, "pad_id": 2, "vocab_size": 99092},
        (11, 13, 17, 19),
        {1: ((3825198, 25082324), (130396842, 158793061), (270579285, 286667527)),
         14: ((10788777, 25656325), (140250258, 153848746), (261413609, 281467364))},
    ),
    "engram-peft": Golden(
        "engram-peft 1.2.7",
        {"dialect": "engram-peft", "orders": (2, 3), "heads": 8, "head_dim": 64, "layers": (1, 14),
         "rows_per_head": 141400, "pad_id": 2, "vocab_size": 98627},
        (83894, 62821, 50411),
        {1: ((118896, 112702, 136526, 95031, 3497, 43328, 140643, 80096),
             (12005, 140429, 135585, 49002, 23582, 33276, 127206, 12452)),
         14: ((20650, 56544, 31726, 100828), (1037, 75561, 49853, 36350))},
        local=True,
    ),
    "qwen-ple": Golden(
        "Qwen3.8-Flash-Next",
        {"dialect": "qwen-ple", "orders": (2, 3), "heads": 8, "head_dim": 160, "layers": (1,), "seed": 1234,
         "rows_per_head": 20_000_000, "pad_id": 248044, "reset_id": 248044, "vocab_size": 248320},
        (13, 17, 19),
        {1: ((2684051, 29782984), (179124972, 180611476))},
    ),
    "longcat": Golden(
        "LongCat-Flash-Lite",
        {"dialect": "longcat", "orders": (2, 3, 4), "heads": 4, "head_dim": 256, "layers": (0,), "pad_id": 0,
         "moduli": tuple(78 * 131072 + 2 * i + 1 for i in range(12)), "reset_id": 2, "vocab_size": 131072},
        (7, 11, 13, 17),
        {0: ((1703953, 1703953), (6780477, 6743509), (8665797, 2381828))},
        local=True,
    ),
}  # fmt: skip


def golden_problems(dialect: str) -> tuple[int, list[str]]:
    """How many known row ids of a dialect were recomputed with this build's kernels, and which came out wrong."""
    golden = GOLDEN.get(dialect)
    if golden is None:
        return 0, []
    layout = Layout.build(**golden.layout)
    found = layout.rows(np.array([golden.ids]), local=golden.local)
    checked, problems = 0, []
    for layer, orders in golden.rows.items():
        for number, rows in enumerate(orders):
            first = number * layout.heads
            here = tuple(found[layer][0, -1, first : first + len(rows)].tolist())
            checked += len(rows)
            if here != rows:
                problems.append(
                    f"the hash of this build gives rows {list(here)} for {golden.model}, layer {layer}, order "
                    f"{layout.orders[number]}, where {list(rows)} are known"
                )
    return checked, problems


def constant_problems(layout: Layout) -> tuple[int, list[str]]:
    """How many of a layout's multipliers and moduli were recomputed from its other fields, and which differ."""
    top, checked, problems = layout.orders[-1], 0, []
    for place, layer in enumerate(layout.layers):
        moduli = [modulus for heads in layout.primes[layer] for modulus in heads]
        stored = tuple(layout.multipliers[layer])
        if layout.dialect == "qwen-ple":
            derived = splitmix_multipliers(layout.compressed_size, place, top, layout.seed)
        elif layout.dialect == "longcat":
            derived = power_multipliers(layout.vocab_size, layout.orders, moduli)
        elif layout.dialect == "identity":
            continue
        else:
            derived = pcg_multipliers(layout.compressed_size, layer, top, layout.seed)
        checked += len(derived)
        if stored != derived:
            problems.append(f"layer {layer} has the multipliers {list(stored)}, its dialect makes {list(derived)}")
    if layout.dialect in ("demo", "v41", "engram-peft", "qwen-ple"):
        every = [modulus for layer in layout.layers for heads in layout.primes[layer] for modulus in heads]
        checked += len(every)
        if wrong := [modulus for modulus in every if not is_prime(modulus)]:
            problems.append(f"moduli that are no primes: {wrong}")
        if len(set(every)) != len(every):
            problems.append("a prime is used twice")
    return checked, problems
