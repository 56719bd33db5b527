"""The layout folder: complete, atomic, resumable, and the window through which its hashing is checked."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from engram import Progress
from engram.builders import build_vocab as module
from engram.builders.build_vocab import BuildVocabConfig, BuildVocabError, build_vocab, hash_report
from engram.builders.corpus import CorpusConfig, CorpusError
from engram.builders.layout import Layout, LayoutError
from engram.builders.tokenizer import special_tokens

FILES = ["layout.json", "stats.json", "stats.png", "token_map.safetensors", "tokenizer.json", "tokenizer_info.json",
         "top_ngrams.safetensors"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))


def config(tmp_path: Path, **changes: Any) -> BuildVocabConfig:
    if not (tmp_path / "a.jsonl").exists():
        texts.write_tokenizer(tmp_path / "tokenizer")
        texts.write_corpus(tmp_path / "a.jsonl", 100)
    values: dict[str, Any] = dict(
        corpus=CorpusConfig((str(tmp_path / "a.jsonl"),)), tokenizer=str(tmp_path / "tokenizer"), out=tmp_path / "out",
        heads=2, head_dim=4, layers=(1, 3), rows_per_head=500, top=20,
    )  # fmt: skip
    return BuildVocabConfig(**(values | changes))


class Notes(Progress):
    """Keeps what was said and shown."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.shown.append(title)


