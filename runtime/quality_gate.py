"""The gate: a quantized checkpoint is run against its float one, and the verdict is written into its manifest.

What passes appears under its name; what does not is kept aside as NAME.rejected, marked: `engram export` refuses it
(quantize/tables.py puts it there).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.engram import GateConfig
from engram.builders.model import EngramModel, load_gate_weights
from engram.builders.token_cache import TokenCache
from engram.builders.tokenizer import special_tokens
from engram.quantize.package import open_source
from engram.runtime.evaluate import Sample, choose
from engram.runtime.intervals import LEAST_DOCUMENTS
from engram.runtime.quality import (
    Judge,
    Measured,
    Rows,
    Window,
    continuations,
    layers_of,
    shuffled_rows,
    zero_rows,
)
from engram.runtime.quantize_config import Bound, QualityError
from engram.runtime.readout import Readout
from engram.runtime.row_sources import FloatTables, StoredRows

DTYPE = "float32"  # of both backbones: bfloat16 rounds away what is to be measured


@dataclass(frozen=True)
class QualityConfig:
    """On what text to compare, and how much of it."""

    data: CorpusConfig
    max_loss: Bound | None = None
    max_tokens: int = 16_384
    document_tokens: int = 2048
    sequence: int = 512
    prompts: int = 16
    prompt_tokens: int = 48
    written_tokens: int = 48
    seed: int = 0


def float_model(checkpoint: Checkpoint, backbone: BackboneRef | None = None, beside: Path | None = None) -> EngramModel:
    """The checkpoint's gates on its own backbone or another, in float32; tables stay where they are.

    Raises BackboneError for a backbone of which a file is missing or altered.
    """
    gates = {n: GateConfig.from_json(config) for n, config in checkpoint.gates().items()}
    reference, beside = backbone or checkpoint.backbone, beside or checkpoint.folder
    reference.verify(beside)
    loaded = load_backbone(reference, beside, DTYPE)
    model = EngramModel(loaded, checkpoint.layout, gates).eval()
    load_gate_weights(model, checkpoint.dense())
    model.requires_grad_(False)
    return model


def windows_of(folder: Path, cache: TokenCache, sample: Sample, context: int) -> tuple[list[Window], NDArray[Any]]:
    """The windows that an evaluation of this text would read, and their documents' hashes, sorted."""
    special = special_tokens(folder)
    bos = np.array([special["bos_id"]] if special.get("add_bos") else [], dtype=np.int64)
    chosen = choose(cache, sample)
    length = min(sample.sequence, context - len(bos))
    found = []
    for document, tokens in chosen:
        ids = cache.document(document)[:tokens].astype(np.int64)
        pieces = [np.concatenate([bos, ids[begin : begin + length]]) for begin in range(0, tokens, length)]
        found += [Window(document, piece) for piece in pieces if len(piece) >= 2]
    return found, np.sort(cache.hashes()[[i for i, _ in chosen]])


def context_of(model: EngramModel) -> int:
    """Positions that the backbone was made for."""
    return int(getattr(model.backbone.config.get_text_config(), "max_position_embeddings", 1 << 30))


def read_windows(
    checkpoint: Checkpoint, config: QualityConfig, context: int, progress: Progress
) -> tuple[list[Window], NDArray[Any]]:
    """The windows of a text, and their documents' hashes, sorted."""
    cache = TokenCache.build(config.data, checkpoint.folder / "tokenizer.json", progress)
    try:
        sample = Sample(config.max_tokens, config.document_tokens, config.sequence)
        return windows_of(checkpoint.folder, cache, sample, context)
    finally:
        cache.discard()


