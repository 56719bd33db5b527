"""Which family a checkpoint is of."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from engram.builders.families import deepseek_v41, longcat, per_token, qwen4_exp
from engram.builders.families.config import LARGEST_FILE, NAME, Config, FamilyError, Header
from engram.builders.families.family import Published
from engram.builders.http_ranges import MissingError
from engram.builders.remote_files import Remote
from engram.builders.tensor_files import TensorFiles, open_files

FAMILIES = (deepseek_v41, qwen4_exp, longcat, per_token)
# names in all families' memories: their shards are read together; one that is not among them costs a request of its own
_MEMORY = re.compile(r"\.engram\.|\.ple\.|ngram_embeddings\.|oe_embed_|embed_tokens_per_layer\.")


def find_published(path: Path) -> tuple[Published, TensorFiles]:
    """What a checkpoint folder or a GGUF file holds, by its model_type or architecture, and its tensors.

    Raises FamilyError, TensorFileError and GgufHeaderError.
    """
    if path.suffix == ".gguf":
        return _of_gguf(open_files(path))
    config = Config.read(path)
    family = _family_of(config)
    files = open_files(path)
    return family.describe(config, files), files


def find_published_remote(remote: Remote) -> tuple[Published, TensorFiles]:
    """The same of a checkpoint on a server, and RemoteError: read are config.json, the index, and headers."""
    if remote.is_gguf:
        return _of_gguf(remote.open(_MEMORY))
    try:
        config = Config.parse(remote.path / NAME, remote.read(NAME, LARGEST_FILE))
    except MissingError as wrong:
        hint = f"{wrong.hint}; a GGUF is named as a file: {remote.path}/FILE.gguf"
        raise FamilyError(f"{remote.path} holds no {NAME}, which says what the tensors mean", hint=hint) from None
    family = _family_of(config)
    files = remote.open(_MEMORY)
    return family.describe(config, files), files


def _of_gguf(files: TensorFiles) -> tuple[Published, TensorFiles]:
    header = Header(files.path, files.metadata)
    for family in (qwen4_exp, per_token):
        if header.architecture in family.ARCHITECTURES:
            return family.describe_gguf(header, files), files
    raise FamilyError(f"{files.path} is of the architecture {header.architecture!r}: no known memory")


def _family_of(config: Config) -> ModuleType:
    for family in FAMILIES:
        if any(kind in family.MODEL_TYPES for kind in config.model_types):
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.MODEL_TYPES)
    raise FamilyError(
        f"{config.path} has model_type {' and '.join(config.model_types) or 'none'}: no known memory",
        hint=f"known: {known}",
    )
