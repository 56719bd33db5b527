"""A GGUF backbone with Engram layers through llama.cpp: against llama.cpp alone, torch, and itself in other batches."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs gguf", allow_module_level=True)

from gguf import GGMLQuantizationType  # noqa: E402
from gguf_llama import VOCAB, WIDTH, write_gguf  # noqa: E402

from engram.builders.backbone import BackboneRef  # noqa: E402
from engram.builders.checkpoint import save_checkpoint  # noqa: E402
from engram.builders.engram import Gate, GateConfig  # noqa: E402
from engram.builders.layout import Layout  # noqa: E402
from engram.quantize.package import ExportConfig, export_package  # noqa: E402
from engram.runtime import generate, llama, llama_backbone, llama_hook  # noqa: E402
from engram.runtime.engine import EngineError, Model  # noqa: E402
from engram.runtime.generate import RunConfig, open_session, run  # noqa: E402
from engram.runtime.llama import LlamaSlots  # noqa: E402
from engram.runtime.llama_backbone import Part  # noqa: E402
from engram.runtime.llama_hook import CFilter, LlamaError, PythonFilter  # noqa: E402
from engram.runtime.slots import Feed  # noqa: E402

real = LlamaSlots._hit
TOKENS = np.random.default_rng(5).integers(0, VOCAB, 60).tolist()


def package(
    folder: Path, *, strength: float = 0.5, last_conv: bool = False, layers: tuple[int, ...] = (1, 2), blocks: int = 2,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:  # fmt: skip
    """A random Llama of two blocks, memories before its second block (with a convolution) and at its end."""
    folder.mkdir()
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    path = write_gguf(folder / "model.gguf", blocks=blocks, kind=kind)
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=8, layers=layers, rows_per_head=300, pad_id=2,
        vocab_size=VOCAB, token_map=np.arange(VOCAB) // 2,
    )  # fmt: skip
    generator = np.random.default_rng(1)
    gates, dense, tables = {}, {}, {}
    torch.manual_seed(3)
    for layer in layout.layers:
        conv = 4 if layer == 1 or last_conv else 0
        config = GateConfig(WIDTH, layout.memory_width, conv_kernel=conv, conv_dilation=3)
        gate = Gate(config)
        if conv:
            torch.nn.init.normal_(gate.conv_weight, std=0.3)
        gate.value_proj.weight.data.mul_(strength)
        gates[layer] = config.to_json()
        dense[layer] = {name: value.detach().numpy() for name, value in gate.state_dict().items()}
        tables[layer] = generator.normal(size=(layout.table_rows[layer], 8)).astype(np.float32)
    save_checkpoint(
        folder / "checkpoint", layout=layout, gates=gates, dense=dense, tables=tables,
        backbone=BackboneRef.find(str(path)), tokenizer_folder=folder / "tokenizer",
    )  # fmt: skip
    export_package(ExportConfig(folder / "checkpoint", folder / "package", embed_backbone=True))
    return folder / "package"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("llama") / "with")


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a memory that adds nothing."""
    return package(tmp_path_factory.mktemp("llama") / "without", strength=0.0)


@pytest.fixture
def opened(made: Path) -> Iterator[Callable[..., LlamaSlots]]:
    """Opens the package; everything is closed in the end."""
    found: list[LlamaSlots] = []

    def open_it(folder: Path = made, **options: Any) -> LlamaSlots:
        found.append(LlamaSlots.open(folder, threads=1, **{"context": 128} | options))
        return found[-1]

    yield open_it
    for slots in found:
        slots.close()


def logits_of(slots: LlamaSlots, ids: list[int], slot: int = 0) -> Tensor:
    """After each of some tokens, fed one by one: [T, vocabulary]."""
    return torch.stack([slots.step([Feed(slot, [token])])[0].clone() for token in ids])


