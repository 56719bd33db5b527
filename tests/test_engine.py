"""Sessions and generation over a package: exact whatever the placement, the chunking and the history."""

from __future__ import annotations

import gc
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from engram.builders.checkpoint import open_checkpoint
from engram.builders.engram import Table
from engram.builders.process_memory import cached_bytes
from engram.kernels import dispatch
from engram.quantize.package import ExportConfig, PackageError, export_package, open_package
from engram.quantize.tables import QuantizeConfig, quantize
from engram.runtime import engine
from engram.runtime.engine import EngineError, Model, probabilities
from engram.runtime.generate import Conversation, RunConfig, Sampler, generate, render_chat, run

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def package(checkpoint: Path) -> Path:
    export_package(ExportConfig(source=checkpoint, out=checkpoint.parent / "package"))
    return checkpoint.parent / "package"


@pytest.fixture(scope="module")
def nf4_package(checkpoint: Path) -> Path:
    quantize(QuantizeConfig(checkpoint=checkpoint, out=checkpoint.parent / "q", tables="nf4"))
    export_package(ExportConfig(source=checkpoint.parent / "q", out=checkpoint.parent / "package4"))
    return checkpoint.parent / "package4"


@pytest.fixture(scope="module")
def model(package: Path) -> Model:
    return Model.open(package)


def full_logits(model: Model, ids: list[int]) -> torch.Tensor:
    """All positions at once, without a timeline."""
    with torch.inference_mode():
        logits: torch.Tensor = model.engram(torch.tensor([ids]), model.memory(model.layout.rows(np.array([ids]))))
    return logits[0]


def test_training_and_serving_fill_the_same_bits(checkpoint: Path, model: Model) -> None:
    opened = open_checkpoint(checkpoint)
    rows = opened.layout.rows(np.array([model.encode(tiny.TEXT)]))
    served = model.memory(rows)
    for layer in opened.layout.layers:
        trained = Table(torch.from_numpy(np.array(opened.table(layer))))(torch.from_numpy(rows[layer]))
        assert torch.equal(served[layer], trained)


def test_prefill_in_chunks_and_decode_equal_the_full_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.encode(tiny.TEXT)[:60]
    expected = full_logits(model, ids)
    for chunk in (512, 7, 1):
        monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
        session = model.session()
        assert (session.feed(ids[:41]) - expected[40]).abs().max() < TOLERANCE
        for place in range(41, 60):
            if place % 2:
                session.ask([ids[place]])
            assert (session.feed([ids[place]]) - expected[place]).abs().max() < TOLERANCE


def test_rows_asked_for_another_token_are_not_used(model: Model) -> None:
    ids = model.encode(tiny.TEXT)[:20]
    session = model.session()
    session.feed(ids[:10])
    session.ask([ids[3]])
    assert (session.feed([ids[10]]) - full_logits(model, ids)[10]).abs().max() < TOLERANCE


def test_reuse_rolls_back_to_the_shared_prefix(model: Model) -> None:
    ids = model.encode(tiny.TEXT)[:40]
    session = model.session()
    session.feed(ids)
    other = ids[:25] + ids[5:15]
    rest = session.reuse(other)
    assert rest == other[25:] or rest == other[26:]
    assert (session.feed(rest) - full_logits(model, other)[-1]).abs().max() < TOLERANCE
    assert session.reuse(other) == other[-1:], "at least one token is left to feed"


@pytest.mark.parametrize("kind", ["package", "nf4_package"])
def test_placements_give_identical_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    results = {}
    for offload in ("none", "ram", "disk"):
        config = RunConfig(folder, prompt=tiny.TEXT, offload=offload, max_tokens=40, temperature=0.8, seed=3)
        results[offload] = run(config, lambda text: None)
    assert results["none"]["token_ids"] == results["ram"]["token_ids"] == results["disk"]["token_ids"]
    assert results["disk"]["rows_read"] > 0 and results["disk"]["bytes_read"] > 0
    assert results["disk"]["table_bytes"] > 0
    with open_package(folder) as opened:
        rows = sum(table.rows for table in opened.layers.values())
    assert results["none"]["table_resident_bytes"] == rows * 8 * 4
    assert results["disk"]["table_resident_bytes"] > 0  # of every mapping, the other fixtures' too


