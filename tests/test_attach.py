"""A GGUF attached to a memory: one that fits is the package's backbone, every other one is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs gguf", allow_module_level=True)

import gguf as gguf_library  # noqa: E402
from gguf_llama import VOCAB, WIDTH, write_gguf  # noqa: E402

from engram.builders.backbone import BackboneRef  # noqa: E402
from engram.builders.checkpoint import save_checkpoint  # noqa: E402
from engram.builders.engram import Gate, GateConfig  # noqa: E402
from engram.builders.fetch import GEMMA3_GGUF, SMOLLM2_GGUF, hash_file  # noqa: E402
from engram.builders.gguf_header import GgufHeaderError  # noqa: E402
from engram.builders.layout import Layout  # noqa: E402
from engram.builders.tokenizer import save_tokenizer  # noqa: E402
from engram.cli import main as cli  # noqa: E402
from engram.quantize.attach import AttachError, attach  # noqa: E402
from engram.quantize.package import ExportConfig, export_package, open_package  # noqa: E402
from engram.quantize.verify import verify_package  # noqa: E402


def checkpoint(folder: Path, gguf: Path, tokenizer: Path, *, width: int, vocab: int, layers: tuple[int, ...]) -> Path:
    """A random memory over a GGUF."""
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=8, layers=layers, rows_per_head=50, pad_id=2,
        vocab_size=vocab, token_map=np.arange(vocab) // 2,
    )  # fmt: skip
    config = GateConfig(width, layout.memory_width)
    dense = {n: {name: value.detach().numpy() for name, value in Gate(config).state_dict().items()} for n in layers}
    tables = {n: np.zeros((layout.table_rows[n], 8), dtype=np.float32) for n in layers}
    save_checkpoint(
        folder, layout=layout, gates={n: config.to_json() for n in layers}, dense=dense, tables=tables,
        backbone=BackboneRef.find(str(gguf)), tokenizer_folder=tokenizer,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint over a float32 GGUF of two blocks."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("attach")
    (folder / "tokenizer").mkdir()
    Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0")).save(
        str(folder / "tokenizer" / "tokenizer.json")
    )
    gguf = write_gguf(folder / "float.gguf")
    return checkpoint(folder / "checkpoint", gguf, folder / "tokenizer", width=WIDTH, vocab=VOCAB, layers=(1, 2))


def refused(made: Path, gguf: Path, match: str) -> None:
    out = gguf.parent / "out"
    with pytest.raises(AttachError, match=match):
        export_package(ExportConfig(made, out, backbone=gguf))
    assert not out.exists()


@pytest.mark.parametrize("embed", [True, False])
def test_a_file_that_fits_is_the_backbone(made: Path, tmp_path: Path, embed: bool) -> None:
    """A quantized file with unused ids behind the known ones; the memory stays what it was."""
    other = write_gguf(tmp_path / "q8.gguf", kind=gguf_library.GGMLQuantizationType.Q8_0, vocab=VOCAB + 32)
    export_package(ExportConfig(made, tmp_path / "plain", embed_backbone=embed))
    export_package(ExportConfig(made, tmp_path / "package", embed_backbone=embed, backbone=other))
    with open_package(tmp_path / "package") as package, open_package(tmp_path / "plain") as plain:
        place = package.backbone.place(package.folder)
        assert place is not None and hash_file(place) == hash_file(other)
        assert package.backbone.kind == ("embedded" if embed else "gguf")
        assert (place == other) == (not embed)
        tables = [(one.manifest["tables"], one.manifest["layout"], one.manifest["gate"]) for one in (package, plain)]
        assert tables[0] == tables[1]
    assert verify_package(tmp_path / "package")["ok"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": 1}, r"the gate of layer 2 is for a stream of 256, .* has one of 256 and 1 blocks"),
        ({"blocks": 3}, "has blocks 3, the memory's backbone has 2"),
        ({"architecture": "qwen2"}, "has architecture 'qwen2', the memory's backbone has 'llama'"),
        ({"vocab": VOCAB - 1}, f"embeds {VOCAB - 1} token ids, the layout has {VOCAB}"),
        ({"tokens": [f"t{n}" for n in range(VOCAB - 2)] + ["x", "y"]},
         f"2 of {VOCAB} token ids mean something else in .*, the first is {VOCAB - 2}: there 'x', .* 't{VOCAB - 2}'"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused(made: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    refused(made, write_gguf(tmp_path / "other.gguf", **options), match)


def test_another_width_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_llama.WIDTH", 128)
    refused(made, write_gguf(tmp_path / "narrow.gguf"), "layer 1 is for a stream of 256, .* has one of 128")


def test_what_is_no_gguf_is_refused(made: Path, tmp_path: Path) -> None:
    refused(made, tmp_path / "absent.gguf", "does not exist")
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    refused(made, tmp_path / "model.bin", "is no GGUF by its name")
    (tmp_path / "hostile.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 40)
    with pytest.raises(GgufHeaderError):
        export_package(ExportConfig(made, tmp_path / "out", backbone=tmp_path / "hostile.gguf"))
    manifest = {**json.loads((made / "engram.json").read_text()), "backbone": {"kind": "none", "path": "V4.1"}}
    with pytest.raises(AttachError, match="converted tables without gates"):
        attach(tmp_path / "model.gguf", made, manifest, Layout.load(made))


def test_real_models_fit_their_own_memory_and_not_the_other(tmp_path: Path) -> None:
    """SmolLM2 (byte-level BPE) and Gemma (SentencePiece): their tokenizers are compared id by id."""
    made = {}
    for name, source, width, vocab in (("smollm2", SMOLLM2_GGUF, 576, 49152), ("gemma", GEMMA3_GGUF, 640, 262144)):
        gguf = source.fetch()
        (tmp_path / name).mkdir()
        save_tokenizer(gguf, tmp_path / name)
        folder = tmp_path / f"{name}-memory"
        made[name] = (gguf, checkpoint(folder, gguf, tmp_path / name, width=width, vocab=vocab, layers=(2,)))
    for name, (gguf, folder) in made.items():
        found = attach(gguf, folder, json.loads((folder / "engram.json").read_text()), Layout.load(folder))
        assert found.sha256 == {gguf.name: hash_file(gguf)}, name
    (smollm2, _), (_, gemma_memory) = made["smollm2"], made["gemma"]
    refused(gemma_memory, smollm2, "layer 2 is for a stream of 640, .* has one of 576 and 30 blocks")


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_gguf(tmp_path / "other.gguf", blocks=3)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(made), "--out", str(tmp_path / "out"), "--backbone", str(other)])
    assert leaving.value.code == 1
    assert "blocks 3" in capsys.readouterr().err
    fitting = write_gguf(tmp_path / "fitting.gguf")
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(made), "--out", str(tmp_path / "out"), "--backbone", str(fitting), "--json"])
    assert not leaving.value.code
    assert json.loads(capsys.readouterr().out)["backbone"] == "embedded"
