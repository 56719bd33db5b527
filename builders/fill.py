"""`engram fill`: a memory without gradients, from the n-gram statistics of a corpus.

Every row holds, for the n-grams that hash to it, the mean whitened unembedding of the tokens that followed them:
S⁻¹ (E[W_y | n-gram] − E[W_y]) / D, which is the step on the final state that raises those tokens' logits (S: covariance
of unembedding rows under the corpus). The memory sits on the output of the last norm. Shrinkage n / (n + k) and one
scale an order are fitted on documents that were not counted and reported on others.

Shape letters: T positions, K candidate tokens, O orders, C columns, E memory width, d row width, D hidden width.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram import EngramError, Progress
from engram.builders.atomic import check_replaceable
from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.checkpoint import open_checkpoint, save_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.engram import GateConfig
from engram.builders.fill_fit import Fitted, Scored, final_states, fit, report
from engram.builders.fill_statistics import (
    DOCUMENT_TOKENS,
    SAMPLE_CONTEXTS,
    Counts,
    Directions,
    Split,
    accumulate,
    batches,
    count_often,
    find_directions,
    positions,
    split_documents,
)  # fmt: skip
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, gate_weights
from engram.builders.process_memory import resident_bytes
from engram.builders.token_cache import TokenCache
from engram.builders.tokenizer import first_ids

_BLOCK_ROWS = 1 << 16
_SAME_LOGITS = 2e-2  # of the largest logit: what bfloat16 arithmetic may differ
_OPEN = 0.5  # the gate of a filled memory: its query norm is zero, so every score is


class FillError(EngramError):
    """A layout, backbone or corpus that no memory can be filled from."""


@dataclass(frozen=True)
class FillConfig:
    """What to fill and from what.

    source: a layout folder (then `backbone` names the transformer), a checkpoint, or a recipe. dev_tokens, test_tokens:
    how much text to fit on and to report on, taken from documents that are not counted: those of `dev`, or else some of
    the corpus. least: n-grams seen fewer times are left out (they collide with others and tell little). strength: share
    of the fitted scales that is used: near its minimum the loss is flat, while what the memory does to other text grows
    with the scale. ridge: share of the mean variance added to S.
    """

    source: str | Path
    corpus: CorpusConfig
    out: Path
    backbone: str | None = None
    dev: CorpusConfig | None = None
    dev_tokens: int = 16_384
    test_tokens: int = 16_384
    max_tokens: int | None = None
    least: int = 2
    strength: float = 1.0
    ridge: float = 0.05
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, least in (("dev_tokens", 64), ("test_tokens", 64), ("least", 1)):
            if getattr(self, name) < least:
                raise FillError(f"{name} {getattr(self, name)} must be at least {least}")
        if not 0 < self.strength <= 1:
            raise FillError(f"strength {self.strength} must be above 0 and at most 1")
        if not 0 < self.ridge < 10:
            raise FillError(f"ridge {self.ridge} must be above 0 and below 10")


@dataclass(frozen=True)
class _Parts:
    """What the source names."""

    layout: Layout
    reference: BackboneRef
    folder: Path  # of the tokenizer


def fill(config: FillConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write a checkpoint whose tables hold the corpus's statistics; the object of `engram fill --json`.

    Raises FillError where source, backbone and layout do not go together or the text is too little, and what corpus,
    tokenizer, backbone and checkpoint raise.
    """
    seen, began = progress or Progress(), time.perf_counter()
    check_replaceable(config.out, force=config.force, error=FillError)
    parts = _parts(config, seen)
    layout = parts.layout
    cache = TokenCache.build(config.corpus, parts.folder / "tokenizer.json", seen, max_tokens=config.max_tokens)
    judge = cache if config.dev is None else TokenCache.build(config.dev, parts.folder / "tokenizer.json", seen)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{config.out.name}.fill-", dir=config.out.parent))
    try:
        split = _split(cache, judge, config)
        with seen.task("load the backbone"):
            backbone = load_backbone(parts.reference, parts.folder)
        layer = _final_layer(layout, backbone, parts)
        _check_head(backbone, parts)
        directions = _directions(cache, split, layout, layer, backbone, config)
        often = count_often(cache, split.count, layout, layer, seen)
        counts = accumulate(cache, split.count, layout, layer, directions, often, config.least, scratch, seen)
        first = first_ids(parts.folder)
        fitting = _scored(judge, split.fit, layout, layer, directions, counts, backbone, first, config.dev_tokens, seen)
        best = fit(fitting, layout, directions, seen)
        fitted = replace(best, scales=[config.strength * scale for scale in best.scales])
        report_on = split.report
        tested = _scored(judge, report_on, layout, layer, directions, counts, backbone, first, config.test_tokens, seen)
        figures = report(tested, layout, directions, fitted, config.seed)
        _shrink(counts, fitted.k)
        _save(config, parts, layer, backbone, directions, fitted, counts, figures)
        filled = int((counts.seen_N > 0).sum())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        cache.discard()
        judge.discard()
    return {
        "out": str(config.out), "rows": layout.table_rows[layer], "rows_filled": filled,
        "scales": dict(zip(map(str, layout.orders), fitted.scales, strict=True)), "k": fitted.k,
        "documents": {"counted": len(split.count), "fitted": len(split.fit), "reported": len(split.report)},
        **figures, "seconds": time.perf_counter() - began, "peak_rss_bytes": resident_bytes()["peak_rss_bytes"],
    }  # fmt: skip


