"""The whole of `engram quantize`: look at a text, choose codecs, write, and let the gate judge what was written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram import Progress
from engram.builders.atomic import is_unfinished
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig, files
from engram.quantize.backbone import BackboneConfig, check_backbone
from engram.quantize.backbone_config import check_replacement
from engram.quantize.backbone_imatrix import check_importance_target, importance_texts
from engram.quantize.folder import check_target, rejected_name
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize
from engram.runtime.quantize_config import AUTO, BackboneWish, QuantizeRun

if TYPE_CHECKING:
    from engram.builders.model import EngramModel  # with torch


def quantize_run(config: QuantizeRun, progress: Progress | None = None) -> dict[str, Any]:
    """Returns the fields of `engram quantize --json`; `passed` is False where the gate refused and kept aside.

    What can be checked without long work is checked first, the float model and the gate's text too. Raises what the
    parts raise; then nothing appears under `out`, and what is written stays if a run could go on with it.
    """
    begin = time.monotonic()
    seen = progress or Progress()
    check_target(config.checkpoint, config.out, force=config.force, error=QuantizeError)
    wish = config.backbone
    backbone = None if wish is None else _backbone(config, wish)
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
    model = None if gate is None else gate.model  # opened once a run
    traded: dict[str, Any] = {}
    plans = None
    if config.calibrate is not None:
        from engram.runtime.plan_choice import choose_plans, overlap  # with torch: only where a model runs

        choice = choose_plans(config, seen, model)
        plans, traded = choice.plans, choice.traded
        if gate is not None and (shared := overlap(gate.hashes, choice.hashes)):
            seen.say(
                f"{shared} of the gate's {len(gate.hashes)} documents are in the calibration text too: what they say "
                "of unseen text is too good"
            )
            gate.shared = shared
    codec = "mixed" if config.tables == AUTO else config.tables
    if wish is not None and backbone is not None and isinstance(wish.importance, CorpusConfig):
        backbone = _weighed(config, wish.importance, backbone, wish.importance_tokens, seen, model)
    record: dict[str, Any] = {}
    if traded:
        others = {name: value for name, value in traded.items() if name != "plans"}
        record["plans"] = {"layers": traded["plans"], **others}
    work = QuantizeConfig(config.checkpoint, config.out, codec, plans, backbone, config.force, record)
    result = quantize(work, seen, gate)
    return result | traded | {"seconds": time.monotonic() - begin}


def _backbone(config: QuantizeRun, wish: BackboneWish) -> BackboneConfig:
    """The backbone's part, checked by metadata.

    Raises QuantizeBackboneError for a `source` of another model and as check_backbone, ImportanceError where a matrix
    to come exists without `force`.
    """
    checkpoint = open_checkpoint(config.checkpoint)
    source = checkpoint.backbone
    if wish.source is not None:
        check_replacement(source, config.checkpoint, wish.source)
        source = BackboneRef.find(str(wish.source), source.dtype)
    made = BackboneConfig(
        source, config.checkpoint, config.out, wish.kind, tensor_types=wish.tensor_types,
        embedding_type=wish.embedding_type, output_type=wish.output_type, requantize=wish.requantize,
        importance=wish.importance if isinstance(wish.importance, Path) else None,
    )  # fmt: skip
    check_backbone(made)
    if isinstance(wish.importance, CorpusConfig) and not _goes_on(config, wish.importance):
        check_importance_target(_matrix(config), force=config.force)
    return made


def _matrix(config: QuantizeRun) -> Path:
    """Where an importance matrix of text is kept."""
    return config.out.with_name(config.out.name + ".imatrix.gguf")


def _goes_on(config: QuantizeRun, text: CorpusConfig) -> bool:
    """Whether the unfinished run that this one goes on with has made the matrix of the same text."""
    matrix = _matrix(config)
    return is_unfinished(config.out) and matrix.is_file() and importance_texts(matrix) == list(text.sources)


def _weighed(
    config: QuantizeRun, text: CorpusConfig, backbone: BackboneConfig, tokens: int, progress: Progress,
    model: EngramModel | None,
) -> BackboneConfig:  # fmt: skip
    """The same with an importance matrix of the text, made now and kept beside `out`.

    A run that goes on uses the matrix that it began with.
    """
    from engram.runtime.importance import collect_importance

    target, gguf = _matrix(config), backbone.source.place(config.checkpoint)
    assert gguf is not None, "check_backbone finds a file for GGUF types"
    if _goes_on(config, text):
        progress.say(f"importance matrix: {target}, from the run that is gone on with")
    else:
        collect_importance(
            config.checkpoint, gguf, text, tokens, target, progress, force=config.force, model=model
        )
    return replace(backbone, importance=target)
