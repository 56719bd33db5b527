"""The Triton code of kernels/gpu.py, which holds the checks and the launches; the only file that imports triton.

Addresses are 64 bits wide. Rows are decoded from bytes by integer work, because native 8-bit float types exist only on
the newest GPUs, and because NaN and signed zeros must come out as kernels/codecs.py defines them. Only language
primitives are used (no helpers that Triton itself writes in Triton, no autotune), so that everything also runs in the
interpreter. Written without a GPU at hand: tile sizes are reasoned, not tuned.

Shape letters: those of kernels/reference.py; R row slots of a call, K bytes a row, L layers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

# Codec.code of kernels/codecs.py
F32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
INT8_ROW = tl.constexpr(2)
INT8 = tl.constexpr(3)
NF4 = tl.constexpr(4)
FP8_E8M0 = tl.constexpr(5)
Q8_0 = tl.constexpr(6)
Q4_0 = tl.constexpr(7)
IQ4_NL = tl.constexpr(8)
H4 = tl.constexpr(9)
H3 = tl.constexpr(10)
H2 = tl.constexpr(11)
FP8_ROW = tl.constexpr(12)
FP8_TENSOR = tl.constexpr(13)
NVFP4 = tl.constexpr(14)
H1 = tl.constexpr(15)

BAD_ROW = tl.constexpr(1)  # what the fault words say: [0] one of these, [1] the id
BAD_TOKEN = tl.constexpr(2)
PLAIN = tl.constexpr(0)  # gate kinds
SQRT = tl.constexpr(1)
COPYSIGN = tl.constexpr(2)


@triton.jit
def _bytes_as_word(at, inside, COUNT: tl.constexpr):
    """COUNT bytes, little-endian, at any alignment: uint32."""
    word = tl.load(at, mask=inside, other=0).to(tl.uint32)
    for i in tl.static_range(1, COUNT):
        word = word | (tl.load(at + i, mask=inside, other=0).to(tl.uint32) << (8 * i))
    return word


@triton.jit
def _half(at, inside):
    """(fp32 value, is NaN or infinite) of the fp16 number at an address; subnormals are exact."""
    bits = _bytes_as_word(at, inside, 2)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32), (bits & 0x7C00) == 0x7C00


@triton.jit
def _signed(byte):
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _e4m3(byte):
    """(fp32 value, is NaN): sign, 4 bits of exponent (bias 7), 3 bits of fraction; below 8 they are steps of 2^-9."""
    code = byte.to(tl.uint32) & 0x7F
    normal = (code << 20) + 0x3C000000  # the exponent re-biased: (127 - 7) << 23
    small = (code.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)
    bits = tl.where(code < 8, small, normal) | ((byte.to(tl.uint32) & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True), code == 0x7F


@triton.jit
def _e8m0(byte):
    """(2^(byte - 127), is NaN); byte 0 is 2^-127, a subnormal."""
    code = byte.to(tl.uint32)
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return bits.to(tl.float32, bitcast=True), code == 255


@triton.jit
def _plane(row, c, inside, D: tl.constexpr, BITS: tl.constexpr):
    """The codes of a plane: byte i holds column i + k * D * BITS / 8 at bit k * BITS."""
    each = D * BITS // 8
    byte = tl.load(row + c % each, mask=inside, other=0).to(tl.int32)
    return (byte >> (c // each * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _butterflies(values, BR: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of BLOCK columns times the Hadamard matrix; the sums are whole fp32 numbers, so their order is free."""
    STAGES: tl.constexpr = BLOCK.bit_length() - 1
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(values, (BR, BD >> (stage + 1), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        values = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (BR, BD))
    return values


@triton.jit
def _hadamard(
    row, c, inside, book, factor, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Bits of h4 to h1; `factor` is the codec's norm at this width."""
    c = c + 0 * row.to(tl.int64)
    if CODE == H4:
        code = _plane(row, c, inside, D, 4)
        scale, bad = _half(row + D // 2 + 0 * c, inside)
    elif CODE == H3:
        code = _plane(row, c, inside, D, 2) | (_plane(row + D // 4, c, inside, D, 1) << 2)
        scale, bad = _half(row + D // 8 * 3 + 0 * c, inside)
    elif CODE == H2:
        code = _plane(row, c, inside, D, 2)
        scale, bad = _half(row + D // 4 + 0 * c, inside)
    else:
        code = _plane(row, c, inside, D, 1)
        scale, bad = _half(row + D // 8 + 0 * c, inside)
    sums = _butterflies(tl.load(book + code), BR, BD, BLOCK)
    h = (c + 1).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    sign = (h ^ (h >> 16)) & 0x80000000
    signed = ((scale * factor).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return tl.where(bad, 0x7FC00000, (sums * signed).to(tl.uint32, bitcast=True))


@triton.jit
def _decoded(row, c, inside, book, own_factor, D: tl.constexpr, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """The bits, as fp32 (uint32), of columns `c` of the rows at `row`; layouts as in kernels/codecs.py."""
    if CODE == F32:
        if ALIGNED:
            bits = tl.load((row + 4 * c).to(tl.pointer_type(tl.uint32)), mask=inside, other=0)
        else:
            bits = _bytes_as_word(row + 4 * c, inside, 4)
        return bits
    if CODE == BF16:
        if ALIGNED:
            bits = tl.load((row + 2 * c).to(tl.pointer_type(tl.uint16)), mask=inside, other=0).to(tl.uint32)
        else:
            bits = _bytes_as_word(row + 2 * c, inside, 2)
        return bits << 16
    g = c // 32
    k = c % 32
    bad = c < 0
    if CODE == INT8_ROW:
        word = _bytes_as_word(row + D + 0 * c, inside, 4)
        scale = word.to(tl.float32, bitcast=True)
        bad_scale = (word & 0x7F800000) == 0x7F800000
        factor = _signed(tl.load(row + c, mask=inside, other=0))
    elif CODE == INT8:
        scale, bad_scale = _half(row + D + 2 * g, inside)
        factor = _signed(tl.load(row + c, mask=inside, other=0))
    elif CODE == FP8_E8M0:
        scale, bad_scale = _e8m0(tl.load(row + D + g, mask=inside, other=0))
        factor, bad = _e4m3(tl.load(row + c, mask=inside, other=0))
    elif CODE == FP8_ROW:
        word = _bytes_as_word(row + D + 0 * c, inside, 4)
        scale = word.to(tl.float32, bitcast=True)
        bad_scale = (word & 0x7F800000) == 0x7F800000
        factor, bad = _e4m3(tl.load(row + c, mask=inside, other=0))
    elif CODE == FP8_TENSOR:
        scale, bad_scale = own_factor, c < 0
        factor, bad = _e4m3(tl.load(row + c, mask=inside, other=0))
    elif CODE == NVFP4:
        pair = tl.load(row + c // 2, mask=inside, other=0).to(tl.int32)
        group_scale, bad = _e4m3(tl.load(row + D // 2 + c // 16, mask=inside, other=0))
        factor = tl.load(book + tl.where(c % 2 == 0, pair & 15, pair >> 4)) * group_scale  # exact
        scale, bad_scale = own_factor, c < 0
    elif CODE == NF4:
        half = tl.minimum(D - 32 * g, 32) // 2  # the last group may be shorter
        scale, bad_scale = _half(row + D // 2 + 2 * g, inside)
        pair = tl.load(row + 16 * g + tl.where(k < half, k, k - half), mask=inside, other=0).to(tl.int32)
        factor = tl.load(book + tl.where(k < half, pair & 15, pair >> 4))
    elif CODE == Q8_0:
        scale, bad_scale = _half(row + 34 * g, inside)
        factor = _signed(tl.load(row + 34 * g + 2 + k, mask=inside, other=0))
    else:
        scale, bad_scale = _half(row + 18 * g, inside)
        pair = tl.load(row + 18 * g + 2 + k % 16, mask=inside, other=0).to(tl.int32)
        code = tl.where(k < 16, pair & 15, pair >> 4)
        if CODE == Q4_0:
            factor = (code - 8).to(tl.float32)
        else:
            factor = tl.load(book + code)
    return tl.where(bad | bad_scale, 0x7FC00000, (factor * scale).to(tl.uint32, bitcast=True))


@triton.jit
def _as_bf16(bits):
    """Bits of fp32 to bits of bf16, to nearest even; a NaN keeps its upper half and becomes quiet."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded).to(tl.uint16)


@triton.jit
def _as_stored(x, at):
    """fp32 in the type that lies at an address, to nearest even; the interpreter's own cast to bf16 truncates."""
    if at.dtype.element_ty == tl.bfloat16:
        return _as_bf16(x.to(tl.uint32, bitcast=True)).to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def gather_rows(
    address, rows_R, out_RD, book, fault, slots, table_rows, rows_per_page, pitch, factor,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, ROW_BYTES: tl.constexpr, CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program decodes BR rows. Row i of the table lies at address + (i // rows_per_page) * pitch + the rest * K.

    `address` is a number, so that device memory and pinned host memory (one address space, UVA) are the same to it.
    `out` takes bits: int32 for fp32, int16 for bf16. A row outside the table gives zeros and is noted in `fault`.
    """
    slot = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    row = tl.load(rows_R + slot, mask=slot < slots, other=0)
    known = (row >= 0) & (row < table_rows)
    wrong = (slot < slots) & ~known
    tl.store(fault + 0 * row, BAD_ROW, mask=wrong)
    tl.store(fault + 1 + 0 * row, row, mask=wrong)
    row = tl.where(known, row, 0)
    start = (row // rows_per_page) * pitch + (row % rows_per_page) * ROW_BYTES
    at = address.to(tl.int64).to(tl.pointer_type(tl.uint8)) + start
    c = tl.arange(0, BD)
    inside = ((slot < slots) & known)[:, None] & (c < D)[None, :]
    if CODE == H4 or CODE == H3 or CODE == H2 or CODE == H1:
        bits = _hadamard(at[:, None], c[None, :], inside, book, factor, D, BR, BD, D & -D, CODE)
    else:
        bits = _decoded(at[:, None], c[None, :], inside, book, factor, D, CODE, ALIGNED)
    bits = tl.where(known[:, None], bits, 0)
    out = out_RD + slot[:, None] * D + c[None, :]
    keep = (slot < slots)[:, None] & (c < D)[None, :]
    if out_RD.dtype.element_ty == tl.int16:
        tl.store(out, _as_bf16(bits).to(tl.int16, bitcast=True), mask=keep)
    else:
        tl.store(out, bits.to(tl.int32, bitcast=True), mask=keep)


@triton.jit
def hash_rows(
    ids_BT, token_map, dead_BT, start_BJT, stop_BJT, history_BJ, multipliers_LX, primes_LC, offsets_LC, order_C,
    out_LBTC, fault, tokens, length, fill, vocabulary,
    J: tl.constexpr, DEPTH: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, MAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr, SUMS: tl.constexpr, OLDEST_FIRST: tl.constexpr,
):  # fmt: skip
    """One program hashes BT positions for one layer: look back, multiply, XOR or add, modulo, offset.

    The formulas are look_back, hash_ngrams and sum_ngrams of kernels/reference.py. Column c takes the tokens at the
    distances below order_C[c], counted from the oldest where OLDEST_FIRST. Triton's % has the sign of the dividend, the
    hash's modulo is never negative.
    """
    layer = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    here = place < tokens
    batch, t = place // length, place % length
    c = tl.arange(0, BC)
    order = tl.load(order_C + c, mask=c < C, other=0)
    flags = batch * (J + length) + J + t  # this position in start and stop
    blocked = tl.load(dead_BT + place, mask=here, other=0) != 0
    mixed = tl.full((BT, BC), 0, dtype=tl.int64)
    for k in tl.static_range(DEPTH):
        if k > 0:
            started = tl.load(start_BJT + flags - k + 1, mask=here, other=0)
            stopped = tl.load(stop_BJT + flags - k, mask=here, other=0)
            blocked = blocked | (started != 0) | (stopped != 0)
        now = here & (t >= k)
        token = tl.load(ids_BT + place - k, mask=now, other=0)
        wrong = now & (token >= vocabulary)
        if not NEGATIVE:
            wrong = wrong | (now & (token < 0))
        tl.store(fault + 0 * token, BAD_TOKEN, mask=wrong)
        tl.store(fault + 1 + 0 * token, token, mask=wrong)
        if MAPPED:
            known = (token >= 0) & (token < vocabulary)  # a negative id passes through
            token = tl.where(known, tl.load(token_map + token, mask=now & known, other=0), token)
        if k > 0:
            before = tl.load(history_BJ + batch * J + J + t - k, mask=here & (t < k), other=0)
            token = tl.where(t < k, before, token)
        token = tl.where(blocked, fill, token)
        at = DEPTH - 1 - k if OLDEST_FIRST else k
        if SUMS:
            by = tl.load(multipliers_LX + (layer * C + c) * DEPTH + at, mask=(c < C) & (order > at), other=0)
            mixed = mixed + token[:, None] * by[None, :]
        else:
            product = token * tl.load(multipliers_LX + layer * DEPTH + at)
            mixed = mixed ^ tl.where((order > at)[None, :], product[:, None], 0)
    prime = tl.load(primes_LC + layer * C + c, mask=c < C, other=1)[None, :]
    rest = mixed % prime
    rest = tl.where(rest < 0, rest + prime, rest)
    rest += tl.load(offsets_LC + layer * C + c, mask=c < C, other=0)[None, :]
    out = out_LBTC + (layer * tokens + place[:, None]) * C + c[None, :]
    tl.store(out, rest, mask=here[:, None] & (c < C)[None, :])


@triton.jit
def _total(x):
    """tl.sum, which the interpreter refuses where triton was imported before TRITON_INTERPRET was set."""
    return tl.reduce(x, 0, tl.standard._sum_combine)


@triton.jit
def _normed(x, weight, eps, D: tl.constexpr):
    """x / sqrt(mean(x²) + eps) * weight over the columns; those outside D are zero."""
    return x / tl.sqrt(_total(x * x) / D + eps) * weight


@triton.jit
def _past_taps(
    inputs_BTX, past_BPX, weight_XW, batch, t, length, kept, x, inside,
    X: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """The convolution's sum over all taps but the last, which is the position itself; zeros before the text."""
    total = tl.full(x.shape, 0, dtype=tl.float32)
    for i in tl.static_range(W - 1):
        p = t - (W - 1 - i) * DILATION + 0 * x  # a block: 3.9's interpreter takes no mask made with a scalar
        now = tl.load(inputs_BTX + (batch * length + p) * X + x, mask=inside & (p >= 0), other=0).to(tl.float32)
        before = tl.load(past_BPX + (batch * kept + kept + p) * X + x, mask=inside & (p < 0) & (p >= -kept), other=0)
        weight = tl.load(weight_XW + x * W + i, mask=inside, other=0).to(tl.float32)
        total += tl.where(p >= 0, now, before.to(tl.float32)) * weight
    return total


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gate_rows(
    hidden_BTMD, key_BTMD, value_BTD, query_norm_MD, key_norm_MD, mask_BT, gate_BTM,
    conv_norm_MD, conv_weight_XW, past_BPX, inputs_BTX, out_BTMD, length, kept, eps, conv_eps,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr,
    W: tl.constexpr, DILATION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: one branch of one position. Norms, gate, gated value; the convolution's input where W > 0.

    With WHOLE the convolution too: every other tap then lies before this call (length <= DILATION). Otherwise conv_rows
    follows. The formulas are those of kernels/reference.py; sums in fp32.
    """
    place = tl.program_id(0).to(tl.int64)
    branch = tl.program_id(1)
    d = tl.arange(0, BD)
    inside = d < D
    here = (place * M + branch) * D + d
    x = branch * D + d  # channel
    hidden = tl.load(hidden_BTMD + here, mask=inside, other=0).to(tl.float32)
    key = tl.load(key_BTMD + here, mask=inside, other=0).to(tl.float32)
    query = _normed(hidden, tl.load(query_norm_MD + x, mask=inside, other=0).to(tl.float32), eps, D)
    key = _normed(key, tl.load(key_norm_MD + x, mask=inside, other=0).to(tl.float32), eps, D)
    score = _total(query * key) / tl.sqrt(D * 1.0)
    if KIND != PLAIN:
        size = tl.abs(score)
        root = tl.sqrt(tl.where(size < 1e-6, 1e-6, size))  # where, not maximum: a NaN stays
        sign = score.to(tl.uint32, bitcast=True) & 0x80000000
        root = (root.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        if KIND == SQRT:
            root = tl.where(score == 0, 0.0, root)
        score = root
    gate = 1.0 / (1.0 + tl.exp(-score))
    if MASKED:
        gate = tl.where(tl.load(mask_BT + place) != 0, gate, 0.0)
    tl.store(gate_BTM + place * M + branch, gate)
    added = gate * tl.load(value_BTD + place * D + d, mask=inside, other=0).to(tl.float32)
    if W > 0:
        conv_norm = tl.load(conv_norm_MD + x, mask=inside, other=0).to(tl.float32)
        own = _as_stored(_normed(added, conv_norm, conv_eps, D), inputs_BTX)
        tl.store(inputs_BTX + here, own, mask=inside)
        if WHOLE:
            last = tl.load(conv_weight_XW + x * W + W - 1, mask=inside, other=0).to(tl.float32)
            total = _past_taps(
                inputs_BTX, past_BPX, conv_weight_XW, place // length, place % length, length, kept, x, inside,
                M * D, W, DILATION,
            )  # fmt: skip
            added += _silu(total + own.to(tl.float32) * last)
    if WHOLE or W == 0:
        if MASKED:
            added = tl.where(tl.load(mask_BT + place) != 0, added, 0.0)
        tl.store(out_BTMD + here, _as_stored(hidden + added, out_BTMD), mask=inside)


@triton.jit
def conv_rows(
    hidden_BTMD, value_BTD, mask_BT, gate_BTM, conv_weight_XW, past_BPX, inputs_BTX, out_BTMD, length, kept,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """The second half for longer calls: convolution over gate_rows' inputs, SiLU, gated value and residual added."""
    place = tl.program_id(0).to(tl.int64)
    branch = tl.program_id(1)
    d = tl.arange(0, BD)
    inside = d < D
    here = (place * M + branch) * D + d
    x = branch * D + d
    own = tl.load(inputs_BTX + here, mask=inside, other=0).to(tl.float32)
    last = tl.load(conv_weight_XW + x * W + W - 1, mask=inside, other=0).to(tl.float32)
    total = _past_taps(
        inputs_BTX, past_BPX, conv_weight_XW, place // length, place % length, length, kept, x, inside,
        M * D, W, DILATION,
    )  # fmt: skip
    added = tl.load(gate_BTM + place * M + branch) * tl.load(value_BTD + place * D + d, mask=inside, other=0).to(
        tl.float32
    )
    added += _silu(total + own * last)
    if MASKED:
        added = tl.where(tl.load(mask_BT + place) != 0, added, 0.0)
    hidden = tl.load(hidden_BTMD + here, mask=inside, other=0).to(tl.float32)
    tl.store(out_BTMD + here, _as_stored(hidden + added, out_BTMD), mask=inside)


INTERPRETED = not isinstance(gather_rows, triton.JITFunction)  # TRITON_INTERPRET was 1 when this file was imported
