"""How far the gradients of steps one after the other lie apart: the variance that the drawing of the batch gives them.

Between two steps the weights hardly move and the batch is drawn anew, so half the squared difference of their gradients
is on average the variance of one. Unlike a split of one gradient by sample this holds whatever the samples share, batch
statistics or a loss over pairs, and it counts dropout. A fixed random choice of the gradient's values stands for all.
"""

from __future__ import annotations

import base64
import math
import weakref
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

#: Steps before each update that are compared with the one before.
WINDOW = 16
#: Of each parameter, how many values are looked at whatever its size, and one in how many beyond.
LEAST, ONE_IN = 256, 1024


class MinibatchVariance:
    """Fed by hooks on the gradients of parameters, in the steps before an update.

    An overflow under a `GradScaler` begins the comparison anew, as what was seen before it had another scale. A scale
    that grows within a window is not noticed: the variance comes out up to four times too small, once, which costs bits
    and no fidelity.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._total: Tensor | None = None  # [2, P]: sums of logarithms over pairs of steps, and numbers of pairs
        self._owners: dict[int, int] = {}  # [P], with their sizes
        self._places: dict[tuple[int, int, torch.device], Tensor] = {}
        self._begin_step()

    def _begin_step(self) -> None:
        self._nodes: dict[int, Any] = {}  # a node that nobody holds is made anew, without hooks, when the graph is
        self._handles: list[Any] = []
        self._sizes: list[int] = []
        self._picked: dict[int, Tensor] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Have the gradients looked at that come in this step's backward passes; several passes add up."""
        for parameter in parameters:
            if id(parameter) in self._nodes or not (
                parameter.requires_grad and parameter.is_leaf and parameter.numel()
            ):
                continue
            if type(parameter.data) is not Tensor or parameter.is_complex():
                continue  # a parameter in shards gets its gradient past its hooks; it is watched once gathered
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            self._nodes[id(parameter)] = node
            self._handles.append(node.register_prehook(_Pick(self, len(self._sizes))))
            self._sizes.append(parameter.numel())

    def pick(self, number: int, grad: Tensor) -> None:
        """The gradient of a parameter has come."""
        if grad.layout != torch.strided or grad.numel() != self._sizes[number]:
            return
        picked = torch.take(grad.detach(), self._where(number, grad.device)).float()
        before = self._picked.get(number)
        self._picked[number] = picked if before is None else before + picked

    def _where(self, number: int, device: torch.device) -> Tensor:
        """``[n]``, places of the values that are looked at: the same in every step and process."""
        size = self._sizes[number]
        known = self._places.get((number, size, device))
        if known is None:
            count, generator = _count(size), torch.Generator().manual_seed(number)
            if count == size:
                places = torch.arange(size, device="cpu")
            else:
                places = torch.randint(size, (count,), generator=generator, device="cpu")
            known = self._places[number, size, device] = places.to(device)
        return known

    def step(self) -> None:
        """The backward passes of an optimizer step have run."""
        now, counts = self._vector(), [_count(size) for size in self._sizes]
        self._owners = dict(zip(self._nodes, self._sizes, strict=True))
        self._unhook()
        last, self._last = self._last, now
        if now is None or last is None or last.shape != now.shape:
            return
        squares = (now - last.to(now.device)).double().square()
        apart = torch.stack([part.sum() for part in squares.split(counts)]) / 2
        # Of a parameter without a gradient in both steps nothing is known.
        pairs = torch.stack([torch.where(apart > 0, apart, 1.0).log(), (apart > 0).double()])
        total = pairs if self._total is None or self._total.shape != pairs.shape else self._total.to(now.device) + pairs
        self._total = torch.where(apart.isfinite().all(), total, 0.0)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._begin_step()

    def forget(self) -> None:
        """Nobody is going to ask: nothing is looked at any more, and the next window begins from nothing."""
        if self._handles or self._last is not None:
            self._unhook()
            self._last = self._total = None

    def _vector(self) -> Tensor | None:
        """``[n]``, what was picked, so weighted that its square is on average that of the gradient."""
        if not self._picked:
            return None
        device = next(iter(self._picked.values())).device
        parts = []
        for number, size in enumerate(self._sizes):
            picked = self._picked.get(number)
            if picked is None:  # of a layer that was skipped, say: it has no gradient in this step
                picked = torch.zeros(_count(size), device=device)
            parts.append(picked.to(device) * math.sqrt(size / _count(size)))
        return torch.cat(parts)

    def take(self) -> dict[int, float]:
        """Variance of the gradient of a step, in the gradient's own units, by the `id` of each parameter of which it is
        known. A new window begins.

        Over the pairs of a window the mean is geometric, since single gradients can be ten times as long as the others.
        That is below the arithmetic one, most for parameters of few values: by what it is for normal numbers is put
        right.
        """
        total, self._total = self._total, None
        if total is None or total.shape[1] != len(self._owners):
            return {}
        found = zip(self._owners.items(), *total.tolist(), strict=True)
        return {
            owner: _mean_over_geometric(size) * math.exp(logs / pairs) for (owner, size), logs, pairs in found if pairs
        }

    def state(self) -> dict[str, Any]:
        """The window so far, in plain numbers and strings."""
        last = b"" if self._last is None else self._last.cpu().numpy().tobytes()
        return {
            "last": base64.b64encode(last).decode(),
            "total": [] if self._total is None else self._total.tolist(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is none.
        """
        last = bytearray(base64.b64decode(state["last"], validate=True))
        total = torch.tensor(state["total"], dtype=torch.float64)
        if total.numel() and (total.ndim != 2 or len(total) != 2):
            raise ValueError(f"`total` has shape {tuple(total.shape)}, not [2, P]")
        self._last = torch.frombuffer(last, dtype=torch.float32) if last else None
        self._total = total if total.numel() else None
        self._begin_step()

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to a graph that is neither copied nor pickled.
        return {**self.__dict__, "_nodes": {}, "_handles": [], "_sizes": [], "_picked": {}, "_owners": {}}


class _Pick:
    """Runs before a gradient is added to its parameter's. A reference to what it feeds would be a cycle that goes
    through the graph, where the collector does not look."""

    __slots__ = ("into", "number")

    def __init__(self, into: MinibatchVariance, number: int) -> None:
        self.into, self.number = weakref.ref(into), number

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        into = self.into()
        if into is not None and grads[0] is not None:
            into.pick(self.number, grads[0])


@lru_cache(maxsize=4096)
def _mean_over_geometric(values: int) -> float:
    """Of the sum of so many squared normal numbers, half of which the digamma function gives the logarithm of: 3.6 for
    one, 1.1 for ten, 1 for many."""
    half = torch.tensor(values / 2, dtype=torch.float64)
    return float(half * torch.exp(-torch.digamma(half)))


def _count(size: int) -> int:
    return min(size, LEAST + size // ONE_IN)
