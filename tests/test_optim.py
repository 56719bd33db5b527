"""Row-wise optimizers against dense torch ones; what is not touched keeps every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.builders.engram import Table
from engram.builders.optim import OptimError, Optimizer, RowwiseAdagrad, RowwiseAdam, clip, schedule
from engram.builders.recipe import OptimizerSection, TableSection

ROWS = 50


def touches(steps: int, width: int, *, every_row: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(steps):
        rows = torch.arange(ROWS) if every_row else torch.randperm(ROWS, generator=generator)[:20].sort().values
        out.append((rows, torch.randn(len(rows), width, generator=generator)))
    return out


def dense_reference(optimizer: type, steps: list[tuple[Tensor, Tensor]], weight: Tensor, **options: Any) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    reference = optimizer([parameter], **options)
    for rows, gradient in steps:
        parameter.grad = torch.zeros_like(parameter).index_copy_(0, rows, gradient)
        reference.step()
    return parameter.detach()


def test_adagrad_of_width_one_is_torchs() -> None:
    steps, weight = touches(30, 1), 0.1 * torch.randn(ROWS, 1)
    expected = dense_reference(torch.optim.Adagrad, steps, weight, lr=0.05, eps=1e-10)
    ours = RowwiseAdagrad(ROWS, 1, 1e-10)
    for rows, gradient in steps:
        ours.update(weight, rows, gradient, 0.05)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-7)  # torch squares and adds in one rounding


def test_adagrad_accumulates_the_mean_square_of_a_row() -> None:
    steps, weight = touches(7, 4), torch.randn(ROWS, 4, dtype=torch.float64)
    ours, sums, expected = RowwiseAdagrad(ROWS, 4, 1e-10), [0.0] * ROWS, weight.clone()
    for rows, gradient in steps:
        ours.update(weight, rows, gradient, 0.1)
        for row, g in zip(rows.tolist(), gradient.double(), strict=True):
            sums[row] += float((g * g).mean())
            expected[row] -= 0.1 * g / (sums[row] ** 0.5 + 1e-10)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-6)


def test_adam_of_width_one_is_torchs_where_every_row_is_touched() -> None:
    steps, weight = touches(30, 1, every_row=True), torch.randn(ROWS, 1)
    expected = dense_reference(torch.optim.Adam, steps, weight, lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    ours = RowwiseAdam(ROWS, 1, (0.9, 0.95), 1e-8)
    for rows, gradient in steps:
        ours.update(weight, rows, gradient, 0.05)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-6)


def test_adam_of_a_sleeping_row_counts_its_own_steps() -> None:
    """A row touched in steps 0, 5 and 9 ends where a row touched in 0, 1 and 2 ends."""
    gradients = torch.randn(3, 1, 8)
    weights = [torch.ones(4, 8), torch.ones(4, 8)]
    for weight, when in zip(weights, ([0, 5, 9], [0, 1, 2]), strict=True):
        ours = RowwiseAdam(4, 8, (0.9, 0.95), 1e-8)
        for step in range(10):
            ours.update(weight, torch.tensor([1]), torch.randn(1, 8), 0.1)
            if step in when:
                ours.update(weight, torch.tensor([2]), gradients[when.index(step)], 0.1)
    assert torch.equal(weights[0][2], weights[1][2])


@pytest.mark.parametrize("kind", ["rowwise-adagrad", "rowwise-adam"])
def test_untouched_rows_do_not_change_a_bit(kind: Any) -> None:
    table = Table(torch.randn(ROWS, 8))
    before = table.weight.clone()
    optimizer = Optimizer({3: table}, {}, TableSection(optimizer=kind), OptimizerSection(weight_decay=0.5), 5.0)
    rows = torch.tensor([[[4, 9], [9, 41]]])
    (table(rows) * torch.arange(32.0).view(1, 2, 16)).sum().backward()
    norms, touched = optimizer.step(1.0)
    assert touched == 3 and norms["tables"] > 0
    changed = (table.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [4, 9, 41]
    untouched = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([4, 9, 41]), False)
    for name, value in optimizer.state().items():
        assert not value[untouched].any(), name


def test_a_row_met_twice_gets_the_sum_of_its_gradients() -> None:
    """Repeats within a batch and over accumulated batches: as a dense gradient would add up."""
    table, generator = Table(torch.randn(ROWS, 4)), torch.Generator().manual_seed(2)
    dense = table.weight.clone().requires_grad_()
    for _ in range(3):
        rows = torch.randint(0, 12, (2, 5, 3), generator=generator)
        weight = torch.randn(2, 5, 12, generator=generator)
        (table(rows) * weight).sum().backward()
        (dense[rows].flatten(-2) * weight).sum().backward()
    found = table.take_touched()
    assert found is not None and dense.grad is not None
    rows_U, gradient = found
    assert torch.allclose(gradient, dense.grad[rows_U], atol=1e-6)
    assert set(rows_U.tolist()) == set(dense.grad.abs().sum(1).nonzero().flatten().tolist())


def test_clip_is_torchs() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(7))]
    gradients = [torch.randn_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    assert clip(gradients, 0.5) == pytest.approx(float(expected))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None and torch.allclose(gradient, parameter.grad, rtol=1e-5)
    assert clip([torch.ones(4)], None) == 2.0 and clip([], 1.0) == 0.0


def test_groups_are_clipped_apart_and_only_matrices_decay() -> None:
    linear, norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1, 2))
    body = nn.Parameter(torch.ones(2, 2))
    dense = {"gates": [("key_proj.weight", linear), ("norm_key", norm)], "backbone": [("w.weight", body)]}
    optimizer = Optimizer({}, dense, TableSection(), OptimizerSection(lr=0.1, weight_decay=0.5, backbone_lr=0.01), 1.0)
    for parameter, size in ((linear, 100.0), (norm, 0.0), (body, 0.25)):
        parameter.grad = torch.full_like(parameter, size)
    norms, _ = optimizer.step(0.5)
    assert norms == pytest.approx({"gates": 200.0, "backbone": 0.5, "tables": 0.0})
    assert torch.equal(norm.detach(), torch.ones(1, 2)), "no gradient and no decay"
    assert torch.allclose(linear.detach(), torch.full((2, 2), 1 - 0.05 * 0.5 - 0.05), atol=1e-6)
    assert torch.allclose(body.detach(), torch.full((2, 2), 1 - 0.005 * 0.5 - 0.005), atol=1e-6)


def test_nothing_changes_where_a_gradient_is_not_finite() -> None:
    table, weight = Table(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({0: table}, {"gates": [("key", weight)]}, TableSection(), OptimizerSection(), 1.0)
    (table(torch.tensor([[[1]]])).sum() * float("nan")).backward()
    weight.grad = torch.ones(2, 2)
    norms, _ = optimizer.step(1.0)
    assert norms["tables"] != norms["tables"]
    assert torch.equal(table.weight, torch.ones(4, 2)) and torch.equal(weight.detach(), torch.ones(2, 2))


def test_schedule() -> None:
    section = OptimizerSection(warmup_steps=4, min_ratio=0.1)
    assert [schedule(section, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(section, 9, 0.5) == pytest.approx(0.55)
    assert schedule(section, 9, 1.0) == schedule(section, 9, 1.5) == pytest.approx(0.1)
    assert schedule(OptimizerSection(warmup_steps=0, schedule="constant"), 0, 0.9) == 1.0


def run_some(optimizer: Optimizer, table: Table, weight: nn.Parameter, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, ROWS, (1, 6, 2), generator=generator)
        ((table(rows) @ weight).square().sum() + weight.sum()).backward()
        optimizer.step(1.0)


@pytest.mark.parametrize("kind", ["rowwise-adagrad", "rowwise-adam"])
def test_state_goes_on_bit_for_bit(kind: Any) -> None:
    def fresh() -> tuple[Optimizer, Table, nn.Parameter]:
        torch.manual_seed(0)
        table, weight = Table(torch.randn(ROWS, 4)), nn.Parameter(torch.randn(8, 3))
        dense = {"gates": [("value_proj.weight", weight)]}
        return Optimizer({1: table}, dense, TableSection(optimizer=kind), OptimizerSection(), 5.0), table, weight

    straight, table, weight = fresh()
    run_some(straight, table, weight, range(8))
    first, first_table, first_weight = fresh()
    run_some(first, first_table, first_weight, range(5))
    second, second_table, second_weight = fresh()
    second_table.weight.copy_(first_table.weight)
    second_weight.data.copy_(first_weight.data)
    second.load({name: value.clone() for name, value in first.state().items()})
    run_some(second, second_table, second_weight, range(5, 8))
    assert torch.equal(second_table.weight, table.weight) and torch.equal(second_weight, weight)


def test_foreign_state_is_refused() -> None:
    optimizer = Optimizer({1: Table(torch.zeros(4, 2))}, {}, TableSection(), OptimizerSection(), 1.0)
    with pytest.raises(OptimError, match=r"tables\.1\.sum: found nothing"):
        optimizer.load({})
    with pytest.raises(OptimError, match=r"found torch.float32 \[5\]"):
        optimizer.load({"tables.1.sum": torch.zeros(5)})
    with pytest.raises(OptimError, match="belongs to no parameter"):
        optimizer.load({"tables.1.sum": torch.zeros(4), "dense.gates.other/step": torch.zeros(())})
