"""LongCat-Flash-Lite (`longcat_flash_ngram`): twelve small tables, summed with the word's embedding at the input.

Raw ids; table i = (order - 2) * heads + head holds ratio * vocabulary + 2 i + 1 rows, a number that is odd but no
prime. A text ends at end-of-sequence. There is no gate: every row goes through a projection of its own.
"""

from __future__ import annotations

import re

from engram.builders.families.config import MOST_HEADS, MOST_ORDER, Config, FamilyError
from engram.builders.families.family import FLOATS, Part, Published, Table, expect, expect_here
from engram.builders.tensor_files import TensorFiles

MODEL_TYPES = ("longcat_flash_ngram",)
_NAMES = (  # of a table and its projection, as seen in the wild
    (re.compile(r"(?P<start>.*)ngram_embeddings\.embedders\.(?P<i>\d+)\.weight"),
     "ngram_embeddings.post_projs.{}.weight"),
    (re.compile(r"(?P<start>.*)oe_embed_tokens(?P<i>\d+)\.weight"), "oe_embed_proj{}.weight"),
)  # fmt: skip


def describe(config: Config, files: TensorFiles) -> Published:
    """The tables as one, row after row, and their projections. Raises FamilyError for what does not fit, by name."""
    vocabulary, hidden = config.number("vocab_size", least=1), config.number("hidden_size", least=1)
    ratio = config.number("ngram_vocab_size_ratio", least=1)
    highest = config.number("emb_neighbor_num", "oe_neighbor_num", least=2, most=MOST_ORDER)
    heads = config.number("emb_split_num", "oe_split_num", least=1, most=MOST_HEADS)
    end = config.number("eos_token_id")
    for name in ("ngram_exclude_sp_token", "special_token_scope", "ngram_fix_normalize_factor"):
        config.refuse(name, False)
    orders = tuple(range(2, highest + 1))
    columns = len(orders) * heads
    if hidden % columns:
        raise FamilyError(f"{config.path}: hidden_size {hidden} does not divide by {columns} tables")
    width = hidden // columns
    found, start, projection = _tables(files)
    if sorted(found) != list(range(columns)):
        raise FamilyError(
            f"{files.path} has the n-gram tables {sorted(found)}, config.json asks for 0 to {columns - 1}"
        )
    sizes = [ratio * vocabulary + 2 * i + 1 for i in range(columns)]
    parts, dtypes, reached = [], set(), 0
    absent: dict[str, None] = {}
    for i, size in enumerate(sizes):
        if found[i] in files.absent:
            absent[files.absent[found[i]]] = None
        else:
            tensor = expect(files, found[i], (size, width), tuple(FLOATS))
            dtypes.add(tensor.dtype)
            parts.append(Part(reached, size, tensor))
        reached += size
    names = [start + projection.format(i) for i in range(columns)]
    dense, missing = expect_here(
        files, {f"post_proj.{i}": (name, (hidden, width), tuple(FLOATS)) for i, name in enumerate(names)}
    )
    if len(dtypes) > 1:
        raise FamilyError(f"{files.path}: the n-gram tables have several dtypes: {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop() if dtypes else "BF16"
    table = Table(0, dtype, FLOATS[dtype], reached, width, tuple(parts), tuple(absent))
    hashing = {"moduli": tuple(sizes), "pad_id": 0, "reset_id": end, "layers": (0,)}
    return Published("longcat_flash_ngram", "longcat", orders, heads, width, (table,), vocabulary, hashing,
                     dense={0: dense}, absent=missing)  # fmt: skip


def _tables(files: TensorFiles) -> tuple[dict[int, str], str, str]:
    """Table number → tensor name; what stands before all of them; the name of a projection."""
    for pattern, projection in _NAMES:
        matches = {name: m for name in (*files.tensors, *files.absent) if (m := pattern.fullmatch(name))}
        if matches:
            starts = {m["start"] for m in matches.values()}
            if len(starts) > 1:
                raise FamilyError(f"{files.path} has n-gram tables under several names: {', '.join(sorted(starts))}")
            return {int(m["i"]): name for name, m in matches.items()}, starts.pop(), projection
    raise FamilyError(f"{files.path} has no tensor ngram_embeddings.embedders.N.weight or oe_embed_tokensN.weight")
