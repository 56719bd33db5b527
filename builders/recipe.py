"""Recipes: a YAML file becomes nested frozen dataclasses, checked key by key; unknown keys are errors.

The dataclasses are the list of keys and defaults; the shipped recipes carry the same keys with a comment each.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from engram import EngramError

FINAL = "final"  # in `layout.layers`: the output of the last norm, whatever the number of blocks


class RecipeError(EngramError):
    """A recipe with an unknown key, or a value of the wrong type, out of range or at odds with another."""


def number(default: Any, low: float | None = None, high: float | None = None, *, above: float | None = None) -> Any:
    """A field whose value lies in low … high, or strictly above `above`; None is let through where the type allows."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class LayoutSection:
    """The hash layout: a folder made by build-vocab, or the constants to build one from."""

    path: str | None = None
    tokenizer: str | None = None  # None: the backbone's own
    dialect: Literal["demo", "v41", "qwen-ple"] = "demo"
    orders: tuple[int, ...] = (2, 3)
    heads: int = number(8, 1)
    rows_per_head: int | tuple[int, ...] = number(65536, 1)
    head_dim: int = number(64, 1)
    layers: tuple[int | Literal["final"], ...] = (1,)
    compress: bool = True
    pad_id: int | None = number(None, 0)
    reset_id: int | None = number(None, 0)
    dead_ids: tuple[int, ...] = ()
    seed: int = number(0, 0)


@dataclass(frozen=True)
class LoraSection:
    """Adapters of peft, for `backbone.train: lora`."""

    r: int = number(16, 1)
    alpha: int = number(32, 1)
    dropout: float = number(0.0, 0, 0.9)
    targets: tuple[str, ...] = ()  # names of linear modules; none: all of the blocks


@dataclass(frozen=True)
class BackboneSection:
    """The transformer: one that exists (attach), or an architecture and its configuration (scratch)."""

    source: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    train: Literal["frozen", "lora", "full"] = "frozen"
    lora: LoraSection = LoraSection()
    architecture: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GateSection:
    """How the memory enters the stream; None and "auto" are the dialect's own choice."""

    kind: Literal["auto", "plain", "sqrt", "copysign"] = "auto"
    conv: int | None = number(None, 0)
    bias: bool | None = None
    branches: int = number(1, 1)
    init: Literal["auto", "value-zero", "table-zero"] = "auto"


