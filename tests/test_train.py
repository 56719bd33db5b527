"""Training: it learns, it can be killed at any moment, and what it saves is what it trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram import Progress, Task
from engram.builders.backbone import load_backbone
from engram.builders.checkpoint import open_checkpoint
from engram.builders.engram import GateConfig, Table
from engram.builders.model import EngramModel, load_gate_weights
from engram.builders.recipe import load_recipe
from engram.builders.train import TrainError, train
from engram.builders.train_backbone import SetupError
from engram.builders.train_log import read_log
from engram.builders.train_setup import assemble
from engram.builders.train_state import ResumeError
from engram.builders.train_step import Stepper

ROOT = Path(__file__).resolve().parents[1]
STDLIB = Path(json.__file__).resolve().parents[1]
TIMES = ("tok_s", "dt_s", "eta_s", "rss_mb")
FAST = [
    "data.sequence_length=64", "data.batch=4", "data.eval_tokens=600", "data.held_out=0.2", "run.threads=1",
    "backbone.dtype=float32", "optimizer.warmup_steps=2", "layout.rows_per_head=500", "layout.head_dim=8",
    "layout.heads=2", f"data.sources=[{STDLIB / 'json'}]", "data.suffixes=[.py]",
]  # fmt: skip
SMALL = [
    "backbone.config.hidden_size=32", "backbone.config.num_hidden_layers=2", "backbone.config.num_attention_heads=2",
    "backbone.config.num_key_value_heads=2",
]  # fmt: skip
DENSE = ["scratch-tiny", *SMALL, "backbone.config.intermediate_size=64"]
MOE = [
    "scratch-tiny-moe", *SMALL, "backbone.config.moe_intermediate_size=32", "backbone.config.num_experts=4",
    "backbone.config.head_dim=16",
]  # fmt: skip


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens, trained on a part of the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], show_progress=False, initial_alphabet=alphabet
    )
    made.train([str(path) for path in sorted((STDLIB / "json").glob("*.py"))], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A random llama of two blocks, saved with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture
def job(tmp_path: Path, tokenizer: Path, backbone: Path) -> Callable[..., tuple[str, list[str]]]:
    """Recipe and overrides of a tiny run: job("attach" | "dense" | "moe", out, more overrides…)."""

    def make(kind: str, out: str = "run", *more: str) -> tuple[str, list[str]]:
        name, *small = {"dense": DENSE, "moe": MOE, "attach": ["attach-smollm2"]}[kind]
        own = [f"backbone.source={backbone}"] if kind == "attach" else [f"layout.tokenizer={tokenizer}"]
        return name, [*FAST, *small, *own, f"out={tmp_path / out}", *more]

    return make


def losses(out: Path) -> list[dict[str, Any]]:
    """The log without its clocks."""
    return [{key: value for key, value in r.items() if key not in TIMES} for r in read_log(out / "log.jsonl")]


def loaded(folder: Path) -> tuple[EngramModel, dict[int, Table]]:
    """A checkpoint as anyone would load it."""
    checkpoint = open_checkpoint(folder)
    gates = {n: GateConfig.from_json(config) for n, config in checkpoint.gates().items()}
    model = EngramModel(load_backbone(checkpoint.backbone, folder), checkpoint.layout, gates).eval()
    load_gate_weights(model, checkpoint.dense())
    return model, {n: Table(torch.from_numpy(np.array(checkpoint.table(n)))).eval() for n in checkpoint.layout.layers}


def logits_of(model: EngramModel, tables: dict[int, Table]) -> Tensor:
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    rows = model.layout.rows(ids.numpy())
    with torch.no_grad():
        out: Tensor = model(ids, {n: tables[n](torch.from_numpy(rows[n])) for n in tables})
    return out


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_scratch_learns_and_uses_its_memory(kind: str, job: Any, tmp_path: Path) -> None:
    name, overrides = job(
        kind, "run", "run.max_steps=150", "run.eval_every=0", "optimizer.lr=3e-3", "tables.lr_multiplier=5"
    )
    result = train(name, overrides)
    assert result["finished"] and result["steps"] == 150
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert result["val_loss_before"] > 5.5 and result["val_loss"] < result["val_loss_before"] - 1.2
    assert np.mean([r["loss"] for r in log[-10:]]) < np.mean([r["loss"] for r in log[1:11]]) - 1.0
    assert all(("router_loss" in r) == (kind == "moe") for r in log[1:])
    trained = assemble(load_recipe(name, overrides), open_checkpoint(tmp_path / "run" / "final"))
    val, without = evaluate(name, overrides, trained, tmp_path), 0.0
    for table in trained.tables.values():
        assert table.weight.abs().max() > 0
        table.weight.zero_()
    without = evaluate(name, overrides, trained, tmp_path)
    assert val == pytest.approx(result["val_loss"], abs=1e-5)
    assert without > val + 0.02, "the tables carry something"


def evaluate(name: str, overrides: list[str], trainee: Any, tmp_path: Path) -> float:
    from engram.builders.data import HeldOut
    from engram.builders.train_setup import open_corpus, open_optimizer

    recipe = load_recipe(name, overrides)
    cache = open_corpus(recipe, trainee, Progress())
    held = HeldOut.choose(cache, cache.split(recipe.data.held_out)[1], 64, recipe.data.eval_tokens)
    stepper = Stepper(trainee, open_optimizer(recipe, trainee), 0)
    return stepper.evaluate(held.batches(cache, trainee.layout, 256), held.bytes)["val_loss"]


def test_attach_leaves_the_backbone_and_untouched_rows_alone(job: Any, tmp_path: Path, backbone: Path) -> None:
    more = ["run.max_steps=60", "run.eval_every=20", "layout.layers=[1, final]", "optimizer.lr=3e-3"]
    name, overrides = job("attach", "run", *more, "layout.rows_per_head=5000")
    fresh = assemble(load_recipe(name, overrides))
    result = train(name, overrides)
    assert result["val_loss"] < result["val_loss_before"] - 0.05
    log = read_log(tmp_path / "run" / "log.jsonl")
    wanted = "step tokens loss lr table_lr tok_s dt_s eta_s rss_mb rows_touched rows_total gate_mean gate_p95 grad_norm"
    assert all(set(wanted.split()) <= r.keys() for r in log[1:])
    assert [r["step"] for r in log if "val_loss" in r] == [0, 20, 40, 60]
    for r in log:
        if "val_loss" in r:
            assert r["val_ppl"] == pytest.approx(np.exp(r["val_loss"])) and 0 < r["val_bpb"] < r["val_loss"] * 2
    assert 0 < log[1]["gate_mean"] <= log[1]["gate_p95"] < 1
    checkpoint = open_checkpoint(tmp_path / "run" / "final")
    assert checkpoint.backbone.path == str(backbone) and checkpoint.layout.layers == (1, 2)
    checkpoint.backbone.verify(checkpoint.folder)
    alone, model = load_backbone(checkpoint.backbone), loaded(tmp_path / "run" / "final")[0]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.backbone.parameters(), strict=True))
    for layer in (1, 2):
        changed = (torch.from_numpy(np.array(checkpoint.table(layer))) != fresh.tables[layer].weight).any(1)
        assert 100 < int(changed.sum()) < 0.7 * len(changed)
    assert not (tmp_path / "run" / "final" / "state").exists()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoints", "final", "layout", "log.jsonl", "loss.png", "recipe.yaml"]
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again == load_recipe(name, overrides)


def test_a_fresh_memory_gives_the_backbones_loss(job: Any, tmp_path: Path) -> None:
    """Zero steps: both initialisations add nothing, bit for bit."""
    alone = None
    for init in ("value-zero", "table-zero"):
        name, overrides = job("attach", init, "run.max_steps=0", f"gate.init={init}", "gate.conv=4")
        assert train(name, overrides)["steps"] == 0
        model, tables = loaded(tmp_path / init / "final")
        ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            alone = model.backbone(ids).logits
        assert torch.equal(logits_of(model, tables), alone)


@pytest.mark.parametrize("layers, differentiated", [("[final]", []), ("[1]", [1]), ("[0]", [0, 1])])
def test_nothing_below_the_memory_is_differentiated(layers: str, differentiated: list[int], job: Any) -> None:
    name, overrides = job("attach", "run", f"layout.layers={layers}")
    trainee = assemble(load_recipe(name, overrides))
    found: list[int] = []
    for number, block in enumerate(trainee.model.blocks):

        def look(_: Any, args: Any, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found.extend([number] if hidden.requires_grad else [])

        block.register_forward_hook(look)
    trainee.training(True)
    ids = np.ones((1, 8), dtype=np.int64)
    memory = {n: trainee.tables[n](torch.from_numpy(r)) for n, r in trainee.layout.rows(ids).items()}
    assert trainee.model(torch.from_numpy(ids), memory).requires_grad
    assert found == differentiated


INTERRUPTIONS = [("attach", ()), ("attach", ("backbone.train=lora", "backbone.lora.dropout=0.1")),
                 ("attach", ("backbone.train=full", "tables.optimizer=rowwise-adam")), ("moe", ())]  # fmt: skip


@pytest.mark.parametrize("kind, more", INTERRUPTIONS)
def test_going_on_gives_the_same_losses_bit_for_bit(
    kind: str, more: tuple[str, ...], job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ["run.max_steps=9", "run.eval_every=4", "run.save_every=3", "data.accumulation=2", *more]
    name, overrides = job(kind, "straight", *limits)
    expected = train(name, overrides)
    _, overrides = job(kind, "cut", *limits)
    step = Stepper.step

    def fails(self: Stepper, batches: Any, number: int, factor: float) -> dict[str, Any]:
        if number == 7:
            raise OSError("power is gone")
        return step(self, batches, number, factor)

    monkeypatch.setattr(Stepper, "step", fails)
    with pytest.raises(OSError, match="power"):
        train(name, overrides)
    monkeypatch.undo()
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "other-cache"))
    result = train(name, overrides, resume="auto")
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert result["loss"] == expected["loss"] and result["val_loss"] == expected["val_loss"]
    tensors = "tables/layer-01.safetensors" if kind == "moe" else "tables/layer-02.safetensors"
    for file in (tensors, "layers.safetensors"):
        same = [(tmp_path / out / "final" / file).read_bytes() for out in ("cut", "straight")]
        assert same[0] == same[1], file
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000009"]


KILLED = """
import os, signal, sys
from engram.builders import checkpoint
from engram.builders.train import train
from engram.builders.train_step import Stepper

