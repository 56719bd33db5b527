"""`--tables auto`: the cheapest assignment of codecs to rows, heads and tables under a bound of bytes or of loss.

What rounding costs is taken as quadratic: a row costs weight * head * |x|^2 * e^2, where e is the codec's relative
error and `head` says how strongly the head's values reach the residual stream. For a price per byte every row then has
its best codec. Only the price is searched, and each plan that is tried for a loss is measured, not predicted.

Shape letters: C columns, D row width, U distinct rows, K codecs, H hidden width, E = C * D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders.layout import Layout
from engram.kernels.codecs import CodecError, find_codec
from engram.quantize.plan import MOST_CLASSES, TablePlan
from engram.quantize.row_store import PAGE
from engram.runtime.calibrate import RowWeights
from engram.runtime.row_sources import FloatTables, through_codec

CANDIDATES = ("bf16", "int8", "int8-row", "iq4_nl", "nf4", "q4_0", "h4", "h3", "h2", "h1")
_SAMPLE = 4096  # rows on which a codec's error is measured
_STEPS = 28  # bisections of the price
_MEASURED_STEPS = 7  # each costs a pass over the text


class SearchError(EngramError):
    """A bound that no assignment meets, or rows that no codec holds."""


@dataclass(frozen=True)
class _Table:
    """One layer, as the search sees it."""

    layer: int
    rows_U: NDArray[np.int64]
    cost_U: NDArray[np.float64]  # of a relative error of 1
    column_U: NDArray[np.int64]
    unseen_C: NDArray[np.float64]  # the same of one unseen row of each head
    unseen_rows_C: NDArray[np.int64]
    codecs: tuple[str, ...]  # finest first, each the best at some price
    bytes_K: NDArray[np.float64]
    error_K: NDArray[np.float64]  # squared

    @cached_property
    def _ascending(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Costs in order, and their sums from the first on."""
        costs = np.sort(self.cost_U)
        return costs, np.concatenate([[0.0], np.cumsum(costs)])

    def spent(self, price: float, codecs: Iterable[int], unseen: bool) -> float:
        """What all rows cost, bytes and errors, where each has the best of these codecs."""
        kept = list(codecs)
        costs, sums = self._ascending
        finer = np.array([
            price * (self.bytes_K[fine] - self.bytes_K[coarse]) / (self.error_K[coarse] - self.error_K[fine])
            for fine, coarse in pairwise(kept)
        ])  # fmt: skip
        ends = np.concatenate([[len(costs)], np.searchsorted(costs, finer, side="right"), [0]])
        rows, weights = -np.diff(ends), -np.diff(sums[ends])
        total = float((self.error_K[kept] * weights + price * self.bytes_K[kept] * rows).sum())
        if unseen:
            each_C = (self.unseen_C[:, None] * self.error_K[kept] + price * self.bytes_K[kept]).min(1)
            total += float(each_C @ self.unseen_rows_C)
        return total

    def chosen(self, price: float, most: int, unseen: bool) -> list[int]:
        """The codecs, at most so many of them, with which the table costs least."""
        every = range(len(self.codecs))
        return list(min(combinations(every, min(most, len(every))), key=lambda kept: self.spent(price, kept, unseen)))


def plans_for(
    tables: Sequence[_Table], price: float, layout: Layout, drop_unseen: bool, codecs_at: float | None = None
) -> dict[int, TablePlan]:
    """The best codec of every row when a byte costs `price`, among those that are chosen at the price `codecs_at`."""
    found = {}
    for table in tables:
        kept = table.chosen(codecs_at or price, MOST_CLASSES - drop_unseen, not drop_unseen)
        error_K, bytes_K = table.error_K[kept], price * table.bytes_K[kept]
        best_U = (table.cost_U[:, None] * error_K + bytes_K).argmin(1)
        best_C = (table.unseen_C[:, None] * error_K + bytes_K).argmin(1)
        codecs: list[str | None] = [table.codecs[k] for k in kept]
        if drop_unseen:
            codecs.append(None)
            best_C = np.full(layout.columns, len(codecs) - 1)
        own_U = best_C[table.column_U]
        listed = {k: table.rows_U[(best_U == k) & (own_U != k)] for k in range(len(kept))}
        found[table.layer] = _compact(codecs, best_C, {k: rows for k, rows in listed.items() if len(rows)})
    return found


def _compact(codecs: Sequence[str | None], heads_C: Any, listed: Mapping[int, Any]) -> TablePlan:
    """The plan without classes that nothing has."""
    used = sorted({*map(int, heads_C), *listed})
    number = {old: new for new, old in enumerate(used)}
    return TablePlan(
        tuple(codecs[k] for k in used), tuple(number[int(k)] for k in heads_C),
        {number[k]: rows for k, rows in listed.items()},
    )  # fmt: skip