def test_a_run_says_how_its_rows_were_read(package: Path) -> None:
    results = {
        offload: run(RunConfig(package, prompt="The memory", offload=offload, max_tokens=2), lambda text: None)
        for offload in ("ram", "disk")
    }
    with open_package(package) as opened:
        assert results["disk"]["row_io"] == opened.layers[1].io
    assert results["ram"]["row_io"] == "memory"
    assert results["disk"]["kernels"] == dispatch.name() in dispatch.available()


@pytest.mark.parametrize("verify", ["first-touch", "open", "off"])
def test_the_ways_to_verify_and_to_read_give_the_same_text(package: Path, verify: str) -> None:
    config = RunConfig(package, prompt=tiny.TEXT, max_tokens=5)
    expected = run(config, lambda text: None)["token_ids"]
    result = run(replace(config, verify=verify, table_io="numpy"), lambda text: None)
    assert (result["token_ids"], result["row_io"]) == (expected, "numpy")


def test_a_way_to_read_that_cannot_be_had_is_refused(package: Path) -> None:
    with pytest.raises(PackageError, match="io 'tape' is not known"):
        Model.open(package, table_io="tape")
    with pytest.raises(EngineError, match="table_io 'mmap' says how rows are read from the disk"):
        Model.open(package, offload="ram", table_io="mmap")
    with pytest.raises(PackageError, match="verify 'never' is not known"):
        Model.open(package, verify="never")


def test_rows_are_asked_for_before_anything_else_happens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling is followed by asking, then by words; a prefill asks for a chunk before it computes the last one."""
    seen: list[str] = []

    def note(owner: Any, name: str) -> None:
        worked = getattr(owner, name)

        def noted(*given: Any, **named: Any) -> Any:
            seen.append(name)
            return worked(*given, **named)

        monkeypatch.setattr(owner, name, noted)

    note(model.reader, "ask")
    note(model.engram, "forward")
    note(Sampler, "pick")
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 4)
    ids = model.encode(tiny.TEXT)[:10]
    for _ in generate(model.session(), ids, Sampler(0, 1, 0), 3):
        seen.append("words")
    prefill = ["ask", "ask", "forward", "ask", "forward", "forward"]
    assert seen == [*prefill, *["pick", "ask", "words", "forward"] * 2, "pick", "words"]


def test_layers_wait_for_their_rows_one_by_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a deeper layer are taken when that layer is reached, not when the first one is."""
    order: list[str] = []
    take = model.reader.take
    monkeypatch.setattr(model.reader, "take", lambda ticket, n: order.append(f"rows {n}") or take(ticket, n))
    hooks = [
        block.register_forward_hook(lambda *_, n=n: order.append(f"block {n}"))
        for n, block in enumerate(model.engram.blocks, start=1)
    ]
    try:
        model.session().feed(model.encode("The memory"))
    finally:
        for hook in hooks:
            hook.remove()
    assert [word for word in order if word.startswith("rows")] == ["rows 1", "rows 3"]
    assert order.index("rows 3") > order.index("block 2"), order


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be told anything here")
def test_weights_that_were_copied_leave_the_page_cache_to_the_tables(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package"  # of its own: pages that another model maps stay in the cache
    shutil.copytree(package, folder)
    weights = folder / "backbone" / "model.safetensors"
    with weights.open("rb") as file:
        os.fsync(file.fileno())
    sizes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for room, offload, dtype, stays in (
        (None, "disk", "bfloat16", True), (sizes, "disk", "bfloat16", True), (1, "none", "bfloat16", True),
        (1, "disk", "float32", True), (1, "disk", "bfloat16", False),
    ):  # fmt: skip
        monkeypatch.setattr(engine, "available_bytes", lambda room=room: room)
        weights.read_bytes()
        model = Model.open(folder, offload=offload, dtype=dtype)
        assert bool(cached_bytes(weights)) == stays, (room, offload, dtype)
        model.close()
        del model
        gc.collect()


def test_run_streams_what_it_returns(package: Path) -> None:
    pieces: list[str] = []
    config = RunConfig(package, prompt="The memory", max_tokens=25, temperature=1.0, top_p=0.9, seed=5)
    result = run(config, pieces.append)
    assert "".join(pieces) == result["text"]
    assert 0 < len(result["token_ids"]) <= 25
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes"):
        assert result[name] > 0
    assert run(config, pieces.append)["token_ids"] == result["token_ids"], "the same seed writes the same text"


def test_greedy_text_is_the_argmax_of_the_full_pass(model: Model) -> None:
    ids = model.encode("The memory of")
    out = list(generate(model.session(), ids, Sampler(0, 1, 0), 12))
    for place, token in enumerate(out):
        assert int(full_logits(model, ids + out[:place])[-1].argmax()) == token


def test_special_tokens_of_the_tokenizer_are_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "special", {"eos_ids": [7, 9], "add_bos": True, "bos_id": 5, "chat_template": None})
    assert model.stop_ids() >= {7, 9}
    conversation = Conversation(model, RunConfig(model.package.folder, max_tokens=1))
    conversation.complete("The memory", lambda text: None)
    assert conversation.session.ids[: 1 + len(model.encode("The memory"))] == [5, *model.encode("The memory")]
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    special = {"bos": "<pad>", "eos": "<eos>", "chat_template": template}
    assert render_chat(model.tokenizer, special, [{"role": "user", "content": "hi"}]) == "<pad>hi<eos>"


