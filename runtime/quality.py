"""What a change of tables or backbone costs, against the float model, on fixed text: the measure behind the gate.

Everything is computed in float32, position by position, and summed up by document: intervals are over documents.

Shape letters: T positions of a window, C columns, D row width, E = C * D, M branches, N compared positions of all
windows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram import Progress
from engram.builders.layout import Layout
from engram.builders.model import EngramModel
from engram.runtime.evaluate import shuffled
from engram.runtime.intervals import over_documents
from engram.runtime.readout import Readout, nats, slices

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]
Rows = Callable[[int, Ints], Singles]  # (layer, rows [B, T, C]) → memory [B, T, E]

KEPT_BYTES = 256 << 20  # of states: 16,384 tokens, 4096 wide


@dataclass(frozen=True)
class Window:
    """A text of its own. Tokens from place `first` on are predicted and compared."""

    document: int
    ids_T: Ints
    first: int = 1


@dataclass(frozen=True)
class Measured:
    """By compared position: nats; KL divergence from the float model; whether the likeliest token agrees."""

    nats_N: NDArray[np.float64]
    kl_N: NDArray[np.float64] | None = None
    same_N: NDArray[np.bool_] | None = None


class Judge:
    """The float model on fixed windows: what others are compared with.

    States are computed once and kept, up to KEPT_BYTES of them; those of further windows are computed again. Logits are
    held for SLICE positions at a time.
    """

    def __init__(self, model: EngramModel, rows: Rows, windows: Sequence[Window], progress: Progress) -> None:
        self.layout, self.windows, self.rows, self.progress = model.layout, list(windows), rows, progress
        self.readout = Readout(model)
        self.document_N = np.concatenate([np.full(len(w.ids_T) - w.first, w.document) for w in self.windows])
        self._kept: dict[tuple[Readout, bool, int], Tensor] = {}  # by readout, with its float memory or not, window
        self._room = KEPT_BYTES
        self._weight: list[dict[int, NDArray[np.float64]]] = []  # by window and layer: gate² [T], a mean over branches
        base_nats, float_nats = [], []
        tokens = sum(len(w.ids_T) for w in self.windows)
        with progress.task("float model", tokens, "tokens") as task, torch.inference_mode():
            for place, window in enumerate(self.windows):
                ids = torch.from_numpy(window.ids_T[None])
                watch: dict[int, Tensor] = {}
                memory = self.memory(window, rows)
                base_TD = self._base(self.readout, place)
                float_TD = self.readout.states(ids, memory, base_TD, watch)
                if not self.readout.once:  # else it is base and gate: little work
                    self._keep((self.readout, True, place), float_TD)
                self._weight.append({n: _opening(model, n, watch[n], memory[n]) for n in self.layout.layers})
                base_nats.append(nats(self.readout, base_TD, ids)[window.first - 1 :])
                float_nats.append(nats(self.readout, float_TD, ids)[window.first - 1 :])
                task.advance(len(window.ids_T))
        self.base = Measured(_joined(base_nats))
        self.float = Measured(_joined(float_nats))

    def memory(self, window: Window, rows: Rows) -> dict[int, Tensor]:
        """The memory of every layer [1, T, E]."""
        wanted = self.layout.rows(window.ids_T[None])
        return {n: torch.from_numpy(rows(n, wanted[n])) for n in self.layout.layers}

    def measure(
        self, rows: Rows | None, readout: Readout | None = None, *, divergence: bool = True, label: str = "quantized"
    ) -> Measured:
        """The same windows with other rows (None: no memory), or through another backbone.

        Without `divergence` only the loss is computed, at half the cost.
        """
        own = readout or self.readout
        lost, kl, same = [], [], []
        with self.progress.task(label, len(self.document_N), "tokens") as task, torch.inference_mode():
            for place, window in enumerate(self.windows):
                ids = torch.from_numpy(window.ids_T[None])
                base_TD = self._base(own, place) if own.once or rows is None else None
                states_TD = base_TD if rows is None else own.states(ids, self.memory(window, rows), base_TD)
                assert states_TD is not None
                if divergence:
                    part = self._compare(own, states_TD, self._float(place), ids)
                    lost.append(part[0][window.first - 1 :])
                    kl.append(part[1][window.first - 1 :])
                    same.append(part[2][window.first - 1 :])
                else:
                    lost.append(nats(own, states_TD, ids)[window.first - 1 :])
                task.advance(len(window.ids_T) - window.first)
        if not divergence:
            return Measured(_joined(lost))
        return Measured(_joined(lost), _joined(kl), torch.cat(same).numpy())

    def _base(self, own: Readout, place: int) -> Tensor:
        """States [T, D] of a window under a backbone alone; kept where every memory is added to them."""
        found = self._kept.get((own, False, place))
        if found is None:
            found = own.base(torch.from_numpy(self.windows[place].ids_T[None]))
            if own.once:
                self._keep((own, False, place), found)
        return found

    def _float(self, place: int) -> Tensor:
        """States [T, D] of a window under the float model."""
        found = self._kept.get((self.readout, True, place))
        if found is None:
            window, base_TD = self.windows[place], self._base(self.readout, place) if self.readout.once else None
            ids = torch.from_numpy(window.ids_T[None])
            found = self.readout.states(ids, self.memory(window, self.rows), base_TD)
        return found

    def _keep(self, key: tuple[Readout, bool, int], states_TD: Tensor) -> None:
        if states_TD.nbytes <= self._room:
            self._kept[key] = states_TD
            self._room -= states_TD.nbytes

    def _compare(self, own: Readout, states_TD: Tensor, float_TD: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nats, KL(float || own) and agreement of the likeliest token, each [T - 1]."""
        lost, kl, same = [], [], []
        for part in slices(states_TD.shape[0] - 1):
            following = ids[0, part.start + 1 : part.stop + 1]
            own_TV = own.logits(states_TD[part]).log_softmax(-1)
            float_TV = self.readout.logits(float_TD[part]).log_softmax(-1)
            same.append(own_TV.argmax(-1) == float_TV.argmax(-1))
            lost.append(-own_TV.gather(1, following[:, None])[:, 0])
            difference_TV = own_TV.neg_().add_(float_TV)  # in place: a slice of logits is large
            kl.append(float_TV.exp_().mul_(difference_TV).sum(-1))
        return torch.cat(lost), torch.cat(kl), torch.cat(same)

    def row_errors(self, rows: Rows) -> dict[int, float]:
        """||x' - x|| / ||x|| over all rows that the windows read, each weighted by the square of its gate; by layer."""
        lost, whole = dict.fromkeys(self.layout.layers, 0.0), dict.fromkeys(self.layout.layers, 0.0)
        for window, weight in zip(self.windows, self._weight, strict=True):
            wanted = self.layout.rows(window.ids_T[None])
            for n in self.layout.layers:
                float_TE = self.rows(n, wanted[n])[0].astype(np.float64)
                difference_TE = rows(n, wanted[n])[0] - float_TE
                lost[n] += float(weight[n] @ np.square(difference_TE).sum(1))
                whole[n] += float(weight[n] @ np.square(float_TE).sum(1))
        return {n: float(np.sqrt(lost[n] / whole[n])) if whole[n] else 0.0 for n in lost}

    def openings(self) -> list[tuple[dict[int, Ints], dict[int, NDArray[np.float64]]]]:
        """By window: the rows that each layer reads [T, C], and gate² [T] of each layer."""
        wanted = [self.layout.rows(window.ids_T[None]) for window in self.windows]
        return [
            ({n: rows[n][0] for n in rows}, weight) for rows, weight in zip(wanted, self._weight, strict=True)
        ]

    # Figures

    def by_document(self, values_N: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the positions of each document that occurs."""
        _, place = np.unique(self.document_N, return_inverse=True)
        return np.bincount(place, weights=values_N.astype(np.float64)).astype(np.float64)

    def loss(self, measured: Measured) -> float:
        """Nats a token."""
        return float(measured.nats_N.mean())

    def change(self, measured: Measured, seed: int) -> dict[str, Any]:
        """Change of the loss against the float model, with its 95 % interval over documents."""
        sums = self.by_document(measured.nats_N - self.float.nats_N), self.by_document(np.ones_like(self.document_N))
        mean = float(sums[0].sum() / sums[1].sum())
        low, high = over_documents(*sums, seed)
        return {"nll": mean, "ci95": [low, high], "relative": mean / self.loss(self.float)}

    def gain(self, seed: int) -> dict[str, Any]:
        """What the float memory gains over the backbone alone, nats a token, with its 95 % interval."""
        sums = self.by_document(self.base.nats_N - self.float.nats_N), self.by_document(np.ones_like(self.document_N))
        low, high = over_documents(*sums, seed)
        return {"nll": float(sums[0].sum() / sums[1].sum()), "ci95": [low, high]}

    def gain_kept(self, measured: Measured, seed: int) -> dict[str, Any]:
        """Share of the memory's gain over the backbone alone that is left.

        None where the interval of that gain reaches down to zero: a share of what may be nothing says nothing.
        """
        if not self.gain(seed)["ci95"][0] > 0:
            return {"share": None, "ci95": None}
        gains = self.base.nats_N - measured.nats_N, self.base.nats_N - self.float.nats_N
        sums = self.by_document(gains[0]), self.by_document(gains[1])
        low, high = over_documents(*sums, seed)
        return {"share": float(sums[0].sum() / sums[1].sum()), "ci95": [low, high]}

    def divergence(self, measured: Measured, seed: int) -> dict[str, Any]:
        """KL divergence from the float model's next-token distribution, and how often the likeliest token agrees."""
        assert measured.kl_N is not None and measured.same_N is not None
        sums = self.by_document(measured.kl_N), self.by_document(np.ones_like(self.document_N))
        low, high = over_documents(*sums, seed)
        return {
            "kl": {"mean": float(measured.kl_N.mean()), "ci95": [low, high],
                   "p99": float(np.quantile(measured.kl_N, 0.99)), "max": float(measured.kl_N.max())},
            "top1": float(measured.same_N.mean()),
        }  # fmt: skip


def zero_rows(rows: Rows) -> Rows:
    """The same look-ups of a table of zeros."""
    return lambda layer, wanted_BTC: np.zeros_like(rows(layer, wanted_BTC))


def shuffled_rows(rows: Rows, layout: Layout, seed: int) -> Rows:
    """The same look-ups with the rows of every head permuted."""
    return lambda layer, wanted_BTC: rows(layer, shuffled({layer: wanted_BTC}, layout, seed)[layer])


def continuations(
    model: EngramModel, rows: Rows, prompts: Sequence[Window], length: int, progress: Progress
) -> list[Window]:
    """What the model writes greedily behind each prompt, as windows that compare the written tokens only.

    All prompts have the same length; they are continued side by side.
    """
    ids_BT = np.stack([prompt.ids_T for prompt in prompts])
    timeline = model.timeline(len(prompts))
    feed = ids_BT
    with progress.task("fixed continuations", length, "tokens") as task, torch.inference_mode():
        for _ in range(length):
            wanted = timeline.rows(feed)
            memory = {n: torch.from_numpy(rows(n, wanted[n])) for n in model.layout.layers}
            logits = model(torch.from_numpy(feed), memory, timeline=timeline, last_only=True)
            feed = logits[:, -1].argmax(-1, keepdim=True).numpy()
            ids_BT = np.concatenate([ids_BT, feed], axis=1)
            task.advance(1)
    first = len(prompts[0].ids_T)
    return [Window(prompt.document, ids_T, first) for prompt, ids_T in zip(prompts, ids_BT, strict=True)]


def _opening(model: EngramModel, layer: int, hidden: Tensor, memory_BTE: Tensor) -> NDArray[np.float64]:
    """gate² [T], a mean over branches."""
    gate = model.gate(layer)
    stream = (hidden.unsqueeze(-2) if hidden.dim() == 3 else hidden).to(gate.value_proj.weight.dtype)
    opened: NDArray[np.float64] = gate.open(stream, memory_BTE)[0].double().square().mean(-1).numpy()
    return opened


def _joined(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat(list(parts)).double().numpy()


def layers_of(values: Mapping[int, float]) -> dict[str, float]:
    """The same with layers as JSON keys."""
    return {str(layer): value for layer, value in values.items()}
