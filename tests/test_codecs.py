"""Row codecs: exact bytes, exact values, every bit pattern, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from engram.kernels.codecs import CODECS, CodecError, Floats, find_codec

GOLDEN = Path(__file__).parent / "golden" / "codecs.json"
ALL = sorted(CODECS)
SCALED = ["int8-row", "int4-row"]


def random_rows(rows: int = 257, width: int = 72, seed: int = 0) -> Floats:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, width)) * np.exp(generator.standard_normal((rows, 1)))
    values[rows // 2] = 0
    return values.astype(np.float32)


def half_even(value: float) -> int:
    return round(value)  # Python's round is half to even


def decode_by_hand(name: str, row: bytes, width: int) -> list[np.float32]:
    """One row, one value at a time, with the struct module: the specification read literally."""
    if name == "f32":
        return list(np.array(struct.unpack(f"<{width}f", row), dtype=np.float32))
    if name == "bf16":
        return [np.float32(struct.unpack("<f", b"\0\0" + row[2 * i : 2 * i + 2])[0]) for i in range(width)]
    scale = np.float32(struct.unpack("<f", row[-4:])[0])
    if name == "int8-row":
        steps = list(struct.unpack(f"<{width}b", row[:width]))
    else:
        half = width // 2
        steps = [(row[i] & 15) - 8 for i in range(half)] + [(row[i] >> 4) - 8 for i in range(half)]
    if not math.isfinite(scale):
        return [np.frombuffer(b"\0\0\xc0\x7f", "<f4")[0]] * width
    with np.errstate(all="ignore"):
        return [np.float32(step) * scale for step in steps]


@pytest.mark.parametrize("name", ALL)
def test_random_bytes_decode_to_the_same_bits_as_by_hand(name: str) -> None:
    codec, width = CODECS[name], 10
    raw = np.random.default_rng(1).integers(0, 256, (4000, codec.row_bytes(width)), dtype=np.uint8)
    raw[:4, -4:] = np.frombuffer(struct.pack("<4I", 0x7FC00001, 0xFFC00000, 0x7F800000, 0x80000000), np.uint8).reshape(
        4, 4
    )
    poisoned = np.full((len(raw), width), np.nan, dtype=np.float32)
    decoded = codec.decode(raw, width, out=poisoned)
    assert decoded is poisoned
    for row, values in zip(raw, decoded, strict=True):
        expected = np.array(decode_by_hand(name, row.tobytes(), width), dtype=np.float32)
        if name in SCALED:
            assert values.tobytes() == expected.tobytes()
        else:  # a NaN's payload survives our copy, but not a trip through a Python float
            assert np.array_equal(np.isnan(values), np.isnan(expected))
            assert values[~np.isnan(values)].tobytes() == expected[~np.isnan(values)].tobytes()


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_unscaled_codecs_keep_the_bits_of_a_nan(name: str) -> None:
    codec = CODECS[name]
    pattern = np.array([[0x01, 0x80, 0xA1, 0xFF]], dtype=np.uint8)[:, -codec.row_bytes(1) :]
    assert codec.decode(pattern, 1).tobytes()[-codec.row_bytes(1) :] == pattern.tobytes()


@pytest.mark.parametrize("name", ALL)
def test_row_of_any_table_position_encodes_alike(name: str) -> None:
    rows = random_rows()
    codec = CODECS[name]
    together = codec.encode(rows)
    assert together.shape == (len(rows), codec.row_bytes(rows.shape[1])) and together.dtype == np.uint8
    assert all(np.array_equal(codec.encode(rows[i : i + 1])[0], together[i]) for i in range(len(rows)))
    assert np.array_equal(codec.encode(rows[:, ::1][::2]), together[::2])


@pytest.mark.parametrize(("name", "bytes_of_72"), [("f32", 288), ("bf16", 144), ("int8-row", 76), ("int4-row", 40)])
def test_bytes_of_a_row(name: str, bytes_of_72: int) -> None:
    assert CODECS[name].row_bytes(72) == bytes_of_72


def test_f32_gives_back_the_bits() -> None:
    rows = random_rows()
    rows[0, :4] = [-0.0, 1e-45, 3.4e38, -3.4e38]
    assert CODECS["f32"].decode(CODECS["f32"].encode(rows), 72).tobytes() == rows.tobytes()


def test_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rows = random_rows()
    rows[0, :4] = [-0.0, 1e-45, 1.00390625, 1.01171875]  # the last two are ties
    expected = torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8).reshape(len(rows), -1)
    assert np.array_equal(CODECS["bf16"].encode(rows), expected)


@pytest.mark.parametrize("name", ALL)
def test_the_largest_numbers_stay_finite(name: str) -> None:
    largest = np.finfo(np.float32).max
    rows = np.array([[largest, -largest, 1, 0], [-largest, largest / 2, 0, 0]], dtype=np.float32)
    back = CODECS[name].decode(CODECS[name].encode(rows), 4)
    assert np.isfinite(back).all()
    assert np.abs(back[:, 0] / rows[:, 0] - 1).max() < 0.004


def test_int8_row_follows_its_rule() -> None:
    rows = random_rows(64)
    encoded = CODECS["int8-row"].encode(rows)
    for row, raw in zip(rows, encoded, strict=True):
        scale = np.float32(np.abs(row).max()) / np.float32(127)
        steps = [half_even(float(np.float32(x) / scale)) if scale else 0 for x in row]
        assert raw[:72].view(np.int8).tolist() == steps
        assert raw[72:].tobytes() == struct.pack("<f", scale)
    error = np.abs(CODECS["int8-row"].decode(encoded, 72) - rows)
    assert (error <= np.abs(rows).max(axis=1, keepdims=True) / 127 * 0.5000001).all()


def test_int8_row_rounds_ties_to_even() -> None:
    row = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]], dtype=np.float32)
    assert CODECS["int8-row"].encode(row)[0, :7].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, -127]


def test_int4_row_follows_its_rule() -> None:
    rows = random_rows(64)
    encoded = CODECS["int4-row"].encode(rows)
    for row, raw in zip(rows, encoded, strict=True):
        scale = np.float32(max(row, key=abs)) / np.float32(-8)
        steps = [min(7, max(-8, half_even(float(np.float32(x) / scale)))) if scale else 0 for x in row]
        assert [(int(b) & 15) - 8 for b in raw[:36]] + [(int(b) >> 4) - 8 for b in raw[:36]] == steps
        assert raw[36:].tobytes() == struct.pack("<f", scale if scale else 0.0)


def test_int4_row_packs_column_and_column_plus_half() -> None:
    row = np.array([[-8, 1, 2, 3, 4, 5, 6, 7]], dtype=np.float32)  # the scale is 1, the codes are value + 8
    assert CODECS["int4-row"].encode(row)[0].tobytes() == bytes([0xC0, 0xD9, 0xEA, 0xFB]) + struct.pack("<f", 1.0)


def test_int4_row_takes_the_first_of_equal_magnitudes() -> None:
    row = np.array([[4, -4]], dtype=np.float32)
    back = CODECS["int4-row"].decode(CODECS["int4-row"].encode(row), 2)
    assert back.tolist() == [[4.0, -3.5]]  # the first is exact; its mirror image is held at step 7


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.002), ("int8-row", 0.0065), ("int4-row", 0.10)])
def test_error_on_gaussian_rows(name: str, most: float) -> None:
    rows = np.random.default_rng(2).standard_normal((2048, 72)).astype(np.float32)
    back = CODECS[name].decode(CODECS[name].encode(rows), 72)
    assert np.linalg.norm(back - rows) / np.linalg.norm(rows) < most


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_rows_stay_zero(name: str, value: float) -> None:
    rows = np.full((3, 8), value, dtype=np.float32)
    assert not CODECS[name].decode(CODECS[name].encode(rows), 8).any()


@pytest.mark.parametrize("name", SCALED)
def test_rows_too_small_for_a_scale_become_zero(name: str) -> None:
    rows = np.array([[1e-45, -1e-45]], dtype=np.float32)
    encoded = CODECS[name].encode(rows)
    assert encoded[0, -4:].tolist() == [0, 0, 0, 0]
    assert not CODECS[name].decode(encoded, 2).any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_table_and_row(name: str, bad: float) -> None:
    rows = random_rows(8)
    rows[5, 3] = bad
    with pytest.raises(CodecError, match=r"layer 3: row 105, column 3 is -?(nan|inf)"):
        CODECS[name].encode(rows, table="layer 3", first_row=100)


def test_int4_refuses_an_odd_width() -> None:
    with pytest.raises(CodecError, match="row width 7 must be even"):
        CODECS["int4-row"].encode(np.zeros((2, 7), dtype=np.float32))
    with pytest.raises(CodecError, match="row width 7 must be even"):
        CODECS["int4-row"].row_bytes(7)


@pytest.mark.parametrize("rows", [np.zeros((2, 4)), np.zeros(4, np.float32), np.zeros((2, 0), np.float32)])
def test_encode_refuses_other_shapes_and_types(rows: Floats) -> None:
    with pytest.raises(CodecError):
        CODECS["f32"].encode(rows)


@pytest.mark.parametrize("name", ALL)
def test_decode_refuses_bytes_of_another_width(name: str) -> None:
    with pytest.raises(CodecError, match="for width 8"):
        CODECS[name].decode(np.zeros((2, CODECS[name].row_bytes(8) + 1), np.uint8), 8)
    with pytest.raises(CodecError, match="out must be"):
        CODECS[name].decode(np.zeros((2, CODECS[name].row_bytes(8)), np.uint8), 8, out=np.zeros((3, 8), np.float32))


def test_no_rows_are_no_rows() -> None:
    for codec in CODECS.values():
        empty = codec.decode(np.empty((0, codec.row_bytes(8)), np.uint8), 8)
        assert empty.shape == (0, 8)


def test_unknown_codec_and_version_are_refused() -> None:
    assert find_codec("int8-row", 1).name == "int8-row"
    with pytest.raises(CodecError, match="'int9' is not known"):
        find_codec("int9")
    with pytest.raises(CodecError, match="version 2, this release knows version 1"):
        find_codec("int8-row", 2)


def test_bytes_and_bits_of_the_golden_file() -> None:
    """Encodings never change under a codec's version: these bytes were written once and are read for ever."""
    golden = json.loads(GOLDEN.read_text())
    rows = np.frombuffer(bytes.fromhex(golden["rows_f32"]), "<f4").reshape(golden["shape"])
    for name, case in golden["codecs"].items():
        codec = find_codec(name, case["version"])
        encoded = codec.encode(rows)
        assert encoded.tobytes().hex() == case["encoded"]
        assert codec.decode(encoded, rows.shape[1]).astype("<f4").tobytes().hex() == case["decoded_f32"]
