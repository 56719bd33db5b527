"""The exact tokenizer inside a GGUF, rebuilt for the `tokenizers` library.

Two kinds are known. `gpt2`: byte-level BPE whose pre-tokenizer is only named (`tokenizer.ggml.pre`), so each name needs
its rule here. `llama`: SentencePiece pieces with scores and no merges; the merges follow from the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engram import EngramError
from engram.builders.gguf_header import read_metadata

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # llama.cpp's token types that change the build
SPACE = "\u2581"


class GgufTokenizerError(EngramError):
    """A GGUF whose tokenizer is missing, contradictory, or of a kind that cannot be rebuilt exactly."""


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _digits_then_byte_level,
}


def rebuild(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF, added and special tokens complete, ids equal to llama.cpp's.

    Raises GgufHeaderError for a broken file and GgufTokenizerError for a tokenizer that cannot be rebuilt exactly.
    """
    meta = read_metadata(path)
    tokens, types = _tokens(meta, path)
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(meta, tokens, path)
    elif kind == "llama":
        tokens = [t.replace(" ", SPACE) if types[i] == USER_DEFINED else t for i, t in enumerate(tokens)]
        tokenizer = _scored_pieces(meta, tokens, types, path)
    else:
        raise GgufTokenizerError(
            f"{path.name}: tokenizer.ggml.model is {kind!r}, known are 'gpt2' and 'llama'",
            hint="pass the model's own tokenizer.json with --tokenizer",
        )
    tokenizer.add_tokens(
        [
            AddedToken(tokens[i], special=bool(types[i] == CONTROL), normalized=False)
            for i in np.flatnonzero(np.isin(types, (CONTROL, USER_DEFINED)))
        ]
    )
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise GgufTokenizerError(f"{path.name}: {len(tokens)} tokens, but some texts occur twice")
    bos = special_tokens(path, meta)
    if bos["add_bos"]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos["bos"], "$A"], pair=[bos["bos"], "$A", bos["bos"], "$B"],
            special_tokens=[(bos["bos"], bos["bos_id"])],
        )  # fmt: skip
    return tokenizer


def special_tokens(path: Path, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    """bos, eos, pad (text and `_id`), `add_bos` and `chat_template` as the GGUF states them; None where it does not."""
    meta = read_metadata(path) if meta is None else meta
    tokens, _ = _tokens(meta, path)
    out: dict[str, Any] = {}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = meta.get(f"tokenizer.ggml.{field}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise GgufTokenizerError(
                f"{path.name}: tokenizer.ggml.{field}_token_id is {number!r}, the vocabulary has {len(tokens)} ids"
            )
        out[name], out[f"{name}_id"] = (None if number is None else tokens[number]), number
    default = meta.get("tokenizer.ggml.model") == "llama"  # llama.cpp's own default
    out["add_bos"] = bool(meta.get("tokenizer.ggml.add_bos_token", default)) and out["bos_id"] is not None
    template = meta.get("tokenizer.chat_template")
    out["chat_template"] = template if isinstance(template, str) else None
    return out


def _tokens(meta: dict[str, Any], path: Path) -> tuple[list[str], np.ndarray[Any, np.dtype[Any]]]:
    tokens, types = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise GgufTokenizerError(
            f"{path.name}: the field 'tokenizer.ggml.tokens' is missing or no list of strings",
            hint="this GGUF carries no tokenizer; pass a tokenizer.json",
        )
    if not isinstance(types, np.ndarray) or types.shape != (len(tokens),):
        raise GgufTokenizerError(f"{path.name}: 'tokenizer.ggml.token_type' must hold {len(tokens)} numbers")
    return tokens, types


def _byte_level_bpe(meta: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    pre, merges = meta.get("tokenizer.ggml.pre"), meta.get("tokenizer.ggml.merges")
    if pre not in PRE_TOKENIZERS:
        raise GgufTokenizerError(
            f"{path.name}: tokenizer.ggml.pre is {pre!r}, known are {', '.join(sorted(PRE_TOKENIZERS))}",
            hint="another pre-tokenizer would give other ids; pass the model's own tokenizer.json with --tokenizer",
        )
    if not isinstance(merges, list):
        raise GgufTokenizerError(f"{path.name}: the field 'tokenizer.ggml.merges' is missing or no list of strings")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise GgufTokenizerError(f"{path.name}: every entry of 'tokenizer.ggml.merges' must be two pieces and a space")
    tokenizer = Tokenizer(_bpe(path, {text: i for i, text in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _scored_pieces(
    meta: dict[str, Any], tokens: list[str], types: np.ndarray[Any, np.dtype[Any]], path: Path
) -> Tokenizer:
    scores = meta.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
        raise GgufTokenizerError(f"{path.name}: 'tokenizer.ggml.scores' must hold {len(tokens)} numbers")
    scores = np.where(types == USER_DEFINED, 0.0, scores)  # SentencePiece matches these before all others
    vocab = {text: i for i, text in enumerate(tokens)}
    unknown = [tokens[i] for i in np.flatnonzero(types == UNKNOWN)[:1]]
    tokenizer = Tokenizer(
        _bpe(
            path, vocab, _merges(vocab, scores.tolist()),
            unk_token=unknown[0] if unknown else None, fuse_unk=True, byte_fallback=bool(np.any(types == BYTE)),
        )
    )  # fmt: skip
    replace = normalizers.Replace(" ", SPACE)
    prefixed = bool(meta.get("tokenizer.ggml.add_space_prefix", True))  # llama.cpp's default for this kind
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first: SentencePiece's BPE in the form of merges.

    Order: score of the whole, then length of the left and of the right piece, all descending, then the ids; the
    order in which transformers converts SentencePiece models, so that the result equals a published tokenizer.json.
    """
    found: list[tuple[float, int, int, int, int, int, str, str]] = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                rank = (-scores[number], -len(left), -len(right), number, vocab[left], vocab[right])
                found.append((*rank, left, right))
    found.sort()
    return [entry[-2:] for entry in found]


def _bpe(path: Path, vocab: dict[str, int], merges: list[Any], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as wrong:  # the library raises plain Exception for a merge outside the vocabulary
        raise GgufTokenizerError(f"{path.name}: vocabulary and merges do not fit together: {wrong}") from None
