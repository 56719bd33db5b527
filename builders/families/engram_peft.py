"""Adapters that the PyPI package engram-peft saves (1.0 to 1.2.7): config.json and engram_adapters.safetensors.

The tensors are those of a `ModuleDict` by layer, `LAYER.multi_head_embedding…`, F32 unless another dtype was asked for;
a LoRA may lie beside them. Its engine "deepseek" has the demo's multipliers and primes (each order's size is shared by
its heads, layers ascend), but another hash. With N the highest order, c the ids, and the pad id's before the text,
order n of layer l at position t is

    XOR over k = 0 … n-1 of c[t - N + 1 + k] * m[l, k]    modulo each head's prime.

So the oldest token has the first multiplier, and an order below N ends N - n tokens before t: our dialect
"engram-peft". c are raw ids, or compressed by the demo's rule (`enable_tokenizer_compression`), but only those below
the tokenizer's `vocab_size`: a token that was added to it keeps its id, and `compressed_vocab_size`, by which the
multipliers are drawn, does not count it. Its engine "qwen_ple" hashes as Qwen3.8-Flash-Next does, with constants of its
own that are the same in every adapter.
"""

from __future__ import annotations

from engram.builders.families.config import MOST_HEADS, MOST_ORDER, Config, FamilyError
from engram.builders.families.deepseek_engram import (
    DTYPES,
    module_names,
    primes_of,
    published,
    read_memory,
)
from engram.builders.families.family import Published, Wanted
from engram.builders.tensor_files import TensorFiles

MODEL_TYPES = ("engram",)
KEY = "engram_vocab_size_per_ngram"  # what tells it from others of this type
QWEN_MULTIPLIERS = (23_703_573_157_769, 20_109_073_645_365, 8_052_911_324_071)
QWEN_END, QWEN_BASE, QWEN_HEADS = 248_044, 20_000_000, 8


def describe(config: Config, files: TensorFiles) -> Published:
    """Tables, gates and offsets. Raises FamilyError for a key or tensor that does not fit, by name."""
    config.refuse("table_source", "memory")  # or its rows are in a database elsewhere
    engine, specification = config.values.get("engine", "deepseek"), config.values.get("table_spec")
    if engine not in ("deepseek", "qwen_ple") or specification not in (None, "PLE_QWEN_V1", "ENG_DEEPSEEK_V1"):
        raise FamilyError(f"{config.path}: engine {engine!r} with table_spec {specification!r} is not understood")
    layers = config.numbers("target_layers")
    orders = config.numbers("ngram_sizes", least=1, most=MOST_ORDER)
    totals = config.numbers(KEY, least=1)
    heads = config.number("n_head_per_ngram", least=1, most=MOST_HEADS)
    embed, hidden = config.number("embedding_dim", least=1), config.number("hidden_size", least=1)
    streams = config.number("hc_mult", least=1, most=MOST_HEADS)
    kernel = config.number("conv_kernel_size", least=1)
    pad, seed = config.number("pad_id"), config.number("seed")
    compressed = config.number("compressed_vocab_size", least=1)
    compresses = config.values.get("enable_tokenizer_compression")
    if not isinstance(compresses, bool):
        raise FamilyError(f"{config.path}: enable_tokenizer_compression is {compresses!r}, expected true or false")
    if list(orders) != sorted(set(orders)) or len(totals) != len(orders):
        raise FamilyError(
            f"{config.path}: ngram_sizes {list(orders)} must ascend, and {KEY} {list(totals)} have a number for each"
        )
    config.refuse("max_ngram_size", orders[-1])
    columns = len(orders) * heads
    if embed % columns:
        raise FamilyError(f"{config.path}: embedding_dim {embed} does not divide by {columns} rows a token")
    starts = module_names(config, files, layers)
    hashing: dict[str, object]
    if engine == "qwen_ple" or specification == "PLE_QWEN_V1":
        if len(layers) != 1 or orders != (2, 3) or heads != QWEN_HEADS or compresses:
            raise FamilyError(
                f"{config.path}: engine qwen_ple with target_layers {list(layers)}, ngram_sizes {list(orders)}, "
                f"n_head_per_ngram {heads}; it has one layer, orders 2 and 3, {QWEN_HEADS} heads and raw ids"
            )
        if config.values.get("prime_sizes") is None:
            (moduli,) = primes_of(config, layers, (QWEN_BASE, QWEN_BASE), heads).values()
        elif len(sizes := config.numbers("prime_sizes", least=1)) == columns:
            moduli = sizes[:heads], sizes[heads:]
        else:
            raise FamilyError(f"{config.path}: prime_sizes has {len(sizes)} numbers, {columns} heads need one each")
        primes, dialect = {layers[0]: moduli}, "qwen-ple"
        hashing = {
            "multipliers": QWEN_MULTIPLIERS, "primes": moduli[0] + moduli[1], "pad_id": QWEN_END, "reset_id": QWEN_END,
            "layers": layers,
        }  # fmt: skip
    else:
        sizes, layers, dialect = tuple(total // heads for total in totals), tuple(sorted(layers)), "engram-peft"
        primes = primes_of(config, layers, sizes, heads)
        hashing = {"rows_per_head": sizes, "seed": seed, "pad_id": pad, "layers": layers}
    memories = []
    for layer in layers:
        start = starts[layer]
        gate: dict[str, Wanted] = {
            "value_proj": (start + "gating.w_v.weight", (hidden, embed), DTYPES),
            "conv_weight": (start + "short_conv.conv.weight", (streams * hidden, 1, kernel), DTYPES),
        }
        for m in range(streams):
            gate[f"key_proj.{m}"] = (f"{start}gating.w_k.{m}.weight", (hidden, embed), DTYPES)
            for ours, theirs in (("key", "gating.norm_k"), ("query", "gating.norm_h"), ("conv", "short_conv.norms")):
                gate[f"norm_{ours}.{m}"] = (f"{start}{theirs}.{m}.weight", (hidden,), DTYPES)
        memories.append(read_memory(files, start, layer, primes[layer], embed // columns, gate))
    return published(
        "engram-peft", dialect, orders, heads, memories, 0 if compresses else compressed, hashing,
        compressed if compresses else None,
    )  # fmt: skip
