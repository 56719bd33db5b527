"""What published checkpoints hold, read from headers and compared with the classes and lists that made them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import (
    V41_CONFIG,
    v41_tensors,
    write_gemma,
    write_longcat,
    write_qwen4_exp,
    write_qwen4exp_gguf,
    write_sparse,
    write_v41,
)

from engram import EngramError
from engram.builders.families.config import FamilyError
from engram.builders.families.known import find_published
from engram.builders.tensor_files import TensorFileError
from engram.quantize.inspect_published import inspect_published


def table_bytes(folder: Path) -> bytes:
    """All rows of the first table, through their places."""
    found, _ = find_published(folder)
    out = b""
    for part in found.tables[0].parts:
        with part.values.file.open("rb") as file:
            file.seek(part.values.offset)
            out += file.read(part.values.bytes)
    return out


def test_qwen4_exp_is_where_transformers_wrote_it(tmp_path: Path) -> None:
    model = write_qwen4_exp(tmp_path / "m")
    ple = model.model.layers[1].ple.ple_embedding
    found, _ = find_published(tmp_path / "m")
    assert (found.family, found.orders, found.heads, found.head_dim) == ("qwen4_exp", (2, 3), 2, 16)
    (table,) = found.tables
    assert (table.layer, table.rows, len(table.parts), table.dtype, table.codec) == (1, 4064, 4, "F32", "f32")
    shards = [value for name, value in sorted(ple.ngram_embedding.state_dict().items()) if name.endswith("weight")]
    assert table_bytes(tmp_path / "m") == b"".join(shard.numpy().tobytes() for shard in shards)
    assert set(found.stored) == {"1.multipliers", "1.primes", "1.offsets"}
    told = inspect_published(tmp_path / "m")
    assert (told["rows_per_token"], told["bytes_per_token"], told["table_bytes"]) == (4, 4 * 64, 4064 * 64)
    whole = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert told["other"]["bytes"] + told["table_bytes"] == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_per_token_tables_are_where_transformers_wrote_them(tmp_path: Path, kind: str) -> None:
    model = write_gemma(tmp_path / "m", kind)
    found, _ = find_published(tmp_path / "m")
    assert (found.family, found.orders, found.heads) == ("per_token", (1,), 5)
    weight = model.model.embed_tokens_per_layer.weight
    assert (found.tables[0].rows, found.tables[0].width) == (5 * 400, 8) and tuple(weight.shape) == (400, 40)
    assert table_bytes(tmp_path / "m") == weight.detach().numpy().tobytes()


@pytest.mark.parametrize("names", ["model.ngram_embeddings.embedders.{}.weight", "oe_embed_tokens{}.weight"])
def test_longcat_is_twelve_tables_in_a_row(tmp_path: Path, names: str) -> None:
    arrays = write_longcat(tmp_path / "m", names)
    found, _ = find_published(tmp_path / "m")
    assert (found.orders, found.heads, found.head_dim, found.tables[0].rows) == ((2, 3, 4), 4, 4, 12 * 151 + 2 * 66)
    assert table_bytes(tmp_path / "m") == b"".join(arrays[names.format(i)].tobytes() for i in range(12))
    assert len(found.dense[0]) == 12


@pytest.mark.parametrize(
    ("kind", "codec", "row_bytes"), [("Q4_0", "q4_0", 18), ("Q8_0", "q8_0", 34), ("Q5_1", None, 24)]
)
def test_a_gguf_is_read_like_the_rest(tmp_path: Path, kind: str, codec: str | None, row_bytes: int) -> None:
    stored = write_qwen4exp_gguf(tmp_path / "m.gguf", kind)
    found, _ = find_published(tmp_path / "m.gguf")
    assert (found.family, found.orders, found.heads, found.vocab_size) == ("qwen4_exp", (2, 3), 2, 300)
    table = found.tables[0]
    assert (table.layer, table.rows, table.width, table.codec, table.row_bytes) == (1, 240, 32, codec, row_bytes)
    assert table_bytes(tmp_path / "m.gguf") == stored.tobytes()
    told = inspect_published(tmp_path / "m.gguf")
    assert told["layers"][0]["dtype"] == kind and told["other"] == {"tensors": 1, "bytes": 32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"head_offsets": [0, 53, 112, 174]}, "are not the sums"), ({"layers": [1, 2]}, "ple has 2 layers"),
     ({"head_vocab_sizes": [53, 59, 61, 68]}, "is .240, 32., at least .241, 32. is needed"),
     ({"ngram_size": 4}, "orders 2 to 4 with 2 heads need 1, 4, 6, 6"),
     ({"heads_per_ngram": 1 << 20}, "heads_per_ngram is 1048576")],
)  # fmt: skip
def test_a_gguf_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(FamilyError, match=words):
        find_published(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def v41(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "DeepSeek-V4.1-Flash"
    write_v41(folder)
    return folder


def test_v41_in_full_geometry_is_inspected_in_a_second(v41: Path) -> None:
    begin = time.process_time()
    told = inspect_published(v41)
    assert time.process_time() - begin < 2.5, "0.7 s alone; not a benchmark, but no reading of tables"
    assert told["family"] == "deepseek_v41" and told["compressed_size"] == 99_092
    assert [layer["rows"] for layer in told["layers"]] == [384_006_168, 384_016_682]
    assert [layer["layer"] for layer in told["layers"]] == [1, 14]
    assert told["table_bytes"] == 202_758_032_400 and told["bytes_per_token"] == 12_672
    assert {layer["row_bytes"] for layer in told["layers"]} == {264} and told["rows_per_token"] == 48
    assert told["table_files"] == ["model-00047-of-00048.safetensors", "model-00048-of-00048.safetensors"]
    assert told["other"]["tensors"] == 96_085 - 4


def test_v41_needs_only_the_shards_that_hold_tables(v41: Path, tmp_path: Path) -> None:
    shards = [f"model-000{number}-of-00048.safetensors" for number in (47, 48)]
    for name in ("config.json", "model.safetensors.index.json", *shards):
        (tmp_path / name).symlink_to(v41 / name)
    told = inspect_published(tmp_path)
    assert told["table_bytes"] == 202_758_032_400 and len(told["missing_files"]) == 46
    (tmp_path / "model-00048-of-00048.safetensors").unlink()
    told = inspect_published(tmp_path)
    assert told["layers"][1]["missing_files"] == ["model-00048-of-00048.safetensors"]
    assert told["table_bytes"] == 202_758_032_400 and told["table_files"] == ["model-00047-of-00048.safetensors"]


def small_v41(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """One layer of V4.1's kind with small numbers; `change` sees text_config and the tensors."""
    folder.mkdir()
    text = V41_CONFIG["text_config"] | {  # type: ignore[operator]
        "engram_layer_ids": [3], "engram_vocab_size": 100, "engram_num_embeddings": [3 * 8 * 100 + 1866],
    }  # fmt: skip
    from engram.builders.hash_constants import prime_moduli

    rows = sum(map(sum, prime_moduli([3], [100] * 3, 8)[3]))
    text["engram_num_embeddings"] = [rows]
    tensors = v41_tensors(3, rows)
    change(text, tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    write_sparse(folder / "model.safetensors", tensors)
    return folder


FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "missing key": (lambda c, t: c.pop("engram_n_heads"), "lacks the key 'engram_n_heads'"),
    "missing alias": (lambda c, t: c.pop("engram_pad_token_id"), "lacks the key 'engram_pad_token_id' or 'engram_pad_"),
    "two aliases": (lambda c, t: c.update(engram_pad_id=3), "names of one thing"),
    "text": (lambda c, t: c.update(hc_mult="4"), "hc_mult is '4', expected a number"),
    "truth": (lambda c, t: c.update(hc_mult=True), "hc_mult is True, expected a number"),
    "negative": (lambda c, t: c.update(engram_layer_ids=[-3]), "engram_layer_ids is"),
    "rows": (lambda c, t: c.update(engram_num_embeddings=[5]), "the primes from engram_vocab_size 100 on add up to"),
    "more rows": (lambda c, t: c.update(engram_num_embeddings=[5, 6]), "has 2 numbers for 1 layers"),
    "base": (lambda c, t: c.update(engram_vocab_size=150), "add up to"),
    "seed": (lambda c, t: c.update(engram_seed=7), "engram_seed is 7, only 0 is understood"),
    "no table": (lambda c, t: t.pop("layers.3.engram.embed.weight"), "has 0 tensors named"),
    "no scales": (lambda c, t: t.pop("layers.3.engram.embed.scale"), "holds no tensor 'layers.3.engram.embed.scale'"),
    "width": (lambda c, t: c.update(engram_head_dim=128), r"embed.weight is F8_E4M3 \[\d+, 256\], config.json asks"),
    "heads": (lambda c, t: c.update(engram_n_heads=65), "engram_n_heads is 65, expected a number from 1 to 64"),
    "dtype": (lambda c, t: t.update({"layers.3.engram.embed.scale": ("BF16", [4266, 8])}), "embed.scale is BF16"),
    "two prefixes": (
        lambda c, t: t.update({"model.layers.3.engram.embed.weight": ("F8_E4M3", [2, 256])}), "has 2 tensors named"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_contradicts_its_family_is_named(tmp_path: Path, case: str) -> None:
    change, words = FAULTS[case]
    with pytest.raises((FamilyError, TensorFileError), match=words):
        find_published(small_v41(tmp_path / "m", change))


def test_what_has_no_fault_is_read(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config["engram_pad_id"] = config.pop("engram_pad_token_id")
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    found, _ = find_published(small_v41(tmp_path / "m", change))
    assert found.hashing["pad_id"] == 2 and found.tables[0].layer == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "has model_type none"), ('{"model_type": "llama"}', "model_type llama: no known memory"),
     ("[", "is no JSON"), ("[]", "is no JSON object"), ('{"text_config": 3}', "text_config is no object"),
     (None, "cannot be read")],
)  # fmt: skip
def test_what_is_of_no_family_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FamilyError, match=words):
        find_published(tmp_path)


def test_configurations_that_were_changed_at_random_never_crash(tmp_path: Path) -> None:
    """Any key gone, or of any other type or size: a typed error, or what the configuration says."""
    write_longcat(tmp_path / "longcat")
    write_qwen4_exp(tmp_path / "qwen")
    generator, refused = np.random.default_rng(0), 0
    values: list[Any] = [None, True, -1, 0, 1, 2**40, 2**70, 1.5, "x", [], [1], [-1], [2**70], {}, [[1]], float("inf")]
    for name in ("longcat", "qwen"):
        good = json.loads((tmp_path / name / "config.json").read_text())
        for key in good:
            for value in [*(values[i] for i in generator.choice(len(values), 6, replace=False)), "gone"]:
                changed = dict(good)
                changed.pop(key)
                if value != "gone":
                    changed[key] = value
                (tmp_path / name / "config.json").write_text(json.dumps(changed))
                begin = time.process_time()
                try:
                    find_published(tmp_path / name)
                except EngramError:
                    refused += 1
                assert time.process_time() - begin < 5, (key, value)
    assert refused > 60
