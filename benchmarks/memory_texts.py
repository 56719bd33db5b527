"""Two domains that are always there, in parts that share no document: what the memories of memories.py are made from.

Every part is a JSONL file, a document a line. Which part a document goes to follows from a hash of its text, so the
same Python and the same wheel give the same parts on every machine.

    fill       counted into the tables
    train      scales are fitted on it, and gradient steps taken
    calibrate  for quantizers; nothing else ever sees it
    held_out   what gains and losses are measured on
    unrelated  the other domain: what a memory must not harm
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engram import EngramError, Progress
from engram.builders.atomic import write_whole
from engram.builders.fetch import ENGLISH_PROSE, hash_file
from engram.builders.python_text import write_python_text

PARTS = ("fill", "train", "calibrate", "held_out", "unrelated")
SHINGLE = 8  # words
LARGEST_SHARE = 0.15  # of a chapter's shingles that may stand in other chapters
LEAST_CHARACTERS = 400
UNRELATED = 40  # documents of the other domain

Documents = list[tuple[str, str]]  # title, text


class TextError(EngramError):
    """A source whose form is not the expected one."""


@dataclass(frozen=True)
class Parts:
    """Files, documents and characters of a domain, by part."""

    files: dict[str, Path]
    documents: dict[str, int]
    characters: dict[str, int]
    sha256: dict[str, str]


def write_domain(name: str, folder: Path, progress: Progress) -> Parts:
    """The parts of "python" or "bible" as files in `folder`."""
    source = ENGLISH_PROSE.fetch(progress=progress)
    with progress.task(f"text: {name}"):
        folder.mkdir(parents=True, exist_ok=True)
        parts = _python(source) if name == "python" else _bible(source)
        for part in PARTS:
            lines = (json.dumps({"title": t, "text": text}, ensure_ascii=False) + "\n" for t, text in parts[part])
            write_whole(folder / f"{part}.jsonl", "".join(lines).encode())
    files = {part: folder / f"{part}.jsonl" for part in PARTS}
    return Parts(
        files,
        {part: len(parts[part]) for part in PARTS},
        {part: sum(len(text) for _, text in parts[part]) for part in PARTS},
        {part: hash_file(file) for part, file in files.items()},
    )


def _demo(prose: Path) -> dict[str, Documents]:
    """The demo's parts: documentation and source of this Python, and prose."""
    with tempfile.TemporaryDirectory(prefix="engram-text-") as scratch:
        made = write_python_text(Path(scratch), prose)
        return {part: _read(file) for part, file in made.files.items()}


def _python(prose: Path) -> dict[str, Documents]:
    """The demo's parts; `train`, which is more than the scales and a few steps need, is dealt out once more."""
    parts = _demo(prose)
    dealt = _deal(parts["train"], ("held_out",) * 5 + ("train",) * 3 + ("calibrate",) * 2)
    return {
        "fill": parts["fill"], "train": dealt["train"], "calibrate": dealt["calibrate"],
        "held_out": parts["held_out"] + dealt["held_out"], "unrelated": parts["unrelated"],
    }  # fmt: skip


def _bible(source: Path) -> dict[str, Documents]:
    """Chapters of the King James Bible; those that repeat others (Kings and Chronicles, parallel psalms) are counted
    only, so that no held-out chapter is a near-copy of a counted one."""
    single, alike = apart(chapters(source))
    dealt = _deal(single, ("held_out",) * 3 + ("calibrate",) + ("train",) * 2 + ("fill",) * 14)
    return dealt | {"fill": alike + dealt["fill"], "unrelated": _demo(source)["held_out"][:UNRELATED]}


def chapters(module: Path) -> Documents:
    """Chapters of a module of pythonbible, which is read and never run.

    It is one call: Bible(version, text, {verse: where it begins}, {verse: where it ends}, …), and a verse's number is
    book · 1,000,000 + chapter · 1,000 + verse. Brackets around words that the translators supplied are left out.
    """
    try:
        assigned = next(node for node in ast.parse(module.read_text("utf-8")).body if isinstance(node, ast.Assign))
        if not isinstance(assigned.value, ast.Call):
            raise ValueError("the value is no call")
        text, begins, ends = (ast.literal_eval(node) for node in assigned.value.args[1:4])
        spans: dict[int, tuple[int, int]] = {}
        for verse in begins:
            first, last = spans.get(verse // 1000, (begins[verse], ends[verse]))
            spans[verse // 1000] = (min(first, begins[verse]), max(last, ends[verse]))
        if not spans:
            raise ValueError("there is none")
    except (StopIteration, SyntaxError, ValueError, TypeError, KeyError) as wrong:
        raise TextError(f"{module.name} does not hold a Bible with its verses: {wrong!r}") from None
    return [
        (f"book {number // 1000}, chapter {number % 1000}", re.sub(r"[\[\]]", "", text[begin:end]).strip() + "\n")
        for number, (begin, end) in sorted(spans.items())
    ]


def apart(documents: Documents) -> tuple[Documents, Documents]:
    """Documents that share few runs of SHINGLE words with any other, and the others."""
    kept = [(title, text) for title, text in documents if len(text) >= LEAST_CHARACTERS]
    shingles = [_shingles(text) for _, text in kept]
    uses = Counter(run for found in shingles for run in found)
    parted: tuple[Documents, Documents] = ([], [])
    for document, found in zip(kept, shingles, strict=True):
        parted[sum(uses[run] > 1 for run in found) > LARGEST_SHARE * len(found)].append(document)
    return parted


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def _deal(documents: Iterable[tuple[str, str]], hands: tuple[str, ...]) -> dict[str, Documents]:
    """Each document to the hand that its text's hash picks."""
    dealt: dict[str, Documents] = {hand: [] for hand in hands}
    for title, text in documents:
        draw = hashlib.blake2b(text.encode(), digest_size=4, person=b"memories").digest()
        dealt[hands[int.from_bytes(draw, "little") % len(hands)]].append((title, text))
    return dealt


def _read(file: Path) -> Documents:
    found = (json.loads(line) for line in file.read_text("utf-8").splitlines())
    return [(document["title"], document["text"]) for document in found]
