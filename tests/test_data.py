"""Batches: every token a target once, nothing crosses documents, the same seed gives the same order."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from engram.builders.corpus import CorpusConfig
from engram.builders.data import NOT_A_TARGET, Batch, Cursor, DataError, HeldOut, Pieces, Stream, collate
from engram.builders.engram import GateConfig, Table
from engram.builders.layout import Layout
from engram.builders.model import EngramModel
from engram.builders.token_cache import TokenCache

WORDS = [f"w{i}" for i in range(60)]


def make_cache(folder: Path, lengths: list[int]) -> TokenCache:
    """One document of every length, of random words; one word is one token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = np.random.default_rng(1)
    lines = [json.dumps({"text": " ".join(generator.choice(WORDS, n))}) for n in lengths]
    (folder / "text.jsonl").write_text("\n".join(lines))
    corpus = CorpusConfig((str(folder / "text.jsonl"),))
    return TokenCache.build(corpus, folder / "tokenizer.json", folder=folder / "tokens")


def make_layout(dialect: str = "demo", layers: tuple[int, ...] = (0, 2)) -> Layout:
    return Layout.build(
        dialect=dialect, orders=(2, 3), heads=2, head_dim=4, layers=layers, rows_per_head=97, pad_id=3,
        vocab_size=len(WORDS), reset_id=7 if dialect == "qwen-ple" else None,
    )  # fmt: skip


LENGTHS = [1, 2, 3, 70, 33, 16, 17, 18, 200, 5, 1, 90, 40, 40, 41]


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return make_cache(tmp_path, LENGTHS)


def make_stream(cache: TokenCache, **changes: Any) -> Stream:
    options: dict[str, Any] = dict(length=16, batch=4, accumulation=2, seed=0)
    return Stream(cache, np.arange(cache.documents), make_layout(), **options | changes)


def epoch_of(stream: Stream, epoch: int = 0) -> list[list[Batch]]:
    return [stream.step(Cursor(epoch, step))[0] for step in range(stream.steps(epoch))]


def test_every_token_is_a_target_once(cache: TokenCache) -> None:
    stream = make_stream(cache)
    batches = [batch for step in epoch_of(stream) for batch in step]
    pairs = np.zeros((len(WORDS), len(WORDS)), dtype=int)
    for batch in batches:
        real = batch.targets_BT != NOT_A_TARGET
        np.add.at(pairs, (batch.ids_BT[real], batch.targets_BT[real]), 1)
    expected = np.zeros_like(pairs)
    for i in range(cache.documents):
        text = cache.document(i)
        np.add.at(expected, (text[:-1], text[1:]), 1)
    assert (pairs == expected).all()
    assert stream.tokens == sum(batch.tokens for batch in batches) == sum(n - 1 for n in LENGTHS)
    assert all(batch.ids_BT.size <= 64 for batch in batches), "the budget counts padding"


@pytest.mark.parametrize("dialect", ["demo", "v41", "qwen-ple"])
def test_rows_are_those_of_the_whole_document(cache: TokenCache, dialect: str) -> None:
    """A piece in the middle of a document hashes as the document does; no piece sees another document."""
    layout = make_layout(dialect)
    numbers = np.arange(cache.documents)
    pieces = Pieces.cut(numbers, cache.lengths(), 16)
    whole = {i: layout.rows(cache.document(i)[None]) for i in numbers}
    rng = np.random.default_rng(0)
    for _ in range(8):
        chosen = rng.choice(len(pieces), 5, replace=False)
        batch = collate(cache, layout, pieces, chosen)
        for row, piece in enumerate(chosen):
            begin, length = pieces.begin[piece], pieces.length[piece]
            for layer in layout.layers:
                expected = whole[pieces.document[piece]][layer][0, begin : begin + length]
                assert (batch.rows[layer][row, :length] == expected).all()
                assert (batch.rows[layer][row, length:] == expected[-1]).all(), "padding touches no other row"


