"""A small tokenizer and small corpora, written to disk as a user would have them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram.builders.corpus import CorpusConfig

PLAIN_WORDS = "memory table rows disk read numbers model the of a has are from their by and is".split()
WORDS = "the The river bridge of stone was built in 1871 by men Who knew É water, fire. and Ice\n".split(" ")


def sentences(seed: int, words: int) -> str:
    """Words drawn with Zipf-like weights: repeats itself as text does."""
    choice = random.Random(seed)
    return " ".join(choice.choices(WORDS, [1 / (rank + 1) for rank in range(len(WORDS))], k=words))


def write_tokenizer(folder: Path, size: int = 320) -> Path:
    """A byte-level BPE with the special tokens <eos> (0), <pad> (1) and <dead> (2): folder/tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>", "<pad>", "<dead>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([sentences(0, 2000)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": {"content": "<pad>"}}))
    return folder / "tokenizer.json"


def write_lines(path: Path, generator: np.random.Generator, count: int, words: int) -> CorpusConfig:
    """A .jsonl file of texts whose words are drawn alike, and the corpus of it."""
    lines = [json.dumps({"text": " ".join(generator.choice(PLAIN_WORDS, size=words))}) for _ in range(count)]
    path.write_text("\n".join(lines))
    return CorpusConfig((str(path),))


def write_corpus(path: Path, documents: int, words: int = 60, seed: int = 1) -> list[str]:
    """A .jsonl file; the texts in it."""
    texts = [sentences(seed + i, words + i % 7) for i in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts
