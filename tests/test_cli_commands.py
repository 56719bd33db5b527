"""Every command hands its worker what was asked for, prints one JSON object, and keeps words on stderr."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from engram import EngramError, Progress
from engram.cli import main as cli


class Worker:
    """Stands in for a worker: keeps what it was called with, speaks, and answers."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.config: Any = None
        self.named: dict[str, Any] = {}

    def __call__(self, *given: Any, **named: Any) -> dict[str, Any]:
        self.config, self.named = given[0], named
        speakers = [part for part in (*given, *named.values()) if isinstance(part, Progress)]
        for progress in speakers:
            progress.say("working")
            progress.table("counts", ["a"], [["1"]])
        for on_text in (part for part in given if callable(part) and not isinstance(part, Progress)):
            on_text("streamed")
        return self.answer


def call(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    answer: dict[str, Any],
    *words: str,
) -> tuple[Worker, str, str]:
    """Run `words` with the function at `target` ("module:name") replaced; (worker, stdout, stderr)."""
    module, name = target.split(":")
    worker = Worker(answer)
    monkeypatch.setattr(importlib.import_module(module), name, worker)
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert not leaving.value.code, err
    if "--json" in words:
        assert json.loads(out) == answer
        assert out.count("\n") == 1
    return worker, out, err


def test_build_vocab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "build-vocab",
        "a.txt",
        "b",
        "--tokenizer",
        "t.json",
        "--out",
        "lay",
        "--dialect",
        "v41",
        "--orders",
        "2,3,4",
    ]
    words += ["--heads", "4", "--rows-per-head", "65536", "--budget", "2GB", "--head-dim", "32", "--layers", "1,14"]
    words += [
        "--seed",
        "7",
        "--pad-id",
        "2",
        "--no-compress",
        "--suffix",
        ".rst",
        "--strict",
        "--field",
        "body",
        "--json",
    ]
    target = "engram.builders.build_vocab:build_vocab"
    worker, _, err = call(monkeypatch, capsys, target, {"tokens": 5, "rows": {"1": 3}}, *words)
    config = worker.config
    assert (config.corpus.sources, config.corpus.field, config.corpus.strict) == (("a.txt", "b"), "body", True)
    assert config.corpus.suffixes == (".rst",)
    assert (config.tokenizer, config.out, config.dialect) == ("t.json", Path("lay"), "v41")
    assert (config.orders, config.heads, config.rows_per_head, config.head_dim) == ((2, 3, 4), 4, 65536, 32)
    assert (config.layers, config.seed, config.pad_id, config.compress) == ((1, 14), 7, 2, False)
    assert config.budget_bytes == 2_000_000_000
    assert "working" in err


def test_build_vocab_defaults_are_the_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engram.builders.build_vocab import BuildVocabConfig
    from engram.builders.corpus import CorpusConfig

    words = ["build-vocab", "a.txt", "--tokenizer", "t.json", "--out", "lay"]
    worker, _, _ = call(monkeypatch, capsys, "engram.builders.build_vocab:build_vocab", {}, *words)
    assert worker.config == BuildVocabConfig(corpus=CorpusConfig(("a.txt",)), tokenizer="t.json", out=Path("lay"))


def test_hash(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"ids": [5, 6], "compressed": [3, 4], "rows": {"1": [[10, 11], [12, 13]]}}
    target = "engram.builders.build_vocab:hash_report"
    worker, _, _ = call(monkeypatch, capsys, target, answer, "hash", "lay", "--ids", "5,6", "--local", "--json")
    assert worker.config == Path("lay")
    assert worker.named == {"ids": [5, 6], "text": None, "local": True}
    _, out, _ = call(monkeypatch, capsys, target, answer, "hash", "lay", "--text", "a b")
    assert [line.split() for line in out.splitlines() if "1" in line][-2:] == [
        ["0", "5", "3", "10", "11"],
        ["1", "6", "4", "12", "13"],
    ]


def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "r.yaml",
        "optimizer.lr=1",
        "--out",
        "here",
        "--resume",
        "auto",
        "--max-tokens",
        "2M",
        "--max-time",
        "3m",
    ]
    worker, _, _ = call(
        monkeypatch, capsys, "engram.builders.train:train", {"loss": 1.5}, *words, "--dry-run", "--json"
    )
    assert worker.named.pop("progress") is not None
    assert worker.named == {
        "resume": "auto",
        "dry_run": True,
        "max_tokens": 2_000_000,
        "max_steps": None,
        "max_time": 180.0,
    }
    assert str(worker.config) == "r.yaml"


