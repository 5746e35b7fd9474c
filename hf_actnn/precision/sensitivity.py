"""From what a backward pass showed to sensitivities: the variance of the whole gradient that each kept tensor causes.

Chen et al. 2021, section 4.1, split the variance of the gradient by layer (law of total variance): the rounding of one
layer's context changes the gradients of its own parameters, and the gradient that goes on to all layers before it. How
much of the second part arrives in parameters is what `amplification` answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

#: Parts that a batch's samples are sorted into by the spread of their values: what a solver tells apart.
PARTS = 8


#: See `read`.
Weigh = Callable[[Mapping[int, float], Mapping[int, float], Mapping[int, float]], Mapping[int, float]]


class Kept(NamedTuple):
    """One kept tensor as a reading shows it.

    Attributes:
        cost: `C` in `variance = C h(b)`, `h(b)` of `harmlessness`, all samples together, in units of the reading.
        variance: what it adds at the bits it has.
        numel: values per sample of the batch.
        parts: `[P]`, relative spread of the samples in ascending order, the mean of each part, itself with mean one.
        low, high: bits that may be chosen.
        sizes: `[8]`, bytes of the codes per sample of the batch at 1 to 8 bits.
        asked: bits on average, in the configuration.
    """

    cost: float
    variance: float
    numel: float
    parts: tuple[float, ...]
    low: int
    high: int
    sizes: tuple[float, ...]
    asked: float

    def bytes_at(self, bits: float) -> float:
        """Between two whole numbers, those of a mixture."""
        below = min(int(bits), 7)
        return self.sizes[below - 1] + (bits - below) * (self.sizes[below] - self.sizes[below - 1])


class Reading(NamedTuple):
    """What one step showed.

    Attributes:
        kept: by name.
        scale: squared response of all parameters to a gradient of random signs: what everything is measured against, so
            that the scale of a loss does not count.
        minibatch: variance of the gradient over the drawing of the batch, in the same units, from the parts of its
            samples; nan if not measured.
        drawn: the same from the gradients of steps one after the other, without what quantisation adds.
        squared: the squared gradient of the parameters, in the same units.
    """

    kept: dict[str, Kept]
    scale: float
    minibatch: float
    squared: float
    drawn: float = math.nan

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.scale) and all(math.isfinite(one.cost) for one in self.kept.values())


#: With one bit a group's two levels are its extremes, far from where most of its values are, so `f (1 - f)` is above
#: the `1/6` of values spread evenly over a step: 1.3 times as much for a group of 256 normal values.
ONE_BIT = 1.3


def harmlessness(bits: torch.Tensor) -> torch.Tensor:
    """`h(b)`, the variance of rounding to `b` bits but for a factor: `1 / (2^b - 1)^2`, at one bit `ONE_BIT`."""
    bits = bits.double()
    return torch.where(bits == 1, ONE_BIT, (torch.exp2(bits) - 1).square().reciprocal())


def amplification(
    following: Sequence[Sequence[int]],
    out: Sequence[float],
    ins: Sequence[Sequence[float]],
    parameters: Sequence[float],
) -> list[float]:
    """How much squared change of parameters' gradients a unit of squared noise on a node's incoming gradient causes.

    Noise that is independent from value to value passes a linear map with its squared entries. So with `e` the squared
    size of the gradient arriving at a node, `e_j` that of the node's response for input `j` to a gradient of the same
    sizes and random signs, and `p` that of its parameters,

        a(node) = (sum_j a(node that input j goes to) e_j + p) / e

    from the first operation of the forward pass to the last. Equal to the squared sizes of the derivatives of an
    activation with respect to all parameters before it, as far as these are independent from value to value.

    Args:
        following: for each node, in an order in which every node comes after those it sends gradients to, the nodes its
            inputs' gradients go to; negative for none.
        out: `e` of each node; 0 where the pass did not come.
        ins: `e_j`.
        parameters: `p`.

    Returns:
        `a` of each node.
    """
    found: list[float] = []
    for at, into in enumerate(following):
        total = parameters[at]
        for j, where in enumerate(into):
            if where >= 0:
                total += found[where] * ins[at][j]
        found.append(total / out[at] if out[at] > 0 else 0.0)
    return found


def parts(relative: torch.Tensor) -> tuple[float, ...]:
    """`[S]` non-negative -> the means of at most `PARTS` parts of the sorted values, with mean one."""
    count = min(PARTS, len(relative))
    total = float(relative.sum())
    if count <= 1 or not math.isfinite(total) or total <= 0:
        return (1.0,) * max(count, 1)
    ordered = relative.sort().values / total
    means = [float(part.mean()) for part in ordered.tensor_split(count)]
    middle = sum(means) / count
    return tuple(mean / middle for mean in means)


def read(tape: Any, weigh: Weigh | None = None) -> Reading:
    """The sensitivities that a `hf_actnn.saving.tape.Tape` holds once its backward pass has run.

    Args:
        weigh: from each parameter's squared response to a gradient of random signs, from its squared gradient, and from
            the variance that quantisation adds to it, all by owner (see `Node.owners`), the weights that squared
            changes of their gradients count with. All alike if not given.
    """
    values = _Values(tape)
    weights: Mapping[int, float] | None = None
    if weigh is not None:
        responses, squares = (_by_owner(tape, name, values) for name in ("parameters", "made"))
        weights = weigh(responses, squares, _added(tape, values))

    def weighted(sums: Mapping[int, torch.Tensor]) -> float:
        if weights is None:
            return sum(values(one) for one in sums.values())
        return sum(values(one) * weights.get(owner, 0.0) for owner, one in sums.items())

    out = [values(node.out) for node in tape.nodes]
    ins = [[values(one) for one in node.ins] for node in tape.nodes]
    parameters = [weighted(node.parameters) for node in tape.nodes]
    factors = amplification([node.following for node in tape.nodes], out, ins, parameters)
    variance = dict.fromkeys(tape.items, 0.0)
    for harm in tape.harms:
        variance[harm.key] += weighted(harm.direct) + sum(factors[into] * values(moved) for into, moved in harm.carried)
    kept = {}
    for key, item in tape.items.items():
        # What the variance of each sample would be at one bit; at its bits it is h times that.
        own = values.of_item(item)
        spread = own / harmlessness(item.bits)
        total = float(own.sum())
        cost = variance[key] * float(spread.sum()) / total if total > 0 else 0.0
        size = item.numel * len(item.variance) / item.batch
        count = len(item.variance)
        sizes = tuple(one * count / item.batch for one in item.sizes)
        kept[key] = Kept(cost, variance[key], size, parts(spread), item.low, item.high, sizes, item.asked)
    squared = sum(weighted(node.made) for node in tape.nodes)
    return Reading(kept, sum(parameters), _minibatch(tape, weighted, parameters), squared)


def _added(tape: Any, values: Any) -> dict[int, float]:
    """By owner, the variance that the bits of this step add. What `amplification` sums up from parameters to nodes is
    handed on from nodes to parameters here."""
    added: dict[int, float] = {}
    arriving = [0.0] * len(tape.nodes)
    for harm in tape.harms:
        for owner, one in harm.direct.items():
            added[owner] = added.get(owner, 0.0) + values(one)
        for into, moved in harm.carried:
            arriving[into] += values(moved)
    for at in reversed(range(len(tape.nodes))):
        node, out = tape.nodes[at], values(tape.nodes[at].out)
        share = arriving[at] / out if out > 0 else 0.0
        if not share:
            continue
        for owner, one in node.parameters.items():
            added[owner] = added.get(owner, 0.0) + share * values(one)
        for where, one in zip(node.following, node.ins, strict=True):
            if where >= 0:
                arriving[where] += share * values(one)
    return added


def _by_owner(tape: Any, name: str, values: Any) -> dict[int, float]:
    found: dict[int, float] = {}
    for node in tape.nodes:
        for owner, one in getattr(node, name).items():
            found[owner] = found.get(owner, 0.0) + values(one)
    return found


def merge(readings: Sequence[Reading]) -> Reading | None:
    """Several readings of one step, of micro-batches or of processes, as one: their gradients are summed up, and the
    noise of each is its own, so variances add."""
    readings = [reading for reading in readings if reading.kept and reading.scale != 0]  # a forward pass alone has 0
    if len(readings) <= 1:
        return readings[0] if readings else None
    kept: dict[str, Kept] = {}
    for reading in readings:
        for key, one in reading.kept.items():
            other = kept.get(key)
            if other is not None:
                same = len(other.parts) == len(one.parts)
                mixed = tuple(a + b for a, b in zip(other.parts, one.parts, strict=True)) if same else other.parts
                middle = sum(mixed) / len(mixed)
                one = one._replace(
                    cost=one.cost + other.cost,
                    variance=one.variance + other.variance,
                    numel=max(one.numel, other.numel),
                    parts=tuple(part / middle for part in mixed),
                )
            kept[key] = one
    return Reading(
        kept,
        sum(reading.scale for reading in readings),
        _sum_of_known([reading.minibatch for reading in readings]),
        sum(reading.squared for reading in readings),
        _sum_of_known([reading.drawn for reading in readings]),
    )


def _sum_of_known(values: Sequence[float]) -> float:
    """Those that are not known are taken to be like the others."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) * len(values) / len(known) if known else math.nan


