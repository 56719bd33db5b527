"""DeepSeek-V4.1-Flash: two tables of FP8 rows with a power-of-two scale for every 32 values, in tensors apart.

Layers are zero-based. Nothing of the hash is stored: token map, multipliers and primes follow from the tokenizer and
config.json, and the sum of a layer's primes must be the number of its rows. BOS and EOS do not end a text; tokens of
images do (they are dead). The gate has one fused projection for its keys and value, and no convolution.
"""

from __future__ import annotations

from engram.builders.families.config import MOST_HEADS, MOST_ORDER, Config, FamilyError
from engram.builders.families.family import Part, Published, Table, expect, expect_here, prefix_of
from engram.builders.hash_constants import prime_moduli
from engram.builders.tensor_files import Tensor, TensorFiles

MODEL_TYPES = ("deepseek_v41", "deepseek_v4_1")
GROUP = 32  # values that share a scale


def describe(config: Config, files: TensorFiles) -> Published:
    """The two tables and their gates. Raises FamilyError for a key or tensor that does not fit, by name."""
    layers = config.numbers("engram_layer_ids")
    rows = config.numbers("engram_num_embeddings", least=1)
    highest = config.number("engram_max_ngram_size", least=2, most=MOST_ORDER)
    heads = config.number("engram_n_heads", least=1, most=MOST_HEADS)
    base, width = config.number("engram_vocab_size", least=2), config.number("engram_head_dim", least=GROUP)
    pad = config.number("engram_pad_token_id", "engram_pad_id")
    compressed = config.number("engram_compressed_vocab_size", least=1)
    vocabulary, hidden = config.number("vocab_size", least=1), config.number("hidden_size", least=1)
    streams = config.number("hc_mult", least=1)
    dead = config.number("image_token_id", default=-1)
    config.refuse("engram_seed", 0)
    config.refuse("engram_kernel_size", 0)
    orders = tuple(range(2, highest + 1))
    if len(rows) != len(layers):
        raise FamilyError(f"{config.path}: engram_num_embeddings has {len(rows)} numbers for {len(layers)} layers")
    primes = prime_moduli(list(layers), [base] * len(orders), heads)
    for layer, count in zip(layers, rows, strict=True):
        if (needed := sum(map(sum, primes[layer]))) != count:
            raise FamilyError(
                f"{config.path}: engram_num_embeddings says {count:,} rows for layer {layer}, the primes from "
                f"engram_vocab_size {base:,} on add up to {needed:,}"
            )
    prefix = prefix_of(files, f"layers.{layers[0]}.engram.embed.weight")
    tables: list[Table] = []
    dense: dict[int, dict[str, Tensor]] = {}
    absent: tuple[str, ...] = ()
    for layer, count in zip(layers, rows, strict=True):
        start = f"{prefix}layers.{layer}.engram."
        wide = hidden * (streams + 1), len(orders) * heads * width
        tables.append(_table(files, start, layer, count, width))
        dense[layer], missing = expect_here(files, {
            "wkv": (start + "wkv.weight", wide, ("F8_E4M3", "BF16", "F32")),
            **{name: (start + name, (streams, hidden), ("BF16", "F32")) for name in ("q_weight", "k_weight")},
        })  # fmt: skip
        absent += missing
        if start + "wkv.scale" in files.tensors:
            dense[layer]["wkv_scale"] = files.find(start + "wkv.scale")
        elif start + "wkv.scale" in files.absent:
            absent += (start + "wkv.scale",)
    hashing = {
        "rows_per_head": base, "seed": 0, "pad_id": pad, "layers": layers, "dead_ids": () if dead < 0 else (dead,),
    }  # fmt: skip
    return Published(
        "deepseek_v41", "v41", orders, heads, width, tuple(tables), vocabulary, hashing, compressed, dense=dense,
        absent=absent,
    )  # fmt: skip


def _table(files: TensorFiles, start: str, layer: int, rows: int, width: int) -> Table:
    """Values and scales, which may be in different shards."""
    names = [start + "embed.weight", start + "embed.scale"]
    if absent := tuple(dict.fromkeys(files.absent[name] for name in names if name in files.absent)):
        return Table(layer, "F8_E4M3", "fp8-e8m0", rows, width, (), absent)
    values = expect(files, names[0], (rows, width), ("F8_E4M3",))
    scales = expect(files, names[1], (rows, width // GROUP), ("F8_E8M0", "U8"))
    return Table(layer, "F8_E4M3", "fp8-e8m0", rows, width, (Part(0, rows, values, scales),))
