"""An importance matrix for GGUF types: how large a backbone's inputs are over the user's text, with the memory."""

from __future__ import annotations

from pathlib import Path

import torch

from engram import Progress
from engram.builders.checkpoint import open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.model import EngramModel
from engram.quantize.backbone_imatrix import Collector, check_importance_target, write_importance
from engram.runtime.quality_gate import QualityConfig, context_of, float_model, read_windows
from engram.runtime.row_sources import FloatTables


def collect_importance(
    checkpoint_folder: Path, gguf: Path, text: CorpusConfig, tokens: int, out: Path, progress: Progress, *, force: bool,
    model: EngramModel | None = None,
) -> None:  # fmt: skip
    """Run the float model over the text and write `out`, an imatrix GGUF for the tensors of `gguf`.

    Its folder is made. `model`: the checkpoint's float model, where it is open already.

    Raises ImportanceError before anything runs where `out` exists (with `force`: where it is no importance matrix), and
    for a GGUF whose architecture has no known tensor names; and what checkpoint and text raise.
    """
    check_importance_target(out, force=force)
    checkpoint = open_checkpoint(checkpoint_folder)
    rows, model = FloatTables(checkpoint), model or float_model(checkpoint)
    config = QualityConfig(text, max_tokens=tokens)
    windows, _ = read_windows(checkpoint, config, context_of(model), progress)
    with (
        Collector(model.backbone) as collector,
        torch.inference_mode(),
        progress.task("importance matrix", sum(len(w.ids_T) for w in windows), "tokens") as task,
    ):
        for window in windows:
            wanted = checkpoint.layout.rows(window.ids_T[None])
            memory = {n: torch.from_numpy(rows(n, wanted[n])) for n in checkpoint.layout.layers}
            model.states(torch.from_numpy(window.ids_T[None]), memory)
            task.advance(len(window.ids_T))
    write_importance(out, collector.importance(gguf), list(text.sources), config.sequence)
