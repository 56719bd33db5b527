"""`engram gates`: how far the gate of every layer opens at each token of a text, with the rows behind the token.

Shape letters: T tokens, M streams of the residual.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders.atomic import write_whole
from engram.builders.tokenizer import load_tokenizer
from engram.quantize.package import open_package
from engram.runtime.gates_page import page
from engram.runtime.gates_picture import check_room, draw
from engram.runtime.gates_scale import SCALES
from engram.runtime.generate import RunConfig, choose_engine, open_llama, open_torch
from engram.runtime.serve_explain import Explainer
from engram.runtime.slots import Feed, Slots
from engram.runtime.slots_torch import TorchSlots

SCHEMA = "engram-gates/1"
MOST_TOKENS = 8192
MOST_BYTES = 1 << 20
_CHUNK = 256  # tokens of one step


class GatesError(EngramError):
    """A text that makes no figure, or a file that the figure may not be written to."""


@dataclass(frozen=True)
class GatesConfig:
    """What `engram gates` needs to know. `text` may be a file's path."""

    package: Path
    text: str | Path
    html: Path | None = None
    png: Path | None = None
    scale: str = "full"
    force: bool = False
    offload: str = "disk"
    verify: str = "first-touch"
    table_io: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Refuse files that cannot be written, before anything is opened."""
        if self.scale not in SCALES:
            raise GatesError(f"scale {self.scale!r} is not known", hint="use one of: " + ", ".join(SCALES))
        for option, path in (("--html", self.html), ("--png", self.png)):
            if path is None:
                continue
            suffix = f".{option[2:]}"
            if path.suffix.lower() != suffix:
                raise GatesError(f"{option} {path} does not end in {suffix}", hint="the ending says what is written")
            if not path.parent.is_dir():
                raise GatesError(f"{option} {path}: the folder {path.parent} does not exist")
            if path.is_dir():
                raise GatesError(f"{option} {path} is a folder", hint="name a file")
            if os.path.lexists(path) and not self.force:
                raise GatesError(f"{option} {path} exists", hint="choose another name, or pass --force to replace it")


def gates(config: GatesConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Read a text, write the pictures asked for, and return the object of `engram gates --json` (docs/gates.md).

    Raises GatesError for a text that is empty, not UTF-8, or longer than the model's context or MOST_TOKENS.
    """
    progress = progress or Progress()
    text = _text(config.text)
    with open_package(config.package, verify="off") as package:
        found = load_tokenizer(package.folder).encode(text, add_special_tokens=False)
        if not found.ids:
            raise GatesError("the text is empty", hint="pass some with --text or --text-file")
        if len(found.ids) > MOST_TOKENS:
            raise GatesError(
                f"the text has {len(found.ids):,} tokens, a figure holds {MOST_TOKENS:,}", hint="cut the text"
            )
        texts = pieces(text, [end for _, end in found.offsets])
        if config.png is not None:
            check_room(texts, len(package.layout.layers))
        with progress.task(f"open {config.package.name}"):
            slots = _open(config, len(found.ids) + 1, progress)
        try:
            begin = slots.begin()
            ids = begin + found.ids
            if len(ids) > slots.context:
                raise GatesError(f"the text has {len(ids):,} tokens, the model's context holds {slots.context:,}",
                                 hint="cut the text")  # fmt: skip
            opened = read(slots, ids, package.layout.layers, progress)
            notes = _notes(Explainer(package, slots.tokenizer), ids, [""] * len(begin) + texts, opened)
            engine = "torch" if isinstance(slots, TorchSlots) else "llama.cpp"
            place = package.backbone.place(package.folder)
            backbone = place.name if place is not None and place.suffix == ".gguf" else package.backbone.path
        finally:
            slots.close()
        result: dict[str, Any] = {
            "schema": SCHEMA, "package": package.folder.resolve().name, "backbone": Path(backbone).name,
            "engine": engine, "orders": list(package.layout.orders), "scale": config.scale,
            "codecs": list(dict.fromkeys(name for note in notes for name in note["codec"].split(", "))),
            "layers": {
                str(layer): {"mean": float(gate_T.mean()), "lowest": float(gate_T.min()),
                             "highest": float(gate_T.max())} for layer, gate_T in opened.items()
            },
            "text": text, "tokens": notes,
        }  # fmt: skip
    _write(config, result, progress)
    return result


