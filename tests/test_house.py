"""The tests that hold the house: docs/house.md says what each law is for."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # folder: what it may import of ours
    "kernels": set[str](),
    "builders": {"kernels"},
    "quantize": {"kernels", "builders"},
    "runtime": {"kernels", "builders", "quantize"},
    "recipes": set[str](),
    "engram_cli": {"kernels", "builders", "quantize", "runtime", "recipes"},
}
LINKS = {"cli": "engram_cli", **{room: room for room in ROOMS if room != "engram_cli"}}
LINKS_BACK = {folder: name for name, folder in LINKS.items()}
NO_TORCH = ("kernels/codecs.py", "builders/layout.py", "quantize/package.py", "runtime/reader.py")
LARGEST = 500


def room_files() -> list[Path]:
    return sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def all_files() -> list[Path]:
    folders = [*ROOMS, "engram", "tests", "benchmarks"]
    return sorted(
        {file for folder in folders for file in (ROOT / folder).rglob("*.py") if not file.parent.is_symlink()}
    )


def module_of(file: Path) -> str:
    """`builders/families/qwen.py` -> `engram.builders.families.qwen`."""
    room, *rest = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(["engram", "cli" if room == "engram_cli" else room, *rest])


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import at any depth, and of every import_module("…"); names are joined on: a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from ((node.lineno, str(word.value)) for word in node.args if isinstance(word, ast.Constant))


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.mark.parametrize("file", room_files(), ids=ids(room_files()))
def test_rooms_import_as_the_table_says(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    allowed = {LINKS_BACK.get(name, name) for name in ROOMS[room] | {room}}
    for line, name in imports(tree_of(file)):
        where = f"{file.relative_to(ROOT)}:{line} imports {name}"
        assert not name.startswith("."), f"{where}: relative imports hide the room"
        top, *rest = name.split(".")
        assert top not in ROOMS, f"{where}: import it as engram.{LINKS_BACK.get(top, top)}"
        if top == "engram" and rest and rest[0] in LINKS:
            assert rest[0] in allowed, f"{where}: the table in docs/house.md does not allow it"
        if top == "triton":
            assert file == ROOT / "kernels" / "triton_kernels.py", f"{where}: triton is for triton_kernels.py alone"


def test_no_module_imports_itself_in_a_circle() -> None:
    files = {module_of(file): file for file in room_files()}
    graph = {
        module: {
            known for _, name in imports(tree_of(file)) for known in (name, name.rpartition(".")[0]) if known in files
        }
        for module, file in files.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("file", all_files(), ids=ids(all_files()))
def test_file_is_one_sitting(file: Path) -> None:
    assert file.name not in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py"), "name it after what it does"
    lines = len(file.read_text("utf-8").splitlines())
    assert lines <= LARGEST, f"{file.relative_to(ROOT)} has {lines} lines, the most is {LARGEST}"


def test_rooms_have_no_init() -> None:
    found = [str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("__init__.py")]
    assert not found, f"{found}: a room with __init__.py shadows the PyPI package `kernels` and hides import costs"


def test_engram_folder_holds_links_only() -> None:
    folder = ROOT / "engram"
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "py.typed", *LINKS}
    for name, room in LINKS.items():
        assert os.readlink(folder / name) == f"../{room}", f"engram/{name} must be a relative link to the room"
        assert (folder / name).is_dir(), f"engram/{name} points nowhere"


@pytest.mark.parametrize("file", room_files(), ids=ids(room_files()))
def test_nothing_forbidden_is_called(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    for node in ast.walk(tree_of(file)):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name not in ("torch.load", "torch.save"), f"{where}: {name} unpickles; use safetensors"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert room == "engram_cli", f"{where}: workers speak through Progress, only the command line prints"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{where}: runs foreign code"
        if isinstance(node, ast.Name | ast.Attribute):
            assert getattr(node, "id", getattr(node, "attr", "")) != "NotImplementedError", (
                f"{where}: finish or leave out"
            )
    for line, name in imports(tree_of(file)):
        assert name.split(".")[0] not in ("pickle", "dill", "joblib", "marshal", "shelve"), f"{file}:{line}: {name}"


def test_library_errors_are_engram_errors() -> None:
    """Every exception class of ours descends from EngramError, so that the command line can turn it into words."""
    bases: dict[str, list[str]] = {}
    for file in room_files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                bases[node.name] = [getattr(base, "id", getattr(base, "attr", "")) for base in node.bases]
    for name in bases:
        family, todo = set[str](), [name]
        while todo:
            family.update(parents := bases.get(todo.pop(), []))
            todo.extend(parents)
        assert "EngramError" in family, f"{name} must derive from EngramError"


@pytest.mark.parametrize("name", NO_TORCH)
def test_runs_without_torch(name: str) -> None:
    code = (
        "import sys\n"
        "for heavy in ('torch', 'transformers', 'triton', 'accelerate', 'peft'): sys.modules[heavy] = None\n"
        f"import {module_of(ROOT / name)}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layout_hashes_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from engram.builders.layout import Layout\n"
        "layout = Layout.build(dialect='demo', orders=(2, 3), heads=2, head_dim=4, layers=(0,), rows_per_head=50,"
        " pad_id=0, vocab_size=100)\n"
        "print(layout.rows(np.arange(6, dtype=np.int64)[None])[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 6, 4)", done.stderr


def test_no_machine_paths_or_loose_ends() -> None:
    loose = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    places = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/")
    for file in room_files():
        text = file.read_text("utf-8")
        for word in (*loose, *places):
            assert word not in text, f"{file.relative_to(ROOT)} says {word}"


def test_every_file_is_on_the_map() -> None:
    map_text = (ROOT / "docs" / "house.md").read_text("utf-8")
    missing = [str(file.relative_to(ROOT)) for file in room_files() if f"`{file.name}`" not in map_text]
    assert not missing, f"add to docs/house.md: {missing}"
    there = {file.name for file in room_files()}
    gone = [
        name for name in re.findall(r"`([a-z0-9][a-z0-9_]*\.py)`", map_text.split("## Laws")[0]) if name not in there
    ]
    assert not gone, f"docs/house.md names files that are not there: {gone}"


def test_distribution_says_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["name"] == "engram-lm"
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "engram/__init__.py"
    assert project["project"]["requires-python"] == ">=3.11"


def test_every_dependency_is_pinned_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    pinned = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(set(pinned)) == len(pinned)
    for requirement in wanted:
        name = requirement.split(">=")[0].lower().replace("_", "-")
        assert name in pinned, f"{name} is in pyproject.toml, but not pinned in constraints.txt"
