"""What `engram quantize` is asked to do, checked before anything is read. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram import EngramError
from engram.builders.corpus import CorpusConfig
from engram.kernels.codecs import find_codec, written_codecs
from engram.quantize.tables import QuantizeError

AUTO = "auto"


class QualityError(EngramError):
    """A bound or a text that nothing can be judged by."""


@dataclass(frozen=True)
class Bound:
    """The most that the loss may grow: nats a token, or a share of the float model's loss."""

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Bound:
        """"0.5%" or "0.002" (nats a token); QualityError for anything else."""
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = float("nan")
        if not 0 <= value < float("inf"):
            raise QualityError(
                f"--max-loss {text!r} is neither nats a token nor a percentage",
                hint="write 0.002 (nats a token) or 0.5% (of the float model's loss)",
            )
        return cls(value / 100, True) if text.endswith("%") else cls(value)

    def nats(self, loss: float) -> float:
        """The bound in nats a token for a model of this loss."""
        return self.value * loss if self.relative else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g} nats"


@dataclass(frozen=True)
class BackboneWish:
    """What the backbone becomes; see BackboneConfig. `source`: a GGUF file or folder in place of the checkpoint's own.

    `importance`: an imatrix file, or text of which `importance_tokens` are read to make one. Raises
    QuantizeBackboneError for an unknown kind and for options that the kind does not look at.
    """

    kind: str
    source: Path | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    embedding_type: str | None = None
    output_type: str | None = None
    importance: CorpusConfig | Path | None = None
    importance_tokens: int = 16_384
    requantize: bool = False

    def __post_init__(self) -> None:
        """Refuse before anything is read."""
        from engram.quantize.backbone_config import refuse_unused
        from engram.quantize.backbone_gguf import check_kind

        check_kind(self.kind)
        refuse_unused(self.kind, self.tensor_types, self.embedding_type, self.output_type, self.importance)


@dataclass(frozen=True)
class QuantizeRun:
    """What to do; see `engram quantize --help` for each field.

    `frequent` is a codec and the share of the seen rows that get it. `search_tokens` of the calibration text are what
    `auto` measures its plans on.
    """

    checkpoint: Path
    out: Path
    tables: str = "int8"
    calibrate: CorpusConfig | None = None
    frequent: tuple[str, float] | None = None
    unseen: str | None = None
    drop_unseen: bool = False
    budget: int | None = None
    max_loss: Bound | None = None
    gate: CorpusConfig | None = None
    gate_tokens: int = 16_384
    search_tokens: int = 8_192
    seed: int = 0
    backbone: BackboneWish | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, before anything is read."""
        for codec in (self.tables, self.frequent[0] if self.frequent else None, self.unseen):
            if codec not in (None, AUTO) and find_codec(codec).name not in written_codecs():
                raise QuantizeError(
                    f"codec {codec!r} is only read: its factor belongs to one published table",
                    hint="use one of: " + ", ".join(written_codecs()),
                )
        wants_text = self.tables == AUTO or self.frequent or self.unseen or self.drop_unseen
        bare = self.tables == AUTO and self.budget is None and self.max_loss is None
        rules = [
            (wants_text and self.calibrate is None, "how often rows are read is known only from a text",
             "give --calibrate TEXT" + (" and --budget 2GB or --max-loss 0.5%" if bare else "")),
            (self.calibrate is not None and not wants_text, "--calibrate is given, but nothing uses it",
             "add --tables auto, --frequent, --unseen or --drop-unseen"),
            (self.unseen is not None and self.drop_unseen, "--unseen and --drop-unseen contradict one another", ""),
            (self.tables == AUTO and (self.frequent or self.unseen), "--tables auto chooses codecs for all rows itself",
             "leave --frequent and --unseen out"),
            (bare, "--tables auto needs a bound", "give --budget 2GB or --max-loss 0.5%"),
            (self.tables != AUTO and self.budget is not None, "--budget is for --tables auto", ""),
            (self.max_loss is not None and self.gate is None and (self.tables != AUTO or self.budget is not None),
             "--max-loss needs a text to measure the loss on", "give --gate TEXT"),
        ]  # fmt: skip
        for broken, message, hint in rules:
            if broken:
                raise QuantizeError(message, hint=hint)
