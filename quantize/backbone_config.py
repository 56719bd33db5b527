"""Which backbone becomes which type: what quantize/backbone.py and its parts share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engram import EngramError
from engram.builders.backbone import BackboneRef
from engram.builders.fetch import hash_file

FOLDER = "backbone"


class QuantizeBackboneError(EngramError):
    """A backbone that cannot be stored in the wanted type."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone, in which type, and where the folder `backbone/` goes.

    kind: `int8`, `int4`, or a GGUF type such as `q4_k_m` (gguf_types lists them). beside: the folder that an embedded
    reference is relative to. out: the folder in which `backbone/` is made; the caller makes it whole.
    int4: group, the inputs that share a scale. int: head, quantize the output head too (a tied one gets a copy).
    GGUF: tensor_types, (pattern, type) pairs of which the first match counts; embedding_type and output_type, types of
    those two tensors; importance, an importance matrix (imatrix.gguf); requantize, allow a source that is quantized.
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

    def fingerprint(self) -> str:
        """SHA-256 over all that the result depends on; equal for a file that only moved."""
        said = {name: value for name, value in asdict(self).items() if name not in ("beside", "out", "threads")}
        said["source"] = self.source.sha256 or self.source.path
        said["importance"] = None if self.importance is None else hash_file(self.importance)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
