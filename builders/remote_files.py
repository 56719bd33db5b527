"""Checkpoints on a hub or a web server: what they are called, and their tensors from headers read over ranges.

`ORG/NAME[@REVISION][/FILE.gguf]` is a repository of the hub (HF_ENDPOINT, HF_TOKEN), pinned to its commit before a file
is read; `https://…` a folder or a file anywhere. Headers pass the same checks as those of local files, against the size
that the server states.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from engram import Progress
from engram.builders.gguf_header import GgufHeaderError, read_places, read_tensors
from engram.builders.http_ranges import MissingError, Ranges, RemoteError, origin_of
from engram.builders.tensor_files import (
    INDEX,
    Tensor,
    TensorFileError,
    TensorFiles,
    check_header,
    check_held,
    check_index,
    header_length,
    join,
    uncollected,
)

FIRST = 1 << 17  # bytes of a shard that are asked for at once: most headers fit
LONGEST_HEADER, LONGEST_INDEX, LONGEST_LISTING = 1 << 25, 1 << 26, 1 << 24
MOST_SHARDS = 4096
WINDOWS = (1 << 20, 1 << 23, 1 << 26)  # of a GGUF's header: its tokenizer is in it
_SINGLE = "model.safetensors"
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^/@]+))?((?:/[^/]+)*)/?", re.ASCII)
_HINT = "give a path that exists, a hub name ORG/NAME[@REVISION][/FILE.gguf], or an https:// URL"


@dataclass(frozen=True)
class Remote:
    """A folder on a server, or one file in it (`file`; "" for the folder).

    path: what stands for it in words and results, no path of this machine. names: the files in it; None where the
    server does not list them. source: what `path` says, and the commit.
    """

    path: Path
    source: str
    file: str
    names: frozenset[str] | None
    ranges: Ranges
    url_of: Callable[[str], str]

    @property
    def is_gguf(self) -> bool:
        return self.file.endswith(".gguf")

    def read(self, file: str, most: int) -> bytes:
        """A small file of the folder; MissingError where there is none."""
        if self.names is not None and file not in self.names:
            raise MissingError(f"{self.path} holds no {file}", hint=f"it holds {_some(self.names)}")
        job = partial(self.ranges.whole, self.url_of(file), str(self.path / file), most)
        return self.ranges.together({file: job}, f"reading {file}")[file]

    def open(self, wanted: re.Pattern[str]) -> TensorFiles:
        """The tensors. With an index only shards that hold `wanted` names are read, others when they are asked for."""
        with uncollected():
            if self.is_gguf:
                return self._gguf()
            index = None if self.file else self._index()
            if index is None:
                return TensorFiles(self.path, self._all_of(self._shards()))
            weight_map, total = index
            here = set(weight_map.values()) if self.names is None else self.names & set(weight_map.values())
            absent = {name: shard for name, shard in weight_map.items() if shard not in here}
            tensors = RemoteTensors(self, {name: shard for name, shard in weight_map.items() if shard in here})
            tensors.load(shard for name, shard in weight_map.items() if shard in here and wanted.search(name))
            return IndexedFiles(self.path, tensors, absent, stated_bytes=total)

    def headers(self, shards: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """What each shard holds, read AT_ONCE at a time and checked."""
        if len(shards) > MOST_SHARDS:
            raise TensorFileError(f"{self.path} has {len(shards):,} shards, at most {MOST_SHARDS:,} are read")
        return self.ranges.together({shard: partial(self._header, shard) for shard in shards})

    def _header(self, shard: str) -> dict[str, Tensor]:
        url, path = self.url_of(shard), self.path / shard
        data, size = self.ranges.piece(url, str(path), 0, FIRST)
        end = 8 + header_length(path, data[:8], size, LONGEST_HEADER)
        if end > len(data):
            rest = self.ranges.piece(url, str(path), len(data), end)
            _same(path, size, rest.size)
            data += rest.data
        return check_header(path, data[8:end], size)

    def _index(self) -> tuple[dict[str, str], int | None] | None:
        if self.names is not None and INDEX not in self.names:
            return None
        try:
            return check_index(self.path / INDEX, self.read(INDEX, LONGEST_INDEX))
        except MissingError:
            return None

    def _shards(self) -> list[str]:
        if self.file or self.names is None:
            return [self.file or _SINGLE]
        found = sorted(name for name in self.names if name.endswith(".safetensors"))
        if not found:
            raise TensorFileError(f"{self.path} holds no .safetensors file", hint=f"it holds {_some(self.names)}")
        return found

    def _all_of(self, shards: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        found = self.headers(shards)
        for shard in shards:
            join(tensors, self.path / shard, found[shard])
        return tensors

    def _gguf(self) -> TensorFiles:
        """Of growing windows, each parsed as a file: the whole header is there once a window of it can be parsed."""
        url, data = self.url_of(self.file), b""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / self.path.name
            size = -1
            for window in WINDOWS:
                job = partial(self.ranges.piece, url, str(self.path), len(data), window)
                piece = self.ranges.together({"": job})[""]
                if data:
                    _same(self.path, size, piece.size)
                size, data = piece.size, data + piece.data
                copy.write_bytes(data)
                try:
                    read_tensors(copy)
                except GgufHeaderError:
                    if data[:4] != b"GGUF" or len(data) == size or window == WINDOWS[-1]:
                        raise
                else:
                    break
            with copy.open("r+b") as file:
                try:
                    file.truncate(size)  # a hole, no disk space: places are checked against the size of the file
                except OSError:
                    raise RemoteError(f"{self.path} states a size of {size:,} bytes, no file here can be so") from None
            metadata, places = read_places(copy)
        return TensorFiles(self.path, {n: Tensor(self.path, *place) for n, place in places.items()}, metadata=metadata)


class RemoteTensors(Mapping[str, Tensor]):
    """Tensors by name as an index lists them; a shard's header is read when a tensor of it is first asked for."""

    def __init__(self, remote: Remote, weight_map: Mapping[str, str]) -> None:
        self._remote, self._map = remote, weight_map
        self._found: dict[str, Tensor] = {}
        self._read: set[str] = set()

    def load(self, shards: Iterable[str]) -> None:
        """Read the headers of these shards, several at a time; TensorFileError where they contradict the index."""
        wanted = dict.fromkeys(shard for shard in shards if shard not in self._read)
        for shard, found in self._remote.headers(wanted).items():
            join(self._found, self._remote.path / shard, found, self._map)
            self._read.add(shard)
        lacking = {name: shard for name, shard in self._map.items() if name not in self._found} if wanted else {}
        check_held(self._remote.path / INDEX, lacking, wanted)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            self.load([self._map[name]])
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._map

    def __iter__(self) -> Iterator[str]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)


