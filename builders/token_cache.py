"""A corpus as token ids on disk: tokenized once, read by statistics, fills, training and evaluation.

Folder of one cache, all files little-endian .npy (no pickle):
    shard-00000.tokens.npy     int32 [tokens]: the documents of the shard, one after another, no separators
    shard-00000.documents.npy  DOCUMENT [documents]: tokens, hash of the text (BLAKE2b, 8 bytes), UTF-8 bytes
    shard-00000.json           written last: the shard is finished; a build that was cut off goes on after it
    cache.json                 written at the very end: totals, sources, tokenizer
A document never spans two shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engram import EngramError, Progress, Task
from engram.builders import corpus as corpora
from engram.builders.atomic import write_whole
from engram.builders.corpus import CorpusConfig, Document, Tally
from engram.builders.fetch import cache_folder
from engram.builders.tokenizer import parse_tokenizer, tokenizer_bytes

FORMAT, VERSION = "engram-token-cache", 1
BATCH_BYTES = 4 << 20  # text that is tokenized at once, on all cores
SHARD_TOKENS = 4 << 20
DOCUMENT = np.dtype([("tokens", "<i8"), ("hash", "<u8"), ("bytes", "<i8")])


class TokenCacheError(EngramError):
    """A token cache that is incomplete, altered, or too small for what is asked of it."""


@dataclass(frozen=True)
class TokenCache:
    """A finished cache: `tokens` ids, `documents`, `bytes` of UTF-8 text. Documents are numbered in corpus order."""

    folder: Path
    tokens: int
    documents: int
    bytes: int
    left_out: int = 0
    undecodable: int = 0
    temporary: bool = False

    @classmethod
    def build(
        cls,
        corpus: CorpusConfig,
        tokenizer_path: str | Path,
        progress: Progress = Progress(),
        folder: Path | None = None,
        max_tokens: int | None = None,
    ) -> TokenCache:
        """The cache of this corpus with this tokenizer: opened if it is there, else built, or its building resumed.

        `folder` is where caches are kept (default: tokens/ in the cache folder); the cache's own name in it is a hash
        of everything that decides its content. Special tokens are not added; special tokens spelt out in the text are
        recognised. With `max_tokens` the corpus ends with the document that reaches that many tokens. Standard input
        can be read once only, so its cache is temporary: not found again, not resumable, removed by `discard`.
        Raises CorpusError, TokenizerError and TokenCacheError.
        """
        root = cache_folder() / "tokens" if folder is None else folder
        content = tokenizer_bytes(tokenizer_path)
        key = _key(corpus, hashlib.sha256(content).hexdigest(), max_tokens)
        root.mkdir(parents=True, exist_ok=True)
        temporary = corpora.STDIN in corpus.sources
        if temporary:
            progress.say("standard input can be read only once: an interrupted build starts anew")
            here = Path(tempfile.mkdtemp(prefix="stdin-", dir=root))
        else:
            here = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
            here.mkdir(exist_ok=True)
        with _alone(here, progress):
            if not (here / "cache.json").is_file():
                try:
                    tokenizer = parse_tokenizer(content, Path(tokenizer_path))
                    _Builder(here, corpus, tokenizer, progress, max_tokens).run(key)
                except BaseException:
                    if temporary:
                        shutil.rmtree(here, ignore_errors=True)
                    raise
        return cls.open(here, temporary=temporary)

    @classmethod
    def open(cls, folder: Path, *, temporary: bool = False) -> TokenCache:
        """A finished cache by its folder; TokenCacheError where it is unfinished or its files have other sizes."""
        try:
            data = json.loads((folder / "cache.json").read_bytes())
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise TokenCacheError(f"{folder / 'cache.json'} is {data['format']!r} version {data['version']!r}")
            names = ("tokens", "documents", "bytes", "left_out", "undecodable")
            counts = {name: int(data[name]) for name in names}
            cache = cls(folder, **counts, temporary=temporary)
            wanted = data["shards"]
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            raise TokenCacheError(f"{folder} is no finished token cache: {wrong}", hint="remove the folder") from None
        if len(cache._finished) != wanted or len(cache.shards()) != wanted:
            raise TokenCacheError(f"{folder} lost some of its {wanted} shards", hint="remove the folder")
        for number, shard in enumerate(cache._finished):
            for kind in ("tokens", "documents"):
                path = _shard(folder, number, f"{kind}.npy")
                if _open_array(path).shape != (shard[kind],):
                    raise TokenCacheError(f"{path} does not hold {shard[kind]} {kind}", hint="remove the folder")
        return cache

    def discard(self) -> None:
        """Remove a temporary cache (of standard input); any other stays."""
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def shards(self) -> list[Path]:
        """The token files, in order: int32 .npy, one axis."""
        return sorted(self.folder.glob("shard-*.tokens.npy"))

    def shard_documents(self, shard: int) -> NDArray[np.int64]:
        """Tokens of every document of one shard, int64 [documents of the shard]."""
        return np.ascontiguousarray(_open_array(_shard(self.folder, shard, "documents.npy"))["tokens"])

    def document(self, i: int) -> NDArray[np.int32]:
        """Token ids of document `i`, int32 [n], mapped from disk."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        shard = int(np.searchsorted(self._document_starts, i, side="right")) - 1
        start = int(self._starts[i] - self._token_starts[shard])
        tokens: NDArray[np.int32] = self._maps[shard][start : start + int(self._table["tokens"][i])]
        return tokens

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, int64 [documents]."""
        return np.ascontiguousarray(self._table["tokens"])

    def hashes(self) -> NDArray[np.uint64]:
        """BLAKE2b (8 bytes, little-endian) of every document's UTF-8 text, uint64 [documents]."""
        return np.ascontiguousarray(self._table["hash"])

    def byte_counts(self) -> NDArray[np.int64]:
        """UTF-8 bytes of every document's text, int64 [documents]."""
        return np.ascontiguousarray(self._table["bytes"])

    def split(self, held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Document numbers (train, held out), each ascending; a document is held out where its hash is below it.

        Equal texts land on one side, and a document keeps its side when the corpus grows. Where chance leaves a side
        empty, the text with the lowest (highest) hash moves. Raises TokenCacheError where two different texts are
        needed and there is one, or for a share outside 0 … 1.
        """
        if not 0 <= held_out < 1:
            raise TokenCacheError(f"held-out share {held_out} must lie in 0 … 1 (1 excluded)")
        hashes = self.hashes()
        out = hashes.astype(np.float64) / 2.0**64 < held_out
        if held_out > 0 and hashes.min() == hashes.max():
            raise TokenCacheError(
                f"a held-out share of {held_out} needs two different documents, the corpus has one",
                hint="give a corpus of several files or lines, or held_out=0",
            )
        if held_out > 0 and not out.any():
            out = hashes == hashes.min()
        if out.all():
            out = hashes != hashes.max()
        return np.flatnonzero(~out), np.flatnonzero(out)

    @cached_property
    def _finished(self) -> list[dict[str, int]]:
        return finished(self.folder)

    @cached_property
    def _table(self) -> NDArray[Any]:
        names = [_shard(self.folder, number, "documents.npy") for number in range(len(self._finished))]
        return np.concatenate([np.empty(0, DOCUMENT), *(_open_array(name) for name in names)])

    @cached_property
    def _maps(self) -> list[NDArray[np.int32]]:
        return [_open_array(path) for path in self.shards()]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._table["tokens"])])

    @cached_property
    def _document_starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard["documents"] for shard in self._finished)], dtype=np.int64)

    @cached_property
    def _token_starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard["tokens"] for shard in self._finished)], dtype=np.int64)


@dataclass
class _Builder:
    """Writes shard after shard; what a shard holds depends on the documents alone, so a resumed build is identical."""

    folder: Path
    corpus: CorpusConfig
    tokenizer: tokenizers.Tokenizer
    progress: Progress
    max_tokens: int | None

    def run(self, key: dict[str, Any]) -> None:
        tally = Tally()
        done = finished(self.folder)
        documents = corpora.documents(self.corpus, self.progress, tally)
        if done:
            skipped = sum(shard["documents"] for shard in done)
            self.progress.say(f"tokens: resuming after {skipped} documents in {len(done)} shards")
            next(itertools.islice(documents, skipped - 1, skipped), None)
        with self.progress.task("tokenize", self.corpus_bytes(), "B") as task:
            task.advance(sum(shard["bytes"] for shard in done))
            batches = _ahead(_batches(documents), self.encode)
            while not self.enough(done) and (shard := self.shard(batches, sum(s["tokens"] for s in done), task)):
                done.append(self.write(len(done), *shard))
            batches.close()
        documents.close()
        totals = {name: sum(shard[name] for shard in done) for name in ("tokens", "documents", "bytes")}
        end = {"format": FORMAT, "version": VERSION, "shards": len(done), **totals, **_named(tally), "key": key}
        write_whole(self.folder / "cache.json", (json.dumps(end, indent=1) + "\n").encode())

    def corpus_bytes(self) -> float | None:
        names = corpora.files(self.corpus)
        plain = all(name.endswith((".txt", ".md", ".jsonl", *self.corpus.suffixes)) for name in names)
        return float(sum(os.path.getsize(name) for name in names)) if plain and self.max_tokens is None else None

    def enough(self, done: list[dict[str, int]]) -> bool:
        return self.max_tokens is not None and sum(shard["tokens"] for shard in done) >= self.max_tokens

    def encode(self, batch: Batch) -> list[tokenizers.Encoding]:
        """All documents of a batch, on all cores (the library's own threads), without the offsets nobody reads."""
        return self.tokenizer.encode_batch_fast(batch.texts, add_special_tokens=False)

    def shard(
        self, batches: Iterator[tuple[Batch, list[tokenizers.Encoding]]], before: int, task: Task
    ) -> tuple[NDArray[np.int32], NDArray[Any]] | None:
        """Batches until the shard is full: (int32 [tokens], DOCUMENT [documents]); None where none is left."""
        pieces: list[NDArray[np.int32]] = []
        rows: list[tuple[int, int, int]] = []
        total = 0
        for batch, encodings in batches:
            for encoding, size, digest in zip(encodings, batch.sizes, batch.hashes, strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                pieces.append(ids)
                rows.append((len(ids), digest, size))
                total += len(ids)
                if self.max_tokens is not None and before + total >= self.max_tokens:
                    return np.concatenate(pieces), np.array(rows, dtype=DOCUMENT)
            task.advance(sum(batch.sizes))
            if total >= SHARD_TOKENS:
                break
        return (np.concatenate(pieces), np.array(rows, dtype=DOCUMENT)) if rows else None

    def write(self, number: int, tokens: NDArray[np.int32], table: NDArray[Any]) -> dict[str, int]:
        for array, kind in ((tokens, "tokens.npy"), (table, "documents.npy")):
            sink = io.BytesIO()
            np.save(sink, array, allow_pickle=False)
            write_whole(_shard(self.folder, number, kind), sink.getbuffer())
        totals = {"tokens": len(tokens), "documents": len(table), "bytes": int(table["bytes"].sum())}
        write_whole(_shard(self.folder, number, "json"), json.dumps(totals).encode())
        return totals


def finished(folder: Path) -> list[dict[str, int]]:
    """Counts of the finished shards from 0 on; what lies behind a gap is written again."""
    done: list[dict[str, int]] = []
    while True:
        try:
            shard = json.loads(_shard(folder, len(done), "json").read_bytes())
            done.append({name: int(shard[name]) for name in ("tokens", "documents", "bytes")})
        except (OSError, ValueError, KeyError, TypeError):
            return done


@dataclass
class Batch:
    """Documents that are tokenized together: texts, their UTF-8 sizes in bytes, their hashes."""

    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)


def _batches(documents: Iterator[Document]) -> Iterator[Batch]:
    """Batches of BATCH_BYTES, or of one longer document."""
    batch, filled = Batch(), 0
    for document in documents:
        data = document.text.encode()
        batch.texts.append(document.text)
        batch.sizes.append(len(data))
        batch.hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
        filled += len(data)
        if filled >= BATCH_BYTES:
            yield batch
            batch, filled = Batch(), 0
    if batch.texts:
        yield batch


def _ahead(
    batches: Iterator[Batch], encode: Callable[[Batch], list[tokenizers.Encoding]]
) -> Generator[tuple[Batch, list[tokenizers.Encoding]], None, None]:
    """Each batch with its encodings; while the caller uses one, the next is read and encoded."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        waiting: tuple[Batch, Future[list[tokenizers.Encoding]]] | None = None
        for batch in batches:
            following = batch, pool.submit(encode, batch)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _key(corpus: CorpusConfig, tokenizer_sha256: str, max_tokens: int | None) -> dict[str, Any]:
    """Everything that decides a cache's content; files count by path, size and time of change."""
    sources = []
    for name in corpora.files(corpus):
        if name != corpora.STDIN:
            stat = os.stat(name)
            sources.append([os.path.abspath(name), stat.st_size, stat.st_mtime_ns])
    options = {name: value for name, value in asdict(corpus).items() if name in ("field", "column", "strict")}
    sizes = {"batch_bytes": BATCH_BYTES, "shard_tokens": SHARD_TOKENS, "piece_bytes": corpora.PIECE_BYTES}
    return {
        "version": VERSION, "sources": sources, **options, **sizes, "max_tokens": max_tokens,
        "tokenizer_sha256": tokenizer_sha256, "tokenizers": tokenizers.__version__,
    }  # fmt: skip


@contextlib.contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time build a cache; the lock dies with its process."""
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("tokens: another process builds this cache; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _shard(folder: Path, number: int, kind: str) -> Path:
    return folder / f"shard-{number:05d}.{kind}"


def _named(tally: Tally) -> dict[str, int]:
    return {"left_out": tally.malformed, "undecodable": tally.undecodable}


def _open_array(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as wrong:
        raise TokenCacheError(f"{path} cannot be read: {wrong}", hint="remove its folder") from None
    return array
