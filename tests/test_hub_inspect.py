"""`engram inspect` of hub names and URLs: what local files say, from few bytes, and hostile headers refused alike."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from hostile import FAULTS, INDEXES, split
from hub_server import COMMIT, SIGNATURE, Answer, Hub
from published import v41_tensors, write_longcat, write_qwen4_exp, write_qwen4exp_gguf, write_sparse, write_v41

from engram import EngramError
from engram.builders import remote_files
from engram.builders.families import known
from engram.builders.families.config import FamilyError
from engram.builders.gguf_header import GgufHeaderError
from engram.builders.http_ranges import MissingError, RemoteError
from engram.builders.remote_files import find_remote
from engram.builders.tensor_files import INDEX, TensorFileError
from engram.quantize.inspect_published import inspect_published, inspect_remote

ANY = re.compile("")
GEMMA = {"model_type": "gemma3n", "vocab_size_per_layer_input": 2, "hidden_size_per_layer_input": 1,
         "num_hidden_layers": 2}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the next one is made in this environment
    hub = Hub()
    for name, value in (("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE",
                        hub.url + "/{repo_id}/resolve/{revision}/{filename}")):  # fmt: skip
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield hub
    for role, path, headers in hub.log:
        assert role == "hub" or "authorization" not in headers, f"the token went to {path}"
    hub.close()


@pytest.fixture(scope="module")
def v41(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "DeepSeek-V4.1-Flash"
    write_v41(folder)
    return folder


def files_read(hub: Hub) -> list[str]:
    return [Path(path).name for role, path, headers in hub.log if "range" in headers and role == "hub"]


def test_v41_of_the_hub_is_v41_of_the_disk_from_its_table_shards_alone(hub: Hub, v41: Path) -> None:
    hub.repositories["deepseek-ai/DeepSeek-V4.1-Flash"] = v41
    hub.latency = 0.05
    began = time.monotonic()
    told = inspect_remote("deepseek-ai/DeepSeek-V4.1-Flash")
    assert time.monotonic() - began < 4, "0.5 to 0.8 s alone"
    here = inspect_published(v41)
    assert told.pop("source") == f"deepseek-ai/DeepSeek-V4.1-Flash@{COMMIT}"
    assert told["other"].pop("bytes") is None and here["other"].pop("bytes"), "this index does not say it"
    assert told == here
    assert sorted(files_read(hub)) == ["model-00047-of-00048.safetensors", "model-00048-of-00048.safetensors"]
    assert len(hub.log) == 7, "the commit, config.json, the index; two shards, each by a redirect"
    assert hub.sent < (v41 / INDEX).stat().st_size + 300_000


def test_bytes_besides_tables_are_what_the_index_says(hub: Hub, v41: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(v41 / "config.json")
    for number in (47, 48):
        name = f"model-000{number}-of-00048.safetensors"
        (tmp_path / name).symlink_to(v41 / name)
    here = inspect_published(v41)
    index = json.loads((v41 / INDEX).read_text())
    whole = here["table_bytes"] + here["other"]["bytes"]
    hub.repositories["a/b"] = tmp_path
    for said, bytes_ in ((whole, here["other"]["bytes"]), (5, None), ("x", None), (-1, None), (1 << 64, None)):
        (tmp_path / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": said}}))
        told = inspect_remote("a/b")
        assert told["other"]["bytes"] == bytes_ and len(told["missing_files"]) == 46


def test_a_shard_that_the_repository_lacks_is_named(hub: Hub, v41: Path, tmp_path: Path) -> None:
    for name in ("config.json", INDEX, "model-00047-of-00048.safetensors"):
        (tmp_path / name).symlink_to(v41 / name)
    hub.repositories["a/b"] = tmp_path
    told = inspect_remote("a/b")
    assert [layer["missing_files"] for layer in told["layers"]] == [[], ["model-00048-of-00048.safetensors"]]


def test_families_say_the_same_from_hub_and_disk(hub: Hub, tmp_path: Path) -> None:
    write_longcat(tmp_path / "longcat")
    write_qwen4_exp(tmp_path / "qwen")
    for name in ("longcat", "qwen"):
        hub.repositories[f"x/{name}"] = tmp_path / name
        told = inspect_remote(f"x/{name}")
        assert told.pop("source") == f"x/{name}@{COMMIT}" and told == inspect_published(tmp_path / name)


def test_shards_without_an_index_are_all_read(hub: Hub, tmp_path: Path) -> None:
    folder = split(tmp_path / "m")
    hub.repositories["a/b"] = folder
    indexed = find_remote("a/b").open(ANY)
    (folder / INDEX).unlink()
    listed = find_remote("a/b").open(ANY)
    assert dict(listed.tensors) == dict(indexed.tensors) and listed.total_bytes == 4 * 30 + 8 * 7 + 120
    assert listed.tensors["b"].file == Path("a/b/model-1.safetensors")


def test_a_tensor_in_two_shards_is_refused(hub: Hub, tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_sparse(tmp_path / f"{name}.safetensors", {"rows": ("BF16", [4])})
    hub.repositories["a/b"] = tmp_path
    with pytest.raises(TensorFileError, match=r"'rows' is in a/b/x.safetensors and in a/b/y.safetensors"):
        find_remote("a/b").open(ANY)


def test_an_indexed_shard_is_read_when_it_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["a/b"] = split(tmp_path / "m")
    files = find_remote("a/b").open(re.compile("^b$"))
    assert files_read(hub) == ["model-1.safetensors"] and "rows" in files.tensors and len(files.tensors) == 4
    assert files.find("rows").shape == (40, 3) and files_read(hub) == ["model-1.safetensors", "model-2.safetensors"]
    with pytest.raises(TensorFileError, match="a/b holds no tensor 'other'"):
        files.find("other")


def test_a_long_header_takes_a_second_range_and_no_third(hub: Hub, tmp_path: Path) -> None:
    write_sparse(tmp_path / "model.safetensors", {f"layers.{i}.some.weight": ("BF16", [4, 4]) for i in range(3000)})
    hub.repositories["a/b"] = tmp_path
    assert len(find_remote("a/b").open(ANY).tensors) == 3000
    end = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    ranges = [headers["range"] for role, _, headers in hub.log if role == "cdn"]
    assert ranges == ["bytes=0-131071", f"bytes=131072-{end - 1}"]


def test_a_gguf_is_read_in_growing_windows(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    hub.repositories["a/b"] = tmp_path
    told = inspect_remote("a/b/m.gguf")
    here = inspect_published(tmp_path / "m.gguf")
    assert told.pop("source") == f"a/b@{COMMIT}/m.gguf" and told == here and told["table_files"] == ["m.gguf"]
    monkeypatch.setattr(remote_files, "WINDOWS", (100, 600, 4000))
    hub.log.clear()
    told = inspect_remote("a/b/m.gguf")
    assert told["layers"] == here["layers"]
    ranges = [headers["range"] for role, _, headers in hub.log if role == "cdn"]
    assert ranges == ["bytes=0-99", "bytes=100-599", "bytes=600-3999"]
    monkeypatch.setattr(remote_files, "WINDOWS", (100, 600))
    with pytest.raises(GgufHeaderError, match="m.gguf: .* runs past the end of the file"):
        inspect_remote("a/b/m.gguf")


def test_a_gguf_that_lies_is_refused_by_the_same_words(hub: Hub, tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    hub.repositories["a/b"] = tmp_path
    for data, words in (
        (whole[:-400], "the file has"), (b"<html>" + bytes(1 << 21), "m.gguf begins with b'<htm'"),
        (whole[:8] + b"\xff" * 8 + whole[16:], "tensors, more than"), (b"", "cannot be read as GGUF"),
    ):  # fmt: skip
        (tmp_path / "m.gguf").write_bytes(data)
        hub.sent = 0
        with pytest.raises(GgufHeaderError, match=words):
            inspect_remote("a/b/m.gguf")
        assert hub.sent < (1 << 20) + 2000


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_of_a_header_is_named_as_on_disk(hub: Hub, tmp_path: Path, case: str) -> None:
    data, words = FAULTS[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    hub.repositories["a/b"] = tmp_path
    with pytest.raises(TensorFileError, match=words) as found:
        find_remote("a/b").open(ANY)
    assert "a/b/model.safetensors" in str(found.value) and hub.sent < (1 << 17) + 1000


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_is_refused_as_on_disk(hub: Hub, tmp_path: Path, case: str) -> None:
    folder = split(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    change, words = INDEXES[case]
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    hub.repositories["a/b"] = folder
    with pytest.raises(TensorFileError, match=words):
        find_remote("a/b").open(ANY)
    assert all("passwd" not in path and ".." not in path for _, path, _ in hub.log)


def test_limits_for_what_a_server_sends(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["a/b"] = tmp_path
    with (tmp_path / "model.safetensors").open("wb") as file:  # a header of 90 MB, which a local file may have
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(1 << 36)
    with pytest.raises(TensorFileError, match="states a header of 90,000,000 bytes, at most 33,554,432 are read"):
        find_remote("a/b").open(ANY)
    assert hub.sent < (1 << 17) + 1000
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 36)
    monkeypatch.setattr(remote_files, "LONGEST_INDEX", 1 << 16)
    with pytest.raises(RemoteError, match=f"a/b/{INDEX} has more than 65,536 bytes"):
        find_remote("a/b").open(ANY)
    (tmp_path / "config.json").write_bytes(b" " * ((1 << 24) + 1))
    with pytest.raises(RemoteError, match="a/b/config.json has more than 16,777,216 bytes"):
        inspect_remote("a/b")
    monkeypatch.setattr(remote_files, "MOST_SHARDS", 3)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(5)}}))
    for i in range(5):
        (tmp_path / f"{i}.safetensors").touch()
    with pytest.raises(TensorFileError, match="a/b has 5 shards, at most 3 are read"):
        find_remote("a/b").open(ANY)


def test_a_file_that_changes_while_it_is_read_is_refused(hub: Hub, tmp_path: Path) -> None:
    write_sparse(tmp_path / "model.safetensors", {f"t{i}": ("BF16", [4]) for i in range(9000)})
    hub.repositories["a/b"] = tmp_path

    def grow(answer: Answer) -> bool:
        if answer.headers.get("range", "").startswith("bytes=131072-") and answer.role == "cdn":
            with (tmp_path / "model.safetensors").open("ab") as file:
                file.write(b"x")
        return False

    hub.fault = grow
    with pytest.raises(RemoteError, match="it changed while it was read"):
        find_remote("a/b").open(ANY)


def test_a_revision_is_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    write_longcat(tmp_path / "m")
    hub.repositories["a/b"] = tmp_path / "m"
    assert inspect_remote(f"a/b@{COMMIT}")["source"] == f"a/b@{COMMIT}"
    assert inspect_remote("a/b@main")["layers"] and all(
        f"/resolve/{COMMIT}/" in path for role, path, _ in hub.log if role == "hub" and "/api/" not in path
    )
    with pytest.raises(MissingError, match="a/b@other: the hub has no such revision"):
        inspect_remote("a/b@other")
    with pytest.raises(MissingError, match=r"refs/pr/1: the hub has no such revision"):
        inspect_remote("a/b@refs%2Fpr%2F1")


def test_what_the_hub_says_of_a_repository_is_checked(hub: Hub) -> None:
    commit = "a" * 40
    for answer in (b"[]", b"{", b'{"sha":"main","siblings":[]}', b'{"sha":"%s"}' % commit.encode(), b"[" * 100_000,
                   b'{"sha":"%s","siblings":[{"rfilename":3}]}' % commit.encode(),
                   b'{"sha":["%s"],"siblings":[]}' % commit.encode()):  # fmt: skip
        hub.fault = lambda a, body=answer: a.send(200, body) is None  # type: ignore[misc]
        with pytest.raises(RemoteError, match="a/b: the hub's answer about it lacks what is needed"):
            find_remote("a/b")


def test_a_repository_or_file_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=f"no path x/none is here; asked of {hub.url}: x/none is not on the server"):
        inspect_remote("x/none")
    (tmp_path / "README.md").touch()
    hub.repositories["a/b"] = tmp_path
    with pytest.raises(FamilyError, match="a/b holds no config.json") as found:
        inspect_remote("a/b")
    assert "it holds README.md" in found.value.hint and "a/b/FILE.gguf" in found.value.hint
    for place in ("m.gguf", "sub"):
        with pytest.raises(MissingError, match=f"a/b holds no {place}"):
            inspect_remote(f"a/b/{place}")
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    with pytest.raises(TensorFileError, match="a/b holds no .safetensors file"):
        inspect_remote("a/b")


def test_a_gated_repository_says_how_to_get_in(hub: Hub) -> None:
    hub.fault = lambda a: a.status(403, "GatedRepo") is None
    with pytest.raises(RemoteError, match="a/b is gated") as found:
        inspect_remote("a/b")
    assert "HF_TOKEN" in found.value.hint and "hf_secret" not in str(found.value)


def test_urls_of_folders_and_files(hub: Hub, tmp_path: Path) -> None:
    write_longcat(tmp_path / "a" / "b" / "m")
    write_qwen4exp_gguf(tmp_path / "a" / "b" / "m.gguf")
    hub.repositories["a/b"] = tmp_path / "a" / "b"
    folder = inspect_published(tmp_path / "a" / "b" / "m")
    for url in (f"{hub.cdn}/a/b/m", f"{hub.cdn}/a/b/m/", f"{hub.cdn}/a/b/m/model.safetensors"):
        told = inspect_remote(url)
        assert told.pop("source") == url.rstrip("/") and told == folder
    told = inspect_remote(f"{hub.cdn}/a/b/m.gguf?{SIGNATURE}")
    assert told.pop("source") == f"{hub.cdn}/a/b/m.gguf" and told == inspect_published(tmp_path / "a" / "b" / "m.gguf")
    assert hub.log[-1][1].endswith(f"m.gguf?{SIGNATURE}")
    assert all("authorization" not in headers for _, _, headers in hub.log)
    with pytest.raises(RemoteError, match="takes no query"):
        inspect_remote(f"{hub.cdn}/a/b/m?{SIGNATURE}")
    with pytest.raises(MissingError, match="127.0.0.1/a/b/n.gguf is not on the server") as found:
        inspect_remote(f"{hub.cdn}/a/b/n.gguf?{SIGNATURE}")
    assert SIGNATURE not in f"{found.value}{found.value.hint}"
    with pytest.raises(FamilyError, match="127.0.0.1/a/b holds no config.json"):
        inspect_remote(f"{hub.cdn}/a/b")


def test_pages_of_the_hub_are_its_repositories(hub: Hub, tmp_path: Path) -> None:
    write_longcat(tmp_path / "sub" / "m")
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    hub.repositories["a/b"] = tmp_path
    for place in ("a/b/tree/main/sub/m", f"a/b/tree/{COMMIT}/sub/m/"):
        assert inspect_remote(f"{hub.url}/{place}")["source"] == f"a/b@{COMMIT}/sub/m"
    assert inspect_remote("a/b/sub/m")["family"] == "longcat_flash_ngram"
    for place in ("blob", "resolve"):
        assert inspect_remote(f"{hub.url}/a/b/{place}/main/m.gguf")["source"] == f"a/b@{COMMIT}/m.gguf"


@pytest.mark.parametrize("name", ["a/b/../c", "a", "a b/c", "a/b@x@y", "a/b//c", "../a/b", "https://h/a/../b", "é/b"])
def test_what_is_neither_path_nor_name_is_refused_without_a_request(hub: Hub, name: str) -> None:
    with pytest.raises(RemoteError, match="is no path that exists|parts . or ..") as found:
        inspect_remote(name)
    assert not hub.log and ("hub name" in found.value.hint or ".." in str(found.value))


def test_offline_no_server_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, words in (("a/b", "no path a/b is here; "), (f"{hub.cdn}/a/b", "^127.0.0.1/a/b/config.json")):
        with pytest.raises(RemoteError, match=f"{words}.* is on a server, and HF_HUB_OFFLINE is set"):
            inspect_remote(name)
    assert not hub.log


def test_every_published_memory_is_read_together(hub: Hub, tmp_path: Path) -> None:
    names = {*v41_tensors(3, 10), "model.layers.1.ple.ple_embedding.layer_multipliers", "x.oe_embed_tokens3.weight",
             "model.layers.1.ple.key_proj.weight", "model.ngram_embeddings.embedders.0.weight",
             "x.oe_embed_proj0.weight", "model.embed_tokens_per_layer.weight"}  # fmt: skip
    assert all(known._MEMORY.search(name) for name in names)
    assert not any(known._MEMORY.search(f"model.layers.0.{name}.weight") for name in ("mlp.gate", "sample.q", "norm"))


def engram(hub: Hub, *words: str, cwd: Path, **changes: str) -> tuple[list[str], dict[str, Any]]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "NO_COLOR": "1", **changes}
    return [sys.executable, "-m", "engram.cli.main", "inspect", *words], {"cwd": cwd, "env": environment, "text": True}


def test_the_command_line_takes_paths_before_names(hub: Hub, tmp_path: Path) -> None:
    write_longcat(tmp_path / "m")
    hub.repositories["a/b"] = tmp_path / "m"
    command, how = engram(hub, "a/b", "--json", cwd=tmp_path)
    far = subprocess.run(command, capture_output=True, **how)
    assert far.returncode == 0 and not far.stderr, far.stderr
    told = json.loads(far.stdout)
    assert told.pop("source") == f"a/b@{COMMIT}" and told == inspect_published(tmp_path / "m")
    assert "secret" not in far.stdout and SIGNATURE not in far.stdout
    words = subprocess.run(command[:-1], capture_output=True, **how)
    assert f"read from headers: a/b@{COMMIT}" in words.stdout and "longcat_flash_ngram" in words.stdout
    hub.log.clear()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path / "m")
    near = subprocess.run(command, capture_output=True, **how)
    assert near.returncode == 0 and "source" not in json.loads(near.stdout) and not hub.log
    errors = {"out/none": "no path out/none is here", "none": "'none' is no path that", "./a/c": "'./a/c' is no path"}
    for name, error in errors.items():
        failed = subprocess.run([*command[:-2], name], capture_output=True, **how)
        assert failed.returncode == 1 and error in failed.stderr and "hint:" in failed.stderr, failed.stderr
    assert len(hub.log) == 1, "./a/c and none are paths alone"


def test_interrupted_while_a_server_is_silent(hub: Hub, tmp_path: Path) -> None:
    hub.latency = 20.0
    command, how = engram(hub, "a/b", cwd=tmp_path)
    with subprocess.Popen(command, stderr=subprocess.PIPE, **how) as process:
        while not hub.log:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130 and time.monotonic() - began < 5
        assert process.stderr is not None and "interrupted" in process.stderr.read()


def test_a_name_can_be_any_string(hub: Hub) -> None:
    for name in ("", "\0/x", "x/" + "y" * 5000, "https://", "http://[/a/b"):
        with pytest.raises(EngramError):
            inspect_remote(name)
