"""The Engram module, cut at the seam: `Table` (row ids → `memory_BTE`) and `Gate` (`memory_BTE`, hidden → added).

Shape letters: B batch, T positions, C columns, N rows, U distinct rows, E memory width, M residual branches,
D hidden width, W kernel width, P past positions that the convolution reads.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram import EngramError
from engram.kernels import dispatch
from engram.kernels.reference import Convolution, MemoryGate

FEW = 16  # positions that one thread gates sooner than torch starts its operators


class GateError(EngramError):
    """A gate configuration that cannot be built."""


@dataclass(frozen=True)
class GateConfig:
    """How a layer's memory enters the residual stream."""

    hidden: int
    memory: int
    branches: int = 1  # residual streams of a hyper-connected backbone; 1 for a plain one
    kind: str = "sqrt"  # "plain" (the paper), "sqrt" (demo, Qwen), "copysign" (V4.1)
    bias: bool = False
    eps: float = 1e-6
    conv_kernel: int = 0  # 0: no convolution
    conv_dilation: int = 3
    conv_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse what no module can be built from."""
        if self.kind not in ("plain", "sqrt", "copysign"):
            raise GateError(f"gate kind {self.kind!r} is not known", hint="use one of: plain, sqrt, copysign")
        for name in ("hidden", "memory", "branches", "conv_dilation"):
            if getattr(self, name) < 1:
                raise GateError(f"gate field {name} {getattr(self, name)} must be at least 1")
        if self.conv_kernel < 0:
            raise GateError(f"gate field conv_kernel {self.conv_kernel} must be 0 (none) or positive")

    @classmethod
    def of_dialect(cls, dialect: str, hidden: int, memory: int, branches: int, highest_order: int) -> GateConfig:
        """The fusion that the dialect's published model uses.

        The demo's gate norms pass no epsilon, which torch takes as float32's machine epsilon.
        """
        if dialect == "v41":
            return cls(hidden, memory, branches, kind="copysign", eps=1e-20)
        if dialect == "qwen-ple":
            return cls(hidden, memory, branches, conv_kernel=4, conv_dilation=highest_order, conv_eps=1e-6)
        eps = torch.finfo(torch.float32).eps
        return cls(hidden, memory, branches, bias=True, eps=eps, conv_kernel=4, conv_dilation=highest_order)

    def to_json(self) -> dict[str, Any]:
        """All fields, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GateConfig:
        """The inverse of `to_json`; GateError for an unknown or missing field."""
        try:
            return cls(**data)
        except TypeError as wrong:
            raise GateError(f"gate configuration has the wrong fields: {wrong}") from None


