"""The judge's figures against forward passes by hand, the controls, and what is written against what was planned."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from texts import PLAIN_WORDS

from engram import Progress
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.process_memory import resident_bytes
from engram.quantize.package import ExportConfig, export_package, open_source
from engram.quantize.plan import TablePlan
from engram.quantize.tables import QuantizeConfig, quantize
from engram.runtime.engine import Model
from engram.runtime.quality import Judge, Measured, Window, continuations, shuffled_rows, zero_rows
from engram.runtime.quality_gate import Gate, QualityConfig, float_model
from engram.runtime.quantize_config import Bound, QualityError
from engram.runtime.readout import Readout
from engram.runtime.row_sources import FloatTables, PlannedRows, StoredRows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=[(3,), (1, 3)], ids=["final", "early"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), layers=request.param)


def windows(count: int = 5, length: int = 30) -> list[Window]:
    generator = np.random.default_rng(3)
    return [Window(i // 2, generator.integers(2, 290, size=length + i), 1 + i % 3) for i in range(count)]


def judged(checkpoint: Checkpoint) -> tuple[Judge, FloatTables]:
    rows = FloatTables(checkpoint)
    return Judge(float_model(checkpoint), rows, windows(), Progress()), rows


def by_hand(model: Model, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of all tokens at the compared positions, and the tokens."""
    ids = torch.from_numpy(window.ids_T[None])
    with torch.inference_mode():
        logits = model.engram(ids, model.memory(model.layout.rows(window.ids_T[None])))[0]
    return logits[window.first - 1 : -1].log_softmax(-1), ids[0, window.first :]


def test_every_figure_equals_a_forward_pass_by_hand(made: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made)
    judge, _ = judged(checkpoint)
    quantize(QuantizeConfig(made, tmp_path / "q4", tables="nf4"))
    export_package(ExportConfig(made, tmp_path / "float"))
    export_package(ExportConfig(tmp_path / "q4", tmp_path / "small"))
    before, after = Model.open(tmp_path / "float"), Model.open(tmp_path / "small")
    nats, kl, same = [], [], []
    for window in windows():
        (float_TV, ids_T), (own_TV, _) = by_hand(before, window), by_hand(after, window)
        nats.append(-own_TV.gather(1, ids_T[:, None])[:, 0])
        kl.append((float_TV.exp() * (float_TV - own_TV)).sum(1))
        same.append(float_TV.argmax(1) == own_TV.argmax(1))
    with open_source(tmp_path / "q4") as (_, _, tables):
        assert tables is not None
        measured = judge.measure(StoredRows(tables))
    assert np.allclose(measured.nats_N, torch.cat(nats).numpy(), atol=2e-5)
    assert np.allclose(measured.kl_N, torch.cat(kl).numpy(), atol=2e-6)
    assert np.array_equal(measured.same_N, torch.cat(same).numpy())
    assert 0 < measured.kl_N.mean() and not measured.same_N.all(), "or nothing was compared"
    change = judge.change(measured, 0)
    assert change["nll"] == pytest.approx(measured.nats_N.mean() - judge.float.nats_N.mean(), abs=1e-12)
    assert change["ci95"][0] <= change["nll"] <= change["ci95"][1]
    for model in (before, after):
        model.close()


def test_planned_rows_are_the_written_ones_bit_for_bit(made: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made)
    judge, rows = judged(checkpoint)
    plans = {n: TablePlan.uniform("nf4", checkpoint.layout) for n in checkpoint.layout.layers}
    planned = PlannedRows(rows, checkpoint.layout, plans)
    quantize(QuantizeConfig(made, tmp_path / "q4", tables="nf4"))
    with open_source(tmp_path / "q4") as (_, _, tables):
        assert tables is not None
        stored = StoredRows(tables)
        for window in windows():
            for n, wanted in checkpoint.layout.rows(window.ids_T[None]).items():
                assert np.array_equal(planned(n, wanted), stored(n, wanted))
        assert judge.row_errors(planned) == judge.row_errors(stored)


def test_the_float_rows_cost_nothing_and_the_controls_cost_what_they_must(made: Path) -> None:
    checkpoint = open_checkpoint(made)
    judge, rows = judged(checkpoint)
    same = judge.measure(rows)
    assert judge.change(same, 0)["nll"] == pytest.approx(0, abs=1e-7)
    assert judge.divergence(same, 0)["kl"]["max"] < 1e-6 and judge.divergence(same, 0)["top1"] == 1
    assert set(judge.row_errors(rows).values()) == {0.0}
    assert set(judge.row_errors(zero_rows(rows)).values()) == {1.0}
    without = judge.measure(None)
    assert np.allclose(without.nats_N, judge.base.nats_N, atol=1e-5)
    moved = judge.measure(shuffled_rows(rows, checkpoint.layout, 0))
    assert abs(judge.change(moved, 0)["nll"]) > 1e-3


