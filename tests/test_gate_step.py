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
            got, inputs = dispatch.ops().gate_step(
                *arrays, kind=kind, eps=1e-6, conv=conv, past_BPX=past, mask_BT=masked
            )
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
        out, inputs = dispatch.ops().gate_step(ones, ones, ones[:, :, 0], flat, flat, kind="plain", eps=0.0, conv=conv)
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


@pytest.mark.parametrize("path", CPP)
def test_arrays_of_another_kind_are_refused(path: str) -> None:
    """Wrong types, shapes and kinds are errors with a name."""
    arrays, conv, past, _ = _case(np.random.default_rng(0), 1, 2, 1, 8, 2, 2)
    assert conv is not None and past is not None
    with dispatch.force(path):
        step = dispatch.ops().gate_step
        with pytest.raises(KernelError, match="key must be contiguous float32"):
            step(arrays[0], arrays[1].astype(float), *arrays[2:], kind="plain", eps=1e-6)
        with pytest.raises(KernelError, match=r"value must be contiguous float32 \[1, 2, 8\]"):
            step(*arrays[:2], arrays[2][:, :1], *arrays[3:], kind="plain", eps=1e-6)
        with pytest.raises(KernelError, match="past must be"):
            step(*arrays, kind="plain", eps=1e-6, conv=conv, past_BPX=past[..., ::2])
        with pytest.raises(KernelError, match="gate kind 'wide' is not known"):
            step(*arrays, kind="wide", eps=1e-6)
