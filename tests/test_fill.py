"""Filling: rows equal counts by hand, unseen n-grams change nothing, figures are those of a forward pass."""

from __future__ import annotations

import collections
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import tiny
import torch
from numpy.typing import NDArray

from engram import EngramError
from engram.builders import fill_statistics
from engram.builders.backbone import load_backbone
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.engram import Gate, GateConfig
from engram.builders.fill import FillConfig, FillError, fill
from engram.builders.fill_statistics import DOCUMENT_TOKENS, Split, split_documents
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, load_gate_weights
from engram.builders.token_cache import TokenCache

BLOCKS, HIDDEN, VOCAB = 3, 32, 320
FIT, REPORT = 600, 600


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbone and corpus, and a layout folder wide enough for every direction (4 heads of 8 for 32)."""
    folder = tmp_path_factory.mktemp("fill")
    tiny.write_backbone(folder / "backbone", VOCAB)
    texts.write_corpus(folder / "corpus.jsonl", 60)
    write_layout(folder / "layout", (BLOCKS,))
    return folder


def write_layout(folder: Path, layers: tuple[int, ...], vocab_size: int = VOCAB) -> None:
    texts.write_tokenizer(folder, VOCAB)
    Layout.build(
        dialect="demo", orders=(2, 3), heads=4, head_dim=8, layers=layers, rows_per_head=20_011, pad_id=1,
        vocab_size=vocab_size,
    ).save(folder)  # fmt: skip


def config(place: Path, out: Path, **changes: Any) -> FillConfig:
    corpus = CorpusConfig((str(place / "corpus.jsonl"),))
    made = FillConfig(place / "layout", corpus=corpus, out=out, backbone=str(place / "backbone"))
    return replace(made, **{"dev_tokens": FIT, "test_tokens": REPORT, **changes})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def filled(place: Path, tmp_path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    result = fill(config(place, tmp_path / "out"))
    return open_checkpoint(tmp_path / "out"), result


def parts(place: Path) -> tuple[TokenCache, Split]:
    corpus = CorpusConfig((str(place / "corpus.jsonl"),))
    tokens = TokenCache.build(corpus, place / "layout" / "tokenizer.json")
    return tokens, split_documents(tokens, FIT, REPORT)


def model_of(checkpoint: Checkpoint) -> EngramModel:
    gates = {n: GateConfig.from_json(g) for n, g in checkpoint.gates().items()}
    model = EngramModel(load_backbone(checkpoint.backbone, dtype="float32"), checkpoint.layout, gates).eval()
    load_gate_weights(model, checkpoint.dense())
    return model


def memory_of(checkpoint: Checkpoint, ids: NDArray[np.int64]) -> torch.Tensor:
    rows = checkpoint.layout.rows(ids)[BLOCKS]
    return torch.from_numpy(np.asarray(checkpoint.table(BLOCKS))[rows]).flatten(-2)


def ngram(document: list[int], t: int, order: int) -> tuple[int, ...]:
    """The n-gram that ends at position t, padded before the document's beginning."""
    found = document[max(0, t + 1 - order) : t + 1]
    return (order, *(-1,) * (order - len(found)), *found)


def test_rows_are_the_shrunk_whitened_centroids_counted_by_hand(
    place: Path, filled: tuple[Checkpoint, dict[str, Any]]
) -> None:
    checkpoint, result = filled
    tokens, split = parts(place)
    head = load_backbone(checkpoint.backbone).get_output_embeddings().weight.detach().double().numpy()
    followers: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    owners: dict[int, set[tuple[int, ...]]] = collections.defaultdict(set)  # n-grams of every row
    unigram = np.full(VOCAB, 1e-3)
    for i in split.count:
        document = tokens.document(int(i)).tolist()
        rows = checkpoint.layout.rows(np.array([document]))[BLOCKS][0]
        for t in range(len(document) - 1):
            unigram[document[t + 1]] += 1
            for order in (2, 3):
                followers[ngram(document, t, order)][document[t + 1]] += 1
                for row in rows[t, 4 * (order - 2) : 4 * (order - 1)].tolist():
                    owners[row].add(ngram(document, t, order))
    share = unigram / unigram.sum()
    mean = share @ head
    covariance = ((head - mean) * share[:, None]).T @ (head - mean)
    covariance += 0.05 * np.trace(covariance) / HIDDEN * np.eye(HIDDEN)
    document = tokens.document(int(split.report[0])).astype(np.int64)
    gate = model_of(checkpoint).gate(BLOCKS)
    with torch.inference_mode():
        state = torch.randn(1, len(document), HIDDEN)
        added = gate(state, memory_of(checkpoint, document[None]))[0][0].double().numpy()
    rows = checkpoint.layout.rows(document[None])[BLOCKS][0]
    checked = 0
    for t in range(len(document)):
        own = [ngram(document.tolist(), t, order) for order in (2, 3) for _ in range(4)]
        if any(owners[row] - {key} for row, key in zip(rows[t].tolist(), own, strict=True)):
            continue  # shared with another n-gram
        expected = np.zeros(HIDDEN)
        for order in (2, 3):
            seen = followers.get(ngram(document.tolist(), t, order), collections.Counter())
            if seen.total() < 2:  # n-grams seen once are left out
                continue
            centroid = sum(times * (head[token] - mean) for token, times in seen.items())
            step = np.linalg.solve(covariance, centroid / (seen.total() + result["k"])) / HIDDEN
            expected += result["scales"][str(order)] * step
            checked += 1
        np.testing.assert_allclose(added[t], expected, rtol=2e-3, atol=2e-3 * np.abs(added).max())
    assert checked > len(document) / 2, "most n-grams of this text were counted and have rows of their own"