@dataclass(frozen=True)
class IndexedFiles(TensorFiles):
    """Tensors of shards of which not all were read: how large all are together is what the index says."""

    stated_bytes: int | None = field(default=None)

    @property
    def total_bytes(self) -> int | None:
        return self.stated_bytes


def find_remote(name: str, progress: Progress = Progress()) -> Remote:
    """What a hub name or a URL stands for: a hub's repository is asked for its commit and files.

    Raises RemoteError for what is neither, or cannot be reached.
    """
    from huggingface_hub import constants

    hub = constants.ENDPOINT.rstrip("/")
    if name.startswith(("http://", "https://")):
        origin_of(name)
        page = re.fullmatch(r"/([^/]+/[^/]+?)(?:/(?:tree|blob|resolve)/([^/]+)((?:/[^/]+)*))?/?", urlsplit(name).path)
        if page is None or not name.startswith(hub + "/"):
            return _of_url(name, Ranges("", progress))
        name = page[1] + f"@{page[2]}" * bool(page[2]) + unquote(page[3] or "")
    found = _HUB.fullmatch(name)
    if found is None:
        raise RemoteError(f"{name!r:.200} is no path that exists, no hub name and no URL", hint=_HINT)
    return _of_hub(hub, found[1], unquote(found[2] or "main"), found[3].strip("/"), Ranges(hub, progress))


