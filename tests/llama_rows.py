"""The rows that llama.cpp reads: a random model of its architecture qwen4exp, and what its memory layer gathers.

The value of a table's row is the row's number, so that what is gathered says which rows were read. The model computes
nothing behind that: the callback that sees the gathered rows ends the graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from tokenizers import pre_tokenizers

from engram.builders.layout import Layout

WIDTH, STREAMS, LOW, HEADS, KEY, INNER, EXPERTS, STATE = 256, 4, 8, 2, 128, 64, 4, 128
BLOCKS, CONTEXT = 4, 4096
NODE = b"ple_embd"


def has_qwen4exp() -> bool:
    """Whether this llama.cpp knows the architecture: its library has the word."""
    return b"qwen4exp" in Path(llama_cpp.llama_cpp._lib._name).read_bytes()


def write_model(path: Path, layout: Layout, *, seed: int | None = None) -> None:
    """Weights of zeros and a table of row numbers for the one layer (block 0) of a qwen-ple layout.

    With a seed: random weights and rows, and a tokenizer of single letters, so that it writes text.
    """
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen4exp")
    layer, wide = layout.layers[0], STREAMS * WIDTH
    numbers = {
        "block_count": BLOCKS, "context_length": CONTEXT, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": 1, "attention.key_length": KEY,
        "attention.value_length": KEY, "rope.dimension_count": KEY, "vocab_size": layout.vocab_size,
        "expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": INNER,
        "expert_shared_feed_forward_length": INNER, "ssm.conv_kernel": 4, "ssm.inner_size": 2 * STATE,
        "ssm.state_size": STATE, "ssm.time_step_rank": 2, "ssm.group_count": 2, "hyper_connection.count": STREAMS,
        "hyper_connection.low_rank": LOW, "attention.indexer.head_count": 2, "attention.indexer.key_length": KEY,
        "attention.indexer.top_k": 1 << 17, "ple.ngram_size": layout.orders[-1], "ple.heads_per_ngram": layout.heads,
        "ple.conv_kernel": 4, "ple.eos_token_id": layout.reset_id, "embedding_length_per_layer_input": layout.head_dim,
    }  # fmt: skip
    for name, number in numbers.items():
        writer.add_uint32(f"qwen4exp.{name}", number)
    writer.add_float32("qwen4exp.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_array("qwen4exp.rope.dimension_sections", [KEY // 4] * 4)
    writer.add_array("qwen4exp.attention.compress_ratios", [0, 0, 0, 4])
    writer.add_array("qwen4exp.ple.layers", [0])
    primes = [prime for heads in layout.primes[layer] for prime in heads]
    for name, values in (("layer_multipliers", layout.multipliers[layer]), ("head_vocab_sizes", primes),
                         ("head_offsets", layout.offsets(layer).tolist())):  # fmt: skip
        writer.add_key_value(
            f"qwen4exp.ple.{name}", list(values), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT64
        )
    if seed is None:
        writer.add_tokenizer_model("none")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: layout.vocab_size - 1]
        writer.add_token_list([*letters, letters[0] + letters[1]])
        writer.add_token_types([1] * layout.vocab_size)
        writer.add_token_merges([f"{letters[0]} {letters[1]}"])

    def zeros(name: str, *shape: int) -> None:
        values = np.zeros(shape, dtype=np.float32)
        if seed is not None:
            norm = "norm" in name
            values = (norm + draw.normal(size=shape) * (0.1 if norm else 0.05)).astype(np.float32)
        writer.add_tensor(name, values)

    for name in ("token_embd.weight", "output.weight"):
        blocks = np.zeros((layout.vocab_size, WIDTH // 32 * 18), dtype=np.uint8)
        if seed is not None:
            values = draw.normal(size=(layout.vocab_size, WIDTH)).astype(np.float32)
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    zeros("output_hc_norm.weight", wide)
    zeros("output_hc_down.weight", LOW, wide)
    zeros("output_hc_up.weight", wide, LOW)
    rows = np.zeros((layout.table_rows[layer], layout.head_dim), dtype=np.float32)
    rows[:, 0] = np.arange(len(rows))
    if seed is not None:
        rows = draw.normal(size=rows.shape).astype(np.float32)
    writer.add_tensor("per_layer_token_embd.weight", rows)
    for block in range(BLOCKS):
        for name, shape in _block(block, wide).items():
            zeros(f"blk.{block}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _block(block: int, wide: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "ffn_gate_inp.weight": (EXPERTS, WIDTH), "ffn_gate_inp_shexp.weight": (WIDTH,),
        "ffn_gate_exps.weight": (EXPERTS, INNER, WIDTH), "ffn_up_exps.weight": (EXPERTS, INNER, WIDTH),
        "ffn_down_exps.weight": (EXPERTS, WIDTH, INNER), "ffn_gate_shexp.weight": (INNER, WIDTH),
        "ffn_up_shexp.weight": (INNER, WIDTH), "ffn_down_shexp.weight": (WIDTH, INNER),
    }  # fmt: skip
    for part in ("attn", "ffn"):
        shapes |= {
            f"hc_{part}_norm.weight": (wide,), f"hc_{part}_down.weight": (LOW, wide),
            f"hc_{part}_up.weight": (wide, LOW), f"hc_{part}_inject.weight": (STREAMS, wide),
        }  # fmt: skip
    if block == BLOCKS - 1:
        shapes |= {
            "attn_q.weight": (HEADS * KEY * 2, WIDTH), "attn_k.weight": (KEY, WIDTH), "attn_v.weight": (KEY, WIDTH),
            "attn_output.weight": (WIDTH, HEADS * KEY), "attn_q_norm.weight": (KEY,), "attn_k_norm.weight": (KEY,),
            "indexer.q_proj.weight": (2 * KEY, WIDTH), "indexer.k_proj.weight": (KEY, WIDTH),
            "indexer.q_norm.weight": (KEY,), "indexer.k_norm.weight": (KEY,),
        }  # fmt: skip
    else:
        shapes |= {
            "attn_qkv.weight": (6 * STATE, WIDTH), "attn_gate.weight": (2 * STATE, WIDTH),
            "ssm_conv1d.weight": (6 * STATE, 4), "ssm_dt.bias": (2,), "ssm_a": (2,), "ssm_beta.weight": (2, WIDTH),
            "ssm_alpha.weight": (2, WIDTH), "ssm_norm.weight": (STATE,), "ssm_out.weight": (WIDTH, 2 * STATE),
        }  # fmt: skip
    if not block:
        shapes |= {
            "ple_key.weight": (wide, WIDTH), "ple_value.weight": (WIDTH, WIDTH), "ple_conv1d.weight": (wide, 4),
            "ple_norm_key.weight": (wide,), "ple_norm_query.weight": (wide,), "ple_norm_conv.weight": (wide,),
        }  # fmt: skip
    return shapes


class Rows:
    """Runs a model of `write_model` up to its memory: token ids [T] to row numbers [T, C]."""

    def __init__(self, path: Path, layout: Layout, lazy: bool = False) -> None:
        self._columns, self._width, self._seen = layout.columns, layout.head_dim, np.empty(0)
        library = llama_cpp.llama_cpp._lib
        self._name = library.ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._read = library.ggml_backend_tensor_get
        self._read.restype, self._read.argtypes = None, [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        self._bytes = library.ggml_nbytes
        self._bytes.restype, self._bytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._look)
        llama_cpp.llama_log_set(_quiet, None)
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = 0
        if lazy:
            of_model.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_ON
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), of_model)
        assert self._model, "llama.cpp refuses the model"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = 1
        params.cb_eval = self._callback
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp makes no context"

    def _look(self, tensor: int, ask: bool, _: Any) -> bool:
        if ask:
            return bool(self._name(tensor) == NODE)
        self._seen = np.empty(self._bytes(tensor) // 4, dtype=np.float32)
        self._read(tensor, self._seen.ctypes.data, 0, self._seen.nbytes)
        return False

    def forget(self) -> None:
        """The next call begins a text."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return self.memory(ids)[..., 0].astype(np.int64)

    def memory(self, ids: np.ndarray) -> np.ndarray:
        """What is gathered: float32 [T, C, D]."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        start = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._seen = np.empty(0)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(start, len(tokens)))
        assert status == 0 and self._seen.size, f"llama_decode returned {status}"
        return self._seen.reshape(len(ids), self._columns, self._width)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


_quiet = llama_cpp.llama_log_callback(lambda level, text, _: None)


@contextmanager
def rows_of(path: Path, layout: Layout, lazy: bool = False) -> Iterator[Rows]:
    """A model that is let go of at the end; `lazy`: it reads rows when they are asked for."""
    rows = Rows(path, layout, lazy)
    try:
        yield rows
    finally:
        rows.close()