def _minibatch(tape: Any, weighted: Any, parameters: Sequence[float]) -> float:
    """`V = E |sum_n r_n g_n|^2`, `g_n` the part of sample `n` and `r` random signs of which half are negative.

    With `N` even that is `N / (N - 1) (sum_n |g_n|^2 - |sum_n g_n|^2 / N)`, the variance of the gradient over the
    drawing of the batch, without bias for samples drawn independently; with `N` odd one sign is 0, and the factor is
    missing.
    What could not be measured is taken to be in proportion to `parameters`.
    """
    apart = seen = 0.0
    for node, response in zip(tape.nodes, parameters, strict=True):
        if node.apart:
            count = node.samples
            apart += weighted(node.apart) * (count / (count - 1) if count % 2 else 1.0)
            seen += response
    return apart * sum(parameters) / seen if seen else math.nan


class _Values:
    """All that a tape holds, fetched from its devices with one transfer: call it with a sum to get its value."""

    def __init__(self, tape: Any) -> None:
        self._found: dict[int, float] = {}
        self._items: dict[int, torch.Tensor] = {}
        sums = []
        for node in tape.nodes:
            sums += [node.out, *node.ins, *node.made.values(), *node.parameters.values(), *node.apart.values()]
        for harm in tape.harms:
            sums += [*harm.direct.values(), *(moved for _, moved in harm.carried)]
        present = [one for one in sums if one is not None]
        items = list(tape.items.values())
        parts = [*present, *(item.variance for item in items)]
        if not parts:
            return
        device = max((one.device for one in parts), key=lambda device: device.type != "cpu")
        numbers = torch.cat([one.to(device, torch.float64).reshape(-1) for one in parts]).cpu()
        self._found = dict(zip(map(id, present), numbers[: len(present)].tolist(), strict=True))
        for item, own in zip(items, numbers[len(present) :].split([len(item.variance) for item in items]), strict=True):
            self._items[id(item)] = own

    def __call__(self, one: torch.Tensor | None) -> float:
        return 0.0 if one is None else self._found[id(one)]

    def of_item(self, item: Any) -> torch.Tensor:
        """``[S]``, the variance of an item's rounding, on the CPU."""
        return self._items[id(item)]
