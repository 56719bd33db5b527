"""Which backbone becomes which type: what quantize/backbone.py and its parts share, and what is refused at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram import EngramError
from engram.builders.backbone import BackboneRef, backbone_facts
from engram.builders.fetch import hash_file

FOLDER = "backbone"
INT_KINDS = ("int8", "int4")


class QuantizeBackboneError(EngramError):
    """A backbone that cannot be stored in the wanted type."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone, in which type, and where the folder `backbone/` goes.

    kind: `int8`, `int4`, or a GGUF type such as `q4_k_m` (gguf_types lists them). beside: the folder that an embedded
    reference is relative to. out: the folder in which `backbone/` is made; the caller makes it whole.
    int4: group, the inputs that share a scale. int: head, quantize the output head too (a tied one gets a copy).
    GGUF: tensor_types, (pattern, type) pairs of which the first match counts; embedding_type and output_type, types of
    those two tensors; importance, an importance matrix (imatrix.gguf). requantize: allow a source whose files hold
    quantized weights, whatever `kind` is. Raises QuantizeBackboneError for GGUF's options with int8 or int4.
    """

    source: BackboneRef
    beside: Path
    out: Path
    kind: str
    group: int = 32
    head: bool = False
    tensor_types: tuple[tuple[str, str], ...] = field(default=())
    embedding_type: str | None = None
    output_type: str | None = None
    importance: Path | None = None
    requantize: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuse options that would do nothing."""
        refuse_unused(self.kind, self.tensor_types, self.embedding_type, self.output_type, self.importance)

    def fingerprint(self) -> str:
        """SHA-256 over all that the result depends on; equal for a file that only moved."""
        said = {name: value for name, value in asdict(self).items() if name not in ("beside", "out", "threads")}
        said["source"] = self.source.sha256 or self.source.path
        said["importance"] = None if self.importance is None else hash_file(self.importance)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def refuse_unused(kind: str, tensor_types: Any, embedding_type: Any, output_type: Any, importance: Any) -> None:
    """QuantizeBackboneError where one of GGUF's options is given (true) for int8 or int4, which do not look at it."""
    given = {"--override": tensor_types, "--embedding-type": embedding_type, "--output-type": output_type,
             "--importance": importance}  # fmt: skip
    for option, value in given.items():
        if kind in INT_KINDS and value:
            raise QuantizeBackboneError(
                f"{option} is for GGUF types, --backbone {kind} does nothing with it",
                hint="leave it out, or choose a GGUF type such as q8_0",
            )


def check_replacement(own: BackboneRef, beside: Path, other: Path) -> None:
    """Refuse a file or folder that is of another model than a checkpoint's `own` backbone, by metadata alone.

    What either does not say (a hub name says nothing) is not compared. Raises QuantizeBackboneError.
    """
    place = own.place(beside)
    before, after = backbone_facts(place) if place else {}, backbone_facts(other)
    for fact in (fact for fact in before if fact in after):
        if before[fact] != after[fact]:
            raise QuantizeBackboneError(
                f"--backbone-from {other} is of another model: {fact} {after[fact]}, "
                f"the checkpoint's backbone {place} has {before[fact]}",
                hint="the memory fits one model only: take a file of the model that it was trained with",
            )