class Gate(nn.Module):
    """memory_BTE and the residual stream in, what is added to the stream out."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        wide = config.branches * config.hidden
        self.key_proj = nn.Linear(config.memory, wide, bias=config.bias)
        self.value_proj = nn.Linear(config.memory, config.hidden, bias=config.bias)
        self.norm_key = nn.Parameter(torch.ones(config.branches, config.hidden))
        self.norm_query = nn.Parameter(torch.ones(config.branches, config.hidden))
        if config.conv_kernel:
            self.norm_conv = nn.Parameter(torch.ones(config.branches, config.hidden))
            self.conv_weight = nn.Parameter(torch.zeros(wide, config.conv_kernel))

    @property
    def past(self) -> int:
        """Positions before the current one that the convolution reads (P)."""
        return max(0, self.config.conv_kernel - 1) * self.config.conv_dilation

    def silence(self) -> None:
        """Zero what carries the memory into the stream, so that a fresh model's logits are the backbone's."""
        with torch.no_grad():
            self.value_proj.weight.zero_()
            if self.config.bias:
                self.value_proj.bias.zero_()
            if self.config.conv_kernel:
                self.conv_weight.zero_()

    def open(self, hidden_BTMD: Tensor, memory_BTE: Tensor) -> Tensor:
        """How far each branch opens, 0 … 1: [B, T, M]. The formula stands in kernels/reference.py."""
        config = self.config
        key_BTMD = self._split(self.key_proj(memory_BTE))
        key = _rms_norm(key_BTMD, self.norm_key, config.eps)
        query = _rms_norm(hidden_BTMD, self.norm_query, config.eps)
        score = (query * key).sum(-1) / math.sqrt(config.hidden)
        if config.kind != "plain":
            root = score.abs().clamp_min(1e-6).sqrt()
            score = torch.copysign(root, score) if config.kind == "copysign" else score.sign() * root
        return torch.sigmoid(score)

    def forward(
        self, hidden: Tensor, memory_BTE: Tensor, past_BPX: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the stream, and the convolution's inputs of these positions.

        `hidden` is [B, T, D] for one branch or [B, T, M, D]; the first result has its shape and dtype. `past_BPX` holds
        the convolution's inputs at the P positions before (None: the text begins here). Where `mask_BT` is 0 (left
        padding, image spans) nothing is added and the convolution sees zeros. The second result is [B, T, M * D], or
        None without a convolution.
        """
        config = self.config
        dtype = self.value_proj.weight.dtype
        stream = (hidden.unsqueeze(-2) if hidden.dim() == 3 else hidden).to(dtype)
        memory = memory_BTE.to(dtype)
        gate_BTM = self.open(stream, memory)
        if mask_BT is not None:
            gate_BTM = gate_BTM * mask_BT.unsqueeze(-1).to(dtype)
        added = gate_BTM.unsqueeze(-1) * self.value_proj(memory).unsqueeze(-2)
        inputs = None
        if config.conv_kernel:
            inputs = _rms_norm(added, self.norm_conv, config.conv_eps).flatten(-2)
            added = added + self._split(self._convolve(inputs, past_BPX))
            if mask_BT is not None:
                added = added * mask_BT[..., None, None].to(dtype)
        return added.reshape(hidden.shape).to(hidden.dtype), inputs

    def add(
        self, hidden: Tensor, memory_BTE: Tensor, past_BPX: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden + forward's first result, and its second; a few positions on a CPU in one pass where it can be had."""
        singles = hidden.dtype == memory_BTE.dtype == self.value_proj.weight.dtype == torch.float32
        here = hidden.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        few = hidden.shape[0] * hidden.shape[1] <= FEW
        if not (singles and here and few) or dispatch.name() == "reference":
            added, inputs = self(hidden, memory_BTE, past_BPX, mask_BT)
            return hidden + added, inputs
        stream = (hidden.unsqueeze(-2) if hidden.dim() == 3 else hidden).contiguous()
        out, made = self.prepared().step(
            stream.numpy(), memory_BTE.contiguous().numpy(),
            None if past_BPX is None else past_BPX.contiguous().numpy(),
            None if mask_BT is None else mask_BT.bool().contiguous().numpy(),
        )  # fmt: skip
        return torch.from_numpy(out).view(hidden.shape), None if made is None else torch.from_numpy(made)

    def prepared(self, key_weight: Any = None, value_weight: Any = None) -> MemoryGate:
        """The same for few positions outside torch: the path's operation over these float32 weights, not copies.

        `key_weight` and `value_weight` stand in for this module's, the same in float16.
        """
        config = self.config

        def array(weight: Tensor | None) -> Any:
            return None if weight is None else weight.detach().contiguous().numpy()

        conv = None
        if config.conv_kernel:
            conv = Convolution(
                array(self.norm_conv), array(self.conv_weight), config.conv_dilation, config.conv_eps
            )
        made: MemoryGate = dispatch.ops().MemoryGate(
            key_weight_YE=array(self.key_proj.weight) if key_weight is None else key_weight,
            key_bias_Y=array(self.key_proj.bias),
            value_weight_DE=array(self.value_proj.weight) if value_weight is None else value_weight,
            value_bias_D=array(self.value_proj.bias),
            query_norm_MD=array(self.norm_query), key_norm_MD=array(self.norm_key), kind=config.kind, eps=config.eps,
            conv=conv,
        )  # fmt: skip
        return made

    def _split(self, wide: Tensor) -> Tensor:
        return wide.view(*wide.shape[:-1], self.config.branches, self.config.hidden)

    def _convolve(self, inputs_BTX: Tensor, past_BPX: Tensor | None) -> Tensor:
        if past_BPX is None:
            full = F.pad(inputs_BTX, (0, 0, self.past, 0))
        else:
            missing = self.past - past_BPX.shape[1]
            full = torch.cat([F.pad(past_BPX, (0, 0, missing, 0)), inputs_BTX], dim=1)
        channels = full.shape[-1]
        out = F.conv1d(
            full.transpose(1, 2), self.conv_weight.unsqueeze(1), dilation=self.config.conv_dilation, groups=channels
        )
        return F.silu(out).transpose(1, 2).contiguous()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Table(nn.Module):
    """A trainable table whose cost follows the rows touched: the weight stays outside autograd.

    Each training forward makes `memory_BTE` a leaf; after `backward`, `take_touched` sums its gradient by row and hands
    the optimizer the distinct rows.
    """

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight_ND, persistent=False)
        self._touched: list[tuple[Tensor, Tensor]] = []

    def forward(self, rows_BTC: Tensor) -> Tensor:
        """memory_BTE: the rows of every position side by side."""
        memory_BTE = F.embedding(rows_BTC, self.weight).flatten(-2)
        if self.training and torch.is_grad_enabled():
            memory_BTE.requires_grad_()
            self._touched.append((rows_BTC, memory_BTE))
        return memory_BTE

    def take_touched(self) -> tuple[Tensor, Tensor] | None:
        """Distinct rows [U] and their summed gradients [U, D] since the last call; None when nothing was touched."""
        width = self.weight.shape[1]
        touched = [(rows.flatten(), leaf.grad.view(-1, width)) for rows, leaf in self._touched if leaf.grad is not None]
        self._touched.clear()
        if not touched:
            return None
        rows_N = torch.cat([rows for rows, _ in touched])
        gradients_ND = torch.cat([gradient for _, gradient in touched])
        if gradients_ND.device.type == "cpu" and gradients_ND.dtype == torch.float32:
            found, summed = dispatch.ops().scatter_add(rows_N.numpy(), gradients_ND.numpy())
            return torch.from_numpy(found), torch.from_numpy(summed)
        rows_U, place = torch.unique(rows_N, return_inverse=True)
        sums_UD = torch.zeros(rows_U.numel(), width, dtype=gradients_ND.dtype, device=gradients_ND.device)
        return rows_U, sums_UD.index_add_(0, place, gradients_ND)
