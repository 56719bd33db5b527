"""Qwen3.8-Flash-Next (`qwen4_exp`): one table of raw-id n-grams in many shards, with its hash constants beside it.

`ple_layer_ids` counts layers from one. Rows are BF16, or FP8 with one scale for the whole table. A text ends at
end-of-sequence. The gate has a key projection for every stream, one value projection, norms over each stream, and a
dilated causal convolution.
"""

from __future__ import annotations

import re

from engram.builders.families.config import MOST_HEADS, MOST_ORDER, Config, FamilyError, Header
from engram.builders.families.family import FLOATS, GGML, Part, Published, Table, expect, expect_here, prefix_of
from engram.builders.hash_constants import prime_moduli
from engram.builders.tensor_files import Tensor, TensorFiles

MODEL_TYPES = ("qwen4_exp", "qwen4_exp_text")
ARCHITECTURES = ("qwen4exp",)  # of a GGUF
CODECS = {**FLOATS, "F8_E4M3": "fp8-tensor"}
MOST_SHARDS = 1 << 16
_MULTIPLIERS = "ple.ple_embedding.layer_multipliers"


def describe(config: Config, files: TensorFiles) -> Published:
    """The table, its gate and its stored constants. Raises FamilyError for what does not fit, by name."""
    one_based = config.numbers("ple_layer_ids", least=1)
    highest = config.number("ngram_size", least=2, most=MOST_ORDER)
    heads = config.number("heads_per_ngram", least=1, most=MOST_HEADS)
    embed = config.number("ple_embed_dim", least=1)
    base = config.number("ngram_vocab_size_base", least=2)
    multiple = config.number("make_ngram_vocab_size_divisible_by", least=1, default=128)
    shards = config.number("split_ngram_parts", least=1, most=MOST_SHARDS, default=512)
    vocabulary, end = config.number("vocab_size", least=1), config.number("eos_token_id")
    seed = config.number("seed", default=1234)
    orders = tuple(range(2, highest + 1))
    columns = len(orders) * heads
    if embed % columns:
        raise FamilyError(f"{config.path}: ple_embed_dim {embed} does not divide by {columns} rows a token")
    layers = tuple(layer - 1 for layer in one_based)
    primes = prime_moduli(list(layers), [base] * len(orders), heads)
    tables: list[Table] = []
    stored: dict[str, Tensor] = {}
    dense: dict[int, dict[str, Tensor]] = {}
    absent: tuple[str, ...] = ()
    start = prefix_of(files, f"layers.{layers[0]}.{_MULTIPLIERS}")
    for layer in layers:
        ple = f"{start}layers.{layer}.ple."
        rows = -(-sum(map(sum, primes[layer])) // multiple) * multiple
        tables.append(_table(files, f"{ple}ple_embedding.ngram_embedding.", layer, rows, embed // columns, shards))
        constants, missing = expect_here(files, {
            f"{layer}.multipliers": (ple + "ple_embedding.layer_multipliers", (highest,), ("I64",)),
            f"{layer}.primes": (ple + "ple_embedding.ngram_heads_vocab_sizes", (columns,), ("I64",)),
            f"{layer}.offsets": (ple + "ple_embedding.ngram_heads_offsets", (columns,), ("I64",)),
        })  # fmt: skip
        stored |= constants
        names = ("key_proj", "value_proj", "norm_key", "norm_query", "norm_conv", "conv1d")
        dense[layer], more = expect_here(files, {name: (f"{ple}{name}.weight", None, ()) for name in names})
        absent += missing + more
    hashing = {
        "rows_per_head": base, "seed": seed, "pad_id": end, "reset_id": end, "layers": layers, "multiple": multiple,
    }  # fmt: skip
    return Published(
        "qwen4_exp", "qwen-ple", orders, heads, embed // columns, tuple(tables), vocabulary, hashing, stored=stored,
        dense=dense, absent=absent,
    )  # fmt: skip


def _table(files: TensorFiles, start: str, layer: int, rows: int, width: int, shards: int) -> Table:
    """The shards in the order of their numbers; each holds rows / shards of them."""
    pattern = re.compile(re.escape(start) + r"shard_(\d+)\.weight")
    found = {int(m[1]): name for name in (*files.tensors, *files.absent) if (m := pattern.fullmatch(name))}
    if sorted(found) != list(range(shards)):
        raise FamilyError(
            f"{files.path} has {len(found)} tensors {start}shard_N.weight, split_ngram_parts asks for 0 to {shards - 1}"
        )
    each = -(-rows // shards)
    absent = tuple(dict.fromkeys(files.absent[name] for name in found.values() if name in files.absent))
    parts, dtypes = [], set()
    for number in range(shards):
        if found[number] not in files.tensors:
            continue
        here = min(each, rows - number * each)
        tensor: Tensor = expect(files, found[number], (here, width), tuple(CODECS))
        dtypes.add(tensor.dtype)
        parts.append(Part(number * each, here, tensor))
    if len(dtypes) > 1:
        raise FamilyError(f"{files.path}: shards of {start} have several dtypes: {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop() if dtypes else "BF16"
    factor = None
    if dtype == "F8_E4M3":
        factor = files.find(start + "weight_scale")
        if factor.dtype not in ("F32", "BF16", "F16") or factor.shape not in ((), (1,)):
            raise FamilyError(
                f"{factor.file}: {start}weight_scale is {factor.dtype} {list(factor.shape)}, FP8 rows have one number"
            )
    return Table(layer, dtype, CODECS[dtype], rows, width, tuple(parts), absent, factor)


def describe_gguf(header: Header, files: TensorFiles) -> Published:
    """The same in a GGUF, which states the hash's constants; layers are zero-based there."""
    layers = header.numbers("ple.layers")
    highest = header.number("ple.ngram_size", least=2, most=MOST_ORDER)
    heads = header.number("ple.heads_per_ngram", least=1, most=MOST_HEADS)
    multipliers = header.numbers("ple.layer_multipliers", least=1, most=(1 << 63) - 1)
    primes = header.numbers("ple.head_vocab_sizes", least=1)
    offsets, end = header.numbers("ple.head_offsets"), header.number("ple.eos_token_id")
    width, vocabulary = header.number("embedding_length_per_layer_input", least=1), header.vocabulary()
    orders = tuple(range(2, highest + 1))
    columns = len(orders) * heads
    if len(layers) != 1 or len(multipliers) != highest or len(primes) != columns or len(offsets) != columns:
        raise FamilyError(
            f"{files.path}: ple has {len(layers)} layers, {len(multipliers)} multipliers, {len(primes)} sizes and "
            f"{len(offsets)} offsets; orders 2 to {highest} with {heads} heads need 1, {highest}, {columns}, {columns}"
        )
    if any(sum(primes[:i]) != offset for i, offset in enumerate(offsets)):
        raise FamilyError(f"{files.path}: ple.head_offsets are not the sums of ple.head_vocab_sizes")
    tensor = files.find("per_layer_token_embd.weight")
    if len(tensor.shape) != 2 or tensor.shape[1] != width or tensor.shape[0] < sum(primes):
        raise FamilyError(
            f"{files.path}: per_layer_token_embd.weight is {list(tensor.shape)}, at least [{sum(primes)}, {width}] is "
            "needed"
        )
    rows = tensor.shape[0]
    table = Table(layers[0], tensor.dtype, GGML.get(tensor.dtype), rows, width, (Part(0, rows, tensor),))
    hashing = {"multipliers": multipliers, "primes": primes, "pad_id": end, "reset_id": end, "layers": layers}
    return Published("qwen4_exp", "qwen-ple", orders, heads, width, (table,), vocabulary, hashing)
