"""Adapters of engram-peft: figures and refusals on what it saved, and row ids against a million of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import FAULTS_OF_TENSORS, Change, Tensors, alter, count_refusals, write_sparse, write_zeros
from safetensors.numpy import save_file
from sympy import nextprime

from engram.builders.families.config import FamilyError
from engram.builders.families.known import find_published
from engram.builders.families.layouts import layout_of, read_integers
from engram.builders.layout import Layout
from engram.builders.tensor_files import TensorFileError
from engram.kernels import dispatch
from engram.quantize.convert import ConvertConfig, convert
from engram.quantize.inspect_published import inspect_published
from engram.quantize.package import open_package

PEFT = json.loads((Path(__file__).parent / "golden/engram_peft.json").read_text())
ADAPTER, QWEN = PEFT["adapters"]


def write_adapter(folder: Path, change: Change = lambda c, t: None, adapter: dict[str, Any] = ADAPTER) -> Path:
    tensors = {name: (dtype, shape) for name, (dtype, shape) in adapter["tensors"].items()}
    return write_zeros(folder, adapter["config"], tensors, change)


def test_an_adapter_of_engram_peft_is_inspected(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "m")
    told = inspect_published(folder)
    assert (told["family"], told["rows_per_token"], told["bytes_per_token"]) == ("engram-peft", 16, 16 * 16)
    shapes = [ADAPTER["tensors"][f"{n}.multi_head_embedding.embedding.weight"][1] for n in (1, 3)]
    assert [[layer["rows"], layer["width"]] for layer in told["layers"]] == shapes
    assert told["table_bytes"] == sum(rows * width * 4 for rows, width in shapes) and told["vocab_size"] == 500
    assert told["other"]["tensors"] == len(ADAPTER["tensors"]) - 2


def test_an_adapter_with_compressed_ids_and_a_lora_says_no_vocabulary(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        config |= {"enable_tokenizer_compression": True, "compressed_vocab_size": 321, "engram_dtype": "float16"}
        for name, (dtype, shape) in tensors.items():
            tensors[name] = (dtype.replace("F32", "F16"), shape)

    folder = write_adapter(tmp_path / "m", change)
    write_sparse(folder / "adapter_model.safetensors", {"base_model.model.q_proj.lora_A.weight": ("F32", [2, 4])})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    told = inspect_published(folder)
    assert (told["compressed_size"], told["vocab_size"], told["layers"][0]["codec"]) == (321, None, None)
    assert told["layers"][0]["dtype"] == "F16" and told["table_files"] == ["engram_adapters.safetensors"]


def test_the_offsets_of_adapters_are_those_of_our_primes(tmp_path: Path) -> None:
    """The package's own offsets, which its prime search made, against the constants that `hashing` leads to."""
    found, _ = find_published(write_adapter(tmp_path / "m"))
    layout = Layout.build(
        dialect=found.dialect, orders=found.orders, heads=found.heads, head_dim=found.head_dim,
        vocab_size=found.vocab_size, **found.hashing,
    )  # fmt: skip
    for layer in (1, 3):
        assert layout.offsets(layer).tolist() == ADAPTER["offsets"][f"{layer}.multi_head_embedding.offsets"]
    found, _ = find_published(write_adapter(tmp_path / "q", adapter=QWEN))
    assert np.cumsum([0, *found.hashing["primes"][:-1]]).tolist() == QWEN["offsets"]["2.multi_head_embedding.offsets"]


