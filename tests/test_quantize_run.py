"""`engram quantize` as a whole: text in, plan, tables, gate, verdict; exit codes and what is left on the disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from float_tables import Recorder
from gguf_llama import write_gguf
from texts import write_lines

from engram import EngramError
from engram.builders.atomic import MARK
from engram.builders.backbone import BackboneError
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig, CorpusError
from engram.cli.main import main
from engram.quantize.inspect import inspect
from engram.quantize.package import ExportConfig, export_package, open_source
from engram.quantize.tables import QuantizeError
from engram.runtime.quality_gate import Gate
from engram.runtime.quantize_config import BackboneWish, Bound, QualityError, QuantizeRun
from engram.runtime.quantize_run import quantize_run
from engram.runtime.row_sources import StoredRows

Texts = dict[str, CorpusConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), layers=(1, 3))


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Texts:
    """Text for calibration, and other text of the same kind to judge by."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    generator, found = np.random.default_rng(0), {}
    for part in ("calibrate", "gate"):
        found[part] = write_lines(tmp_path / f"{part}.jsonl", generator, 12, 80)
    return found


def command(*words: object) -> tuple[int, Any]:
    """Exit code of `engram …`."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0), None
    return 0, None


def test_the_gate_passes_and_fails_by_exit_code(
    made: Path, tmp_path: Path, texts: Texts, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = ("--gate", tmp_path / "gate.jsonl", "--gate-tokens", 400)
    out = tmp_path / "good"
    assert command("quantize", made, "--out", out, "--tables", "int8", *gate, "--max-loss", "50%", "--json")[0] == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] and told["out"] == str(out) and inspect(out)["quality"] == told["quality"]
    assert set(told["quality"]["loss"]) == {"backbone", "float", "quantized", "zero_table", "shuffled_rows"}

    bad = tmp_path / "bad"
    assert command("quantize", made, "--out", bad, "--tables", "nf4", *gate, "--max-loss", "0", "--json")[0] == 1
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert not told["passed"] and told["out"] == f"{bad}.rejected" and "--max-loss 0 allows" in said.err
    assert not bad.exists() and inspect(Path(told["out"]))["quality"]["passed"] is False
    assert command("export", told["out"], "--out", tmp_path / "package")[0] == 1
    assert "did not pass its quality gate" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.candidate*")) and not list(tmp_path.glob("*.partial"))


def test_a_refused_result_leaves_an_earlier_one_alone(made: Path, tmp_path: Path, texts: Texts) -> None:
    out = tmp_path / "out"
    quantize_run(QuantizeRun(made, out, "int8"))
    before = (out / "engram.json").read_bytes()
    config = QuantizeRun(made, out, "nf4", gate=texts["gate"], gate_tokens=300, max_loss=Bound(0.0), force=True)
    assert not quantize_run(config)["passed"]
    assert (out / "engram.json").read_bytes() == before and (tmp_path / "out.rejected").is_dir()
    with pytest.raises(EngramError, match="documents of at least 2 tokens"):
        (tmp_path / "empty.txt").write_text("a")
        text = CorpusConfig((str(tmp_path / "empty.txt"),))
        quantize_run(QuantizeRun(made, out, "nf4", gate=text, force=True))
    assert (out / "engram.json").read_bytes() == before and not list(tmp_path.glob("*.candidate*"))


def test_too_few_documents_for_a_verdict_are_found_before_anything_is_written(
    made: Path, tmp_path: Path, texts: Texts
) -> None:
    lines = (tmp_path / "gate.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:7]))
    few = CorpusConfig((str(tmp_path / "few.jsonl"),))
    config = QuantizeRun(made, tmp_path / "out", "nf4", gate=few, gate_tokens=400, max_loss=Bound(9.0))
    with pytest.raises(QualityError, match="has 7 documents of at least 2 tokens, a verdict by --max-loss needs 8"):
        quantize_run(config)
    assert not list(tmp_path.glob("out*"))
    told = quantize_run(replace(config, max_loss=None))
    assert told["quality"]["documents"] == 7 and told["passed"], "without a verdict fewer do"


def test_what_a_judge_was_interrupted_over_is_not_written_again(
    made: Path, tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    config = QuantizeRun(
        made, tmp_path / "out", "nf4", gate=texts["gate"], gate_tokens=300, backbone=BackboneWish("int8")
    )

    def stopped(self: Gate, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gate, "__call__", stopped)
        quantize_run(config)
    recorder = Recorder()
    told = quantize_run(config, recorder)
    again = [f"{part}: written by an earlier run" for part in ("backbone", "layer 1", "layer 3")]
    assert set(again) <= set(recorder.said) and told["quality"]["parts"]["backbone"]["kl"]["mean"] > 0
    assert not list(tmp_path.glob("*.partial"))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gate, "__call__", stopped)
        quantize_run(replace(config, force=True))
    recorder = Recorder()
    told = quantize_run(replace(config, backbone=None, force=True), recorder)
    assert any("from another run (other backbone): starting over" in line for line in recorder.said)
    assert "parts" not in told["quality"] and inspect(tmp_path / "out")["backbone"]["kind"] != "embedded"


def test_a_float_backbone_that_was_altered_is_no_reference(tmp_path: Path, texts: Texts) -> None:
    made = tiny.write_checkpoint(tmp_path / "model", layers=(1,))
    weights = Path(open_checkpoint(made).backbone.path) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BackboneError, match="model.safetensors has SHA-256"):
        quantize_run(QuantizeRun(made, tmp_path / "out", "nf4", gate=texts["gate"], gate_tokens=300))


@pytest.mark.parametrize("part", ["gate", "calibrate"])
def test_a_text_that_is_not_there_is_found_before_any_work(made: Path, tmp_path: Path, texts: Texts, part: str) -> None:
    none = {part: CorpusConfig((str(tmp_path / "none.jsonl"),))}
    options: dict[str, Any] = {"gate": texts["gate"], "calibrate": texts["calibrate"], "unseen": "h2"} | none
    with pytest.raises(CorpusError, match=r"none\.jsonl' names no readable file"):
        quantize_run(QuantizeRun(made / "nowhere", tmp_path / "out", "nf4", **options))


def test_rows_are_stored_by_how_a_text_reads_them(made: Path, tmp_path: Path, texts: Texts) -> None:
    checkpoint = open_checkpoint(made)
    config = QuantizeRun(
        made, tmp_path / "mixed", "nf4", calibrate=texts["calibrate"], frequent=("f32", 0.25), drop_unseen=True
    )
    told = quantize_run(config)
    read: dict[int, set[int]] = {n: set() for n in checkpoint.layout.layers}
    from engram.builders.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(made)
    for line in (tmp_path / "calibrate.jsonl").read_text().splitlines():
        ids = np.array([tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids])
        for n, rows in checkpoint.layout.rows(ids).items():
            read[n] |= set(rows.ravel().tolist())
    with open_source(tmp_path / "mixed") as (_, layout, tables):
        assert tables is not None
        stored = StoredRows(tables)
        for n in layout.layers:
            every = np.arange(layout.table_rows[n])
            made_ND = stored(n, every[None, :, None])[0]
            truth_ND = np.asarray(checkpoint.table(n))
            exact, zero = (made_ND == truth_ND).all(1), (made_ND == 0).all(1)
            seen = told["plans"][str(n)]["seen_rows"]
            assert set(every[~zero].tolist()) <= read[n], "what the text never reads reads as zeros"
            assert (~zero).sum() == seen, "and nothing else does"
            assert exact.sum() == round(0.25 * seen), "a quarter of the seen rows are float"
            assert 0.7 * len(read[n]) < seen < len(read[n]), "some documents are held out, to measure the loss on"
    assert told["held_out"]["documents"] == 12 - told["calibration"]["counted_documents"] == 3
    export_package(ExportConfig(tmp_path / "mixed", tmp_path / "package"))
    assert inspect(tmp_path / "package")["layers"][0]["dtype"] == "nf4+f32+dropped"


def test_auto_keeps_a_budget_and_says_what_it_traded(made: Path, tmp_path: Path, texts: Texts) -> None:
    full = sum(layer["bytes"] for layer in quantize_run(QuantizeRun(made, tmp_path / "int8"))["tables"].values())
    told = quantize_run(QuantizeRun(made, tmp_path / "auto", "auto", texts["calibrate"], budget=full))
    assert sum(layer["bytes"] for layer in told["tables"].values()) == told["table_bytes"]
    on_disk = sum(file.stat().st_size for file in (tmp_path / "auto" / "tables").iterdir())
    assert on_disk == told["table_bytes"], "the plan knew the bytes of all files"
    assert told["table_bytes"] <= full and {"1", "3"} == set(told["plans"])
    assert sum(c["rows"] for c in told["plans"]["1"]["classes"]) == open_checkpoint(made).layout.table_rows[1]


def test_auto_finds_less_for_a_larger_loss(made: Path, tmp_path: Path, texts: Texts) -> None:
    sizes = []
    for text in ("0.01%", "20%"):
        config = QuantizeRun(made, tmp_path / text[:3], "auto", texts["calibrate"], max_loss=Bound.parse(text))
        told = quantize_run(config)
        sizes.append(told["table_bytes"])
        chosen = [plan for plan in told["tried"] if plan["table_bytes"] == told["table_bytes"]]
        assert chosen and chosen[0]["ci95"][1] <= Bound.parse(text).nats(7.0)
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tables": "auto", "budget": 1}, "known only from a text"),
        ({"tables": "nf4", "frequent": ("int8", 0.1)}, "known only from a text"),
        ({"tables": "nf4", "drop_unseen": True}, "known only from a text"),
        ({"tables": "nf4", "calibrate": True}, "nothing uses it"),
        ({"tables": "nf4", "calibrate": True, "unseen": "int8", "drop_unseen": True}, "contradict"),
        ({"tables": "auto", "calibrate": True, "budget": 1, "unseen": "int8"}, "chooses codecs for all rows itself"),
        ({"tables": "auto", "calibrate": True}, "needs a bound"),
        ({"tables": "nf4", "budget": 1}, "--budget is for --tables auto"),
        ({"tables": "nf4", "max_loss": Bound(0.1)}, "needs a text to measure"),
        ({"tables": "auto", "calibrate": True, "budget": 9, "max_loss": Bound(0.1)}, "needs a text to measure"),
        ({"tables": "nf5"}, "'nf5' is not known"),
        ({"tables": "fp8-tensor:3950b4f1"}, "is only read"),
        ({"tables": "nf4", "calibrate": True, "unseen": "nvfp4:3950b4f1"}, "is only read"),
        ({"tables": "nf4", "calibrate": True, "unseen": "nf5"}, "'nf5' is not known"),
    ],
)
def test_options_that_contradict_one_another_are_refused_before_any_work(
    options: dict[str, Any], words: str, texts: Texts, tmp_path: Path
) -> None:
    if options.get("calibrate"):
        options = options | {"calibrate": texts["calibrate"]}
    with pytest.raises(EngramError, match=words):
        QuantizeRun(tmp_path / "none", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--frequent", "int8"), "no codec with a share"),
        (("--frequent", "int8:100%"), "no codec with a share"),
        (("--override", "a=q8_0"), "options of the backbone need --backbone TYPE"),
        (("--backbone", "q8_0", "--override", "q8_0"), "--override 'q8_0' is no REGEX=TYPE"),
        (("--gate-tokens", "4k"), "there is no gate"),
        (("--sample", "1k"), "--sample writes nothing and does not use --out"),
        (("--max-loss", "much"), "neither nats a token nor a percentage"),
        ((), "--out is missing"),
    ],
)
def test_options_that_cannot_be_read_are_errors(
    words: tuple[str, ...], message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out") if words else ()
    assert command("quantize", made, *out, *words)[0] == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sample", "1k", "--tables", "auto"), "auto is none"),
        (("--sample", "20M"), "more than 10,000,000 rows"),
        (("--sample", "1k", "--backbone", "int8"), "does not use --backbone"),
    ],
)
def test_samples_that_cannot_be_are_errors(
    words: tuple[str, ...], message: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("quantize", made, *words)[0] == 1
    assert message in capsys.readouterr().err


def test_a_sample_is_reported_and_nothing_written(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(made.rglob("*"))
    assert command("quantize", made, "--tables", "nf4,int8", "--sample", 200, "--json")[0] == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"]["1"]["codecs"].keys() == {"nf4", "int8"} and told["confidence"] == 0.95
    assert sorted(made.rglob("*")) == before


def test_the_budget_below_the_least_is_refused(made: Path, tmp_path: Path, texts: Texts) -> None:
    with pytest.raises(EngramError, match="the budget is 1"):
        quantize_run(QuantizeRun(made, tmp_path / "auto", "auto", texts["calibrate"], budget=1))
    assert QuantizeError and not (tmp_path / "auto").exists()


def test_the_gate_says_which_part_cost_what(made: Path, tmp_path: Path, texts: Texts) -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    options: dict[str, Any] = {"gate": texts["gate"], "gate_tokens": 400}
    alone = quantize_run(QuantizeRun(made, tmp_path / "tables", "nf4", **options))["quality"]
    told = quantize_run(QuantizeRun(made, tmp_path / "both", "nf4", backbone=BackboneWish("int8"), **options))
    both, parts = told["quality"], told["quality"]["parts"]
    assert told["backbone"]["type"] == "int8" and "parts" not in alone
    assert parts["tables"]["change"] == alone["change"] and parts["tables"]["kl"] == alone["kl"]
    assert both["loss"]["float"] == alone["loss"]["float"] != both["loss"]["quantized"] != alone["loss"]["quantized"]
    assert 0 != abs(parts["backbone"]["change"]["nll"]) < 0.1, "int8 weights change a little, and only a little"
    assert parts["backbone"]["without_memory"] != both["loss"]["backbone"]
    export_package(ExportConfig(tmp_path / "both", tmp_path / "package"))
    assert inspect(tmp_path / "package")["quality"]["parts"] == parts


def test_a_gguf_backbone_is_weighed_by_a_text(
    tmp_path: Path, texts: Texts, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make gguf)")
    source = write_gguf(tmp_path / "float.gguf", vocab=300)
    checkpoint = tiny.write_checkpoint(tmp_path / "model", layers=(1,), backbone=source)
    words = ("quantize", checkpoint, "--backbone", "q4_k_m", "--override", "ffn_down=q8_0", "--json")
    options = ("--importance", tmp_path / "calibrate.jsonl", "--gate", tmp_path / "gate.jsonl", "--gate-tokens", 300)
    assert command(*words, "--out", tmp_path / "small", *options)[0] == 0
    told = json.loads(capsys.readouterr().out)
    written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "small/backbone/model.gguf").tensors}
    assert written["blk.1.ffn_down.weight"] == "Q8_0" and written["blk.0.ffn_up.weight"] == "Q4_K"
    assert told["backbone"]["importance_tensors"] > 0 and told["quality"]["parts"]["backbone"]["kl"]["mean"] > 0
    kept = tmp_path / "small.imatrix.gguf"
    assert kept.is_file()
    assert command(*words, "--out", tmp_path / "again", "--importance", kept)[0] == 0
    same = [(tmp_path / name / "backbone" / "model.gguf").read_bytes() for name in ("small", "again")]
    assert same[0] == same[1], "the kept matrix makes the same backbone"
    again = (*words, "--out", tmp_path / "small", "--importance", tmp_path / "calibrate.jsonl")
    shutil.rmtree(tmp_path / "small")
    assert command(*again)[0] == 1 and "small.imatrix.gguf exists" in capsys.readouterr().err
    (tmp_path / "small.partial").mkdir()
    (tmp_path / "small.partial" / MARK).write_text("{}")
    assert command(*again)[0] == 0 and "from the run that is gone on with" in capsys.readouterr().err
    assert (tmp_path / "small" / "backbone" / "model.gguf").read_bytes() == same[0]