def test_generation_stops_at_a_stop_token_and_at_the_context(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.encode("The memory of")
    out = list(generate(model.session(), ids, Sampler(0, 1, 0), 12))
    monkeypatch.setattr(Model, "stop_ids", lambda self: frozenset({out[4]}))
    stopped = list(generate(model.session(), ids, Sampler(0, 1, 0), 12))
    assert stopped == out[: out.index(out[4])]
    monkeypatch.setattr(Model, "stop_ids", lambda self: frozenset())
    monkeypatch.setattr(Model, "context", property(lambda self: len(ids) + 3))
    assert len(list(generate(model.session(), ids, Sampler(0, 1, 0), 12))) == 4


def test_a_chat_reuses_its_turns(model: Model) -> None:
    conversation = Conversation(model, RunConfig(model.package.folder, max_tokens=6))
    first = conversation.turn("The memory", lambda text: None)
    second = conversation.turn("of a table", lambda text: None)
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["prefilled_tokens"] < second["prompt_tokens"], "the shared prefix is not computed again"
    expected = full_logits(model, conversation.session.ids)[-1]
    again = model.session().feed(conversation.session.ids)
    assert (again - expected).abs().max() < TOLERANCE


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    torch.testing.assert_close(probabilities(logits, 1.0, 0.7), torch.tensor([0.625, 0.375, 0.0, 0.0]))
    torch.testing.assert_close(probabilities(logits, 1.0, 1e-9), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(probabilities(logits, 1.0, 1.0), logits.exp())
    assert probabilities(logits, 0.1, 1.0)[0] > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_tokens": 0}, "max_tokens 0"), ({"temperature": -1.0}, "temperature -1"), ({"top_p": 0.0}, "top_p 0")],
)
def test_a_wrong_setting_is_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        RunConfig(Path("x"), **changes)  # type: ignore[arg-type]


def test_empty_and_too_long_prompts_are_refused(model: Model) -> None:
    with pytest.raises(EngineError, match="no tokens"):
        model.session().feed([])
    with pytest.raises(EngineError, match="context of 256"):
        model.session().feed([5] * 257)
    with pytest.raises(EngineError, match="prompt is empty"):
        Conversation(model, RunConfig(model.package.folder)).complete("", lambda text: None)
