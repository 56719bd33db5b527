"""Recipes: every key has a comment, every mistake has a name, a value, a rule and a hint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from engram.builders.recipe import Recipe, RecipeError, load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SCRATCH_ONLY, ATTACH_ONLY = {"backbone.architecture", "backbone.config"}, {"start_from", "backbone.source"}


def keys(cls: Any, before: str = "") -> set[str]:
    """Dotted names of all keys of a section and the sections in it."""
    out = set()
    for field in dataclasses.fields(cls):
        inner = type(field.default) if dataclasses.is_dataclass(field.default) else None
        out |= keys(inner, f"{before}{field.name}.") if inner else {before + field.name}
    return out


def flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        whole = isinstance(value, dict) and before + key != "backbone.config"
        out |= flat(value, f"{before}{key}.") if whole else {before + key: value}
    return out


def test_three_are_shipped() -> None:
    assert SHIPPED == ["attach-smollm2", "scratch-tiny", "scratch-tiny-moe"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_lists_every_key_with_a_comment(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(RECIPES / f"{name}.yaml") == recipe == load_recipe(f"{name}.yaml")
    listed = set(flat(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())))
    lora = {key for key in keys(Recipe) if "lora" in key} | {"backbone.train"}
    assert keys(Recipe) - listed == (SCRATCH_ONLY if recipe.mode == "attach" else ATTACH_ONLY | lora)
    plain = {"lr", "eps", "seed", "device", "dropout", "architecture", "config"}
    for number, line in enumerate((RECIPES / f"{name}.yaml").read_text().splitlines(), 1):
        assert len(line) <= 120, number
        key = line.strip().partition(":")[0]
        if key in flat(Recipe().to_json(), "") and key not in plain:
            assert "#" in line, f"line {number}: {key} has no comment"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["run.seed=7", "optimizer.clip=null"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_are_yaml_values_of_dotted_keys() -> None:
    recipe = load_recipe(
        "scratch-tiny",
        ["optimizer.lr=1e-3", "layout.orders=[2, 3, 4]", "tables.clip=null", "out=somewhere", "data.strict=true",
         "backbone.config.hidden_size=128", "layout.layers=[0, final]", "run.max_time=60"],
    )  # fmt: skip
    assert recipe.optimizer.lr == 1e-3 and recipe.layout.orders == (2, 3, 4) and recipe.tables.clip is None
    assert recipe.out == "somewhere" and recipe.data.strict and recipe.run.max_time == 60.0
    assert recipe.backbone.config["hidden_size"] == 128 and recipe.backbone.config["num_hidden_layers"] == 6
    assert recipe.layout.layers == (0, "final")


MISTAKES = [
    ("optimzer.lr=1", r"optimzer is not a key", "did you mean optimizer?"),
    ("optimizer.learning_rate=1", r"optimizer\.learning_rate is not a key", "optimizer."),
    ("run.max_step=3", r"run\.max_step is not a key", "did you mean run.max_steps?"),
    ("backbone.lora.rank=3", r"backbone\.lora\.rank is not a key", "backbone.lora.r"),
    ("optimizer.lr=fast", r"optimizer\.lr 'fast' must be a number", ""),
    ("optimizer.lr=.inf", r"optimizer\.lr inf must be a number", ""),
    ("optimizer.lr=0", r"optimizer\.lr 0\.0 must be greater than 0", ""),
    ("data.batch=2.5", r"data\.batch 2\.5 must be a whole number", ""),
    ("data.batch=true", r"data\.batch True must be a whole number", ""),
    ("data.batch=0", r"data\.batch 0 must be at least 1", ""),
    ("data.held_out=1.5", r"data\.held_out 1\.5 must be between 0 and 0\.9", ""),
    ("data.strict=maybe", r"data\.strict 'maybe' must be true or false", ""),
    ("data.sources=docs", r"data\.sources 'docs' must be a list of a text", ""),
    ("optimizer.betas=[0.9]", r"optimizer\.betas \[0\.9\] must be a list of 2 numbers", ""),
    ("gate.kind=sigmoid", r"gate\.kind 'sigmoid' must be one of auto, plain, sqrt, copysign", ""),
    ("layout.layers=[1, last]", r"layout\.layers \[1, 'last'\] must be", ""),
    ("layout.rows_per_head=[100, 0]", r"layout\.rows_per_head 0 must be at least 1", ""),
    ("run=5", r"run 5 must be a section", ""),
    ("run", r"override 'run' is not key=value", "optimizer.lr=1e-3"),
    ("out.folder=5", r"out holds a value, not a section", ""),
    ("out=[a", r"is not a YAML value", "quote"),
    ("out=", r"out None must be a text", ""),
    ("data.sources=[]", r"data\.sources is empty", "name files"),
    ("data.sources=[-]", r"must be a list|cannot be read again", ""),
    ("data.sources=['-']", r"standard input\) cannot be read again", "file"),
    ("backbone.source=null", r"mode attach needs backbone\.source", "folder"),
    ("backbone.architecture=llama", r"belong to mode scratch", "mode: scratch"),
    ("mode=scratch", r"takes neither backbone\.source nor start_from", "mode: attach"),
    ("run.max_steps=null", r"run\.max_steps and run\.max_tokens are both null", "max_time only cuts short"),
]


@pytest.mark.parametrize("override, message, hint", MISTAKES)
def test_a_mistake_is_named(override: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("attach-smollm2", [override])
    assert hint in caught.value.hint
    assert "attach-smollm2.yaml" in str(caught.value) or "override" in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("backbone.architecture=null", r"scratch needs backbone\.architecture"),
        ("layout.tokenizer=null", r"scratch needs layout\.path or layout\.tokenizer"),
    ],
)
def test_scratch_needs_an_architecture_and_a_tokenizer(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("scratch-tiny", [override])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        load_recipe("no-such-recipe")
    assert "engram recipe ls" in caught.value.hint
    bad = tmp_path / "bad.yaml"
    for text, words in (("a: [1", "is not YAML"), ("- 1", "holds list"), ("\xff", "holds str"), ("", "out is missing")):
        bad.write_text(text)
        with pytest.raises(RecipeError, match=words) as caught:
            load_recipe(bad)
        assert "bad.yaml" in str(caught.value)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(bad)
