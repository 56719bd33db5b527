"""A backbone with Engram layers in place: any transformers decoder, attached through hooks, never forked.

Shape letters: B batch, T positions of this call, S positions so far, D hidden width, E memory width, X conv channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram import EngramError
from engram.builders.engram import Gate, GateConfig
from engram.builders.layout import Layout, Lookback


class ModelError(EngramError):
    """A backbone that the memory does not fit, or a timeline that cannot do what is asked."""


@dataclass
class Timeline:
    """The state of one batch of texts, indexed by position: rollback and prefix reuse need no snapshot.

    Convolution inputs are kept for every position (one row of D numbers a layer: a small part of what the key-value
    cache keeps), in buffers of which the first `length` positions count.
    """

    layout: Layout
    cache: Any
    croppable: bool
    ids_BS: NDArray[np.int64]
    mask_BS: NDArray[np.bool_]
    conv: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions so far, padding included (S)."""
        return int(self.ids_BS.shape[1])

    def starts(self, mask_BT: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Where a text begins in the next positions: padding, and the first token after it."""
        before = self.mask_BS[:, -1:] if self.length else np.zeros((mask_BT.shape[0], 1), dtype=bool)
        inside: NDArray[np.bool_] = mask_BT & np.concatenate([before, mask_BT[:, :-1]], axis=1)
        return ~inside

    def lookback(self) -> Lookback | None:
        """What hashing the next positions needs to know of the ones so far."""
        kept = self.layout.orders[-1] - 1
        if not self.length or not kept:
            return None
        tail = slice(max(0, self.length - kept), self.length)
        mask = self.mask_BS[:, tail]
        before = self.mask_BS[:, tail.start - 1 : tail.start] if tail.start else np.zeros((len(mask), 1), dtype=bool)
        starts = ~(mask & np.concatenate([before, mask[:, :-1]], axis=1))
        return self.layout.history(self.ids_BS[:, tail], None, starts)

    def rows(self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.bool_] | None = None) -> dict[int, NDArray[np.int64]]:
        """Row ids of the next positions, by layer: [B, T, C]. Does not move the timeline."""
        mask = np.ones(ids_BT.shape, dtype=bool) if mask_BT is None else mask_BT
        return self.layout.rows(ids_BT, self.lookback(), start_BT=self.starts(mask))

    def extend(self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.bool_]) -> None:
        """Record positions whose hidden states have been computed."""
        self.ids_BS = np.concatenate([self.ids_BS, ids_BT], axis=1)
        self.mask_BS = np.concatenate([self.mask_BS, mask_BT], axis=1)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on (rejected tokens, a shared prefix)."""
        if not 0 <= length <= self.length:
            raise ModelError(f"cannot roll back to position {length} of {self.length}")
        if length == self.length:
            return
        if not self.croppable:
            raise ModelError("this backbone keeps a recurrent state and cannot be rolled back")
        self.cache.crop(length - self.length)  # negative: how many positions to drop
        self.ids_BS, self.mask_BS = self.ids_BS[:, :length], self.mask_BS[:, :length]

    def fork(self) -> Timeline:
        """An independent copy: several continuations of one prefix."""
        conv = {layer: inputs.clone() for layer, inputs in self.conv.items()}
        return replace(self, cache=copy.deepcopy(self.cache), conv=conv)

    def past(self, layer: int, count: int) -> Tensor | None:
        """The layer's convolution inputs at the last `count` positions (fewer near the beginning)."""
        if not self.length or layer not in self.conv:
            return None
        return self.conv[layer][:, max(0, self.length - count) : self.length]

    def keep(self, layer: int, inputs_BTX: Tensor) -> None:
        """Store the convolution inputs of the next positions; the buffer doubles when it is full."""
        begin, end = self.length, self.length + inputs_BTX.shape[1]
        buffer = self.conv.get(layer)
        if buffer is None or buffer.shape[1] < end:
            grown = inputs_BTX.new_zeros(inputs_BTX.shape[0], max(2 * begin, end), inputs_BTX.shape[2])
            if buffer is not None:
                grown[:, :begin] = buffer[:, :begin]
            self.conv[layer] = buffer = grown
        buffer[:, begin:end] = inputs_BTX


@dataclass
class _Call:
    """What the hooks of one forward pass read and write."""

    memory: Mapping[int, Tensor]
    mask_BT: Tensor | None = None
    past: Mapping[int, Tensor | None] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    watch: dict[int, Tensor] | None = None


class EngramModel(nn.Module):
    """Backbone, gates and layout. Rows come in as `memory`, from wherever they live."""

    def __init__(self, backbone: Any, layout: Layout, gates: Mapping[int, GateConfig]) -> None:
        super().__init__()
        self.backbone = backbone
        self.layout = layout
        self.blocks = find_blocks(backbone)
        hidden = backbone.config.get_text_config().hidden_size
        self.gates = nn.ModuleDict()
        for layer in layout.layers:
            if layer > len(self.blocks):
                raise ModelError(
                    f"layer {layer} is beyond the backbone's {len(self.blocks)} blocks",
                    hint=f"use 0 … {len(self.blocks) - 1}, or {len(self.blocks)} for the output of the last norm",
                )
            config = gates[layer]
            if config.hidden != hidden or config.memory != layout.memory_width:
                raise ModelError(
                    f"gate of layer {layer} maps {config.memory} → {config.hidden}; "
                    f"layout and backbone need {layout.memory_width} → {hidden}"
                )
            self.gates[str(layer)] = Gate(config)
            self._hook(layer)
        if layout.vocab_size > self.vocab_size:
            raise ModelError(
                f"the layout's tokenizer has {layout.vocab_size} ids, the backbone embeds {self.vocab_size}"
            )
        self._call: _Call | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's token embedding."""
        return int(self.backbone.get_input_embeddings().weight.shape[0])

    def gate(self, layer: int) -> Gate:
        """The gate of one layer."""
        module = self.gates[str(layer)]
        assert isinstance(module, Gate)
        return module

    def _hook(self, layer: int) -> None:
        def add(hidden: Tensor) -> Tensor:
            call = self._call
            if call is None:  # the backbone is used by itself
                return hidden
            if call.watch is not None:
                call.watch[layer] = hidden
            out, inputs = self.gate(layer).add(hidden, call.memory[layer], call.past.get(layer), call.mask_BT)
            if inputs is not None:
                call.inputs[layer] = inputs
            return out

        def before_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (add(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": add(kwargs["hidden_states"])}

        def after_norm(_: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = add(output.last_hidden_state)
            return output

        if layer < len(self.blocks):
            self.blocks[layer].register_forward_pre_hook(before_block, with_kwargs=True)
        else:
            self.backbone.base_model.register_forward_hook(after_norm)

    def timeline(self, batch: int = 1) -> Timeline:
        """An empty state for `batch` texts."""
        from transformers import DynamicCache

        kinds = set(getattr(self.backbone.config.get_text_config(), "layer_types", None) or ["full_attention"])
        croppable = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        # without the configuration a cache keeps every position, also of sliding layers, so that rollback is exact
        cache = DynamicCache() if croppable else DynamicCache(config=self.backbone.config)
        ids = np.zeros((batch, 0), dtype=np.int64)
        return Timeline(self.layout, cache, croppable, ids, ids.astype(bool))

    def states(
        self, ids_BT: Tensor, memory: Mapping[int, Tensor] | None, watch: dict[int, Tensor] | None = None
    ) -> Tensor:
        """What the unembedding is applied to [B, T, D], with `memory` gated in (None: the backbone alone).

        `watch` takes the residual stream as each layer's gate finds it.
        """
        self._call = None if memory is None else _Call(memory, watch=watch)
        try:
            state_BTD: Tensor = self.backbone.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        finally:
            self._call = None
        return state_BTD

    def forward(
        self,
        ids_BT: Tensor,
        memory: Mapping[int, Tensor],
        *,
        mask_BT: Tensor | None = None,
        timeline: Timeline | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [B, T, vocabulary] (T = 1 with `last_only`), with `memory[layer]` [B, T, E] gated into each layer.

        `mask_BT` is 0 on left padding. With a timeline these positions continue it, and it is moved forward.
        """
        past = {} if timeline is None else {n: timeline.past(n, self.gate(n).past) for n in self.layout.layers}
        whole_mask, positions = self._positions(ids_BT, mask_BT, timeline)
        options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
        if timeline is not None:
            options |= {"past_key_values": timeline.cache, "use_cache": True}
        else:
            options |= {"use_cache": False}
        if whole_mask is not None:
            options["attention_mask"] = whole_mask
        if positions is not None:
            options["position_ids"] = positions
        self._call = call = _Call(memory, mask_BT, past)
        try:
            logits: Tensor = self.backbone(input_ids=ids_BT, **options).logits
        finally:
            self._call = None
        if timeline is not None:
            mask = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
            for layer, inputs in call.inputs.items():
                timeline.keep(layer, inputs)
            timeline.extend(ids_BT.cpu().numpy(), mask.cpu().numpy().astype(bool))
        return logits

    @staticmethod
    def _positions(
        ids_BT: Tensor, mask_BT: Tensor | None, timeline: Timeline | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attention mask over all positions so far and position ids of these; None where nothing is padded."""
        padded = mask_BT is not None or (timeline is not None and not timeline.mask_BS.all())
        if not padded:
            return None, None
        here = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.to(ids_BT.dtype)
        whole = here
        if timeline is not None and timeline.length:
            whole = torch.cat([torch.from_numpy(timeline.mask_BS).to(here), here], dim=1)
        positions = (whole.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        return whole, positions


def find_blocks(backbone: Any) -> nn.ModuleList:
    """The list of decoder blocks: the one ModuleList as long as the configuration's num_hidden_layers."""
    count = backbone.config.get_text_config().num_hidden_layers
    found = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ModelError(f"{type(backbone).__name__} has no list of {count} decoder blocks to attach to")
    return found[0]


def gate_weights(model: EngramModel) -> dict[int, dict[str, NDArray[np.float32]]]:
    """Dense Engram weights by layer and parameter name, as float32 arrays (what a checkpoint stores)."""
    return {
        layer: {name: p.detach().float().cpu().numpy() for name, p in model.gate(layer).state_dict().items()}
        for layer in model.layout.layers
    }


def load_gate_weights(model: EngramModel, dense: Mapping[int, Mapping[str, NDArray[np.float32]]]) -> None:
    """The inverse of `gate_weights`; ModelError names a missing, unknown or misshapen parameter."""
    for layer in model.layout.layers:
        values = {name: torch.from_numpy(np.array(value)) for name, value in dense.get(layer, {}).items()}
        try:
            model.gate(layer).load_state_dict(values)
        except RuntimeError as wrong:
            raise ModelError(f"dense weights of layer {layer} do not fit its gate: {wrong}") from None
