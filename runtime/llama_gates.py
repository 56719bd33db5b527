"""The gates of a package's layers over rows of llama.cpp's residual stream, rewritten in place.

Shape letters: n rows of a micro-batch, T positions of one slot, D hidden width, E memory width, M branches (1), P past
positions that the convolution reads, X its channels.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engram.builders.engram import FEW, Gate, GateConfig
from engram.quantize.package import Package
from engram.runtime.llama_backbone import Part
from engram.runtime.llama_hook import Filter, LlamaError, Singles
from engram.runtime.slots import Watch


class HasInputs(Protocol):
    """A timeline that keeps the convolution's inputs of every position, by layer: [positions, X]."""

    conv: dict[int, Singles]


class LayerGates:
    """Gates by layer, with their weights side by side in large pages where the system has them.

    A decode step reads all of these weights once, from memory: the backbone's have pushed them out of the caches. With
    `halves` the two projections are rounded to float16, which a backbone of at most 16 bits a weight does not notice.
    """

    def __init__(self, package: Package, width: int, blocks: int, *, halves: bool) -> None:
        """Raises LlamaError for a gate that the backbone (its width, its number of blocks) has no place for."""
        self._gates: dict[int, Gate] = {}
        dense = package.dense()
        self.halves = halves and all(_fits_halves(arrays[name]) for arrays in dense.values() for name in _PROJECTIONS)
        if self.halves:
            dense = {layer: {name: _rounded(array) if name in _PROJECTIONS else array for name, array in arrays.items()}
                     for layer, arrays in dense.items()}  # fmt: skip
        packed = _in_large_pages(dense)
        for layer in package.layout.layers:
            config = GateConfig.from_json(package.manifest["gate"][str(layer)])
            if layer > blocks or config.hidden != width or config.branches != 1:
                raise LlamaError(
                    f"the gate of layer {layer} is for {config.branches} streams of {config.hidden}, the GGUF has one "
                    f"of {width} and {blocks} blocks"
                )
            if config.conv_kernel and layer == blocks:
                raise LlamaError(
                    f"layer {layer} is the output of the last norm, of which llama.cpp computes wanted positions "
                    "alone: a convolution there cannot be mirrored", hint="run it through torch: --engine torch",
                )  # fmt: skip
            gate = Gate(config).eval().requires_grad_(False)
            values = {name: torch.from_numpy(v.astype(np.float32, copy=False)) for name, v in packed[layer].items()}
            gate.load_state_dict(values, assign=True)
            self._gates[layer] = gate
        self._steps = {  # of few positions
            layer: gate.prepared(*(packed[layer][name] for name in _PROJECTIONS))
            for layer, gate in self._gates.items()
        }
        self._past = {layer: gate.past for layer, gate in self._gates.items()}

    def show(self, layer: int, parts: Sequence[Part], stream_nD: Singles, memory_nE: Singles, watch: Watch) -> None:
        """Tell the watcher how far the gates open."""
        with torch.inference_mode():
            stream, memory = torch.from_numpy(stream_nD)[None, :, None], torch.from_numpy(memory_nE)[None]
            opened_nM = self._gates[layer].open(stream, memory)[0].numpy()
        for part in parts:
            watch(part.slot, layer, opened_nM[part.first : part.first + part.rows])

    def add(
        self, layer: int, parts: Sequence[Part], stream_nD: Singles, memory_nE: Singles, slots: Sequence[HasInputs]
    ) -> None:
        """Rewrite the stream; what the convolution reads later is kept with the slots."""
        if not self._past[layer]:
            self._add(layer, stream_nD[None], memory_nE[None], None)
        elif all(part.rows == 1 for part in parts):  # one position of each slot: all of them at once
            past = np.stack([self._before(layer, part, slots[part.slot]) for part in parts])
            inputs = self._add(layer, stream_nD[:, None], memory_nE[:, None], past)
            self.keep(layer, parts, inputs, slots)
        else:
            for part in parts:
                rows = slice(part.first, part.first + part.rows)
                past = self._before(layer, part, slots[part.slot])[None]
                inputs = self._add(layer, stream_nD[None, rows], memory_nE[None, rows], past)
                self.keep(layer, [part], inputs, slots)

    def arm(
        self, layer: int, parts: Sequence[Part], memory_nE: Singles, slots: Sequence[HasInputs], place: int,
        wanted: Filter,
    ) -> Singles | None:
        """The same later, when the node at this place of the filter comes; each part is one position.

        Returns where the convolution's inputs will be: `keep` them then.
        """
        if not self._past[layer]:
            wanted.arm(place, self._steps[layer], memory_nE[None], None, None)
            return None
        past_BPX = np.stack([self._before(layer, part, slots[part.slot]) for part in parts])
        inputs_BTX = np.empty((len(parts), 1, past_BPX.shape[2]), dtype=np.float32)
        wanted.arm(place, self._steps[layer], memory_nE[:, None], past_BPX, inputs_BTX)
        return inputs_BTX

    def _add(self, layer: int, stream_BTD: Singles, memory_BTE: Singles, past_BPX: Singles | None) -> Singles | None:
        """Rewrite the stream in place; the convolution's inputs."""
        if stream_BTD.shape[0] * stream_BTD.shape[1] <= FEW:
            stream_BTMD = stream_BTD[:, :, None]
            return self._steps[layer].step(stream_BTMD, memory_BTE, past_BPX, out_BTMD=stream_BTMD)[1]
        with torch.inference_mode():
            past = None if past_BPX is None else torch.from_numpy(past_BPX)
            out, inputs = self._gates[layer].add(torch.from_numpy(stream_BTD), torch.from_numpy(memory_BTE), past)
            stream_BTD[:] = out.numpy()
            return None if inputs is None else inputs.numpy()

    def _before(self, layer: int, part: Part, slot: HasInputs) -> Singles:
        """The convolution's inputs before a part, zeros where there is no text: [P, X]."""
        reach = self._past[layer]
        found = np.zeros((reach, self._gates[layer].config.hidden), dtype=np.float32)
        kept = min(reach, part.position)
        if kept:
            found[reach - kept :] = slot.conv[layer][part.position - kept : part.position]
        return found

    def keep(
        self, layer: int, parts: Sequence[Part], inputs_BTX: Singles | None, slots: Sequence[HasInputs]
    ) -> None:
        """Store the convolution's inputs; a buffer doubles when it is full."""
        assert inputs_BTX is not None
        for part, inputs_TX in zip(parts, inputs_BTX, strict=True):
            conv, position, end = slots[part.slot].conv, part.position, part.position + part.rows
            buffer = conv.get(layer)
            if buffer is None or len(buffer) < end:
                grown = np.zeros((max(2 * position, end), inputs_TX.shape[1]), dtype=np.float32)
                if buffer is not None:
                    grown[: min(position, len(buffer))] = buffer[:position]
                conv[layer] = buffer = grown
            buffer[position:end] = inputs_TX


_PROJECTIONS = ("key_proj.weight", "value_proj.weight")


def _fits_halves(array: NDArray[np.floating[Any]]) -> bool:
    return bool(np.abs(array).max(initial=0) <= np.finfo(np.float16).max)


def _rounded(array: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    return array.astype(np.float16)


def _in_large_pages(
    dense: Mapping[int, Mapping[str, NDArray[np.floating[Any]]]],
) -> dict[int, dict[str, NDArray[np.floating[Any]]]]:
    """Weights copied one after another, each on a cache line, in memory whose pages the system may make large.

    A processor fetches ahead within a page: 30 GB/s from pages of 2 MiB against 24 from those of 4 KiB.
    """
    line = 64
    room = sum(-(-array.nbytes // line) * line for arrays in dense.values() for array in arrays.values())
    memory = mmap.mmap(-1, max(room, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    made: dict[int, dict[str, NDArray[np.floating[Any]]]] = {}
    place = 0
    for layer, arrays in dense.items():
        made[layer] = {}
        for name, array in arrays.items():
            copy = np.frombuffer(memory, array.dtype, array.size, place).reshape(array.shape)
            copy[...] = array
            made[layer][name] = copy
            place += -(-array.nbytes // line) * line
    return made
