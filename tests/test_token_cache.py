"""The token cache: the same tokens as the tokenizer, and the same bytes after an interruption."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from tokenizers import Tokenizer

from engram import Progress
from engram.builders import token_cache
from engram.builders.corpus import CorpusConfig, CorpusError
from engram.builders.token_cache import TokenCache, TokenCacheError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 2000)
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 3000)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return texts.write_tokenizer(tmp_path / "tokenizer")


def build(tmp_path: Path, tokenizer: Path, **options: Any) -> TokenCache:
    return TokenCache.build(CorpusConfig((str(tmp_path / "a.jsonl"),)), tokenizer, folder=tmp_path / "cache", **options)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "lock"
    }


def test_documents_lengths_hashes_and_bytes_are_those_of_the_corpus(tmp_path: Path, tokenizer: Path) -> None:
    corpus = texts.write_corpus(tmp_path / "a.jsonl", 120)
    cache = build(tmp_path, tokenizer)
    encoder = Tokenizer.from_file(str(tokenizer))
    assert len(cache.shards()) > 2 and cache.documents == 120
    for i, text in enumerate(corpus):
        assert cache.document(i).tolist() == encoder.encode(text, add_special_tokens=False).ids
    assert cache.document(0).dtype == np.int32
    assert cache.lengths().tolist() == [len(cache.document(i)) for i in range(120)]
    assert cache.tokens == cache.lengths().sum() == sum(len(np.load(path)) for path in cache.shards())
    assert cache.byte_counts().tolist() == [len(text.encode()) for text in corpus]
    assert cache.bytes == cache.byte_counts().sum()
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in corpus]
    assert cache.hashes().tolist() == [int.from_bytes(digest, "little") for digest in digests]
    by_shard = [cache.shard_documents(i).tolist() for i in range(len(cache.shards()))]
    assert sum(by_shard, []) == cache.lengths().tolist()
    with pytest.raises(IndexError):
        cache.document(120)


def test_a_finished_cache_is_opened_not_built(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 20)
    first = build(tmp_path, tokenizer)
    monkeypatch.setattr(token_cache._Builder, "run", None)
    assert build(tmp_path, tokenizer) == first


def test_whatever_decides_the_tokens_decides_the_folder(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 20)
    folders = [build(tmp_path, tokenizer).folder, build(tmp_path, tokenizer, max_tokens=100).folder]
    folders.append(build(tmp_path, texts.write_tokenizer(tmp_path / "other", size=300)).folder)
    texts.write_corpus(tmp_path / "a.jsonl", 21)
    folders.append(build(tmp_path, tokenizer).folder)
    assert len(set(folders)) == 4


def test_max_tokens_ends_with_the_document_that_reaches_them(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 120)
    whole, part = build(tmp_path, tokenizer), build(tmp_path, tokenizer, max_tokens=5000)
    assert part.tokens >= 5000 > part.tokens - part.lengths()[-1]
    assert part.lengths().tolist() == whole.lengths()[: part.documents].tolist()


SLOW_BUILD = """
import sys, time
from pathlib import Path
from engram.builders import token_cache
from engram.builders.corpus import CorpusConfig
token_cache.BATCH_BYTES, token_cache.SHARD_TOKENS = 2000, 3000
write = token_cache._Builder.write
def slow(self, number, tokens, table):
    done = write(self, number, tokens, table)
    print(number, flush=True)
    time.sleep(60 if number == 2 else 0)
    return done
