"""Which family a checkpoint is of."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from engram.builders.families import deepseek_engram, deepseek_v41, engram_peft, longcat, per_token, qwen4_exp
from engram.builders.families.config import LARGEST_FILE, NAME, OWN_NAME, Config, FamilyError, Header
from engram.builders.families.family import Published
from engram.builders.http_ranges import MissingError
from engram.builders.remote_files import Remote
from engram.builders.tensor_files import TensorFiles, open_files

FAMILIES = (deepseek_v41, qwen4_exp, longcat, per_token, deepseek_engram, engram_peft)
# names in all families' memories: their shards are read together; one that is not among them costs a request of its own
_MEMORY = re.compile(
    r"\.engram\.|\.ple\.|ngram_embeddings\.|oe_embed_|embed_tokens_per_layer\.|multi_head_embedding\.|engram_layers\."
    r"|^\d+\.(gating|short_conv)\."
)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def is_published(path: Path) -> bool:
    """Whether this is a GGUF, or a folder with a configuration that is not one of ours."""
    if path.suffix == ".gguf":
        return True
    return not (path / "engram.json").is_file() and any((path / name).is_file() for name in (NAME, OWN_NAME))


def find_published(path: Path) -> tuple[Published, TensorFiles]:
    """What a checkpoint folder or a GGUF file holds, by its model_type or architecture, and its tensors.

    Raises FamilyError, TensorFileError and GgufHeaderError.
    """
    if path.suffix == ".gguf":
        return _of_gguf(open_files(path))
    config = Config.read(path)
    family = _family_of(config)
    _refuse_pickles(path)
    files = open_files(path)
    return family.describe(config, files), files


def find_published_remote(remote: Remote) -> tuple[Published, TensorFiles]:
    """The same of a checkpoint on a server, and RemoteError: read are config.json, the index, and headers."""
    if remote.is_gguf:
        return _of_gguf(remote.open(_MEMORY))
    config = _remote_config(remote)
    family = _family_of(config)
    files = remote.open(_MEMORY)
    return family.describe(config, files), files


def _of_gguf(files: TensorFiles) -> tuple[Published, TensorFiles]:
    header = Header(files.path, files.metadata)
    for family in (qwen4_exp, per_token):
        if header.architecture in family.ARCHITECTURES:
            return family.describe_gguf(header, files), files
    raise FamilyError(f"{files.path} is of the architecture {header.architecture!r}: no known memory")


def _remote_config(remote: Remote) -> Config:
    """config.json, or without one the engram_config.json of a memory alone."""
    try:
        return Config.parse(remote.path / NAME, remote.read(NAME, LARGEST_FILE))
    except MissingError as wrong:
        try:
            return Config.parse_own(remote.path / OWN_NAME, remote.read(OWN_NAME, LARGEST_FILE), {})
        except MissingError:
            hint = f"{wrong.hint}; a GGUF is named as a file: {remote.path}/FILE.gguf"
            raise FamilyError(f"{remote.path} holds no {NAME}, which says what the tensors mean", hint=hint) from None


def _family_of(config: Config) -> ModuleType:
    for family in FAMILIES:
        if any(kind in family.MODEL_TYPES for kind in config.model_types):
            key = getattr(family, "KEY", None)  # where others save the same type
            if key is None or key in config.values:
                return family
    known = ", ".join(dict.fromkeys(kind for family in FAMILIES for kind in family.MODEL_TYPES))
    raise FamilyError(
        f"{config.path} has model_type {' and '.join(config.model_types) or 'none'}: no known memory",
        hint=f"known: {known}, the types engram and deepseek_v4 with {deepseek_engram.KEY} or {engram_peft.KEY}",
    )


def _refuse_pickles(folder: Path) -> None:
    """Say of a folder that holds nothing else why its weights are not read."""
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise FamilyError(
            f"{folder} has its tensors in {', '.join(pickles[:4])}: a pickle can run code and is never read",
            hint="save them as safetensors: save_pretrained(…, safe_serialization=True)",
        )
