"""A tiny model with a memory, written to disk as a user would find it: for tests of everything after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import save_checkpoint
from engram.builders.engram import GateConfig
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, gate_weights
from engram.builders.vocab import compress_vocabulary

TEXT = "The memory of a model is a table. A table has rows, and the rows are read from the disk by their numbers. " * 3


def write_tokenizer(folder: Path, size: int = 300) -> Path:
    """A byte-level BPE of `size` ids, trained on the text above: folder/tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_backbone(folder: Path, vocab_size: int) -> Path:
    """A Llama of 3 blocks, 32 wide, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_checkpoint(
    folder: Path, *, dialect: str = "demo", layers: tuple[int, ...] = (1, 3), rows_per_head: int = 211,
    seed: int = 1, backbone: Path | None = None,
) -> Path:  # fmt: skip
    """A float checkpoint with random gates and tables at folder/checkpoint; tokenizer and backbone lie beside it.

    `backbone`: another one of at least 300 token ids.
    """
    tokenizer_path = write_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    vocab = tokenizer.get_vocab_size()
    found = BackboneRef.find(str(backbone or write_backbone(folder / "backbone", vocab)))
    compressed = None if dialect == "qwen-ple" else compress_vocabulary(tokenizer).token_map
    layout = Layout.build(
        dialect=dialect, orders=(2, 3), heads=2, head_dim=8, layers=layers, rows_per_head=rows_per_head, pad_id=1,
        vocab_size=vocab, token_map=compressed, reset_id=0 if dialect == "qwen-ple" else None,
    )  # fmt: skip
    from engram.builders.backbone import load_backbone

    loaded = load_backbone(found)
    gates = {n: GateConfig.of_dialect(dialect, loaded.config.hidden_size, layout.memory_width, 1, 3) for n in layers}
    model = EngramModel(loaded, layout, gates)
    torch.manual_seed(seed)
    for parameter in model.gates.parameters():
        parameter.data.normal_(0, 0.4)
    generator = np.random.default_rng(seed + 1)
    tables = {n: generator.normal(size=(layout.table_rows[n], 8)).astype(np.float32) for n in layers}
    save_checkpoint(
        folder / "checkpoint", layout=layout, gates={n: gates[n].to_json() for n in layers}, dense=gate_weights(model),
        tables=tables, backbone=found, tokenizer_folder=folder / "tokenizer",
    )  # fmt: skip
    return folder / "checkpoint"
