"""The hash layout: every constant that turns token ids into table rows; frozen, to and from JSON; numpy only.

Shape letters: B batch, T positions, J look-back positions kept, C columns (order-major, head-minor).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.builders import hash_constants
from engram.builders.atomic import write_whole
from engram.builders.hash_constants import DIALECTS, Dialect
from engram.kernels import dispatch, reference
from engram.kernels.reference import KernelError

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

VERSION = 1
_WHOLE = 1 << 63  # int64 ends below it


class LayoutError(EngramError):
    """A layout that cannot be built, read or applied."""


@dataclass(frozen=True)
class Lookback:
    """What the next call must know of the tokens before it: the last J compressed ids and where the walk stops."""

    ids_BJ: Ints
    start_BJ: Flags
    stop_BJ: Flags


@dataclass(frozen=True)
class Layout:
    """Dialect and constants of one model's memory; `rows` is the one function that everything else needs.

    `primes` are the moduli of all columns, which only some dialects choose to be prime. A layer has one multiplier for
    each distance; in longcat as many for each column, column after column.
    """

    dialect: str
    orders: tuple[int, ...]
    heads: int
    head_dim: int
    layers: tuple[int, ...]
    seed: int
    pad_id: int
    vocab_size: int
    compressed_size: int
    token_map: Ints | None = field(repr=False)
    multipliers: dict[int, tuple[int, ...]]
    primes: dict[int, tuple[tuple[int, ...], ...]]
    table_rows: dict[int, int]
    reset_id: int | None = None
    dead_ids: tuple[int, ...] = ()
    tokenizer_sha256: str = ""

    def __post_init__(self) -> None:
        """Refuse constants that contradict each other."""
        _check_choices(self.dialect, self.orders, self.layers, self.heads)
        for name in ("head_dim", "vocab_size", "compressed_size"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.pad_id < self.vocab_size:
            raise LayoutError(f"pad_id {self.pad_id} is outside the vocabulary of {self.vocab_size} ids")
        if self.token_map is not None and self.token_map.shape != (self.vocab_size,):
            raise LayoutError(f"token map has shape {self.token_map.shape}, vocab_size {self.vocab_size} asks for one")
        if self.rules.raw and self.token_map is not None:
            raise LayoutError(f"dialect {self.dialect!r} hashes raw ids", hint="pass no token map")
        if self.rules.resets and self.reset_id is None:
            raise LayoutError(f"dialect {self.dialect!r} resets at a token", hint="pass a reset_id")
        if self.dialect == "identity" and (self.orders != (1,) or self.dead_ids):
            raise LayoutError(
                "dialect 'identity' has rows of its own for every id: orders [1] and no dead_ids, found "
                f"{list(self.orders)} and {list(self.dead_ids)}"
            )
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: int) -> None:
        multipliers, primes = self.multipliers.get(layer, ()), self.primes.get(layer, ())
        wanted = self.orders[-1] * (self.columns if self.rules.sums else 1)
        if len(multipliers) != wanted:
            raise LayoutError(
                f"layer {layer} has {len(multipliers)} multipliers, {wanted} are needed: the highest order is "
                f"{self.orders[-1]}{f', each of {self.columns} columns has its own' if self.rules.sums else ''}"
            )
        if not all(-_WHOLE <= multiplier < _WHOLE for multiplier in multipliers):
            raise LayoutError(f"layer {layer} has a multiplier that does not fit 64 bits: {multipliers}")
        if [len(heads) for heads in primes] != [self.heads] * len(self.orders):
            raise LayoutError(f"layer {layer} needs {self.heads} primes for each of the orders {list(self.orders)}")
        needed = sum(sum(heads) for heads in primes) // (self.heads if self.dialect == "identity" else 1)
        if self.table_rows.get(layer, -1) < needed or min(min(heads) for heads in primes) < 1:
            raise LayoutError(f"layer {layer} stores {self.table_rows.get(layer)} rows, its primes need {needed}")
        if self.table_rows[layer] >= _WHOLE:
            raise LayoutError(f"layer {layer} stores {self.table_rows[layer]} rows, which does not fit 64 bits")
        if self.rules.sums:
            self._check_sums(layer)
        if self.dialect == "identity" and (
            multipliers != (self.heads,) or self.vocab_size * self.heads > needed or len(set(primes[0])) > 1
        ):
            raise LayoutError(
                f"layer {layer} has the multiplier {multipliers[0]} and {needed} rows for {self.vocab_size} ids: in "
                f"dialect 'identity' rows are {self.heads} * id + head"
            )

    def _check_sums(self, layer: int) -> None:
        """Refuse multipliers outside their modulus, and sums that would wrap: the rows would be others, not errors."""
        top = self.orders[-1]
        for column, modulus in enumerate(prime for heads in self.primes[layer] for prime in heads):
            own = self.multipliers[layer][column * top : (column + 1) * top]
            if min(own) < 0 or max(own) >= modulus or any(own[self.orders[column // self.heads] :]):
                raise LayoutError(
                    f"layer {layer}, column {column}: multipliers {list(own)} must be below its modulus {modulus}, "
                    f"not below 0, and 0 from its order {self.orders[column // self.heads]} on"
                )
            if sum(own) * (self.vocab_size - 1) >= _WHOLE:
                raise LayoutError(
                    f"layer {layer}, column {column}: {self.vocab_size} ids times multipliers {list(own)} do not fit "
                    "64 bits"
                )

    @classmethod
    def build(
        cls,
        *,
        dialect: str,
        orders: Sequence[int],
        heads: int,
        head_dim: int,
        layers: Sequence[int],
        pad_id: int,
        vocab_size: int,
        rows_per_head: int | Sequence[int] | None = None,
        moduli: Sequence[int] | None = None,
        multipliers: Sequence[int] | None = None,
        primes: Sequence[int] | None = None,
        multiple: int | None = None,
        table_rows: Mapping[int, int] | None = None,
        seed: int = 0,
        token_map: Ints | None = None,
        compressed_size: int | None = None,
        reset_id: int | None = None,
        dead_ids: Sequence[int] = (),
        tokenizer_sha256: str = "",
    ) -> Layout:
        """Derive multipliers and moduli by the dialect's rules, from what its published checkpoints state.

        demo, v41, engram-peft, qwen-ple: `rows_per_head` is where the search for primes starts, one number or one for
        each order. identity: `rows_per_head` is the number of ids that have rows; without it, all. longcat: the
        `moduli` of all columns, order-major, the same in every layer. Any dialect: `multipliers` and `primes`, as they
        are stored for its only layer, order-major. `vocab_size` is the number of raw ids. `compressed_size` bounds the
        multipliers; without it, it is one more than the largest id of the token map. `table_rows` are those stored, by
        layer; without them they are the sums of the moduli, up to the next multiple of `multiple` (without it: the
        dialect's).

        Raises LayoutError where a value breaks a rule.
        """
        _check_choices(dialect, orders, layers, heads)
        if multiple is not None and multiple < 1:
            raise LayoutError(f"multiple {multiple} must be at least 1")
        if (compressed := compressed_size) is None:
            compressed = vocab_size if token_map is None else int(token_map.max()) + 1
        by_layer, moduli_by_layer = _constants(
            dialect, orders, heads, layers, compressed, seed, rows_per_head, moduli, multipliers, primes
        )
        if table_rows is None:
            multiple = DIALECTS[dialect].multiple if multiple is None else multiple
            shared = heads if dialect == "identity" else 1  # heads of the same rows
            sums = {layer: sum(map(sum, moduli_by_layer[layer])) // shared for layer in layers}
            table_rows = {layer: -(-rows // multiple) * multiple for layer, rows in sums.items()}
        return cls(
            dialect=dialect, orders=tuple(orders), heads=heads, head_dim=head_dim, layers=tuple(layers), seed=seed,
            pad_id=pad_id, vocab_size=vocab_size, compressed_size=compressed,
            token_map=None if token_map is None else np.ascontiguousarray(token_map, dtype=np.int64),
            multipliers=by_layer, primes=moduli_by_layer, table_rows=dict(table_rows), reset_id=reset_id,
            dead_ids=tuple(dead_ids), tokenizer_sha256=tokenizer_sha256,
        )  # fmt: skip

    @property
    def rules(self) -> Dialect:
        """What sets its dialect apart."""
        return DIALECTS[self.dialect]

    @property
    def columns(self) -> int:
        """Rows that one token reads in one layer."""
        return len(self.orders) * self.heads

    @property
    def memory_width(self) -> int:
        """Width E of `memory_BTE`: the rows of all columns side by side."""
        return self.columns * self.head_dim

    def offsets(self, layer: int) -> Ints:
        """First row of every column in the layer's table, int64 [C]."""
        if self.dialect == "identity":  # all heads of an id side by side
            return np.arange(self.heads, dtype=np.int64)
        flat = [prime for heads in self.primes[layer] for prime in heads]
        return np.cumsum([0, *flat[:-1]], dtype=np.int64)

    @cached_property
    def _hashers(self) -> dict[str, reference.Hasher]:
        """Hashers by path of the kernels, made when first used."""
        return {}

    def _hasher(self) -> reference.Hasher:
        if (path := dispatch.name()) not in self._hashers:
            fill = self.reset_id if self.rules.fill is None else self.rules.fill
            if fill is None:
                fill = self.pad_id if self.token_map is None else int(self.token_map[self.pad_id])
            self._hashers[path] = dispatch.ops().Hasher(
                token_map=self.token_map, vocab_size=self.vocab_size, negative_ids=not self.rules.raw,
                orders=self.orders, heads=self.heads, multipliers=[self.multipliers[layer] for layer in self.layers],
                primes=[[prime for heads in self.primes[layer] for prime in heads] for layer in self.layers],
                offsets=[self.offsets(layer).tolist() for layer in self.layers], dead_ids=self.dead_ids,
                dead_negative=self.rules.dead_negative, reset_id=self.reset_id, fill=fill, sums=self.rules.sums,
                oldest_first=self.rules.oldest_first,
            )  # fmt: skip
        return self._hashers[path]

    def compress(self, ids_BT: Ints) -> Ints:
        """Compressed ids, elementwise; negative ids pass through where ids may be compressed.

        Raises LayoutError for any other id outside the vocabulary.
        """
        try:
            return self._hasher().compress(np.asarray(ids_BT, dtype=np.int64))
        except KernelError as wrong:
            raise LayoutError(str(wrong), hint=wrong.hint) from None

    def flags(self, ids_BT: Ints) -> tuple[Flags, Flags]:
        """Where a look-back may not begin (dead ids), and where it may not go."""
        return self._hasher().flags(ids_BT)

    @cached_property
    def _nothing(self) -> Lookback:
        """Before the beginning of one text."""
        kept = self.orders[-1] - 1
        nothing = np.zeros((1, kept), dtype=bool)
        return Lookback(np.zeros((1, kept), dtype=np.int64), nothing, ~nothing)

    def _beginning(self, batch: int) -> Lookback:
        one = self._nothing
        if batch == 1:
            return one
        ids, start, stop = (np.repeat(part, batch, axis=0) for part in (one.ids_BJ, one.start_BJ, one.stop_BJ))
        return Lookback(ids.astype(np.int64), start.astype(bool), stop.astype(bool))

    def rows(
        self,
        ids_BT: NDArray[Any],
        history: Lookback | None = None,
        *,
        start_BT: Flags | None = None,
        local: bool = False,
        layers: Sequence[int] | None = None,
    ) -> dict[int, Ints]:
        """Row ids of every position, by layer: int64 [B, T, C], absolute in the layer's table unless `local`.

        `history` carries the tokens before this call (none: the text begins here). `start_BT` marks positions that
        begin a document or are left padding: no look-back crosses into what lies before them.

        Raises LayoutError for an id outside the vocabulary.
        """
        raw = np.asarray(ids_BT, dtype=np.int64)
        before = self._beginning(len(raw)) if history is None else history
        wanted, places = self.layers, list(range(len(self.layers)))
        if layers is not None:
            wanted = tuple(layers)
            places = [self.layers.index(layer) for layer in wanted]
        start = None if start_BT is None else np.asarray(start_BT, dtype=bool)
        try:
            found = self._hasher().rows(raw, start, before.ids_BJ, before.start_BJ, before.stop_BJ, places, local)
        except KernelError as wrong:
            raise LayoutError(str(wrong), hint=wrong.hint) from None
        return dict(zip(wanted, found, strict=True))

    def history(self, ids_BT: NDArray[Any], history: Lookback | None = None, start_BT: Flags | None = None) -> Lookback:
        """What a following call needs to know after these ids."""
        kept = self.orders[-1] - 1
        raw = np.asarray(ids_BT, dtype=np.int64)
        before = self._beginning(raw.shape[0]) if history is None else history
        last = slice(max(0, raw.shape[1] - kept), None)
        raw = raw[:, last]
        begin = raw.shape[1]  # the last J of J + T positions
        _, stop = self.flags(raw)
        start = np.zeros(raw.shape, dtype=bool) if start_BT is None else np.asarray(start_BT, dtype=bool)[:, last]
        return Lookback(
            np.concatenate([before.ids_BJ, self.compress(raw)], axis=1)[:, begin:],
            np.concatenate([before.start_BJ, start], axis=1)[:, begin:],
            np.concatenate([before.stop_BJ, stop], axis=1)[:, begin:],
        )

    def map_sha256(self) -> str:
        """SHA-256 of the token map as little-endian int64, or of nothing where raw ids are hashed."""
        return hashlib.sha256(b"" if self.token_map is None else self.token_map.astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Everything but the token map itself, which is named by its SHA-256."""
        return {
            "version": VERSION, "dialect": self.dialect, "orders": list(self.orders), "heads": self.heads,
            "head_dim": self.head_dim, "layers": list(self.layers), "seed": self.seed, "pad_id": self.pad_id,
            "vocab_size": self.vocab_size, "compressed_size": self.compressed_size,
            "compressed": self.token_map is not None, "token_map_sha256": self.map_sha256(),
            "multipliers": {str(layer): list(values) for layer, values in self.multipliers.items()},
            "primes": {str(layer): [list(heads) for heads in values] for layer, values in self.primes.items()},
            "table_rows": {str(layer): rows for layer, rows in self.table_rows.items()},
            "reset_id": self.reset_id, "dead_ids": list(self.dead_ids), "tokenizer_sha256": self.tokenizer_sha256,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any], token_map: Ints | None) -> Layout:
        """The inverse of `to_json`; refuses other versions, missing fields and a token map of another hash."""
        if data.get("version") != VERSION:
            raise LayoutError(f"layout has version {data.get('version')!r}, this release reads {VERSION}")
        try:
            layout = cls(
                dialect=data["dialect"], orders=tuple(data["orders"]), heads=data["heads"], head_dim=data["head_dim"],
                layers=tuple(data["layers"]), seed=data["seed"], pad_id=data["pad_id"], vocab_size=data["vocab_size"],
                compressed_size=data["compressed_size"], token_map=token_map,
                multipliers={int(layer): tuple(values) for layer, values in data["multipliers"].items()},
                primes={int(layer): tuple(map(tuple, values)) for layer, values in data["primes"].items()},
                table_rows={int(layer): rows for layer, rows in data["table_rows"].items()},
                reset_id=data["reset_id"], dead_ids=tuple(data["dead_ids"]),
                tokenizer_sha256=data["tokenizer_sha256"],
            )  # fmt: skip
            expected = data["token_map_sha256"]
        except KeyError as missing:
            raise LayoutError(f"layout lacks the field {missing.args[0]!r}") from None
        except (TypeError, ValueError, AttributeError) as wrong:
            raise LayoutError(f"layout has a field of the wrong type: {wrong}") from None
        if layout.map_sha256() != expected:
            raise LayoutError(
                f"token map has SHA-256 {layout.map_sha256()}, the layout names {expected}",
                hint="token_map.safetensors belongs to another layout or was altered",
            )
        return layout

    def save(self, folder: Path) -> None:
        """Write layout.json and, where ids are compressed, token_map.safetensors."""
        self.save_map(folder)
        write_whole(folder / "layout.json", (json.dumps(self.to_json(), indent=1) + "\n").encode())

    def save_map(self, folder: Path) -> None:
        """Write token_map.safetensors (tensor `token_map`, I64 [vocab_size]) where ids are compressed."""
        if self.token_map is not None:
            from safetensors.numpy import save

            write_whole(folder / "token_map.safetensors", save({"token_map": self.token_map}))

    @classmethod
    def load(cls, folder: Path) -> Layout:
        """From a layout folder, a checkpoint or a package."""
        for name in ("layout.json", "engram.json"):
            if (folder / name).is_file():
                break
        else:
            raise LayoutError(
                f"{folder} holds neither layout.json nor engram.json", hint="make one with: engram build-vocab"
            )
        try:
            data = json.loads((folder / name).read_bytes())
            data = data["layout"] if name == "engram.json" else data
        except (ValueError, KeyError, TypeError) as wrong:
            raise LayoutError(f"{folder / name} is not a layout: {wrong!r}") from None
        return cls.from_json(data, read_token_map(folder / "token_map.safetensors") if data.get("compressed") else None)


def _constants(
    dialect: str, orders: Sequence[int], heads: int, layers: Sequence[int], hashed_ids: int, seed: int,
    rows_per_head: int | Sequence[int] | None, moduli: Sequence[int] | None, multipliers: Sequence[int] | None,
    primes: Sequence[int] | None,
) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[tuple[int, ...], ...]]]:  # fmt: skip
    """Multipliers and moduli of every layer; see Layout.build, which has the words for what may be given."""

    def by_order(flat: Sequence[int], name: str) -> tuple[tuple[int, ...], ...]:
        if len(flat) != len(orders) * heads:
            raise LayoutError(f"{name} has {len(flat)} numbers, orders {list(orders)} need {heads} each")
        return tuple(tuple(map(int, flat[i : i + heads])) for i in range(0, len(flat), heads))

    given = {"rows_per_head": rows_per_head, "moduli": moduli, "multipliers": multipliers, "primes": primes}
    named = [name for name, value in given.items() if value is not None]
    if multipliers is not None and primes is not None and len(named) == 2:
        if len(layers) != 1:
            raise LayoutError(f"multipliers and primes are those of one layer, found the layers {list(layers)}")
        return {layers[0]: tuple(map(int, multipliers))}, {layers[0]: by_order(primes, "primes")}
    wanted = "moduli" if DIALECTS[dialect].sums else "rows_per_head"
    if named != [wanted] and not (dialect == "identity" and not named):
        raise LayoutError(
            f"dialect {dialect!r} takes {wanted}, or multipliers and primes; found {' and '.join(named) or 'neither'}"
        )
    if moduli is not None:
        sizes = by_order(moduli, "moduli")
        if min(moduli) < 1:
            raise LayoutError(f"moduli {list(moduli)} must be at least 1")
        powers = hash_constants.power_multipliers(hashed_ids, orders, [int(modulus) for modulus in moduli])
        return dict.fromkeys(layers, powers), dict.fromkeys(layers, sizes)
    starts = hashed_ids if rows_per_head is None else rows_per_head
    sizes_O = [starts] * len(orders) if isinstance(starts, int) else list(starts)
    if len(sizes_O) != len(orders) or min(sizes_O, default=0) < 1:
        raise LayoutError(f"rows_per_head {sizes_O} must be one positive number, or one for each of {list(orders)}")
    if dialect == "identity":
        return dict.fromkeys(layers, (heads,)), dict.fromkeys(layers, ((sizes_O[0] * heads,) * heads,))
    if dialect == "qwen-ple":
        made = {
            layer: hash_constants.splitmix_multipliers(hashed_ids, place, orders[-1], seed)
            for place, layer in enumerate(layers)
        }
    else:
        made = {layer: hash_constants.pcg_multipliers(hashed_ids, layer, orders[-1], seed) for layer in layers}
    return made, hash_constants.prime_moduli(list(layers), sizes_O, heads)


def _check_choices(dialect: str, orders: Sequence[int], layers: Sequence[int], heads: int) -> None:
    if dialect not in DIALECTS:
        raise LayoutError(f"dialect {dialect!r} is not known", hint="use one of: " + ", ".join(sorted(DIALECTS)))
    if heads < 1:
        raise LayoutError(f"heads {heads} must be at least 1")
    if not orders or min(orders) < 1 or list(orders) != sorted(set(orders)):
        raise LayoutError(f"orders {list(orders)} must be ascending numbers of at least 1, each once")
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise LayoutError(f"layers {list(layers)} must be block numbers from 0, each once, at least one")


def read_token_map(path: Path) -> Ints:
    """The I64 tensor `token_map` of a safetensors file; LayoutError where it is missing or of another kind."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        token_map = load_file(path)["token_map"]
    except (OSError, SafetensorError, KeyError) as wrong:
        raise LayoutError(f"{path} holds no readable tensor 'token_map': {wrong}") from None
    if token_map.dtype != np.int64 or token_map.ndim != 1 or not token_map.size or int(token_map.min()) < 0:
        raise LayoutError(f"{path}: 'token_map' must be one axis of non-negative I64, found {token_map.dtype}")
    return token_map
