"""Counts, collisions and the Zipf curve against dictionaries filled through the layout's own rows."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from tokenizers import Tokenizer

from engram.builders import collisions, ngram_counts, statistics, statistics_plot, token_cache
from engram.builders.collisions import RowChoice, choose_rows, expected_share
from engram.builders.corpus import CorpusConfig
from engram.builders.layout import Layout
from engram.builders.ngram_counts import NgramCounts, OrderCounts
from engram.builders.token_cache import TokenCache
from engram.builders.vocab import compress_vocabulary

DIALECTS: dict[str, dict[str, Any]] = {
    "demo": {"dialect": "demo", "orders": (2, 3), "compress": True},
    "raw": {"dialect": "demo", "orders": (1, 3), "compress": False},
    "v41": {"dialect": "v41", "orders": (2, 3, 4), "compress": True, "dead_ids": (269, 287)},
    "qwen-ple": {"dialect": "qwen-ple", "orders": (2, 3), "compress": False, "reset_id": 269},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, several runs, several parts."""
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 2000)
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(ngram_counts, "PART_ENTRIES", 500)
    monkeypatch.setattr(ngram_counts, "SAMPLE_EVERY", 7)


def counted(tmp_path: Path, options: dict[str, Any], top: int = 50) -> tuple[NgramCounts, Layout, TokenCache]:
    options = dict(options)
    path = texts.write_tokenizer(tmp_path)
    texts.write_corpus(tmp_path / "a.jsonl", 200, words=30)
    (tmp_path / "b.txt").write_text("x")  # documents shorter than an n-gram
    (tmp_path / "c.txt").write_text("é!")
    sources = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.txt"))
    cache = TokenCache.build(CorpusConfig(sources), path, folder=tmp_path / "cache")
    compressed = compress_vocabulary(Tokenizer.from_file(str(path)))
    layout = Layout.build(
        heads=2, head_dim=4, layers=(1, 3), rows_per_head=400, pad_id=1, vocab_size=len(compressed.token_map),
        token_map=compressed.token_map if options.pop("compress") else None, **options,
    )  # fmt: skip
    counts = NgramCounts(cache, layout, tmp_path / "work", top)
    counts.run()
    return counts, layout, cache


def by_hand(layout: Layout, cache: TokenCache) -> dict[int, Counter[tuple[int, ...]]]:
    """n-grams as tuples of compressed ids, oldest first, by walking back from every position of every document."""
    fill = layout.reset_id if layout.reset_id is not None else int(layout.compress(np.array(layout.pad_id)))
    out: dict[int, Counter[tuple[int, ...]]] = {order: Counter() for order in layout.orders}
    for i in range(cache.documents):
        raw = cache.document(i).astype(np.int64)
        ids = layout.compress(raw).tolist()
        for t in range(len(ids)):
            seen, blocked = [], False
            for k in range(layout.orders[-1]):
                blocked = blocked or t - k < 0 or raw[t - k] in layout.dead_ids
                blocked = blocked or (k > 0 and raw[t - k] == layout.reset_id)
                seen.append(fill if blocked else ids[t - k])
            for order in layout.orders:
                out[order][tuple(seen[:order][::-1])] += 1
    return out


@pytest.mark.parametrize("name", DIALECTS)
def test_counts_equal_a_walk_over_every_position(name: str, tmp_path: Path) -> None:
    counts, layout, cache = counted(tmp_path, DIALECTS[name])
    assert len(cache.shards()) > 2 and len(list((tmp_path / "work").glob("part-*"))) > 2
    ids = np.concatenate([cache.document(i) for i in range(cache.documents)])
    assert all((ids == special).sum() > 50 for special in (*layout.dead_ids, layout.reset_id) if special is not None)
    for order, expected in by_hand(layout, cache).items():
        found: Counter[tuple[int, ...]] = Counter()
        for keys, weights in counts.parts(order):
            tokens = np.stack(counts.unpack(keys, order)[::-1], axis=1)
            found.update({tuple(row): int(weight) for row, weight in zip(tokens.tolist(), weights, strict=True)})
        assert found == expected
        assert counts.orders[order].distinct == len(expected)
        assert counts.orders[order].histogram == Counter(expected.values())
        assert sum(expected.values()) == cache.tokens
        top = counts.top_tokens(order).tolist()
        best = sorted(expected.values(), reverse=True)[:50]
        assert counts.orders[order].top_counts.tolist() == best
        assert [expected[tuple(row)] for row in top] == best
        assert len({tuple(row) for row in top}) == len(best)


