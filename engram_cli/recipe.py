"""`engram recipe`: the configurations that come with the package."""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Optional

import typer

from engram import EngramError
from engram.cli import options, ui

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


class RecipeNameError(EngramError):
    """A recipe that does not exist, or a target that already does."""


def shipped() -> dict[str, str]:
    """Name (without .yaml) -> text of every recipe that is installed with the package."""
    files = resources.files("engram.recipes").iterdir()
    return {
        file.name[:-5]: file.read_text("utf-8")
        for file in sorted(files, key=lambda f: f.name)
        if file.name.endswith(".yaml")
    }


def text_of(name: str) -> str:
    """The text of recipe `name` (with or without .yaml). Raises RecipeNameError."""
    recipes = shipped()
    key = name.removesuffix(".yaml")
    if key not in recipes:
        raise RecipeNameError(f"`{name}` is not a shipped recipe", hint=f"choose one of: {', '.join(recipes)}")
    return recipes[key]


@app.command("ls")
def list_recipes(json: options.Json = False) -> None:
    """List the shipped recipes."""
    lines = {name: text.splitlines()[0].lstrip("# ") if text else "" for name, text in shipped().items()}
    ui.emit({"recipes": lines}) if json else ui.table("", ["recipe", "about"], [list(line) for line in lines.items()])


@app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME", help="A name from engram recipe ls.")]) -> None:
    """Print a recipe."""
    sys.stdout.write(text_of(name))


@app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from engram recipe ls.")],
    target: Annotated[
        Optional[Path], typer.Argument(metavar="TARGET", help="File or folder; default: here.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a recipe to a file of yours, to change it."""
    text = text_of(name)
    path = target or Path()
    path = path / f"{name.removesuffix('.yaml')}.yaml" if path.is_dir() else path
    if path.exists() and not force:
        raise RecipeNameError(f"`{path}` already exists", hint="name another file, or use --force")
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half.write_text(text, "utf-8")
    half.replace(path)
    ui.say(f"wrote {path}; next: engram train {path}")
