"""`engram serve` over a GGUF backbone through llama.cpp: several timelines in one batch, gates, failures."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("needs llama-cpp-python and gguf", allow_module_level=True)

from serving import Running, ask  # noqa: E402
from test_llama import package as write_package  # noqa: E402

from engram.runtime.engine import Model  # noqa: E402
from engram.runtime.llama import LlamaSlots  # noqa: E402
from engram.runtime.server import ServeConfig, open_slots  # noqa: E402

COMPLETE = "/v1/completions"
PROMPTS = [np.random.default_rng(n).integers(3, 60, 10 + 9 * n).tolist() for n in range(4)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("llama") / "served")


@pytest.fixture(scope="module")
def running(package: Path) -> Iterator[Running]:
    served = Running(LlamaSlots.open(package, count=3, context=128, threads=1), package)
    yield served
    served.close()


def body(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 20, **more}


def test_the_packages_backbone_chooses_the_engine(package: Path) -> None:
    from engram import Progress

    slots = open_slots(ServeConfig(package, slots=2, context=100), Progress())
    assert isinstance(slots, LlamaSlots) and (slots.count, slots.context) == (2, 100)
    slots.close()


def test_requests_at_once_get_what_each_gets_alone(running: Running) -> None:
    """Tokens may differ where two are as likely as the arithmetic of another batch allows: logits decide."""
    alone = {n: ask(running.port, COMPLETE, body(prompt, logprobs=5))[2] for n, prompt in enumerate(PROMPTS)}

    def once(n: int) -> tuple[int, Any]:
        return n, ask(running.port, COMPLETE, body(PROMPTS[n], logprobs=5))[2]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(once, list(range(4)) * 3))
    for n, answer in found:
        one, other = answer["choices"][0]["logprobs"], alone[n]["choices"][0]["logprobs"]
        for place, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            assert one["token_logprobs"][place] == pytest.approx(other["token_logprobs"][place], abs=2e-2)
            if a != b:
                assert abs(one["top_logprobs"][place][a] - one["top_logprobs"][place][b]) < 2e-2
                break


def test_gates_are_those_of_torch(running: Running, package: Path) -> None:
    answer = ask(running.port, COMPLETE, body(PROMPTS[2], max_tokens=4, engram={"gates": True}))[2]
    prompt = next(note for note in answer["engram"] if "prompt" in note)
    model = Model.open(package)
    seen: dict[int, Any] = {}
    rows = model.layout.rows(np.array([PROMPTS[2]]))
    with torch.inference_mode():
        model.engram.states(torch.tensor([PROMPTS[2]]), memory := model.memory(rows), watch=seen)
        opened = {n: model.engram.gate(n).open(seen[n][:, :, None], memory[n])[0, :, 0] for n in (1, 2)}
    model.close()
    for place, note in enumerate(prompt["prompt"], start=prompt["reused"]):
        assert note["gates"]["1"] == pytest.approx(float(opened[1][place]), abs=5e-3)
        last = place == len(PROMPTS[2]) - 1
        assert ("2" in note["gates"]) == last, "of the last norm llama.cpp computes what is wanted alone"
        if last:
            assert note["gates"]["2"] == pytest.approx(float(opened[2][place]), abs=2e-2)
    tokens = [note for note in answer["engram"] if "prompt" not in note]
    assert [set(note["gates"] or {}) for note in tokens] == [{"1", "2"}] * 3 + [set()]


def test_a_failing_step_leaves_the_others_text_as_it_was(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(running.port, COMPLETE, body(PROMPTS[1]))[2]["choices"][0]["text"]
    take, calls = running.slots.reader.take, []

    def sometimes(*given: Any) -> Any:
        calls.append(0)
        if len(calls) == 9:
            raise OSError("the disk is gone")
        return take(*given)

    monkeypatch.setattr(running.slots.reader, "take", sometimes)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: ask(running.port, COMPLETE, body(prompt)), [PROMPTS[1]] * 2))
    assert len(calls) >= 9 and any("the disk is gone" in line for line in running.says.said)
    assert any(status == 200 for status, _, _ in found)
    for status, _, answer in found:
        assert status == 500 or answer["choices"][0]["text"] == expected
    assert ask(running.port, COMPLETE, body(PROMPTS[1]))[2]["choices"][0]["text"] == expected
