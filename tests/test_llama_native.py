"""A GGUF with a memory that llama.cpp computes itself (qwen4exp): against llama.cpp's own loop, lazily and whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("needs llama-cpp-python and gguf", allow_module_level=True)

import llama_cpp  # noqa: E402
from gguf_llama import write_gguf  # noqa: E402
from llama_rows import WIDTH, has_qwen4exp, write_model  # noqa: E402

from engram.builders.layout import Layout  # noqa: E402
from engram.cli import main as cli  # noqa: E402
from engram.runtime.engine import EngineError  # noqa: E402
from engram.runtime.generate import RunConfig, run  # noqa: E402
from engram.runtime.llama_hook import LlamaError  # noqa: E402
from engram.runtime.llama_native import NativeSlots  # noqa: E402
from engram.runtime.slots import Feed  # noqa: E402

if not has_qwen4exp():
    pytest.skip("this llama.cpp has no qwen4exp", allow_module_level=True)

IDS = [5, 17, 40, 9, 33, 71, 8, 8, 60, 2, 44]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=4, head_dim=WIDTH // 8, layers=(0,), rows_per_head=50, pad_id=0,
        vocab_size=96, reset_id=9,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("native") / "qwen4exp.gguf"
    write_model(path, layout, seed=3)
    return path


def theirs(path: Path, ids: list[int], more: int) -> tuple[list[int], torch.Tensor]:
    """llama-cpp-python's own loop over the same file: greedy tokens, and the logits after the last."""
    made = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, logits_all=False)
    made.eval(ids)
    written = []
    for _ in range(more):
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(made.ctx, -1), shape=(96,)).copy()
        written.append(int(found.argmax()))
        made.eval(written[-1:])
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(made.ctx, -1), shape=(96,)).copy()
    made.close()
    return written, torch.from_numpy(found)


def test_the_same_text_as_llama_cpp(model: Path) -> None:
    """Greedy tokens; logits within what its own loop's other context settings move them. Lazily or whole: the bits."""
    ended = []
    for lazy in (True, False):
        slots = NativeSlots(model, context=128, threads=1, lazy=lazy)
        (logits,) = slots.step([Feed(0, IDS)])
        written = []
        for _ in range(20):
            written.append(int(logits.argmax()))
            (logits,) = slots.step([Feed(0, written[-1:])])
        expected, last = theirs(model, IDS, 20)
        assert written == expected and len(set(written)) > 3
        torch.testing.assert_close(logits, last, rtol=0, atol=1e-2)
        ended.append(logits.clone())
        slots.close()
    assert torch.equal(*ended)


def test_a_timeline_goes_on_or_begins_anew(model: Path) -> None:
    """What cannot be rolled back is read again; nothing of the text before is left."""
    slots = NativeSlots(model, context=128, threads=1)
    slots.step([Feed(0, IDS)])
    assert slots.reuse(0, [*IDS, 3, 4]) == [3, 4] and slots.length(0) == len(IDS)
    other = [*IDS[:4], 1, 2]
    assert slots.reuse(0, other) == other and slots.length(0) == 0
    found = slots.step([Feed(0, other)])[0].clone()
    slots.close()
    fresh = NativeSlots(model, context=128, threads=1)
    assert torch.equal(fresh.step([Feed(0, other)])[0], found)
    with pytest.raises(LlamaError, match="129 tokens exceed the context of 128"):
        fresh.step([Feed(0, [1] * 123)])
    with pytest.raises(LlamaError, match="slot 1 of 1"):
        fresh.step([Feed(1, [1])])
    fresh.close()


def test_the_command_runs_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["run", str(model), "--prompt", "ABC", "--max-tokens", "8", "--json"])
    assert not leaving.value.code
    found = json.loads(capsys.readouterr().out)
    assert len(found["token_ids"]) == 8 and "its own memory, read lazily" in found["engine"]
    assert found["table_bytes"] > 0


def test_what_it_is_not_for_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="is a llama model: llama.cpp computes a memory of its own for qwen4exp only"):
        NativeSlots(write_gguf(tmp_path / "plain.gguf"))
    with pytest.raises(LlamaError, match="4 timelines over a qwen4exp model"):
        NativeSlots(model, count=4)
    for options in ({"engine": "torch"}, {"dtype": "float32"}):
        with pytest.raises(EngineError, match="llama.cpp alone runs"):
            run(RunConfig(model, prompt="A", **options), lambda piece: None)  # type: ignore[arg-type]
    for options in ({"offload": "ram"}, {"table_cache": 1}, {"table_io": "uring"}):
        with pytest.raises(EngineError, match="read by llama.cpp itself"):
            run(RunConfig(model, prompt="A", **options), lambda piece: None)  # type: ignore[arg-type]
