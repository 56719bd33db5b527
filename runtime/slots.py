"""Several timelines over one model: what serving and running need of a backbone, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """Tokens that continue one slot's timeline."""

    slot: int
    ids: list[int]


class Slots(Protocol):
    """Several timelines over one model; one thread at a time may call it."""

    count: int  # slots that there are
    context: int  # positions of one slot
    tokenizer: Any  # tokenizers.Tokenizer
    special: dict[str, Any]  # as builders.tokenizer.special_tokens
    watch: Callable[[int, int, NDArray[np.float32]], None] | None  # (slot, layer, how far the gate opens [T, M])

    def begin(self) -> list[int]:
        """What a text begins with: bos or nothing."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""

    def length(self, slot: int) -> int:
        """Positions of a slot so far."""

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        """Roll back to the longest prefix shared with `ids`; the rest, at least one, to feed."""

    def ask(self, feeds: Sequence[Feed]) -> None:
        """Rows of these may be read from now on: a hint."""

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Float32 logits [vocabulary] after the last id of each feed. Where it raises, the slots fed are empty."""

    def counters(self) -> dict[str, int]:
        """Rows and bytes read so far, as RowReader.counters."""

    def close(self) -> None:
        """Let go of the model."""
