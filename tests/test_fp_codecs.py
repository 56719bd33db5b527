"""fp8-row, fp8-tensor, nvfp4: against torch's fp8, the gguf package's and torchao's nvfp4; the factor in the name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from engram.kernels.codecs import CODECS, CodecError, find_codec, with_factor
from engram.kernels.fp_codecs import E2M1

CODES = np.arange(256, dtype=np.uint8)
E4M3 = torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy()
FACTOR, NAME = 0.0001990000018849969, "3950aaa8"


def test_the_factor_of_the_name_is_fp32_bits() -> None:
    codec = find_codec("fp8-tensor:3950b4f1", 1)
    assert codec.factor == float(np.uint32(0x3950B4F1).view(np.float32))
    assert codec.name == "fp8-tensor:3950b4f1" and find_codec(codec.name) == codec
    assert find_codec("nvfp4:00000001").factor == 2.0**-149
    assert find_codec("nvfp4:7f7fffff").factor == 2.0**128 - 2.0**104
    assert all(codec.factor == 1 for codec in CODECS.values())


@pytest.mark.parametrize("name", ["fp8-tensor", "nvfp4", "nvfp4:", "nvfp4:395", "nvfp4:3950B4F1", "nvfp4:3950b4f1\n"])
def test_a_name_without_its_factor_is_refused(name: str) -> None:
    with pytest.raises(CodecError, match="needs the table's factor in its name, as the 8 lower-case hex") as refused:
        find_codec(name)
    assert "3950b4f1" in (refused.value.hint or "")


@pytest.mark.parametrize("bits", ["00000000", "80000000", "7f800000", "7fc00000", "bf800000"])
def test_a_factor_must_be_finite_and_above_zero(bits: str) -> None:
    with pytest.raises(CodecError, match=f"'fp8-tensor:{bits}': the factor .* must be finite and above 0"):
        find_codec(f"fp8-tensor:{bits}")


@pytest.mark.parametrize("name", ["int8:3950b4f1", "f32:", "fp9:3950b4f1"])
def test_other_codecs_have_no_factor(name: str) -> None:
    with pytest.raises(CodecError, match="is not known"):
        find_codec(name)
    with pytest.raises(CodecError, match="version 2, this release knows version 1"):
        find_codec("nvfp4:3950b4f1", 2)


@pytest.mark.parametrize("factor", [1.0, FACTOR, 2.0**-140, 1e37])
def test_all_fp8_codes_are_torchs(factor: float) -> None:
    bits = int(np.float32(factor).view(np.uint32))
    with np.errstate(all="ignore"):
        expected = E4M3 * np.float32(factor)
    expected[np.isnan(expected)] = np.nan
    out = np.full((1, 256), -7, dtype=np.float32)
    find_codec(f"fp8-tensor:{bits:08x}").decode(CODES[None], 256, out)
    assert out.tobytes() == expected.tobytes()
    row = np.concatenate([CODES, np.array([bits], "<u4").view(np.uint8)])[None]
    assert CODECS["fp8-row"].decode(row, 256).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000])
def test_an_fp8_row_whose_scale_is_not_finite_is_nan(bits: int) -> None:
    row = np.concatenate([CODES, np.array([bits], "<u4").view(np.uint8)])[None]
    assert (CODECS["fp8-row"].decode(row, 256).view(np.uint32) == 0x7FC00000).all()


def test_fp8_rounds_as_torch_does() -> None:
    rows = (np.random.default_rng(0).standard_normal((300, 72)) * 0.02).astype(np.float32)
    rows[3], rows[4, 0] = 0, 3.4e38
    encoded = CODECS["fp8-row"].encode(rows)
    scale = encoded[:, 72:].copy().view("<f4")
    assert np.array_equal(scale[:4], (np.abs(rows).max(axis=1, keepdims=True) / np.float32(448))[:4])
    for codec, codes, divisor in ((CODECS["fp8-row"], encoded[:, :72], np.where(scale == 0, 1, scale)),
                                  (find_codec(f"fp8-tensor:{NAME}"), None, np.float32(FACTOR))):  # fmt: skip
        with np.errstate(over="ignore"):
            scaled = torch.from_numpy((rows / divisor).astype(np.float32)).clamp(-448, 448)
        expected = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert np.array_equal(codec.encode(rows) if codes is None else codes, expected)


def nvfp4_rows(rows: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Random numbers; scales as writers make them: positive, no NaN."""
    raw = np.random.default_rng(width).integers(0, 256, (rows, width // 2 + width // 16), dtype=np.uint8)
    raw[:, width // 2 :] %= 0x7F
    return raw


def test_nvfp4_is_what_the_gguf_package_reads() -> None:
    """GGUF packs 64 values in another order, without the table's factor, and drops the sign of zeros."""
    raw = nvfp4_rows(500, 128)
    pairs = raw[:, :64]
    codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(500, 2, 4, 16)
    packed = (codes[..., :8] | codes[..., 8:] << 4).reshape(500, 2, 32)
    blocks = np.concatenate([raw[:, 64:].reshape(500, 2, 4), packed], axis=2).reshape(500, 72)
    expected = quants.dequantize(blocks, GGMLQuantizationType.NVFP4)
    assert np.array_equal(CODECS["nvfp4"].decode(raw, 128), expected)
    codec = find_codec(f"nvfp4:{NAME}")
    assert np.array_equal(codec.decode(raw, 128), expected.astype(np.float32) * np.float32(FACTOR))


def test_nvfp4_is_what_torchao_reads() -> None:
    formats = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    raw = nvfp4_rows(300, 80)
    numbers = formats.f4_unpacked_to_f32(formats.unpack_uint4(torch.from_numpy(raw[:, :40].copy()))).numpy()
    expected = numbers * np.repeat(E4M3[raw[:, 40:]], 16, axis=1) * np.float32(FACTOR)
    out = np.full((300, 80), np.nan, dtype=np.float32)
    assert find_codec(f"nvfp4:{NAME}").decode(raw, 80, out).tobytes() == expected.tobytes()


def test_an_nvfp4_scale_that_is_nan_damages_its_group_only() -> None:
    raw = nvfp4_rows(1, 64)
    raw[0, 33] = 0xFF
    bits = CODECS["nvfp4"].decode(raw, 64).view(np.uint32)[0]
    assert (bits[16:32] == 0x7FC00000).all() and not np.isnan(bits.view(np.float32)[[*range(16), *range(32, 64)]]).any()


def test_nvfp4_follows_its_rule() -> None:
    rows = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    rows[0, :16] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -0.0]  # ties
    rows[1] = 0
    codec = find_codec("nvfp4:3f000000")
    encoded = codec.encode(rows)
    numbers = E2M1[np.stack([encoded[:, :32] & 15, encoded[:, :32] >> 4], axis=2).reshape(40, 4, 16)]
    assert encoded[0, 32] == 0x40  # 2, for a factor of 0.5
    assert numbers[0, 0].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 0]
    assert np.signbit(numbers[0, 0, [8, 15]]).all()
    for row, scales, chosen in zip(rows.reshape(40, 4, 16), encoded[:, 32:], numbers, strict=True):
        for group, scale, number in zip(row, scales, chosen, strict=True):
            ideal = np.abs(group).max() / np.float32(6) / np.float32(0.5)
            assert scale == torch.tensor(ideal).to(torch.float8_e4m3fn).view(torch.uint8).item()
            quotient = group / (E4M3[scale] / 2) if scale else np.zeros(16)
            assert (np.abs(quotient - number) <= np.abs(quotient[:, None] - E2M1).min(axis=1)).all()


@pytest.mark.parametrize(("name", "error", "most"), [("fp8-tensor", 0.0265, 448), ("nvfp4", 0.0951, 2688)])
def test_error_with_the_tables_own_factor(name: str, error: float, most: int) -> None:
    rows = (np.random.default_rng(2).standard_normal((4096, 256)) * 0.01).astype(np.float32)
    largest = np.abs(rows).max()
    codec = with_factor(CODECS[name], float(largest))
    assert codec.factor == largest / np.float32(most)
    back = codec.decode(codec.encode(rows), 256)
    assert np.linalg.norm(back - rows) / np.linalg.norm(rows) == pytest.approx(error, rel=0.03)
    assert with_factor(CODECS["nf4"], 3.0) is CODECS["nf4"] and with_factor(CODECS[name], 0.0).factor == 1


@pytest.mark.parametrize("width", [8, 72])
def test_nvfp4_needs_whole_groups(width: int) -> None:
    with pytest.raises(CodecError, match=f"row width {width} must be a multiple of 16"):
        CODECS["nvfp4"].row_bytes(width)
