"""One optimizer step and one evaluation: memory from the tables, the backbone, the loss, the update.

Shape letters: B rows of a batch, T positions, V vocabulary, C columns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram.builders.data import Batch
from engram.builders.loss import sum_nll
from engram.builders.optim import Optimizer
from engram.builders.train_log import GateMeter
from engram.builders.train_setup import Trainee


class RouterLoss:
    """The load-balancing loss of a mixture of experts, as transformers computes it, in training passes only.

    Positions of padding count in it as any other. Dense backbones have none: `take` gives None.
    """

    def __init__(self, backbone: Any) -> None:
        self.weight = float(getattr(backbone.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)
        self._found: Tensor | None = None
        if self.weight and "output_router_logits" in inspect.signature(backbone.forward).parameters:
            backbone.register_forward_pre_hook(self._ask, with_kwargs=True)
            backbone.register_forward_hook(self._keep)

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | ({"output_router_logits": True} if module.training else {})

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        found = getattr(output, "aux_loss", None)
        self._found = found if isinstance(found, Tensor) else None

    def take(self) -> Tensor | None:
        """The loss of the forward pass that just ran, unweighted."""
        found, self._found = self._found, None
        return found


class Stepper:
    """Steps and evaluations of one trainee."""

    def __init__(self, trainee: Trainee, optimizer: Optimizer, seed: int) -> None:
        self.trainee, self.optimizer, self.seed = trainee, optimizer, seed
        self.meter = GateMeter(trainee.model)
        self.router = RouterLoss(trainee.model.backbone)
        self.rows_total = sum(table.weight.shape[0] for table in trainee.tables.values())

    def nll(self, batch: Batch, scale: float = 1.0) -> Tensor:
        """`scale` times the sum of -log p over the batch's targets, in nats, float32."""
        trainee = self.trainee
        targets_BT = torch.from_numpy(batch.targets_BT).to(trainee.device)
        memory = {
            layer: trainee.tables[layer](torch.from_numpy(rows_BTC).to(trainee.device))
            for layer, rows_BTC in batch.rows.items()
        }
        with trainee.precision():
            logits_BTV = trainee.model(torch.from_numpy(batch.ids_BT).to(trainee.device), memory)
        self.meter.select(targets_BT)
        return sum_nll(logits_BTV, targets_BT, scale)

    def step(self, batches: Sequence[Batch], number: int, factor: float) -> dict[str, Any]:
        """Forward, backward and update on the mean loss of all the batches' tokens; what there is to log.

        Every random number of the step follows from the recipe's seed and `number`. Where loss or a gradient is not
        finite nothing is updated, and "loss" or "grad_norm" says so.
        """
        trainee, optimizer = self.trainee, self.optimizer
        torch.manual_seed(self.seed * 1_000_003 + number)
        trainee.training(True)
        tokens = sum(batch.tokens for batch in batches)
        loss, balance = 0.0, 0.0
        for batch in batches:
            mean = self.nll(batch, 1 / tokens)
            loss += float(mean.detach())
            router = self.router.take()
            if router is not None:
                router = router * (batch.tokens / tokens)
                balance += float(router.detach())
                mean = mean + self.router.weight * router
            mean.backward()  # type: ignore[no-untyped-call]
        record: dict[str, Any] = {"loss": loss, "lr": optimizer.section.lr * factor}
        record["table_lr"] = optimizer.table_lr * factor
        norms, touched = optimizer.step(factor if math.isfinite(loss) else math.nan)
        record |= {"rows_touched": touched, "rows_total": self.rows_total, **self.meter.read()}
        record["grad_norm"] = math.sqrt(sum(norm * norm for norm in norms.values()))
        record["grad_norms"] = norms
        return record | ({"router_loss": balance} if self.router.weight else {}) | {"step_tokens": tokens}

    def evaluate(self, batches: Iterable[Batch], size_bytes: float) -> dict[str, float]:
        """Mean nats per token, perplexity and bits per byte over `batches`, whose text has `size_bytes` of UTF-8."""
        self.trainee.training(False)
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                total += float(self.nll(batch))
                tokens += batch.tokens
        self.meter.read()
        loss = total / tokens
        return {
            "val_loss": loss,
            "val_ppl": math.exp(min(loss, 700.0)),
            "val_bpb": total / math.log(2) / size_bytes,
        }