def test_a_share_of_the_gain_is_told_only_of_a_gain(made: Path) -> None:
    judge, rows = judged(open_checkpoint(made))
    same = judge.measure(rows)
    noise = np.random.default_rng(0).normal(0, 0.1, size=len(judge.document_N))
    noise -= noise.mean()
    for gain, told in ((-0.5, False), (0.0, False), (0.5, True)):
        judge.base = Measured(judge.float.nats_N + gain + noise)
        found = judge.gain(0)
        assert found["nll"] == pytest.approx(gain, abs=1e-12)
        assert found["ci95"][0] <= found["nll"] <= found["ci95"][1]
        assert (found["ci95"][0] > 0) == told
        kept = judge.gain_kept(same, 0)
        half = judge.gain_kept(Measured((judge.base.nats_N + judge.float.nats_N) / 2), 0)
        if told:
            assert kept["share"] == pytest.approx(1, abs=1e-5) and half["share"] == pytest.approx(0.5)
            assert half["ci95"] == pytest.approx([0.5, 0.5])
        else:
            assert kept == half == {"share": None, "ci95": None}


def test_row_errors_are_weighted_by_the_square_of_the_gate(made: Path) -> None:
    checkpoint = open_checkpoint(made)
    judge, rows = judged(checkpoint)
    last = checkpoint.layout.layers[-1]
    weights = np.concatenate([opening[last] for _, opening in judge.openings()])
    assert ((0 < weights) & (weights < 1)).all() and weights.std() > 0.01
    half = judge.row_errors(lambda n, wanted: rows(n, wanted) * np.float32(0.5))
    assert half[last] == pytest.approx(0.5), "a share that is the same for every row does not depend on weights"

    def first_only(n: int, wanted: np.ndarray) -> np.ndarray:
        found = rows(n, wanted).copy()
        found[:, 0] = 0
        return found

    lost = whole = 0.0
    for (wanted, opening), window in zip(judge.openings(), judge.windows, strict=True):
        values = np.square(rows(last, wanted[last][None])[0].astype(np.float64)).sum(1)
        lost += opening[last][0] * values[0]
        whole += float(opening[last] @ values)
    assert judge.row_errors(first_only)[last] == pytest.approx(math.sqrt(lost / whole))


def test_continuations_are_what_a_session_writes(made: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made)
    prompts = [Window(w.document, w.ids_T[:12]) for w in windows()]
    texts = continuations(float_model(checkpoint), FloatTables(checkpoint), prompts, 9, Progress())
    export_package(ExportConfig(made, tmp_path / "float"))
    model = Model.open(tmp_path / "float")
    for prompt, text in zip(prompts, texts, strict=True):
        session, ids = model.session(), prompt.ids_T.tolist()
        feed = list(ids)
        for _ in range(9):
            feed = [int(session.feed(feed).argmax())]
            ids += feed
        assert text.ids_T.tolist() == ids and text.first == 12
    model.close()


@pytest.fixture
def held_out(tmp_path: Path) -> CorpusConfig:
    generator = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / f"text-{i}.txt").write_text(" ".join(generator.choice(PLAIN_WORDS, size=60)))
    return CorpusConfig((str(tmp_path / "text-*.txt"),))


def test_the_verdict_follows_the_bound(made: Path, tmp_path: Path, held_out: CorpusConfig) -> None:
    """Of two models one is the worse: against the other it fails a bound of nothing, and passes a wide one."""
    other = tiny.write_checkpoint(tmp_path / "other", layers=open_checkpoint(made).layout.layers, seed=9)
    ways = {"to": (made, other), "from": (other, made)}
    reports = {}
    for way, (reference, source) in ways.items():
        quantize(QuantizeConfig(source, tmp_path / way, tables="nf4"))
        for text in ("100%", "0", "5"):
            config = QualityConfig(held_out, Bound.parse(text), 600, prompt_tokens=8, written_tokens=6)
            reports[way, text] = Gate(reference, config, Progress())(tmp_path / way)
    for (_, text), report in reports.items():
        assert report["passed"] == (report["change"]["ci95"][1] <= report["max_loss"]["nats"]), text
    worse = max(ways, key=lambda way: reports[way, "0"]["change"]["nll"])
    assert [reports[worse, text]["passed"] for text in ("100%", "0", "5")] == [True, False, True]
    report = reports[worse, "100%"]
    assert report["max_loss"]["nats"] == pytest.approx(report["loss"]["float"])
    assert report["documents"] == 8 and report["continuations"]["texts"] == 8
    assert set(report["loss"]) == {"backbone", "float", "quantized", "zero_table", "shuffled_rows"}
    assert "parts" not in report, "the backbone was not quantized"