def _parts(config: FillConfig, progress: Progress) -> _Parts:
    source = Path(config.source)
    if (source / "layout.json").is_file():
        if config.backbone is None:
            raise FillError(f"{source} is a layout, which names no backbone", hint="pass --backbone")
        reference = BackboneRef.find(config.backbone, _dtype(progress))
        return _Parts(Layout.load(source), reference, source)
    if config.backbone is not None:
        raise FillError(f"{source} names its own backbone", hint="pass --backbone only with a layout folder")
    if (source / "engram.json").is_file():
        opened = open_checkpoint(source)
        opened.backbone.verify(source)
        return _Parts(opened.layout, opened.backbone, source)
    if source.is_dir():
        raise FillError(f"{source} is neither a layout nor a checkpoint", hint="make one with engram build-vocab")
    from engram.builders.recipe import load_recipe

    recipe = load_recipe(config.source)
    if recipe.layout.path is None or recipe.backbone.source is None:
        raise FillError(
            f"recipe {config.source} must name layout.path and backbone.source",
            hint="make a layout with engram build-vocab, or pass its folder and --backbone",
        )
    folder = Path(recipe.layout.path)
    from engram.builders.train_backbone import SMOLLM2

    named = recipe.backbone.source
    if named == SMOLLM2:
        from engram.builders.fetch import SMOLLM2_GGUF

        named = str(SMOLLM2_GGUF.fetch(progress=progress))
    return _Parts(Layout.load(folder), BackboneRef.find(named, _dtype(progress)), folder)


def _dtype(progress: Progress) -> str:
    from engram.builders.train_backbone import find_device, wants_bfloat16

    return "bfloat16" if wants_bfloat16("auto", find_device("cpu"), progress) else "float32"


def _final_layer(layout: Layout, backbone: Any, parts: _Parts) -> int:
    blocks = int(backbone.config.get_text_config().num_hidden_layers)
    if layout.layers != (blocks,):
        raise FillError(
            f"layout has layers {list(layout.layers)}; filling from counts needs the one layer {blocks}, the output of "
            f"the last norm of a backbone of {blocks} blocks",
            hint=f"build the layout with --layers {blocks}, or train early layers with engram train",
        )
    rows = backbone.get_output_embeddings().weight.shape[0]
    if layout.vocab_size > rows:
        raise FillError(
            f"the layout's tokenizer has {layout.vocab_size} ids, the backbone of {parts.reference.path} scores {rows}"
        )
    return blocks


def _check_head(backbone: Any, parts: _Parts) -> None:
    """The closed form needs logits that are one product with the unembedding."""
    ids = torch.arange(min(8, backbone.get_output_embeddings().weight.shape[0]))[None]
    with torch.inference_mode():
        whole = backbone(ids).logits.float()
        state = backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        short = state @ backbone.get_output_embeddings().weight.float().T
    if float((whole - short).abs().max()) > _SAME_LOGITS * float(whole.abs().max()):
        raise FillError(
            f"the head of {parts.reference.path} does more than one product (a soft cap, a scale or a bias)",
            hint="train this backbone's memory with engram train",
        )


