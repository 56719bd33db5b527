"""A GGUF backbone with Engram layers through llama.cpp: the residual stream is rewritten where the graph computes it.

Rows of a whole batch are known before its graph runs: they are asked for at once, and waited for when their layer is
reached. State is kept by slot and position, so that rollback needs no snapshot.

Shape letters: N tokens of a batch, n of a micro-batch, T of one feed, D hidden width, E memory width, X conv channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.builders.backbone import BackboneRef
from engram.builders.engram import Gate, GateConfig
from engram.builders.layout import Layout, Lookback
from engram.builders.tokenizer import load_tokenizer, special_tokens
from engram.quantize.package import Package, open_package
from engram.runtime.llama_hook import (
    LlamaError,
    check_tensor,
    integers_of,
    library,
    library_version,
    make_filter,
    rows_of,
    tensor_at,
)
from engram.runtime.reader import RowReader, Ticket
from engram.runtime.slots import Feed, OneSlot, Watch

BATCH = 512  # tokens of one llama_decode
_EMBEDDED = "embd"  # the node that looks token ids up: they are its second source


@dataclass
class Slot:
    """One timeline: its tokens, and the convolution's inputs of every position by layer, [positions, X]."""

    ids: list[int]
    conv: dict[int, Tensor]

    def lookback(self, layout: Layout) -> Lookback | None:
        """What hashing the next positions needs to know of the ones so far."""
        kept = layout.orders[-1] - 1
        if not self.ids or not kept:
            return None
        return layout.history(np.array([self.ids[-kept:]], dtype=np.int64))

    def rows(self, layout: Layout, ids: Sequence[int]) -> dict[int, NDArray[np.int64]]:
        """Row ids of the next positions, by layer: [1, T, C]."""
        return layout.rows(np.array([ids], dtype=np.int64), self.lookback(layout))

    def keep(self, layer: int, position: int, inputs_TX: Tensor) -> None:
        """Store the convolution's inputs from this position on; the buffer doubles when it is full."""
        end, buffer = position + len(inputs_TX), self.conv.get(layer)
        if buffer is None or len(buffer) < end:
            grown = inputs_TX.new_zeros(max(2 * position, end), inputs_TX.shape[1])
            if buffer is not None:
                grown[: min(position, len(buffer))] = buffer[:position]
            self.conv[layer] = buffer = grown
        buffer[position:end] = inputs_TX


@dataclass(frozen=True)
class _Part:
    """Consecutive tokens of a batch that continue one slot: those from `first` on, at `position` of its timeline."""

    slot: int
    first: int
    count: int
    position: int


class _Call:
    """What the hooks of one decode read, and how far each of them came."""

    def __init__(self, ids: Sequence[int], parts: Sequence[_Part], outputs: Sequence[int], ticket: Ticket) -> None:
        self.ids, self.parts, self.ticket = np.array(ids, dtype=np.int32), parts, ticket
        self.whole = np.arange(len(ids))
        self.outputs = np.array(outputs)  # places of the batch whose logits are wanted
        self.done: dict[int, int] = {}
        self.memory: dict[int, Tensor] = {}  # rows that arrived, [N, E]