@pytest.mark.parametrize("text", ["half", "-1", "-0.1%", "nan", "inf", ""])
def test_a_bound_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(QualityError, match="neither nats a token nor a percentage"):
        Bound.parse(text)


def test_a_checkpoint_of_another_layout_is_refused(made: Path, tmp_path: Path, held_out: CorpusConfig) -> None:
    other = tiny.write_checkpoint(tmp_path / "other", layers=(3,), rows_per_head=307)
    quantize(QuantizeConfig(other, tmp_path / "q4"))
    with pytest.raises(QualityError, match="has another layout"):
        Gate(made, QualityConfig(held_out, max_tokens=100), Progress())(tmp_path / "q4")


@pytest.fixture(scope="module", params=[(3,), (1, 3)], ids=["final", "early"])
def capped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory on a backbone whose logits are capped: its head is more than one product."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("capped")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=16_384, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, final_logit_softcapping=2.0,
        initializer_range=0.5, eos_token_id=0, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder / "backbone")
    return tiny.write_checkpoint(folder, layers=request.param, backbone=folder / "backbone")


def test_a_capped_head_is_judged_by_its_own_logits(capped: Path) -> None:
    checkpoint = open_checkpoint(capped)
    judge, rows = judged(checkpoint)
    model, float_nats, zero_nats, kl = float_model(checkpoint), [], [], []
    plain = Readout(model)
    with torch.inference_mode():
        plain.logits(plain.base(torch.arange(2, 20)[None]))
        for window in windows():
            wanted = checkpoint.layout.rows(window.ids_T[None])
            both = []
            for source in (rows, zero_rows(rows)):
                memory = {n: torch.from_numpy(source(n, wanted[n])) for n in checkpoint.layout.layers}
                logits = model(torch.from_numpy(window.ids_T[None]), memory)[0, window.first - 1 : -1]
                assert logits.abs().max() <= 2 and logits.abs().quantile(0.9) > 1, "the cap shapes them"
                both.append(logits.double().log_softmax(-1))
            following = torch.from_numpy(window.ids_T[window.first :])[:, None]
            float_nats.append(-both[0].gather(1, following)[:, 0])
            zero_nats.append(-both[1].gather(1, following)[:, 0])
            kl.append((both[0].exp() * (both[0] - both[1])).sum(-1))
    assert plain.plain_head is False
    assert np.allclose(judge.float.nats_N, torch.cat(float_nats).numpy(), atol=2e-5)
    measured = judge.measure(zero_rows(rows), plain)
    assert np.allclose(measured.nats_N, torch.cat(zero_nats).numpy(), atol=2e-5)
    assert measured.kl_N is not None and np.allclose(measured.kl_N, torch.cat(kl).numpy(), atol=2e-6)
    assert measured.kl_N.mean() > 1e-4
    assert np.allclose(judge.measure(None).nats_N, judge.base.nats_N, atol=1e-5)


def test_states_that_are_not_kept_are_computed_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(made)
    other = Readout(float_model(checkpoint))
    figures = []
    for room in (1 << 20, 3 * 4 * 32 * 31, 0):
        monkeypatch.setattr("engram.runtime.quality.KEPT_BYTES", room)
        judge, rows = judged(checkpoint)
        for own in (None, other):
            found = [judge.measure(zero_rows(rows), own), judge.measure(None, own), judge.measure(rows, own)]
        kept = sum(states.nbytes for states in judge._kept.values())
        assert kept <= room and bool(kept) == bool(room)
        figures.append([(one.nats_N, one.kl_N, one.same_N) for one in found])
    for other_room in figures[1:]:
        for one, same in zip(figures[0], other_room, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))


def test_logits_of_a_whole_text_are_never_held(capped: Path) -> None:
    """1,024 tokens of a vocabulary of 16,384: their logits take 67 MB, twice that to compare."""
    checkpoint, generator = open_checkpoint(capped), np.random.default_rng(0)
    model, rows = float_model(checkpoint), FloatTables(checkpoint)
    texts = [Window(i, generator.integers(2, 290, size=32)) for i in range(32)]
    short = Judge(model, rows, texts[:2], Progress())
    short.measure(zero_rows(rows))
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident_bytes()["rss_bytes"]
    judge = Judge(model, rows, texts, Progress())
    judge.measure(zero_rows(rows))
    assert resident_bytes()["peak_rss_bytes"] - before < 48 << 20
