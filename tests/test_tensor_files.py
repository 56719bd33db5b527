"""Headers of strangers: read as the stock libraries read them, and refused by name where they lie."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hostile import FAULTS, INDEXES, arrays, split
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from engram import EngramError
from engram.builders.gguf_header import GGML, GgufHeaderError
from engram.builders.tensor_files import INDEX, TensorFileError, open_files, read_header

MUTATIONS = 4000


def read_by_offset(path: Path, name: str) -> bytes:
    tensor = open_files(path).tensors[name]
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.bytes)


def test_places_are_where_the_library_put_the_bytes(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "m.safetensors", {"format": "pt"})
    found = open_files(tmp_path / "m.safetensors").tensors
    assert set(found) == set(arrays())
    for name, array in arrays().items():
        assert found[name].shape == array.shape and read_by_offset(tmp_path / "m.safetensors", name) == array.tobytes()


def test_a_folder_is_its_shards_with_an_index_or_without(tmp_path: Path) -> None:
    folder = split(tmp_path / "m")
    indexed = open_files(folder)
    (folder / INDEX).unlink()
    assert open_files(folder).tensors == indexed.tensors and set(indexed.tensors) == set(arrays())


def test_a_shard_that_is_not_there_is_named_when_it_is_needed(tmp_path: Path) -> None:
    folder = split(tmp_path / "m")
    (folder / "model-2.safetensors").unlink()
    found = open_files(folder)
    assert set(found.absent) == set(list(arrays())[2:]) and found.find("b")
    with pytest.raises(TensorFileError, match=r"'rows' is in .*model-2\.safetensors, which is not there"):
        found.find("rows")
    with pytest.raises(TensorFileError, match="holds no tensor 'other'"):
        found.find("other")


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    folder = split(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    change, words = INDEXES[case]
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(TensorFileError, match=words):
        open_files(folder)


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"rows": np.zeros(3, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TensorFileError, match=r"'rows' is in .*a\.safetensors and in .*b\.safetensors"):
        open_files(tmp_path)


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_of_a_header_is_named(tmp_path: Path, case: str) -> None:
    data, words = FAULTS[case]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(TensorFileError, match=words):
        open_files(tmp_path / "m.safetensors")


def mutated(data: bytes, generator: random.Random, end: int) -> bytes:
    """One to four changes of the first `end` bytes: flipped, replaced, cut, doubled, or numbers made huge."""
    out = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(min(end, len(out)) or 1)
        match generator.randrange(6):
            case 0:
                out[at] ^= 1 << generator.randrange(8)
            case 1:
                out[at] = generator.randrange(256)
            case 2:
                del out[at : at + generator.randint(1, 9)]
            case 3:
                out[at:at] = out[at : at + generator.randint(1, 30)]
            case 4:
                out[at : at + 1] = str(generator.choice([-1, 1 << 31, 1 << 63, 1 << 70])).encode()
            case 5:
                out[at : at + 8] = struct.pack("<Q", generator.choice([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1]))
    return bytes(out)


def test_of_thousands_of_changed_headers_none_is_read_but_as_the_library_reads_it(tmp_path: Path) -> None:
    data, path = save(arrays(), {"format": "pt"}), tmp_path / "m.safetensors"
    end, generator, read = 8 + int.from_bytes(data[:8], "little"), random.Random(0), 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, generator, end))
        try:
            found = read_header(path)
        except TensorFileError:
            continue
        read += 1
        raw = path.read_bytes()
        try:
            with safe_open(path, "numpy") as library:
                assert set(found) == set(library.keys())
                for name, tensor in found.items():
                    values = library.get_tensor(name)
                    assert values.tobytes() == raw[tensor.offset : tensor.offset + tensor.bytes]
                    assert values.shape == tensor.shape
        except (SafetensorError, TypeError, AttributeError) as wrong:  # a dtype that numpy has not
            assert "F8" in str(wrong) or "BF16" in str(wrong) or "bfloat16" in str(wrong) or "F4" in str(wrong), wrong
    assert 20 < read < MUTATIONS / 2


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    floats, halves = generator.normal(size=(3, 64)).astype(np.float32), generator.normal(size=5).astype(np.float16)
    whole = {"f": floats, "h": halves}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d"])
    for name, array in whole.items():
        writer.add_tensor(name, array)
    quantized = gguf.quants.quantize(whole["f"], gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole | {"q": quantized}


def test_places_of_a_gguf_are_where_its_library_put_the_bytes(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf")
    found = open_files(tmp_path / "m.gguf")
    assert found.metadata["llama.block_count"] == 2 and set(found.tensors) == set(whole)
    for name, array in whole.items():
        assert read_by_offset(tmp_path / "m.gguf", name) == array.tobytes()
    assert found.tensors["q"].shape == (3, 64) and found.tensors["q"].dtype == "Q4_0"


def test_ggml_types_are_those_of_its_library() -> None:
    for number, (name, values, size) in GGML.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (values, size)


def test_of_thousands_of_changed_ggufs_none_points_outside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data, generator, read = path.read_bytes(), random.Random(1), 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, generator, 400))
        try:
            found = open_files(path)
        except (GgufHeaderError, TensorFileError):
            continue
        read += 1
        spans = sorted((t.offset, t.offset + t.bytes) for t in found.tensors.values() if t.bytes)
        assert all(0 <= begin <= end <= path.stat().st_size for begin, end in spans)
        assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
    assert 20 < read < MUTATIONS


@pytest.mark.parametrize("what", ["file", "folder", "kind"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.bin").write_bytes(b"1")
    place = {"file": tmp_path / "none.safetensors", "folder": tmp_path, "kind": tmp_path / "x.bin"}[what]
    with pytest.raises(EngramError, match="cannot be read|holds no .safetensors|is no checkpoint"):
        open_files(place)