OFFSETS = "1.multi_head_embedding.offsets"  # they follow from the configuration, so they may be missing
PEFT_FAULTS: dict[str, tuple[Change, str]] = {
    **{f"no {key}": (lambda c, t, key=key: c.pop(key), f"lacks the key '{key}'") for key in (
        "target_layers", "ngram_sizes", "n_head_per_ngram", "embedding_dim", "hidden_size", "hc_mult",
        "conv_kernel_size", "pad_id", "seed", "compressed_vocab_size")},
    "no sizes": (lambda c, t: c.pop("engram_vocab_size_per_ngram"), "model_type engram: no known memory"),
    "truth": (lambda c, t: c.pop("enable_tokenizer_compression"), "enable_tokenizer_compression is None, expected tr"),
    "zero heads": (lambda c, t: c.update(n_head_per_ngram=0), "n_head_per_ngram is 0"),
    "negative layer": (lambda c, t: c.update(target_layers=[-1, 3]), "target_layers is .-1, 3."),
    "huge width": (lambda c, t: c.update(embedding_dim=1 << 70), "embedding_dim is 11805"),
    "odd width": (lambda c, t: c.update(embedding_dim=33), "embedding_dim 33 does not divide by 8 rows a token"),
    "other width": (lambda c, t: c.update(embedding_dim=64), r"embedding.weight is F32 \[660, 4\], config"),
    "heads": (lambda c, t: c.update(n_head_per_ngram=2), r"embedding.weight is F32 \[660, 4\], config"),
    "sizes": (lambda c, t: c.update(engram_vocab_size_per_ngram=[200, 440]), r"embedding.weight is F32 \[660, 4\]"),
    "three sizes": (lambda c, t: c.update(engram_vocab_size_per_ngram=[1, 2, 3]), "have a number for each"),
    "no order": (lambda c, t: c.update(ngram_sizes=[3, 2]), r"ngram_sizes \[3, 2\] must ascend"),
    "highest": (lambda c, t: c.update(max_ngram_size=4), "max_ngram_size is 4, only 3 is understood"),
    "layers": (lambda c, t: c.update(target_layers=[1]), r"in the layers \[1, 3\], the configuration names \[1\]"),
    "elsewhere": (lambda c, t: c.update(table_source="engramdb:store"), "table_source is 'engramdb:store', only 'mem"),
    "engine": (lambda c, t: c.update(engine="x"), "engine 'x' with table_spec None is not understood"),
    "specification": (lambda c, t: c.update(table_spec="X"), "engine 'deepseek' with table_spec 'X'"),
    "not Qwen's": (lambda c, t: c.update(engine="qwen_ple"), "it has one layer, orders 2 and 3, 8 heads and raw ids"),
    "streams": (lambda c, t: c.update(hc_mult=3), r"short_conv.conv.weight is F32 \[32, 1, 4\]"),
    "fewer streams": (lambda c, t: c.update(hc_mult=1), "has the tensor '1.gating.norm_h.1.weight'"),
    "extra layer": (lambda c, t: t.update({"5.multi_head_embedding.embedding.weight": ("F32", [9, 4])}),
                    r"in the layers \[1, 3, 5\]"),
    "extra tensor": (lambda c, t: t.update({"3.gating.w_q.weight": ("F32", [9])}),
                     "has the tensor '3.gating.w_q.weight', which its configuration does not ask for"),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_FAULTS)
def test_what_contradicts_an_adapter_is_named(tmp_path: Path, case: str) -> None:
    change, words = PEFT_FAULTS[case]
    with pytest.raises((FamilyError, TensorFileError), match=words):
        find_published(write_adapter(tmp_path / "m", change))


@pytest.mark.parametrize(
    ("sizes", "words"), [([23] * 15, "prime_sizes has 15 numbers, 16 heads"), ([23] * 16, r"is F32 \[886, 4\], config")]
)
def test_sizes_of_a_qwen_adapter_must_fit(tmp_path: Path, sizes: list[int], words: str) -> None:
    with pytest.raises(FamilyError, match=words):
        find_published(write_adapter(tmp_path / "m", lambda c, t: c.update(prime_sizes=sizes), QWEN))


def add_layer(config: dict[str, Any], tensors: Tensors) -> None:
    config["target_layers"] = [2, 3]
    for name, tensor in list(tensors.items()):
        tensors[f"3{name[1:]}"] = tensor


@pytest.mark.parametrize(
    "change",
    [add_layer, lambda c, t: c.update(ngram_sizes=[2, 4], max_ngram_size=4), lambda c, t: c.update(n_head_per_ngram=4),
     lambda c, t: c.update(enable_tokenizer_compression=True)],
)  # fmt: skip
def test_qwens_engine_has_one_form(tmp_path: Path, change: Change) -> None:
    with pytest.raises(FamilyError, match="it has one layer, orders 2 and 3, 8 heads and raw ids"):
        find_published(write_adapter(tmp_path / "m", change, QWEN))


EVERY = [(how, name) for name in ADAPTER["tensors"] if name.startswith("1.") for how in FAULTS_OF_TENSORS]


