"""Backbones: where they are, how they are loaded and checked; transformers does the work."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram import EngramError
from engram.builders.atomic import sync_tree
from engram.builders.fetch import hash_file
from engram.builders.gguf_header import read_metadata, read_tensors

KINDS = ("hf", "gguf", "embedded", "none")
_WEIGHTS = (".safetensors", ".json")


class BackboneError(EngramError):
    """A backbone that is missing, altered or of a kind that cannot be used."""


@dataclass(frozen=True)
class BackboneRef:
    """Where a backbone is and what it must hash to.

    kind "hf": a folder or hub name in transformers' format; "gguf": one file; "embedded": the folder `backbone/`
    beside the manifest, holding either; "none": there is none here, `path` says in words which one it is.
    """

    kind: str
    path: str
    dtype: str = "float32"
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse kinds and dtypes that no loader knows."""
        if self.kind not in KINDS:
            raise BackboneError(f"backbone kind {self.kind!r} is not known", hint="use one of: " + ", ".join(KINDS))
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BackboneError(f"backbone dtype {self.dtype!r} is not known", hint="use float32, bfloat16 or float16")

    @classmethod
    def find(cls, source: str, dtype: str = "float32") -> BackboneRef:
        """A reference to a folder, a GGUF file or a hub name; local files are hashed."""
        path = Path(source)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise BackboneError(f"backbone {source} does not exist")
            return cls("gguf", str(path.resolve()), dtype, {path.name: hash_file(path)})
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise BackboneError(f"backbone folder {source} has no config.json")
            names = sorted(p.name for p in path.iterdir() if p.suffix in _WEIGHTS)
            return cls("hf", str(path.resolve()), dtype, {name: hash_file(path / name) for name in names})
        if source.count("/") == 1 and not source.startswith((".", "/", "~")):
            return cls("hf", source, dtype)
        raise BackboneError(
            f"backbone {source} does not exist", hint="give a checkpoint folder, a .gguf file or a hub name owner/model"
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BackboneRef:
        """The inverse of `to_json`."""
        try:
            return cls(**data)
        except TypeError as wrong:
            raise BackboneError(f"backbone reference has the wrong fields: {wrong}") from None

    def files(self, beside: Path) -> dict[str, Path]:
        """Local files by the names that `sha256` uses; empty for a hub name. `beside` is the manifest's folder."""
        root = beside / self.path if self.kind == "embedded" else Path(self.path)
        return {name: root if self.kind == "gguf" else root / name for name in self.sha256}

    def place(self, beside: Path) -> Path | None:
        """The GGUF file or the folder; None for a hub name."""
        root = beside / self.path if self.kind == "embedded" else Path(self.path)
        gguf = next((name for name in self.sha256 if name.endswith(".gguf")), None)
        if self.kind == "embedded" and gguf is not None:
            return root / gguf
        return root if self.kind != "hf" or self.sha256 else None

    def verify(self, beside: Path) -> None:
        """Refuse a backbone of which a file is missing or altered."""
        for name, path in self.files(beside).items():
            if not path.is_file():
                raise BackboneError(f"backbone file {path} is missing", hint="the reference names a file that moved")
            found = hash_file(path)
            if found != self.sha256[name]:
                raise BackboneError(f"backbone file {path} has SHA-256 {found}, expected {self.sha256[name]}")


def load_backbone(ref: BackboneRef, beside: Path = Path(), dtype: str | None = None) -> Any:
    """The transformers model, in evaluation mode; weights only from safetensors or GGUF, never remote code.

    `dtype` overrides the reference's. int8 and int4 layers are loaded where the reference names their file: one that
    merely lies in the folder counts for nothing. Raises BackboneError where files are missing or transformers refuses
    them.
    """
    import torch
    from safetensors import SafetensorError

    from engram.builders.backbone_int import MARK, torchao_importable

    with torchao_importable(needed=False):  # transformers imports it where it is installed
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import PreTrainedModel  # noqa: F401
    from transformers.utils import logging

    if ref.kind == "none":
        raise BackboneError(
            f"{beside} holds the tables of {ref.path}, and no backbone",
            hint="it was converted from a published checkpoint: other engines run it; engram hash and verify work",
        )
    wanted = getattr(torch, dtype or ref.dtype)
    source, gguf = ref.path, None
    if ref.kind == "embedded":
        source = str(beside / ref.path)
        gguf = next((name for name in ref.sha256 if name.endswith(".gguf")), None)
    elif ref.kind == "gguf":
        source, gguf = str(Path(ref.path).parent), Path(ref.path).name
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if gguf is None and MARK in ref.sha256:
        return _load_int(Path(source), wanted)
    options: dict[str, Any] = {"dtype": wanted, "trust_remote_code": False}
    options |= {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    try:
        with _quiet() if gguf else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as wrong:
        raise BackboneError(
            f"backbone {source} cannot be loaded: {(str(wrong).splitlines() or [repr(wrong)])[0]}",
            hint="transformers must know the architecture; weights must be safetensors or GGUF",
        ) from wrong
    model, info = loaded
    if info["missing_keys"]:
        raise BackboneError(
            f"backbone {source} lacks the weight {sorted(info['missing_keys'])[0]!r}",
            hint="transformers would start it at random; the file is incomplete or of another architecture",
        )
    for parameter in model.parameters():  # not buffers: rotary frequencies in bfloat16 would turn far positions wrong
        parameter.data = parameter.data.to(wanted)
    return model.eval()


_NAMES = {  # of config.json: newer and older architectures
    "blocks": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden size": ("hidden_size", "n_embd", "d_model"),
    "vocabulary": ("vocab_size",),
}
_SAME = {"mistral": "llama", "mixtral": "llama", "umt5": "t5", "cohere": "commandr"}  # GGUF has one name for both


def backbone_facts(place: Path) -> dict[str, int | str]:
    """What a folder's config.json or a GGUF's header says of the model; no weights are read.

    Keys: "architecture", "blocks", "hidden size", "vocabulary" (rows of the token embedding). What is not said is left
    out; so is everything of a path that does not exist. The architecture is in GGUF's words, without "_" and "-".
    Raises GgufHeaderError for a file that is no GGUF, BackboneError for a config.json that is no JSON object.
    """
    if place.is_file():
        pairs, embedding = read_metadata(place), read_tensors(place).get("token_embd.weight")
        kind = pairs.get("general.architecture")
        found = {"architecture": kind, "blocks": pairs.get(f"{kind}.block_count"),
                 "hidden size": pairs.get(f"{kind}.embedding_length"),
                 "vocabulary": embedding[0][-1] if embedding and embedding[0] else None}  # fmt: skip
    elif (place / "config.json").is_file():
        try:
            config = json.loads((place / "config.json").read_bytes())
            config = config.get("text_config") or config
            found = {fact: next((config[name] for name in names if name in config), None)
                     for fact, names in _NAMES.items()}  # fmt: skip
            found["architecture"] = config.get("model_type")
        except (ValueError, AttributeError, TypeError) as wrong:
            raise BackboneError(f"{place / 'config.json'} cannot be read: {wrong!r}") from None
    else:
        return {}
    if isinstance(kind := found["architecture"], str):
        plain = kind.removesuffix("_text").replace("_", "").replace("-", "")
        found["architecture"] = _SAME.get(plain, plain)
    return {fact: value for fact, value in found.items() if isinstance(value, int | str)}


def _load_int(folder: Path, wanted: Any) -> Any:
    """A backbone of int8 or int4 linear layers, as `engram quantize --backbone` writes it."""
    from safetensors import SafetensorError

    from engram.builders.backbone_int import load_int_folder

    try:
        return load_int_folder(folder, wanted)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as wrong:
        raise BackboneError(
            f"backbone {folder} cannot be loaded: {(str(wrong).splitlines() or [repr(wrong)])[0]}",
            hint="the folder is incomplete or altered: quantize the backbone again",
        ) from wrong


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no advice of transformers' GGUF reader on the screen; errors are still raised."""
    import logging as levels

    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def dense_copy(gguf: Path, cache: Path, dtype: str) -> Path:
    """A folder in transformers' format with the dequantized weights of a GGUF file, made once (loads in a second).

    The folder's name carries the file's SHA-256, so another file never finds it.
    """
    folder = cache / "backbones" / f"{gguf.stem}-{dtype}-{hash_file(gguf)[:16]}"
    if not (folder / "config.json").is_file():
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=_made(folder.parent)))
        try:
            save_backbone(load_backbone(BackboneRef("gguf", str(gguf), dtype)), partial)
            partial.chmod(0o755)
            sync_tree(partial)
            try:
                partial.rename(folder)
            except OSError:  # another process was first
                if not (folder / "config.json").is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_backbone(model: Any, folder: Path) -> None:
    """Write config and safetensors of a backbone; one read from GGUF becomes an ordinary dense one."""
    forget_gguf(model)
    model.save_pretrained(folder)


def forget_gguf(model: Any) -> None:
    """Make a model that was read from GGUF an ordinary dense one, which its config says too."""
    for name in ("hf_quantizer", "quantization_method"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.is_quantized = False
