"""Adapters of engram-peft converted, verified, exported and converted again; its token map against its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import WORDS, write_words
from safetensors.numpy import save_file
from test_engram_peft import ADAPTER, PEFT, digest, documented_rows, write_adapter
from tokenizers import Tokenizer

from engram.builders.checkpoint import MANIFEST
from engram.builders.families.config import FamilyError
from engram.builders.families.known import find_published
from engram.builders.families.layouts import layout_of
from engram.builders.layout import LayoutError
from engram.builders.vocab import compress_vocabulary
from engram.cli.main import main
from engram.kernels import dispatch
from engram.quantize.convert import ConvertConfig, convert
from engram.quantize.export import safetensors
from engram.quantize.export.target import TargetConfig
from engram.quantize.package import open_package
from engram.quantize.verify import verify_package

ADDED = ["THE", "q"]  # ids that the tokenizer's model does not have
MAP = [0, 0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 12, 13]  # of WORDS, by hand, and of ADDED
COMPRESSED = {"enable_tokenizer_compression": True, "compressed_vocab_size": 9}
SIZES = {"orders": (2, 3), "totals": (200, 400), "heads": 4, "layers": (1, 3), "seed": 7}


def write_numbers(folder: Path, compressed: bool, **changes: Any) -> dict[str, np.ndarray]:
    """The adapter as the package saves it, with random numbers and its own offsets, and a tokenizer; all arrays."""
    write_adapter(folder, lambda c, t: c.update((COMPRESSED if compressed else {}) | changes))
    shapes = {name: shape for name, (dtype, shape) in ADAPTER["tensors"].items() if dtype == "F32"}
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {name: np.array(values) for name, values in ADAPTER["offsets"].items()}
    save_file(arrays, folder / "engram_adapters.safetensors")
    if compressed:
        write_words(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens(ADDED)
        tokenizer.save(str(folder / "tokenizer.json"))
    return arrays


def tables_and_layout(package: Path) -> tuple[Any, Any]:
    manifest = json.loads((package / MANIFEST).read_bytes())
    return {layer: table["sha256"] for layer, table in manifest["tables"].items()}, manifest["layout"]


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_an_adapter_goes_round(tmp_path: Path, compressed: bool, in_place: bool) -> None:
    """Rows by the formula, tables byte for byte; what is exported converts to the same package."""
    arrays = write_numbers(tmp_path / "m", compressed)
    where = ["--in-place"] if in_place else []
    with pytest.raises(SystemExit, match="^0$"):
        main(["convert", str(tmp_path / "m"), "--out", str(tmp_path / "package"), *where])
    vocabulary, mapped = (14, np.array(MAP)) if compressed else (500, np.arange(500))
    ids = np.random.default_rng(1).integers(0, vocabulary, (3, 700))
    expected = documented_rows(mapped[ids], 9 if compressed else 500, pad=int(mapped[2]), **SIZES)
    with open_package(tmp_path / "package") as package:
        layout = package.layout
        assert (layout.dialect, layout.vocab_size) == ("engram-peft", vocabulary)
        assert layout.compressed_size == (9 if compressed else 500)
        rows = layout.rows(ids, local=True)
        for layer in (1, 3):
            np.testing.assert_array_equal(rows[layer], expected[layer])
            every: Any = package.layers[layer]
            stored = arrays[f"{layer}.multi_head_embedding.embedding.weight"]
            assert every.gather(np.arange(len(stored))).tobytes() == stored.tobytes()
    verified = verify_package(tmp_path / "package", against=tmp_path / "m")
    assert verified["ok"], verified["problems"]
    assert verified["checked"]["golden_rows"] == 16 and verified["checked"]["constants"] == 2 * 3 + 2 * 8
    told = safetensors.export(TargetConfig(tmp_path / "package", tmp_path / "out"))
    assert told["whole"] == ["engram_adapters.safetensors"]
    for name in ("config.json", "engram_adapters.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    convert(ConvertConfig(tmp_path / "m", tmp_path / "first"))
    convert(ConvertConfig(tmp_path / "out", tmp_path / "second"))
    assert tables_and_layout(tmp_path / "first") == tables_and_layout(tmp_path / "second")


def test_verify_names_a_constant_of_another_seed(tmp_path: Path) -> None:
    write_numbers(tmp_path / "m", compressed=False)
    write_numbers(tmp_path / "other", compressed=False, seed=8)
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    problems = verify_package(tmp_path / "package", against=tmp_path / "other")["problems"]
    assert [problem.split()[0] for problem in problems] == ["seed", "multipliers"]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "demo's rule": ({"compressed_vocab_size": 10}, r"compresses to 9 ids, the checkpoint says 10"),
    "pad outside": ({"pad_id": 14}, "pad_id 14 is outside the vocabulary of 14 ids"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_tokenizer_that_contradicts_is_refused(tmp_path: Path, case: str) -> None:
    changes, words = FAULTS[case]
    write_numbers(tmp_path / "m", compressed=True, **changes)
    with pytest.raises((FamilyError, LayoutError), match=words):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    assert not (tmp_path / "package").exists()


def test_compressed_ids_need_a_tokenizer_and_raw_ids_none(tmp_path: Path) -> None:
    write_numbers(tmp_path / "m", compressed=True)
    (tmp_path / "m/tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(FamilyError, match=r"tokenizer.json does not exist: .*hashes compressed ids"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package", tokenizer=str(tmp_path / "tokenizer.json")))
    assert verify_package(tmp_path / "package", against=tmp_path / "m")["ok"]


def test_offsets_that_lie_are_refused(tmp_path: Path) -> None:
    arrays = write_numbers(tmp_path / "m", compressed=False)
    arrays["3.multi_head_embedding.offsets"][5] += 1
    save_file(arrays, tmp_path / "m/engram_adapters.safetensors")
    with pytest.raises(FamilyError, match=r"the offsets of layer 3 are .*differ at 5"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    write_numbers(tmp_path / "m", compressed=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "m/tokenizer.json"))
    found = compress_vocabulary(tokenizer, added=False)
    assert (found.token_map.tolist(), found.size) == (MAP, 9)
    assert compress_vocabulary(tokenizer).token_map.tolist() == [*MAP[: len(WORDS)], 3, 9]


def test_the_packages_token_map_and_its_rows(tmp_path: Path, deepseek_v3_tokenizer: Path) -> None:
    """128,815 ids, 815 of them added; what stands before a text is the pad id, compressed, or added and so itself."""
    golden = PEFT["compression"]
    size, vocabulary = golden["compressed_vocab_size"], golden["vocab_size"]
    ids = np.random.default_rng(2).integers(0, vocabulary, (2, 50_000))
    ids[:, ::7] = np.random.default_rng(3).integers(128_000, vocabulary, ids[:, ::7].shape)
    for case in golden["rows"]:
        changes = {"enable_tokenizer_compression": True, "compressed_vocab_size": size, "pad_id": case["pad_id"]}
        write_numbers(folder := tmp_path / str(case["pad_id"]), compressed=False, **changes)
        layout = layout_of(find_published(folder)[0], folder, deepseek_v3_tokenizer)
        assert (layout.vocab_size, layout.compressed_size, layout.map_sha256()) == (
            vocabulary, size, golden["map_sha256"]
        )  # fmt: skip
        for path in dispatch.available():
            with dispatch.force(path):
                rows = layout.rows(ids, local=True)
            assert {str(layer): digest(values) for layer, values in rows.items()} == case["sha256"], path
