"""The hash layout of a published memory, recomputed and compared with everything that its checkpoint says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram.builders.families.config import FamilyError
from engram.builders.families.family import Published
from engram.builders.layout import Layout
from engram.builders.tensor_files import Tensor


def compresses(found: Published) -> bool:
    """Whether compressed ids are hashed: in demo and v41 always, in engram-peft where the adapter says so."""
    return found.dialect in ("demo", "v41") or (found.dialect == "engram-peft" and found.compressed_size is not None)


def layout_of(found: Published, folder: Path, tokenizer: str | Path | None = None) -> Layout:
    """Every constant of the hash, from configuration and tokenizer alone, equal to what the checkpoint stores.

    `tokenizer` is a folder, tokenizer.json or hub name; without it, it is looked for in `folder`. It is needed where
    ids are compressed. Raises FamilyError naming the constant that disagrees: one other number, and every row is
    another row.
    """
    compressed = None
    if compresses(found):
        from engram.builders.tokenizer import load_tokenizer, tokenizer_bytes
        from engram.builders.vocab import compress_vocabulary

        source = tokenizer or _tokenizer_in(folder)
        compressed = compress_vocabulary(load_tokenizer(source), added=found.dialect != "engram-peft")
        if found.compressed_size not in (None, compressed.size):
            raise FamilyError(
                f"tokenizer {source} compresses to {compressed.size:,} ids, the checkpoint says "
                f"{found.compressed_size:,}: every row would be another one",
                hint="give the tokenizer that the model was trained with: --tokenizer",
            )
        tokenizer_sha256 = _sha256(tokenizer_bytes(source))
    vocabulary = found.vocab_size if compressed is None else len(compressed.token_map)
    hashing = dict(found.hashing)
    if "multipliers" in hashing:  # of a GGUF, which pads its table as it likes
        hashing["table_rows"] = {table.layer: table.rows for table in found.tables}
    layout = Layout.build(
        dialect=found.dialect, orders=found.orders, heads=found.heads, head_dim=found.head_dim, vocab_size=vocabulary,
        token_map=None if compressed is None else compressed.token_map,
        compressed_size=None if compressed is None else compressed.size,
        tokenizer_sha256="" if compressed is None else tokenizer_sha256, **hashing,
    )  # fmt: skip
    for table in found.tables:
        if (derived := layout.table_rows[table.layer]) != table.rows:
            raise FamilyError(f"layer {table.layer} stores {table.rows:,} rows, its constants make {derived:,}")
    compare_stored(found, layout)
    return layout


def compare_stored(found: Published, layout: Layout) -> None:
    """Refuse a layout that differs from the hash constants that the checkpoint holds as tensors."""
    for name, tensor in found.stored.items():
        layer, constant = name.split(".")
        derived = {
            "multipliers": lambda n: np.array(layout.multipliers[n], dtype=np.int64),
            "primes": lambda n: np.array([prime for heads in layout.primes[n] for prime in heads], dtype=np.int64),
            "offsets": layout.offsets,
        }[constant](int(layer))
        stored = read_integers(tensor)
        if not np.array_equal(stored, derived):
            place = int(np.flatnonzero(stored != derived)[0]) if stored.shape == derived.shape else 0
            raise FamilyError(
                f"{tensor.file}: the {constant} of layer {layer} are {stored.tolist()}, the configuration makes "
                f"{derived.tolist()} (they differ at {place})",
                hint="the configuration belongs to another checkpoint, or its seed or vocabulary size was changed",
            )


def read_integers(tensor: Tensor) -> NDArray[np.int64]:
    """The numbers of a small I64 tensor."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.bytes), dtype="<i8").astype(np.int64)


def _tokenizer_in(folder: Path) -> Path:
    path = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
    if not path.is_file():
        raise FamilyError(
            f"{path} does not exist: this family hashes compressed ids, which the tokenizer makes",
            hint="fetch tokenizer.json too, or name it with --tokenizer",
        )
    return path


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
