"""`engram train --dry-run`: what a recipe would need, counted, and how fast it would go, measured on two steps."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.data import Cursor
from engram.builders.optim import state_bytes_per_row
from engram.builders.recipe import Recipe
from engram.builders.train_log import rss_mb
from engram.builders.train_setup import (
    Trainee,
    assemble,
    first_weight,
    open_corpus,
    open_optimizer,
    open_stream,
    settings,
)
from engram.builders.train_step import Stepper

WARM_STEPS, PROBE_STEPS = 1, 2


def plan(recipe: Recipe, progress: Progress = Progress()) -> dict[str, Any]:
    """Parameters, bytes for weights, gradients and optimizer, tokens per second, and the time of the whole run.

    Writes nothing but a temporary token cache of as much of the corpus as the probe reads. Where the tables would not
    fit into the free memory nothing is probed, and the result says so.
    """
    trainee = assemble(recipe, None, progress, allocate=False)
    tables = sum(table.weight.numel() for table in trainee.tables.values())
    dense = [p for named in trainee.dense().values() for _, p in named]
    backbone = list(trainee.model.backbone.parameters())
    data, run = recipe.data, recipe.run
    positions = data.sequence_length * data.batch * data.accumulation
    row_bytes = 4 * trainee.layout.head_dim
    rows = sum(min(table.weight.shape[0], positions * trainee.layout.columns) for table in trainee.tables.values())
    table_state = sum(
        table.weight.shape[0] * state_bytes_per_row(recipe.tables, trainee.layout.head_dim)
        for table in trainee.tables.values()
    )
    weights = sum(p.numel() * p.element_size() for p in [*backbone, *trainee.model.gates.parameters()]) + 4 * tables
    memory = {
        "weights": weights,
        "gradients": sum(p.numel() * p.element_size() for p in dense) + rows * row_bytes,
        "optimizer": sum(2 * p.numel() * p.element_size() for p in dense) + table_state,
    }
    memory["total"] = sum(memory.values())
    parameters = {
        "backbone": sum(p.numel() for p in backbone),
        "backbone_trained": sum(p.numel() for p in backbone if p.requires_grad),
        "gates": sum(p.numel() for p in trainee.model.gates.parameters()),
        "tables": tables,
    }
    by_steps = positions * run.max_steps if run.max_steps is not None else None
    total = min(n for n in (by_steps, run.max_tokens) if n is not None)
    needed, free = 4 * tables + table_state, _free_bytes()
    probe = None
    if free is None or needed < 0.9 * free:
        probe = _probe(recipe, trainee, progress)
    else:
        progress.say(f"no probe: tables and their optimizer need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    speed = probe["tokens_per_second"] if probe else None
    return {
        "dry_run": True, "out": recipe.out, "parameters": parameters, "memory_bytes": memory, "probe": probe,
        "tokens": total, "steps": -(-total // positions), "tokens_per_second": speed,
        "expected_seconds": None if not speed else total / speed,
    }  # fmt: skip


def _probe(recipe: Recipe, trainee: Trainee, progress: Progress) -> dict[str, float]:
    """Train a few steps in memory on the beginning of the corpus and measure."""
    for layer, table in trainee.tables.items():
        table.weight = first_weight(recipe, trainee.layout, layer).to(trainee.device)
    data = recipe.data
    steps = WARM_STEPS + PROBE_STEPS
    enough = steps * data.sequence_length * data.batch * data.accumulation
    folder = Path(tempfile.mkdtemp(prefix="engram-plan-"))
    try:
        with settings(recipe.run):
            cache = open_corpus(recipe, trainee, progress, folder=folder, max_tokens=max(64, enough))
            stream = open_stream(recipe, trainee, cache, np.arange(cache.documents))
            stepper = Stepper(trainee, open_optimizer(recipe, trainee), recipe.run.seed)
            cursor, tokens, begun = Cursor(), 0, time.monotonic()
            with progress.task("probe", steps, "steps") as task:
                for number in range(steps):
                    if number == WARM_STEPS:
                        tokens, begun = 0, time.monotonic()
                    batches, cursor = stream.step(cursor)
                    tokens += stepper.step(batches, number, 0.0)["step_tokens"]
                    task.advance()
        return {"steps": PROBE_STEPS, "tokens_per_second": tokens / (time.monotonic() - begun), "rss_mb": rss_mb()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_bytes() -> int | None:
    """Memory that Linux would hand out now; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