@dataclass(frozen=True)
class TableSection:
    """The tables and their row-wise optimizer. They never decay."""

    optimizer: Literal["rowwise-adagrad", "rowwise-adam"] = "rowwise-adagrad"
    lr_multiplier: float | None = number(None, above=0)  # None: 5 when attached, 1 from scratch
    init_std: float = number(0.02, above=0)
    betas: tuple[float, float] = (0.9, 0.95)  # rowwise-adam
    eps: float = number(1e-10, above=0)
    clip: float | None = number(1.0, above=0)


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW for everything dense: gates, and the backbone where it is trained."""

    lr: float = number(4e-4, above=0)
    backbone_lr: float | None = number(None, above=0)  # None: lr
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.01, 0)
    clip: float | None = number(1.0, above=0)
    warmup_steps: int = number(20, 0)
    schedule: Literal["cosine", "constant"] = "cosine"
    min_ratio: float = number(0.1, 0, 1)


@dataclass(frozen=True)
class DataSection:
    """The corpus and how it is cut into batches."""

    sources: tuple[str, ...] = ()
    field: str = "text"
    column: str = "text"
    suffixes: tuple[str, ...] = ()
    strict: bool = False
    max_corpus_tokens: int | None = number(None, 1)
    held_out: float = number(0.05, 0, 0.9)
    eval_tokens: int = number(16384, 1)
    sequence_length: int = number(512, 2)
    batch: int = number(4, 1)
    accumulation: int = number(1, 1)


@dataclass(frozen=True)
class RunSection:
    """How long, how often, with what."""

    max_steps: int | None = number(None, 0)
    max_tokens: int | None = number(None, 1)
    max_time: float | None = number(None, above=0)  # seconds
    eval_every: int = number(100, 0)
    save_every: int = number(200, 0)
    keep: int = number(2, 1)
    seed: int = number(0, 0)
    threads: int | None = number(None, 1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything that `engram train` needs to know."""

    mode: Literal["attach", "scratch"] = "attach"
    out: str = ""
    start_from: str | None = None
    layout: LayoutSection = LayoutSection()
    backbone: BackboneSection = BackboneSection()
    gate: GateSection = GateSection()
    tables: TableSection = TableSection()
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection = DataSection()
    run: RunSection = RunSection()

    def to_json(self) -> dict[str, Any]:
        """All keys with their values, defaults included; `from_json` reads it back."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_json(cls, data: Any, name: str = "recipe") -> Recipe:
        """Check and build; RecipeError names `name`, the key, the value, the rule and the nearest valid key."""
        recipe: Recipe = _build(cls, data, name, ())
        _check_together(recipe, name)
        return recipe

    def to_yaml(self) -> str:
        """The recipe as it ran, overrides and defaults included."""
        text: str = yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)
        return text


def find_recipe(source: str | Path) -> tuple[str, str]:
    """Name and text of a recipe file, or of a shipped recipe by its name (`scratch-tiny`)."""
    path = Path(source)
    if not path.is_file() and len(path.parts) == 1:
        for file in (resources.files("engram") / "recipes").iterdir():
            if file.name in (path.name, path.name + ".yaml"):
                return file.name, file.read_text("utf-8")
    try:
        return str(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        raise RecipeError(
            f"recipe {source} cannot be read: {wrong}", hint="give a file, or a name that `engram recipe ls` lists"
        ) from None


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file or shipped recipe, with `section.key=value` overrides; values are read as YAML."""
    name, text = find_recipe(source)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as wrong:
        raise RecipeError(f"{name} is not YAML: {' '.join(str(wrong).split())}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise RecipeError(f"{name} holds {type(data).__name__}, expected keys and values")
    for override in overrides:
        _override(data, override)
    return Recipe.from_json(data, name)


def _override(data: dict[str, Any], text: str) -> None:
    key, found, value = text.partition("=")
    parts = key.strip().split(".")
    if not found or not all(parts):
        raise RecipeError(f"override {text!r} is not key=value", hint="for example: optimizer.lr=1e-3")
    for part in parts[:-1]:
        inner = data.setdefault(part, {})
        if inner is None:
            inner = data[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"override {text!r}: {part} holds a value, not a section")
        data = inner
    try:
        data[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {text!r}: {value!r} is not a YAML value", hint="quote it") from None


def _build(cls: Any, data: Any, name: str, path: tuple[str, ...]) -> Any:
    where = ".".join(path)
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{name}: {where} {data!r} must be a section with keys")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise _unknown(f"{name}: ", ".".join((*path, str(key))), [".".join((*path, known)) for known in fields])
    types_of = typing.get_type_hints(cls)
    return cls(**{key: _value(types_of[key], fields[key], value, name, (*path, key)) for key, value in data.items()})


def _unknown(where: str, key: str, known: Sequence[str]) -> RecipeError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(known)
    return RecipeError(f"{where}{key} is not a key of recipes", hint=hint)


def _value(kind: Any, spec: dataclasses.Field[Any], value: Any, name: str, path: tuple[str, ...]) -> Any:
    key = ".".join(path)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name, path)
    try:
        value = _convert(kind, value)
    except (TypeError, ValueError):
        raise RecipeError(f"{name}: {key} {value!r} must be {_words(kind)}") from None
    low, high, above = (spec.metadata.get(rule) for rule in ("low", "high", "above"))
    for one in value if isinstance(value, tuple) else (value,):
        if not isinstance(one, int | float):
            continue
        if (low is not None and one < low) or (high is not None and one > high):
            rule = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise RecipeError(f"{name}: {key} {one} must be {rule}")
        if above is not None and not one > above:
            raise RecipeError(f"{name}: {key} {one} must be greater than {above}")
    return value


def _convert(kind: Any, value: Any) -> Any:
    """`value` as `kind`; ValueError or TypeError where it is not. YAML reads 1e-3 as a text: floats accept that."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            try:
                return _convert(choice, value)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError
        return value
    if origin is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise TypeError
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError
        return tuple(_convert(inner[0], one) for one in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        converted = float(value)
        if converted != converted or abs(converted) == float("inf"):
            raise ValueError
        return converted
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def _words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(choice) for choice in typing.get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if origin is tuple:
        inner = typing.get_args(kind)
        return f"a list of {_words(inner[0])}" if inner[-1] is Ellipsis else f"a list of {len(inner)} numbers"
    if origin is dict:
        return "a section with keys"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return plain[kind]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _check_together(recipe: Recipe, name: str) -> None:
    """Rules between keys."""
    backbone, data, run = recipe.backbone, recipe.data, recipe.run
    rules = [
        (not recipe.out, "out is missing: the folder to write", "add out: runs/my-run"),
        (not data.sources, "data.sources is empty", "name files, folders or globs to train on"),
        ("-" in data.sources, "data.sources '-' (standard input) cannot be read again to resume", "save it to a file"),
        (
            recipe.mode == "attach" and not (backbone.source or recipe.start_from),
            "mode attach needs backbone.source (or start_from)", "a folder, a .gguf file or a hub name",
        ),
        (
            recipe.mode == "attach" and (backbone.architecture is not None or bool(backbone.config)),
            "backbone.architecture and backbone.config belong to mode scratch", "remove them, or set mode: scratch",
        ),
        (
            recipe.mode == "scratch" and (backbone.source is not None or recipe.start_from is not None),
            "mode scratch takes neither backbone.source nor start_from", "remove it, or set mode: attach",
        ),
        (
            recipe.mode == "scratch" and backbone.architecture is None,
            "mode scratch needs backbone.architecture", "a model type of transformers, such as llama or qwen3_moe",
        ),
        (
            recipe.mode == "scratch" and recipe.layout.path is None and recipe.layout.tokenizer is None,
            "mode scratch needs layout.path or layout.tokenizer", "give a tokenizer.json",
        ),
        (
            run.max_steps is None and run.max_tokens is None,
            "run.max_steps and run.max_tokens are both null: no end, no schedule", "set one; max_time only cuts short",
        ),
    ]  # fmt: skip
    for broken, message, hint in rules:
        if broken:
            raise RecipeError(f"{name}: {message}", hint=hint)
