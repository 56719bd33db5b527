"""Contenders for rows of a table in memory: our kernels, the raw copy that bounds them, and peers where installed.

Every peer gets a table of the same rows in its own format, and its own reference in NumPy. Shape letters: N rows of the
table, K bytes a row, D width, R rows of a call.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.kernels import dispatch
from engram.kernels.codecs import Bytes, Codec, find_codec
from engram.kernels.reference import aligned_empty
from engram.runtime.bench_race import BenchError, Contender, Ints

_BLOCK_ROWS = 8192
_CLOSE = 1e-5  # of the largest value: peers that add a bias round otherwise than a lone multiplication


def versions(*names: str) -> dict[str, str]:
    """Versions of the distributions that are installed, of those named."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def random_block(width: int, seed: int = 0, rows: int = _BLOCK_ROWS) -> NDArray[np.float32]:
    """Gaussian rows as a trained table has them: float32 [rows, D]."""
    values: NDArray[np.float32] = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    values *= np.float32(0.02)
    return values


def tiled(block_NK: Bytes, rows: int) -> Bytes:
    """A table of `rows` rows that repeats a block: its size is real, its content costs no time to make."""
    table = np.empty((rows, block_NK.shape[1]), dtype=np.uint8)
    for begin in range(0, rows, len(block_NK)):
        table[begin : begin + len(block_NK)] = block_NK[: rows - begin]
    return table


def random_table(codec: Codec, rows: int, width: int, seed: int = 0) -> Bytes:
    """A table of encoded Gaussian rows, uint8 [rows, K]."""
    return tiled(codec.encode(random_block(width, seed)), rows)


def ours(
    codec: Codec, table_NK: Bytes, width: int, most_rows: int, *, threads: int = 1, bf16: bool = False, name: str = ""
) -> Contender:
    """Our gather + decode into a buffer that is used again, by the path that `dispatch` chose."""
    out = aligned_empty((most_rows, width), np.uint16 if bf16 else np.float32)
    out.fill(0)
    gather = dispatch.ops().gather

    def call(ids: Ints) -> NDArray[Any]:
        found: NDArray[Any] = gather(codec, table_NK, ids[:, None], out[: len(ids)], width=width, threads=threads)
        return found

    def truth(ids: Ints) -> NDArray[Any]:
        wanted = np.empty((len(ids), width), dtype=out.dtype)
        codec.decode(np.ascontiguousarray(table_NK[ids]), width, wanted)
        return wanted

    return Contender(name or f"engram {codec.name}" + (" to bf16" if bf16 else ""), call, truth, most_rows=most_rows)


def raw_copy(table_NK: Bytes, most_rows: int, *, threads: int = 1, name: str = "raw copy") -> Contender:
    """The limit: the bytes of the same rows copied out, nothing decoded."""
    out = aligned_empty((most_rows, table_NK.shape[1]), np.uint8)
    out.fill(0)
    if dispatch.name() == "reference":

        def call(ids: Ints) -> Bytes:
            return np.take(table_NK, ids, axis=0, out=out[: len(ids)], mode="clip")

    else:
        from engram.kernels import _C

        def call(ids: Ints) -> Bytes:
            _C.copy_rows(table_NK, ids, out[: len(ids)], threads)
            return out[: len(ids)]

    return Contender(name, call, lambda ids: table_NK[ids], limit=True, most_rows=most_rows)


def numpy_decode(codec: Codec, table_NK: Bytes, width: int, most_rows: int) -> Contender:
    """NumPy's own way: take, then the codec's reference decoder."""
    raw = np.zeros((most_rows, table_NK.shape[1]), dtype=np.uint8)
    out = np.zeros((most_rows, width), dtype=np.float32)

    def call(ids: Ints) -> NDArray[Any]:
        some = np.take(table_NK, ids, axis=0, out=raw[: len(ids)], mode="clip")
        return codec.decode(some, width, out[: len(ids)])

    return Contender("numpy take + decode", call, lambda ids: codec.decode(table_NK[ids], width), most_rows=most_rows)


def torch_packed(values_ND: NDArray[np.float32], bits: int) -> Bytes:
    """Rows in torch's own row format: 8 bits [D u8][fp32 scale][fp32 bias], 4 bits [D/2 u8][fp16 scale][fp16 bias]."""
    import torch

    pack = getattr(torch.ops.quantized, {8: "embedding_bag_byte_prepack", 4: "embedding_bag_4bit_prepack"}[bits])
    packed: Bytes = pack(torch.from_numpy(values_ND)).numpy()
    return packed


