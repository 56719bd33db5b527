"""Prefill, decode and state over a torch backbone: a `Model` is what was loaded, a `Session` one timeline of tokens.

Shape letters: B batch, T positions of this call, C columns, E memory width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram import EngramError
from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.engram import GateConfig
from engram.builders.model import EngramModel, Timeline, load_gate_weights
from engram.builders.process_memory import available_bytes, forget_cached, is_mapped
from engram.builders.tokenizer import load_tokenizer, special_tokens
from engram.quantize.package import Package, open_package
from engram.runtime import hot_rows
from engram.runtime.reader import RowReader, Ticket

PREFILL_CHUNK = 512  # positions of one prefill step; rows of the next step are asked for while this one computes


class EngineError(EngramError):
    """Something that cannot be run: a prompt that is empty or too long, a placement that does not fit."""


class LateMemory(Mapping[int, Tensor]):
    """Rows that were asked for, waited for as late as possible: when their layer is reached."""

    def __init__(self, reader: RowReader, ticket: Ticket, layers: tuple[int, ...]) -> None:
        self._reader, self._ticket, self._layers = reader, ticket, layers

    def __getitem__(self, layer: int) -> Tensor:
        return torch.from_numpy(self._reader.take(self._ticket, layer))

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Model:
    """A package, opened: backbone, gates, tokenizer and row reader. Immutable; any number of sessions share it."""

    def __init__(self, package: Package, reader: RowReader, dtype: str | None = None) -> None:
        self.package = package
        self.reader = reader
        self.layout = package.layout
        ref = BackboneRef.from_json(package.manifest["backbone"])
        if ref.kind != "embedded":  # what is outside the package may have changed since
            ref.verify(package.folder)
        gates = {int(n): GateConfig.from_json(config) for n, config in package.manifest["gate"].items()}
        self.engram = EngramModel(load_backbone(ref, package.folder, dtype), self.layout, gates).eval()
        load_gate_weights(self.engram, package.dense())
        self.engram.requires_grad_(False)
        if reader.placement == "disk":
            self._leave_the_cache_to_tables(ref)
        self.tokenizer = load_tokenizer(package.folder)
        self.special = special_tokens(package.folder)

    def _leave_the_cache_to_tables(self, ref: BackboneRef) -> None:
        """Where weights and tables do not fit in memory together, cached pages of weights that were copied go."""
        weights = [path for path in ref.files(self.package.folder).values() if path.is_file()]
        room = available_bytes()
        if room is not None and self.reader.table_bytes + sum(path.stat().st_size for path in weights) > room:
            for path in weights:
                if not is_mapped(path):  # transformers maps weights whose type it need not change: they are in use
                    forget_cached(path)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        offload: str = "disk",
        cache_bytes: int | None = None,
        dtype: str | None = None,
        verify: str = "first-touch",
        table_io: str = "auto",
    ) -> Model:
        """Open a package with its tables in the given placement (none | ram | disk).

        `verify` and `table_io` are RowTable.open's. On disk, hot rows are used if the tables are cold.
        Raises PackageError where the package is damaged or `table_io` cannot be had here, ReaderError where the
        placement does not fit, EngineError for a `table_io` with tables that lie in memory, HotRowsError where the hot
        rows are another table's.
        """
        check_table_io(table_io, offload)
        package = open_package(folder, verify=verify, io=table_io)
        try:
            most = None if cache_bytes is None else cache_bytes // 2
            hot = hot_rows.for_reader(package, most) if offload == "disk" else None
            return cls(package, RowReader(package, offload, cache_bytes=cache_bytes, hot=hot), dtype)
        except BaseException:
            package.close()
            raise

    engine = "torch"

    @property
    def context(self) -> int:
        """Positions that the backbone was made for."""
        return int(getattr(self.engram.backbone.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        found: set[int] = set()
        generation = getattr(self.engram.backbone, "generation_config", None)
        for ids in (self.special.get("eos_ids"), getattr(generation, "eos_token_id", None)):
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(found)

    def begin(self) -> list[int]:
        """What a text begins with: the tokenizer's bos where it asks for one."""
        return [int(self.special["bos_id"])] if self.special.get("add_bos") else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def memory(self, rows: Mapping[int, NDArray[np.int64]]) -> LateMemory:
        """Ask for the rows of some positions (by layer, [B, T, C]) and return at once."""
        return LateMemory(self.reader, self.reader.ask(dict(rows)), self.layout.layers)

    def session(self) -> Session:
        """A new timeline."""
        return Session(self)

    def close(self) -> None:
        """Let go of the mapped tables."""
        self.reader.close()