def _of_hub(hub: str, repository: str, revision: str, inside: str, ranges: Ranges) -> Remote:
    """One request: the commit and the files. Asked by its commit, no file changes while it is read."""
    from huggingface_hub import hf_hub_url

    folder, file = _split(inside)
    said = repository if revision == "main" else f"{repository}@{revision}"
    url = f"{hub}/api/models/{repository}/revision/{quote(revision, safe='')}"
    try:
        raw = ranges.together({"": partial(ranges.whole, url, said, LONGEST_LISTING)})[""]
    except RemoteError as wrong:
        raise type(wrong)(f"no path {said} is here; asked of {hub}: {wrong}", hint=wrong.hint) from None
    commit, files = _listing(said, raw)
    under = [path.removeprefix(folder) for path in files if path.startswith(folder)]
    names = frozenset(name for name in under if "/" not in name)
    if inside and not under or file and file not in names:
        raise MissingError(f"{said} holds no {inside}", hint=f"it holds {_some(files)}")

    def url_of(name: str) -> str:
        return hf_hub_url(repository, folder + name, revision=commit, endpoint=hub)

    path, source = Path(said) / folder, f"{repository}@{commit}" + f"/{inside}" * bool(inside)
    return Remote(path / file if file.endswith(".gguf") else path, source, file, names, ranges, url_of)


def _listing(said: str, raw: bytes) -> tuple[str, list[str]]:
    """Commit and paths of all files, of the hub's answer about a revision."""
    try:
        answer = json.loads(raw)
        commit, files = answer["sha"], [sibling["rfilename"] for sibling in answer["siblings"]]
        if not re.fullmatch("[0-9a-f]{40}", commit) or not all(isinstance(path, str) for path in files):
            raise ValueError("a commit or a file's name")
    except (ValueError, KeyError, TypeError, RecursionError) as wrong:
        raise RemoteError(f"{said}: the hub's answer about it lacks what is needed: {wrong!r:.200}") from None
    return commit, files


def _of_url(url: str, ranges: Ranges) -> Remote:
    """A file (.gguf, .safetensors), or a folder with a config.json; the query, often a signature, is never shown."""
    parts = urlsplit(url)
    folder, file = _split(parts.path)
    if parts.query and not file.endswith(".gguf"):
        raise RemoteError("a folder's URL takes no query", hint="only that of one .gguf file may have one")
    base = f"{parts.scheme}://{parts.netloc}"
    query = f"?{parts.query}" * bool(parts.query)
    path = Path(f"{parts.hostname}{unquote(folder)}")
    source = (base + folder + file).rstrip("/")

    def url_of(name: str) -> str:
        return f"{base}{folder}{file if name == file else quote(name)}{query}"

    return Remote(path / unquote(file) if file.endswith(".gguf") else path, source, file, None, ranges, url_of)


def _split(inside: str) -> tuple[str, str]:
    """A folder, ending in a slash where there is one, and the file in it, "" where the whole is a folder."""
    if any(part in (".", "..") for part in unquote(inside).split("/")):
        raise RemoteError(f"{inside!r:.200} has parts . or .., it is no plain place on a server")
    folder, _, file = inside.rpartition("/")
    if not file.endswith((".gguf", ".safetensors")):
        folder, file = inside.rstrip("/"), ""
    return f"{folder}/" * bool(folder or inside.startswith("/")), file


def _same(path: Path, before: int, after: int) -> None:
    if before != after:
        raise RemoteError(f"{path} had {before:,} bytes and has {after:,}: it changed while it was read")


def _some(names: Collection[str]) -> str:
    shown: list[Any] = sorted(names)[:8]
    return ", ".join(shown) + " …" * (len(names) > 8) if shown else "nothing"