def torch_bag(packed_NK: Bytes, width: int, bits: int, most_rows: int, threads: int = 1) -> Contender:
    """torch's quantized embedding bag over bags of one row: the fastest way that torch has on a CPU."""
    import torch

    torch.set_num_threads(threads)
    kind = {8: "byte", 4: "4bit"}[bits]
    bag = getattr(torch.ops.quantized, f"embedding_bag_{kind}_rowwise_offsets")
    table = torch.from_numpy(packed_NK)
    offsets = torch.arange(most_rows + 1)

    def call(ids: Ints) -> NDArray[Any]:
        rows = torch.from_numpy(ids)
        found: NDArray[Any] = bag(table, rows, offsets[: len(ids)], False, 0, False, None, None, False).numpy()
        return found

    def truth(ids: Ints) -> NDArray[Any]:
        rows = packed_NK[ids]
        part = width * bits // 8
        factors = np.ascontiguousarray(rows[:, part:]).view("<f4" if bits == 8 else "<f2").astype(np.float32)
        return _codes(rows[:, :part], bits) * factors[:, :1] + factors[:, 1:]

    return Contender(f"torch embedding_bag_{kind}", call, truth, tolerance=_CLOSE, most_rows=most_rows)


def _codes(bytes_NK: Bytes, bits: int) -> NDArray[np.float32]:
    """Unsigned codes of torch's and FBGEMM's rows; 4 bits: the even column in the low half of a byte."""
    if bits == 8:
        return bytes_NK.astype(np.float32)
    both = np.stack([bytes_NK & 15, bytes_NK >> 4], axis=-1)
    return both.reshape(len(bytes_NK), -1).astype(np.float32)


def torch_fp8(table_NK: Bytes, width: int, most_rows: int, threads: int = 1) -> Contender:
    """torch eager on fp8 rows with e8m0 scales in a tensor of their own: select, cast, multiply."""
    import torch

    torch.set_num_threads(threads)
    values = torch.from_numpy(np.ascontiguousarray(table_NK[:, :width]))
    scales = torch.from_numpy(np.ascontiguousarray(table_NK[:, width:]))
    codec = find_codec("fp8-e8m0")

    def call(ids: Ints) -> NDArray[Any]:
        rows = torch.from_numpy(ids)
        taken = values.index_select(0, rows).view(torch.float8_e4m3fn).float()
        factor = scales.index_select(0, rows).view(torch.float8_e8m0fnu).float()
        found: NDArray[Any] = taken.view(len(ids), -1, 32).mul_(factor[:, :, None]).view(len(ids), -1).numpy()
        return found

    return Contender("torch fp8 eager", call, lambda ids: codec.decode(table_NK[ids], width), most_rows=most_rows)


def fbgemm(values_ND: NDArray[np.float32], rows: int, bits: int, most_rows: int) -> Contender:
    """FBGEMM's inference tables on the CPU, without pooling, over `rows` rows that repeat the given ones.

    Raises BenchError where fbgemm-gpu-cpu is not installed or does not load.
    """
    import torch

    try:
        tables = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_inference")
        shared = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        types = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    except (ImportError, OSError, RuntimeError, AttributeError) as wrong:
        hint = "pip install fbgemm-gpu-cpu==1.8.0 (built for one version of torch)"
        raise BenchError(f"fbgemm-gpu-cpu cannot be used: {str(wrong)[:200]}", hint=hint) from None
    width = values_ND.shape[1]
    kind = types.SparseType.INT8 if bits == 8 else types.SparseType.INT4
    table = tables.IntNBitTableBatchedEmbeddingBagsCodegen(
        [("rows", rows, width, kind, shared.EmbeddingLocation.HOST)],
        device="cpu", pooling_mode=shared.PoolingMode.NONE, output_dtype=types.SparseType.FP32,
    )  # fmt: skip
    table.fill_random_weights()
    weights, factors = table.split_embedding_weights(split_scale_shifts=True)[0]
    low, high = values_ND.min(axis=1), values_ND.max(axis=1)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    codes = np.rint((values_ND - low[:, None]) / np.maximum(scale.astype(np.float32), 1e-8)[:, None])
    codes = codes.clip(0, 2**bits - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    pairs = np.stack([scale, low.astype(np.float16)], axis=1).view(np.uint8)
    for begin in range(0, rows, len(codes)):
        end = min(rows, begin + len(codes))
        weights[begin:end].copy_(torch.from_numpy(codes[: end - begin]))
        factors[begin:end].copy_(torch.from_numpy(pairs[: end - begin]))
    offsets = torch.arange(most_rows + 1, dtype=torch.int32)

    def call(ids: Ints) -> NDArray[Any]:
        found: NDArray[Any] = table(torch.from_numpy(ids).int(), offsets[: len(ids) + 1]).detach().numpy()
        return found

    def truth(ids: Ints) -> NDArray[Any]:
        own = ids % len(codes)
        factor = pairs[own].view("<f2").astype(np.float32)
        return _codes(codes[own], bits) * factor[:, :1] + factor[:, 1:]

    return Contender(f"FBGEMM CPU int{bits}", call, truth, tolerance=_CLOSE, most_rows=most_rows)