def test_the_folder_holds_everything_and_the_report_what_the_contract_names(tmp_path: Path) -> None:
    notes = Notes()
    result = build_vocab(config(tmp_path), notes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert not (tmp_path / "out.partial").exists()
    layout = Layout.load(tmp_path / "out")
    assert layout.token_map is not None
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in texts.write_corpus(tmp_path / "same.jsonl", 100)]
    distinct = {tuple(layout.token_map[row[t - 1 : t + 1]]) for row in ids for t in range(1, len(row))}
    distinct |= {(layout.token_map[2], layout.token_map[row[0]]) for row in ids}
    assert result["documents"] == 100 and result["tokens"] == sum(map(len, ids))
    assert result["distinct_ngrams"]["2"] == len(distinct)
    assert result["vocab_size"] == len(layout.token_map) and result["compressed_size"] == layout.compressed_size
    assert result["reduction"] == pytest.approx(1 - layout.compressed_size / layout.vocab_size)
    digest = hashlib.sha256(layout.token_map.astype("<i8").tobytes()).hexdigest()
    assert result["lookup_sha256"] == digest
    assert result["rows"] == {str(layer): rows for layer, rows in layout.table_rows.items()}
    assert result["seconds"] > 0 and result["peak_rss_bytes"] > 1 << 20
    assert layout.tokenizer_sha256 == hashlib.sha256((tmp_path / "out/tokenizer.json").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out/stats.json").read_text()) == {k: v for k, v in result.items() if k != "out"}
    assert json.loads(json.dumps(result)) == result
    top = load_file(tmp_path / "out/top_ngrams.safetensors")
    assert top["tokens_2"].shape == (20, 2) and top["counts_3"].shape == (20,)
    assert special_tokens(tmp_path / "out") == special_tokens(tmp_path / "tokenizer")
    assert (tmp_path / "out/stats.png").read_bytes().startswith(b"\x89PNG")
    assert notes.shown[:2] == ["Corpus and vocabulary", "N-grams"]


def test_the_published_figures_of_deepseek_v3(tmp_path: Path, deepseek_v3_tokenizer: Path) -> None:
    texts.write_corpus(tmp_path / "a.jsonl", 5)
    result = build_vocab(config(tmp_path, tokenizer=str(deepseek_v3_tokenizer), heads=8, rows_per_head=646400))
    assert (result["vocab_size"], result["compressed_size"]) == (128815, 98627)
    assert f"{100 * result['reduction']:.3f}" == "23.435"
    assert result["lookup_sha256"] == "0e84461b633329215755b30226757dc28a1c49772f351048fe3b4c2070fb7649"
    report = hash_report(
        tmp_path / "out", ids=None, text="Only Alexander the Great could tame the horse Bucephalus.", local=True
    )
    assert report["ids"] == [22898, 19737, 270, 9327, 1494, 112253, 270, 15000, 406, 11999, 25670, 349, 16]
    assert report["compressed"] == [1134, 15695, 237, 2049, 1260, 85761, 237, 12071, 36, 9745, 20232, 290, 16]


def test_raw_ids_and_the_dialect_that_wants_them(tmp_path: Path) -> None:
    raw = build_vocab(config(tmp_path, compress=False))
    assert not (tmp_path / "out/token_map.safetensors").exists()
    assert raw["reduction"] == 0.0 and raw["lookup_sha256"] is None
    qwen = build_vocab(config(tmp_path, dialect="qwen-ple", out=tmp_path / "qwen"))
    layout = Layout.load(tmp_path / "qwen")
    assert layout.token_map is None and layout.reset_id == 0 and qwen["pad_id"] == 0
    assert qwen["rows"]["1"] % 128 == 0
    build_vocab(config(tmp_path, dialect="v41", dead_ids=(5,), orders=(2, 3, 4), out=tmp_path / "v41"))
    assert Layout.load(tmp_path / "v41").dead_ids == (5,)


def test_auto_rows_say_what_decided(tmp_path: Path) -> None:
    notes = Notes()
    result = build_vocab(config(tmp_path, rows_per_head=None, target_collisions=0.25), notes)
    assert result["rows_decided_by"] == "target"
    assert 0.15 < result["collisions"]["orders"]["3"]["share_of_distinct"] < 0.35
    assert any("fewest that keep the expected collisions within 25%" in line for line in notes.said)
    small = build_vocab(config(tmp_path, rows_per_head=None, budget_bytes=50_000, out=tmp_path / "small"), notes)
    assert small["rows_decided_by"] == "budget" and small["table_bytes"]["f32"] <= 50_000
    assert any("as many as 0.00 GB" in line for line in notes.said)


def test_an_existing_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    build_vocab(config(tmp_path))
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(BuildVocabError, match="exists") as raised:
        build_vocab(config(tmp_path))
    assert "--force" in raised.value.hint and (tmp_path / "out/mine.txt").exists()
    build_vocab(config(tmp_path, force=True, rows_per_head=700))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert Layout.load(tmp_path / "out").primes[1][0][0] == 701


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: Any) -> bytes:
        (tmp_path / "out").mkdir()
        return b""

    monkeypatch.setattr(module.statistics_plot, "draw", draw)
    with pytest.raises(BuildVocabError, match="appeared while"):
        build_vocab(config(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_collisions": 1.0}, r"target_collisions 1\.0 must lie between 0 and 1"),
        ({"rows_per_head": 0}, "rows_per_head 0 must be at least 1"),
        ({"budget_bytes": -1}, "budget_bytes -1 must be at least 1"),
        ({"workers": 0}, "workers 0 must be at least 1"),
        ({"top": -1}, "top -1 must not be negative"),
        ({"reset_id": 99999}, "reset_id 99999 is outside the vocabulary"),
        ({"dead_ids": (7, 99999)}, "dead_ids 99999 is outside the vocabulary"),
    ],
)
def test_wrong_options_are_refused_before_any_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BuildVocabError, match=words):
        build_vocab(config(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_errors_of_the_parts_come_through(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="names no readable file"):
        build_vocab(config(tmp_path, corpus=CorpusConfig((str(tmp_path / "none"),))))
    with pytest.raises(LayoutError, match="orders"):
        build_vocab(config(tmp_path, orders=(3, 2)))
    (tmp_path / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(BuildVocabError, match="names no eos token"):
        build_vocab(config(tmp_path, dialect="qwen-ple"))
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from pathlib import Path
from engram.builders import build_vocab, statistics
from engram.builders.corpus import CorpusConfig
def wait(*_):
    print("counted", flush=True)
    time.sleep(60)
statistics.gather = wait
build_vocab.build_vocab(build_vocab.BuildVocabConfig(
    CorpusConfig((sys.argv[1],)), sys.argv[2], Path(sys.argv[3]), heads=2, head_dim=4, layers=(1, 3), rows_per_head=500,
    top=20))
"""


def test_a_killed_build_leaves_no_layout_and_its_work_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [chosen.corpus.sources[0], chosen.tokenizer, str(chosen.out)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "counted\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert not chosen.out.exists()
    runs = sorted((tmp_path / "out.partial/work").glob("run-*"))
    assert runs

    monkeypatch.setattr("engram.builders.ngram_counts.windows", None)  # counting again would need it
    monkeypatch.setattr("engram.builders.token_cache._Builder.run", None)
    resumed = build_vocab(chosen)
    monkeypatch.undo()
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "other"))
    fresh = build_vocab(config(tmp_path, out=tmp_path / "fresh"))
    assert resumed["distinct_ngrams"] == fresh["distinct_ngrams"]
    for name in FILES:
        if name != "stats.json":
            assert (chosen.out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_standard_input_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    chosen = config(tmp_path)
    code = KILLED.replace("statistics.gather = wait", "")
    arguments = ["-", chosen.tokenizer, str(chosen.out)]
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        input="the river of stone\n" * 9,
        text=True,
        check=True,
    )
    assert json.loads((chosen.out / "stats.json").read_text())["documents"] == 1
    assert list((tmp_path / "cache/tokens").iterdir()) == []


def test_the_window_shows_what_the_layout_does(tmp_path: Path) -> None:
    build_vocab(config(tmp_path))
    layout = Layout.load(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    by_text = hash_report(tmp_path / "out", ids=None, text="the River bridge")
    assert by_text["ids"] == tokenizer.encode("the River bridge").ids
    by_ids = hash_report(tmp_path / "out", ids=by_text["ids"], text=None)
    assert by_ids == by_text and json.loads(json.dumps(by_ids)) == by_ids
    local = hash_report(tmp_path / "out", ids=by_text["ids"], text=None, local=True)
    assert by_text["compressed"] == layout.compress(np.array(by_text["ids"])).tolist()
    for layer in (1, 3):
        difference = np.array(by_text["rows"][str(layer)]) - np.array(local["rows"][str(layer)])
        assert (difference == layout.offsets(layer)).all()
        assert np.array(local["rows"][str(layer)]).shape == (len(by_text["ids"]), 4)
    for wrong in ({"ids": None, "text": None}, {"ids": [1], "text": "x"}):
        with pytest.raises(BuildVocabError, match="either ids or a text"):
            hash_report(tmp_path / "out", **wrong)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="outside the layout's vocabulary"):
        hash_report(tmp_path / "out", ids=[10**6], text=None)
