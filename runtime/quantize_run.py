"""The whole of `engram quantize`: look at a text, choose codecs, write, and let the gate judge what was written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram import Progress
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig, files
from engram.quantize.backbone import BackboneConfig
from engram.quantize.folder import check_target, rejected_name
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize
from engram.runtime.quantize_config import AUTO, BackboneWish, QuantizeRun


def quantize_run(config: QuantizeRun, progress: Progress | None = None) -> dict[str, Any]:
    """Returns the fields of `engram quantize --json`; `passed` is False where the gate refused and kept aside.

    What can be checked without long work is checked first, the float model and the gate's text too. Raises what the
    parts raise; then nothing appears under `out`, and what is written stays if a run could go on with it.
    """
    begin = time.monotonic()
    seen = progress or Progress()
    check_target(config.checkpoint, config.out, force=config.force, error=QuantizeError)
    wish = config.backbone
    for text in (config.calibrate, config.gate, wish and wish.importance):
        if isinstance(text, CorpusConfig):
            files(text)  # a source that names nothing is found before the long work
    gate = None
    if config.gate is not None:
        from engram.runtime.quality_gate import Gate, QualityConfig

        check_target(config.checkpoint, rejected_name(config.out), force=config.force, error=QuantizeError)
        gate = Gate(
            config.checkpoint, QualityConfig(config.gate, config.max_loss, config.gate_tokens, seed=config.seed), seen
        )
    traded: dict[str, Any] = {}
    plans = None
    if config.calibrate is not None:
        from engram.runtime.plan_choice import choose_plans  # with torch: only where a model runs

        plans, traded = choose_plans(config, seen)
    codec = "mixed" if config.tables == AUTO else config.tables
    backbone = None if wish is None else _backbone(config, wish, seen)
    record: dict[str, Any] = {}
    if traded:
        others = {name: value for name, value in traded.items() if name != "plans"}
        record["plans"] = {"layers": traded["plans"], **others}
    work = QuantizeConfig(config.checkpoint, config.out, codec, plans, backbone, config.force, record)
    result = quantize(work, seen, gate)
    return result | traded | {"seconds": time.monotonic() - begin}


def _backbone(config: QuantizeRun, wish: BackboneWish, progress: Progress) -> BackboneConfig:
    """The backbone's part; an importance matrix of text is made now and kept beside `out`."""
    checkpoint = open_checkpoint(config.checkpoint)
    source = checkpoint.backbone
    if wish.source is not None:
        source = BackboneRef.find(str(wish.source), source.dtype)
    made = BackboneConfig(
        source, config.checkpoint, config.out, wish.kind, tensor_types=wish.tensor_types,
        embedding_type=wish.embedding_type, output_type=wish.output_type, requantize=wish.requantize,
    )  # fmt: skip
    if wish.importance is None:
        return made
    if isinstance(wish.importance, Path):
        return replace(made, importance=wish.importance)
    from engram.runtime.importance import collect_importance

    target = config.out.with_name(config.out.name + ".imatrix.gguf")
    ggufs = [path for path in source.files(config.checkpoint).values() if path.suffix == ".gguf"]
    if not ggufs:
        raise QuantizeError(
            f"an importance matrix is for GGUF types; backbone {source.path} is no GGUF file",
            hint="name the file with --backbone-from FILE.gguf",
        )
    collect_importance(config.checkpoint, ggufs[0], wish.importance, wish.importance_tokens, target, progress)
    return replace(made, importance=target)
