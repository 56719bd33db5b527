"""Row traces from real text: tokens of consecutive positions, hashed through the layout; uniform ids as a contrast.

Shape letters: T tokens, C columns.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.corpus import CorpusConfig, documents
from engram.builders.layout import Layout
from engram.builders.python_text import write_python_text
from engram.builders.tokenizer import load_tokenizer
from engram.runtime.bench_race import BenchError

Ints = NDArray[np.int64]

MOST_TOKENS = 400_000
_HASH_TOKENS = 8192


def real_text(text: Path | None, progress: Progress) -> tuple[list[str], str]:
    """Documents to measure with, and what they are: a file or folder of yours, else Python's own held-out part.

    Raises BenchError for a file without text, PythonTextError where this Python brings none.
    """
    if text is not None:
        found = [document.text for document in documents(CorpusConfig((str(text),))) if document.text.strip()]
        if not found:
            raise BenchError(f"{text} holds no text", hint="pass a text file, or leave --text out")
        return found, text.name
    import pydoc_data.topics

    with progress.task("text of this Python"), tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        # The fourth part, prose, is not used: any module may stand for it, so that nothing is fetched.
        parts = write_python_text(Path(folder), Path(pydoc_data.topics.__file__))
        lines = parts.files["held_out"].read_text("utf-8").splitlines()
    return [str(json.loads(line)["text"]) for line in lines], "Python's own documentation and source, held-out part"


def token_ids(folder: Path, texts: list[str], progress: Progress, most: int = MOST_TOKENS) -> Ints:
    """Token ids of the texts one after another, int64 [T], by the folder's own tokenizer; at most `most`.

    Raises BenchError for a folder without a tokenizer or a text without tokens.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BenchError(f"{folder} holds no tokenizer.json, which real ids need", hint="pass a package or a layout")
    tokenizer = load_tokenizer(file)
    ids: list[int] = []
    with progress.task("tokenize", most, "tokens") as task:
        for text in texts:
            new = tokenizer.encode(text, add_special_tokens=False).ids
            ids.extend(new)
            task.advance(len(new))
            if len(ids) >= most:
                break
    if not ids:
        raise BenchError("the text gives no tokens", hint="pass a longer --text")
    return np.array(ids[:most], dtype=np.int64)


def text_rows(layout: Layout, layer: int, ids_T: Ints) -> Ints:
    """Rows that the tokens look up in one layer, position after position: int64 [T * C]."""
    parts = []
    before = None
    for begin in range(0, len(ids_T), _HASH_TOKENS):
        part = ids_T[None, begin : begin + _HASH_TOKENS]
        parts.append(layout.rows(part, before, layers=[layer])[layer].reshape(-1))
        before = layout.history(part, before)
    return np.concatenate(parts)


def uniform_rows(table_rows: int, count: int, seed: int) -> Ints:
    """Rows drawn evenly from the whole table: the worst case, which no text is."""
    return np.random.default_rng(seed).integers(0, table_rows, count, dtype=np.int64)
