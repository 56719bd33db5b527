"""A backbone in fewer bits, apart from the tables: int8 and int4 through torchao, GGUF types through llama.cpp."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from engram import Progress
from engram.builders.backbone import BackboneRef
from engram.builders.fetch import hash_file
from engram.quantize.backbone_config import FOLDER, INT_KINDS, BackboneConfig, QuantizeBackboneError
from engram.quantize.backbone_gguf import check_gguf, check_kind, quantized_in, to_gguf

__all__ = ["BackboneConfig", "QuantizeBackboneError", "check_backbone", "quantize_backbone"]


def quantize_backbone(config: BackboneConfig, progress: Progress | None = None) -> tuple[dict[str, Any], BackboneRef]:
    """Write `config.out / "backbone"` and return its report and the reference to it (kind "embedded").

    Report: "type", "bytes_before" and "bytes" (files; before, of a hub name: the loaded weights), "modules" (name →
    type), "left" (name → type of what stays float), "requantized" (type → tensors of the source that were quantized),
    "seconds"; for int kinds "resident_before" and "resident" (bytes of the weights in memory). Raises as
    check_backbone, and BackboneError for a source that is altered or cannot be loaded.
    """
    begin = time.monotonic()
    progress = progress or Progress()
    if config.source.files(config.beside):
        with progress.task("hash the backbone"):
            config.source.verify(config.beside)
    requantized = check_backbone(config)
    if config.kind in INT_KINDS:
        report = _to_int(config, progress)
    else:
        report = to_gguf(config, progress)
    folder = config.out / FOLDER
    hashes = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    size = sum(path.stat().st_size for path in folder.iterdir())
    made = BackboneRef("embedded", FOLDER, config.source.dtype, hashes)
    report |= {"requantized": requantized}
    return {"type": config.kind, **report, "bytes": size, "seconds": time.monotonic() - begin}, made


def check_backbone(config: BackboneConfig) -> dict[str, int]:
    """Type → tensors of the source that are quantized already; what can be refused is refused, without any weights.

    The files count, not their history: quantized are a GGUF with tensors of a quantized type, and a folder whose
    config.json has a quantization_config (its type counts once). Errors of such a source add to the new ones whatever
    the new type is, so it needs `requantize`. A folder of int8 or int4 layers is refused even then: no float weights
    can be had of it. A dense folder made from a GGUF is float. Raises QuantizeBackboneError for these and for a type or
    option that is unknown, BackboneError or ImportanceError for files that cannot be read.
    """
    from engram.builders.backbone_int import MARK

    check_kind(config.kind)
    if MARK in config.source.sha256:
        raise QuantizeBackboneError(
            f"backbone {config.source.path} is int8 or int4 already, it has no float linear layer to quantize",
            hint="take the float backbone",
        )
    place = config.source.place(config.beside)
    found = _quantized_already(place) if place else {}
    if found and not config.requantize:
        gguf = place is not None and place.suffix == ".gguf"
        counts = ", ".join(f"{count} tensors {name}" if gguf else name for name, count in sorted(found.items()))
        raise QuantizeBackboneError(
            f"backbone {place} is quantized already ({counts}): its errors would add to the new ones",
            hint="take the F16, BF16 or float one, or allow it with --requantize",
        )
    if config.kind not in INT_KINDS:
        check_gguf(config)
    return found


def _quantized_already(place: Path) -> dict[str, int]:
    if place.suffix == ".gguf":
        return quantized_in(place)
    try:
        told = json.loads((place / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as wrong:
        raise QuantizeBackboneError(f"{place / 'config.json'} cannot be read: {wrong!r}") from None
    return {str(told.get("quant_method", "unnamed") if isinstance(told, dict) else told): 1} if told else {}


def _to_int(config: BackboneConfig, progress: Progress) -> dict[str, Any]:
    """The model through torchao, linear layer by linear layer, written as backbone_int.py says."""
    from torch import nn

    from engram.builders.backbone import forget_gguf, load_backbone
    from engram.builders.backbone_int import GROUPS, put_weight, stored_form, torchao_form, write_int_folder

    if config.group not in GROUPS:
        raise QuantizeBackboneError(f"group {config.group} is not known", hint=f"use one of {GROUPS}")
    with progress.task("load the backbone"):
        model = load_backbone(config.source, config.beside)
    forget_gguf(model)
    resident_before = resident_bytes(model)
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (config.head or module is not head)
    }
    if not layers:
        raise QuantizeBackboneError(
            f"backbone {config.source.path} has no float linear layer to quantize",
            hint="take a backbone of float weights",
        )
    if config.head and head is not None and model.config.get_text_config().tie_word_embeddings:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    stored, types = {}, {}
    with progress.task(f"backbone to {config.kind}", len(layers), "layers") as task:
        for name, layer in layers.items():
            types[name] = _type_of(config, layer)
            if types[name]["type"] in INT_KINDS:
                stored[name] = stored_form(layer.weight, types[name]["type"], types[name].get("group", 0))
                weight = torchao_form(stored[name], types[name].get("group", 0), layer.weight.dtype)
                put_weight(model, name, weight)
            task.advance()
    types = {name: entry for name, entry in types.items() if name in stored}
    folder = config.out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_int_folder(folder, model, stored, types)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    left = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()
            if name.removesuffix(".weight") not in stored}  # fmt: skip
    modules = {name: f"int4 g{entry['group']}" if "group" in entry else "int8" for name, entry in types.items()}
    return {
        "bytes_before": source_bytes(config) or resident_before, "modules": modules, "left": left,
        "resident_before": resident_before, "resident": resident_bytes(model),
    }  # fmt: skip


def _type_of(config: BackboneConfig, layer: Any) -> dict[str, Any]:
    """int4 where a whole number of groups fits the layer's inputs and the kernel its outputs; else int8."""
    from engram.builders.backbone_int import GROUPS

    groups = [group for group in GROUPS if group <= config.group and layer.in_features % group == 0]
    if config.kind == "int4" and groups and layer.out_features % 16 == 0:
        return {"type": "int4", "group": groups[-1]}
    return {"type": "int8"}


def source_bytes(config: BackboneConfig) -> int:
    """Bytes of the source's weight files; 0 for a hub name."""
    files = config.source.files(config.beside).values()
    return sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".gguf"))


def resident_bytes(model: Any) -> int:
    """Bytes that a model's parameters and buffers hold in memory, each storage once, inside torchao's tensors too."""
    sizes: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        for part in [getattr(tensor, name) for name in names] or [tensor]:
            sizes[part.untyped_storage().data_ptr()] = part.numel() * part.element_size()
    return sum(sizes.values())
