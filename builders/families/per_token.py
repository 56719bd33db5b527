"""Gemma 3n and Gemma 4: no hash, a token id has hidden_size_per_layer_input values for every layer of the backbone.

They lie one layer after another in the token's line of the tensor. To us each layer's share is a row and the layers are
heads (order 1): row = id * layers + layer, at the same bytes; whole lines would be larger than a page. A share goes to
its layer's stream through a gate of the backbone's own, so nothing but the table is memory here.
"""

from __future__ import annotations

from engram.builders.families.config import MOST_LAYERS, Config, FamilyError, Header
from engram.builders.families.family import FLOATS, GGML, Part, Published, Table, expect, prefix_of
from engram.builders.tensor_files import Tensor, TensorFiles

MODEL_TYPES = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
ARCHITECTURES = ("gemma3n", "gemma4")  # of a GGUF
_NAME = "embed_tokens_per_layer.weight"


def describe(config: Config, files: TensorFiles) -> Published:
    """The table. Raises FamilyError for a key or tensor that does not fit, by name."""
    rows = config.number("vocab_size_per_layer_input", least=1)
    each = config.number("hidden_size_per_layer_input")
    layers = config.number("num_hidden_layers", least=1, most=MOST_LAYERS)
    if not each:
        raise FamilyError(f"{config.path}: hidden_size_per_layer_input is 0, this model has no per-layer embeddings")
    name = prefix_of(files, _NAME) + _NAME
    if name in files.absent:
        table = Table(0, "BF16", "bf16", rows * layers, each, (), (files.absent[name],))
        return _published(table, layers, rows)
    tensor = expect(files, name, (rows, each * layers), tuple(FLOATS))
    return _published(_table(tensor, FLOATS[tensor.dtype], layers), layers, rows)


def describe_gguf(header: Header, files: TensorFiles) -> Published:
    """The same table in a GGUF."""
    each = header.number("embedding_length_per_layer_input", least=1)
    layers = header.number("block_count", least=1, most=MOST_LAYERS)
    tensor = files.find("per_layer_token_embd.weight")
    if len(tensor.shape) != 2 or tensor.shape[1] != each * layers:
        raise FamilyError(
            f"{files.path}: per_layer_token_embd.weight is {list(tensor.shape)}, its layers ask for rows of "
            f"{each * layers}"
        )
    return _published(_table(tensor, GGML.get(tensor.dtype), layers), layers, tensor.shape[0])


def _table(tensor: Tensor, codec: str | None, layers: int) -> Table:
    rows, width = tensor.shape[0] * layers, tensor.shape[1] // layers
    return Table(0, tensor.dtype, codec, rows, width, (Part(0, rows, tensor),))


def _published(table: Table, layers: int, vocabulary: int) -> Published:
    hashing = {"rows_per_head": vocabulary, "pad_id": 0, "layers": (0,)}
    return Published("per_token", "identity", (1,), layers, table.width, (table,), vocabulary, hashing)