def look_at(
    source: FloatTables, layout: Layout, weights: Mapping[int, RowWeights], values: Mapping[int, NDArray[np.float32]],
    *, candidates: Sequence[str] = CANDIDATES,
) -> list[_Table]:  # fmt: skip
    """What the search needs of every table. `values`: each layer's value projection [H, E]."""
    found = []
    for layer in layout.layers:
        weight = weights[layer]
        width = layout.head_dim
        reach_C = np.square(values[layer].astype(np.float64)).sum(0).reshape(layout.columns, width).mean(1)
        norm_U = np.concatenate([
            np.square(source.rows(layer, weight.rows_U[i : i + (1 << 16)]).astype(np.float64)).sum(1)
            for i in range(0, len(weight.rows_U), 1 << 16)
        ])  # fmt: skip
        column_U = np.searchsorted(layout.offsets(layer), weight.rows_U, side="right") - 1
        rows_C = np.diff(layout.offsets(layer), append=layout.table_rows[layer])
        generator = np.random.default_rng(layer)
        drawn = generator.integers(0, layout.table_rows[layer], size=_SAMPLE)
        typical = float(np.square(source.rows(layer, np.unique(drawn)).astype(np.float64)).sum(1).mean())
        unseen = weight.unseen_weight(layout.table_rows[layer])
        heavy = weight.weight_U * norm_U
        chance = heavy / heavy.sum() if heavy.sum() else None
        sample = np.unique(generator.choice(weight.rows_U, size=min(_SAMPLE, len(weight.rows_U)), p=chance))
        names, size_K, error_K = _errors(sample, source.rows(layer, sample), layer, candidates)
        hull = _hull(size_K, error_K)
        found.append(_Table(
            layer, weight.rows_U, heavy * reach_C[column_U], column_U, unseen * typical * reach_C,
            rows_C - np.bincount(column_U, minlength=layout.columns), tuple(names[k] for k in hull),
            size_K[hull], error_K[hull],
        ))  # fmt: skip
    return found