@pytest.mark.parametrize(("how", "name"), [pair for pair in EVERY if pair != ("gone", OFFSETS)])
def test_every_tensor_of_an_adapter_must_fit(tmp_path: Path, how: str, name: str) -> None:
    with pytest.raises((FamilyError, TensorFileError)) as refused:
        find_published(write_adapter(tmp_path / "m", alter(how, name)))
    assert name.split(".")[1] in str(refused.value) or "in the layers" in str(refused.value)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "m")
    (folder / "engram_adapters.safetensors").unlink()
    (folder / "engram_weights.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FamilyError, match="has its tensors in engram_weights.pt: a pickle can run code") as refused:
        find_published(folder)
    assert "safe_serialization=True" in str(refused.value.hint)


def test_configurations_of_any_kind_never_crash(tmp_path: Path) -> None:
    assert count_refusals(write_adapter(tmp_path / "m")) > 200


def digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows.astype("<i8")).tobytes()).hexdigest()


def documented_rows(
    ids: np.ndarray, size: int, orders: Sequence[int], totals: Sequence[int], heads: int, layers: Sequence[int],
    pad: int, seed: int,
) -> dict[int, np.ndarray]:  # fmt: skip
    """What builders/families/engram_peft.py says of the package's hash."""
    top, length, out = orders[-1], ids.shape[1], {}
    text = np.concatenate([np.full((len(ids), top - 1), pad), ids], axis=1)
    taken: set[int] = set()
    for layer in sorted(layers):
        draws = np.random.default_rng(seed + 10007 * layer).integers(0, (2**63 - 1) // size // 2, top)
        multipliers, columns = 2 * draws + 1, []
        for order, total in zip(orders, totals, strict=True):
            mixed = np.zeros_like(ids)
            for k in range(order):
                mixed ^= text[:, k : k + length] * multipliers[k]
            prime = total // heads - 1
            for _ in range(heads):
                prime = nextprime(prime)
                while prime in taken:
                    prime = nextprime(prime)
                taken.add(prime)
                columns.append(mixed % prime)
        out[layer] = np.stack(columns, axis=-1)
    return out


@pytest.mark.parametrize("case", range(len(PEFT["hash"])))
def test_the_packages_hash_is_as_documented_on_a_million_tokens(case: int) -> None:
    golden = PEFT["hash"][case]
    size, totals, orders, heads, layers, pad, seed = golden["arguments"].values()
    ids = np.random.default_rng(0).integers(0, size, (1, 1_000_000))
    rows = documented_rows(ids, size, orders, totals, heads, layers, pad, seed)
    for layer in layers:
        assert rows[layer][0, :3].tolist() == golden["first"][str(layer)]
        assert digest(rows[layer]) == golden["million"][str(layer)]
    ours = Layout.build(
        dialect="engram-peft", orders=orders, heads=heads, head_dim=4, layers=sorted(layers), pad_id=pad,
        vocab_size=size, rows_per_head=[total // heads for total in totals], seed=seed,
    )  # fmt: skip
    for path in dispatch.available():
        with dispatch.force(path):
            found = ours.rows(ids, local=True)
        assert {str(layer): digest(values) for layer, values in found.items()} == golden["million"], path
    some, history = [], None
    for first in range(0, 500, 7):  # in parts, with what was before carried over
        part = ids[:, first : first + 7]
        some.append(ours.rows(part, history)[layers[0]])
        history = ours.history(part, history)
    together = np.concatenate(some, axis=1)
    assert np.array_equal(together, rows[layers[0]][:, : together.shape[1]] + ours.offsets(layers[0]))
    demo = replace(ours, dialect="demo").rows(ids[:, :1000], local=True)
    assert all((demo[layer] == rows[layer][:, :1000]).mean() < 0.05 for layer in layers), "no other name of the demo's"


def qwen_ids() -> np.ndarray:
    generator = np.random.default_rng(1)
    ids = generator.integers(0, 248320, (4, 250_000))
    ids[generator.random(ids.shape) < 0.02] = 248044
    return ids


@pytest.mark.parametrize("case", [0, 1])
def test_a_qwen_adapter_hashes_as_our_dialect_on_a_million_tokens(tmp_path: Path, case: int) -> None:
    golden = PEFT["qwen"][case]

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        config |= {"compressed_vocab_size": 248320, "prime_sizes": golden["prime_sizes"]}
        if case == 0:
            rows = sum(nextprime(20_000_000 - 1, i) for i in range(1, 17))
            tensors["2.multi_head_embedding.embedding.weight"] = ("F32", [rows, 4])

    found, _ = find_published(write_adapter(tmp_path / "m", change, QWEN))
    assert (found.dialect, found.hashing["pad_id"], found.hashing["reset_id"]) == ("qwen-ple", 248044, 248044)
    layout = Layout.build(
        dialect=found.dialect, orders=found.orders, heads=found.heads, head_dim=found.head_dim,
        vocab_size=found.vocab_size, table_rows={2: found.tables[0].rows}, **found.hashing,
    )  # fmt: skip
    rows = layout.rows(qwen_ids(), local=True)[2]
    assert rows[0, :3].tolist() == golden["first"] and digest(rows) == golden["million"]


def test_a_qwen_adapter_is_converted(tmp_path: Path) -> None:
    write_adapter(tmp_path / "m", lambda c, t: c.update(compressed_vocab_size=248320), QWEN)
    shapes = {name: shape for name, (dtype, shape) in QWEN["tensors"].items() if dtype == "F32"}
    arrays = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    offsets = {name: np.array(values) for name, values in QWEN["offsets"].items()}
    save_file(arrays | offsets, tmp_path / "m/engram_adapters.safetensors")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    package = open_package(tmp_path / "package")
    assert digest(package.layout.rows(qwen_ids(), local=True)[2]) == PEFT["qwen"][1]["million"]
    stored = next((tmp_path / "package/tables").glob("*02*")).read_bytes()
    assert arrays["2.multi_head_embedding.embedding.weight"].tobytes() in stored
    offsets["2.multi_head_embedding.offsets"][15] -= 1
    save_file(arrays | offsets, tmp_path / "m/engram_adapters.safetensors")
    with pytest.raises(FamilyError, match="the offsets of layer 2"):
        layout_of(find_published(tmp_path / "m")[0], tmp_path / "m")


@pytest.fixture(scope="module")
def package_hashing() -> Any:
    """The module engram_peft.hashing alone: the package itself does not import on Python 3.11."""
    if (package := importlib.util.find_spec("engram_peft")) is None:
        pytest.skip("engram-peft is not installed")
    path = Path(package.submodule_search_locations[0]) / "hashing.py"  # type: ignore[index]
    spec = importlib.util.spec_from_file_location("engram_peft_hashing", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[spec.name] = module  # type: ignore[union-attr]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_the_installed_package_hashes_as_recorded(package_hashing: Any) -> None:
    for golden in PEFT["hash"]:
        arguments = golden["arguments"]
        ids = np.random.default_rng(0).integers(0, arguments["compressed_vocab_size"], (1, 1_000_000))
        rows = package_hashing.create_hash_mapping(**arguments).hash(ids)
        assert {str(layer): digest(values) for layer, values in rows.items()} == golden["million"]
    for golden in PEFT["qwen"]:
        mapping = package_hashing.QwenPleHashMapping(248320, prime_sizes=golden["prime_sizes"])
        assert digest(mapping.hash(qwen_ids())[1]) == golden["million"]


def test_the_installed_package_saves_what_is_recorded(tmp_path: Path) -> None:
    engram_peft = pytest.importorskip("engram_peft", exc_type=ImportError)
    from transformers import LlamaConfig, LlamaForCausalLM

    for number, adapter in enumerate(PEFT["adapters"]):
        base = LlamaForCausalLM(LlamaConfig(
            vocab_size=500, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=2,
        ))  # fmt: skip
        config = engram_peft.EngramConfig(**adapter["config"])
        model = engram_peft.get_engram_model(base, config, None, train_mode="engram_only")
        model.save_pretrained(tmp_path / str(number))
        found, files = find_published(tmp_path / str(number))
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == adapter["files"]
        assert {n: [t.dtype, list(t.shape)] for n, t in files.tensors.items()} == adapter["tensors"]
        for name, offsets in adapter["offsets"].items():
            assert read_integers(files.tensors[name]).tolist() == offsets
        assert found.family == "engram-peft"
