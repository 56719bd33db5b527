"""The folder of a training run: checkpoints that hold everything, the newest whole one, the final one.

    out/
        recipe.yaml                  as it runs: overrides and defaults included
        layout/                      a layout folder: hash layout, token map, tokenizer
        checkpoints/step-NNNNNN/     checkpoints; `state/` in them is what going on needs:
            state/standing.json          step, tokens, place in the data, loss history's end, recipe, threads
            state/optimizer.safetensors  all optimizer state
            state/adapters.safetensors   LoRA adapters, where there are any (backbone/ holds them merged)
        final/                       the last checkpoint without `state/`; its files are links to it where possible
        log.jsonl, loss.png

Random numbers need no state: every step seeds its own generators from the recipe's seed and the step's number.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from engram import EngramError, Progress
from engram.builders.atomic import atomic_folder, write_whole
from engram.builders.backbone import BackboneRef, save_backbone
from engram.builders.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from engram.builders.data import Cursor
from engram.builders.fetch import hash_file
from engram.builders.model import gate_weights
from engram.builders.optim import Optimizer
from engram.builders.recipe import Recipe
from engram.builders.tokenizer import save_tokenizer
from engram.builders.train_setup import Trainee

STANDING, OPTIMIZER, ADAPTERS = "standing.json", "optimizer.safetensors", "adapters.safetensors"
LOOSE = ("out", "max_steps", "max_tokens", "max_time", "eval_every", "save_every", "keep")  # may differ on resuming


class ResumeError(EngramError):
    """A run that cannot be begun or taken up again."""


@dataclass(frozen=True)
class Standing:
    """How far a run is. `data` names the corpus it read, so that another one is noticed."""

    step: int = 0
    tokens: int = 0
    cursor: Cursor = Cursor()
    seconds: float = 0.0
    threads: int = 0
    loss: float | None = None
    val: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def start_folder(out: Path, recipe: Recipe, trainee: Trainee, *, fresh: bool) -> None:
    """Make the run's folder, or take over one in which nothing was saved yet."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "checkpoints").mkdir(exist_ok=True)
    if fresh or not (out / "layout").exists():
        with atomic_folder(out / "layout", force=True) as folder:
            trainee.layout.save(folder)
            save_tokenizer(trainee.tokenizer, folder)
    write_whole(out / "recipe.yaml", recipe.to_yaml().encode())


def save(out: Path, trainee: Trainee, optimizer: Optimizer, standing: Standing, recipe: Recipe) -> Path:
    """Write checkpoints/step-NNNNNN, whole or not at all; then remove the oldest beyond `run.keep`."""
    folder = out / "checkpoints" / f"step-{standing.step:06d}"
    state = {
        STANDING: (json.dumps({**asdict(standing), "recipe": recipe.to_json()}, indent=1) + "\n").encode(),
        OPTIMIZER: to_safetensors({name: t.detach().cpu().contiguous() for name, t in optimizer.state().items()}),
    }
    if trainee.adapters is not None:
        state[ADAPTERS] = to_safetensors({name: t.cpu().contiguous() for name, t in trainee.adapter_state().items()})
    model = trainee.model
    extra: dict[str, Any] = {"step": standing.step}
    if trainee.adapters is not None and trainee.base is not None:
        extra["base"] = trainee.base.to_json()
    with _backbone_files(trainee, out) as (reference, files):
        save_checkpoint(
            folder, layout=trainee.layout,
            gates={layer: model.gate(layer).config.to_json() for layer in trainee.layout.layers},
            dense=gate_weights(model), tables={n: t.weight.cpu().numpy() for n, t in trainee.tables.items()},
            backbone=reference, backbone_folder=files, tokenizer_folder=out / "layout", state=state,
            extra=extra, force=True,
        )  # fmt: skip
    for old in _saved(out)[recipe.run.keep :]:
        doomed = old.with_name(old.name + ".old")  # a kill while it is removed leaves no half checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)
    return folder


