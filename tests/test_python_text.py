"""Python's own text: whole documents, in parts that share nothing, the same on every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engram.builders import python_text
from engram.builders.python_text import PythonTextError, write_python_text


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_parts_are_disjoint_real_and_repeatable(tmp_path: Path, english_prose: Path) -> None:
    made = write_python_text(tmp_path / "a", english_prose)
    again = write_python_text(tmp_path / "b", english_prose)
    parts = {name: read(made.files[name]) for name in ("fill", "train", "held_out", "unrelated")}
    for name, documents in parts.items():
        assert made.files[name].read_bytes() == again.files[name].read_bytes()
        assert made.documents[name] == len(documents) >= 5
        assert made.characters[name] == sum(len(d["text"]) for d in documents)
    texts = [d["text"] for documents in parts.values() for d in documents]
    assert len(set(texts)) == len(texts)
    seen = {line.strip() for part in ("fill", "train") for d in parts[part] for line in d["text"].splitlines()}
    for document in parts["held_out"]:
        telling = [line.strip() for line in document["text"].splitlines() if len(line.strip()) >= 40]
        shared = sum(line in seen for line in telling)
        assert shared <= max(2, 0.4 * len(telling)), f"{document['title']} is nearly a copy of counted text"
    assert any("wilderness" in d["text"] for d in parts["unrelated"])
    assert any(d["title"].startswith("topic ") for d in parts["fill"])
    assert made.characters["fill"] > 2_000_000


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_text, "_own_documents", lambda: iter([("one", "text " * 200)]))
    with pytest.raises(PythonTextError, match="at least 5"):
        write_python_text(tmp_path / "a", tmp_path / "none")
    assert not list(tmp_path.rglob("*.jsonl"))