where, name, *overrides = sys.argv[1:]
saves, step, write = 0, Stepper.step, checkpoint.write_dense

def killed_in_step(self, batches, number, factor):
    if where == "step" and number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches, number, factor)

def killed_in_save(path, dense):
    global saves
    saves += 1
    if where == "save" and saves == 2:  # tables are written, the rest is not
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, dense)

Stepper.step, checkpoint.write_dense = killed_in_step, killed_in_save
train(name, overrides, resume="auto")
"""


def test_kill_9_in_a_step_and_in_a_save_changes_no_loss(job: Any, tmp_path: Path) -> None:
    limits = ["run.max_steps=9", "run.eval_every=3", "run.save_every=3"]
    name, straight = job("attach", "straight", *limits)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    train(name, straight)
    _, overrides = job("attach", "cut", *limits)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for where, code, left in (("save", -9, ["step-000003"]), ("step", -9, ["step-000003", "step-000006"])):
        done = subprocess.run([sys.executable, script, where, name, *overrides], env=environment, capture_output=True)
        assert done.returncode == code, done.stderr.decode()
        folders = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
        assert [n for n in folders if not n.endswith(".partial")] == left
        assert any(n.endswith(".partial") for n in folders) == (where == "save")
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "tokens')  # a line that the kill cut off
    train(name, overrides, resume="auto")
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert not list((tmp_path / "cut").rglob("*.partial"))


class Interrupts(Progress):
    """Presses Ctrl-C while step `at` runs."""

    def __init__(self, at: int) -> None:
        self.at, self.words = at, list[str]()

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        outer = self

        class Pressing(Task):
            steps = 0

            def note(self, text: str) -> None:
                self.steps += 1
                if label == "train" and self.steps == outer.at:
                    signal.raise_signal(signal.SIGINT)

        return Pressing()

    def say(self, text: str) -> None:
        self.words.append(text)


def test_ctrl_c_saves_and_says_how_to_go_on(job: Any, tmp_path: Path) -> None:
    limits = ["run.max_steps=5", "run.eval_every=2", "run.save_every=0"]
    name, straight = job("attach", "straight", *limits)
    train(name, straight)
    _, overrides = job("attach", "cut", *limits)
    progress = Interrupts(3)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(name, overrides, progress=progress)
    assert signal.getsignal(signal.SIGINT) is before
    assert "step 3 is saved" in progress.words[-1] and "--resume auto" in progress.words[-1]
    result = train(name, overrides, resume=str(tmp_path / "cut" / "checkpoints" / "step-000003"))
    assert result["steps"] == 5 and losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_time_is_up_and_later_goes_on(job: Any, tmp_path: Path) -> None:
    name, overrides = job("attach", "run", "run.max_steps=4", "run.save_every=0")
    first = train(name, overrides, max_time=1e-9)
    assert first["steps"] == 0 and not first["finished"]
    second = train(name, overrides, resume="auto")
    assert second["steps"] == 4 and second["finished"]
    third = train(name, overrides, resume="auto", max_steps=6)
    assert third["steps"] == 6, "a finished run can be prolonged"
    tokens = read_log(tmp_path / "run" / "log.jsonl")[-1]["tokens"]
    assert train(name, overrides, resume="auto", max_steps=9, max_tokens=tokens)["steps"] == 6, "tokens end it first"


def test_nonsense_ends_the_run_and_keeps_the_checkpoint(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, overrides = job("attach", "run", "run.max_steps=9", "run.save_every=2")
    nll = Stepper.nll

    def breaks(self: Stepper, batch: Any, scale: float = 1.0) -> Tensor:
        broken = self.trainee.training_steps = getattr(self.trainee, "training_steps", 0) + 1  # type: ignore[attr-defined]
        return nll(self, batch, scale) * (float("nan") if broken == 8 else 1.0)

    monkeypatch.setattr(Stepper, "nll", breaks)
    with pytest.raises(TrainError, match=r"loss is nan at step \d; the last good checkpoint is .*step-00000") as caught:
        train(name, [*overrides, "data.eval_tokens=200"])
    assert "optimizer.lr" in caught.value.hint
    saved = max((tmp_path / "run" / "checkpoints").iterdir())
    assert all(np.isfinite(open_checkpoint(saved).table(n)).all() for n in open_checkpoint(saved).layout.layers)


def test_lora_is_merged_in_what_is_saved(job: Any, tmp_path: Path) -> None:
    more = ["backbone.train=lora", "backbone.lora.targets=[q_proj, down_proj]", "run.max_steps=8", "optimizer.lr=1e-2"]
    name, overrides = job("attach", "run", *more, "layout.layers=[1]")
    train(name, overrides)
    recipe = load_recipe(name, overrides)
    last = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-000008")
    adapted = assemble(recipe, last)
    from engram.builders.train_setup import open_optimizer
    from engram.builders.train_state import restore

    restore(last, adapted, open_optimizer(recipe, adapted))
    adapted.training(False)
    model, tables = loaded(tmp_path / "run" / "final")
    assert type(model.backbone).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in model.backbone.named_parameters())
    merged = logits_of(model, tables)
    assert (merged - logits_of(adapted.model, adapted.tables)).abs().max() < 1e-5
    plain = assemble(load_recipe(name, [*overrides, "backbone.train=frozen"]))
    plain.training(False)
    assert (merged - logits_of(plain.model, plain.tables)).abs().max() > 1e-3, "the adapters did something"
    with pytest.raises(SetupError, match=r"lora\.targets: q_prog is no linear module"):
        assemble(load_recipe(name, [*overrides, "backbone.lora.targets=[q_prog]"]))


def test_start_from_a_checkpoint(job: Any, tmp_path: Path) -> None:
    name, overrides = job("attach", "first", "run.max_steps=6", "layout.layers=[final]", "gate.conv=4")
    first = train(name, overrides)
    more = [f"start_from={tmp_path / 'first' / 'final'}", "backbone.source=null", "run.max_steps=3"]
    name, overrides = job("attach", "second", *more, "layout.layers=[0]")
    overrides = [o for o in overrides if not o.startswith("backbone.source=/")]
    second = train(name, overrides)
    assert second["val_loss_before"] == pytest.approx(first["val_loss"], abs=1e-6)
    assert open_checkpoint(tmp_path / "second" / "final").layout.layers == (2,), "the layout comes with it"
    assert open_checkpoint(tmp_path / "second" / "final").gates()[2]["conv_kernel"] == 4


def test_bfloat16_keeps_float32_weights(job: Any, tmp_path: Path) -> None:
    for kind, more in (("attach", []), ("dense", ["layout.layers=[0, final]"])):
        name, overrides = job(kind, kind, "run.max_steps=3", "backbone.dtype=bfloat16", *more)
        result = train(name, overrides)
        assert np.isfinite(result["loss"])
        recipe = load_recipe(name, overrides)
        trainee = assemble(recipe, open_checkpoint(tmp_path / kind / "final"))
        wanted = torch.bfloat16 if kind == "attach" else torch.float32
        assert {p.dtype for p in trainee.model.backbone.parameters()} == {wanted}
        assert {p.dtype for p in trainee.model.gates.parameters()} == {torch.float32}


def test_dry_run_counts_and_writes_nothing(job: Any, tmp_path: Path) -> None:
    name, overrides = job("dense", "run", "run.max_steps=10", "layout.layers=[0, 1]")
    result = train(name, overrides, dry_run=True)
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == []
    trainee = assemble(load_recipe(name, overrides))
    count = sum(p.numel() for p in trainee.model.backbone.parameters())
    gates = sum(p.numel() for p in trainee.model.gates.parameters())
    tables = sum(table.weight.numel() for table in trainee.tables.values())
    assert result["parameters"] == {"backbone": count, "backbone_trained": count, "gates": gates, "tables": tables}
    assert result["memory_bytes"]["weights"] == 4 * (count + gates + tables)
    assert result["memory_bytes"]["optimizer"] == 8 * (count + gates) + 4 * tables // 8
    assert result["tokens"] == 10 * 64 * 4 and result["tokens_per_second"] > 0
    assert result["expected_seconds"] == pytest.approx(result["tokens"] / result["tokens_per_second"])


def test_what_cannot_be_begun_or_resumed_is_refused(job: Any, tmp_path: Path) -> None:
    name, overrides = job("attach", "run", "run.max_steps=2")
    train(name, overrides)
    with pytest.raises(ResumeError, match="run exists") as caught:
        train(name, overrides)
    assert "--resume auto" in caught.value.hint
    with pytest.raises(ResumeError, match=r"optimizer\.lr is 0\.5, the run was begun with 0\.005"):
        train(name, [*overrides, "optimizer.lr=0.5"], resume="auto")
    with pytest.raises(ResumeError, match="holds no state"):
        train(name, overrides, resume=str(tmp_path / "run" / "final"))
    saved = tmp_path / "run" / "checkpoints" / "step-000002" / "state" / "standing.json"
    text = saved.read_text()
    saved.write_text(text.replace('"held_out_sha256": "', '"held_out_sha256": "0'))
    with pytest.raises(ResumeError, match="corpus is another one"):
        train(name, overrides, resume="auto")
    saved.write_text(text[:50])
    with pytest.raises(ResumeError, match=r"standing\.json cannot be read"):
        train(name, overrides, resume=str(saved.parents[1]))
    optimizer = saved.with_name("optimizer.safetensors")
    saved.write_text(text)
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    with pytest.raises(ResumeError, match="cannot be read"):
        train(name, overrides, resume="auto", max_steps=3)


def test_what_the_backbone_does_not_have_is_refused(job: Any, tmp_path: Path) -> None:
    name, overrides = job("dense", "run", "run.max_steps=2")
    for more, words in (
        ("backbone.architecture=lama", "'lama' is no model type"),
        ("backbone.config.hiden_size=3", "hiden_size is not a key of llama"),
        ("backbone.config.vocab_size=30", "vocab_size 30 is below the tokenizer's 400"),
        ("backbone.config.num_attention_heads=5", "cannot build a llama"),
    ):
        with pytest.raises(SetupError, match=words):
            train(name, [*overrides, more])
    if not torch.cuda.is_available():
        with pytest.raises(SetupError, match="sees no GPU"):
            train(name, [*overrides, "run.device=cuda"])
    assert not (tmp_path / "run").exists()