@contextmanager
def _backbone_files(trainee: Trainee, out: Path) -> Iterator[tuple[BackboneRef, Path | None]]:
    """What the checkpoint says of its backbone, and a folder to copy from where the backbone was trained."""
    if not trainee.trained:
        assert trainee.base is not None
        yield trainee.base, None
        return
    model = trainee.model.backbone
    if trainee.adapters is not None:
        model = copy.deepcopy(trainee.adapters).merge_and_unload()
    with tempfile.TemporaryDirectory(prefix=".backbone-", dir=out) as name:
        save_backbone(model, Path(name))
        hashes = {file.name: hash_file(file) for file in sorted(Path(name).iterdir())}
        yield BackboneRef("embedded", "backbone", "float32", hashes), Path(name)


def finish(out: Path, last: Path) -> Path:
    """out/final: the checkpoint `last` without its state, through links where the file system has them."""
    final = out / "final"
    with atomic_folder(final, force=True) as folder:
        for path in sorted(last.rglob("*")):
            relative = path.relative_to(last)
            if path.is_dir() or relative.parts[0] == "state":
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, folder / relative)
            except OSError:
                shutil.copyfile(path, folder / relative)
    return final


def _saved(out: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def sweep(out: Path) -> None:
    """Remove what a kill left half-written."""
    for folder in (out, out / "checkpoints"):
        for path in [*folder.glob("*.partial"), *folder.glob("*.old"), *folder.glob(".backbone-*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def find_state(out: Path, resume: str, progress: Progress) -> Checkpoint | None:
    """The checkpoint to go on from: for "auto" the newest whole one of `out`, if any; else the one that is named."""
    if resume != "auto":
        path = Path(resume)
        found = _newest(path, progress) if (path / "checkpoints").is_dir() else open_checkpoint(path)
        if found is None or not (found.folder / "state" / STANDING).is_file():
            raise ResumeError(
                f"{resume} holds no state to go on from", hint="name a folder checkpoints/step-NNNNNN, not final"
            )
        return found
    return _newest(out, progress)


def _newest(out: Path, progress: Progress) -> Checkpoint | None:
    for folder in _saved(out):
        try:
            checkpoint = open_checkpoint(folder)
            read_standing(checkpoint)
            return checkpoint
        except EngramError as wrong:
            progress.say(f"{folder.name} is damaged, trying the one before: {wrong}")
    return None


def read_standing(checkpoint: Checkpoint) -> tuple[Standing, Recipe]:
    """How far a checkpoint is, and the recipe it was made with."""
    path = checkpoint.folder / "state" / STANDING
    try:
        data = json.loads(path.read_bytes())
        recipe = Recipe.from_json(data.pop("recipe"), str(path))
        return replace(Standing(**data), cursor=Cursor(**data["cursor"])), recipe
    except (OSError, ValueError, TypeError, KeyError) as wrong:
        raise ResumeError(f"{path} cannot be read: {wrong}") from None


def check_same(recipe: Recipe, before: Recipe, progress: Progress) -> None:
    """Refuse to go on with a recipe that would have given another run; its length and housekeeping may change."""
    now, then = _flat(recipe.to_json()), _flat(before.to_json())
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) == then.get(key):
            continue
        if key.rpartition(".")[2] not in LOOSE:
            raise ResumeError(
                f"{key} is {now.get(key)!r}, the run was begun with {then.get(key)!r}",
                hint="go on with the recipe.yaml in the run's folder, or begin another run with another out",
            )
        if key in ("run.max_steps", "run.max_tokens") and recipe.optimizer.schedule != "constant":
            progress.say(f"{key} changes from {then.get(key)} to {now.get(key)}: the schedule stretches with it")


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return out


def restore(checkpoint: Checkpoint, trainee: Trainee, optimizer: Optimizer) -> None:
    """Optimizer state and adapters from a checkpoint's `state/`; tables, gates and backbone were loaded with it."""
    folder = checkpoint.folder / "state"
    try:
        optimizer.load(load_file(folder / OPTIMIZER))
        adapters = load_file(folder / ADAPTERS) if trainee.adapters is not None else {}
    except (OSError, SafetensorError) as wrong:
        raise ResumeError(f"the state in {folder} cannot be read: {wrong}") from None
    live = trainee.adapter_state()
    if {n: t.shape for n, t in live.items()} != {n: t.shape for n, t in adapters.items()}:
        raise ResumeError(f"{folder / ADAPTERS} holds adapters of other shapes than the recipe's")
    for name, parameter in live.items():
        parameter.copy_(adapters[name])