def test_windows_hash_to_the_layout_s_own_rows(tmp_path: Path) -> None:
    for name, options in DIALECTS.items():
        (tmp_path / name).mkdir()
        _, layout, cache = counted(tmp_path / name, options)
        ids, lengths = np.load(cache.shards()[0]), cache.shard_documents(0)
        tokens = ngram_counts.windows(layout, ids, lengths)
        start = np.zeros((1, len(ids)), dtype=bool)
        start[0, np.cumsum(lengths) - lengths] = True
        rows = layout.rows(ids[None], start_BT=start, local=True)[1][0]
        for place, order in enumerate(layout.orders):
            mixed = ngram_counts.mix(layout, tokens, order)
            for head, prime in enumerate(layout.primes[1][place]):
                np.testing.assert_array_equal(mixed % prime, rows[:, place * layout.heads + head])


def test_an_order_beyond_64_bits_is_counted_by_its_mix(tmp_path: Path) -> None:
    exact, layout, cache = counted(tmp_path, DIALECTS["v41"])
    mixed = NgramCounts(cache, layout, tmp_path / "mixed", 50)
    mixed.streams = [3, 4]  # as if 3-grams fitted 64 bits and 4-grams did not
    mixed.orders = {n: OrderCounts(n, exact=n < 4) for n in layout.orders}
    mixed.run()
    for order in layout.orders:
        assert mixed.orders[order].histogram == exact.orders[order].histogram
        assert mixed.orders[order].top_counts.tolist() == exact.orders[order].top_counts.tolist()
    frequent = exact.orders[4].top_counts > exact.orders[4].top_counts[-1]  # ties may be cut differently
    assert {*map(tuple, mixed.top_tokens(4)[frequent])} == {*map(tuple, exact.top_tokens(4)[frequent])}
    one, other = (collisions.measure(c, layout)["4"] for c in (exact, mixed))
    assert [h["share_of_distinct"] for h in one["heads"]] == [h["share_of_distinct"] for h in other["heads"]]
    assert statistics.gather(mixed, layout)["estimates"] == ["distinct 4-grams: keyed by a 63-bit mix"]


@pytest.mark.parametrize("name", ["demo", "v41"])
def test_collisions_are_those_of_the_real_rows(name: str, tmp_path: Path) -> None:
    counts, layout, cache = counted(tmp_path, DIALECTS[name])
    occurring: dict[tuple[int, int], dict[int, set[tuple[int, ...]]]] = {}
    lookups: dict[tuple[int, int], Counter[int]] = {}
    tuples = by_hand(layout, cache)
    multipliers = layout.multipliers[1]
    for place, order in enumerate(layout.orders):
        for head, prime in enumerate(layout.primes[1][place]):
            rows, seen = occurring.setdefault((order, head), {}), lookups.setdefault((order, head), Counter())
            for ngram, count in tuples[order].items():
                mixed = 0
                for k in range(order):
                    mixed ^= ngram[-1 - k] * multipliers[k]
                rows.setdefault(mixed % prime, set()).add(ngram)
                seen[mixed % prime] += count
    measured = collisions.measure(counts, layout)
    for (order, head), rows in occurring.items():
        shared = {row for row, ngrams in rows.items() if len(ngrams) > 1}
        result = measured[str(order)]["heads"][head]
        total = sum(len(ngrams) for ngrams in rows.values())
        assert result["share_of_distinct"] == pytest.approx(sum(len(rows[r]) for r in shared) / total, abs=1e-12)
        assert result["share_of_lookups"] == pytest.approx(
            sum(lookups[order, head][r] for r in shared) / cache.tokens, abs=1e-12
        )
        assert result["rows"] == layout.primes[1][layout.orders.index(order)][head]
    assert measured["3"]["rows_sampled"] == 1.0
    mean = np.mean([head["share_of_distinct"] for head in measured["3"]["heads"]])
    assert measured["3"]["share_of_distinct"] == pytest.approx(float(mean))


