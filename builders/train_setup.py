"""From a recipe to something trainable: tokenizer, layout, backbone, gates, tables, data and optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram import Progress
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.data import Stream
from engram.builders.engram import GateConfig, Table
from engram.builders.fetch import SMOLLM2_GGUF
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, find_blocks, load_gate_weights
from engram.builders.optim import Optimizer
from engram.builders.recipe import FINAL, LayoutSection, Recipe, RunSection
from engram.builders.token_cache import TokenCache
from engram.builders.tokenizer import first_ids, load_tokenizer, special_tokens, tokenizer_bytes
from engram.builders.train_backbone import SMOLLM2, find_device, open_backbone, trains_backbone, wants_bfloat16
from engram.builders.vocab import compress_vocabulary


@dataclass
class Trainee:
    """What is trained. `base` is where the backbone came from; None from scratch, and for a resumed full one."""

    model: EngramModel
    tables: dict[int, Table]
    base: BackboneRef | None
    trained: bool  # the backbone changes too: checkpoints carry it
    tokenizer: str
    device: torch.device
    autocast: bool
    adapters: Any = None  # peft's LoraModel around the backbone

    @property
    def layout(self) -> Layout:
        """The layout of the memory."""
        return self.model.layout

    def dense(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters outside the tables, by optimizer group, named."""
        return {
            "gates": [(name, p) for name, p in self.model.gates.named_parameters() if p.requires_grad],
            "backbone": [(name, p) for name, p in self.model.backbone.named_parameters() if p.requires_grad],
        }

    def training(self, on: bool) -> None:
        """Switch tables, gates and a trained backbone; a frozen one stays in evaluation mode."""
        self.model.gates.train(on)
        self.model.backbone.train(on and self.trained)
        for table in self.tables.values():
            table.train(on)

    def precision(self) -> AbstractContextManager[Any]:
        """bfloat16 arithmetic over float32 weights for a trained backbone; a frozen one is bfloat16 itself."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    @cached_property
    def first(self) -> list[int]:
        """What every text begins with: the tokenizer's bos where it asks for one."""
        return first_ids(self.tokenizer)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' parameters; empty without LoRA."""
        return {} if self.adapters is None else {n: p.detach() for n, p in self.dense()["backbone"]}


def assemble(
    recipe: Recipe, resumed: Checkpoint | None = None, progress: Progress = Progress(), *, allocate: bool = True
) -> Trainee:
    """Build what `recipe` describes, or take it up from a checkpoint of the same recipe.

    Without `allocate` the tables have a shape and no memory (torch's "meta" device).

    Raises SetupError, and what loading a tokenizer, layout, checkpoint or backbone raises.
    """
    device = find_device(recipe.run.device)
    start = resumed or (open_checkpoint(Path(recipe.start_from)) if recipe.start_from else None)
    bf16 = wants_bfloat16(recipe.backbone.dtype, device, progress)
    torch.manual_seed(recipe.run.seed)
    tokenizer = tokenizer_source(recipe, start)
    backbone, base, adapters = open_backbone(recipe, tokenizer, start, resumed, bf16)
    if start:
        layout = start.layout
    elif recipe.layout.path is not None:
        layout = Layout.load(Path(recipe.layout.path))
    else:
        layout = build_layout(recipe.layout, tokenizer, len(find_blocks(backbone)))
    hidden = backbone.config.get_text_config().hidden_size
    if start:
        gates = {layer: GateConfig.from_json(config) for layer, config in start.gates().items()}
    else:
        gates = dict.fromkeys(layout.layers, gate_config(recipe, layout, hidden))
    model = EngramModel(backbone, layout, gates)
    if start:
        load_gate_weights(model, start.dense())
    else:
        _quieten(recipe, model)
    model.to(device)
    trained = trains_backbone(recipe)
    autocast = bf16 and trained
    if autocast:  # gates keep float32 arithmetic
        for gate in model.gates.values():
            setattr(gate, "forward", torch.autocast(device.type, enabled=False)(gate.forward))
    tables = {}
    for layer in layout.layers:
        if not allocate:
            weight = torch.empty(layout.table_rows[layer], layout.head_dim, device="meta")
        else:
            weight = first_weight(recipe, layout, layer, start).to(device)
        tables[layer] = Table(weight)
    return Trainee(model, tables, base, trained, tokenizer, device, autocast, adapters)


def tokenizer_source(recipe: Recipe, start: Checkpoint | None = None) -> str:
    """Where the tokenizer is: the checkpoint, the layout folder, layout.tokenizer, or the backbone's own."""
    if start is not None:
        return str(start.folder)
    named = recipe.layout.path or recipe.layout.tokenizer or recipe.backbone.source or ""
    return str(SMOLLM2_GGUF.fetch()) if named == SMOLLM2 else named