def test_unseen_ngrams_change_no_bit(filled: tuple[Checkpoint, dict[str, Any]]) -> None:
    checkpoint, _ = filled
    model = model_of(checkpoint)
    generator = np.random.default_rng(3)
    ids = generator.integers(3, VOCAB, size=(1, 200))
    rows = checkpoint.layout.rows(ids)[BLOCKS]
    memory = memory_of(checkpoint, ids)
    unseen = ~np.asarray(checkpoint.table(BLOCKS))[rows].any(axis=(0, 2, 3))
    assert unseen.mean() > 0.3, "random tokens meet few counted n-grams"
    with torch.inference_mode():
        alone = model.backbone(torch.from_numpy(ids)).logits[0, unseen]
        assert torch.equal(model(torch.from_numpy(ids), {BLOCKS: memory})[0, unseen], alone)


def test_reported_perplexities_are_those_of_a_forward_pass(
    place: Path, filled: tuple[Checkpoint, dict[str, Any]]
) -> None:
    checkpoint, result = filled
    tokens, split = parts(place)
    model = model_of(checkpoint)
    nats = {"backbone": 0.0, "filled": 0.0}
    count, left = 0, REPORT
    for i in split.report:
        ids = tokens.document(int(i))[: min(DOCUMENT_TOKENS, left)].astype(np.int64)[None]
        left -= ids.shape[1]
        if ids.shape[1] < 2:
            continue
        given = torch.from_numpy(ids)
        with torch.inference_mode():
            for name, logits in (
                ("backbone", model.backbone(given).logits),
                ("filled", model(given, {BLOCKS: memory_of(checkpoint, ids)})),
            ):
                flat = logits[0, :-1].float()
                nats[name] += float(torch.nn.functional.cross_entropy(flat, given[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert result["test_tokens"] == count
    for name, total in nats.items():
        assert result["test_ppl"][name] == pytest.approx(math.exp(total / count), rel=0.02)
    assert result["test_ppl"]["filled"] < 0.9 * result["test_ppl"]["backbone"]


def test_texts_begin_with_bos_where_the_tokenizer_asks_for_one(place: Path, tmp_path: Path) -> None:
    """Some backbones are lost without it: the scales must be fitted on the states that serving has."""
    shutil.copytree(place / "layout", tmp_path / "layout")
    info = {"bos_id": 5, "add_bos": True, "eos_ids": [], "chat_template": None}
    (tmp_path / "layout" / "tokenizer_info.json").write_text(json.dumps(info))
    result = fill(config(place, tmp_path / "out", source=tmp_path / "layout"))
    backbone = load_backbone(open_checkpoint(tmp_path / "out").backbone, dtype="float32")
    tokens, split = parts(place)
    nats, count, left = {"with": 0.0, "without": 0.0}, 0, REPORT
    for i in split.report:
        ids = torch.from_numpy(tokens.document(int(i))[:left].astype(np.int64))
        left -= len(ids)
        if len(ids) < 2:
            continue
        assert len(ids) <= 512, "one window"
        with torch.inference_mode():
            for name, bos in (("with", [5]), ("without", [])):
                logits = backbone(torch.tensor([[*bos, *ids.tolist()]])).logits[0, len(bos) : -1]
                nats[name] += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    ppl = {name: math.exp(total / count) for name, total in nats.items()}
    assert result["test_ppl"]["backbone"] == pytest.approx(ppl["with"], rel=0.002)
    assert ppl["without"] != pytest.approx(ppl["with"], rel=0.006), "the two can be told apart"


def test_documents_for_fitting_and_reporting_are_not_counted(place: Path) -> None:
    tokens, split = parts(place)
    hashes = tokens.hashes()
    three = [set(hashes[part].tolist()) for part in (split.count, split.fit, split.report)]
    assert sum(map(len, three)) == len(set.union(*three))
    assert sum(len(part) for part in (split.count, split.fit, split.report)) == tokens.documents


def test_batches_do_not_show(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(config(place, tmp_path / "one"))
    monkeypatch.setattr(fill_statistics, "BATCH_TOKENS", 300)
    fill(config(place, tmp_path / "many"))
    tables = [np.asarray(open_checkpoint(tmp_path / name).table(BLOCKS)) for name in ("one", "many")]
    np.testing.assert_array_equal(tables[0].any(axis=1), tables[1].any(axis=1))
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-4, atol=1e-4)


def test_training_can_go_on(filled: tuple[Checkpoint, dict[str, Any]]) -> None:
    gate: Gate = model_of(filled[0]).gate(BLOCKS)
    memory = torch.randn(1, 5, filled[0].layout.memory_width, requires_grad=True)
    state = torch.randn(1, 5, HIDDEN)
    assert torch.equal(gate.open(state.unsqueeze(-2), memory), torch.full((1, 5, 1), 0.5))
    gate(state, memory)[0].square().sum().backward()  # type: ignore[no-untyped-call]
    for value in (memory.grad, gate.value_proj.weight.grad, gate.norm_query.grad):
        assert value is not None and bool(torch.isfinite(value).all()) and float(value.abs().max()) > 0


def test_result_and_checkpoint_say_the_same(filled: tuple[Checkpoint, dict[str, Any]]) -> None:
    checkpoint, result = filled
    assert result["rows_filled"] == int(np.asarray(checkpoint.table(BLOCKS)).any(axis=1).sum())
    assert checkpoint.manifest["fill"]["k"] == result["k"]
    assert checkpoint.manifest["fill"]["scales"] == list(result["scales"].values())
    assert result["seconds"] > 0
    json.dumps(result)


def test_a_checkpoint_can_be_filled_again(place: Path, tmp_path: Path) -> None:
    first = fill(config(place, tmp_path / "first"))
    second = fill(config(place, tmp_path / "second", source=tmp_path / "first", backbone=None))
    assert second["scales"] == pytest.approx(first["scales"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dev_tokens": 3}, "dev_tokens 3"),
        ({"strength": 0.0}, "strength 0"),
        ({"test_tokens": 1}, "test_tokens 1"),
        ({"least": 0}, "least 0"),
        ({"ridge": 0.0}, "ridge 0.0"),
    ],
)
def test_settings_that_mean_nothing(place: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FillError, match=words):
        config(place, tmp_path / "out", **changes)


def refused(made: FillConfig, words: str) -> None:
    with pytest.raises(EngramError, match=words):
        fill(made)
    assert not made.out.exists() or not any(made.out.iterdir()), "nothing half-written"
    assert not list(made.out.parent.glob(".*fill-*")), "no scratch is left"


def test_layout_without_the_final_layer(place: Path, tmp_path: Path) -> None:
    write_layout(tmp_path / "early", (1,))
    refused(config(place, tmp_path / "out", source=tmp_path / "early"), r"layers \[1\].*layer 3")


def test_tokenizer_larger_than_the_backbone(place: Path, tmp_path: Path) -> None:
    write_layout(tmp_path / "wide", (BLOCKS,), vocab_size=VOCAB + 8)
    refused(config(place, tmp_path / "out", source=tmp_path / "wide"), f"{VOCAB + 8} ids.*scores {VOCAB}")


def test_layout_without_a_backbone(place: Path, tmp_path: Path) -> None:
    refused(config(place, tmp_path / "out", backbone=None), "names no backbone")


def test_too_little_text(place: Path, tmp_path: Path) -> None:
    refused(config(place, tmp_path / "out", dev_tokens=10**6), "none are left")


def test_out_that_exists(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(config(place, tmp_path / "out"), "exists")


def test_folder_that_is_neither(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(config(place, tmp_path / "out", source=tmp_path / "empty", backbone=None), "neither a layout")


def test_text_to_fit_on_may_come_from_elsewhere(place: Path, tmp_path: Path) -> None:
    texts.write_corpus(tmp_path / "dev.jsonl", 20)
    lines = (tmp_path / "dev.jsonl").read_text().splitlines()
    lines = [json.dumps({"text": "apart " + json.loads(line)["text"]}) for line in lines]
    shared = (place / "corpus.jsonl").read_text().splitlines()[0]
    (tmp_path / "dev.jsonl").write_text("\n".join([*lines, shared]) + "\n")
    result = fill(config(place, tmp_path / "out", dev=CorpusConfig((str(tmp_path / "dev.jsonl"),))))
    whole = TokenCache.build(CorpusConfig((str(place / "corpus.jsonl"),)), place / "layout" / "tokenizer.json")
    assert result["documents"]["counted"] == whole.documents - 1, "all but the document that is also judged on"
    assert result["documents"]["fitted"] + result["documents"]["reported"] <= 21