def test_heads_too_large_to_count_are_sampled_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, layout, _ = counted(tmp_path, DIALECTS["demo"])
    exact = statistics.gather(counts, layout)
    monkeypatch.setattr(collisions, "ROWS_AT_ONCE", 150)
    sampled = statistics.gather(counts, layout)
    for order in ("2", "3"):
        result = sampled["collisions"]["orders"][order]
        assert result["rows_sampled"] == pytest.approx(1 / 3)
        assert result["share_of_distinct"] == pytest.approx(
            exact["collisions"]["orders"][order]["share_of_distinct"], abs=0.1
        )
    assert exact["estimates"] == [] and len(sampled["estimates"]) == 2
    assert "0.33 of the rows sampled" in sampled["estimates"][0]


def test_coverage_is_the_share_of_the_most_frequent() -> None:
    counts = OrderCounts(2, exact=True, histogram={7: 1, 3: 2, 1: 7})
    assert counts.coverage([1, 2, 3, 10, 1000]) == pytest.approx([7 / 20, 10 / 20, 13 / 20, 1.0, 1.0])


def test_the_top_is_exact_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for small in (4, 1 << 16):
        monkeypatch.setattr(ngram_counts, "SMALL_COUNT", small)
        counts = random.geometric(0.4, 1000).astype(np.int64)
        keys = np.arange(0, 3000, 3, dtype=np.uint64)
        for top in (0, 1, 17, 400, 2000):
            found = OrderCounts(2, exact=True)
            for at in range(0, 1000, 130):
                found.add(keys[at : at + 130], counts[at : at + 130], top)
            best = np.lexsort((keys, -counts))[:top]
            assert found.top_keys.tolist() == keys[best].tolist()
            assert found.top_counts.tolist() == counts[best].tolist()
            assert found.histogram == Counter(counts.tolist())


def test_counting_resumes_only_over_the_same_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, layout, cache = counted(tmp_path, DIALECTS["demo"])
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    next(iter(sorted((tmp_path / "work").glob("run-*")))).unlink()
    again = NgramCounts(cache, layout, tmp_path / "work", 50)
    again.run()
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert now.keys() == kept.keys() and sum(now[name] != kept[name] for name in kept) == 1
    assert again.orders[3].histogram == counts.orders[3].histogram
    other = Layout.build(
        dialect="demo",
        orders=(2, 3),
        heads=2,
        head_dim=4,
        layers=(1, 3),
        rows_per_head=400,
        pad_id=1,
        vocab_size=layout.vocab_size,
    )
    NgramCounts(cache, other, tmp_path / "work", 50).run()
    later = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert not {*later.items()} & {*now.items()}


def test_rows_are_the_fewest_within_target_and_budget() -> None:
    choice = choose_rows(distinct=100_000, target=0.5, budget_bytes=10**12, columns=32, head_dim=64)
    assert choice.decided_by == "target"
    assert expected_share(100_000, choice.rows_per_head) <= 0.5 < expected_share(100_000, choice.rows_per_head - 2)
    tight = choose_rows(distinct=100_000, target=0.5, budget_bytes=10**9, columns=32, head_dim=64)
    assert tight.decided_by == "budget" and tight.rows_per_head < choice.rows_per_head
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=8, head_dim=64, layers=(1, 15), rows_per_head=tight.rows_per_head,
        pad_id=2, vocab_size=1000,
    )  # fmt: skip
    assert 0.98e9 < statistics.table_bytes(layout)["f32"] <= 1e9
    assert choose_rows(3, 0.9, 10**12, 2, 4) == RowChoice(collisions.FEWEST_ROWS, "target")
    assert choose_rows(10**6, 0.5, 1, 2, 4) == RowChoice(collisions.FEWEST_ROWS, "budget")