class Session:
    """One mutable timeline of tokens: its key-value cache, look-back and convolution state."""

    def __init__(self, model: Model, line: Timeline | None = None) -> None:
        self.model = model
        self.line = model.engram.timeline() if line is None else line
        self._asked: tuple[list[int], int, LateMemory] | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        found: list[int] = self.line.ids_BS[0].tolist()
        return found

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.line.length

    def ask(self, ids: list[int]) -> None:
        """Ask for the rows of tokens that will be fed next: call it the moment they are known."""
        rows = self.line.rows(np.array([ids], dtype=np.int64))
        self._asked = (ids, self.line.length, self.model.memory(rows))

    def feed(self, ids: list[int]) -> Tensor:
        """Feed tokens (prefill or decode, in chunks) and return the logits after the last: float32 [vocabulary].

        Raises EngineError for no tokens or more than the backbone's context holds.
        """
        if not ids:
            raise EngineError("there are no tokens to feed", hint="the prompt is empty")
        if self.line.length + len(ids) > self.model.context:
            raise EngineError(
                f"{self.line.length + len(ids)} tokens exceed the backbone's context of {self.model.context}",
                hint="shorten the prompt or lower --max-tokens",
            )
        chunks = [ids[i : i + PREFILL_CHUNK] for i in range(0, len(ids), PREFILL_CHUNK)]
        before = self.line.lookback()
        asked: LateMemory | None = None
        if self._asked is not None and self._asked[:2] == (chunks[0], self.line.length):
            asked = self._asked[2]
        self._asked = None
        for place, chunk in enumerate(chunks):
            part = np.array([chunk], dtype=np.int64)
            memory = asked or self.model.memory(self.model.layout.rows(part, before))
            before = self.model.layout.history(part, before)
            asked = None
            if place + 1 < len(chunks):
                coming = np.array([chunks[place + 1]], dtype=np.int64)
                asked = self.model.memory(self.model.layout.rows(coming, before))
            with torch.inference_mode():
                logits: Tensor = self.model.engram(torch.from_numpy(part), memory, timeline=self.line, last_only=True)
        return logits[0, -1].float()

    def reuse(self, ids: list[int]) -> list[int]:
        """Roll back to the longest prefix shared with `ids` (at least one token is left to feed); returns the rest."""
        have = self.ids
        shared = 0
        while shared < min(len(have), len(ids) - 1) and have[shared] == ids[shared]:
            shared += 1
        if shared < self.line.length and not self.line.croppable:  # a recurrent state cannot be rolled back
            self.line, shared = self.model.engram.timeline(), 0
        self.line.crop(shared)
        return ids[shared:]

    def fork(self) -> Session:
        """An independent continuation of the same prefix."""
        return Session(self.model, self.line.fork())


def check_table_io(table_io: str, offload: str) -> None:
    """EngineError for a way to read rows from the disk where none are."""
    if table_io != "auto" and offload != "disk":
        raise EngineError(
            f"table_io {table_io!r} says how rows are read from the disk, with offload {offload!r} none are",
            hint="leave --table-io out, or use --offload disk",
        )


def probabilities(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Sampling distribution [V]: softmax at a temperature, cut to the smallest set of tokens that holds `top_p`."""
    values = torch.softmax(logits_V / temperature, dim=-1)
    if top_p >= 1.0:
        return values
    ordered, place = values.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p  # the first token always stays
    cut = torch.zeros_like(values)
    cut[place[kept]] = ordered[kept]
    return cut / cut.sum()
