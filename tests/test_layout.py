"""The layout against the published vectors, and every way in which a layout can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram.builders import hash_constants
from engram.builders.layout import Layout, LayoutError, read_token_map

GOLDEN = Path(__file__).parent / "golden"


def vector(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / name).read_text())
    return loaded


def identity(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64)


def small(**changes: Any) -> Layout:
    values: dict[str, Any] = dict(
        dialect="demo", orders=(2, 3), heads=2, head_dim=4, layers=(1, 3), rows_per_head=50, pad_id=2, vocab_size=40
    )
    return Layout.build(**(values | changes))


@pytest.mark.parametrize("case", vector("hash_demo_tiny.json")["cases"], ids=lambda case: case["name"])
def test_demo_vectors_without_a_tokenizer(case: dict[str, Any]) -> None:
    layers = [int(layer) for layer in case["multipliers"]]
    layout = Layout.build(
        dialect="demo", orders=range(2, case["max_ngram_size"] + 1), heads=case["n_head_per_ngram"], head_dim=4,
        layers=layers, rows_per_head=case["engram_vocab_size"], seed=case["seed"], pad_id=case["compressed_pad_id"],
        vocab_size=case["compressed_vocab_size"], token_map=identity(case["compressed_vocab_size"]),
    )  # fmt: skip
    ids = np.array(case["compressed_ids"])
    for layer in layers:
        assert list(layout.multipliers[layer]) == case["multipliers"][str(layer)]
        assert [list(p) for p in layout.primes[layer]] == case["primes"][str(layer)]
        expected = np.array(case["hash_ids"][str(layer)])
        got = layout.rows(np.atleast_2d(ids), local=True)[layer]
        np.testing.assert_array_equal(got.reshape(expected.shape), expected)


def test_demo_constants_of_the_published_configuration() -> None:
    golden = vector("hash_demo_deepseek_v3.json")
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=8, head_dim=64, layers=(1, 15), rows_per_head=646400, pad_id=2,
        vocab_size=golden["compressed_vocab_size"], token_map=identity(golden["compressed_vocab_size"]),
    )  # fmt: skip
    for layer in ("1", "15"):
        assert list(layout.multipliers[int(layer)]) == golden["multipliers"][layer]
        assert [list(p) for p in layout.primes[int(layer)]] == golden["primes"][layer]
        assert layout.offsets(int(layer)).tolist() == golden["row_offsets"][layer]
        assert layout.table_rows[int(layer)] == golden["total_rows"][layer]
    for case in golden["cases"]:  # the map's effect is tested with the tokenizer; here compressed ids are hashed
        ids = np.array([case["compressed_ids"]])
        for layer in ("1", "15"):
            np.testing.assert_array_equal(layout.rows(ids, local=True)[int(layer)][0], case["hash_ids"][layer])


def test_v41_constants_and_rows() -> None:
    golden = vector("hash_v41_deepseek_v4.json")
    layout = Layout.build(
        dialect="v41", orders=(2, 3, 4), heads=8, head_dim=256, layers=(1, 14), rows_per_head=16_000_000, pad_id=2,
        vocab_size=99092, token_map=identity(99092),
    )  # fmt: skip
    assert layout.table_rows == {1: 384006168, 14: 384016682}
    for case in golden["cases"]:
        ids = np.array([case["compressed_ids"]])
        dead = np.array([case["dead"]]) if case.get("dead") else np.zeros(ids.shape, dtype=bool)
        rows = layout.rows(np.where(dead, -1, ids))
        for layer in ("1", "14"):
            np.testing.assert_array_equal(rows[int(layer)][0], case["hash_ids"][layer])


def v41_tiny() -> tuple[dict[str, Any], Layout, np.ndarray]:
    golden = vector("hash_v41_tiny.json")
    layout = Layout.build(
        dialect="v41", orders=(2, 3, 4), heads=2, head_dim=4, layers=(1, 4), rows_per_head=5,
        pad_id=golden["compressed_pad_id"], vocab_size=40, token_map=identity(40),
    )  # fmt: skip
    ids = np.where(golden["dead"], -1, golden["compressed_ids"])[None]
    return golden, layout, ids


def test_v41_dead_tokens_block_the_walk_back() -> None:
    golden, layout, ids = v41_tiny()
    assert layout.table_rows == {int(k): v for k, v in golden["total_rows"].items()}
    for layer, expected in golden["hash_ids"].items():
        np.testing.assert_array_equal(layout.rows(ids)[int(layer)][0], expected)


def test_any_chunking_gives_the_rows_of_the_whole() -> None:
    golden, layout, ids = v41_tiny()
    history = None
    pieces = []
    for chunk in golden["chunks"]:
        part = ids[:, chunk["start"] : chunk["start"] + chunk["size"]]
        pieces.append(layout.rows(part, history)[4])
        history = layout.history(part, history)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], golden["hash_ids"]["4"])


def test_packed_documents_do_not_see_each_other() -> None:
    golden, layout, _ = v41_tiny()
    ids = np.array([golden["compressed_ids"]])  # this vector has no dead tokens
    positions = np.array([golden["packed"]["position_ids"]])
    start = np.zeros(ids.shape, dtype=bool)
    start[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    for layer, expected in golden["packed"]["hash_ids"].items():
        np.testing.assert_array_equal(layout.rows(ids, start_BT=start)[int(layer)][0], expected)


def test_qwen_constants_are_derived_and_rows_reset_after_the_end_token() -> None:
    golden = vector("hash_qwen38_flash_next.json")
    layout = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=8, head_dim=160, layers=(1,), rows_per_head=20_000_000, seed=1234,
        pad_id=golden["eos_token_id"], vocab_size=248320, reset_id=golden["eos_token_id"],
    )  # fmt: skip
    assert list(layout.multipliers[1]) == golden["multipliers"]
    assert [list(p) for p in layout.primes[1]] == golden["primes"]
    assert layout.table_rows[1] == golden["rows_padded"]
    ids = np.array([golden["input_ids"]])
    np.testing.assert_array_equal(layout.rows(ids)[1][0], golden["hash_ids"])
    history, pieces = None, []
    for t in range(ids.shape[1]):
        pieces.append(layout.rows(ids[:, t : t + 1], history)[1])
        history = layout.history(ids[:, t : t + 1], history)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], golden["hash_ids"])


def test_qwen_constants_equal_those_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    for vocab, place, seed in ((512, 0, 1234), (512, 3, 7), (248320, 1, 1234)):
        theirs = tuple(modeling._build_layer_multipliers(vocab, 3, place, seed).tolist())
        assert hash_constants.splitmix_multipliers(vocab, place, 3, seed) == theirs


@pytest.mark.parametrize("dialect", ["demo", "v41", "qwen-ple"])
def test_left_padding_changes_no_row(dialect: str) -> None:
    layout = small(dialect=dialect, reset_id=39 if dialect == "qwen-ple" else None)
    ids = np.random.default_rng(0).integers(0, 39, size=(1, 9))
    padded = np.concatenate([np.full((1, 4), 7), ids], axis=1)
    start = np.zeros(padded.shape, dtype=bool)
    start[:, :5] = True
    for layer, rows in layout.rows(ids).items():
        np.testing.assert_array_equal(layout.rows(padded, start_BT=start)[layer][:, 4:], rows)


def test_primes_are_prime_unique_and_follow_the_layer_list() -> None:
    by_division = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if hash_constants.is_prime(n)] == by_division
    assert not hash_constants.is_prime(3_215_031_751)  # a strong pseudoprime to 2, 3, 5 and 7
    primes = small().primes
    flat = [p for layer in (1, 3) for heads in primes[layer] for p in heads]
    assert len(set(flat)) == len(flat) == 8
    assert small(layers=(3, 1)).primes[3] == primes[1]


def test_saved_layout_reads_back_equal(tmp_path: Path) -> None:
    layout = small(token_map=identity(40), tokenizer_sha256="ab")
    layout.save(tmp_path)
    loaded = Layout.load(tmp_path)
    assert loaded.to_json() == layout.to_json()
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(loaded.rows(ids)[3], layout.rows(ids)[3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layout.json", "token_map.safetensors"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"dialect": "v42"}, "v42"),
        ({"orders": (3, 2)}, "orders"),
        ({"orders": ()}, "orders"),
        ({"heads": 0}, "heads 0"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"pad_id": 40}, "pad_id 40"),
        ({"rows_per_head": (50,)}, "rows_per_head"),
        ({"token_map": identity(3)}, "token map"),
        ({"dialect": "qwen-ple"}, "reset_id"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(LayoutError) as caught:
        small(**changes)
    assert names in f"{caught.value} {caught.value.hint}"


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(LayoutError, match="token id 40"):
        small().rows(np.array([[1, 40]]))


@pytest.mark.parametrize("field", ["version", "primes", "token_map_sha256"])
def test_a_layout_without_a_field_is_refused(field: str) -> None:
    data = small().to_json()
    del data[field]
    with pytest.raises(LayoutError, match=field):
        Layout.from_json(data, None)


def test_a_foreign_token_map_is_refused(tmp_path: Path) -> None:
    small(token_map=identity(40)).save(tmp_path)
    small(token_map=identity(40)[::-1].copy()).save_map(tmp_path)
    with pytest.raises(LayoutError, match="SHA-256"):
        Layout.load(tmp_path)
    (tmp_path / "token_map.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(LayoutError, match="no readable tensor"):
        read_token_map(tmp_path / "token_map.safetensors")


def test_a_folder_without_a_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"neither layout\.json"):
        Layout.load(tmp_path)
