"""Tokenizers from every source; those of a GGUF against encoders written here by hand."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import texts
from tokenizers import Tokenizer

from engram.builders.gguf_header import GgufHeaderError, read_metadata
from engram.builders.gguf_tokenizer import GgufTokenizerError
from engram.builders.tokenizer import TokenizerError, load_tokenizer, save_tokenizer, special_tokens

SPACE = "\u2581"
PIECES = ["<unk>", "<s>", "</s>", "<0x41>", *"abcd", SPACE, "ab", "cd", "abcd", SPACE + "a", "bc", " " * 2, "<x>"]
SCORES = [float(s) for s in (0, 0, 0, 0, -20, -21, -22, -23, -24, -5, -3, -4, -1, -2, -1000, -1000)]
TYPES = [2, 3, 3, 6, *[1] * 10, 4, 4]


def write_gguf(path: Path, *, leave_out: str = "", **fields: Any) -> Path:
    """A vocabulary-only GGUF: pieces with scores unless `fields` says otherwise."""
    values = {"model": "llama", "tokens": PIECES, "scores": SCORES, "token_type": TYPES, "add_space_prefix": False}
    values |= {"bos_token_id": 1, "eos_token_id": 2} | fields
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        key = f"tokenizer.ggml.{name}"
        if name == leave_out:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def best_pair_first(text: str, rank: dict[tuple[str, str], float]) -> list[str]:
    """Byte-pair encoding as its definition says: join the best pair, leftmost first, until there is none."""
    parts = list(text)
    while True:
        pairs = [(rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in rank]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_smollm2_splits_digits_and_merges_as_its_gguf_says(smollm2_gguf: Path) -> None:
    meta = read_metadata(smollm2_gguf)
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    rank = {pair: float(i) for i, pair in enumerate(merges)}
    ids = {text: i for i, text in enumerate(meta["tokenizer.ggml.tokens"])}
    word = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
    tokenizer = load_tokenizer(str(smollm2_gguf))
    text = "In 1871, the bridge's 42 stones\n\n  weren't moved; 3.14159 != 2.71828.\tEnd  "
    expected: list[int] = []
    for piece in re.split(r"([0-9])", text):
        for found in word.findall(piece):
            visible = found.replace(" ", "Ġ").replace("\n", "Ċ").replace("\t", "ĉ")
            expected += [ids[part] for part in best_pair_first(visible, rank)]
    assert tokenizer.encode(text).ids == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids == [1, ids["user"], 2]
    assert tokenizer.get_vocab_size(with_added_tokens=True) == 49152
    info = special_tokens(str(smollm2_gguf))
    assert (info["bos_id"], info["eos_id"], info["eos_ids"], info["pad_id"], info["add_bos"]) == (1, 2, [2], 2, False)
    assert "<|im_start|>" in info["chat_template"]


def test_own_header_reader_equals_the_gguf_package(smollm2_gguf: Path, tmp_path: Path) -> None:
    small = write_gguf(tmp_path / "small.gguf")
    for path in (small, smollm2_gguf):
        meta, reader = read_metadata(path), gguf.GGUFReader(path)
        fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert meta.keys() == fields.keys()
        for key in list(fields)[:40]:
            if key != "tokenizer.ggml.merges":
                expected = fields[key].contents()
                got = meta[key] if isinstance(meta[key], (str, int, float, list)) else meta[key].tolist()
                assert got == expected, key


def test_scored_pieces_merge_best_score_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "spm.gguf"))
    numbers = {piece: i for i, piece in enumerate(PIECES)} | {SPACE * 2: PIECES.index("  ")}
    score = {piece: SCORES[i] for piece, i in numbers.items()}
    rank = {
        (piece[:cut], piece[cut:]): -score[piece]
        for piece in numbers if TYPES[numbers[piece]] == 1
        for cut in range(1, len(piece)) if piece[:cut] in numbers and piece[cut:] in numbers
    }  # fmt: skip
    choice = random.Random(3)
    for _ in range(300):
        text = "".join(choice.choices("abcd ", [3, 3, 3, 3, 1], k=12)).replace("  ", "a")
        parts = best_pair_first(text.replace(" ", SPACE), rank)
        assert tokenizer.encode(text, add_special_tokens=False).ids == [numbers[part] for part in parts], text


def test_user_defined_spaces_become_visible_ones_and_specials_are_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "spm.gguf"))
    assert tokenizer.encode("a  b", add_special_tokens=False).tokens == ["a", SPACE * 2, "b"]
    assert tokenizer.encode("a<x></s>", add_special_tokens=False).ids == [4, 15, 2]
    assert tokenizer.encode("A", add_special_tokens=False).ids == [3]  # a byte piece
    assert tokenizer.encode("a").ids == [1, 4]  # bos first: SentencePiece models say so by default
    assert special_tokens(tmp_path / "spm.gguf")["add_bos"] is True
    prefixed = load_tokenizer(write_gguf(tmp_path / "prefix.gguf", add_space_prefix=True))
    assert prefixed.encode("a", add_special_tokens=False).tokens == [SPACE + "a"]
    assert prefixed.decode([12]) == "a"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": "gpt2", "pre": "klingon", "merges": ["a b"]}, "tokenizer.ggml.pre is 'klingon'"),
        ({"model": "gpt2", "pre": "gpt-2"}, "'tokenizer.ggml.merges' is missing"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["ab"]}, "two pieces and a space"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a z"]}, "do not fit together"),
        ({"leave_out": "tokens"}, "'tokenizer.ggml.tokens' is missing"),
        ({"token_type": [1, 1]}, "'tokenizer.ggml.token_type' must hold 16"),
        ({"scores": [0.5]}, "'tokenizer.ggml.scores' must hold 16"),
        ({"bos_token_id": 99}, "bos_token_id is 99"),
        ({"tokens": ["a"] * 16}, "some texts occur twice"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_rebuilt_exactly_is_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(GgufTokenizerError, match=re.escape(words)):
        load_tokenizer(write_gguf(tmp_path / "bad.gguf", **fields))


def header(version: int = 3, pairs: int = 1, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, pairs) + rest


KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as GGUF"),
        (b"GGML" + bytes(40), "not GGUF 2 or 3"),
        (header(version=9), "version 9"),
        (header(pairs=1 << 40), "metadata pairs, more than"),
        (header(rest=struct.pack("<Q", 1 << 60)), "runs past the end"),
        (header(rest=KEY + struct.pack("<I", 77)), "value type 77"),
        (header(rest=KEY + struct.pack("<IIQ", 9, 8, 1 << 60)), f"claims {1 << 60} strings"),
        (header(rest=KEY + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 1 << 50)), "string of array 'k'"),
        (header(rest=KEY + struct.pack("<IIQ", 9, 4, 1 << 61)), "runs past the end"),
        (header(rest=KEY + struct.pack("<IIQ", 9, 9, 1)), "element type 9"),
        (header(rest=KEY + struct.pack("<I", 4)), "runs past the end"),
    ],
)  # fmt: skip
def test_a_gguf_header_that_lies_is_refused_at_once(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufHeaderError, match=re.escape(words)):
        load_tokenizer(path)


def test_every_truncation_of_a_gguf_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for cut in range(0, len(whole) - 64, 37):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(GgufHeaderError):
            read_metadata(tmp_path / "cut.gguf")


def test_json_file_folder_and_copy_are_one_tokenizer(tmp_path: Path) -> None:
    path = texts.write_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "copy").mkdir()
    sha256 = save_tokenizer(str(tmp_path / "source"), tmp_path / "copy")
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == path.read_bytes()
    expected = {
        "bos": None, "bos_id": None, "eos": "<eos>", "eos_id": 0, "pad": "<pad>", "pad_id": 1, "add_bos": False,
        "eos_ids": [0, 2], "chat_template": "{{ messages }}",
    }  # fmt: skip
    assert special_tokens(path) == special_tokens(tmp_path / "source") == special_tokens(tmp_path / "copy") == expected
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["tokenizer.json", "tokenizer_info.json"]


def test_a_gguf_is_saved_as_the_tokenizer_it_holds(smollm2_gguf: Path, tmp_path: Path) -> None:
    save_tokenizer(smollm2_gguf, tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = texts.sentences(5, 200) + " 1234 <|im_end|> naïve 東京"
    assert again.encode(text).ids == load_tokenizer(smollm2_gguf).encode(text).ids
    assert special_tokens(tmp_path) == special_tokens(smollm2_gguf)


def test_padding_and_truncation_in_the_file_are_not_obeyed(tmp_path: Path) -> None:
    path = texts.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    assert len(load_tokenizer(path).encode("the river of stone and the bridge").ids) not in (3, 50)


def test_sources_that_hold_no_tokenizer_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_hub_name_without_a_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TokenizerError, match="could not be fetched") as raised:
        load_tokenizer("nobody-here/no-such-model")
    assert "pass a local file" in raised.value.hint


def test_what_a_folder_here_lacks_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """package/tokenizer.json has the form of a hub name."""
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engram.builders.tokenizer._fetch", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(TokenizerError, match="'package/tokenizer.json' does not exist"):
        load_tokenizer("package/tokenizer.json")
