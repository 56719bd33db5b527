"""The compressed vocabulary: tokens with the same normal form share one id.

The rule is that of DeepSeek's Engram demo, of DeepSeek-V4.1 and of engram-peft: NFKC, NFD, all marks stripped, lower
case, white space collapsed and trimmed; ids are numbered in the order in which their keys first occur.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers

from engram import EngramError

PROTECTED = "\ue000"  # stands for a token that is exactly one space, while the ends are trimmed


class VocabError(EngramError):
    """A tokenizer whose vocabulary cannot be compressed."""


@dataclass(frozen=True)
class Compressed:
    """Raw id → compressed id, int64 [V]; `size` compressed ids; `sha256` of the map as little-endian int64."""

    token_map: NDArray[np.int64]
    size: int
    sha256: str

    @property
    def reduction(self) -> float:
        """Share of ids that the compression saves, 0 … 1."""
        return 1.0 - self.size / len(self.token_map)


def normalizer() -> normalizers.Normalizer:
    """The normal form of a token's text; the order of the steps matters."""
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), PROTECTED),
            normalizers.Strip(),
            normalizers.Replace(PROTECTED, " "),
        ]
    )


def compress_vocabulary(tokenizer: Tokenizer, *, added: bool = True) -> Compressed:
    """Compress all ids 0 … get_vocab_size(with added tokens) - 1.

    Without `added`, ids beyond those of the tokenizer's model (tokens that were added to it) stay as they are and are
    not counted in `size`: so engram-peft does it.

    An id that decodes to a part of a UTF-8 sequence is keyed by its raw vocabulary string, not normalised; both kinds
    of key share one dictionary (a byte's raw string may be a real character's key). A text that normalises to nothing
    keeps itself as key. Raises VocabError where the ids have a gap.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    raw: list[str] = []
    for i in range(size):
        token = tokenizer.id_to_token(i)
        if token is None:
            raise VocabError(f"id {i} of {size} has no token", hint="a tokenizer's ids must run without gaps")
        raw.append(token)
    normal_form = normalizer().normalize_str
    numbers: dict[str, int] = {}
    token_map = np.arange(size, dtype=np.int64)
    mapped = size if added else tokenizer.get_vocab_size(with_added_tokens=False)
    texts = tokenizer.decode_batch([[i] for i in range(mapped)], skip_special_tokens=False)
    for i, text in enumerate(texts):
        if "\ufffd" in text:
            key = raw[i]
        else:
            key = normal_form(text) or text
        token_map[i] = numbers.setdefault(key, len(numbers))
    return Compressed(token_map, len(numbers), hashlib.sha256(token_map.astype("<i8").tobytes()).hexdigest())


def representatives(token_map: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lowest raw id of every compressed id, int64 [V']."""
    _, first = np.unique(token_map, return_index=True)
    return first.astype(np.int64)
