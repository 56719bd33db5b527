"""From a window of tokens to final states under any memory, and from states to logits, a slice of positions at a time.

A memory on the final state alone needs the backbone only once, however many memories are compared.

Shape letters: B windows (one), T positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from engram.builders.model import EngramModel

SLICE = 128  # positions whose logits are held at a time: 128 x 262,144 x 4 bytes = 134 MB
_SAME_LOGITS = 1e-3  # of the largest logit: bfloat16 heads round so


class Readout:
    """An EngramModel, cut before its unembedding. Call everything inside `torch.inference_mode()`.

    Where the head is more than one product (soft caps, scales), `states` are the logits themselves: the long way.
    """

    def __init__(self, engram: EngramModel) -> None:
        self.engram = engram
        self.once = set(engram.layout.layers) == {len(engram.blocks)}
        self.plain_head: bool | None = None  # found out at the first window

    def base(self, ids_BT: Tensor) -> Tensor:
        """States of the backbone alone: [T, D]."""
        if self.plain_head is None:
            self._look_at_the_head(ids_BT)
        if self.plain_head:
            return self.engram.states(ids_BT, None)[0]
        logits: Tensor = self.engram.backbone(ids_BT, use_cache=False).logits
        return logits[0]

    def states(
        self, ids_BT: Tensor, memory: Mapping[int, Tensor], base_TD: Tensor | None = None,
        watch: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """States with `memory` gated in: [T, D]. `base_TD` is what `base` gave for the same window, if it is at hand.

        `watch` takes the residual stream [1, T, D] as each layer's gate finds it.
        """
        if self.plain_head is None:
            self._look_at_the_head(ids_BT)
        if self.once and self.plain_head:
            layer = len(self.engram.blocks)
            state_BTD = (self.base(ids_BT) if base_TD is None else base_TD)[None]
            if watch is not None:
                watch[layer] = state_BTD
            added_BTD, _ = self.engram.gate(layer)(state_BTD, memory[layer])
            out: Tensor = state_BTD + added_BTD
        elif self.plain_head:
            out = self.engram.states(ids_BT, memory, watch)
        else:
            if watch is not None:
                self.engram.states(ids_BT, memory, watch)
            out = self.engram(ids_BT, memory)
        return out[0]

    def logits(self, states_TD: Tensor) -> Tensor:
        """float32 [T, V]."""
        if not self.plain_head:
            return states_TD.float()
        logits: Tensor = self.engram.backbone.get_output_embeddings()(states_TD)
        return logits.float()

    def _look_at_the_head(self, ids_BT: Tensor) -> None:
        short = ids_BT[:, : SLICE // 2]
        whole = self.engram.backbone(short, use_cache=False).logits
        product = self.engram.backbone.get_output_embeddings()(self.engram.states(short, None))
        self.plain_head = float((whole - product).abs().max()) <= _SAME_LOGITS * float(whole.abs().max())


def slices(positions: int) -> Iterator[slice]:
    """SLICE positions at a time."""
    return (slice(begin, min(begin + SLICE, positions)) for begin in range(0, positions, SLICE))


def nats(readout: Readout, states_TD: Tensor, ids_BT: Tensor) -> Tensor:
    """-log p of every token of the window but the first: float32 [T - 1]."""
    found = []
    for part in slices(states_TD.shape[0] - 1):
        following = ids_BT[0, part.start + 1 : part.stop + 1]
        found.append(torch.nn.functional.cross_entropy(readout.logits(states_TD[part]), following, reduction="none"))
    return torch.cat(found)
