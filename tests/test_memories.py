"""The study's texts: parts that share nothing, chapters as the Bible has them, near-copies never held out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from engram import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import memory_texts  # noqa: E402
from memory_texts import PARTS, TextError, apart, chapters, write_domain  # noqa: E402


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("domain", ["python", "bible"])
def test_parts_share_no_document_and_are_the_same_again(domain: str, tmp_path: Path) -> None:
    made, again = (write_domain(domain, tmp_path / name, Progress()) for name in "ab")
    assert made.sha256 == again.sha256 and set(made.files) == set(PARTS)
    parts = {part: read(file) for part, file in made.files.items()}
    texts = [document["text"] for documents in parts.values() for document in documents]
    assert len(set(texts)) == len(texts) and made.documents["held_out"] >= 60
    assert made.documents == {part: len(documents) for part, documents in parts.items()}
    assert made.characters["fill"] > 2 * sum(made.characters[part] for part in ("train", "calibrate", "held_out"))
    assert min(made.characters[part] for part in ("train", "calibrate")) > 100_000


def test_chapters_are_those_of_the_book(english_prose: Path) -> None:
    found = dict(chapters(english_prose))
    assert len(found) == 1189, "of the King James Bible"
    assert found["book 1, chapter 1"].startswith("In the beginning God created the heaven and the earth.")
    assert re.fullmatch(r"O praise the LORD, .*Praise ye the LORD\.\n", found["book 19, chapter 117"], re.DOTALL)
    assert found["book 43, chapter 11"].count("Jesus wept.") == 1
    assert not any("[" in text for text in found.values())
    assert all(text == text.strip() + "\n" for text in found.values())


def test_parallel_chapters_are_not_held_out(english_prose: Path) -> None:
    single, alike = (dict(documents) for documents in apart(chapters(english_prose)))
    for title in ("book 12, chapter 19", "book 23, chapter 37"):  # 2 Kings 19 is Isaiah 37
        assert title in alike
    assert "book 1, chapter 1" in single and len(single) > 1000
    words = {title: re.findall(r"\w+", text.lower()) for title, text in single.items()}
    runs = [" ".join(w[i : i + memory_texts.SHINGLE]) for w in words.values() for i in range(len(w) - 7)]
    assert len(set(runs)) > 0.95 * len(runs)


OTHERS = ["", "b = 3", "b = B(1, 'x', {}, {})", "b = B(1, 'x', {1: 0}, {})", "b = B(1)", "(("]


@pytest.mark.parametrize("content", OTHERS)
def test_another_module_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(content)
    with pytest.raises(TextError, match="other.py does not hold a Bible"):
        chapters(tmp_path / "other.py")
