"""Checkpoints of the paper's demo and its clones: their figures, their layout, and what contradicts it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import (
    DEMO_CONFIG,
    FAULTS_OF_TENSORS,
    Change,
    Tensors,
    alter,
    count_refusals,
    demo_tensors,
    write_demo,
    write_zeros,
)

from engram.builders.families.config import FamilyError
from engram.builders.families.known import find_published, is_published
from engram.builders.families.layouts import layout_of
from engram.builders.tensor_files import TensorFileError
from engram.quantize.convert import ConvertConfig, convert
from engram.quantize.inspect_published import inspect_published
from engram.quantize.package import open_package


def write_demo_list(folder: Path, change: Change, start: str = "model.layers.{}.engram.") -> Path:
    return write_zeros(folder, DEMO_CONFIG, demo_tensors(start), change)


STARTS = ["model.layers.{}.engram.", "layers.{}.engram.", "transformer_blocks.{}.engram.", "model.engram_layers.{}."]


@pytest.mark.parametrize("start", STARTS)
def test_the_demo_is_read_under_every_prefix(tmp_path: Path, start: str) -> None:
    arrays = write_demo(tmp_path / "m", start)
    found, _ = find_published(tmp_path / "m")
    assert (found.family, found.dialect, found.orders, found.heads) == ("deepseek-engram", "demo", (2, 3), 2)
    assert [(t.layer, t.rows, t.width, t.codec) for t in found.tables] == [(3, 212, 8, "f32"), (1, 244, 8, "f32")]
    for table in found.tables:
        values = table.parts[0].values
        held = values.file.read_bytes()[values.offset : values.offset + values.bytes]
        assert held == arrays[start.format(table.layer) + "multi_head_embedding.embedding.weight"].tobytes()
    assert set(found.stored) == {"1.offsets", "3.offsets"} and found.absent == ()
    assert {len(gate) for gate in found.dense.values()} == {2 + 2 * 4 + 3}
    told = inspect_published(tmp_path / "m")
    assert (told["rows_per_token"], told["bytes_per_token"], told["table_bytes"]) == (8, 8 * 32, 456 * 32)
    assert told["other"]["tensors"] == len(arrays) - 2 and told["vocab_size"] == 12


def test_the_demos_own_list_of_modules_counts_the_embedding(tmp_path: Path) -> None:
    """`nn.ModuleList(LLM)`: number 0 embeds the tokens, so block 3 is number 4."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        tensors["0.weight"] = ("F32", [12, 8])
        for name in [name for name in tensors if ".engram." in name]:
            layer, rest = name.split(".", 1)
            tensors[f"{int(layer) + 1}.{rest}+"] = tensors.pop(name)
        for name in [name for name in tensors if name.endswith("+")]:
            tensors[name[:-1]] = tensors.pop(name)

    found, _ = find_published(write_demo_list(tmp_path / "m", change, "{}.engram."))
    assert [table.layer for table in found.tables] == [3, 1] and found.hashing["layers"] == (3, 1)


