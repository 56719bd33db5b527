"""The published dialects: how they differ, and their multipliers and primes; integers in, integers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
_LARGEST = (1 << 63) - 1
_LAYER_STRIDE = 10007  # the published code seeds each layer's generator with seed + 10007 * layer
_SPLITMIX_STEP = 0x9E3779B97F4A7C15
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # enough for every 64-bit number (Sorenson and Webster, 2015)


@dataclass(frozen=True)
class Dialect:
    """What sets a dialect apart.

    `raw`: token ids are hashed as they are, and those below zero are refused; `resets`: no look-back crosses a token
    that ends a text; `dead_negative`: ids below zero are dead; `sums`: products are added, with multipliers of their
    own for every column, instead of combined by XOR; `oldest_first`: the windows of all orders begin at the oldest
    token of the highest order, which has the first multiplier; `fill`: stands for what a look-back may not see (None:
    `reset_id`, or the padding token); `multiple`: a stored table is padded to a multiple of this many rows.
    """

    raw: bool = False
    resets: bool = False
    dead_negative: bool = False
    sums: bool = False
    oldest_first: bool = False
    fill: int | None = None
    multiple: int = 1


DIALECTS = {
    "demo": Dialect(),  # the paper's
    "v41": Dialect(dead_negative=True),  # DeepSeek-V4.1-Flash
    "qwen-ple": Dialect(raw=True, resets=True, multiple=128),  # Qwen3.8-Flash-Next
    "longcat": Dialect(raw=True, resets=True, sums=True, fill=0),  # LongCat-Flash-Lite
    "engram-peft": Dialect(oldest_first=True),  # the package's own engine; it has the demo's constants
    "identity": Dialect(raw=True),  # per-token tables (Gemma 3n and 4): row = heads * id + head
}


def _half_bound(vocab_size: int) -> int:
    """Half of the largest multiplier that keeps id * multiplier inside int64."""
    return max(1, _LARGEST // max(1, vocab_size) // 2)


def pcg_multipliers(compressed_size: int, layer: int, count: int, seed: int) -> tuple[int, ...]:
    """Odd multipliers of demo, v41, engram-peft: 2r + 1 with r from numpy's PCG64, seeded by seed + 10007 * layer."""
    generator = np.random.default_rng(seed + _LAYER_STRIDE * layer)
    draws = generator.integers(0, _half_bound(compressed_size), size=count, dtype=np.int64)
    return tuple(2 * int(draw) + 1 for draw in draws)


def splitmix_multipliers(vocab_size: int, place: int, count: int, seed: int) -> tuple[int, ...]:
    """Odd multipliers of qwen-ple: 2r + 1 with r from SplitMix64; `place` counts the memory layers from 0."""
    bound = _half_bound(vocab_size)
    base = seed + _LAYER_STRIDE * place
    return tuple(2 * (_splitmix64(base + _SPLITMIX_STEP * (k + 1)) % bound) + 1 for k in range(count))


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (state + _SPLITMIX_STEP) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def power_multipliers(vocab_size: int, orders: Sequence[int], moduli: Sequence[int]) -> tuple[int, ...]:
    """Multipliers of longcat, column after column: vocab_size^k mod the column's modulus for k below its order, else 0.

    `moduli` are order-major; every column has as many as the highest order.
    """
    heads = len(moduli) // len(orders)
    return tuple(
        pow(vocab_size, k, modulus) if k < orders[column // heads] else 0
        for column, modulus in enumerate(moduli)
        for k in range(orders[-1])
    )


def is_prime(number: int) -> bool:
    """Miller-Rabin with fixed witnesses: exact below 2**64."""
    if number < 2:
        return False
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def prime_moduli(layers: list[int], sizes: list[int], heads: int) -> dict[int, tuple[tuple[int, ...], ...]]:
    """A different prime for every layer, order and head, handed out in that sequence.

    Each (layer, order) searches upward from its size, itself included, and skips primes that are taken: so the primes
    depend on a layer's place in the list, not on its number.
    """
    taken: set[int] = set()
    out = {}
    for layer in layers:
        by_order = []
        for size in sizes:
            candidate = size
            found: list[int] = []
            while len(found) < heads:
                if candidate not in taken and is_prime(candidate):
                    found.append(candidate)
                    taken.add(candidate)
                candidate += 1
            by_order.append(tuple(found))
        out[layer] = tuple(by_order)
    return out