def test_fill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fill", "ckpt", "--corpus", "a", "--corpus", "b", "--out", "o", "--force", "--json"]
    worker, _, _ = call(monkeypatch, capsys, "engram.builders.fill:fill", {"rows_filled": 3}, *words)
    assert worker.config.corpus.sources == ("a", "b")
    assert worker.config.force


def test_quantize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("engram.quantize.backbone_gguf.check_kind", lambda kind: None)  # llama.cpp need not be here
    words = ["quantize", "ckpt", "--out", "small", "--tables", "nf4", "--json"]
    target = "engram.runtime.quantize_run:quantize_run"
    answer: dict[str, Any] = {"tables": {}, "backbone": "unchanged", "out": "small"}
    config = call(monkeypatch, capsys, target, answer, *words)[0].config
    assert (config.checkpoint, config.out, config.tables, config.force) == (Path("ckpt"), Path("small"), "nf4", False)
    assert (config.gate, config.calibrate, config.backbone, config.budget) == (None, None, None, None)
    words += ["--gate", "a.jsonl", "--gate", "b.txt", "--max-loss", "0.5%", "--gate-tokens", "2k", "--seed", "3"]
    words += ["--calibrate", "c.txt", "--frequent", "int8:10%", "--unseen", "h2", "--force"]
    words += ["--backbone", "q4_k_m", "--backbone-from", "b.gguf", "--override", "ffn_down=q6_k", "--requantize"]
    words += ["--embedding-type", "q8_0", "--output-type", "f16", "--importance", "i.txt", "--importance", "j.txt"]
    config = call(monkeypatch, capsys, target, answer | {"passed": True}, *words)[0].config
    assert config.gate.sources == ("a.jsonl", "b.txt") and (config.gate_tokens, config.seed) == (2_000, 3)
    assert str(config.max_loss) == "0.5%" and config.calibrate.sources == ("c.txt",) and config.force
    assert (config.frequent, config.unseen, config.drop_unseen) == (("int8", 0.1), "h2", False)
    wish = config.backbone
    assert (wish.kind, wish.source, wish.tensor_types) == ("q4_k_m", Path("b.gguf"), (("ffn_down", "q6_k"),))
    assert (wish.embedding_type, wish.output_type, wish.requantize) == ("q8_0", "f16", True)
    assert wish.importance.sources == ("i.txt", "j.txt")
    words = ["quantize", "ckpt", "--out", "o", "--tables", "auto", "--budget", "2MB", "--calibrate", "c", "--json"]
    words += ["--backbone", "q8_0", "--importance", "kept.gguf"]
    config = call(monkeypatch, capsys, target, answer, *words)[0].config
    assert (config.tables, config.budget, config.backbone.importance) == ("auto", 2_000_000, Path("kept.gguf"))


def test_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "ckpt", "--out", "pkg", "--reference-backbone", "--format", "package", "--force", "--json"]
    worker, _, _ = call(monkeypatch, capsys, "engram.quantize.package:export_package", {"bytes": 9}, *words)
    config = worker.config
    assert (config.source, config.out, config.embed_backbone, config.force) == (Path("ckpt"), Path("pkg"), False, True)


def test_verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    target = "engram.quantize.verify:verify_package"
    answer: dict[str, Any] = {"ok": True, "checked": {"files": 4}, "problems": []}
    worker, _, _ = call(monkeypatch, capsys, target, answer, "verify", "pkg", "--json")
    assert worker.config == Path("pkg")
    monkeypatch.setattr(importlib.import_module("engram.quantize.verify"), "verify_package",
                        Worker({"ok": False, "checked": {"files": 3}, "problems": ["one", "two"]}))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["verify", "pkg"])
    assert leaving.value.code == 1
    assert capsys.readouterr().out.endswith("  - one\n  - two\n")


