"""The paper's demo (`engram_demo_v1.py`) and what follows it: a table, a gate and a convolution in each memory layer.

Tensors are named as the demo's module names them, under `layers.N.engram.` with any prefix, in a `ModuleDict` by layer
(`engram_layers.N.`), or in the demo's own list of modules, where the token embedding is number 0 and block N is N + 1.
No configuration of the paper's models was published: its keys are the fields of the demo's EngramConfig, with or
without `engram_` before them, beside the backbone's keys, in an object `engram_config`, or in a file engram_config.json
alone. What follows from shapes (streams, width of the stream, kernel) may be left out. Layers count from zero, as the
seeds of the multipliers do. Ids are compressed, nothing ends a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from engram.builders.families.config import MOST_HEADS, MOST_ORDER, Config, FamilyError
from engram.builders.families.family import FLOATS, Part, Published, Table, Wanted, expect_here
from engram.builders.hash_constants import prime_moduli
from engram.builders.tensor_files import Tensor, TensorFiles

MODEL_TYPES = ("engram", "engram_lact", "deepseek_v4", "deepseek_engram")
KEY = "engram_vocab_size"  # what tells it from others of these types
DTYPES = ("F32", "BF16", "F16")
MOST_PRIMES = 1 << 11  # columns of all layers: 64 times the paper's; more take seconds to find
_TABLE, _OFFSETS = "multi_head_embedding.embedding.weight", "multi_head_embedding.offsets"
_PLACE = re.compile(r"(?P<start>.*?)(?P<place>0|[1-9]\d{0,5})\.(?P<inner>(?:[a-z_]+\.)?)" + re.escape(_TABLE))


class Memory(NamedTuple):
    """One layer's tensors: the rows, the stored constants and the gate, and which names are in absent shards."""

    table: Table
    stored: dict[str, Tensor]
    dense: dict[str, Tensor]
    absent: tuple[str, ...]


def describe(config: Config, files: TensorFiles) -> Published:
    """Tables, gates and offsets. Raises FamilyError for a key or tensor that does not fit, by name."""
    layers = config.numbers("layer_ids", "engram_layer_ids", "engram_layer_idx", "engram_layer_index")
    sizes = config.numbers(KEY, least=1)
    highest = config.number("max_ngram_size", "engram_max_ngram_size", least=2, most=MOST_ORDER)
    heads = config.number("n_head_per_ngram", "engram_n_head_per_ngram", least=1, most=MOST_HEADS)
    each = config.number("n_embed_per_ngram", "engram_n_embed_per_ngram", least=1)
    pad, seed = config.number("pad_id", "engram_pad_id"), config.number("seed", "engram_seed")
    vocabulary = config.number("vocab_size", least=1, default=0)
    compressed = config.number("compressed_vocab_size", "engram_compressed_vocab_size", least=1, default=0)
    orders = tuple(range(2, highest + 1))
    if len(sizes) != len(orders):
        raise FamilyError(f"{config.path}: {KEY} has {len(sizes)} numbers, orders 2 to {highest} need {len(orders)}")
    if each % heads:
        raise FamilyError(f"{config.path}: n_embed_per_ngram {each} does not divide by {heads} heads")
    if vocabulary and pad >= vocabulary:
        raise FamilyError(f"{config.path}: pad_id {pad} is outside the vocabulary of {vocabulary:,} ids")
    starts = module_names(config, files, layers)
    first = starts[layers[0]]
    hidden = config.number("hidden_size", least=1, default=_size(files, first + "value_proj.weight", 0))
    streams = config.number("hc_mult", "backbone_hc_mult", least=1, most=MOST_HEADS, default=_count(files, first))
    kernel = config.number(
        "kernel_size", "engram_kernel_size", least=1, default=_size(files, first + "short_conv.conv.weight", 2)
    )
    primes = primes_of(config, layers, sizes, heads)
    width, wide = each // heads, len(orders) * each
    memories = []
    for layer in layers:
        start = starts[layer]
        gate: dict[str, Wanted] = {
            "value_proj": (start + "value_proj.weight", (hidden, wide), DTYPES),
            "conv_weight": (start + "short_conv.conv.weight", (streams * hidden, 1, kernel), DTYPES),
        }
        for m in range(streams):
            gate[f"key_proj.{m}"] = (f"{start}key_projs.{m}.weight", (hidden, wide), DTYPES)
            for ours, theirs in (("key", "norm1"), ("query", "norm2"), ("conv", "short_conv.norms")):
                gate[f"norm_{ours}.{m}"] = (f"{start}{theirs}.{m}.weight", (hidden,), DTYPES)
        if has(files, start + "value_proj.bias"):  # clones leave the biases out, all of them
            gate["value_proj.bias"] = (start + "value_proj.bias", (hidden,), DTYPES)
            for m in range(streams):
                gate[f"key_proj.{m}.bias"] = (f"{start}key_projs.{m}.bias", (hidden,), DTYPES)
        memories.append(read_memory(files, start, layer, primes[layer], width, gate))
    hashing = {"rows_per_head": sizes, "seed": seed, "pad_id": pad, "layers": layers}
    return published("deepseek-engram", "demo", orders, heads, memories, vocabulary, hashing, compressed or None)


