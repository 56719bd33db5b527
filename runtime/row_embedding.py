"""A package's table in place of a model's `nn.Embedding`: for models that other code runs, with rows on disk.

Shape letters: N ids of any shape, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engram.quantize.row_table import RowTable


class RowEmbedding(torch.nn.Module):
    """Row ids [N] → rows [N, D] of a table mapped from disk, in `dtype`: what `nn.Embedding` gives, bit for bit.

    Put it where the model has its table (Qwen3.8-Flash-Next: `….ple.ple_embedding.ngram_embedding`). Rows are decoded
    to float32 and rounded to `dtype` once. It has no parameters; `weight` is empty and only says where ids should be.
    """

    def __init__(self, table: RowTable, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype
        self.register_buffer("weight", torch.empty(0, table.width, dtype=dtype), persistent=False)

    def forward(self, ids_N: Tensor) -> Tensor:
        """Raises RowStoreError for an id outside the table and for a damaged page."""
        rows = ids_N.detach().cpu().numpy().astype(np.int64, copy=False)
        out_ND = np.empty((*rows.shape, self.table.width), dtype=np.float32)
        if rows.size:
            self.table.decode(rows.reshape(-1), out_ND.reshape(-1, self.table.width))
        return torch.from_numpy(out_ND).to(device=ids_N.device, dtype=self.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.table.rows:,} rows of {self.table.width}, {self.table.codec_name}, from {self.table.path}"