RAN = {"text": "streamed", "token_ids": [1], "prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0}
RAN |= {"rows_read": 3, "bytes_read": 2000, "peak_rss_bytes": 5_000_000, "row_io": "mmap", "kernels": "cpp-avx2"}
RAN |= {"engine": "torch"}


def test_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "pkg", "--prompt", "hi", "--offload", "ram", "--max-tokens", "8", "--temperature", "0.5"]
    words += ["--top-p", "0.9", "--seed", "3", "--table-cache", "64MiB"]
    target = "engram.runtime.generate:run"
    worker, _, _ = call(monkeypatch, capsys, target, RAN, *words, "--json")
    config = worker.config
    assert (config.package, config.prompt, config.offload, config.max_tokens) == (Path("pkg"), "hi", "ram", 8)
    assert (config.temperature, config.top_p, config.seed, config.table_cache) == (0.5, 0.9, 3, 64 << 20)
    assert (config.verify, config.table_io) == ("first-touch", "auto")
    _, out, err = call(monkeypatch, capsys, target, RAN, *words)
    assert out == "streamed\n"
    assert "decode 5.0 tokens/s, 3 rows (2.0 kB) read" in err
    assert err.endswith("rows: mmap, cpp-avx2\n")
    worker, _, _ = call(monkeypatch, capsys, target, RAN, *words, "--verify", "open", "--table-io", "uring", "--json")
    assert (worker.config.verify, worker.config.table_io) == ("open", "uring")


def test_run_chats_when_there_is_a_terminal_and_no_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Conversation:
        heard: list[str] = []

        def turn(self, text: str, on_text: Any) -> dict[str, Any]:
            self.heard.append(text)
            on_text(f"<{text}>")
            return RAN

    lines = iter(["hello", "again", ""])
    monkeypatch.setattr("engram.runtime.generate.open_session", lambda config, progress: Conversation())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["run", "pkg"])
    assert not leaving.value.code
    assert capsys.readouterr().out == "<hello>\n<again>\n"
    assert Conversation.heard == ["hello", "again"]


def test_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arm = {"nll": 2.0, "ppl": 7.389, "bpb": 0.9}
    answer: dict[str, Any] = {name: arm for name in ("backbone", "memory", "zero_table", "shuffled_rows")}
    answer |= {"tokens": 1000, "gain": {"nll": 0.25, "ci95": [0.2, 0.3]}}
    words = ["eval", "pkg", "--data", "a", "--data", "b", "--max-tokens", "20k", "--offload", "none"]
    target = "engram.runtime.evaluate:evaluate"
    worker, _, _ = call(monkeypatch, capsys, target, answer, *words, "--json")
    config = worker.config
    assert (config.data.sources, config.max_tokens, config.offload) == (("a", "b"), 20_000, "none")
    assert (config.verify, config.table_io) == ("first-touch", "auto")
    _, out, _ = call(monkeypatch, capsys, target, answer, *words)
    for word in ("backbone alone", "shuffled rows", "7.3890", "+0.2500", "between +0.2000 and +0.3000"):
        assert word in out


def test_warm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer: dict[str, Any] = {"kept": True, "rows": {"1": 5, "3": 7}, "bytes": 2000, "tokens": 900}
    answer |= {"lookups_served": 0.5, "held_out_tokens": 100, "cold_seconds": {"without": 0.5, "with": 0.25}}
    words = ["warm", "pkg", "--from", "a", "--from", "b", "--size", "8MiB", "--max-tokens", "20k"]
    worker, _, _ = call(monkeypatch, capsys, "engram.runtime.warm:warm", answer, *words, "--json")
    config = worker.config
    assert (config.text.sources, config.size, config.max_tokens) == (("a", "b"), 8 << 20, 20_000)
    _, out, _ = call(monkeypatch, capsys, "engram.runtime.warm:warm", answer, *words)
    assert out.startswith("12 rows (2.0 kB) of 900 tokens serve 50% of the lookups of 100 others;")
    assert "take 0.250 s instead of 0.500 s: kept" in out
    dropped = {"removed": ["pkg/hot"]}
    worker, _, _ = call(monkeypatch, capsys, "engram.runtime.warm:drop", dropped, "warm", "pkg", "--drop", "--json")
    assert worker.config == Path("pkg")
    for words in (["warm", "pkg"], ["warm", "pkg", "--drop", "--from", "a"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main(words)
        assert leaving.value.code == 2


def test_a_workers_error_leaves_with_1_and_no_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise EngramError("`pkg/engram.json` is not there", hint="name a package folder")

    monkeypatch.setattr("engram.runtime.generate.run", broken)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["run", "pkg", "--prompt", "x", "--json"])
    assert leaving.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: `pkg/engram.json` is not there\n\nhint: name a package folder\n"
