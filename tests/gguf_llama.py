"""A random Llama as a GGUF file, for tests of what llama.cpp makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Types

WIDTH, INNER, VOCAB, BLOCKS = 256, 512, 96, 2
LINEAR = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
          "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
          "ffn_down": (WIDTH, INNER)}  # fmt: skip


def write_gguf(
    path: Path, *, kind: Types = Types.F32, architecture: str = "llama", vocab: int = VOCAB, blocks: int = BLOCKS,
    tokens: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """A random Llama of a few blocks, 256 wide, as llama.cpp names its parts."""
    random, writer = np.random.default_rng(8), gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens or [f"t{n}" for n in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["t 0"])

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (random.normal(size=(rows, columns)) / 16).astype(np.float32)
        if kind == Types.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", vocab, WIDTH)
    matrix("output.weight", vocab, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    for block in range(blocks):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(WIDTH, dtype=np.float32))
        for name, shape in LINEAR.items():
            matrix(f"blk.{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