def plain_logits(folder: Path, ids: list[int], control: tuple[int, Any] | None = None) -> Tensor:
    """llama.cpp's own, without a callback, token by token; with what its control vector adds after a block.

    `control` is the block and a vector, or a vector for each token.
    """
    c = llama_hook.library()
    path = str(folder / "backbone" / "model.gguf").encode()
    model = c.llama_model_load_from_file(path, c.llama_model_default_params())
    options = c.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch, options.kv_unified = 128, 1, 1, True
    context, out = c.llama_init_from_model(model, options), []
    for position, token in enumerate(ids):
        if control is not None:
            block, delta = control
            every = np.zeros((c.llama_model_n_layer(model) - 1, WIDTH), dtype=np.float32)  # from block 1 on
            every[block - 1] = delta if delta.ndim == 1 else delta[position]
            data = every.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            assert c.llama_set_adapter_cvec(context, data, every.size, WIDTH, block, block) == 0
        batch = c.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0] = 1, token, position, 1, 0
        batch.logits[0] = True
        assert c.llama_decode(context, batch) == 0
        c.llama_batch_free(batch)
        found = c.llama_get_logits_ith(context, 0)
        out.append(torch.from_numpy(np.ctypeslib.as_array(found, shape=(VOCAB,)).copy()))
    c.llama_free(context)
    c.llama_model_free(model)
    return torch.stack(out)


def torch_logits(folder: Path, ids: list[int], offload: str = "disk") -> Tensor:
    """Our engine over the same weights, dequantized."""
    model = Model.open(folder, offload=offload, dtype="float32")
    session = model.session()
    out = torch.stack([session.feed([token]) for token in ids])
    model.close()
    return out


def test_a_memory_that_adds_nothing_leaves_llama_cpp_as_it_is(silent: Path, opened: Any) -> None:
    """Bit for bit: what is read and written back are the same values."""
    assert torch.equal(logits_of(opened(silent), TOKENS[:12]), plain_logits(silent, TOKENS[:12]))