def test_the_expected_share_is_that_of_random_rows() -> None:
    rows = np.bincount(np.random.default_rng(1).integers(0, 5000, 4000), minlength=5000)
    assert expected_share(4000, 5000) == pytest.approx(1 - (rows == 1).sum() / 4000, abs=0.02)
    assert expected_share(1, 5) == 0.0 and expected_share(2, 1) == 1.0
    assert math.isclose(expected_share(2, 4), 0.25)


def test_bytes_of_the_tables_follow_from_the_codecs() -> None:
    layout = Layout.build(
        dialect="qwen-ple", orders=(2,), heads=2, head_dim=6, layers=(0,), rows_per_head=100, pad_id=0, vocab_size=9,
        reset_id=3,
    )  # fmt: skip
    rows = 256  # 101 + 103, padded to a multiple of 128
    expected = {"f32": 24 * rows, "bf16": 12 * rows, "int8-row": 10 * rows, "int8": 8 * rows, "nf4": 5 * rows,
                "fp8-e8m0": 7 * rows, "fp8-row": 10 * rows, "fp8-tensor": 6 * rows, "h4": 5 * rows}  # fmt: skip
    assert statistics.table_bytes(layout) == expected
    odd = Layout.build(
        dialect="demo", orders=(2,), heads=1, head_dim=5, layers=(0,), rows_per_head=100, pad_id=0, vocab_size=9
    )
    assert statistics.table_bytes(odd) == {
        "f32": 2020, "bf16": 1010, "int8-row": 909, "int8": 707, "fp8-e8m0": 606, "fp8-row": 909, "fp8-tensor": 505,
    }  # fmt: skip


def test_the_top_ngrams_hash_to_their_rows(tmp_path: Path) -> None:
    counts, layout, cache = counted(tmp_path, DIALECTS["demo"])
    top = statistics.top_ngrams(counts, layout)
    assert top["tokens_3"].dtype == np.int32 and top["counts_3"].dtype == np.int64
    assert top["tokens_3"].shape == (50, 3) and top["counts_2"].shape == (50,)
    np.testing.assert_array_equal(layout.compress(top["tokens_3"].astype(np.int64)), top["compressed_3"])
    assert (np.diff(top["counts_3"]) <= 0).all()
    position = next(  # an occurrence of the most frequent 3-gram in the corpus
        (i, t)
        for i in range(cache.documents)
        for t in range(2, len(cache.document(i)))
        if layout.compress(cache.document(i)[t - 2 : t + 1]).tolist() == top["compressed_3"][0].tolist()
    )
    there = layout.rows(cache.document(position[0])[None])[1][0, position[1], layout.heads :]
    alone = layout.rows(top["tokens_3"][:1])[1][0, 2, layout.heads :]
    np.testing.assert_array_equal(there, alone)


def test_the_picture_is_a_readable_png(tmp_path: Path) -> None:
    from matplotlib.image import imread

    counts, layout, _ = counted(tmp_path, DIALECTS["v41"])
    pixels = imread(io.BytesIO(statistics_plot.draw(statistics.gather(counts, layout))), format="png")
    assert pixels.shape[:2] == (640, 1600)
    for half in (pixels[:, :800, :3], pixels[:, 800:, :3]):
        assert (half.max(axis=2) - half.min(axis=2) > 0.3).sum() > 1000  # coloured lines and bars
