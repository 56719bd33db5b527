"""A GGUF in llama.cpp: loaded, decoded batch by batch, its logits copied; nothing here knows of a memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engram.runtime.llama_hook import Filter, LlamaError, library


class Part(NamedTuple):
    """Consecutive rows of a batch that continue one slot: those from `first` on, at `position` of its timeline."""

    slot: int
    first: int
    rows: int
    position: int


class LlamaBackbone:
    """A model, and from `start` on a context for some timelines."""

    def __init__(self, path: Path, *, lazy: bool = False) -> None:
        """`lazy`: tables that the architecture marks are read row by row. LlamaError for what cannot be loaded."""
        self._c = library()
        options = self._c.llama_model_default_params()
        options.n_gpu_layers = 0
        if lazy:
            options.lazy_mode = self._c.LLAMA_LAZY_MODE_ON
        self.model = self._c.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise LlamaError(f"llama.cpp cannot load {path}", hint="is it whole, of an architecture that it knows?")
        self.blocks = int(self._c.llama_model_n_layer(self.model))
        self.width = int(self._c.llama_model_n_embd(self.model))
        self.vocab_size = int(self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self.model)))
        self.trained_context = int(self._c.llama_model_n_ctx_train(self.model))
        self.recurrent = any(getattr(self._c, f"llama_model_is_{k}")(self.model) for k in ("recurrent", "hybrid"))
        self._context = self._batch = None
        self._kept: list[tuple[Tensor, int]] = []  # logits of a step's feeds, and their address

    @property
    def bits(self) -> float:
        """Bits a weight, in the mean."""
        return 8 * float(self._c.llama_model_size(self.model)) / float(self._c.llama_model_n_params(self.model))

    def start(
        self, *, positions: int, count: int, batch: int, micro_batch: int, threads: int | None,
        wanted: Filter | None = None,
    ) -> None:  # fmt: skip
        """Make the context: `count` timelines of so many positions. `threads`: None takes every processor."""
        options = self._c.llama_context_default_params()
        options.n_ctx, options.n_seq_max = positions * count, count
        options.n_batch, options.n_ubatch = batch, min(micro_batch, batch)
        options.kv_unified, options.swa_full, options.no_perf = True, True, True
        options.n_threads = options.n_threads_batch = threads or processors()
        if wanted is not None:
            options.cb_eval, options.cb_eval_user_data = wanted.callback, wanted.user_data
        self._context = self._c.llama_init_from_model(self.model, options)
        if not self._context:
            raise LlamaError(f"llama.cpp makes no context of {options.n_ctx} positions", hint="ask for fewer")
        self._batch = self._c.llama_batch_init(batch, 0, 1)

    def fill(self, ids: Sequence[int], parts: Sequence[Part], outputs: Sequence[int]) -> None:
        """Write the batch that `decode` reads; logits of the rows `outputs` are wanted."""
        batch = self._batch
        assert batch is not None
        batch.n_tokens = len(ids)
        token, pos, seq_id, n_seq_id, logits = batch.token, batch.pos, batch.seq_id, batch.n_seq_id, batch.logits
        for slot, first, rows, position in parts:
            for i in range(rows):
                place = first + i
                token[place], pos[place], n_seq_id[place], logits[place] = ids[place], position + i, 1, 0
                seq_id[place][0] = slot
        for place in outputs:
            logits[place] = 1

    def decode(self) -> int:
        """Run the batch; llama.cpp's code, 0 where all is well."""
        return int(self._c.llama_decode(self._context, self._batch))

    def keep_logits(self, row: int, place: int) -> None:
        """Copy the logits of a row of the batch: llama.cpp's own memory holds those of its last decode only."""
        found = self._c.llama_get_logits_ith(self._context, row)
        if not found:
            raise LlamaError(f"llama.cpp has no logits of row {row}")
        while len(self._kept) <= place:
            made = torch.empty(self.vocab_size)
            self._kept.append((made, made.data_ptr()))
        ctypes.memmove(self._kept[place][1], found, 4 * self.vocab_size)

    def kept(self, count: int) -> list[Tensor]:
        """Logits by place; they hold until the next `keep_logits`."""
        return [self._kept[place][0] for place in range(count)]

    def cut(self, slot: int, length: int) -> bool:
        """Forget a timeline's positions from `length` on; False where llama.cpp cannot."""
        return bool(self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), slot, length, -1))

    def close(self) -> None:
        """Free everything."""
        if self._batch is not None:
            self._c.llama_batch_free(self._batch)
        if self._context:
            self._c.llama_free(self._context)
        if self.model:
            self._c.llama_model_free(self.model)
        self._batch = self._context = self.model = None


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