@pytest.mark.parametrize("dialect", ["demo", "v41", "qwen-ple"])
@pytest.mark.parametrize("first", [[9], [9, 4, 11]])
def test_what_every_text_begins_with_stands_before_every_piece(
    cache: TokenCache, dialect: str, first: list[int]
) -> None:
    """The backbone reads it everywhere; the hash sees it where the document begins, as serving does."""
    layout = make_layout(dialect)
    pieces = Pieces.cut(np.arange(cache.documents), cache.lengths(), 16)
    plain, begun = (collate(cache, layout, pieces, range(len(pieces)), ids) for ids in ([], first))
    size = len(first)
    assert (begun.ids_BT[:, :size] == first).all() and (begun.ids_BT[:, size:] == plain.ids_BT).all()
    assert (begun.targets_BT[:, :size] == NOT_A_TARGET).all() and begun.tokens == plain.tokens
    for row, piece in enumerate(range(len(pieces))):
        begin, length = int(pieces.begin[piece]), int(pieces.length[piece])
        text = np.concatenate([first, cache.document(int(pieces.document[piece]))]).astype(np.int64)[None]
        for layer, expected in layout.rows(text).items():
            found = begun.rows[layer][row]
            assert (found[:size] == expected[0, :size]).all()
            assert (found[size : size + length] == expected[0, size + begin : size + begin + length]).all()
    stream = make_stream(cache, first=first)
    assert all((batch.ids_BT[:, :size] == first).all() for step in epoch_of(stream) for batch in step)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_logits_of_a_batch_are_those_of_each_document_alone(cache: TokenCache, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    common: dict[str, Any] = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    extra = {} if kind == "gpt2" else dict(intermediate_size=24, num_key_value_heads=2)
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **extra)).eval()
    layout = make_layout(layers=(0, 2))
    gate = GateConfig(16, layout.memory_width, conv_kernel=4)
    model = EngramModel(backbone, layout, {0: gate, 2: gate}).eval()
    for name, parameter in model.gates.named_parameters():
        if "conv" in name:
            parameter.data.normal_()
    tables = {n: Table(torch.randn(layout.table_rows[n], 4)).eval() for n in layout.layers}

    def logits(ids: Any, rows: dict[int, Any]) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(torch.from_numpy(ids), {n: tables[n](torch.from_numpy(rows[n])) for n in rows})
        return out

    numbers = np.array([i for i, n in enumerate(LENGTHS) if 2 < n < 60])
    pieces = Pieces.cut(numbers, cache.lengths()[numbers], 60)
    batch = collate(cache, layout, pieces, range(len(pieces)))
    together = logits(batch.ids_BT, batch.rows)
    for row, i in enumerate(numbers):
        text = cache.document(i)[None, :-1].astype(np.int64)
        alone = logits(text, layout.rows(text))
        assert (together[row, : text.shape[1]] - alone[0]).abs().max() < 1e-5


def same(left: list[Batch], right: list[Batch]) -> bool:
    def equal(a: Batch, b: Batch) -> bool:
        rows = all(np.array_equal(a.rows[n], b.rows[n]) for n in a.rows)
        return np.array_equal(a.ids_BT, b.ids_BT) and np.array_equal(a.targets_BT, b.targets_BT) and rows

    return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_order_follows_from_the_seed_and_a_cursor_finds_it_again(cache: TokenCache) -> None:
    stream, cursor, walked = make_stream(cache), Cursor(), []
    for _ in range(stream.steps(0) + 3):
        batches, after = stream.step(cursor)
        walked.append((cursor, batches))
        cursor = after
    assert walked[stream.steps(0)][0] == Cursor(1, 0), "an epoch is followed by the next"
    for cursor, batches in reversed(walked):
        assert same(make_stream(cache).step(cursor)[0], batches)
    first, second = epoch_of(stream, 0), epoch_of(stream, 1)
    assert not all(same(a, b) for a, b in zip(first, second, strict=False)), "epochs differ in order"
    other = epoch_of(make_stream(cache, seed=1))
    assert not all(same(a, b) for a, b in zip(first, other, strict=False)), "seeds differ in order"


def test_little_is_padding(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    stream = make_stream(make_cache(tmp_path, generator.geometric(1 / 12, 600).tolist()), length=64, batch=4)
    batches = [batch for step in epoch_of(stream) for batch in step]
    assert sum(batch.tokens for batch in batches) / sum(batch.ids_BT.size for batch in batches) > 0.93


def test_held_out_is_named_by_its_hash_and_cut_at_the_token_budget(cache: TokenCache) -> None:
    train, held = cache.split(0.4)
    assert len(train) and len(held) and not set(train) & set(held)
    everything = HeldOut.choose(cache, held, 16, 10**9)
    assert everything.tokens == sum(max(0, LENGTHS[i] - 1) for i in held)
    sizes = cache.byte_counts()[held[cache.lengths()[held] > 1]]
    assert everything.bytes == pytest.approx(sizes.sum())
    hashes = sorted(int(h) for h in cache.hashes()[held])
    expected = hashlib.sha256(b"".join(h.to_bytes(8, "little") for h in hashes)).hexdigest()
    assert everything.sha256 == expected
    some = HeldOut.choose(cache, held[::-1].copy(), 16, everything.tokens // 2)
    assert some.sha256 == expected and some.tokens == everything.tokens // 2
    assert 0.3 < some.bytes / everything.bytes < 0.7
    batches = list(some.batches(cache, make_layout(), 64))
    assert sum(batch.tokens for batch in batches) == some.tokens


def test_a_corpus_of_single_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document of two tokens"):
        make_stream(make_cache(tmp_path, [1, 1, 1]))