def fitting(width: int, candidates: Sequence[str] = CANDIDATES) -> dict[str, float]:
    """Bytes of a row, with its share of the page's unused end, of every codec whose rows of this width fit a page."""
    found = {}
    for name in candidates:
        try:
            size = find_codec(name).row_bytes(width)
        except CodecError:
            continue
        if size <= PAGE:
            found[name] = PAGE / (PAGE // size)
    if not found:
        raise SearchError(
            f"rows of width {width} fit a page of {PAGE} bytes in none of the codecs {', '.join(candidates)}",
            hint="use a layout with a smaller head_dim",
        )
    return found


def _errors(rows_U: Any, values_UD: Any, layer: int, candidates: Sequence[str]) -> tuple[list[str], Any, Any]:
    """Codecs that the width allows, their bytes a row, and their squared relative error on these rows."""
    errors = []
    whole = float(np.square(values_UD.astype(np.float64)).sum())
    sizes = fitting(values_UD.shape[1], candidates)
    for name in sizes:
        made_UD = through_codec(name, rows_U, values_UD, layer)
        errors.append(float(np.square(made_UD - values_UD.astype(np.float64)).sum()) / whole if whole else 0.0)
    return list(sizes), np.array(list(sizes.values())), np.array(errors)


def _hull(size_K: Any, error_K: Any) -> list[int]:
    """The codecs that are best at some price, largest first: the lower convex hull."""
    hull: list[int] = []
    for k in sorted(range(len(size_K)), key=lambda k: (size_K[k], error_K[k])):
        while hull and error_K[k] >= error_K[hull[-1]] and size_K[k] >= size_K[hull[-1]]:
            break
        else:
            while len(hull) > 1 and _above(size_K, error_K, hull[-2], hull[-1], k):
                hull.pop()
            hull.append(k)
    return hull[::-1]


def _above(size_K: Any, error_K: Any, small: int, middle: int, large: int) -> bool:
    """Whether a codec is no better than the line between a smaller and a larger one."""
    share = (size_K[middle] - size_K[small]) / (size_K[large] - size_K[small])
    return bool(error_K[middle] >= error_K[small] + share * (error_K[large] - error_K[small]))


def total_bytes(plans: Mapping[int, TablePlan], layout: Layout) -> int:
    """Of all tables."""
    return sum(plan.bytes(layout, layer) for layer, plan in plans.items())


def check_budget(layout: Layout, budget: int, drop_unseen: bool) -> None:
    """SearchError where no text could make the tables as small: all rows in the coarsest codec, or only the maps."""
    sizes = fitting(layout.head_dim)
    coarsest = min(sizes, key=lambda name: sizes[name])
    plan = TablePlan((None,), (0,) * layout.columns) if drop_unseen else TablePlan.uniform(coarsest, layout)
    _refuse(sum(plan.bytes(layout, n) for n in layout.layers), budget, drop_unseen)


def _refuse(least: int, budget: int, drop_unseen: bool) -> None:
    if least > budget:
        raise SearchError(
            f"the tables take at least {least:,} bytes, the budget is {budget:,}",
            hint="raise --budget" if drop_unseen else "raise --budget, or allow --drop-unseen",
        )


def within_bytes(
    tables: Sequence[_Table], layout: Layout, budget: int, drop_unseen: bool
) -> dict[int, TablePlan]:
    """The best plans of at most `budget` bytes; SearchError where even the coarsest are larger."""
    low, high = _prices(tables)
    _refuse(total_bytes(plans_for(tables, high, layout, drop_unseen), layout), budget, drop_unseen)
    if total_bytes(plans_for(tables, low, layout, drop_unseen), layout) <= budget:
        return plans_for(tables, low, layout, drop_unseen)

    def fits(price: float, codecs_at: float | None = None) -> bool:
        return total_bytes(plans_for(tables, price, layout, drop_unseen, codecs_at), layout) <= budget

    low, high = _bisected(fits, low, high, _STEPS)
    found = [(high, high)]
    for codecs_at in (low, high):  # where other codecs are chosen bytes jump: go on with either choice
        def fits_still(price: float, codecs_at: float = codecs_at) -> bool:
            return fits(price, codecs_at)

        if fits_still(16 * high):
            found.append((_bisected(fits_still, low / 16, 16 * high, _STEPS // 2)[1], codecs_at))
    plans = [plans_for(tables, price, layout, drop_unseen, codecs_at) for price, codecs_at in found]
    return min(plans, key=lambda plan: sum(_lost(table, plan[table.layer], layout) for table in tables))


def _bisected(fits: Callable[[float], bool], low: float, high: float, steps: int) -> tuple[float, float]:
    """Two prices close together, of which the higher one fits."""
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low, high


def _lost(table: _Table, plan: TablePlan, layout: Layout) -> float:
    """What the errors of a plan cost."""
    error_K = np.array([
        table.error_K[table.codecs.index(codec)] if codec is not None else 1.0 for codec in plan.codecs
    ])  # fmt: skip
    unseen = float(error_K[list(plan.heads)] @ (table.unseen_C * table.unseen_rows_C))
    return unseen + float(error_K[plan.classes(table.rows_U, layout, table.layer)] @ table.cost_U)


def within_loss(
    tables: Sequence[_Table], layout: Layout, drop_unseen: bool, passes: Callable[[Mapping[int, TablePlan]], bool],
    bound: str, progress: Progress,
) -> dict[int, TablePlan]:  # fmt: skip
    """The smallest plans that `passes` says keep the bound; SearchError, which names it, where the finest do not."""
    low, high = _prices(tables)
    coarsest = plans_for(tables, high, layout, drop_unseen)
    if passes(coarsest):
        return coarsest
    best = plans_for(tables, low, layout, drop_unseen)
    if not passes(best):
        rest = ", or leave --drop-unseen out" if drop_unseen else ""
        raise SearchError(
            f"the finest codecs ({total_bytes(best, layout):,} bytes) are not surely within --max-loss {bound} "
            "on the calibration text",
            hint="raise --max-loss, give more --calibrate text" + rest,
        )
    with progress.task("search", _MEASURED_STEPS) as task:
        for _ in range(_MEASURED_STEPS):
            middle = math.sqrt(low * high)
            plans = plans_for(tables, middle, layout, drop_unseen)
            if passes(plans):
                low, best = middle, plans
            else:
                high = middle
            task.advance(1)
    return best


def _prices(tables: Sequence[_Table]) -> tuple[float, float]:
    """Prices at which every row has the finest codec, and the coarsest."""
    costs = np.concatenate([np.append(table.cost_U, table.unseen_C) for table in tables])
    positive = costs[costs > 0]
    if not len(positive):
        return 1e-12, 1.0
    lowest, highest = float(positive.min()), float(positive.max())
    steps = []
    for table in tables:
        for fine, coarse in zip(range(len(table.codecs) - 1), range(1, len(table.codecs)), strict=True):
            saved = table.bytes_K[fine] - table.bytes_K[coarse]
            steps.append((table.error_K[coarse] - table.error_K[fine]) / saved)
    if not steps:
        return 1e-12, 1.0
    return max(lowest * min(steps) / 2, 1e-300), highest * max(steps) * 2
