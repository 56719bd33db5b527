"""Gemma 3n and Gemma 4: one row a token id, wide enough for every layer's share; no hash (order 1, row = id).

The row of a token is hidden_size_per_layer_input values for each layer, one layer after another. It is added to that
layer's stream after a gate of the backbone's own, so nothing but the table is memory here.
"""

from __future__ import annotations

from engram.builders.families.config import Config, FamilyError, Header
from engram.builders.families.family import FLOATS, GGML, Part, Published, Table, expect, prefix_of
from engram.builders.tensor_files import TensorFiles

MODEL_TYPES = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
ARCHITECTURES = ("gemma3n", "gemma4")  # of a GGUF
_NAME = "embed_tokens_per_layer.weight"


def describe(config: Config, files: TensorFiles) -> Published:
    """The table. Raises FamilyError for a key or tensor that does not fit, by name."""
    rows = config.number("vocab_size_per_layer_input", least=1)
    each, layers = config.number("hidden_size_per_layer_input"), config.number("num_hidden_layers", least=1)
    if not each:
        raise FamilyError(f"{config.path}: hidden_size_per_layer_input is 0, this model has no per-layer embeddings")
    name = prefix_of(files, _NAME) + _NAME
    if name in files.absent:
        table = Table(0, "BF16", "bf16", rows, each * layers, (), (files.absent[name],))
    else:
        tensor = expect(files, name, (rows, each * layers), tuple(FLOATS))
        table = Table(0, tensor.dtype, FLOATS[tensor.dtype], rows, each * layers, (Part(0, rows, tensor),))
    return Published("per_token", "identity", (1,), 1, each * layers, (table,), rows, {"pad_id": 0, "layers": (0,)})


def describe_gguf(header: Header, files: TensorFiles) -> Published:
    """The same table in a GGUF."""
    width = header.number("embedding_length_per_layer_input", least=1) * header.number("block_count", least=1)
    tensor = files.find("per_layer_token_embd.weight")
    if len(tensor.shape) != 2 or tensor.shape[1] != width:
        raise FamilyError(
            f"{files.path}: per_layer_token_embd.weight is {list(tensor.shape)}, its layers ask for rows of {width}"
        )
    rows = tensor.shape[0]
    table = Table(0, tensor.dtype, GGML.get(tensor.dtype), rows, width, (Part(0, rows, tensor),))
    return Published("per_token", "identity", (1,), 1, width, (table,), rows, {"pad_id": 0, "layers": (0,)})
