"""`engram train`: a recipe in, a run's folder out; killed at any moment, it goes on with the same losses."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from engram import EngramError, Progress, Task
from engram.builders import train_state
from engram.builders.checkpoint import Checkpoint
from engram.builders.data import HeldOut
from engram.builders.optim import schedule
from engram.builders.recipe import Recipe, load_recipe
from engram.builders.token_cache import TokenCache
from engram.builders.train_log import Log, draw, rss_mb
from engram.builders.train_setup import Trainee, assemble, open_corpus, open_optimizer, open_stream, settings
from engram.builders.train_state import ResumeError, Standing
from engram.builders.train_step import Stepper

VALUES = ("val_loss", "val_ppl", "val_bpb")


class TrainError(EngramError):
    """Training that cannot go on."""


def train(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    dry_run: bool = False,
    progress: Progress = Progress(),
    max_tokens: int | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
) -> dict[str, Any]:
    """Train as a recipe (a file, or the name of a shipped one) says.

    `max_tokens`, `max_steps` and `max_time` (seconds) stand for the recipe's keys in `run`. `resume` is "auto" (the
    newest checkpoint of the run's folder, or the beginning) or a checkpoint's folder. On Ctrl-C a checkpoint is saved
    before KeyboardInterrupt goes up. Raises RecipeError, ResumeError, TrainError, and what the parts raise.
    """
    limits = {"run.max_tokens": max_tokens, "run.max_steps": max_steps, "run.max_time": max_time}
    given = [f"{key}={value}" for key, value in limits.items() if value is not None]
    recipe = load_recipe(recipe_path, [*overrides, *given])
    if dry_run:
        from engram.builders.train_plan import plan

        return plan(recipe, progress)
    out = Path(recipe.out)
    checkpoint, standing = _standing(recipe, out, resume, progress)
    with settings(recipe.run, standing.threads):
        trainee = assemble(recipe, checkpoint, progress)
        train_state.start_folder(out, recipe, trainee, fresh=checkpoint is None)
        cache = open_corpus(recipe, trainee, progress)
        try:
            return _Run(recipe, trainee, cache, checkpoint, standing, progress).run()
        finally:
            cache.discard()


def _standing(recipe: Recipe, out: Path, resume: str | None, progress: Progress) -> tuple[Checkpoint | None, Standing]:
    """What to go on from; nothing and the beginning for a new run."""
    if resume is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ResumeError(f"{out} exists", hint="go on with --resume auto, or name another out")
        return None, Standing()
    if out.is_dir():
        train_state.sweep(out)
    checkpoint = train_state.find_state(out, resume, progress)
    if checkpoint is None:
        progress.say(f"no checkpoint in {out} yet: training begins")
        return None, Standing()
    standing, before = train_state.read_standing(checkpoint)
    train_state.check_same(recipe, before, progress)
    progress.say(f"going on from {checkpoint.folder} (step {standing.step}, {standing.tokens:,} tokens)")
    return checkpoint, standing


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, the second interrupts as usual. Only the main thread can listen."""
    asked = threading.Event()

    def listen(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, listen)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Run:
    """The loop, and what it keeps between steps."""

    recipe: Recipe
    trainee: Trainee
    cache: TokenCache
    checkpoint: Checkpoint | None
    standing: Standing
    progress: Progress

    def __post_init__(self) -> None:
        self.out = Path(self.recipe.out)
        data = self.recipe.data
        everything, nothing = np.arange(self.cache.documents), np.arange(0)
        kept, held = self.cache.split(data.held_out) if data.held_out else (everything, nothing)
        self.stream = open_stream(self.recipe, self.trainee, self.cache, kept)
        self.held_out = HeldOut.choose(self.cache, held, data.sequence_length, data.eval_tokens)
        self.optimizer = open_optimizer(self.recipe, self.trainee)
        self.stepper = Stepper(self.trainee, self.optimizer, self.recipe.run.seed)
        corpus = {
            "train_tokens": self.stream.tokens, "train_pieces": len(self.stream.pieces),
            "documents": self.cache.documents, "held_out_documents": len(self.held_out.documents),
            "held_out_sha256": self.held_out.sha256, "eval_tokens": self.held_out.tokens,
        }  # fmt: skip
        if self.checkpoint is not None:
            if self.standing.data != corpus:
                raise ResumeError(
                    f"the corpus is another one: {corpus}, the run was begun with {self.standing.data}",
                    hint="restore the files that data.sources names, or begin another run",
                )
            train_state.restore(self.checkpoint, self.trainee, self.optimizer)
        self.standing = replace(self.standing, data=corpus, threads=torch.get_num_threads())
        self.saved = (
            self.checkpoint.folder if self.checkpoint and self.checkpoint.folder.parent.parent == self.out else None
        )
        self.began, self.began_share, self.session_tokens, self.session_s = time.monotonic(), self.share(), 0, 0.0

    def share(self) -> float:
        """How much of the run is done, 0 … 1: by steps or by tokens, whichever ends it first."""
        run = self.recipe.run
        steps = 0.0 if run.max_steps is None else self.standing.step / run.max_steps if run.max_steps else 1.0
        return min(1.0, max(steps, self.standing.tokens / run.max_tokens if run.max_tokens else 0.0))

    def run(self) -> dict[str, Any]:
        """Train to the end, or until time is up; the `--json` object."""
        run, out = self.recipe.run, self.out
        log = Log(out / "log.jsonl", self.standing.step)
        expected = self.stream.tokens / self.stream.steps(0) * run.max_steps if run.max_steps else math.inf
        total = min(expected, run.max_tokens or math.inf)
        try:
            with _interruptible() as asked, ThreadPoolExecutor(1) as ahead:
                if self.standing.step == 0 and not log.records:
                    log.write({"step": 0, "tokens": 0, **self.evaluate()})
                with self.progress.task("train", total, "tokens") as task:
                    task.advance(self.standing.tokens)
                    self.loop(log, task, asked, ahead)
            if self.saved is None or self.saved.name != f"step-{self.standing.step:06d}":
                self.save(log)
        finally:
            log.close()
        assert self.saved is not None
        final = train_state.finish(out, self.saved)
        draw(log.records, out / "loss.png")
        before = next((r["val_loss"] for r in log.records if r["step"] == 0 and "val_loss" in r), None)
        return {
            "out": str(out), "final": str(final), "steps": self.standing.step, "tokens": self.standing.tokens,
            "loss": self.standing.loss, **{name: self.standing.val.get(name) for name in VALUES},
            "val_loss_before": before, "tokens_per_second": self.session_tokens / max(self.session_s, 1e-9),
            "seconds": self.standing.seconds, "finished": self.share() >= 1.0, "data": self.standing.data,
        }  # fmt: skip

    def loop(self, log: Log, task: Task, asked: threading.Event, ahead: ThreadPoolExecutor) -> None:
        """Step after step; the next batches are read and hashed while this step computes."""
        run = self.recipe.run
        coming = ahead.submit(self.stream.step, self.standing.cursor)
        while self.share() < 1.0:
            if run.max_time is not None and time.monotonic() - self.began >= run.max_time:
                self.progress.say(f"time is up after step {self.standing.step}; --resume auto goes on")
                self.evaluate()  # for the report; the log stays as it would be
                return
            begun = time.monotonic()
            batches, cursor = coming.result()
            coming = ahead.submit(self.stream.step, cursor)
            factor = schedule(self.recipe.optimizer, self.standing.step, self.share())
            record = self.stepper.step(batches, self.standing.step, factor)
            tokens = record.pop("step_tokens")
            self.refuse_nonsense(record)
            spent = time.monotonic() - begun
            self.session_tokens, self.session_s = self.session_tokens + tokens, self.session_s + spent
            self.standing = replace(
                self.standing, step=self.standing.step + 1, tokens=self.standing.tokens + tokens, cursor=cursor,
                seconds=self.standing.seconds + spent, loss=record["loss"],
            )  # fmt: skip
            at = self.standing.step
            if self.share() >= 1.0 or (run.eval_every and at % run.eval_every == 0):
                record |= self.evaluate()
            gone = self.share() - self.began_share
            left = (time.monotonic() - self.began) * (1 - self.share()) / max(gone, 1e-9)
            clock = {"tok_s": tokens / spent, "dt_s": spent, "eta_s": left, "rss_mb": rss_mb()}
            log.write({"step": at, "tokens": self.standing.tokens, **record, **clock})
            task.advance(tokens)
            task.note(f"step {at}, loss {record['loss']:.4f}" + self.val_words())
            if run.save_every and at % run.save_every == 0:
                self.save(log)
            if asked.is_set():
                self.save(log)
                self.progress.say(f"interrupted: step {at} is saved in {self.saved}; go on with --resume auto")
                raise KeyboardInterrupt

    def refuse_nonsense(self, record: dict[str, Any]) -> None:
        """TrainError where loss or gradients stopped being numbers; nothing was updated, the last checkpoint stays."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint was saved yet"
                raise TrainError(
                    f"{name} is {record[name]} at step {self.standing.step + 1}; {kept}",
                    hint="lower optimizer.lr or tables.lr_multiplier, lengthen optimizer.warmup_steps, "
                    "or set backbone.dtype: float32",
                )

    def evaluate(self) -> dict[str, float]:
        """Loss on the held-out set; nothing where nothing is held out."""
        if not self.held_out.tokens:
            return {}
        data = self.recipe.data
        budget, first = data.sequence_length * data.batch, self.trainee.first
        batches = self.held_out.batches(self.cache, self.trainee.layout, budget, first)
        values = self.stepper.evaluate(batches, self.held_out.bytes)
        self.standing = replace(self.standing, val=values)
        return values

    def val_words(self) -> str:
        return f", held out {self.standing.val['val_loss']:.4f}" if self.standing.val else ""

    def save(self, log: Log) -> None:
        """Write a checkpoint and the curve."""
        if self.saved is None or self.saved.name != f"step-{self.standing.step:06d}":
            self.saved = train_state.save(self.out, self.trainee, self.optimizer, self.standing, self.recipe)
            draw(log.records, self.out / "loss.png")
