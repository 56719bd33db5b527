"""A corpus and a tokenizer in, a layout folder out; and the window through which anyone can check the hashing."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram import EngramError, Progress
from engram.builders import collisions, statistics, statistics_plot
from engram.builders.atomic import check_replaceable, put_in_place, sync_path, write_whole
from engram.builders.corpus import CorpusConfig
from engram.builders.layout import Layout
from engram.builders.ngram_counts import NgramCounts
from engram.builders.process_memory import resident_bytes
from engram.builders.token_cache import TokenCache
from engram.builders.tokenizer import FILE, load_tokenizer, save_tokenizer, special_tokens
from engram.builders.vocab import Compressed, compress_vocabulary

DEFAULT_BUDGET_BYTES = 2 << 30
DEFAULT_TARGET = 0.5
DEFAULT_PAD_ID = 2  # the published models' raw pad id
UNCOMPRESSED = ("qwen-ple",)  # dialects that hash raw ids
PROVISIONAL_ROWS = 256  # counting n-grams needs a layout, but not its primes


class BuildVocabError(EngramError):
    """A layout folder that cannot be written or asked for."""


@dataclass(frozen=True)
class BuildVocabConfig:
    """What to build.

    tokenizer: file, folder, GGUF or hub name. rows_per_head: where the search for primes starts; None chooses the
    fewest rows that keep the expected share of distinct n-grams that collide in one head (of the order that has most
    n-grams) within target_collisions (default 0.5), while all tables together stay within budget_bytes as float32
    (default 2 GiB). pad_id: raw id before a document's start (default 2, or the reset id). reset_id: raw id that ends a
    document (qwen-ple: the tokenizer's eos). compress=False hashes raw ids, as the dialect qwen-ple always does.
    top: frequent n-grams kept per order. workers: threads of the tokenizer (default: all cores); it can be set only
    before the first text of a process is tokenized.
    """

    corpus: CorpusConfig
    tokenizer: str
    out: Path
    dialect: str = "demo"
    orders: tuple[int, ...] = (2, 3)
    heads: int = 8
    rows_per_head: int | None = None
    budget_bytes: int | None = None
    target_collisions: float | None = None
    head_dim: int = 64
    layers: tuple[int, ...] = (1, 15)
    seed: int = 0
    pad_id: int | None = None
    compress: bool = True
    reset_id: int | None = None
    dead_ids: tuple[int, ...] = ()
    top: int = 65536
    force: bool = False
    workers: int | None = None


def build_vocab(config: BuildVocabConfig, progress: Progress = Progress()) -> dict[str, Any]:
    """Build the layout folder `config.out`; the figures of the `--json` object of `engram build-vocab`.

    The folder appears at once when it is complete. What an interrupted build tokenized and counted is found again by
    the next call with the same input. Raises BuildVocabError, and the errors of corpus, tokenizer and layout.
    """
    began = time.perf_counter()
    _check(config)
    if config.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)
    half = config.out.with_name(config.out.name + ".partial")
    half.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(config.tokenizer)
    sha256 = save_tokenizer(config.tokenizer, half)
    compressed = _compressed(config, tokenizer, progress)
    raw_size = tokenizer.get_vocab_size(with_added_tokens=True)
    options = _layout_options(config, compressed, raw_size, sha256)
    provisional = Layout.build(**options, rows_per_head=config.rows_per_head or PROVISIONAL_ROWS)

    cache = TokenCache.build(config.corpus, config.tokenizer, progress)
    counts = NgramCounts(cache, provisional, half / "work", config.top)
    counts.run(progress)
    choice = _choose(config, counts, progress)
    layout = Layout.build(**options, rows_per_head=choice.rows_per_head)
    figures = statistics.gather(counts, layout, progress)

    from safetensors.numpy import save

    write_whole(half / "top_ngrams.safetensors", save(statistics.top_ngrams(counts, layout)))
    write_whole(half / "stats.png", statistics_plot.draw(figures))
    layout.save(half)
    result = {
        "tokens": cache.tokens, "documents": cache.documents, "bytes": cache.bytes,
        "left_out": cache.left_out, "undecodable": cache.undecodable,
        "vocab_size": raw_size, "compressed_size": layout.compressed_size,
        "reduction": 1.0 - layout.compressed_size / raw_size,
        "lookup_sha256": None if compressed is None else compressed.sha256,
        "rows": {str(layer): rows for layer, rows in layout.table_rows.items()},
        "rows_per_head": choice.rows_per_head, "rows_decided_by": choice.decided_by,
        "dialect": layout.dialect, "orders": list(layout.orders), "heads": layout.heads, "head_dim": layout.head_dim,
        "layers": list(layout.layers), "pad_id": layout.pad_id, "tokenizer_sha256": sha256, **figures,
        "seconds": time.perf_counter() - began, "peak_rss_bytes": resident_bytes()["peak_rss_bytes"],
    }  # fmt: skip
    write_whole(half / "stats.json", (json.dumps(result, indent=1) + "\n").encode())
    shutil.rmtree(half / "work")
    _move(half, config.out, force=config.force)
    cache.discard()
    _show(result, progress)
    return {"out": str(config.out), **result}


def hash_report(folder: Path, *, ids: list[int] | None, text: str | None, local: bool = False) -> dict[str, Any]:
    """Raw ids, compressed ids and rows ({layer: [[column, …] per position]}) of a token sequence.

    folder: a layout, checkpoint or package. text: tokenized with the folder's own tokenizer, no special tokens added.
    local: rows within each head instead of within the layer's table. Raises LayoutError, TokenizerError, and
    BuildVocabError where neither ids nor text is given, or both.
    """
    if (ids is None) == (text is None):
        raise BuildVocabError("hashing takes either ids or a text", hint="give one of --ids and --text")
    layout = Layout.load(folder)
    if text is not None:
        ids = load_tokenizer(folder / FILE).encode(text, add_special_tokens=False).ids
    row = np.array([ids], dtype=np.int64)
    rows = layout.rows(row, local=local)
    return {
        "ids": row[0].tolist(),
        "compressed": layout.compress(row)[0].tolist(),
        "rows": {str(layer): rows_BTC[0].tolist() for layer, rows_BTC in rows.items()},
    }


def _check(config: BuildVocabConfig) -> None:
    check_replaceable(config.out, force=config.force, error=BuildVocabError)
    target = config.target_collisions
    if target is not None and not 0 < target < 1:
        raise BuildVocabError(f"target_collisions {target} must lie between 0 and 1")
    for name in ("rows_per_head", "budget_bytes", "workers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BuildVocabError(f"{name} {value} must be at least 1")
    if config.top < 0:
        raise BuildVocabError(f"top {config.top} must not be negative")


def _compressed(config: BuildVocabConfig, tokenizer: Tokenizer, progress: Progress) -> Compressed | None:
    if not config.compress or config.dialect in UNCOMPRESSED:
        return None
    with progress.task("compress the vocabulary"):
        return compress_vocabulary(tokenizer)


def _layout_options(
    config: BuildVocabConfig, compressed: Compressed | None, vocab_size: int, sha256: str
) -> dict[str, Any]:
    reset_id = config.reset_id
    if reset_id is None and config.dialect == "qwen-ple":
        reset_id = special_tokens(config.tokenizer)["eos_id"]
        if reset_id is None:
            raise BuildVocabError(
                "the dialect 'qwen-ple' resets at the end of a text, and the tokenizer names no eos token",
                hint="pass --reset-id",
            )
    for name, value in (("reset_id", reset_id), *(("dead_ids", dead) for dead in config.dead_ids)):
        if value is not None and not 0 <= value < vocab_size:
            raise BuildVocabError(f"{name} {value} is outside the vocabulary of {vocab_size} ids")
    fallback = DEFAULT_PAD_ID if reset_id is None else reset_id
    return {
        "dialect": config.dialect, "orders": config.orders, "heads": config.heads, "head_dim": config.head_dim,
        "layers": config.layers, "seed": config.seed, "pad_id": fallback if config.pad_id is None else config.pad_id,
        "vocab_size": vocab_size, "token_map": None if compressed is None else compressed.token_map,
        "reset_id": reset_id, "dead_ids": config.dead_ids, "tokenizer_sha256": sha256,
    }  # fmt: skip


def _choose(config: BuildVocabConfig, counts: NgramCounts, progress: Progress) -> collisions.RowChoice:
    if config.rows_per_head is not None:
        return collisions.RowChoice(config.rows_per_head, "given")
    budget = DEFAULT_BUDGET_BYTES if config.budget_bytes is None else config.budget_bytes
    target = DEFAULT_TARGET if config.target_collisions is None else config.target_collisions
    order, distinct = max(((n, c.distinct) for n, c in counts.orders.items()), key=lambda pair: pair[1])
    columns = len(config.orders) * config.heads * len(config.layers)
    choice = collisions.choose_rows(distinct, target, budget, columns, config.head_dim)
    share = collisions.expected_share(distinct, choice.rows_per_head)
    reason = (
        f"the fewest that keep the expected collisions within {target:.0%}"
        if choice.decided_by == "target"
        else f"as many as {budget / 1e9:.2f} GB of float32 tables hold; the target of {target:.0%} would take more"
    )
    progress.say(
        f"rows: {choice.rows_per_head:,} per head, {reason} "
        f"({distinct:,} distinct {order}-grams, {share:.1%} expected to share a row in one head)"
    )
    return choice


def _show(result: dict[str, Any], progress: Progress) -> None:
    progress.table(
        "Corpus and vocabulary", ["documents", "tokens", "token ids", "compressed ids", "reduction"],
        [[f"{result['documents']:,}", f"{result['tokens']:,}", f"{result['vocab_size']:,}",
          f"{result['compressed_size']:,}", f"{100 * result['reduction']:.3f} %"]],
    )  # fmt: skip
    statistics.tables(result, progress)


def _move(half: Path, out: Path, *, force: bool) -> None:
    """Put the finished folder in its place, unless one appeared there meanwhile."""
    sync_path(half)
    if out.exists() and not force:
        raise BuildVocabError(f"{out} appeared while it was being built", hint="pass --force to replace it")
    put_in_place(half, out)
