"""One tokenizer from wherever it lies: a tokenizer.json, a folder holding one, a GGUF, or a name on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engram import EngramError
from engram.builders import gguf_tokenizer
from engram.builders.atomic import write_whole

FILE = "tokenizer.json"
INFO = "tokenizer_info.json"  # ours: what special_tokens returns, kept beside the tokenizer
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
BESIDE = ("tokenizer_config.json", "config.json", "generation_config.json", "chat_template.jinja", INFO)


class TokenizerError(EngramError):
    """A tokenizer that cannot be found or read."""


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of `source`, added and special tokens included, without padding and truncation.

    Only tokenizer.json itself is read (or a GGUF's own vocabulary), never a class named in a configuration.
    Raises TokenizerError, or GgufTokenizerError and GgufHeaderError for a GGUF.
    """
    path = locate(source)
    if path.suffix == ".gguf":
        return gguf_tokenizer.rebuild(path)
    return parse_tokenizer(_read(path), path)


def save_tokenizer(source: str | Path, folder: Path) -> str:
    """Write tokenizer.json and tokenizer_info.json into `folder`; the SHA-256 of tokenizer.json.

    A tokenizer.json is copied byte for byte, so that its hash stays the published one.
    """
    content = tokenizer_bytes(source)
    info = json.dumps(special_tokens(source), indent=1, ensure_ascii=False) + "\n"
    for name, data in ((FILE, content), (INFO, info.encode())):
        write_whole(folder / name, data)
    return hashlib.sha256(content).hexdigest()


def tokenizer_bytes(source: str | Path) -> bytes:
    """The tokenizer.json of `source`: the file's own bytes, or those rebuilt from a GGUF."""
    path = locate(source)
    if path.suffix == ".gguf":
        return gguf_tokenizer.rebuild(path).to_str().encode()
    content = _read(path)
    parse_tokenizer(content, path)
    return content


def special_tokens(source: str | Path) -> dict[str, Any]:
    """What generation needs to know: `bos`, `eos`, `pad` (texts), `bos_id`, `eos_id`, `pad_id`, `eos_ids` (every id
    that ends a text), `add_bos` (a prompt begins with bos), `chat_template`. None where nothing states it.
    """
    path = locate(source)
    if path.suffix == ".gguf":
        info = gguf_tokenizer.special_tokens(path)
        return {**info, "eos_ids": [] if info["eos_id"] is None else [info["eos_id"]]}
    kept = _object(path.with_name(INFO))
    if "eos_ids" in kept and "chat_template" in kept:
        return kept
    tokenizer = load_tokenizer(path)
    named, model = _object(path.with_name("tokenizer_config.json")), _object(path.with_name("config.json"))
    model = {**model, **_object(path.with_name("generation_config.json"))}
    out: dict[str, Any] = {}
    eos_ids: list[int] = []
    for name in ("bos", "eos", "pad"):
        text = named.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        stated = model.get(f"{name}_token_id")
        numbers = [n for n in (stated if isinstance(stated, list) else [stated]) if isinstance(n, int)]
        number = numbers[0] if number is None and numbers else number
        out[name], out[f"{name}_id"] = (None if number is None else tokenizer.id_to_token(number)), number
        if name == "eos":
            eos_ids = sorted({*numbers, *([] if number is None else [number])})
    begun = tokenizer.encode("", add_special_tokens=True).ids
    out["add_bos"] = out["bos_id"] is not None and begun[:1] == [out["bos_id"]]
    out["eos_ids"] = eos_ids
    template, file = named.get("chat_template"), path.with_name("chat_template.jinja")
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    out["chat_template"] = template if isinstance(template, str) else None
    return out


def first_ids(source: str | Path) -> list[int]:
    """What a text begins with: bos where the tokenizer asks for one, else nothing."""
    known = special_tokens(source)
    return [int(known["bos_id"])] if known.get("add_bos") and known.get("bos_id") is not None else []


def locate(source: str | Path) -> Path:
    """The tokenizer.json or .gguf file that `source` means; a hub name is fetched into the hub's cache.

    Raises TokenizerError where there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / FILE).is_file():
            return path / FILE
        packed = sorted(path.glob("*.gguf"))
        if len(packed) == 1:
            return packed[0]
        raise TokenizerError(
            f"the folder {path} holds no {FILE}" + (f" and {len(packed)} GGUF files" if packed else ""),
            hint=f"pass a folder that holds {FILE}, or the file itself",
        )
    if HUB_NAME.fullmatch(str(source)) and path.name != FILE:  # that a folder here lacks it is no question for the hub
        return _fetch(str(source))
    raise TokenizerError(
        f"the tokenizer {str(source)!r} does not exist", hint="pass a file, a folder, or a hub name org/name"
    )


def _fetch(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise TokenizerError(
            f"{name!r} is no path, and hub names need huggingface_hub", hint="pip install huggingface_hub"
        ) from None
    try:
        found = Path(huggingface_hub.hf_hub_download(name, FILE))
        for other in BESIDE:
            try:
                huggingface_hub.hf_hub_download(name, other)
            except EntryNotFoundError:
                continue
        return found
    except (OSError, ValueError, EntryNotFoundError, OfflineModeIsEnabled) as wrong:
        reason = str(wrong).strip().splitlines()[:1]
        raise TokenizerError(
            f"{name!r} is no path, and its {FILE} could not be fetched from the hub: {' '.join(reason)}",
            hint="check the name and the connection, or pass a local file or folder",
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as wrong:
        raise TokenizerError(f"{path} cannot be read: {wrong.strerror}") from None


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """The tokenizer in the bytes of a tokenizer.json; TokenizerError (naming `path`) where they hold something else."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as wrong:  # the library raises plain Exception
        raise TokenizerError(
            f"{path} is not a tokenizer.json: {wrong}", hint="pass the file that `tokenizers` or transformers saved"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _object(path: Path) -> dict[str, Any]:
    """A JSON object beside the tokenizer; empty where the file is missing or holds something else."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
