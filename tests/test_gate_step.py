"""The gate step in C++ against the fp64 reference and torch's own module, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engram.builders.engram import Gate, GateConfig
from engram.kernels import dispatch, reference
from engram.kernels.reference import Convolution, KernelError

CPP = [path for path in dispatch.available() if path != "reference"]
TOLERANCE = 1e-6  # of the largest value: see cpu.gate_step


def _case(rng: np.random.Generator, batch: int, length: int, branches: int, width: int, kept: int, taps: int) -> Any:
    def draw(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.standard_normal(shape).astype(np.float32)

    wide = branches * width
    arrays = [draw(batch, length, branches, width), draw(batch, length, branches, width), draw(batch, length, width),
              draw(branches, width), draw(branches, width)]  # fmt: skip
    conv = Convolution(draw(branches, width), draw(wide, taps), 2, 1e-5) if taps else None
    return arrays, conv, draw(batch, kept, wide) if taps else None, rng.random((batch, length)) < 0.7


def _gate(arrays: Any, conv: Convolution | None, kind: str, eps: float) -> tuple[Any, Any]:
    """A gate whose projections pick key and value out of the memory, exactly; and that memory."""
    _, key_BTMD, value_BTD, query_norm, key_norm = arrays
    batch, length, branches, width = key_BTMD.shape
    picks = np.eye((branches + 1) * width, dtype=np.float32)
    gate = dispatch.ops().MemoryGate(
        key_weight_YE=picks[: branches * width], key_bias_Y=None, value_weight_DE=picks[branches * width :],
        value_bias_D=None, query_norm_MD=query_norm, key_norm_MD=key_norm, kind=kind, eps=eps, conv=conv,
    )  # fmt: skip
    return gate, np.concatenate([key_BTMD.reshape(batch, length, branches * width), value_BTD], axis=-1)


def _doubled(conv: Convolution | None) -> Convolution | None:
    return conv and Convolution(conv.norm_MD.astype(float), conv.weight_XW.astype(float), conv.dilation, conv.eps)


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("kind", ["plain", "sqrt", "copysign"])
@pytest.mark.parametrize(
    ("batch", "length", "branches", "width", "kept", "taps"),
    [(1, 1, 1, 576, 6, 4), (1, 1, 4, 40, 6, 4), (2, 7, 1, 33, 3, 4), (1, 3, 2, 7, 0, 3), (1, 1, 1, 576, 0, 0),
     (3, 4, 1, 300, 2, 2), (0, 1, 1, 8, 0, 0), (1, 0, 1, 8, 2, 2)],
)  # fmt: skip
def test_equals_the_reference_in_float64(
    path: str, kind: str, batch: int, length: int, branches: int, width: int, kept: int, taps: int
) -> None:
    """All kinds, branches, masks, and pasts that reach back fully, partly or not at all."""
    arrays, conv, past, mask = _case(np.random.default_rng(width), batch, length, branches, width, kept, taps)
    for masked in (None, mask):
        want, want_inputs = reference.gate_step(
            *(a.astype(float) for a in arrays), kind=kind, eps=1e-6, conv=_doubled(conv),
            past_BPX=None if past is None else past.astype(float), mask_BT=masked,
        )  # fmt: skip
        with dispatch.force(path):
            gate, memory = _gate(arrays, conv, kind, 1e-6)
            got, inputs = gate.step(arrays[0], memory, past, masked)
            place = arrays[0].copy()
            assert gate.step(place, memory, past, masked, out_BTMD=place)[0] is place
        np.testing.assert_array_equal(place, got)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max(initial=1))
        assert (inputs is None) == (want_inputs is None)
        if inputs is not None and want_inputs is not None:
            np.testing.assert_allclose(inputs, want_inputs, rtol=0, atol=TOLERANCE * np.abs(want_inputs).max(initial=1))


@pytest.mark.parametrize("path", CPP)
def test_the_exponential_over_its_whole_range(path: str) -> None:
    """SiLU of sums from -1e4 to 1e4: one tap of weight x on inputs of 1 makes the sum x."""
    sums = np.concatenate([np.linspace(-100, 100, 4001), [-1e4, -88, -87.5, 87.5, 88, 1e4, 0.0, 1e-30]])
    width = len(sums)
    ones = np.ones((1, 1, 1, width), dtype=np.float32)
    flat = np.ones((1, width), dtype=np.float32)
    conv = Convolution(flat, sums.astype(np.float32)[:, None], 1, 0.0)
    with dispatch.force(path):
        gate, memory = _gate((ones, ones, ones[:, :, 0], flat, flat), conv, "plain", 0.0)
        out, inputs = gate.step(ones, memory)
    assert inputs is not None
    np.testing.assert_allclose(inputs, 1, atol=1e-6)
    x = sums.astype(np.float32).astype(float)
    gate = 1 / (1 + np.exp(-np.sqrt(width)))
    with np.errstate(over="ignore"):
        want = 1 + gate + x / (1 + np.exp(-x))
    np.testing.assert_allclose(out[0, 0, 0], want, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(not CPP, reason="no extension in this install")
@pytest.mark.parametrize("dialect", ["demo", "v41", "qwen-ple"])
@pytest.mark.parametrize("branches", [1, 3])
def test_the_module_gives_the_same_by_both_ways(dialect: str, branches: int) -> None:
    """Gate.add in one pass and through torch, position by position with the state carried over."""
    torch.manual_seed(3)
    gate = Gate(GateConfig.of_dialect(dialect, 48, 64, branches, 3)).eval()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 20, 48) if branches == 1 else torch.randn(2, 20, branches, 48)
    memory = torch.randn(2, 20, 64)
    mask = torch.rand(2, 20) < 0.8
    with torch.no_grad():
        added, inputs = gate(hidden, memory, None, mask)
        want = hidden + added
        for t in range(20):
            past = None if inputs is None else inputs[:, max(0, t - gate.past) : t]
            got, made = gate.add(hidden[:, t : t + 1], memory[:, t : t + 1], past, mask[:, t : t + 1])
            torch.testing.assert_close(got, want[:, t : t + 1], rtol=0, atol=1e-5 * float(want.abs().max()))
            if inputs is not None:
                torch.testing.assert_close(made, inputs[:, t : t + 1], rtol=0, atol=1e-5 * float(inputs.abs().max()))


@pytest.mark.parametrize("path", [*CPP, "reference"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("positions", "memory", "branches", "width"), [(1, 512, 1, 576), (3, 100, 2, 33), (16, 63, 1, 5), (2, 2048, 4, 640)]
)
def test_keys_and_values_are_projected(
    path: str, biased: bool, dtype: Any, positions: int, memory: int, branches: int, width: int
) -> None:
    """Against float64, weights widened exactly; the gate is a plain one over a large key, so that values tell."""
    rng = np.random.default_rng(width)
    wide = branches * width
    hidden, stored, key, value = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in [(1, positions, branches, width), (1, positions, memory), (wide, memory), (width, memory)]
    )
    key, value = (weight.astype(dtype) for weight in (key, value))
    key[0, :3] = [6e-8, -3e-5, 0.0]  # subnormal halves
    ones = np.ones((branches, width), dtype=np.float32)
    biases = [rng.standard_normal(n).astype(np.float32) if biased else None for n in (wide, width)]
    names = ("key_weight_YE", "key_bias_Y", "value_weight_DE", "value_bias_D", "query_norm_MD", "key_norm_MD")
    weights = dict(zip(names, (key, biases[0], value, biases[1], ones, ones), strict=True))
    with dispatch.force(path):
        got, _ = dispatch.ops().MemoryGate(**weights, kind="plain", eps=1e-6).step(hidden, stored)
    exact = {name: None if array is None else array.astype(float) for name, array in weights.items()}
    want, _ = reference.MemoryGate(**exact, kind="plain", eps=1e-6).step(hidden.astype(float), stored.astype(float))
    # A sum of E products in fp32 is off by its rounding steps: sqrt(E) * 2^-24 of the products' size, with room.
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * memory**0.5 * 2.0**-24 * np.abs(want).max())


@pytest.mark.parametrize("path", CPP)
def test_arrays_of_another_kind_are_refused(path: str) -> None:
    """Wrong types, shapes and kinds are errors with a name."""
    arrays, conv, past, _ = _case(np.random.default_rng(0), 1, 2, 1, 8, 2, 2)
    assert conv is not None and past is not None
    with dispatch.force(path):
        gate, memory = _gate(arrays, conv, "plain", 1e-6)
        weights = {name: getattr(gate, name) for name in (
            "key_weight_YE", "key_bias_Y", "value_weight_DE", "value_bias_D", "query_norm_MD", "key_norm_MD",
        )}  # fmt: skip
        make = dispatch.ops().MemoryGate
        with pytest.raises(KernelError, match="key weight must be contiguous float32"):
            make(**{**weights, "key_weight_YE": weights["key_weight_YE"].astype(float)}, kind="plain", eps=1e-6)
        with pytest.raises(KernelError, match=r"value weight must be contiguous float32 \[8, 16\]"):
            make(**{**weights, "value_weight_DE": weights["value_weight_DE"][:7]}, kind="plain", eps=1e-6)
        with pytest.raises(KernelError, match="past must be"):
            gate.step(arrays[0], memory, past[..., ::2])
        with pytest.raises(KernelError, match="gate kind 'wide' is not known"):
            make(**weights, kind="wide", eps=1e-6)
        stream = arrays[0]
        narrow = stream[..., :4].copy()
        for hidden, rows in ((stream, memory[..., :-1].copy()), (stream, memory[:, :1]), (narrow, memory)):
            with pytest.raises(ValueError, match="do not fit"):
                gate.step(hidden, rows)
        with pytest.raises(TypeError):
            gate.step(arrays[0].astype(float), memory)
