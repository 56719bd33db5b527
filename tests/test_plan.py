"""Plans: the class of every row against a table of classes written out, sizes against files, and the search against all
assignments tried."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import Progress
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.layout import Layout
from engram.builders.token_cache import TokenCache
from engram.kernels.codecs import CodecError, find_codec
from engram.quantize.plan import PlanError, TablePlan, frequent_plan
from engram.quantize.row_store import write_table
from engram.runtime.calibrate import CalibrateError, RowWeights, count_rows
from engram.runtime.plan_search import (
    SearchError,
    _errors,
    _hull,
    _Table,
    check_budget,
    plans_for,
    total_bytes,
    within_bytes,
    within_loss,
)

LAYOUT = Layout.build(
    dialect="demo", orders=(2, 3), heads=2, head_dim=32, layers=(1,), rows_per_head=97, pad_id=2, vocab_size=40,
    token_map=np.arange(40),
)  # fmt: skip
ROWS = LAYOUT.table_rows[1]
CODECS = ("int8", "nf4", "q4_0", None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_classes_counts_and_blocks_agree_with_a_table_written_out(seed: int, classes: int) -> None:
    generator = np.random.default_rng(seed)
    heads = tuple(int(k) for k in generator.integers(0, classes, size=LAYOUT.columns))
    listed_by = generator.choice(classes + 1, size=ROWS, p=[0.6, *[0.4 / classes] * classes]) - 1
    listed = {k: np.flatnonzero(listed_by == k).astype(np.int64) for k in range(classes)}
    plan = TablePlan(CODECS[:classes], heads, listed)
    column = np.searchsorted(LAYOUT.offsets(1), np.arange(ROWS), side="right") - 1
    expected = np.where(listed_by >= 0, listed_by, np.array(heads)[column])
    assert np.array_equal(plan.classes(np.arange(ROWS), LAYOUT, 1), expected)
    assert np.array_equal(np.concatenate(list(plan.blocks(LAYOUT, 1))), expected)
    assert plan.counts(LAYOUT, 1) == np.bincount(expected, minlength=classes).tolist()
    some = generator.integers(0, ROWS, size=50)
    assert np.array_equal(plan.classes(some, LAYOUT, 1), expected[some])


def test_a_uniform_plan_has_the_size_of_its_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(ROWS, 32)).astype(np.float32)
    made = write_table(tmp_path / "t", [rows], rows=ROWS, width=32, codec=find_codec("nf4"), layer=1)
    plan = TablePlan.uniform("nf4", LAYOUT)
    assert plan.bytes(LAYOUT, 1) == made.bytes and not plan.mixed and plan.name == "nf4"
    assert TablePlan(("int8", None), (0, 0, 1, 1)).mixed


def test_plans_that_no_table_can_follow_are_refused() -> None:
    with pytest.raises(PlanError, match="1 to 4 classes of rows, not 5"):
        TablePlan(("int8",) * 5, (0, 0, 0, 0))
    with pytest.raises(PlanError, match="class 1 has no codec"):
        TablePlan(("int8",), (0, 1, 0, 0))
    with pytest.raises(CodecError, match="'int9' is not known"):
        TablePlan(("int9",), (0, 0, 0, 0))
    with pytest.raises(PlanError, match="share 1 of frequent rows"):
        frequent_plan("nf4", LAYOUT, (np.arange(4), np.ones(4)), frequent=("int8", 1.0))


def test_frequent_rows_are_the_heaviest_and_unseen_ones_the_rest() -> None:
    rows = np.array([3, 10, 50, 200, 300])
    weight = np.array([1.0, 9.0, 2.0, 8.0, 3.0])
    plan = frequent_plan("nf4", LAYOUT, (rows, weight), frequent=("int8", 0.4), drop_unseen=True)
    found = dict(zip(range(ROWS), plan.classes(np.arange(ROWS), LAYOUT, 1).tolist(), strict=True))
    assert {plan.codecs[found[r]] for r in (10, 200)} == {"int8"}
    assert {plan.codecs[found[r]] for r in (3, 50, 300)} == {"nf4"}
    assert {plan.codecs[k] for r, k in found.items() if r not in rows} == {None}
    only = frequent_plan("nf4", LAYOUT, (rows, weight), unseen="q4_0")
    assert [only.codecs[k] for k in only.classes(np.array([3, 4]), LAYOUT, 1)] == ["nf4", "q4_0"]


def test_rows_are_counted_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path, layers=(1, 3)))
    (tmp_path / "a.txt").write_text(tiny.TEXT)
    (tmp_path / "b.txt").write_text(tiny.TEXT[40:140])
    cache = TokenCache.build(CorpusConfig((str(tmp_path / "*.txt"),)), checkpoint.folder / "tokenizer.json")
    monkeypatch.setattr("engram.runtime.calibrate._PIECE", 7)  # pieces must not break n-grams
    monkeypatch.setattr("engram.runtime.calibrate._MERGE", 50)
    found = count_rows(cache, checkpoint.layout, [0, 1], Progress())
    expected: dict[int, Counter[int]] = {1: Counter(), 3: Counter()}
    for document in (0, 1):
        for n, rows in checkpoint.layout.rows(cache.document(document)[None].astype(np.int64)).items():
            expected[n].update(rows.ravel().tolist())
    for n, weights in found.items():
        assert dict(zip(weights.rows_U.tolist(), weights.reads_U.tolist(), strict=True)) == expected[n]
        assert weights.reads == sum(expected[n].values())
        singles = sum(count == 1 for count in expected[n].values())
        unseen = checkpoint.layout.table_rows[n] - len(expected[n])
        assert weights.unseen_weight(checkpoint.layout.table_rows[n]) == pytest.approx(singles / unseen)
    with pytest.raises(CalibrateError, match="reads no row"):
        count_rows(cache, checkpoint.layout, [], Progress())


def table(seed: int, seen: int = 6) -> _Table:
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(ROWS, size=seen, replace=False))
    column = np.searchsorted(LAYOUT.offsets(1), rows, side="right") - 1
    return _Table(
        1, rows, generator.lognormal(0, 3, size=seen), column, np.full(LAYOUT.columns, 1e-9),
        np.diff(LAYOUT.offsets(1), append=ROWS) - np.bincount(column, minlength=LAYOUT.columns), ("int8", "nf4", "h"),
        np.array([34.0, 18.0, 10.0]), np.array([3e-5, 8e-3, 0.1]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_no_other_assignment_of_the_same_size_costs_less(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = table(seed)
    codecs = ("int8", "nf4", "q4_0")
    one = replace(one, codecs=codecs)
    for price in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1):
        plan = plans_for([one], price, LAYOUT, False)[1]
        got = [codecs.index(plan.codecs[k]) for k in plan.classes(one.rows_U, LAYOUT, 1)]
        size, cost = one.bytes_K[got].sum(), (one.cost_U * one.error_K[got]).sum()
        for other in itertools.product(range(3), repeat=len(got)):
            if one.bytes_K[list(other)].sum() <= size:
                assert (one.cost_U * one.error_K[list(other)]).sum() >= cost - 1e-12


def test_a_budget_is_kept_and_used(tmp_path: Path) -> None:
    one = table(1, seen=200)
    one = replace(one, codecs=("int8", "nf4"), bytes_K=one.bytes_K[:2], error_K=one.error_K[:2])
    least = TablePlan.uniform("nf4", LAYOUT).bytes(LAYOUT, 1)
    most = TablePlan.uniform("int8", LAYOUT).bytes(LAYOUT, 1)
    for budget in (least, (least + most) // 2, most):
        plans = within_bytes([one], LAYOUT, budget, False)
        assert total_bytes(plans, LAYOUT) <= budget
    assert within_bytes([one], LAYOUT, most + 10_000, False)[1].codecs == ("int8",)
    with pytest.raises(SearchError, match=f"at least {least:,} bytes, the budget is {least - 1:,}"):
        within_bytes([one], LAYOUT, least - 1, False)
    dropped = within_bytes([one], LAYOUT, least, True)[1]
    assert None in dropped.codecs


def test_the_smallest_plan_that_passes_is_found() -> None:
    one = table(2, seen=200)
    one = replace(one, codecs=("int8", "nf4"), bytes_K=one.bytes_K[:2], error_K=one.error_K[:2])

    def cost(plans: dict[int, TablePlan]) -> float:
        plan = plans[1]
        got = [("int8", "nf4").index(plan.codecs[k]) for k in plan.classes(one.rows_U, LAYOUT, 1)]
        return float((one.cost_U * one.error_K[got]).sum())

    coarse, fine = cost({1: TablePlan.uniform("nf4", LAYOUT)}), cost({1: TablePlan.uniform("int8", LAYOUT)})
    for bound in (coarse, (coarse + fine) / 2, coarse / 50 + fine):
        found = within_loss([one], LAYOUT, False, lambda plans: cost(plans) <= bound, "a bound", Progress())
        assert cost(found) <= bound
    with pytest.raises(SearchError, match=r"the finest codecs .* within --max-loss 0.5 nats"):
        within_loss([one], LAYOUT, False, lambda plans: False, "0.5 nats", Progress())


def test_only_codecs_that_are_best_at_some_price_are_left() -> None:
    size = np.array([36.0, 34, 18, 18, 14, 10, 19])
    error = np.array([1e-6, 1e-5, 8e-3, 1e-2, 5e-2, 0.1, 9e-3])
    hull = _hull(size, error)
    assert hull[0] == 0 and hull[-1] == 5, "finest first, the ends stay"
    assert all(size[a] > size[b] and error[a] < error[b] for a, b in itertools.pairwise(hull))
    assert 3 not in hull and 6 not in hull, "beaten by another of its size"


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_table_keeps_the_codecs_with_which_it_costs_least(seed: int, unseen: bool) -> None:
    one = table(seed, seen=200)
    names = ("bf16", "int8", "nf4", "h3", "h2", "h1")
    size, error = np.array([64.0, 34, 18, 14, 10, 6]), np.array([3e-6, 3e-5, 8e-3, 3e-2, 0.1, 0.5])
    one = replace(one, codecs=names, bytes_K=size, error_K=error, unseen_C=np.array([1e-3, 0.1, 1.0, 30.0]))
    costs_N = np.concatenate([one.cost_U, np.repeat(one.unseen_C, one.unseen_rows_C)])
    for price in (1e-6, 1e-4, 1e-2, 1.0):
        spent = {}
        for kept in itertools.combinations(range(6), 4):
            here = costs_N if unseen else one.cost_U
            spent[kept] = (here[:, None] * error[list(kept)] + price * size[list(kept)]).min(1).sum()
            assert one.spent(price, kept, unseen) == pytest.approx(spent[kept], rel=1e-9)
        assert spent[tuple(one.chosen(price, 4, unseen))] == min(spent.values())
        plan = plans_for([one], price, LAYOUT, not unseen)[1]
        assert len(plan.codecs) <= 4 and (unseen or None in plan.codecs)


def test_a_codec_that_the_width_forbids_is_no_candidate() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    names, sizes, errors = _errors(np.arange(50), rows, 1, ("int8", "q4_0"))
    assert names == ["int8"] and sizes[0] == 4096 / (4096 // 32) and 0 < errors[0] < 1e-3


@pytest.mark.parametrize(
    ("width", "fit"), [(2048, ["bf16", "int8", "h2"]), (2049, ["int8"]), (4096, ["h2"])]
)
def test_a_codec_whose_rows_do_not_fit_a_page_is_no_candidate(width: int, fit: list[str]) -> None:
    rows = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    names, sizes, _ = _errors(np.arange(3), rows, 1, ("bf16", "int8", "h2"))
    assert names == fit and sizes.max() <= 4096
    with pytest.raises(SearchError, match="rows of width 5000 fit a page of 4096 bytes in none of the codecs bf16"):
        _errors(np.arange(3), np.ones((3, 5000), np.float32), 1, ("bf16",))


def test_an_error_names_the_row_of_the_table() -> None:
    rows = np.ones((4, 32), np.float32)
    rows[2, 5] = np.nan
    with pytest.raises(CodecError, match="layer 7: row 903, column 5 is nan"):
        _errors(np.array([3, 80, 903, 1000]), rows, 7, ("int8", "h2"))


def test_a_budget_that_no_text_can_meet_is_known_from_the_layout() -> None:
    coarsest = min(TablePlan.uniform(c, LAYOUT).bytes(LAYOUT, 1) for c in ("int8", "nf4", "h4", "h2", "h1"))
    check_budget(LAYOUT, coarsest, False)
    with pytest.raises(SearchError, match=f"at least {coarsest:,} bytes, the budget is {coarsest - 1:,}") as found:
        check_budget(LAYOUT, coarsest - 1, False)
    assert "--drop-unseen" in found.value.hint
    check_budget(LAYOUT, coarsest - 1, True)
    with pytest.raises(SearchError, match="the budget is 1$") as found:
        check_budget(LAYOUT, 1, True)
    assert "--drop-unseen" not in found.value.hint
    with pytest.raises(SearchError) as found:
        within_bytes([replace(table(1, seen=200), codecs=("int8", "nf4", "h2"))], LAYOUT, 3000, True)
    assert "--drop-unseen" not in found.value.hint


def test_a_report_parts_the_bytes_of_a_table(tmp_path: Path) -> None:
    plan = TablePlan(("int8", "nf4", None), (0, 1, 2, 1), {0: np.array([150, 200])})
    told = plan.to_json(LAYOUT, 1)
    assert [c["rows"] for c in told["classes"]] == plan.counts(LAYOUT, 1) and sum(plan.counts(LAYOUT, 1)) == ROWS
    for entry in told["classes"]:
        if entry["codec"] is None:
            assert entry["bytes"] == 0
        else:
            rows = np.zeros((entry["rows"], 32), np.float32)
            made = write_table(
                tmp_path / entry["codec"], [rows], rows=len(rows), width=32, codec=find_codec(entry["codec"]), layer=1
            )
            assert entry["bytes"] == made.bytes
    assert told["bytes"] == plan.bytes(LAYOUT, 1) > sum(c["bytes"] for c in told["classes"]), "the map takes bytes too"


def test_unseen_rows_share_the_weight_of_first_times() -> None:
    weights = RowWeights(np.array([1, 2, 5]), np.array([1, 4, 1]), np.array([0.5, 0.25, 1.0]), 6)
    assert weights.unseen_weight(13) == pytest.approx(2 * (0.5 + 1 + 1) / 6 / 10)
    assert weights.unseen_weight(3) == 0
