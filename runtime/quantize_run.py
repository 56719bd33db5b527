"""The whole of `engram quantize`: look at a text, choose codecs, write, and let the gate judge what was written."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from engram import EngramError, Progress
from engram.quantize.folder import check_target
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize
from engram.runtime.quantize_config import AUTO, QuantizeRun


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
    work = QuantizeConfig(config.checkpoint, config.out, tables=codec, plans=plans, force=config.force)
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
