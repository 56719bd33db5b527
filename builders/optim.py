"""Optimizers: row-wise ones for the tables, whose cost follows the rows touched, and the schedule around all of them.

Shape letters: N rows of a table, D row width, U distinct rows touched in a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from engram import EngramError
from engram.builders.engram import Table
from engram.builders.recipe import OptimizerSection, TableSection


class OptimError(EngramError):
    """Optimizer state that does not belong to this model."""


class RowOptimizer(Protocol):
    """Updates some rows of one table in place; what it never touches keeps every bit."""

    def update(self, weight_ND: Tensor, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        """One step on distinct rows."""

    def state(self) -> dict[str, Tensor]:
        """The state, by name; tensors are the live ones."""


class RowwiseAdagrad:
    """Adagrad with one number a row: the running sum of the mean squared gradient of the row.

    sum[r] += mean(g[r]²);  w[r] -= lr · g[r] / (sqrt(sum[r]) + eps). With D = 1 it is torch.optim.Adagrad.
    State: float32 [N], 4 bytes a row.
    """

    def __init__(self, rows: int, width: int, eps: float, device: torch.device | None = None) -> None:
        self.eps = eps
        self.sum_N = torch.zeros(rows, device=device)

    def update(self, weight_ND: Tensor, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        """One step on distinct rows."""
        sum_U = self.sum_N[rows_U] + gradient_UD.square().mean(1)
        self.sum_N[rows_U] = sum_U
        root_U1 = (sum_U.sqrt() + self.eps).unsqueeze(1)
        weight_ND[rows_U] = torch.addcdiv(weight_ND[rows_U], gradient_UD, root_U1, value=-lr)

    def state(self) -> dict[str, Tensor]:
        """The accumulators."""
        return {"sum": self.sum_N}


class RowwiseAdam:
    """Adam with a full first moment, one second moment a row, and a step count of each row's own.

    Rows sleep between touches: moments decay and bias is corrected by the row's own count, so a row that is touched in
    every step behaves as under torch.optim.Adam (exactly so with D = 1) and a sleeping row costs nothing.
    State: float32 [N, D] and [N], int32 [N].
    """

    def __init__(
        self, rows: int, width: int, betas: tuple[float, float], eps: float, device: torch.device | None = None
    ) -> None:
        self.betas, self.eps = betas, eps
        self.mean_ND = torch.zeros(rows, width, device=device)
        self.square_N = torch.zeros(rows, device=device)
        self.count_N = torch.zeros(rows, dtype=torch.int32, device=device)

    def update(self, weight_ND: Tensor, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        """One step on distinct rows."""
        first, second = self.betas
        count_U = self.count_N[rows_U] + 1
        mean_UD = torch.lerp(self.mean_ND[rows_U], gradient_UD, 1 - first)
        square_U = self.square_N[rows_U] * second + gradient_UD.square().mean(1) * (1 - second)
        self.count_N[rows_U], self.mean_ND[rows_U], self.square_N[rows_U] = count_U, mean_UD, square_U
        steps = count_U.double()
        scale = (1 - second**steps).sqrt() / (1 - first**steps)
        root = square_U.sqrt() + self.eps * (1 - second**steps).sqrt().float()
        weight_ND[rows_U] -= mean_UD * (lr * scale.float() / root).unsqueeze(1)

    def state(self) -> dict[str, Tensor]:
        """Moments and counts."""
        return {"mean": self.mean_ND, "square": self.square_N, "count": self.count_N}


def row_optimizer(section: TableSection, weight_ND: Tensor) -> RowOptimizer:
    """The optimizer that the recipe names, for one table."""
    rows, width = weight_ND.shape
    if section.optimizer == "rowwise-adam":
        return RowwiseAdam(rows, width, section.betas, section.eps, weight_ND.device)
    return RowwiseAdagrad(rows, width, section.eps, weight_ND.device)


def state_bytes_per_row(section: TableSection, width: int) -> int:
    """Bytes of optimizer state that one row of a table costs."""
    return 4 * width + 8 if section.optimizer == "rowwise-adam" else 4


def schedule(section: OptimizerSection, step: int, done: float) -> float:
    """Factor on every learning rate at `step` (from 0), `done` being the share 0 … 1 of the run that lies behind.

    Linear warm-up over `warmup_steps`, multiplied with a constant 1 or a cosine from 1 down to `min_ratio`.
    """
    warm = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "constant":
        return warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return warm * (section.min_ratio + (1 - section.min_ratio) * cosine)


def clip(gradients: Iterable[Tensor], most: float | None) -> float:
    """Scale gradients in place so that their common L2 norm is at most `most`; returns the norm before."""
    tensors = list(gradients)
    if not tensors:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in tensors]))
    if most is not None and norm > most:
        for gradient in tensors:
            gradient.mul_(most / norm)
    return float(norm)


class Optimizer:
    """All of a model's optimizers: AdamW groups "gates" and "backbone", one row optimizer a table.

    Gradient norms are clipped per group: gates, backbone, all tables together.
    """

    def __init__(
        self,
        tables: Mapping[int, Table],
        dense: Mapping[str, Sequence[tuple[str, nn.Parameter]]],
        table_section: TableSection,
        section: OptimizerSection,
        lr_multiplier: float,
    ) -> None:
        self.tables, self.section, self.table_section = dict(tables), section, table_section
        self.table_lr = section.lr * lr_multiplier
        self.rows = {layer: row_optimizer(table_section, table.weight) for layer, table in tables.items()}
        self.dense = {group: list(named) for group, named in dense.items() if named}
        groups = []
        for group, named in self.dense.items():
            lr = section.backbone_lr or section.lr if group == "backbone" else section.lr
            for decays in (True, False):
                chosen = [p for name, p in named if _decays(name, p) == decays]
                weight_decay = section.weight_decay if decays else 0.0
                groups += [{"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}] if chosen else []
        self.adamw = torch.optim.AdamW(groups, betas=section.betas, eps=section.eps) if groups else None

    def step(self, factor: float) -> tuple[dict[str, float], int]:
        """Clip, update all with learning rates times `factor`, clear gradients: (norm per group, rows touched).

        Nothing is changed when a norm or `factor` is not finite: the caller must look.
        """
        touched = {layer: found for layer, t in self.tables.items() if (found := t.take_touched()) is not None}
        norms = {
            group: clip((p.grad for _, p in named if p.grad is not None), self.section.clip)
            for group, named in self.dense.items()
        }
        norms["tables"] = clip((gradient for _, gradient in touched.values()), self.table_section.clip)
        if all(map(math.isfinite, (factor, *norms.values()))):
            if self.adamw is not None:
                for group in self.adamw.param_groups:
                    group["lr"] = group["base_lr"] * factor
                self.adamw.step()
            for layer, (rows_U, gradient_UD) in touched.items():
                self.rows[layer].update(self.tables[layer].weight, rows_U, gradient_UD, self.table_lr * factor)
        if self.adamw is not None:
            self.adamw.zero_grad(set_to_none=True)
        return norms, sum(len(rows_U) for rows_U, _ in touched.values())

    def state(self) -> dict[str, Tensor]:
        """Everything that going on needs, by name: `tables.{layer}.{name}` and `dense.{parameter}.{name}`."""
        out = {f"tables.{layer}.{name}": t for layer, o in self.rows.items() for name, t in o.state().items()}
        if self.adamw is not None:
            for group, named in self.dense.items():
                for parameter_name, parameter in named:
                    for name, value in self.adamw.state.get(parameter, {}).items():
                        out[f"dense.{group}.{parameter_name}/{name}"] = value
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; OptimError names a missing, unknown or misshapen tensor."""
        left = dict(state)
        for layer, optimizer in self.rows.items():
            for name, live in optimizer.state().items():
                key = f"tables.{layer}.{name}"
                stored = left.pop(key, None)
                if stored is None or stored.shape != live.shape or stored.dtype != live.dtype:
                    found = "nothing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
                    raise OptimError(f"optimizer state {key}: found {found}, needed {live.dtype} {list(live.shape)}")
                live.copy_(stored)
        by_name = {f"dense.{group}.{name}": p for group, named in self.dense.items() for name, p in named}
        for key, stored in left.items():
            parameter = by_name.get(key.rpartition("/")[0])
            name = key.rpartition("/")[2]
            if parameter is None or self.adamw is None or (name != "step" and stored.shape != parameter.shape):
                raise OptimError(f"optimizer state {key} {list(stored.shape)} belongs to no parameter of this model")
            self.adamw.state[parameter][name] = stored.to("cpu" if name == "step" else parameter.device)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases and convolution kernels do not."""
    return parameter.dim() >= 2 and "norm" not in name and "conv" not in name