def test_the_demos_layout_is_recomputed_and_its_rows_are_converted(tmp_path: Path) -> None:
    arrays = write_demo(tmp_path / "m", STARTS[0])
    layout = layout_of(find_published(tmp_path / "m")[0], tmp_path / "m")
    assert layout.primes == {3: ((61, 67), (41, 43)), 1: ((71, 73), (47, 53))} and layout.compressed_size == 9
    ids = np.array([[4, 5, 7, 1]])
    for layer, draws in {layer: np.random.default_rng(10007 * layer) for layer in (1, 3)}.items():
        m = [int(x) * 2 + 1 for x in draws.integers(0, (2**63 - 1) // 9 // 2, 3)]
        the, cat, a, pad = 3, 4, 0, int(layout.compress(np.array([[2]]))[0, 0])
        assert layout.compress(ids).tolist() == [[the, the, cat, a]]
        last = [(a * m[0] ^ cat * m[1]) % p for p in layout.primes[layer][0]]
        last += [(a * m[0] ^ cat * m[1] ^ the * m[2]) % p for p in layout.primes[layer][1]]
        first = [(the * m[0] ^ pad * m[1] ^ pad * m[2]) % p for p in layout.primes[layer][1]]
        rows = layout.rows(ids, local=True)[layer][0]
        assert rows[-1].tolist() == last and rows[0, 2:].tolist() == first
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    package = open_package(tmp_path / "package")
    assert package.layout.to_json() == layout.to_json()
    stored = arrays[STARTS[0].format(1) + "multi_head_embedding.embedding.weight"]
    assert stored.tobytes() in next((tmp_path / "package/tables").glob("*01*")).read_bytes()


def test_offsets_that_lie_are_refused_before_rows_are_converted(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_demo(tmp_path / "m", STARTS[0])
    arrays = load_file(tmp_path / "m/model.safetensors")
    arrays["model.layers.1.engram.multi_head_embedding.offsets"][2] += 1
    save_file(arrays, tmp_path / "m/model.safetensors")
    with pytest.raises(FamilyError, match=r"the offsets of layer 1 are .*differ at 2"):
        layout_of(find_published(tmp_path / "m")[0], tmp_path / "m")


def test_the_configuration_may_lie_alone_nested_or_beside_the_backbones(tmp_path: Path) -> None:
    outer = {"model_type": "qwen3", "hidden_size": 8, "vocab_size": 12, "seed": 99}
    inner = {key: value for key, value in DEMO_CONFIG.items() if key not in ("model_type", "hidden_size", "vocab_size")}
    cases: dict[str, dict[str, Any]] = {
        "alone": {"engram_config.json": inner}, "beside": {"config.json": outer, "engram_config.json": inner},
        "nested": {"config.json": outer | {"engram_config": inner | {"model_type": "engram"}}},
        "in text_config": {"config.json": {"text_config": outer | {"engram_config": inner | {"model_type": "engram"}}}},
        "with engram_ before": {"config.json": {"model_type": "deepseek_v4", "hidden_size": 8, "hc_mult": 2} | {
            f"engram_{key.removeprefix('engram_')}": value for key, value in inner.items() if key != "hc_mult"}},
    }  # fmt: skip
    for case, configurations in cases.items():
        write_demo(tmp_path / case)
        (tmp_path / case / "config.json").unlink()
        assert not is_published(tmp_path / case)
        for name, values in configurations.items():
            (tmp_path / case / name).write_text(json.dumps(values))
        found, _ = find_published(tmp_path / case)
        assert is_published(tmp_path / case) and found.family == "deepseek-engram", case
        assert found.hashing["seed"] == 0 and found.vocab_size == (0 if case[0] in "aw" else 12), case
    convert(ConvertConfig(tmp_path / "alone", tmp_path / "package"))
    assert json.loads((tmp_path / "package/source/engram_config.json").read_text()) == inner


def test_shards_that_are_not_here_are_named(tmp_path: Path) -> None:
    write_demo(tmp_path / "m", shards=True)
    (tmp_path / "m/layer-3.safetensors").unlink()
    found, _ = find_published(tmp_path / "m")
    assert [table.absent for table in found.tables] == [("layer-3.safetensors",), ()]
    assert len(found.absent) == 14 and all(".3.engram." in name for name in found.absent)


def test_what_shapes_say_may_be_left_out(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        for key in ("hidden_size", "hc_mult", "kernel_size", "vocab_size"):
            del config[key]
        for name in [name for name in tensors if name.endswith((".bias", "offsets"))]:
            del tensors[name]  # clones have no biases, and compute the offsets
        config["compressed_vocab_size"] = 9

    found, _ = find_published(write_demo_list(tmp_path / "m", change))
    assert found.compressed_size == 9 and not found.stored and {len(gate) for gate in found.dense.values()} == {10}


DEMO_NAME = "model.layers.1.engram."
TABLE = "multi_head_embedding.embedding.weight"
DEMO_FAULTS: dict[str, tuple[Change, str]] = {
    "no sizes": (lambda c, t: c.pop("engram_vocab_size"), "model_type engram: no known memory"),
    "no seed": (lambda c, t: c.pop("seed"), "lacks the key 'seed' or 'engram_seed'"),
    "no pad": (lambda c, t: c.pop("pad_id"), "lacks the key 'pad_id' or 'engram_pad_id'"),
    "two names": (lambda c, t: c.update(engram_seed=1), "names of one thing"),
    "zero heads": (lambda c, t: c.update(n_head_per_ngram=0), "n_head_per_ngram is 0, expected a number from 1 to 64"),
    "huge heads": (lambda c, t: c.update(n_head_per_ngram=1 << 40), "n_head_per_ngram is 1099511627776"),
    "negative pad": (lambda c, t: c.update(pad_id=-1), "pad_id is -1"),
    "outside pad": (lambda c, t: c.update(pad_id=12), "pad_id 12 is outside the vocabulary of 12 ids"),
    "one size": (lambda c, t: c.update(engram_vocab_size=[60]), "has 1 numbers, orders 2 to 3 need 2"),
    "a number": (lambda c, t: c.update(engram_vocab_size=60), "engram_vocab_size is 60, expected a list"),
    "other size": (lambda c, t: c.update(engram_vocab_size=[60, 44]), r"embedding.weight is F32 \[212, 8\], config"),
    "huge size": (lambda c, t: c.update(engram_vocab_size=[60, 1 << 41]), "engram_vocab_size is .60, 2199"),
    "other order": (lambda c, t: c.update(layer_ids=[1, 3]), r"embedding.weight is F32 \[244, 8\], config"),
    "width": (lambda c, t: c.update(n_embed_per_ngram=18), r"embedding.weight is F32 \[212, 8\], config"),
    "odd width": (lambda c, t: c.update(n_embed_per_ngram=15), "n_embed_per_ngram 15 does not divide by 2 heads"),
    "huge order": (lambda c, t: c.update(max_ngram_size=9), "max_ngram_size is 9, expected a number from 2 to 8"),
    "one-based": (lambda c, t: c.update(layer_ids=[4, 2]), r"in the layers \[1, 3\], the configuration names \[2, 4\]"),
    "no embedding first": (lambda c, t: c.update(layer_ids=[2, 0]), r"in the layers \[1, 3\], the configuration names"),
    "twice": (lambda c, t: c.update(layer_ids=[3, 3]), r"layers \[3, 3\] name one twice"),
    "fewer layers": (lambda c, t: c.update(layer_ids=[3]), r"in the layers \[1, 3\], the configuration names \[3\]"),
    "streams": (lambda c, t: c.update(hc_mult=3), r"short_conv.conv.weight is F32 \[16, 1, 4\], config.json asks"),
    "hidden": (lambda c, t: c.update(hidden_size=4), r"value_proj.weight is F32 \[8, 32\], config.json asks"),
    "kernel": (lambda c, t: c.update(kernel_size=3), r"short_conv.conv.weight is F32 \[16, 1, 4\], config.json asks"),
    "nested text": (lambda c, t: c.update(engram_config="x"), "engram_config is no object"),
    "two prefixes": (lambda c, t: t.update({"ema.layers.1.engram." + TABLE: ("F32", [2, 8])}),
                     "under 2 names: ema.layers.N.engram., model.layers.N.engram."),
    "extra layer": (lambda c, t: t.update({"model.layers.5.engram." + TABLE: ("F32", [2, 8])}),
                    r"in the layers \[1, 3, 5\]"),
    "extra tensor": (lambda c, t: t.update({DEMO_NAME + "gate.weight": ("F32", [8])}),
                     "has the tensor 'model.layers.1.engram.gate.weight', which its configuration does not ask for"),
    "one bias less": (lambda c, t: t.pop(DEMO_NAME + "value_proj.bias"), "key_projs.0.bias', which its configuration"),
    "no table": (lambda c, t: [t.pop(n) for n in list(t) if "embedding.weight" in n], "under 0 names: none"),
}  # fmt: skip


@pytest.mark.parametrize("case", DEMO_FAULTS)
def test_what_contradicts_the_demo_is_named(tmp_path: Path, case: str) -> None:
    change, words = DEMO_FAULTS[case]
    with pytest.raises((FamilyError, TensorFileError), match=words):
        find_published(write_demo_list(tmp_path / "m", change))


ALL = [(how, name) for name in demo_tensors(STARTS[0]) if ".layers.1." in name for how in FAULTS_OF_TENSORS]
# stored constants that follow from the configuration: a clone that computes them is read
FINE = {("gone", DEMO_NAME + "multi_head_embedding.offsets")}


@pytest.mark.parametrize(("how", "name"), [pair for pair in ALL if pair not in FINE])
def test_every_tensor_of_the_demo_must_fit(tmp_path: Path, how: str, name: str) -> None:
    with pytest.raises((FamilyError, TensorFileError)) as refused:
        find_published(write_demo_list(tmp_path / "m", alter(how, name)))
    module = name.split(".engram.")[1].split(".")[0].replace("key_projs", "").replace("value_proj", "")
    assert module in str(refused.value) or "in the layers" in str(refused.value)


def test_a_search_for_too_many_primes_is_refused(tmp_path: Path) -> None:
    config = DEMO_CONFIG | {
        "layer_ids": list(range(40)), "n_head_per_ngram": 32, "n_embed_per_ngram": 256,
        "engram_vocab_size": [1 << 40, 1 << 40],
    }  # fmt: skip
    name = "layers.{}.engram.multi_head_embedding.embedding.weight"
    begin = time.process_time()
    with pytest.raises(FamilyError, match="40 layers, 2 orders and 32 heads need 2,560 primes, at most 2,048"):
        find_published(
            write_zeros(tmp_path / "m", config, {name.format(i): ("F32", [4, 8]) for i in range(40)}, lambda c, t: None)
        )
    assert time.process_time() - begin < 1


def test_configurations_of_any_kind_never_crash(tmp_path: Path) -> None:
    write_demo_list(tmp_path / "m", lambda c, t: None)
    assert count_refusals(tmp_path / "m") > 120
