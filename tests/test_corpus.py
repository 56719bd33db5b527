"""Every format of a corpus, and everything in it that cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from engram import Progress
from engram.builders import corpus as corpora
from engram.builders.corpus import CorpusConfig, CorpusError, Document, Tally, documents


class Notes(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def read(*sources: Path | str, **options: object) -> list[Document]:
    return list(documents(CorpusConfig(tuple(map(str, sources)), **options)))  # type: ignore[arg-type]


def lines(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


THREE = lines({"text": "one"}, {"text": "zwei\nlines é"}, {"text": "three", "other": 1})
TEXTS = ["one", "zwei\nlines é", "three"]


def test_json_lines_plain_and_compressed_are_one_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(THREE)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(THREE))
    frames = [zstandard.ZstdCompressor().compress(part) for part in (THREE[:20], THREE[20:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        found = read(tmp_path / name)
        assert [d.text for d in found] == TEXTS
        assert [d.index for d in found] == [1, 2, 3]
        assert {d.source for d in found} == {str(tmp_path / name)}


def test_another_field_and_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "x"}))
    assert [d.text for d in read(tmp_path / "a.jsonl", field="body")] == ["x"]
    pq.write_table(pa.table({"body": ["p", None, "q"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    tally = Tally()
    found = list(documents(CorpusConfig((str(tmp_path / "a.parquet"),), column="body"), Progress(), tally))
    assert [(d.text, d.index) for d in found] == [("p", 1), ("q", 3)]
    assert tally == Tally(malformed=1)
    with pytest.raises(CorpusError, match="has no column 'text', found body, n"):
        read(tmp_path / "a.parquet")


def test_folders_are_searched_in_order_and_hidden_names_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/skip.rst", ".git/c.txt", ".hidden.txt", "c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path)] == ["a/z.md", "b.txt"]
    assert [d.text for d in read(tmp_path, suffixes=(".py", ".rst"))] == ["a/skip.rst", "a/z.md", "b.txt", "c.py"]
    assert [d.text for d in read(tmp_path / "a/skip.rst")] == ["a/skip.rst"]  # named outright
    assert [d.text for d in read(str(tmp_path / "*.txt"), tmp_path / "b.txt")] == ["b.txt"]  # each file once
    assert [d.text for d in read(str(tmp_path / "**/*.md"), str(tmp_path / "c.*"))] == ["a/z.md", "c.py"]


def test_standard_input_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo\n".encode())))
    assert read("-") == [Document("héllo\n", "-", 1)]


def test_a_large_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE_BYTES", 1000)
    paragraphs = "".join(f"paragraph {i} é\nsecond line\n\n" for i in range(200))
    (tmp_path / "a.txt").write_text(paragraphs)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": paragraphs}))
    for name in ("a.txt", "a.jsonl"):
        found = [d.text for d in read(tmp_path / name)]
        assert "".join(found) == paragraphs
        assert max(len(text.encode()) for text in found) <= 1000
        assert all(text.startswith("paragraph") and text.endswith("\n\n") for text in found)
    for text in ("é" * 3001, "x" + "東" * 999, "\n" * 2500, "🜂" * 251):  # no paragraph to cut at
        (tmp_path / "b.txt").write_text(text)
        assert "".join(d.text for d in read(tmp_path / "b.txt")) == text


MALFORMED = [
    (b"{broken\n", "not JSON"),
    (b"[1, 2]\n", "no text in the field 'text', found list"),
    (lines({"txt": "x"}), r"found ['txt']"),
    (lines({"text": 7}), "no text in the field 'text'"),
    (b"[" * 100000 + b"\n", "not JSON"),
]


@pytest.mark.parametrize(("bad", "words"), MALFORMED, ids=[words for _, words in MALFORMED])
def test_a_malformed_line_is_counted_and_named_and_fatal_only_when_strict(
    bad: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "before"}) + bad + lines({"text": "after"}))
    notes, tally = Notes(), Tally()
    found = list(documents(CorpusConfig((str(path),)), notes, tally))
    assert [d.text for d in found] == ["before", "after"]
    assert tally == Tally(malformed=1)
    assert notes.said[0].startswith(f"{path}, line 2: ") and words in notes.said[0]
    assert notes.said[-1] == "corpus: 1 places left out, 0 read with U+FFFD"
    with pytest.raises(CorpusError, match="line 2"):
        read(path, strict=True)


def test_undecodable_bytes_are_named_by_line_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\nend")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\xe9"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \\ud83d"}\n')
    notes, tally = Notes(), Tally()
    found = list(documents(CorpusConfig((str(tmp_path),)), notes, tally))
    assert [d.text for d in found] == ["x\ufffd", "good\nb\ufffdd\nend", "half \ufffd"]
    assert tally == Tally(undecodable=3)
    assert notes.said[0].startswith(f"{tmp_path / 'a.jsonl'}, line 1: byte 0xe9")
    assert notes.said[1].startswith(f"{tmp_path / 'a.txt'}, line 2: byte 0xff at place 2")
    assert "half a surrogate pair" in notes.said[2]
    with pytest.raises(CorpusError, match="line 2: byte 0xff"):
        read(tmp_path / "a.txt", strict=True)


def test_only_the_first_problems_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no\n" * 100 + lines({"text": "x"}))
    notes, tally = Notes(), Tally()
    assert len(list(documents(CorpusConfig((str(tmp_path / "a.jsonl"),)), notes, tally))) == 1
    assert tally.malformed == 100
    assert len(notes.said) == corpora.NAMED + 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_broken_compressed_file_is_named_and_what_came_before_is_kept(
    suffix: str, damage: str, tmp_path: Path
) -> None:
    content = lines(*({"text": f"document {i} {i * 7919 % 1000003}"} for i in range(20000)))
    packed = bytearray(gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor().compress(content))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2 : len(packed) // 2 + 200] = bytes(200)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    tally, notes = Tally(), Notes()
    found = [d.text for d in documents(CorpusConfig((str(path),)), notes, tally)]
    assert found[:100] == [f"document {i} {i * 7919 % 1000003}" for i in range(100)]
    assert tally.malformed >= 1 and any("broken here" in line or "not JSON" in line for line in notes.said)


def test_a_line_beyond_the_limit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "LONGEST_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x" * 950}, {"text": "short"}))
    tally = Tally()
    assert [d.text for d in documents(CorpusConfig((str(tmp_path / "a.jsonl"),)), Progress(), tally)] == ["short"]
    assert tally.malformed == 1


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "b.txt").write_text("text")
    notes = Notes()
    assert [d.text for d in documents(CorpusConfig((str(tmp_path),)), notes)] == ["text"]
    assert "cannot be read as parquet" in notes.said[0]
    with pytest.raises(CorpusError, match="cannot be read as parquet"):
        read(tmp_path / "a.parquet", strict=True)


def test_a_corpus_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="names no readable file"):
        read(tmp_path / "none")
    with pytest.raises(CorpusError, match="names no readable file"):
        read(tmp_path)
    with pytest.raises(CorpusError, match="names no readable file"):
        read(str(tmp_path / "*.txt"))
    with pytest.raises(CorpusError, match="has no source"):
        read()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CorpusError, match="holds no text"):
        read(tmp_path)


def test_a_file_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    config = CorpusConfig((str(tmp_path / "a.txt"),))
    reader = corpora._Reader(config, Progress())
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        list(reader.file(str(tmp_path / "a.txt")))
