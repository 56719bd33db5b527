"""Slots over a torch backbone: one session a slot, stepped one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engram.runtime.engine import Model, Session
from engram.runtime.slots import Feed, Watch


class TorchSlots:
    """`count` timelines of at most `context` positions over one model."""

    def __init__(self, model: Model, count: int, context: int = 1 << 30) -> None:
        self.model, self.count, self.context = model, count, min(context, model.context)
        self.tokenizer, self.special = model.tokenizer, model.special
        self.watch: Watch | None = None
        self._sessions: list[Session] = [model.session() for _ in range(count)]
        self._slot = 0
        for layer in model.layout.layers:
            self._hook(layer)

    def _hook(self, layer: int) -> None:
        engram = self.model.engram

        def look(hidden: Tensor) -> None:
            call = engram._call
            if self.watch is None or call is None:
                return
            gate = engram.gate(layer)
            stream = hidden if hidden.dim() == 4 else hidden[:, :, None]
            opened: NDArray[np.float32] = gate.open(stream, call.memory[layer]).float().numpy()[0]
            self.watch(self._slot, layer, opened)

        def before_block(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(args[0] if args else kwargs["hidden_states"])

        def after_norm(_: Any, args: Any, output: Any) -> None:
            look(output.last_hidden_state)

        if layer < len(engram.blocks):
            engram.blocks[layer].register_forward_pre_hook(before_block, prepend=True, with_kwargs=True)
        else:
            engram.backbone.base_model.register_forward_hook(after_norm, prepend=True)

    def begin(self) -> list[int]:
        """What a text begins with: bos or nothing."""
        return self.model.begin()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return self.model.encode(text)

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        return self.model.stop_ids()

    def length(self, slot: int) -> int:
        """Positions of a slot so far."""
        return self._sessions[slot].line.length

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        """Roll back to the longest prefix shared with `ids`; the rest, at least one, to feed."""
        return self._sessions[slot].reuse(ids)

    def ask(self, feeds: Sequence[Feed]) -> None:
        """Rows of these may be read from now on: a hint."""
        for feed in feeds:
            self._sessions[feed.slot].ask(feed.ids)

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Float32 logits [vocabulary] after the last id of each feed; where it raises, the slots fed are empty."""
        found = []
        try:
            for feed in feeds:
                self._slot = feed.slot
                found.append(self._sessions[feed.slot].feed(feed.ids))
        except BaseException:
            for feed in feeds:
                self._sessions[feed.slot] = self.model.session()
            raise
        return found

    def counters(self) -> dict[str, int]:
        """Rows and bytes read so far."""
        return self.model.reader.counters()

    def close(self) -> None:
        """Let go of the model."""
        self.model.close()