token_cache._Builder.write = slow
token_cache.TokenCache.build(CorpusConfig((sys.argv[1],)), sys.argv[2], folder=Path(sys.argv[3]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_was_cut_off_goes_on_and_ends_in_the_same_bytes(
    how: signal.Signals, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 200)
    whole = build(tmp_path, tokenizer)
    resumed = tmp_path / "resumed"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [str(tmp_path / "a.jsonl"), str(tokenizer), str(resumed)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, *arguments], env=environment, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    process.send_signal(how)
    assert process.wait(timeout=60) != 0
    process.stdout.close()

    folder = resumed / whole.folder.name
    assert not (folder / "cache.json").exists()
    written: list[int] = []
    write = token_cache._Builder.write

    def noting(self: Any, number: int, *rest: Any) -> dict[str, int]:
        written.append(number)
        return write(self, number, *rest)

    monkeypatch.setattr(token_cache._Builder, "write", noting)
    again = TokenCache.build(CorpusConfig((str(tmp_path / "a.jsonl"),)), tokenizer, folder=resumed)
    assert written[0] == 3 and again.documents == 200
    assert contents(folder) == contents(whole.folder)


def test_two_builders_of_one_cache_take_turns(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 150)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    code = SLOW_BUILD.replace("60 if number == 2", "2 if number == 0")
    arguments = [str(tmp_path / "a.jsonl"), str(tokenizer), str(tmp_path / "cache")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "0"
    said: list[str] = []

    class Notes(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    began = time.monotonic()
    cache = build(tmp_path, tokenizer, progress=Notes())
    assert time.monotonic() - began > 0.5 and "another process" in said[0]
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and cache.documents == 150


def test_standard_input_is_kept_only_for_the_run(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the river\n" * 50)))
    cache = TokenCache.build(CorpusConfig(("-",)), tokenizer, folder=tmp_path / "cache")
    assert cache.temporary and cache.documents == 1 and cache.tokens > 50
    cache.discard()
    assert not cache.folder.exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(CorpusError, match="holds no text"):
        TokenCache.build(CorpusConfig(("-",)), tokenizer, folder=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_kept_cache_survives_discard(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 3)
    cache = build(tmp_path, tokenizer)
    cache.discard()
    assert TokenCache.open(cache.folder) == cache


def test_the_split_is_by_text_and_stable(tmp_path: Path, tokenizer: Path) -> None:
    corpus = texts.write_corpus(tmp_path / "a.jsonl", 300, words=5)
    cache = build(tmp_path, tokenizer)
    train, held_out = cache.split(0.2)
    assert sorted([*train, *held_out]) == list(range(300))
    assert {corpus[i] for i in train}.isdisjoint(corpus[i] for i in held_out)
    assert 30 < len(held_out) < 90
    assert (cache.hashes()[held_out] < 0.2 * 2**64).all() and (cache.hashes()[train] >= 0.2 * 2**64).all()
    none, nothing = cache.split(0.0)
    assert len(none) == 300 and len(nothing) == 0
    fewer, _ = cache.split(0.1)
    assert set(train) <= set(fewer)


def test_neither_side_of_the_split_is_empty(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 2)
    cache = build(tmp_path, tokenizer)
    for share in (1e-12, 0.999999):
        assert [len(side) for side in cache.split(share)] == [1, 1]


def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 1)
    with pytest.raises(TokenCacheError, match="needs two different documents"):
        build(tmp_path, tokenizer).split(0.1)
    with pytest.raises(TokenCacheError, match=r"held-out share 1\.5 must lie in"):
        build(tmp_path, tokenizer).split(1.5)


def test_a_damaged_cache_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 120)
    cache = build(tmp_path, tokenizer)
    shard = cache.shards()[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(TokenCacheError, match="cannot be read"):
        TokenCache.open(cache.folder)
    np.save(shard, np.zeros(7, dtype=np.int32))
    with pytest.raises(TokenCacheError, match="does not hold"):
        TokenCache.open(cache.folder)
    shard.unlink()
    with pytest.raises(TokenCacheError, match="lost some of its"):
        TokenCache.open(cache.folder)
    shard.write_bytes(whole)
    assert TokenCache.open(cache.folder) == cache
    (cache.folder / "shard-00001.json").write_text("[]")
    with pytest.raises(TokenCacheError, match="lost some of its"):
        TokenCache.open(cache.folder)
    (cache.folder / "cache.json").write_text("{}")
    with pytest.raises(TokenCacheError, match="is no finished token cache"):
        TokenCache.open(cache.folder)
    (cache.folder / "cache.json").write_text('{"format": "engram-token-cache", "version": 99}')
    with pytest.raises(TokenCacheError, match="version 99"):
        TokenCache.open(cache.folder)
