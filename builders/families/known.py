"""Which family a checkpoint is of."""

from __future__ import annotations

from pathlib import Path

from engram.builders.families import deepseek_v41, longcat, per_token, qwen4_exp
from engram.builders.families.config import Config, FamilyError, Header
from engram.builders.families.family import Published
from engram.builders.tensor_files import TensorFiles, open_files

FAMILIES = (deepseek_v41, qwen4_exp, longcat, per_token)


def find_published(path: Path) -> tuple[Published, TensorFiles]:
    """What a checkpoint folder or a GGUF file holds, by its model_type or architecture, and its tensors.

    Raises FamilyError, TensorFileError and GgufHeaderError.
    """
    if path.suffix == ".gguf":
        files = open_files(path)
        header = Header(path, files.metadata)
        for family in (qwen4_exp, per_token):
            if header.architecture in family.ARCHITECTURES:
                return family.describe_gguf(header, files), files
        raise FamilyError(f"{path} is of the architecture {header.architecture!r}: no known memory")
    config = Config.read(path)
    for family in FAMILIES:
        if any(kind in family.MODEL_TYPES for kind in config.model_types):
            files = open_files(path)
            return family.describe(config, files), files
    known = ", ".join(kind for family in FAMILIES for kind in family.MODEL_TYPES)
    raise FamilyError(
        f"{config.path} has model_type {' and '.join(config.model_types) or 'none'}: no known memory",
        hint=f"known: {known}",
    )
