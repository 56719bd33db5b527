"""The layout against the published vectors, and every way in which a layout can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import layout_of
from published import write_gemma, write_longcat, write_qwen4_exp, write_qwen4exp_gguf

from engram.builders import hash_constants
from engram.builders.families.known import find_published
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


V41 = dict(orders=(2, 3, 4), heads=8, head_dim=256, layers=(1, 14), rows_per_head=16_000_000, pad_id=2)
LONGCAT = dict(
    dialect="longcat", orders=(2, 3, 4), heads=4, head_dim=256, layers=(0,), pad_id=0, reset_id=2, vocab_size=131072,
    moduli=tuple(78 * 131072 + 2 * i + 1 for i in range(12)),
)  # fmt: skip


def test_rows_that_others_computed_of_the_published_layouts() -> None:
    """Figures of an analysis made apart from this code: head 0 and 1 of every order, or all heads of LongCat."""
    v41 = Layout.build(dialect="v41", **V41, vocab_size=99092, token_map=identity(99092)).rows([[11, 13, 17, 19]])
    qwen = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=8, head_dim=160, layers=(1,), rows_per_head=20_000_000, seed=1234,
        pad_id=248044, vocab_size=248320, reset_id=248044,
    )  # fmt: skip
    assert v41[1][0, -1].reshape(3, 8)[:, :2].ravel().tolist() == [
        3825198, 25082324, 130396842, 158793061, 270579285, 286667527,
    ]  # fmt: skip
    assert v41[14][0, -1].reshape(3, 8)[:, :2].ravel().tolist() == [
        10788777, 25656325, 140250258, 153848746, 261413609, 281467364,
    ]  # fmt: skip
    for ids, expected in (
        ([13, 17, 19], [2684051, 29782984, 179124972, 180611476]),
        ([19], [4787973, 23628125, 170993397, 191882727]),
        ([13, 17, 248044, 19], [4787973, 23628125, 170993397, 191882727]),
    ):
        assert qwen.rows([ids])[1][0, -1].reshape(2, 8)[:, :2].ravel().tolist() == expected
    longcat = Layout.build(**LONGCAT)
    assert longcat.table_rows == {0: 31_406_985_216 // 256}  # the published number of parameters, in rows of 256
    assert longcat.rows([[7, 11, 13, 17]], local=True)[0][0, -1].tolist() == [
        1703953, 1703953, 1703953, 1703953, 6780477, 6743509, 6706541, 6669573, 8665797, 2381828, 6322700, 41141,
    ]  # fmt: skip


def test_longcat_looks_back_to_the_end_of_the_last_text() -> None:
    """An end token belongs to the text that it ends: it sees what is before it, what follows it does not."""
    longcat = Layout.build(**LONGCAT)
    rows = longcat.rows([[5, 6, 2, 7, 8]], local=True)[0][0]
    moduli = LONGCAT["moduli"]
    for place, tokens in enumerate(([5], [6, 5], [2, 6, 5], [7], [8, 7])):
        for column, modulus in enumerate(moduli):
            seen = tokens[: 2 + column // 4]
            assert rows[place, column] == sum(t * 131072**k for k, t in enumerate(seen)) % modulus
    assert longcat.multipliers[0][:4] == (1, 131072, 0, 0)


def test_a_row_of_the_identity_is_its_id() -> None:
    layout = layout_of("identity", layers=(0,), vocab_size=40, table_rows={0: 64})
    assert (layout.table_rows, layout.primes, layout.columns) == ({0: 64}, {0: ((44,),)}, 1)
    ids = np.arange(40).reshape(2, 20)
    np.testing.assert_array_equal(layout.rows(ids)[0][..., 0], ids)
    assert layout.history(ids).ids_BJ.shape == (2, 0)
    assert layout_of("identity", rows_per_head=None).primes[5] == ((40,),)
    three = layout_of("identity", layers=(0,), heads=3, rows_per_head=None)
    assert three.table_rows == {0: 120}
    np.testing.assert_array_equal(three.rows(ids)[0], 3 * ids[..., None] + np.arange(3))


def as_published(path: Path, **more: Any) -> Layout:
    found, _ = find_published(path)
    return Layout.build(
        dialect=found.dialect, orders=found.orders, heads=found.heads, head_dim=found.head_dim,
        vocab_size=found.vocab_size, table_rows={table.layer: table.rows for table in found.tables},
        **(dict(found.hashing) | more),
    )  # fmt: skip


def test_every_family_says_what_its_layout_needs(tmp_path: Path) -> None:
    """The rows of each published table, and the constants where the checkpoint states them."""
    ple = write_qwen4_exp(tmp_path / "qwen").model.layers[1].ple.ple_embedding
    qwen = as_published(tmp_path / "qwen")
    assert list(qwen.multipliers[1]) == ple.layer_multipliers.tolist()
    assert [p for heads in qwen.primes[1] for p in heads] == ple.ngram_heads_vocab_sizes.tolist()
    assert qwen.offsets(1).tolist() == ple.ngram_heads_offsets.tolist()
    assert qwen.table_rows == {1: 4064}
    write_gemma(tmp_path / "gemma", "gemma3n")
    assert as_published(tmp_path / "gemma").rows([[399]])[0].tolist() == [[[5 * 399 + layer for layer in range(5)]]]
    write_longcat(tmp_path / "longcat")
    longcat = as_published(tmp_path / "longcat")
    assert longcat.table_rows == {0: 12 * 151 + 2 * 66} and longcat.offsets(0)[-1] + 173 == longcat.table_rows[0]
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    gguf = as_published(tmp_path / "m.gguf", reset_id=9)
    assert gguf.offsets(1).tolist() == [0, 53, 112, 173] and gguf.multipliers == {1: (11, 13, 17)}
    two, three = 7 * 11 ^ 2 * 13, 7 * 11 ^ 2 * 13 ^ 9 * 17
    assert gguf.rows([[2, 7]], local=True)[1][0, 1].tolist() == [two % 53, two % 59, three % 61, three % 67]
    v41 = Layout.build(
        dialect="v41", **V41, seed=0, dead_ids=(129264,), vocab_size=129280, token_map=np.arange(129280) % 99092,
        table_rows={1: 384006168, 14: 384016682},
    )  # fmt: skip
    assert v41.offsets(14)[0] == 0


def test_a_table_is_padded_to_the_multiple_that_is_asked_for() -> None:
    needed = sum(map(sum, small().primes[1]))
    padded = -(-needed // 64) * 64
    for dialect, multiple, rows in (("demo", 64, padded), ("qwen-ple", 1, needed), ("demo", None, needed)):
        layout = small(dialect=dialect, multiple=multiple, reset_id=3 if dialect == "qwen-ple" else None)
        assert layout.table_rows[1] == rows


@pytest.mark.parametrize("dialect", ["demo", "v41", "engram-peft", "qwen-ple", "longcat", "identity"])
def test_left_padding_changes_no_row(dialect: str) -> None:
    layout = layout_of(dialect)
    ids = np.random.default_rng(0).integers(10, 39, size=(1, 9))
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


@pytest.mark.parametrize("dialect", ["longcat", "identity"])
def test_a_layout_of_stated_constants_reads_back_equal(dialect: str, tmp_path: Path) -> None:
    layout = layout_of(dialect, layers=(0,), table_rows={0: 40_000})
    layout.save(tmp_path)
    loaded = Layout.load(tmp_path)
    assert loaded.to_json() == layout.to_json()
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(loaded.rows(ids)[0], layout.rows(ids)[0])


@pytest.mark.parametrize(
    ("dialect", "changes", "words"),
    [
        ("longcat", {"multipliers": {"0": [1] * 18}}, "layer 0, column 0: multipliers .1, 1, 1. must be below"),
        ("longcat", {"multipliers": {"0": [1, 5001, 0] * 6}}, "column 0: multipliers .* below its modulus 5001"),
        ("longcat", {"multipliers": {"0": [1, 40] * 6}}, "layer 0 has 12 multipliers, 18 are needed.*6 columns"),
        ("longcat", {"vocab_size": 1 << 62}, "layer 0, column 0: 4611686018427387904 ids times .* do not fit 64 bits"),
        ("longcat", {"table_rows": {"0": 1 << 63}}, "stores 9223372036854775808 rows, which does not fit 64 bits"),
        ("qwen-ple", {"multipliers": {"0": [1, 2, 1 << 63]}}, "layer 0 has a multiplier that does not fit 64 bits"),
        ("identity", {"multipliers": {"0": [3]}}, "layer 0 has the multiplier 3 and"),
        ("identity", {"vocab_size": 45}, "44 rows for 45 ids: in dialect 'identity' rows are"),
    ],
)
def test_constants_that_contradict_each_other_are_refused(dialect: str, changes: dict[str, Any], words: str) -> None:
    data = layout_of(dialect, layers=(0,)).to_json()
    with pytest.raises(LayoutError, match=words):
        Layout.from_json(data | changes, None)


@pytest.mark.parametrize(
    ("dialect", "changes", "words"),
    [
        ("demo", {"rows_per_head": None}, "'demo' takes rows_per_head, or multipliers and primes; found neither"),
        ("demo", {"moduli": (3,) * 6}, "'demo' takes rows_per_head, .* found rows_per_head and moduli"),
        ("longcat", {"moduli": None, "rows_per_head": 9}, "'longcat' takes moduli, .* found rows_per_head"),
        ("longcat", {"moduli": (5, 7)}, r"moduli has 2 numbers, orders \[2, 3\] need 3 each"),
        ("longcat", {"moduli": (5, 7, 9, 11, 0, 15)}, "moduli .* must be at least 1"),
        ("longcat", {"reset_id": None}, "'longcat' resets at a token"),
        ("longcat", {"token_map": identity(40)}, "'longcat' hashes raw ids"),
        ("identity", {"token_map": identity(40)}, "'identity' hashes raw ids"),
        ("identity", {"orders": (2,)}, r"orders \[1\] and no dead_ids, found \[2\] and"),
        ("identity", {"dead_ids": (3,)}, r"found \[1\] and \[3\]"),
        ("identity", {"rows_per_head": 39}, "39 rows for 40 ids"),
        ("identity", {"table_rows": {0: 43, 5: 44}}, "layer 0 stores 43 rows, its primes need 44"),
        ("qwen-ple", {"rows_per_head": None, "multipliers": (1, 2, 3), "primes": (5,) * 6}, r"layers \[0, 5\]"),
        ("demo", {"multiple": 0}, "multiple 0 must be at least 1"),
        ("engram-peft", {"compressed_size": 0}, "compressed_size 0 must be at least 1"),
    ],
)
def test_a_layout_that_its_dialect_does_not_have_is_refused(dialect: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        layout_of(dialect, **changes)
    assert re.search(words, str(caught.value))


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
