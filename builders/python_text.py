"""Real text that is always there: the documentation and source of the Python that runs us, and prose as a contrast.

Parts are decided by a hash of each document's text, so the same Python gives the same parts on every machine.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engram import EngramError
from engram.builders.atomic import write_whole

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
_GENERATED = {"encodings", "pydoc_data"}  # hundreds of near-equal tables; the topics are taken one by one instead
_LEAST_CHARACTERS = 400
_MOST_CHARACTERS = 400_000
_PIECE_CHARACTERS = 4_000
_PIECES = 40
_TELLING_LINE = 30  # characters; shorter lines (`else:`, `import os`) tell nothing of copying
_LARGEST_SHARE = 0.15  # of a document's telling lines that may stand in earlier documents


class PythonTextError(EngramError):
    """This Python has too little of its own text to build a demonstration from."""


@dataclass(frozen=True)
class PythonText:
    """Files of one JSON document a line."""

    files: dict[str, Path]  # by part: fill, train, held_out, unrelated
    documents: dict[str, int]
    characters: dict[str, int]
    copied: int  # documents that share many lines with others: all of them are counted, none is held out


def write_python_text(folder: Path, unrelated: Path) -> PythonText:
    """Write four parts as JSONL files: to fill from (7 of 10 documents), to train on (2), held out (1), unrelated.

    The last is pieces of the file `unrelated` (fetch.ENGLISH_PROSE).

    Documents that share many lines with another all go to the part that is counted, so that held-out text is no copy of
    anything seen.
    Raises PythonTextError where the standard library's sources are missing (some minimal images strip them).
    """
    single, copied = _apart(_own_documents())
    parts: dict[str, list[tuple[str, str]]] = {"fill": list(copied), "train": [], "held_out": []}
    for title, text in single:
        draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") % 10
        parts["held_out" if draw == 0 else "train" if draw <= 2 else "fill"].append((title, text))
    for name, documents in parts.items():
        if len(documents) < 5:
            raise PythonTextError(
                f"this Python has {len(documents)} documents for the part {name!r}, at least 5 are needed",
                hint="use a Python with its standard library's sources (Debian: apt-get install libpython3-stdlib)",
            )
    parts["unrelated"] = _prose(unrelated)
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        lines = (json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n" for title, text in documents)
        write_whole(folder / f"{name}.jsonl", "".join(lines).encode())
    return PythonText(
        files={name: folder / f"{name}.jsonl" for name in parts},
        documents={name: len(documents) for name, documents in parts.items()},
        characters={name: sum(len(text) for _, text in documents) for name, documents in parts.items()},
        copied=len(copied),
    )


def _own_documents() -> Iterator[tuple[str, str]]:
    """Topics of the language reference, then every module's source, in a fixed sequence."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = path.name.startswith(("_sysconfigdata", "test_"))
        if not generated and not _SKIPPED & set(parts) and parts[0] not in _GENERATED and "config-" not in parts[0]:
            yield path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace")


def _prose(path: Path) -> list[tuple[str, str]]:
    """Pieces of one long text, taken at equal distances: the longest string of a module, read and never run."""
    whole = max(path.read_text("utf-8").split('"""'), key=len)
    paragraphs = [line.strip() for line in whole.splitlines() if line.strip()]
    pieces, size = [""], 0
    for paragraph in paragraphs:
        if size >= _PIECE_CHARACTERS:
            pieces.append("")
            size = 0
        pieces[-1] += paragraph + "\n"
        size += len(paragraph)
    chosen = pieces[:: max(1, len(pieces) // _PIECES)]
    return [(f"piece {number}", piece) for number, piece in enumerate(chosen, 1)]


def _apart(documents: Iterator[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Documents of which few lines stand in any other, and the others (each perhaps a near-copy of some)."""
    first = {text: title for title, text in documents if _LEAST_CHARACTERS <= len(text) <= _MOST_CHARACTERS}
    kept = [(title, text) for text, title in first.items()]
    lines = [_telling_lines(text) for _, text in kept]
    uses = Counter(line for found in lines for line in found)
    alike = [sum(uses[line] > 1 for line in found) > _LARGEST_SHARE * len(found) for found in lines]
    parted: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for document, copied in zip(kept, alike, strict=True):
        parted[copied].append(document)
    return parted


def _telling_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= _TELLING_LINE}
