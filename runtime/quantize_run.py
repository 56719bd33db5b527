"""The whole of `engram quantize`: look at a text, choose codecs, write, and let the gate judge what was written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram import EngramError, Progress
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.quantize.backbone import BackboneConfig, check_backbone
from engram.quantize.backbone_config import check_replacement
from engram.quantize.folder import check_target
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize
from engram.runtime.quantize_config import AUTO, BackboneWish, QuantizeRun


def quantize_run(config: QuantizeRun, progress: Progress | None = None) -> dict[str, Any]:
    """Returns the fields of `engram quantize --json`; `passed` is False where the gate refused and kept aside.

    Raises what the parts raise; then nothing appears under `out`.
    """
    begin = time.monotonic()
    seen = progress or Progress()
    check_target(config.checkpoint, config.out, force=config.force, error=QuantizeError)
    traded: dict[str, Any] = {}
    plans = None
    if config.calibrate is not None:
        from engram.runtime.plan_choice import choose_plans  # with torch: only where a model runs

        plans, traded = choose_plans(config, seen)
    codec = "mixed" if config.tables == AUTO else config.tables
    backbone = None if config.backbone is None else _backbone(config, config.backbone, seen)
    work = QuantizeConfig(config.checkpoint, config.out, codec, plans, backbone, config.force)
    if config.gate is None:
        result = quantize(work, seen)
    else:
        from engram.runtime.quality_gate import QualityConfig, judge_quantized, remove_candidate, settle

        candidate = config.out.with_name(config.out.name + ".candidate")
        try:
            result = quantize(replace(work, out=candidate, force=True), seen)
            quality = QualityConfig(config.gate, config.max_loss, config.gate_tokens, seed=config.seed)
            report = judge_quantized(config.checkpoint, candidate, quality, seen)
            place = settle(candidate, config.out, report)
        except EngramError:
            remove_candidate(candidate)
            raise
        result |= {"out": str(place), "quality": report, "passed": report.get("passed", True)}
    return result | traded | {"seconds": time.monotonic() - begin}


def _backbone(config: QuantizeRun, wish: BackboneWish, progress: Progress) -> BackboneConfig:
    """The backbone's part, checked by metadata; an importance matrix of text is made now and kept beside `out`.

    Raises QuantizeBackboneError for a `source` of another model and as check_backbone, ImportanceError where the matrix
    exists without `force`.
    """
    checkpoint = open_checkpoint(config.checkpoint)
    source = checkpoint.backbone
    if wish.source is not None:
        check_replacement(source, config.checkpoint, wish.source)
        source = BackboneRef.find(str(wish.source), source.dtype)
    made = BackboneConfig(
        source, config.checkpoint, config.out, wish.kind, tensor_types=wish.tensor_types,
        embedding_type=wish.embedding_type, output_type=wish.output_type, requantize=wish.requantize,
    )  # fmt: skip
    if isinstance(wish.importance, Path):
        made = replace(made, importance=wish.importance)
    check_backbone(made)
    if not isinstance(wish.importance, CorpusConfig):
        return made
    from engram.runtime.importance import collect_importance

    target, gguf = config.out.with_name(config.out.name + ".imatrix.gguf"), source.place(config.checkpoint)
    assert gguf is not None, "check_backbone finds a file for GGUF types"
    collect_importance(
        config.checkpoint, gguf, wish.importance, wish.importance_tokens, target, progress, force=config.force
    )
    return replace(made, importance=target)
