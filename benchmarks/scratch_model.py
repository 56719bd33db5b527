"""Real backbones with Engram layers of random rows, as packages: what hashing and decoding are measured on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engram.builders.backbone import BackboneRef, dense_copy, load_backbone
from engram.builders.checkpoint import save_checkpoint
from engram.builders.engram import Gate, GateConfig
from engram.builders.fetch import SMOLLM2_GGUF, PackageFile, SplitFile, cache_folder
from engram.builders.gguf_header import read_metadata
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, gate_weights
from engram.builders.tokenizer import load_tokenizer, save_tokenizer
from engram.builders.vocab import compress_vocabulary
from engram.quantize.package import ExportConfig, export_package
from engram.quantize.tables import QuantizeConfig, quantize

LAYERS, ORDERS, HEADS = (1, 15), (2, 3), 8


def smollm2_folder() -> Path:
    """The backbone in transformers' format, float32, its tokenizer beside it; made once a machine."""
    folder = dense_copy(gguf := SMOLLM2_GGUF.fetch(), cache_folder(), "float32")
    if not (folder / "tokenizer.json").is_file():
        save_tokenizer(gguf, folder)
    return folder


def smollm2_layout(rows: int, head_dim: int) -> tuple[Layout, Path]:
    """The demo dialect over SmolLM2's tokenizer with about `rows` rows a layer, and the tokenizer's folder."""
    folder = smollm2_folder()
    tokenizer = load_tokenizer(folder)
    layout = Layout.build(
        dialect="demo", orders=ORDERS, heads=HEADS, head_dim=head_dim, layers=LAYERS,
        rows_per_head=max(2, rows // (len(ORDERS) * HEADS)), pad_id=2, vocab_size=tokenizer.get_vocab_size(),
        token_map=compress_vocabulary(tokenizer).token_map,
    )  # fmt: skip
    return layout, folder


def write_package(folder: Path, rows: int, codec: str = "int8", head_dim: int = 64, seed: int = 0) -> Path:
    """folder/package: random gates and tables over the real backbone, which the package refers to."""
    layout, source = smollm2_layout(rows, head_dim)
    backbone = BackboneRef.find(str(source))
    plain = load_backbone(backbone)
    hidden = int(plain.config.hidden_size)
    gates = {n: GateConfig.of_dialect("demo", hidden, layout.memory_width, 1, ORDERS[-1]) for n in LAYERS}
    model = EngramModel(plain, layout, gates)
    torch.manual_seed(seed)
    for parameter in model.gates.parameters():
        parameter.data.normal_(0, 0.02)
    draw = np.random.default_rng(seed)
    tables = {n: draw.standard_normal((layout.table_rows[n], head_dim), dtype=np.float32) for n in LAYERS}
    save_checkpoint(
        folder / "float", layout=layout, gates={n: gates[n].to_json() for n in LAYERS}, dense=gate_weights(model),
        tables=tables, backbone=backbone, tokenizer_folder=source,
    )  # fmt: skip
    quantize(QuantizeConfig(folder / "float", folder / "quantized", codec))
    export_package(ExportConfig(folder / "quantized", folder / "package", embed_backbone=False))
    return folder / "package"


def write_gguf_package(
    folder: Path, source: PackageFile | SplitFile, rows: int, *, layers: Sequence[int] = (2, 15), heads: int = 4,
    head_dim: int = 64, conv: int = 0, codec: str = "int8", seed: int = 0,
) -> Path:  # fmt: skip
    """folder/package: the same over a GGUF itself, in the geometry of recipes/attach-smollm2.yaml."""
    gguf = source.fetch()
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir()
    save_tokenizer(gguf, tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    layout = Layout.build(
        dialect="demo", orders=ORDERS, heads=heads, head_dim=head_dim, layers=layers,
        rows_per_head=max(2, rows // (len(ORDERS) * heads)), pad_id=2, vocab_size=tokenizer.get_vocab_size(),
        token_map=compress_vocabulary(tokenizer).token_map,
    )  # fmt: skip
    values = read_metadata(gguf)
    width = int(values[f"{values['general.architecture']}.embedding_length"])
    config = GateConfig(width, layout.memory_width, conv_kernel=conv)
    torch.manual_seed(seed)
    dense, tables = {}, {}
    draw = np.random.default_rng(seed)
    for layer in layers:
        gate = Gate(config)
        for parameter in gate.parameters():
            parameter.data.normal_(0, 0.02)
        dense[layer] = {name: value.detach().numpy() for name, value in gate.state_dict().items()}
        tables[layer] = draw.standard_normal((layout.table_rows[layer], head_dim), dtype=np.float32)
    save_checkpoint(
        folder / "float", layout=layout, gates={n: config.to_json() for n in layers}, dense=dense, tables=tables,
        backbone=BackboneRef.find(str(gguf)), tokenizer_folder=tokenizer_folder,
    )  # fmt: skip
    quantize(QuantizeConfig(folder / "float", folder / "quantized", codec))
    shutil.rmtree(folder / "float")
    export_package(ExportConfig(folder / "quantized", folder / "package", embed_backbone=False))
    return folder / "package"
