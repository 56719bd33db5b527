"""From a window of tokens to final states under any memory, and from states to logits, a slice of positions at a time.

A memory on the final state alone needs the backbone only once, however many memories are compared.

Shape letters: B windows (one), T positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engram.builders.model import EngramModel

SLICE = 128  # positions whose logits are held at a time: 128 x 262,144 x 4 bytes = 134 MB
_LOOKED_AT = 16  # positions whose logits show what a head is
_SAME_LOGITS = 1e-3  # of the largest logit: bfloat16 heads round so


class Readout:
    """An EngramModel, cut before its unembedding. Call everything inside `torch.inference_mode()`.

    A head of more than one product (soft caps, scales) is the backbone's own: it runs on one token, whose state is
    exchanged for those that logits are wanted of.
    """

    def __init__(self, engram: EngramModel) -> None:
        self.engram = engram
        self.once = set(engram.layout.layers) == {len(engram.blocks)}
        self.plain_head: bool | None = None  # found out when the first logits are asked for

    def base(self, ids_BT: Tensor) -> Tensor:
        """States of the backbone alone: [T, D]."""
        return self.engram.states(ids_BT, None)[0]

    def states(
        self, ids_BT: Tensor, memory: Mapping[int, Tensor], base_TD: Tensor | None = None,
        watch: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """States with `memory` gated in: [T, D]. `base_TD` is what `base` gave for the same window, if it is at hand.

        `watch` takes the residual stream [1, T, D] as each layer's gate finds it.
        """
        if not self.once:
            return self.engram.states(ids_BT, memory, watch)[0]
        layer = len(self.engram.blocks)
        state_BTD = (self.base(ids_BT) if base_TD is None else base_TD)[None]
        if watch is not None:
            watch[layer] = state_BTD
        added_BTD, _ = self.engram.gate(layer)(state_BTD, memory[layer])
        out: Tensor = state_BTD + added_BTD
        return out[0]

    def logits(self, states_TD: Tensor) -> Tensor:
        """float32 [T, V]."""
        if self.plain_head is None:
            self.plain_head = self._is_one_product()
        logits: Tensor
        if self.plain_head:
            logits = self.engram.backbone.get_output_embeddings()(states_TD)
            return logits.float()

        def exchange(_: Any, args: Any, output: Any) -> Any:
            output.last_hidden_state = states_TD[None]
            return output

        backbone = self.engram.backbone
        handle = backbone.base_model.register_forward_hook(exchange)
        try:
            logits = backbone(torch.zeros((1, 1), dtype=torch.int64), use_cache=False).logits
        finally:
            handle.remove()
        return logits[0].float()

    def _is_one_product(self) -> bool:
        """Whether the backbone's logits are its states times the output embedding, on a few tokens."""
        some = torch.arange(min(_LOOKED_AT, self.engram.layout.vocab_size))[None]
        whole = self.engram.backbone(some, use_cache=False).logits
        product = self.engram.backbone.get_output_embeddings()(self.engram.states(some, None))
        return float((whole - product).abs().max()) <= _SAME_LOGITS * float(whole.abs().max())


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
