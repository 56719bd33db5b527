"""A GGUF that holds a memory of its own, of an architecture that llama.cpp runs itself: its rows are read on demand.

Such models carry a recurrent state, which cannot be rolled back: a timeline either goes on or begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from engram.builders.gguf_header import read_metadata, read_places
from engram.builders.tokenizer import load_tokenizer, special_tokens
from engram.runtime.llama_backbone import LlamaBackbone, Part
from engram.runtime.llama_hook import LlamaError, library_version
from engram.runtime.slots import Feed, OneSlot, Watch, Words

ARCHITECTURES = ("qwen4exp",)  # general.architecture of models whose memory llama.cpp computes
TABLE = "per_layer_token_embd.weight"
BATCH = 512  # tokens of one llama_decode


class OwnTable:
    """The table inside the GGUF, which llama.cpp reads: its size is known, what was read of it is not."""

    row_io = "llama.cpp, lazily"

    def __init__(self, path: Path) -> None:
        _, tensors = read_places(path)
        if TABLE not in tensors:
            raise LlamaError(f"{path} holds no table {TABLE}", hint="write one: engram export --format gguf --backbone")
        self.table_bytes = tensors[TABLE][3]

    def counters(self) -> dict[str, int]:
        """Of rows that llama.cpp reads nothing is counted."""
        return dict.fromkeys(("rows_asked", "rows_read", "rows_hot", "bytes_read", "pages_read"), 0)

    def resident_bytes(self) -> None:
        """Not known."""


class NativeSlots(Words):
    """One timeline over such a model. One thread at a time may call it."""

    def __init__(
        self, path: Path, *, count: int = 1, context: int = 4096, threads: int | None = None, lazy: bool = True
    ) -> None:
        """Raises LlamaError for a model without a memory that llama.cpp computes, and for more than one timeline."""
        kind = read_metadata(path).get("general.architecture")
        if kind not in ARCHITECTURES:
            raise LlamaError(
                f"{path} is a {kind} model: llama.cpp computes a memory of its own for {', '.join(ARCHITECTURES)} only",
                hint="put a memory beside it: engram export CHECKPOINT --out PKG --backbone FILE.gguf",
            )
        if count != 1:
            raise LlamaError(f"{count} timelines over a {kind} model, whose state cannot be shared", hint="use one")
        self.reader, self.count = OwnTable(path), 1
        self.tokenizer, self.special = load_tokenizer(path), special_tokens(path)
        self.watch: Watch | None = None  # the gates are llama.cpp's: nobody is told
        self._backbone, self._lazy = LlamaBackbone(path, lazy=lazy), lazy
        self.context = min(context, self._backbone.trained_context)
        self._backbone.start(positions=self.context, count=1, batch=BATCH, micro_batch=BATCH, threads=threads)
        self._ids: list[int] = []

    @property
    def engine(self) -> str:
        """Which library computes, its release, and how it reads rows."""
        how = "read lazily" if self._lazy else "read whole"
        return f"llama.cpp (llama-cpp-python {library_version()}), its own memory, {how}"

    def session(self) -> OneSlot:
        """The timeline, as generation sees it."""
        return OneSlot(self)

    def length(self, slot: int) -> int:
        return len(self._ids)

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        """The rest of `ids` where they go on from here; all of them, from the beginning, where they do not."""
        if len(self._ids) < len(ids) and ids[: len(self._ids)] == self._ids:
            return ids[len(self._ids) :]
        if not self._backbone.cut(0, 0):
            raise LlamaError("llama.cpp cannot begin a timeline anew")
        self._ids = []
        return ids

    def ask(self, feeds: Sequence[Feed]) -> None:
        """llama.cpp asks for its rows itself."""

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        ((slot, ids),) = feeds
        if slot or not ids:
            raise LlamaError(f"slot {slot} of 1 was fed {len(ids)} tokens")
        if len(self._ids) + len(ids) > self.context:
            raise LlamaError(f"{len(self._ids) + len(ids)} tokens exceed the context of {self.context}",
                             hint="shorten the prompt or lower --max-tokens")  # fmt: skip
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            self._backbone.fill(part, [Part(0, 0, len(part), len(self._ids))], [len(part) - 1])
            if code := self._backbone.decode():
                self._backbone.cut(0, 0)
                self._ids = []
                raise LlamaError(f"llama_decode of {len(part)} tokens ended with {code}", hint="is its memory full?")
            self._ids += part
        self._backbone.keep_logits(len(part) - 1, 0)
        return self._backbone.kept(1)

    def counters(self) -> dict[str, int]:
        return self.reader.counters()

    def close(self) -> None:
        """Free the model."""
        self._backbone.close()
