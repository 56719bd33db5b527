"""Evaluation: losses equal a forward pass by hand, controls controls hold what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from texts import PLAIN_WORDS

from engram.builders.corpus import CorpusConfig
from engram.quantize.package import ExportConfig, export_package
from engram.runtime.engine import Model
from engram.runtime.evaluate import EvalConfig, EvaluateError, Scorer, common_length, evaluate, shuffled


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))


def package(folder: Path, layers: tuple[int, ...]) -> Path:
    export_package(ExportConfig(tiny.write_checkpoint(folder, layers=layers), folder / "package"))
    return folder / "package"


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("final"), (3,))


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("early"), (1, 3))


@pytest.fixture
def data(tmp_path: Path) -> CorpusConfig:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(PLAIN_WORDS, size=60 + 40 * i)) for i in range(6)]
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return CorpusConfig((str(path),))


@pytest.mark.parametrize("kind", ["final", "early"])
def test_losses_are_those_of_the_full_forward_pass(
    kind: str, data: CorpusConfig, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    result = evaluate(EvalConfig(folder, data, sequence=50, document_tokens=120))
    model = Model.open(folder)
    texts = [json.loads(line)["text"] for line in Path(data.sources[0]).read_text().splitlines()]
    total, tokens, size, alone = 0.0, 0, 0, 0.0
    for text in texts:
        ids = model.encode(text)[:120]
        for begin in range(0, len(ids), 50):
            window = ids[begin : begin + 50]
            if len(window) < 2:
                continue
            batch = torch.tensor([window])
            with torch.inference_mode():
                logits = model.engram(batch, model.memory(model.layout.rows(batch.numpy())))[0]
                plain = model.engram.backbone(batch).logits[0]
            for found, name in ((logits, "memory"), (plain, "backbone")):
                picked = torch.log_softmax(found[:-1], -1)[range(len(window) - 1), window[1:]]
                total, alone = (total - picked.sum().item(), alone) if name == "memory" else (
                    total, alone - picked.sum().item())  # fmt: skip
            tokens += len(window) - 1
            size += len(model.tokenizer.decode(window[1:]).encode())
    assert result["tokens"] == tokens and result["documents"] == 6
    assert result["memory"]["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["backbone"]["nll"] == pytest.approx(alone / tokens, rel=1e-5)
    assert result["memory"]["ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result["memory"]["bpb"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert result["gain"]["nll"] == pytest.approx((alone - total) / tokens, rel=1e-4)
    low, high = result["gain"]["ci95"]
    assert low <= result["gain"]["nll"] <= high


def test_the_short_way_equals_the_long_way(final: Path) -> None:
    scorer = Scorer(Model.open(final), 0)
    ids = np.random.default_rng(1).integers(0, 299, size=(1, 40))
    assert scorer.readout.once
    short = scorer(ids)
    scorer.readout.once = False
    assert scorer(ids) == pytest.approx(short, rel=1e-5)
    assert len({round(v, 3) for v in short.values()}) == 4, "the four arms must differ on a random memory"


def test_a_head_that_does_more_is_noticed(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.open(final)
    scorer = Scorer(model, 0)
    backbone = model.engram.backbone
    original = backbone.forward

    def capped(*args: object, **options: object) -> object:
        output = original(*args, **options)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    monkeypatch.setattr(backbone, "forward", capped)
    ids = np.random.default_rng(1).integers(0, 299, size=(1, 40))
    found = scorer(ids)
    assert scorer.readout.plain_head is False
    with torch.inference_mode():
        logits = model.engram(torch.from_numpy(ids), model.memory(model.layout.rows(ids)))[0, :-1]
    lost = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[0, 1:]), reduction="sum")
    assert found["memory"] == pytest.approx(float(lost), rel=1e-6)


def test_shuffling_permutes_within_every_head(final: Path) -> None:
    layout = Model.open(final).layout
    offsets, primes = layout.offsets(3), [p for heads in layout.primes[3] for p in heads]
    for column, prime in enumerate(primes):
        rows = np.tile(offsets, (1, prime, 1))
        rows[0, :, column] += np.arange(prime)
        moved = shuffled({3: rows}, layout, 4)[3][0, :, column] - offsets[column]
        assert sorted(moved) == list(range(prime)), "every row of the head once"
        assert (moved == np.arange(prime)).mean() < 0.05


def test_the_same_call_gives_the_same_figures(early: Path, data: CorpusConfig) -> None:
    config = EvalConfig(early, data, max_tokens=200)
    result = evaluate(config)
    assert result == evaluate(config)
    assert result["documents"] == 6 and 150 <= result["tokens"] <= 200, "a small budget is spread over all documents"


def test_the_common_length_fills_the_budget() -> None:
    lengths = np.array([3, 10, 50, 7])
    for total in range(1, 71):
        level = common_length(lengths, total)
        assert np.minimum(lengths, level).sum() <= total
        assert level == 50 or np.minimum(lengths, level + 1).sum() > total


def test_what_cannot_be_measured_is_refused(final: Path, data: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one document of a few words")
    with pytest.raises(EvaluateError, match="1 documents"):
        evaluate(EvalConfig(final, CorpusConfig((str(tmp_path / "one.txt"),))))
    for name in ("sequence", "document_tokens", "bootstrap", "max_tokens"):
        with pytest.raises(EvaluateError, match=f"{name} 1 "):
            EvalConfig(final, data, **{name: 1})
