"""Which family a checkpoint is of."""

from __future__ import annotations

from pathlib import Path

from engram.builders.families import deepseek_v41, longcat, per_token, qwen4_exp
from engram.builders.families.config import Config, FamilyError
from engram.builders.families.family import Published
from engram.builders.tensor_files import open_files

FAMILIES = (deepseek_v41, qwen4_exp, longcat, per_token)


def find_published(folder: Path) -> Published:
    """What a checkpoint folder holds, by the model_type of its config.json. Raises FamilyError, TensorFileError."""
    config = Config.read(folder)
    for family in FAMILIES:
        if any(kind in family.MODEL_TYPES for kind in config.model_types):
            return family.describe(config, open_files(folder))
    known = ", ".join(kind for family in FAMILIES for kind in family.MODEL_TYPES)
    raise FamilyError(
        f"{config.path} has model_type {' and '.join(config.model_types) or 'none'}: no known memory",
        hint=f"known: {known}",
    )