def _text(source: str | Path) -> str:
    """The text, with what is not UTF-8 in a command line replaced; GatesError for one that is large or no text."""
    name = "the text"
    if isinstance(source, str):
        content = source.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
    else:
        name = str(source)
        with source.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise GatesError(f"{name} has more than {MOST_BYTES:,} bytes: no figure holds its tokens", hint="cut it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as wrong:
        raise GatesError(f"{name} is not UTF-8 at byte {wrong.start:,}", hint="convert it") from None


def pieces(text: str, ends: Sequence[int]) -> list[str]:
    """The text cut where its tokens end: joined, it is the text again. Of a character's tokens the first gets it."""
    cuts = [0, *np.maximum.accumulate(np.array(ends, dtype=np.int64)).tolist()]
    cuts[-1] = len(text)  # what a tokenizer drops at the end
    return [text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]


def _open(config: GatesConfig, context: int, progress: Progress) -> Slots:
    """One timeline over the package's backbone, by the engine asked for."""
    wish = RunConfig(
        config.package, offload=config.offload, verify=config.verify, table_io=config.table_io, engine=config.engine
    )
    if choose_engine(wish, progress) == "llama":
        return open_llama(wish, context=context)
    return TorchSlots(open_torch(wish), 1)


def read(
    slots: Slots, ids: Sequence[int], layers: Sequence[int], progress: Progress | None = None
) -> dict[int, NDArray[np.float32]]:
    """How far the gate of each layer opens at every token, the mean of its streams: [T], from an empty slot 0 on.

    Where the engine computes a layer only at tokens whose logits are wanted, the text is read token by token.
    """
    progress = progress or Progress()
    seen: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}

    def watch(_: int, layer: int, opened_TM: NDArray[np.float32]) -> None:
        seen[layer].append(np.array(opened_TM, dtype=np.float32).mean(axis=-1))

    slots.watch = watch
    width, place = _CHUNK, 0
    with progress.task("read", len(ids), "tokens") as task:
        while place < len(ids):
            part = list(ids[place : place + (width if place else min(width, 2))])  # two tell whether all are computed
            slots.step([Feed(0, part)])
            short = [layer for layer in layers if sum(map(len, seen[layer])) != place + len(part)]
            if short and len(part) == 1:
                raise GatesError(f"the engine did not compute the gates of layers {short} at token {place}",
                                 hint="try --engine torch")  # fmt: skip
            if short:
                progress.say(f"layer {short[0]} is computed only where a token's logits are wanted: read one by one")
                slots.reuse(0, list(ids[:1]))
                seen |= {layer: [] for layer in layers}
                width, place = 1, 0
                continue
            place += len(part)
            task.advance(len(part))
    slots.watch = None
    return {layer: np.concatenate(parts) for layer, parts in seen.items()}


def _notes(
    explainer: Explainer, ids: list[int], texts: Sequence[str], opened: dict[int, NDArray[np.float32]]
) -> list[dict[str, Any]]:
    """A token each: its part of the text, and what `engram serve` says of it, gates with more digits."""
    found = []
    for at, text in enumerate(texts):
        recent = ids[max(0, at + 1 - explainer.context) : at + 1]
        gates = {layer: float(gate_T[at]) for layer, gate_T in opened.items()}
        exact = {str(layer): round(value, 6) for layer, value in gates.items()}
        found.append({"text": text, **explainer.token(recent, gates), "gates": exact})
    return found


def _write(config: GatesConfig, result: dict[str, Any], progress: Progress) -> None:
    """The files asked for, made before the first one is written."""
    contents = []
    if config.html is not None:
        contents.append((config.html, page(result).encode()))
    if config.png is not None:
        contents.append((config.png, draw(result, progress)))
    for path, content in contents:
        write_whole(path, content)
        result[path.suffix.lower().removeprefix(".")] = str(path)