def _split(cache: TokenCache, judge: TokenCache, config: FillConfig) -> Split:
    split = split_documents(judge, config.dev_tokens, config.test_tokens)
    if judge is not cache:
        split = replace(split, count=np.flatnonzero(~np.isin(cache.hashes(), judge.hashes())))
    for name, part in (("fit", judge), ("report", judge), ("count", cache)):
        if len(getattr(split, name)) < 1 or int((part.lengths()[getattr(split, name)] - 1).sum()) < 64:
            raise FillError(
                f"the text has {part.documents} documents with {part.tokens} tokens: none are left to {name}",
                hint="give more documents, or lower --dev-tokens and --test-tokens",
            )
    return split


def _directions(
    cache: TokenCache, split: Split, layout: Layout, layer: int, backbone: Any, config: FillConfig
) -> Directions:
    weight_VD = backbone.get_output_embeddings().weight.detach().float().numpy()
    unigram = np.full(len(weight_VD), 1e-3)
    sample: list[NDArray[np.int32]] = []
    size = 0
    for group in batches(cache, split.count):
        unigram += np.bincount(np.concatenate([d[1:] for d in group]), minlength=len(unigram))
        for document in group:
            piece = document[: SAMPLE_CONTEXTS - size]
            if len(piece) >= 2:
                sample.append(piece)
                size += len(piece)
    return find_directions(weight_VD, unigram, positions(layout, layer, sample), layout, config.ridge)


def _scored(
    cache: TokenCache, documents: NDArray[np.int64], layout: Layout, layer: int, directions: Directions,
    counts: Counts, backbone: Any, first: list[int], tokens: int, progress: Progress,
) -> Scored:  # fmt: skip
    """Final states, next tokens, and each column's sums and counts, for some documents."""
    texts: list[NDArray[np.int32]] = []
    left = tokens
    for i in documents:
        text = cache.document(int(i))[: min(DOCUMENT_TOKENS, left)]
        if len(text) >= 2:
            texts.append(text)
            left -= len(text)
    found = positions(layout, layer, texts)
    states_TD = final_states(backbone, texts, progress, first)
    sums = [torch.from_numpy(counts.sums_ND[found.rows_TC[:, c]]) for c in range(layout.columns)]
    seen = [torch.from_numpy(counts.seen_N[found.rows_TC[:, c]]) for c in range(layout.columns)]
    head = backbone.get_output_embeddings().weight.detach().float()
    return Scored(states_TD, torch.from_numpy(found.next_T), sums, seen, head)


def _shrink(counts: Counts, k: float) -> None:
    """Sums become shrunk means, in place, block by block."""
    for begin in range(0, len(counts.seen_N), _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        counts.sums_ND[block] /= (counts.seen_N[block] + k)[:, None]


def _save(
    config: FillConfig, parts: _Parts, layer: int, backbone: Any, directions: Directions, fitted: Fitted,
    counts: Counts, figures: dict[str, Any],
) -> None:  # fmt: skip
    layout = parts.layout
    hidden = int(backbone.config.get_text_config().hidden_size)
    gate = GateConfig(hidden, layout.memory_width, kind="plain")
    torch.manual_seed(config.seed)
    model = EngramModel(backbone, layout, {layer: gate})
    with torch.no_grad():
        module = model.gate(layer)
        module.norm_query.zero_()  # a score of exactly zero: the gate is half open, and its gradient is alive
        module.value_proj.weight.copy_(value_projection(layout, directions, fitted.scales) / _OPEN)
    save_checkpoint(
        config.out, layout=layout, gates={layer: gate.to_json()}, dense=gate_weights(model),
        tables={layer: counts.sums_ND}, backbone=parts.reference, tokenizer_folder=parts.folder,
        extra={"fill": {"scales": fitted.scales, "k": fitted.k, "least": config.least, **figures}}, force=config.force,
        backbone_folder=parts.folder / "backbone" if parts.reference.kind == "embedded" else None,
    )  # fmt: skip


def value_projection(layout: Layout, directions: Directions, scales: list[float]) -> Tensor:
    """[D, E]: every column's part of the final state, scaled by its order."""
    columns = [
        scale * torch.from_numpy(directions.back_HdD[head]).T for scale in scales for head in range(layout.heads)
    ]
    return torch.cat(columns, dim=1)
