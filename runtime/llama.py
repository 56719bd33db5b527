"""A GGUF backbone with Engram layers through llama.cpp: the residual stream is rewritten where the graph computes it.

Rows of a whole batch are known before its graph runs: they are asked for at once, and waited for when their layer is
reached. State is kept by slot and position, so that rollback needs no snapshot.

Shape letters: N tokens of a batch, n of a micro-batch, T of one feed, D hidden width, E memory width, X conv channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engram.builders.backbone import BackboneRef
from engram.builders.engram import FEW
from engram.builders.layout import Layout
from engram.builders.tokenizer import load_tokenizer, special_tokens
from engram.kernels import dispatch
from engram.quantize.package import Package, open_package
from engram.runtime.llama_backbone import LlamaBackbone, Part
from engram.runtime.llama_gates import LayerGates
from engram.runtime.llama_hook import (
    LlamaError,
    Singles,
    check_tensor,
    library_version,
    make_filter,
    rows_of,
)
from engram.runtime.reader import RowReader, Ticket
from engram.runtime.slots import Feed, OneSlot, Watch, Words

BATCH = 512  # tokens of one llama_decode
_SLOW = ("reference", "cpp-baseline")  # paths that widen halves one by one
_EMBEDDED = "embd"  # the node that looks token ids up: they are its second source


class Slot:
    """One timeline: its tokens, and the convolution's inputs of every position by layer, [positions, X]."""

    def __init__(self, context: int) -> None:
        self.length = 0
        self.conv: dict[int, Singles] = {}
        self._line = np.zeros(context, dtype=np.int64)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Token ids so far."""
        return self._line[: self.length]

    def rows(self, layout: Layout, ids: list[int]) -> dict[int, NDArray[np.int64]]:
        """Row ids of the next positions, by layer: [1, T, C]; hashed with the tokens that they look back to."""
        end = self.length + len(ids)
        self._line[self.length : end] = ids
        begin = max(0, self.length - layout.orders[-1] + 1)
        found = layout.rows(self._line[None, begin:end])
        return {layer: rows[:, self.length - begin :] for layer, rows in found.items()}

    def grow(self, ids: list[int]) -> None:
        """These tokens belong to it now."""
        self._line[self.length : self.length + len(ids)] = ids
        self.length += len(ids)


class _Call:
    """What the hooks of one decode read, and how far each of them came."""

    def __init__(self, ids: list[int], parts: list[Part], outputs: list[int], ticket: Ticket) -> None:
        self.ids, self.parts, self.ticket = np.array(ids, dtype=np.int32), parts, ticket
        self.outputs = outputs  # places of the batch whose logits are wanted
        self.done: dict[int, int] = {}  # rows that came by, by layer
        self.memory: dict[int, Singles] = {}  # rows that arrived, [N, E]

    def rows(self, begin: int, end: int) -> list[Part]:
        """Rows of the whole batch: what parts of them a micro-batch holds, counted from its own beginning."""
        found = []
        for slot, first, count, position in self.parts:
            low, high = max(begin, first), min(end, first + count)
            if low < high:
                found.append(Part(slot, low - begin, high - low, position + low - first))
        return found

    def wanted(self, begin: int, end: int) -> list[Part]:
        """The same where the graph computes the wanted positions alone."""
        found = []
        for row, place in enumerate(self.outputs[begin:end]):
            part = next(part for part in self.parts if part.first <= place < part.first + part.rows)
            found.append(Part(part.slot, row, 1, part.position + place - part.first))
        return found


class LlamaSlots(Words):
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
        self._backbone = LlamaBackbone(path)
        if self._backbone.recurrent:
            raise LlamaError(f"{path} has a recurrent state, which cannot be rolled back", hint="use torch")
        self._layers, self._width = self._backbone.blocks, self._backbone.width
        halves = self._backbone.bits <= 16 and dispatch.name() not in _SLOW
        self.gates = LayerGates(package, self._width, self._layers, halves=halves)
        if self.layout.vocab_size > self._backbone.vocab_size:
            raise LlamaError(
                f"the layout has {self.layout.vocab_size} token ids, {path} embeds {self._backbone.vocab_size}"
            )
        self.context = min(context, self._backbone.trained_context)
        self._names = [_EMBEDDED, *(self._node(layer) for layer in self.layout.layers)]
        mine = weakref.ref(self)  # no circle through C++, which the garbage collector does not see

        def hit(number: int, address: int, rows: Singles | None) -> None:
            if (owner := mine()) is not None:
                owner._hit(number, address, rows)

        self._filter = make_filter(self._names, self._width, hit)
        self._backbone.start(
            positions=self.context, count=count, batch=batch, micro_batch=micro_batch, threads=threads,
            wanted=self._filter,
        )  # fmt: skip
        self._call: _Call | None = None
        self._asked: tuple[list[int], list[Part], Ticket] | None = None
        self._checked = False
        self.slots = [Slot(self.context) for _ in range(count)]
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

    def _node(self, layer: int) -> str:
        """Name of the node whose values enter block `layer`, or that the head reads."""
        if layer == 0:
            raise LlamaError("a memory before the first block has no node of its own in llama.cpp",
                             hint="run it through torch: --engine torch")  # fmt: skip
        return "result_norm" if layer == self._layers else f"l_out-{layer - 1}"

    def _check(self) -> None:
        """Two tokens through the graph: every node is there once, of the shape expected; then they are forgotten."""
        first = self.begin() or [0]
        self.step([Feed(0, [first[0], first[0]])])
        self._cut(0, 0)
        self._checked = True

    # Timelines

    @property
    def engine(self) -> str:
        """Which library computes, and its release."""
        gates = "float16" if self.gates.halves else "float32"
        return f"llama.cpp (llama-cpp-python {library_version()}), gates in {gates}"

    def session(self) -> OneSlot:
        """The first slot, as generation sees it."""
        return OneSlot(self)

    def length(self, slot: int) -> int:
        return self.slots[slot].length

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        have = self.slots[slot].ids
        most = min(len(have), len(ids) - 1)
        differing = np.flatnonzero(have[:most] != np.array(ids[:most], dtype=np.int64))
        shared = int(differing[0]) if differing.size else most
        self._cut(slot, shared)
        return ids[shared:]

    def _cut(self, slot: int, length: int) -> None:
        """Forget every position of a slot from `length` on."""
        if length == self.length(slot):
            return
        if not self._backbone.cut(slot, length):
            raise LlamaError(f"llama.cpp cannot roll a timeline back to position {length}", hint="start a new one")
        self.slots[slot].length = length

    def ask(self, feeds: Sequence[Feed]) -> None:
        ids: list[int] = []
        parts = []
        for feed in feeds:
            parts.append(Part(feed.slot, len(ids), len(feed.ids), self.slots[feed.slot].length))
            ids += feed.ids
        if len(ids) <= self.batch and all(part.position + part.rows <= self.context for part in parts):
            self._asked = ids, parts, self.reader.ask(self._rows(feeds))

    def _rows(self, feeds: Sequence[Feed]) -> dict[int, NDArray[np.int64]]:
        """Row ids of a batch, by layer: [1, N, C]."""
        found = [self.slots[feed.slot].rows(self.layout, feed.ids) for feed in feeds]
        if len(found) == 1:
            return found[0]
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
        if sum(len(feed.ids) for feed in feeds) <= self.batch:
            self._decode(feeds, list(range(len(feeds))))
            return self._backbone.kept(len(feeds))
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
            self._decode([feed for _, feed, _ in now], [place if last else None for place, _, last in now])
            waiting = later
        return self._backbone.kept(len(feeds))

    def _decode(self, feeds: Sequence[Feed], wanted: Sequence[int | None]) -> None:
        """One llama_decode; logits after the last token of a feed are kept at the place wanted, if any."""
        ids: list[int] = []
        parts, outputs = [], []
        for feed, place in zip(feeds, wanted, strict=True):
            parts.append(Part(feed.slot, len(ids), len(feed.ids), self.slots[feed.slot].length))
            ids += feed.ids
            if place is not None:
                outputs.append(len(ids) - 1)
        if self._asked is not None and self._asked[0] == ids and self._asked[1] == parts:
            ticket = self._asked[2]
        else:
            ticket = self.reader.ask(self._rows(feeds))
        self._asked = None
        self._backbone.fill(ids, parts, outputs)
        self._call = call = _Call(ids, parts, outputs, ticket)
        self._filter.expect(call.ids)
        inputs = self._arm(call) if len(outputs) == len(ids) <= FEW and self.watch is None else {}
        try:
            code = self._backbone.decode()
        finally:
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
            self.slots[feed.slot].grow(feed.ids)
        for place, inputs_BTX in inputs.items():
            if self._filter.handled(place):  # else the node came in several micro-batches, and `_hit` kept them
                self.gates.keep(self.layout.layers[place - 1], parts, inputs_BTX, self.slots)
        for row, place in zip(outputs, (place for place in wanted if place is not None), strict=True):
            self._backbone.keep_logits(row, place)

    def _arm(self, call: _Call) -> dict[int, Singles]:
        """A step of one position a slot: where rows need not be waited for, the gates are set off beforehand.

        Returns where the inputs of convolutions will be, by place of the node.
        """
        found = {}
        for place, layer in enumerate(self.layout.layers, 1):
            if self._checked and self.reader.arrived(call.ticket, layer):
                memory_nE = self.reader.take(call.ticket, layer)[0]
                inputs = self.gates.arm(layer, call.parts, memory_nE, self.slots, place, self._filter)
                if inputs is not None:
                    found[place] = inputs
        return found

    def _restore(self, parts: Sequence[Part]) -> None:
        """Take back what a failed decode left in the cache."""
        for part in parts:
            self._backbone.cut(part.slot, part.position)

    def _complete(self, call: _Call) -> None:
        """Refuse a graph in which a node was not computed for every row: garbage would follow."""
        if self._filter.handled_all(len(call.ids)):
            return
        seen = {name: self._filter.handled(place) for place, name in enumerate(self._names)}
        for name, layer in zip(self._names[1:], self.layout.layers, strict=True):
            seen[name] += call.done.get(layer, 0)
        for name, found in seen.items():
            whole = len(call.outputs) if name == "result_norm" else len(call.ids)
            if found != whole:
                raise LlamaError(
                    f"llama.cpp computed node {name} for {found} of {whole} rows: the graph of this architecture is "
                    "not the one expected", hint="run it through torch: --engine torch",
                )  # fmt: skip

    # Hooks

    def _hit(self, number: int, address: int, stream_nD: Singles | None) -> None:
        """A node was computed for the rows of one micro-batch: rewrite them in place."""
        call = self._call
        assert call is not None
        if number == 0:
            raise LlamaError("llama.cpp reordered the rows of a batch", hint="run it through torch: --engine torch")
        if stream_nD is None or not self._checked:
            check_tensor(address)
            stream_nD = rows_of(address, self._width)
        layer = self.layout.layers[number - 1]
        begin = call.done.get(layer, 0)
        call.done[layer] = end = begin + len(stream_nD)
        memory_NE = call.memory.get(layer)
        if memory_NE is None:
            call.memory[layer] = memory_NE = self.reader.take(call.ticket, layer)[0]
        if layer == self._layers:  # the graph computes the wanted positions alone
            parts, memory_nE = call.wanted(begin, end), memory_NE[call.outputs[begin:end]]
        elif end == len(memory_NE) and not begin:
            parts, memory_nE = call.parts, memory_NE
        else:
            parts, memory_nE = call.rows(begin, end), memory_NE[begin:end]
        if len(memory_nE) != len(stream_nD):
            raise LlamaError(f"node {self._names[number]} has {end} rows, more than the batch")
        if self.watch is not None:
            self.gates.show(layer, parts, stream_nD, memory_nE, self.watch)
        self.gates.add(layer, parts, stream_nD, memory_nE, self.slots)

    def counters(self) -> dict[str, int]:
        return self.reader.counters()

    def close(self) -> None:
        """Free the context and the model, and let go of the tables."""
        self._backbone.close()
        self.reader.close()
