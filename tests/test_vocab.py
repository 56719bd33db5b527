"""The compressed vocabulary against the published tables, and against a second implementation."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import texts
from tokenizers import Tokenizer, models

from engram.builders.vocab import VocabError, compress_vocabulary, normalizer, representatives


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_published_tokenizers_give_the_published_maps(
    version: str, golden: Path, request: pytest.FixtureRequest
) -> None:
    expected = json.loads((golden / f"compression_deepseek_{version}.json").read_text())
    tokenizer = Tokenizer.from_file(str(request.getfixturevalue(f"deepseek_{version}_tokenizer")))
    found = compress_vocabulary(tokenizer)
    assert len(found.token_map) == expected["vocab_size_with_added_tokens"]
    assert found.size == expected["compressed_vocab_size"]
    assert found.sha256 == expected["lookup_sha256_int64_le"]
    assert found.reduction == pytest.approx(expected["reduction"], abs=1e-9)
    for sample in expected["samples"]:
        assert found.token_map[sample["token_id"]] == sample["compressed_id"]
    for group in expected["largest_groups"]:
        members = np.flatnonzero(found.token_map == group["compressed_id"])
        assert len(members) == group["size"]
        assert members[: len(group["first_token_ids"])].tolist() == group["first_token_ids"]


def test_normal_form_is_the_python_one() -> None:
    """unicodedata does the same, apart from white space that str.strip knows and Unicode does not."""

    def by_hand(text: str) -> str:
        text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
        text = "".join(c for c in text if not unicodedata.category(c).startswith("M")).lower()
        squeezed = "".join(" " if c in " \t\r\n" else c for c in text)
        while "  " in squeezed:
            squeezed = squeezed.replace("  ", " ")
        return squeezed if squeezed == " " else squeezed.strip()

    normal = normalizer()
    for text in ["\t", "\n\n", "    ", " The", "THE", "\x0b", "ﬁ", "Ａ", "\u00a0x", "é", "\u0301", "한", "a\r\nb", "ǅ"]:
        assert normal.normalize_str(text) == by_hand(text), repr(text)


def test_tokens_that_read_alike_share_an_id_and_bytes_keep_their_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(texts.write_tokenizer(tmp_path)))
    found = compress_vocabulary(tokenizer)
    number = {text: int(found.token_map[i]) for text, i in tokenizer.get_vocab().items()}
    assert number["The"] == number["the"] == number["Ġthe"]
    assert number["t"] == number["T"] != number["h"]
    assert number["<eos>"] == 0 and number["<pad>"] == 1
    halves = [number[raw] for raw in ("Â", "Ã", "Ä")]  # first bytes of two-byte characters
    assert len(set(halves)) == 3
    assert found.size == len(set(found.token_map.tolist())) == found.token_map.max() + 1 < len(found.token_map)
    first = representatives(found.token_map)
    assert found.token_map[first].tolist() == list(range(found.size))
    assert all(np.flatnonzero(found.token_map == i)[0] == first[i] for i in range(found.size))


def test_ids_with_a_gap_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 1, "b": 2}, unk_token="a"))
    with pytest.raises(VocabError, match="id 0 of 2 has no token"):
        compress_vocabulary(tokenizer)