def build_layout(section: LayoutSection, tokenizer: str, blocks: int) -> Layout:
    """The layout that the recipe's constants give; "final" becomes the number of blocks."""
    import hashlib

    vocabulary = load_tokenizer(tokenizer)
    token_map = (
        compress_vocabulary(vocabulary).token_map if section.compress and section.dialect != "qwen-ple" else None
    )
    pad_id = section.pad_id
    if pad_id is None:
        known = special_tokens(tokenizer)
        pad_id = next((known[name] for name in ("pad_id", "eos_id") if known.get(name) is not None), 0)
    return Layout.build(
        dialect=section.dialect, orders=section.orders, heads=section.heads, head_dim=section.head_dim,
        layers=sorted({blocks if layer == FINAL else int(layer) for layer in section.layers}),
        rows_per_head=section.rows_per_head, seed=section.seed, pad_id=pad_id,
        vocab_size=vocabulary.get_vocab_size(with_added_tokens=True), token_map=token_map, reset_id=section.reset_id,
        dead_ids=section.dead_ids, tokenizer_sha256=hashlib.sha256(tokenizer_bytes(tokenizer)).hexdigest(),
    )  # fmt: skip


def gate_config(recipe: Recipe, layout: Layout, hidden: int) -> GateConfig:
    """The dialect's gate with what the recipe changes in it."""
    section = recipe.gate
    config = GateConfig.of_dialect(layout.dialect, hidden, layout.memory_width, section.branches, layout.orders[-1])
    changes: dict[str, Any] = {} if section.kind == "auto" else {"kind": section.kind}
    changes |= {} if section.conv is None else {"conv_kernel": section.conv, "conv_dilation": layout.orders[-1]}
    changes |= {} if section.bias is None else {"bias": section.bias}
    return replace(config, **changes)


def initial(recipe: Recipe) -> str:
    """What starts at zero: the value projection (attached), or the table (from scratch)."""
    if recipe.gate.init != "auto":
        return recipe.gate.init
    return "value-zero" if recipe.mode == "attach" else "table-zero"


def _quieten(recipe: Recipe, model: EngramModel) -> None:
    """Make fresh gates add nothing: through a zero value projection, or through its bias where the tables are zero."""
    for layer in model.layout.layers:
        gate = model.gate(layer)
        if initial(recipe) == "value-zero":
            gate.silence()
        elif gate.config.bias:
            nn.init.zeros_(gate.value_proj.bias)


def first_weight(recipe: Recipe, layout: Layout, layer: int, start: Checkpoint | None = None) -> Tensor:
    """A layer's table to begin with, float32 [rows, width]: a checkpoint's copy, zeros, or normal numbers."""
    if start is not None:
        return torch.from_numpy(np.array(start.table(layer)))
    shape = (layout.table_rows[layer], layout.head_dim)
    if initial(recipe) == "table-zero":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(recipe.run.seed * 1009 + layer)
    return torch.empty(shape).normal_(0, recipe.tables.init_std, generator=generator)


def open_corpus(recipe: Recipe, trainee: Trainee, progress: Progress, **options: Any) -> TokenCache:
    """The token cache of the recipe's corpus, with the trainee's tokenizer."""
    data = recipe.data
    corpus = CorpusConfig(data.sources, data.field, data.column, data.strict, data.suffixes)
    return TokenCache.build(corpus, trainee.tokenizer, progress, **{"max_tokens": data.max_corpus_tokens, **options})


def open_stream(recipe: Recipe, trainee: Trainee, cache: TokenCache, documents: NDArray[np.int64]) -> Stream:
    """Training batches from these documents."""
    data = recipe.data
    return Stream(
        cache, documents, trainee.layout,
        length=data.sequence_length, batch=data.batch, accumulation=data.accumulation, seed=recipe.run.seed,
        first=trainee.first,
    )  # fmt: skip


def open_optimizer(recipe: Recipe, trainee: Trainee) -> Optimizer:
    """All optimizers, with the multiplier for tables that the mode has by default."""
    multiplier = recipe.tables.lr_multiplier or (5.0 if recipe.mode == "attach" else 1.0)
    return Optimizer(trainee.tables, trainee.dense(), recipe.tables, recipe.optimizer, multiplier)


@contextmanager
def settings(run: RunSection, threads_before: int = 0) -> Iterator[None]:
    """Threads and determinism for a run, put back afterwards; a resumed run keeps its threads, so that sums agree."""
    threads, sure = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    extras: Any = torch.utils.deterministic
    filled = extras.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(run.threads or threads_before or threads)
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
    extras.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(sure)
        extras.fill_uninitialized_memory = filled
