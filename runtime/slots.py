"""Several timelines of tokens over one model: what generation and the server know of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Watch = Callable[[int, int, NDArray[np.float32]], None]  # slot, layer, how far the gate opens [T, M]


class Feed(NamedTuple):
    """Tokens that continue one slot's timeline."""

    slot: int
    ids: list[int]


class Slots(Protocol):
    """Timelines 0 … count - 1 over one model. One thread at a time may call it."""

    count: int
    context: int  # positions of one slot
    tokenizer: Any  # tokenizers.Tokenizer
    special: dict[str, Any]  # as builders.tokenizer.special_tokens
    watch: Watch | None  # told of every gate as it opens; of the last norm's, maybe only where logits are wanted

    def begin(self) -> list[int]:
        """What a text begins with: bos where the tokenizer asks for one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""

    def length(self, slot: int) -> int:
        """Positions so far."""

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        """Roll back to the longest prefix shared with `ids` (at least one token is left to feed); the rest."""

    def ask(self, feeds: Sequence[Feed]) -> None:
        """Rows of tokens that will be fed next may be read from now on."""

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Feed tokens; float32 logits [vocabulary] after the last one of each: they hold until the next step.

        After an error `reuse` rolls each of these slots back to a state that is whole.
        """

    def counters(self) -> dict[str, int]:
        """Rows and bytes read so far."""

    def close(self) -> None:
        """Let go of model and tables."""


class Words:
    """What a slots' tokenizer says of texts."""

    tokenizer: Any
    special: dict[str, Any]

    def begin(self) -> list[int]:
        """What a text begins with: bos where the tokenizer asks for one."""
        return [int(self.special["bos_id"])] if self.special.get("add_bos") else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        return frozenset(self.special.get("eos_ids") or [])


class OneSlot:
    """A slot as generation sees a session: one mutable timeline of tokens."""

    def __init__(self, model: Any, slot: int = 0) -> None:
        self.model, self.slot = model, slot

    @property
    def length(self) -> int:
        """Positions so far."""
        found: int = self.model.length(self.slot)
        return found

    def ask(self, ids: list[int]) -> None:
        """Rows of tokens that will be fed next: call it the moment they are known."""
        self.model.ask([Feed(self.slot, ids)])

    def feed(self, ids: list[int]) -> Tensor:
        """Feed tokens; float32 logits [vocabulary] after the last: they hold until the next step."""
        found: Tensor = self.model.step([Feed(self.slot, ids)])[0]
        return found

    def reuse(self, ids: list[int]) -> list[int]:
        """Roll back to the longest prefix shared with `ids` (at least one token is left to feed); the rest."""
        found: list[int] = self.model.reuse(self.slot, ids)
        return found
