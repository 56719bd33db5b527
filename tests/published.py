"""Tiny checkpoints of the published families: by transformers' own classes, or by the published list of tensors."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, tuple[str, list[int]]]  # name → dtype and shape
Change = Callable[[dict[str, Any], Tensors], Any]
FAULTS_OF_TENSORS = ("gone", "renamed", "one more", "flat", "no rows", "dtype")
V41_CONFIG = {
    "model_type": "deepseek_v41",
    "text_config": {
        "engram_layer_ids": [1, 14], "engram_num_embeddings": [384006168, 384016682], "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000, "engram_n_heads": 8, "engram_head_dim": 256, "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092, "hidden_size": 5120, "hc_mult": 4, "vocab_size": 129280,
        "image_token_id": 129264, "rms_norm_eps": 1e-20, "num_hidden_layers": 40,
    },
}  # fmt: skip
DEMO_CONFIG = {  # the demo's EngramConfig and BackBoneConfig in miniature
    "model_type": "engram", "tokenizer_name_or_path": "deepseek-ai/DeepSeek-V3", "engram_vocab_size": [60, 40],
    "max_ngram_size": 3, "n_embed_per_ngram": 16, "n_head_per_ngram": 2, "layer_ids": [3, 1], "pad_id": 2, "seed": 0,
    "kernel_size": 4, "hidden_size": 8, "hc_mult": 2, "vocab_size": 12,
}  # fmt: skip
WORDS = ["a", "A", "b", "c", "the", "The", "cat", "Cat", "x", "y", "<img>", "z"]  # nine compressed ids
BITS = {"F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "F32": 32, "I64": 64}


def write_qwen4_exp(folder: Path) -> Any:
    """Qwen3.8-Flash-Next in miniature; the model."""
    import torch
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

    torch.manual_seed(0)
    config = Qwen4ExpTextConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts_per_tok=2, num_experts=4,
        ple_layer_ids=[2], ple_embed_dim=64, ngram_size=3, heads_per_ngram=2, ngram_vocab_size_base=1000,
        split_ngram_parts=4, make_ngram_vocab_size_divisible_by=8, hc_count=2, hc_lowrank=8, eos_token_id=511,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=16, indexer_compress_ratio=4,
    )  # fmt: skip
    model = Qwen4ExpForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def write_gemma(folder: Path, kind: str) -> Any:
    """Gemma 3n or Gemma 4 in miniature; the model."""
    import torch
    from transformers.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig
    from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512, "vocab_size_per_layer_input": 400, "hidden_size": 32, "hidden_size_per_layer_input": 8,
        "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "num_kv_shared_layers": 0,
    }  # fmt: skip
    if kind == "gemma3n":
        config = Gemma3nTextConfig(**sizes, laurel_rank=4, activation_sparsity_pattern=[0.0] * 5)
        model = Gemma3nForCausalLM(config).eval()
    else:
        model = Gemma4ForCausalLM(Gemma4TextConfig(**sizes)).eval()
    model.save_pretrained(folder)
    return model


def write_longcat(folder: Path, names: str = "model.ngram_embeddings.embedders.{}.weight") -> dict[str, np.ndarray]:
    """LongCat-Flash-Lite's memory in miniature, under its first names or the alias; all arrays."""
    folder.mkdir(parents=True)
    vocabulary, hidden, ratio, orders, heads = 50, 48, 3, 3, 4
    config = {
        "model_type": "longcat_flash_ngram", "vocab_size": vocabulary, "hidden_size": hidden, "eos_token_id": 2,
        "ngram_vocab_size_ratio": ratio, "emb_neighbor_num": orders + 1, "emb_split_num": heads,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    projection = names.replace("embedders.", "post_projs.").replace("embed_tokens", "embed_proj")
    arrays = {"model.embed_tokens.weight": generator.normal(size=(vocabulary, hidden)).astype(np.float32)}
    for i in range(orders * heads):
        rows = ratio * vocabulary + 2 * i + 1
        arrays[names.format(i)] = generator.normal(size=(rows, hidden // 12)).astype(np.float32)
        arrays[projection.format(i)] = generator.normal(size=(hidden, hidden // 12)).astype(np.float32)
    save_file(arrays, folder / "model.safetensors")
    return arrays


def write_sparse(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file of any size whose data are holes of the file system: zeros, no disk space."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=object)) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def v41_tensors(layer: int, rows: int) -> dict[str, tuple[str, list[int]]]:
    """What DeepSeek-V4.1-Flash stores of one memory layer."""
    start = f"layers.{layer}.engram."
    return {
        start + "embed.weight": ("F8_E4M3", [rows, 256]), start + "embed.scale": ("F8_E8M0", [rows, 8]),
        start + "wkv.weight": ("F8_E4M3", [25600, 6144]), start + "wkv.scale": ("F8_E8M0", [800, 192]),
        start + "q_weight": ("BF16", [4, 5120]), start + "k_weight": ("BF16", [4, 5120]),
    }  # fmt: skip


def write_v41(folder: Path, shards: int = 48, others: int = 96_073) -> None:
    """DeepSeek-V4.1-Flash in full geometry as sparse files: 48 shards, 96,085 tensors, tables in the last two."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(V41_CONFIG))
    files: dict[int, dict[str, tuple[str, list[int]]]] = {n: {} for n in range(1, shards + 1)}
    for i in range(others):
        files[1 + i % (shards - 2)][f"layers.{i % 40}.ffn.experts.{i // 40}.w{i % 3}.weight"] = ("BF16", [64, 32])
    for shard, layer, rows in ((shards - 1, 1, 384006168), (shards, 14, 384016682)):
        files[shard] |= v41_tensors(layer, rows)
    weight_map = {}
    for number, tensors in files.items():
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_sparse(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_qwen4exp_gguf(path: Path, kind: str = "Q4_0", **changes: Any) -> np.ndarray:
    """The memory of a qwen4exp GGUF, as llama.cpp reads it: keys and table, nothing of the backbone; the rows."""
    import gguf

    from engram.kernels.codecs import find_codec

    sizes, width = (53, 59, 61, 67), 32
    values: dict[str, Any] = {
        "layers": [1], "ngram_size": 3, "heads_per_ngram": 2, "conv_kernel": 4, "eos_token_id": 9,
        "layer_multipliers": [11, 13, 17], "head_vocab_sizes": list(sizes), "head_offsets": [0, 53, 112, 173],
    } | changes  # fmt: skip
    writer = gguf.GGUFWriter(path, "qwen4exp")
    writer.add_vocab_size(300)
    writer.add_embedding_length_per_layer_input(width)
    for name, value in values.items():
        key = f"qwen4exp.ple.{name}"
        writer.add_array(key, value) if isinstance(value, list) else writer.add_uint32(key, value)
    rows = np.random.default_rng(0).normal(size=(sum(sizes), width)).astype(np.float32)
    dtype = gguf.GGMLQuantizationType[kind]
    stored = find_codec("iq4_nl").encode(rows) if kind == "IQ4_NL" else gguf.quants.quantize(rows, dtype)
    writer.add_tensor("per_layer_token_embd.weight", stored, raw_dtype=dtype)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_small_v41(
    folder: Path, base: int = 60, layers: tuple[int, ...] = (1, 3), seed: int = 0, heads: int = 2, orders: int = 2,
    width: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """DeepSeek-V4.1's layout in miniature, with real bytes, a tokenizer and one shard a layer; all arrays."""
    import torch
    from safetensors.torch import save_file as save

    from engram.builders.hash_constants import prime_moduli

    folder.mkdir(parents=True)
    write_words(folder)
    hidden, streams = 16, 2
    primes = prime_moduli(list(layers), [base] * orders, heads)
    rows = {layer: sum(map(sum, primes[layer])) for layer in layers}
    text = {
        "engram_layer_ids": list(layers), "engram_num_embeddings": list(rows.values()),
        "engram_max_ngram_size": orders + 1, "engram_vocab_size": base, "engram_n_heads": heads,
        "engram_head_dim": width, "engram_pad_id": 2, "engram_compressed_vocab_size": 9, "hidden_size": hidden,
        "hc_mult": streams, "vocab_size": len(WORDS), "image_token_id": 10,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    generator, arrays, weight_map = np.random.default_rng(seed), {}, {}
    for number, layer in enumerate(layers):
        start = f"model.layers.{layer}.engram."
        values = generator.integers(0, 256, (rows[layer], width), dtype=np.uint8) & 0xF7  # no NaN
        scales = generator.integers(110, 130, (rows[layer], width // 32), dtype=np.uint8)
        arrays[layer] = values, scales
        wide = (hidden * (streams + 1), heads * orders * width)
        shard = f"model-{number + 1:05d}-of-{len(layers) + 1:05d}.safetensors"
        tensors = {
            start + "embed.weight": torch.from_numpy(values).view(torch.float8_e4m3fn),
            start + "embed.scale": torch.from_numpy(scales).view(torch.float8_e8m0fnu),
            start + "wkv.weight": torch.randn(wide).to(torch.bfloat16),
            start + "q_weight": torch.randn(streams, hidden), start + "k_weight": torch.randn(streams, hidden),
        }  # fmt: skip
        save(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    last = f"model-{len(layers) + 1:05d}-of-{len(layers) + 1:05d}.safetensors"
    save({"model.norm.weight": torch.ones(hidden)}, folder / last)
    weight_map["model.norm.weight"] = last
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return arrays


def write_words(folder: Path) -> None:
    """A tokenizer of WORDS."""
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(WORDS)}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))


def demo_tensors(start: str, config: dict[str, Any] = DEMO_CONFIG) -> dict[str, tuple[str, list[int]]]:
    """What the state_dict of the demo's memories holds, as the demo writes it; `start` has a place for the layer."""
    from sympy import nextprime

    heads, each = config["n_head_per_ngram"], config["n_embed_per_ngram"]
    hidden, streams = config["hidden_size"], config["hc_mult"]
    wide = each * len(config["engram_vocab_size"])
    taken: set[int] = set()
    tensors: dict[str, tuple[str, list[int]]] = {}
    for layer in config["layer_ids"]:
        moduli = []
        for size in config["engram_vocab_size"]:
            prime = size - 1
            for _ in range(heads):
                prime = nextprime(prime)
                while prime in taken:
                    prime = nextprime(prime)
                taken.add(prime)
                moduli.append(prime)
        name = start.format(layer)
        tensors |= {
            name + "multi_head_embedding.offsets": ("I64", [len(moduli)]),
            name + "multi_head_embedding.embedding.weight": ("F32", [sum(moduli), each // heads]),
            name + "short_conv.conv.weight": ("F32", [hidden * streams, 1, config["kernel_size"]]),
            name + "value_proj.weight": ("F32", [hidden, wide]), name + "value_proj.bias": ("F32", [hidden]),
        }  # fmt: skip
        for m in range(streams):
            norms = ("norm1", "norm2", "short_conv.norms")
            tensors |= {f"{name}{norm}.{m}.weight": ("F32", [hidden]) for norm in norms}
            tensors[f"{name}key_projs.{m}.weight"] = ("F32", [hidden, wide])
            tensors[f"{name}key_projs.{m}.bias"] = ("F32", [hidden])
    return tensors


def write_demo(folder: Path, start: str = "model.layers.{}.engram.", shards: bool = False) -> dict[str, np.ndarray]:
    """The demo's memories with random numbers, true offsets and a tokenizer; all arrays. `shards`: one a layer."""
    from sympy import prevprime

    folder.mkdir(parents=True)
    write_words(folder)
    (folder / "config.json").write_text(json.dumps(DEMO_CONFIG))
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, (_, shape) in demo_tensors(start).items():
        arrays[name] = generator.normal(size=shape).astype(np.float32)
    moduli = {3: [61, 67, 41, 43], 1: [71, 73, 47, 53]}  # by hand: from 60 and from 40 on, none twice
    for layer, primes in moduli.items():
        assert all(prevprime(prime + 1) == prime for prime in primes)
        name = start.format(layer) + "multi_head_embedding.offsets"
        arrays[name] = np.cumsum([0, *primes[:-1]], dtype=np.int64)
    arrays["model.norm.weight"] = np.ones(8, np.float32)
    if not shards:
        save_file(arrays, folder / "model.safetensors")
        return arrays
    weight_map = {name: f"layer-{1 if start.format(1) in name else 3}.safetensors" for name in arrays}
    for shard in set(weight_map.values()):
        save_file({name: arrays[name] for name in arrays if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return arrays


def write_zeros(folder: Path, config: dict[str, Any], tensors: Tensors, change: Change) -> Path:
    """A checkpoint of zeros from a configuration and a list of tensors, both changed before."""
    folder.mkdir()
    config, tensors = json.loads(json.dumps(config)), dict(tensors)
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    write_sparse(folder / "engram_adapters.safetensors", tensors)
    return folder


def alter(how: str, name: str) -> Change:
    """One tensor gone, renamed, or of another shape or dtype."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        dtype, shape = tensors.pop(name)
        other = {
            "renamed": (name[:-1], dtype, shape), "one more": (name, dtype, [*shape[:-1], shape[-1] + 1]),
            "flat": (name, dtype, [*shape, 1]), "no rows": (name, dtype, [0, *shape[1:]]),
            "dtype": (name, "F8_E4M3", shape),
        }  # fmt: skip
        if how != "gone":
            tensors[other[how][0]] = other[how][1:]

    return change


def count_refusals(folder: Path) -> int:
    """How many configurations with a value of another type or size are refused; none may crash or take long."""
    from engram import EngramError
    from engram.builders.families.known import find_published

    values: list[Any] = [None, True, -1, 0, 1, 2**40, 2**70, 1.5, "x", [], [1], [-1], [2**70], {}, [[1]], float("inf")]
    good, refused = json.loads((folder / "config.json").read_text()), 0
    for key in good:
        for value in values:
            (folder / "config.json").write_text(json.dumps(good | {key: value}))
            begin = time.process_time()
            try:
                find_published(folder)
            except EngramError:
                refused += 1
            assert time.process_time() - begin < 5, (key, value)
    return refused
