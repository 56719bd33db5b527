"""A GGUF under a memory that was made over another file of the same model: whether it fits, before it is attached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram import EngramError
from engram.builders.backbone import BackboneRef, backbone_facts
from engram.builders.gguf_header import read_metadata
from engram.builders.layout import Layout
from engram.builders.tokenizer import load_tokenizer

_SPACE = "\u2581"  # how SentencePiece spells a space; some files have the space itself
_HINT = "take a GGUF of the model that the memory was made for"


class AttachError(EngramError):
    """A GGUF that is not the model which the memory was made for."""


def attach(gguf: Path, source: Path, manifest: Mapping[str, Any], layout: Layout) -> BackboneRef:
    """A reference to `gguf` in the place of the backbone of the checkpoint or package in `source`.

    Its width and blocks must be those of the gates, and, with the architecture, those of the backbone that the manifest
    names where that one is here; every token id must mean what the checkpoint's tokenizer says. A text is tokenized by
    the checkpoint's tokenizer in any case, so that a GGUF's own merges do not matter. Raises AttachError where
    something differs, GgufHeaderError for a file that is no GGUF.
    """
    if manifest["backbone"]["kind"] == "none":
        raise AttachError(f"{source} holds converted tables without gates of ours: no backbone can use them",
                          hint="attach to a checkpoint of engram train or engram quantize")  # fmt: skip
    if gguf.suffix != ".gguf":
        raise AttachError(f"backbone {gguf} is no GGUF by its name", hint="give a FILE.gguf")
    facts = backbone_facts(gguf) if gguf.is_file() else {}
    if not facts:
        raise AttachError(f"backbone {gguf} does not exist", hint="give the path of a FILE.gguf")
    _check_gates(gguf, facts, manifest["gate"])
    before = BackboneRef.from_json(manifest["backbone"])
    place = before.place(source)
    for fact, wanted in (backbone_facts(place) if place is not None else {}).items():
        found = facts.get(fact)
        if fact != "vocabulary" and found != wanted:
            raise AttachError(f"{gguf} has {fact} {found!r}, the memory's backbone has {wanted!r}", hint=_HINT)
    rows = int(facts.get("vocabulary", 0))
    if rows < layout.vocab_size:
        raise AttachError(f"{gguf} embeds {rows} token ids, the layout has {layout.vocab_size}", hint=_HINT)
    _check_tokens(gguf, source)
    return BackboneRef.find(str(gguf), before.dtype)


def _check_gates(gguf: Path, facts: Mapping[str, int | str], gates: Mapping[str, Mapping[str, Any]]) -> None:
    width, blocks = facts.get("hidden size"), int(facts.get("blocks", 0))
    for layer, gate in gates.items():
        if gate["hidden"] != width or int(layer) > blocks:
            raise AttachError(
                f"the gate of layer {layer} is for a stream of {gate['hidden']}, {gguf} has one of {width} and "
                f"{blocks} blocks", hint=_HINT,
            )  # fmt: skip


def _check_tokens(gguf: Path, source: Path) -> None:
    """Compare what every id of the checkpoint's tokenizer stands for; a GGUF may have more of them."""
    found = read_metadata(gguf).get("tokenizer.ggml.tokens")
    if not isinstance(found, list):
        raise AttachError(f"{gguf} names no tokens (tokenizer.ggml.tokens)", hint=_HINT)
    vocabulary = load_tokenizer(source).get_vocab(with_added_tokens=True)
    other = sorted(
        (number, token) for token, number in vocabulary.items()
        if number >= len(found) or found[number].replace(" ", _SPACE) != token.replace(" ", _SPACE)
    )  # fmt: skip
    if other:
        number, token = other[0]
        theirs = repr(found[number]) if number < len(found) else f"nothing: it has {len(found)} tokens"
        raise AttachError(
            f"{len(other)} of {len(vocabulary)} token ids mean something else in {gguf}, the first is {number}: there "
            f"{theirs}, in the checkpoint's tokenizer {token!r}",
            hint="rows are hashed from these ids: " + _HINT,
        )