class LlamaSlots:
    """A package with a GGUF backbone, opened: `count` timelines over it. One thread at a time may call it."""

    def __init__(
        self, package: Package, reader: RowReader, *, count: int = 1, context: int = 4096, threads: int | None = None,
        batch: int = BATCH, micro_batch: int = BATCH, unified: bool = True,
    ) -> None:  # fmt: skip
        """Raises LlamaError for a backbone that llama.cpp cannot run, or whose graph is not the one expected."""
        if not unified:
            raise LlamaError("a cache that is not unified reorders a batch's rows", hint="leave kv_unified on")
        self.watch: Watch | None = None
        self.package, self.reader, self.layout, self.count, self.batch = package, reader, package.layout, count, batch
        ref = BackboneRef.from_json(package.manifest["backbone"])
        if ref.kind != "embedded":
            ref.verify(package.folder)
        path = ref.place(package.folder)
        if path is None or path.suffix != ".gguf":
            raise LlamaError(f"the backbone of {package.folder} is no GGUF", hint="run it through torch")
        self._c = library()
        self._model = self._load(path)
        self._layers, self._width = int(self._c.llama_model_n_layer(self._model)), self._embedding()
        self.gates = {layer: self._gate(layer) for layer in self.layout.layers}
        self.vocab_size = int(self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model)))
        if self.layout.vocab_size > self.vocab_size:
            raise LlamaError(f"the layout has {self.layout.vocab_size} token ids, {path} embeds {self.vocab_size}")
        self.context = min(context, int(self._c.llama_model_n_ctx_train(self._model)))
        self._names = [_EMBEDDED, *(self._node(layer) for layer in self.layout.layers)]
        mine = weakref.ref(self)  # no circle through C++, which the garbage collector does not see

        def hit(number: int, address: int) -> None:
            if (owner := mine()) is not None:
                owner._hit(number, address)

        self._filter = make_filter(self._names, hit)
        self._context = self._new_context(threads, micro_batch)
        self._call: _Call | None = None
        self._asked: tuple[list[Feed], list[int], Ticket] | None = None
        self._checked = False
        self.slots = [Slot([], {}) for _ in range(count)]
        self.tokenizer = load_tokenizer(package.folder)
        self.special = special_tokens(package.folder)
        self._check()

    @classmethod
    def open(
        cls, folder: Path, *, offload: str = "disk", cache_bytes: int | None = None, verify: str = "first-touch",
        table_io: str = "auto", **options: Any,
    ) -> LlamaSlots:  # fmt: skip
        """Open a package with its tables in the given placement, as engine.Model.open."""
        package = open_package(folder, verify=verify, io=table_io)
        try:
            return cls(package, RowReader(package, offload, cache_bytes=cache_bytes), **options)
        except BaseException:
            package.close()
            raise

    # What is loaded

    def _load(self, path: Path) -> Any:
        options = self._c.llama_model_default_params()
        options.n_gpu_layers = 0
        model = self._c.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise LlamaError(f"llama.cpp cannot load {path}", hint="is it whole, of an architecture that it knows?")
        for kind in ("recurrent", "hybrid"):
            if getattr(self._c, f"llama_model_is_{kind}")(model):
                raise LlamaError(f"{path} is a {kind} model, whose state cannot be rolled back", hint="use torch")
        return model

    def _embedding(self) -> int:
        return int(self._c.llama_model_n_embd(self._model))

    def _gate(self, layer: int) -> Gate:
        config = GateConfig.from_json(self.package.manifest["gate"][str(layer)])
        if layer > self._layers or config.hidden != self._width or config.branches != 1:
            raise LlamaError(
                f"the gate of layer {layer} is for {config.branches} streams of {config.hidden}, the GGUF has one of "
                f"{self._width} and {self._layers} blocks"
            )
        if config.conv_kernel and layer == self._layers:
            raise LlamaError(
                f"layer {layer} is the output of the last norm, of which llama.cpp computes wanted positions alone: a "
                "convolution there cannot be mirrored", hint="run it through torch: --engine torch",
            )  # fmt: skip
        gate = Gate(config).eval().requires_grad_(False)
        values = {name: torch.from_numpy(np.array(v)) for name, v in self.package.dense()[layer].items()}
        gate.load_state_dict(values)
        return gate

    def _node(self, layer: int) -> str:
        """Name of the node whose values enter block `layer`, or that the head reads."""
        if layer == 0:
            raise LlamaError("a memory before the first block has no node of its own in llama.cpp",
                             hint="run it through torch: --engine torch")  # fmt: skip
        return "result_norm" if layer == self._layers else f"l_out-{layer - 1}"

    def _new_context(self, threads: int | None, micro_batch: int) -> Any:
        options = self._c.llama_context_default_params()
        options.n_ctx, options.n_seq_max = self.context * self.count, self.count
        options.n_batch, options.n_ubatch = self.batch, min(micro_batch, self.batch)
        options.kv_unified, options.swa_full, options.no_perf = True, True, True
        if threads is not None:
            options.n_threads = options.n_threads_batch = threads
        options.cb_eval, options.cb_eval_user_data = self._filter.callback, self._filter.user_data
        made = self._c.llama_init_from_model(self._model, options)
        if not made:
            raise LlamaError(f"llama.cpp makes no context of {options.n_ctx} positions", hint="ask for fewer")
        return made

    def _check(self) -> None:
        """One token through the graph: every node is there once, of the shape expected; then it is forgotten."""
        first = self.begin() or [0]
        self.step([Feed(0, first[:1])])
        self._cut(0, 0)
        self._checked = True

    # Timelines

    @property
    def engine(self) -> str:
        """Which library computes, and its release."""
        return f"llama.cpp (llama-cpp-python {library_version()})"

    def session(self) -> OneSlot:
        """The first slot, as generation sees it."""
        return OneSlot(self)

    def begin(self) -> list[int]:
        return [int(self.special["bos_id"])] if self.special.get("add_bos") else []

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.special.get("eos_ids") or [])

    def length(self, slot: int) -> int:
        return len(self.slots[slot].ids)

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        have, shared = self.slots[slot].ids, 0
        while shared < min(len(have), len(ids) - 1) and have[shared] == ids[shared]:
            shared += 1
        self._cut(slot, shared)
        return ids[shared:]

    def _cut(self, slot: int, length: int) -> None:
        """Forget every position of a slot from `length` on."""
        if length == len(self.slots[slot].ids):
            return
        memory = self._c.llama_get_memory(self._context)
        if not self._c.llama_memory_seq_rm(memory, slot, length, -1):
            raise LlamaError(f"llama.cpp cannot roll a timeline back to position {length}", hint="start a new one")
        del self.slots[slot].ids[length:]

    def ask(self, feeds: Sequence[Feed]) -> None:
        if sum(len(feed.ids) for feed in feeds) <= self.batch:
            lengths = [self.length(feed.slot) for feed in feeds]
            self._asked = list(feeds), lengths, self.reader.ask(self._rows(feeds))

    def _rows(self, feeds: Sequence[Feed]) -> dict[int, NDArray[np.int64]]:
        """Row ids of a batch, by layer: [1, N, C]."""
        found = [self.slots[feed.slot].rows(self.layout, feed.ids) for feed in feeds]
        return {layer: np.concatenate([rows[layer] for rows in found], axis=1) for layer in self.layout.layers}

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        for feed in feeds:
            if not feed.ids or not 0 <= feed.slot < self.count:
                raise LlamaError(f"slot {feed.slot} of {self.count} was fed {len(feed.ids)} tokens")
            if self.length(feed.slot) + len(feed.ids) > self.context:
                raise LlamaError(
                    f"{self.length(feed.slot) + len(feed.ids)} tokens exceed the context of {self.context}",
                    hint="shorten the prompt or lower --max-tokens",
                )
        logits: list[Tensor | None] = [None] * len(feeds)
        waiting = [(place, feed.slot, list(feed.ids)) for place, feed in enumerate(feeds)]
        while waiting:
            room, now, later = self.batch, [], []
            for place, slot, ids in waiting:
                taken = ids[:room]
                room -= len(taken)
                if taken:
                    now.append((place, Feed(slot, taken), len(taken) == len(ids)))
                if len(taken) < len(ids):
                    later.append((place, slot, ids[len(taken) :]))
            found = self._decode([feed for _, feed, _ in now], [last for _, _, last in now])
            for (place, _, _), made in zip((part for part in now if part[2]), found, strict=True):
                logits[place] = made
            waiting = later
        return [made for made in logits if made is not None]

    def _decode(self, feeds: list[Feed], wanted: list[bool]) -> list[Tensor]:
        """One llama_decode; logits after the last token of each feed where they are wanted."""
        ids = [token for feed in feeds for token in feed.ids]
        ends = np.cumsum([len(feed.ids) for feed in feeds]).tolist()
        parts = [
            _Part(feed.slot, end - len(feed.ids), len(feed.ids), self.length(feed.slot))
            for feed, end in zip(feeds, ends, strict=True)
        ]
        outputs = [end - 1 for end, last in zip(ends, wanted, strict=True) if last]
        lengths = [part.position for part in parts]
        if self._asked is not None and self._asked[:2] == (feeds, lengths):
            ticket = self._asked[2]
        else:
            ticket = self.reader.ask(self._rows(feeds))
        self._asked = None
        self._call = call = _Call(ids, parts, outputs, ticket)
        batch = self._batch(ids, parts, set(outputs))
        try:
            code = self._c.llama_decode(self._context, batch)
        finally:
            self._c.llama_batch_free(batch)
            self._call = None
        wrong = self._filter.take_error()
        try:
            if wrong is not None:
                raise wrong
            if code:
                raise LlamaError(f"llama_decode of {len(ids)} tokens ended with {code}", hint="is its memory full?")
            self._complete(call)
        except BaseException:
            self._restore(parts)
            raise
        for feed in feeds:
            self.slots[feed.slot].ids += feed.ids
        return [self._logits(place) for place in outputs]

    def _restore(self, parts: Sequence[_Part]) -> None:
        """Take back what a failed decode left in the cache."""
        memory = self._c.llama_get_memory(self._context)
        for part in parts:
            self._c.llama_memory_seq_rm(memory, part.slot, part.position, -1)

    def _complete(self, call: _Call) -> None:
        """Refuse a graph in which a node was not computed for every row: garbage would follow."""
        for place, name in enumerate(self._names):
            whole = len(call.outputs) if name == "result_norm" else len(call.ids)
            if call.done.get(place, 0) != whole:
                raise LlamaError(
                    f"llama.cpp computed node {name} for {call.done.get(place, 0)} of {whole} rows: the graph of this "
                    "architecture is not the one expected", hint="run it through torch: --engine torch",
                )  # fmt: skip

    def _batch(self, ids: Sequence[int], parts: Sequence[_Part], outputs: set[int]) -> Any:
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for part in parts:
            for i in range(part.count):
                place = part.first + i
                batch.token[place], batch.pos[place] = ids[place], part.position + i
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, part.slot
                batch.logits[place] = place in outputs
        return batch

    def _logits(self, place: int) -> Tensor:
        found = self._c.llama_get_logits_ith(self._context, place)
        if not found:
            raise LlamaError(f"llama.cpp has no logits of row {place}")
        return torch.from_numpy(np.ctypeslib.as_array(found, shape=(self.vocab_size,)).copy())

    # Hooks

    def _hit(self, number: int, address: int) -> None:
        """A node was computed for the rows of one micro-batch."""
        call = self._call
        assert call is not None
        if not self._checked:
            check_tensor(address)
        done = call.done.get(number, 0)
        if number == 0:
            ids = integers_of(tensor_at(address).src[1])
            if not np.array_equal(ids, call.ids[done : done + len(ids)]):
                raise LlamaError("llama.cpp reordered the rows of a batch", hint="run it through torch: --engine torch")
            call.done[number] = done + len(ids)
            return
        layer = self.layout.layers[number - 1]
        stream_nD = rows_of(address, self._width)
        order = call.outputs if layer == self._layers else call.whole
        places = order[done : done + len(stream_nD)]
        if len(places) != len(stream_nD):
            raise LlamaError(f"node {self._names[number]} has {len(stream_nD)} rows, {len(places)} are expected")
        call.done[number] = done + len(places)
        if layer not in call.memory:
            call.memory[layer] = torch.from_numpy(self.reader.take(call.ticket, layer))[0]
        with torch.inference_mode():
            for part in call.parts:
                mine = np.flatnonzero((places >= part.first) & (places < part.first + part.count))
                if len(mine):
                    self._add(layer, part, stream_nD[mine[0] : mine[-1] + 1], call.memory[layer], places[mine])

    def _add(
        self, layer: int, part: _Part, stream_TD: NDArray[np.float32], memory_NE: Tensor, places: NDArray[np.int64]
    ) -> None:
        """Rewrite the stream of one slot's positions in place."""
        gate, slot = self.gates[layer], self.slots[part.slot]
        position = part.position + int(places[0]) - part.first
        past = None
        if gate.past and position and layer in slot.conv:
            past = slot.conv[layer][max(0, position - gate.past) : position][None]
        hidden = torch.from_numpy(stream_TD)[None]
        memory_BTE = memory_NE[torch.from_numpy(places)][None]
        if self.watch is not None:
            self.watch(part.slot, layer, gate.open(hidden[:, :, None], memory_BTE)[0].numpy())
        out, inputs = gate.add(hidden, memory_BTE, past)
        stream_TD[:] = out[0].numpy()
        if inputs is not None:
            slot.keep(layer, position, inputs[0])

    def counters(self) -> dict[str, int]:
        return self.reader.counters()

    def close(self) -> None:
        """Free the context and the model, and let go of the tables."""
        if self._context is not None:
            self._c.llama_free(self._context)
            self._c.llama_model_free(self._model)
            self._context = self._model = None
        self.reader.close()