def module_names(config: Config, files: TensorFiles, layers: tuple[int, ...]) -> dict[int, str]:
    """By layer, what its tensors' names begin with; the layers with a table must be those of the configuration."""
    if len(set(layers)) != len(layers):
        raise FamilyError(f"{config.path}: layers {list(layers)} name one twice")
    matches = [match for name in (*files.tensors, *files.absent) if (match := _PLACE.fullmatch(name))]
    ways = sorted({(match["start"], match["inner"]) for match in matches})
    if len(ways) != 1:
        names = ", ".join(f"{start}N.{inner}" for start, inner in ways) or "none"
        raise FamilyError(f"{files.path} has tables {_TABLE} under {len(ways)} names: {names}")
    start, inner = ways[0]
    places = sorted(int(match["place"]) for match in matches)
    listed = places != sorted(layers) and has(files, f"{start}0.weight")  # the demo's list of modules
    if places != sorted(layer + listed for layer in layers):
        one_based = places == sorted(layer - 1 for layer in layers)
        raise FamilyError(
            f"{files.path} has tables in the layers {places}, the configuration names {sorted(layers)}",
            hint="layers count from zero here, and the hash depends on their numbers: write them so"
            if one_based else "the configuration belongs to another checkpoint",
        )  # fmt: skip
    return {layer: f"{start}{layer + listed}.{inner}" for layer in layers}


def primes_of(
    config: Config, layers: tuple[int, ...], sizes: tuple[int, ...], heads: int
) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The moduli of every layer, where they are not too many to look for."""
    if (count := len(layers) * len(sizes) * heads) > MOST_PRIMES:
        raise FamilyError(
            f"{config.path}: {len(layers)} layers, {len(sizes)} orders and {heads} heads need {count:,} primes, at "
            f"most {MOST_PRIMES:,} are looked for"
        )
    return prime_moduli(list(layers), list(sizes), heads)


def read_memory(
    files: TensorFiles,
    start: str,
    layer: int,
    moduli: tuple[tuple[int, ...], ...],
    width: int,
    gate: Mapping[str, Wanted],
) -> Memory:
    """The tensors of one module: exactly these, in these shapes. Only the offsets, which follow, may be missing."""
    rows, columns = sum(map(sum, moduli)), sum(map(len, moduli))
    wanted: dict[str, Wanted] = {"table": (start + _TABLE, (rows, width), DTYPES), **gate}
    if has(files, start + _OFFSETS):
        wanted["offsets"] = (start + _OFFSETS, (columns,), ("I64",))
    known = {name for name, _, _ in wanted.values()}
    for name in (*files.tensors, *files.absent):
        if name.startswith(start) and name not in known:
            raise FamilyError(f"{files.path} has the tensor {name!r}, which its configuration does not ask for")
    found, absent = expect_here(files, wanted)
    if (values := found.pop("table", None)) is None:
        table = Table(layer, "F32", "f32", rows, width, (), (files.absent[start + _TABLE],))
    else:
        table = Table(layer, values.dtype, FLOATS.get(values.dtype), rows, width, (Part(0, rows, values),))
    stored = {f"{layer}.offsets": found.pop("offsets")} if "offsets" in found else {}
    return Memory(table, stored, found, tuple(name for name in absent if name != start + _TABLE))


def published(
    family: str,
    dialect: str,
    orders: tuple[int, ...],
    heads: int,
    memories: list[Memory],
    vocabulary: int,
    hashing: Mapping[str, object],
    compressed: int | None,
) -> Published:
    """All layers as one."""
    stored = {name: tensor for memory in memories for name, tensor in memory.stored.items()}
    return Published(
        family, dialect, orders, heads, memories[0].table.width, tuple(memory.table for memory in memories),
        vocabulary, hashing, compressed, stored=stored,
        dense={memory.table.layer: memory.dense for memory in memories},
        absent=tuple(name for memory in memories for name in memory.absent),
    )  # fmt: skip


def has(files: TensorFiles, name: str) -> bool:
    """Whether the checkpoint has a tensor, here or in a shard that is not."""
    return name in files.tensors or name in files.absent


def _size(files: TensorFiles, name: str, axis: int) -> int | None:
    """A tensor's size along an axis; None where it is not here, or has no such axis or nothing in it."""
    tensor = files.tensors.get(name)
    return tensor.shape[axis] or None if tensor is not None and axis < len(tensor.shape) else None


def _count(files: TensorFiles, start: str) -> int | None:
    """Key projections of a module, one for each stream."""
    names = (*files.tensors, *files.absent)
    return sum(name.startswith(start + "key_projs.") and name.endswith(".weight") for name in names) or None