class Gate:
    """The float model and the text that a quantized one is judged by, opened before anything is written.

    Raises QualityError for a text of too few documents for a verdict, and what checkpoint, backbone and corpus raise.
    """

    def __init__(self, checkpoint_folder: Path, config: QualityConfig, progress: Progress) -> None:
        self.checkpoint, self.config, self.progress = open_checkpoint(checkpoint_folder), config, progress
        self.shared = 0  # documents that the calibration text holds too, as the caller knows
        with progress.task("open the float model"):
            self.model = float_model(self.checkpoint)
        self.windows, self.hashes = read_windows(self.checkpoint, config, context_of(self.model), progress)
        count = len({window.document for window in self.windows})
        if config.max_loss is not None and count < LEAST_DOCUMENTS:
            raise QualityError(
                f"--gate {' '.join(config.data.sources)} has {count} documents of at least 2 tokens, a verdict by "
                f"--max-loss needs {LEAST_DOCUMENTS}: the interval of fewer is too narrow",
                hint="a document is a file, or a line of .jsonl: give more, or leave --max-loss out",
            )

    def __call__(self, quantized: Path) -> dict[str, Any]:
        """Compare a quantized checkpoint (or a package) with the float checkpoint that it was made of.

        Returns what the manifest records: losses with their controls, changes with 95 % intervals over documents, KL
        divergence, agreement, the share of the gain that is kept, gate-weighted row errors, the verdict.
        """
        model, config, progress, rows = self.model, self.config, self.progress, FloatTables(self.checkpoint)
        judge = Judge(model, rows, self.windows, progress)
        prompts = [window for window in self.windows if len(window.ids_T) >= config.prompt_tokens]
        prompts = prompts[:: max(1, len(self.windows) // config.prompts)][: config.prompts]
        prompts = [Window(window.document, window.ids_T[: config.prompt_tokens]) for window in prompts]
        written = None
        if prompts and config.written_tokens:
            texts = continuations(model, rows, prompts, config.written_tokens, progress)
            written = Judge(model, rows, texts, progress)
        own = self.checkpoint.backbone
        with open_source(quantized) as (manifest, layout, tables):
            if layout.to_json() != self.checkpoint.layout.to_json():
                raise QualityError(
                    f"{quantized} has another layout than {self.checkpoint.folder}: it was made of another one"
                )
            stored: Rows = rows if tables is None else StoredRows(tables)
            reference = BackboneRef.from_json(manifest["backbone"])
            other = None
            if reference != own and reference.sha256 != own.sha256:
                with progress.task("open the quantized backbone"):
                    other = Readout(float_model(self.checkpoint, reference, quantized))
            report = _figures(judge, written, stored, other, config)
        digest = hashlib.sha256(self.hashes.tobytes()).hexdigest()
        return report | {"documents_sha256": digest, "documents_in_calibration": self.shared}


def _figures(
    judge: Judge, written: Judge | None, stored: Rows, other: Readout | None, config: QualityConfig
) -> dict[str, Any]:
    seed = config.seed
    both = judge.measure(stored, other)
    controls: dict[str, Measured] = {
        "zero_table": judge.measure(zero_rows(stored), other, divergence=False, label="control: zero table"),
        "shuffled_rows": judge.measure(
            shuffled_rows(stored, judge.layout, seed), other, divergence=False, label="control: shuffled rows"
        ),
    }
    report: dict[str, Any] = {
        "tokens": len(judge.document_N), "documents": len(set(judge.document_N.tolist())), "dtype": DTYPE,
        "loss": {
            "backbone": judge.loss(judge.base), "float": judge.loss(judge.float), "quantized": judge.loss(both),
            **{name: judge.loss(measured) for name, measured in controls.items()},
        },
        "gain": judge.gain(seed),
        "change": judge.change(both, seed),
        "gain_kept": judge.gain_kept(both, seed),
        **judge.divergence(both, seed),
        "row_error": layers_of(judge.row_errors(stored)),
    }  # fmt: skip
    if other is not None:
        tables = judge.measure(stored, label="tables alone")
        backbone = judge.measure(judge.rows, other, label="backbone alone")
        bare = judge.measure(None, other, divergence=False, label="quantized backbone without memory")
        report["parts"] = {
            "tables": {"change": judge.change(tables, seed), "gain_kept": judge.gain_kept(tables, seed),
                       **judge.divergence(tables, seed)},
            "backbone": {"change": judge.change(backbone, seed), **judge.divergence(backbone, seed),
                         "without_memory": judge.loss(bare), "gain_on_it": judge.loss(bare) - judge.loss(both)},
        }  # fmt: skip
    if written is not None:
        measured = written.measure(stored, other, label="fixed continuations")
        report["continuations"] = {
            "texts": len(written.windows), "tokens": len(written.document_N), "loss": written.loss(written.float),
            "change": written.change(measured, seed), **written.divergence(measured, seed),
        }  # fmt: skip
    if config.max_loss is not None:
        bound = config.max_loss.nats(judge.loss(judge.float))
        report["max_loss"] = {"asked": str(config.max_loss), "nats": bound}
        report["passed"] = report["change"]["ci95"][1] <= bound
    return report