@pytest.mark.parametrize("shape", [(WIDTH,), (10, WIDTH)], ids=["constant", "of each token"])
def test_what_is_added_is_llama_cpps_own_control_vector(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """What is written before block 2 is what llama.cpp itself adds after block 1, bit for bit."""
    folder = package(tmp_path / "three", layers=(2,), blocks=3)
    delta = np.random.default_rng(4).normal(size=shape).astype(np.float32)

    def add(self: Any, layer: int, parts: Any, stream_nD: Any, *_: Any) -> None:
        stream_nD += delta if delta.ndim == 1 else delta[parts[0].position]

    monkeypatch.setattr("engram.runtime.llama_gates.LayerGates.add", add)
    monkeypatch.setattr(LlamaSlots, "_arm", lambda *_: {})
    found = logits_of(opened(folder), TOKENS[:10])
    assert torch.equal(found, plain_logits(folder, TOKENS[:10], (2 - 1, delta)))
    assert (found - plain_logits(folder, TOKENS[:10])).abs().max() > 1
    assert not torch.equal(found, plain_logits(folder, TOKENS[:10], (2, delta)))


def test_the_change_is_that_of_torch(made: Path, silent: Path, opened: Any) -> None:
    """In direction and size; another order of the tokens gives another change."""
    ours = logits_of(opened(), TOKENS[:20]) - plain_logits(made, TOKENS[:20])
    theirs = torch_logits(made, TOKENS[:20]) - torch_logits(silent, TOKENS[:20])
    assert theirs.abs().max() > 0.1
    alike = torch.nn.functional.cosine_similarity(ours, theirs)
    assert alike.min() > 0.995 and torch.allclose(ours, theirs, atol=0.02 * float(theirs.abs().max()))
    other = torch_logits(made, TOKENS[20:40]) - torch_logits(silent, TOKENS[20:40])
    assert torch.nn.functional.cosine_similarity(ours, other).max() < 0.9


def test_the_filter_in_cpp_is_the_one_in_python(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = logits_of(opened(), TOKENS[:8])
    monkeypatch.setattr(llama, "make_filter", PythonFilter)
    assert torch.equal(logits_of(opened(), TOKENS[:8]), fast)


@pytest.mark.parametrize("kind", [CFilter, PythonFilter])
def test_gates_set_off_beforehand_are_those_of_the_hook(
    opened: Any, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Rows that nobody waits for need no Python in the graph; the bits are the same, over several slots too."""

    def three(slots: LlamaSlots) -> Tensor:
        slots.step([Feed(slot, TOKENS[slot : slot + 3 * slot]) for slot in (1, 2)])
        return torch.stack([
            torch.stack(slots.step([Feed(slot, [TOKENS[slot * 5 + n]]) for slot in (2, 0, 1)])) for n in range(9)
        ])  # fmt: skip

    monkeypatch.setattr(llama, "make_filter", kind)
    waiting = opened(count=3)
    waiting.reader.arrived = lambda *_: False
    expected = three(waiting)
    slots = opened(count=3)
    hits: list[Any] = []
    monkeypatch.setattr(LlamaSlots, "_hit", lambda self, *what: hits.append(what) or real(self, *what))
    three(slots)  # reads the pages
    for slot in range(3):
        slots.reuse(slot, [-1])
    hits.clear()
    found = three(slots)
    assert torch.equal(found, expected)
    assert len(hits) == 2  # of the prompts, in two layers


def test_gates_are_halves_beside_a_backbone_of_few_bits(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said; what a gate adds moves by float16's rounding; weights beyond float16 stay as they are."""
    few = GGMLQuantizationType.Q8_0
    slots = opened(package(tmp_path / "q8", kind=few))
    if not slots.gates.halves:
        pytest.skip("this processor widens halves one by one")
    assert slots.engine.endswith("gates in float16")
    assert opened(package(tmp_path / "large", kind=few, strength=1e7)).engine.endswith("gates in float32")
    monkeypatch.setattr("engram.runtime.llama_backbone.LlamaBackbone.bits", 32.0)
    whole = opened(tmp_path / "q8" / "package")
    assert whole.engine.endswith("gates in float32")
    stream, memory = torch.randn(3, WIDTH).numpy(), torch.randn(3, slots.layout.memory_width).numpy()
    added = []
    for one in (slots, whole):
        rows = stream.copy()
        one.gates.add(2, [Part(0, 0, 3, 0)], rows, memory, one.slots)
        added.append(rows - stream)
    moved, size = np.abs(added[0] - added[1]).max(), np.abs(added[1]).max()
    assert 0 < moved < 2e-3 * size


def test_slots_that_come_in_several_micro_batches(opened: Any) -> None:
    """What was set off for all rows at once does not come: the hook does it, and keeps what the convolution reads."""
    one, cut = opened(count=3), opened(count=3, micro_batch=2)
    for n in range(10):
        feeds = [Feed(slot, [TOKENS[slot * 10 + n]]) for slot in (2, 0, 1)]
        expected = [logits.clone() for logits in one.step(feeds)]
        for ours, theirs in zip(cut.step(feeds), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-3), n


@pytest.mark.parametrize("options", [{}, {"micro_batch": 8}, {"batch": 16, "micro_batch": 8}, {"batch": 7}])
def test_prefill_in_any_batches_is_decoding(opened: Any, options: dict[str, int]) -> None:
    """Within float32's order of sums: 1e-3 of logits that reach 10."""
    expected = logits_of(opened(), TOKENS)
    slots = opened(**options)
    (found,) = slots.step([Feed(0, TOKENS)])
    assert torch.allclose(found, expected[-1], atol=1e-3), (found - expected[-1]).abs().max()
    assert slots.length(0) == len(TOKENS)


@pytest.mark.parametrize("micro_batch", [512, 8])
def test_ragged_sequences_in_one_batch(opened: Any, micro_batch: int) -> None:
    texts = [TOKENS[:23], TOKENS[30:41], TOKENS[5:11]]
    alone = [logits_of(opened(), text)[-1] for text in texts]
    slots = opened(count=3, micro_batch=micro_batch)
    found = slots.step([Feed(slot, text[:-2]) for slot, text in enumerate(texts)])
    for back in (2, 1):
        feeds = [Feed(slot, [texts[slot][-back]]) for slot in (2, 0, 1)]
        slots.ask(feeds)
        found = slots.step(feeds)
    for slot, made_ in zip((2, 0, 1), found, strict=True):
        assert torch.allclose(made_, alone[slot], atol=1e-3)


def test_prefixes_are_reused_and_rolled_back(opened: Any) -> None:
    """What was rolled back leaves no trace: neither in the cache nor in look-back or convolution."""
    slots = opened()
    slots.step([Feed(0, TOKENS[:30])])
    other = [*TOKENS[:10], *TOKENS[40:50]]
    assert slots.reuse(0, other) == TOKENS[40:50]
    (found,) = slots.step([Feed(0, TOKENS[40:50])])
    assert torch.allclose(found, logits_of(opened(), other)[-1], atol=1e-3)
    assert slots.reuse(0, other) == other[-1:] and slots.length(0) == 19


def test_an_error_in_the_callback_comes_out_and_leaves_nothing(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of(opened(), TOKENS[:6])
    for kind in (None, PythonFilter):
        if kind is not None:
            monkeypatch.setattr(llama, "make_filter", kind)
        slots = opened()
        slots.step([Feed(0, TOKENS[:3])])
        real, slots.reader.take = slots.reader.take, lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            slots.step([Feed(0, TOKENS[3:6])])
        slots.reader.take = real
        assert slots.length(0) == 3
        assert torch.allclose(slots.step([Feed(0, TOKENS[3:6])])[0], expected[-1], atol=1e-3)


def test_another_graph_is_refused_when_it_is_opened(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaSlots, "_node", lambda self, layer: f"no_such_node-{layer}")
    with pytest.raises(LlamaError, match="computed node no_such_node-1 for 0 of 2 rows"):
        opened()
    monkeypatch.setattr(LlamaSlots, "_node", lambda self, layer: "ffn_gate-0")
    with pytest.raises(LlamaError, match="node ffn_gate-0 is of type 0 and width 512.*float32 rows of 256"):
        opened()


@pytest.mark.parametrize("kind", [CFilter, PythonFilter])
def test_rows_in_another_order_are_refused(opened: Any, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(llama, "make_filter", kind)
    slots = opened()
    real = slots._filter.expect
    slots._filter.expect = lambda ids: real(ids[::-1].copy())
    with pytest.raises(LlamaError, match="reordered the rows"):
        slots.step([Feed(0, TOKENS[:5])])
    slots._filter.expect = real
    assert slots.length(0) == 0 and torch.equal(logits_of(slots, TOKENS[:5]), logits_of(opened(), TOKENS[:5]))


def test_what_cannot_be_mirrored_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlamaError, match="not unified"):
        LlamaSlots.open(made, unified=False)
    with pytest.raises(LlamaError, match="layer 2 is the output of the last norm.*convolution"):
        LlamaSlots.open(package(tmp_path / "conv", last_conv=True))
    with pytest.raises(LlamaError, match="before the first block"):
        LlamaSlots.open(package(tmp_path / "first", layers=(0,)))
    llama_hook.library.cache_clear()
    monkeypatch.setattr(llama_hook, "TRIED", ("0.0.1",))
    with pytest.raises(LlamaError, match="was not tried, only 0.0.1"):
        LlamaSlots.open(made)
    llama_hook.library.cache_clear()


def test_feeds_that_do_not_fit_are_refused(opened: Any) -> None:
    slots = opened()
    for feed, words in ((Feed(0, []), "was fed 0 tokens"), (Feed(3, [1]), "slot 3 of 1"),
                        (Feed(0, [1] * 129), "129 tokens exceed the context of 128")):  # fmt: skip
        with pytest.raises(LlamaError, match=words):
            slots.step([feed])
    assert slots.length(0) == 0
    slots.ask([Feed(0, TOKENS * 4)])  # a hint that cannot be followed is none


def test_run_takes_llama_cpp_for_a_gguf_and_torch_when_told(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same greedy text; an engine that cannot be had is an error when asked for, and a word when not."""
    told = [run(RunConfig(made, prompt="t5 t6 t7 t8", max_tokens=24, engine=engine), lambda piece: None)
            for engine in ("auto", "llama", "torch")]  # fmt: skip
    assert [found["engine"].split()[0] for found in told] == ["llama.cpp", "llama.cpp", "torch"]
    assert told[0]["token_ids"] == told[1]["token_ids"] == told[2]["token_ids"]
    assert told[0]["rows_read"] == told[2]["rows_read"] > 0
    with pytest.raises(EngineError, match="engine 'onnx' is not known"):
        RunConfig(made, engine="onnx")
    with pytest.raises(EngineError, match="dtype 'bfloat16' is torch's"):
        open_session(RunConfig(made, engine="llama", dtype="bfloat16"))

    def missing() -> None:
        raise LlamaError("it is not here")

    monkeypatch.setattr(generate, "library", missing)
    monkeypatch.setattr(llama_backbone, "library", missing)
    from float_tables import Recorder

    recorder = Recorder()
    open_session(RunConfig(made), recorder).model.close()
    assert recorder.said == ["backbone through torch, dequantized: it is not here"]
    with pytest.raises(LlamaError, match="it is not here"):
        open_session(RunConfig(made, engine="llama"))
