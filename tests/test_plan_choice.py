"""What a calibration text decides, and what is told of the price: against counts and forward passes by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from texts import write_lines

from engram import Progress
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.token_cache import TokenCache
from engram.quantize.package import open_source
from engram.runtime.calibrate import CalibrateError
from engram.runtime.plan_choice import Choice, choose_plans, held_out, overlap
from engram.runtime.plan_search import SearchError
from engram.runtime.quality_gate import float_model
from engram.runtime.quantize_config import Bound, QuantizeRun
from engram.runtime.quantize_run import quantize_run
from engram.runtime.row_sources import StoredRows


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), layers=(1, 3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))


def text(folder: Path, count: int, words: int = 60, seed: int = 0) -> CorpusConfig:
    return write_lines(folder / f"text-{count}-{words}-{seed}.jsonl", np.random.default_rng(seed), count, words)


def chosen(made: Path, data: CorpusConfig, tables: str, **options: Any) -> Choice:
    return choose_plans(QuantizeRun(made, made / "none", tables, data, **options), Progress())


def tokens_of(made: Path, data: CorpusConfig) -> TokenCache:
    return TokenCache.build(data, made / "tokenizer.json")


def test_what_dropping_costs_is_measured_on_documents_that_were_not_counted(made: Path, tmp_path: Path) -> None:
    data, layout = text(tmp_path, 12, words=12), open_checkpoint(made).layout
    config = QuantizeRun(made, tmp_path / "out", "h1", data, drop_unseen=True)
    told = json.loads(json.dumps(quantize_run(config)))
    tokens = tokens_of(made, data)
    apart = held_out(tokens, config.search_tokens)
    counted = [i for i in range(12) if i not in apart]
    assert len(apart) == 3 and told["calibration"]["counted_documents"] == 9
    assert told["calibration"]["counted_tokens"] == int(tokens.lengths()[counted].sum())
    model, lost, predicted = float_model(open_checkpoint(made)), [], 0
    with open_source(tmp_path / "out") as (_, _, tables), torch.inference_mode():
        assert tables is not None
        for i in apart:
            ids_T = tokens.document(i).astype(np.int64)
            ids, wanted = torch.from_numpy(ids_T[None]), layout.rows(ids_T[None])
            for n, rows in (("float", None), ("stored", StoredRows(tables))):
                memory = {
                    m: torch.from_numpy(
                        open_checkpoint(made).table(m)[wanted[m]].reshape(1, len(ids_T), -1) if rows is None
                        else rows(m, wanted[m])
                    ) for m in layout.layers
                }  # fmt: skip
                nats = torch.nn.functional.cross_entropy(model(ids, memory)[0, :-1], ids[0, 1:], reduction="sum")
                lost.append((n, float(nats)))
            predicted += len(ids_T) - 1
    by_hand = (sum(x for n, x in lost if n == "stored") - sum(x for n, x in lost if n == "float")) / predicted
    found = told["held_out"]
    assert found["change"] == pytest.approx(by_hand, abs=2e-5) and abs(by_hand) > 1e-3
    assert found["tokens"] == predicted and found["documents"] == 3
    assert found["ci95"][0] <= found["change"] <= found["ci95"][1]


def test_every_class_says_its_rows_bytes_and_look_ups(made: Path, tmp_path: Path) -> None:
    data, layout = text(tmp_path, 12, words=25), open_checkpoint(made).layout
    choice = chosen(made, data, "nf4", frequent=("int8", 0.2), drop_unseen=True)
    tokens = tokens_of(made, data)
    apart = held_out(tokens, 8192)
    for n, plan in choice.plans.items():
        told = choice.traded["plans"][str(n)]
        read: list[int] = []
        fresh: list[int] = []
        for i in range(12):
            rows = layout.rows(tokens.document(i)[None].astype(np.int64))[n].ravel().tolist()
            (fresh if i in apart else read).extend(rows)
        classes = plan.classes(np.arange(layout.table_rows[n]), layout, n)
        assert [c["codec"] for c in told["classes"]] == ["nf4", "int8", None]
        for k, entry in enumerate(told["classes"]):
            assert entry["rows"] == (classes == k).sum()
            assert entry["look_up_share"] == pytest.approx(np.mean(classes[read] == k))
            assert entry["held_out_share"] == pytest.approx(np.mean(classes[fresh] == k))
        dropped = told["classes"][2]
        assert dropped["bytes"] == dropped["look_up_share"] == 0 < dropped["held_out_share"]
        assert told["look_ups"] == len(read) and told["seen_rows"] == len(set(read))
        once = sum(read.count(row) == 1 for row in set(read))
        assert told["first_time_share"] == pytest.approx(once / len(read))
    assert choice.traded["table_bytes"] == sum(plan["bytes"] for plan in choice.traded["plans"].values())


def test_a_search_tells_every_plan_that_it_tried(made: Path, tmp_path: Path) -> None:
    bound = Bound.parse("0.5%")
    told = chosen(made, text(tmp_path, 12), "auto", max_loss=bound).traded
    assert told["max_loss"]["asked"] == "0.5%" and len(told["tried"]) > 2
    for one in told["tried"]:
        assert one["passed"] == (one["ci95"][1] <= told["max_loss"]["nats"]) and one["ci95"][0] <= one["change"]
    best = [one for one in told["tried"] if one["passed"]][-1]
    assert best["table_bytes"] == told["table_bytes"] and told["held_out"]["change"] == best["change"]
    assert best["table_bytes"] == min(one["table_bytes"] for one in told["tried"] if one["passed"])
    assert told["held_out"]["relative"] * told["max_loss"]["nats"] == pytest.approx(bound.value * best["change"])


def test_equal_texts_lie_on_one_side(made: Path, tmp_path: Path) -> None:
    data = text(tmp_path, 12)
    path = Path(data.sources[0])
    path.write_text("\n".join(3 * path.read_text().splitlines()))
    tokens = tokens_of(made, data)
    apart = held_out(tokens, 8192)
    hashes = tokens.hashes()
    assert len(apart) == 3 and len(set(hashes[apart].tolist())) == 3
    told = chosen(made, data, "nf4", unseen="h2").traded["calibration"]
    assert told["documents"] == 36 and told["counted_documents"] == 27


def test_no_more_is_held_out_than_is_measured_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text(tmp_path, 60, words=40)
    tokens = tokens_of(made, data)
    assert len(held_out(tokens, 8192)) == 12, "every fifth"
    few = held_out(tokens, 200)
    assert 2 <= len(few) <= 8
    read: list[int] = []
    real = TokenCache.document
    monkeypatch.setattr(TokenCache, "document", lambda self, i: read.append(i) or real(self, i))  # type: ignore[func-returns-value]
    monkeypatch.setattr("engram.runtime.plan_choice._OPENING_TOKENS", 200)
    told = chosen(made, data, "nf4", drop_unseen=True, search_tokens=200).traded
    assert told["calibration"]["counted_documents"] == 60 - len(few) and told["held_out"]["documents"] == len(few)
    assert sorted(set(read)) == list(range(60)) and len(read) < 60 + 10, "only a sample is read into windows"


def test_too_few_documents_are_named(made: Path, tmp_path: Path) -> None:
    data = text(tmp_path, 5)
    with pytest.raises(CalibrateError, match=r"has 5 different documents .* --max-loss 6 are needed") as found:
        chosen(made, data, "auto", max_loss=Bound(0.1))
    assert "--calibrate" in found.value.hint and "--max-tokens" not in str(found.value) + found.value.hint
    assert chosen(made, text(tmp_path, 6), "auto", max_loss=Bound(5.0)).traded["held_out"]["documents"] == 2
    heard = Heard()
    config = QuantizeRun(made, tmp_path / "none", "nf4", text(tmp_path, 1), drop_unseen=True)
    told = choose_plans(config, heard).traded
    assert told["held_out"] is None and told["calibration"]["counted_documents"] == 1
    assert told["plans"]["1"]["classes"][0]["held_out_share"] is None
    assert any("too few documents to hold some out" in said for said in heard.said)


def test_a_budget_below_the_least_is_refused_before_the_text_is_read(made: Path, tmp_path: Path) -> None:
    nowhere = CorpusConfig((str(tmp_path / "none.txt"),))
    with pytest.raises(SearchError, match="the budget is 1,000$") as found:
        chosen(made, nowhere, "auto", budget=1_000)
    assert "--drop-unseen" in found.value.hint
    with pytest.raises(SearchError, match="the budget is 10$") as found:
        chosen(made, nowhere, "auto", budget=10, drop_unseen=True)
    assert "--drop-unseen" not in found.value.hint


def test_a_bound_that_the_finest_codecs_miss_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"within --max-loss 0% \(0.00000 nats\)") as found:
        chosen(made, text(tmp_path, 12), "auto", max_loss=Bound(0.0, True))
    assert "auto" not in found.value.hint


def test_shared_documents_are_counted(made: Path, tmp_path: Path) -> None:
    one, other = text(tmp_path, 12), text(tmp_path, 9, seed=5)
    lines = [Path(data.sources[0]).read_text().splitlines() for data in (one, other)]
    Path(other.sources[0]).write_text("\n".join([*lines[1], *lines[0][:4], lines[0][0]]))
    choice = chosen(made, one, "nf4", unseen="h2")
    assert overlap(choice.hashes, tokens_of(made, other).hashes()) == 4
    assert overlap(choice.hashes, tokens_of(made, text(tmp_path, 9, seed=6)).hashes()) == 0
    assert overlap(choice.hashes, choice.hashes) == 12
