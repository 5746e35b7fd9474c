"""Bits of the samples of one tensor, and what is known of the samples of a data set."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from hf_actnn.errors import ConfigError, message
from hf_actnn.precision.sensitivity import harmlessness

#: Weight of the newest gradient in a sample's moving average.
NEWEST = 0.5
#: A table has a number for each sample up to the largest: 1 GB at this many.
MOST_SAMPLES = 2**28


def assign(weights: Tensor, average: float, low: int, high: int) -> int | Tensor:
    """Bits of each sample of a tensor: the least `sum_n weights_n h(b_n)` with a mean of at most `average`.

    All samples cost the same bytes per bit and `h` is convex, so taking the best single steps is optimal (Chen et al.
    2021, section 4.2).

    Args:
        weights: ``[S]``, variance of a sample's rounding at one bit, times what is known of its gradient. Zeros and
            values that are not finite count as the mean.
        average: bits, `low` to `high`.

    Returns:
        ``[S]`` uint8, or one number where all are equal.
    """
    samples = len(weights)
    steps = min(int(average * samples + 1e-6), high * samples) - low * samples
    if steps <= 0:
        return low
    if high == low:
        return low
    weights = weights.double()
    usable = weights.isfinite() & (weights > 0)
    if not bool(usable.all()):
        middle = weights[usable].mean() if bool(usable.any()) else torch.ones((), dtype=torch.float64)
        weights = torch.where(usable, weights, middle)
    ladder = harmlessness(torch.arange(low, high + 1))
    gains = (weights[:, None] * (ladder[:-1] - ladder[1:])).flatten()
    best = gains.topk(steps).indices
    widths = torch.bincount(best // (high - low), minlength=samples) + low
    if int(widths.min()) == int(widths.max()):
        return int(widths[0])
    return widths.to(torch.uint8)


class _Norms:
    """Notes the squared size of each sample's gradient on the way into a node of the graph."""

    def __init__(self, energies: list[Tensor], place: int) -> None:
        self.energies, self.place = energies, place

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[self.place]
        if grad is not None:
            self.energies.append(grad.detach().float().flatten(1).square().sum(1))


class SampleTable:
    """Moving averages of how large the gradients of a data set's samples are, squared, relative to their batch.

    Filled from the gradient of the model's outputs in every backward pass whose batch came with ``sample_id``: the
    loss's own derivative, to which all that a sample adds to the gradient is proportional.
    """

    def __init__(self) -> None:
        self.values = torch.empty(0)  # nan: not seen yet
        self._ids: Tensor | None = None
        self._noted: list[tuple[Tensor, list[Tensor]]] = []

    def identify(self, ids: Any) -> None:
        """The next forward pass sees these samples.

        Raises:
            ConfigError: they are no vector of whole numbers from 0 on.
        """
        found = torch.as_tensor(ids)
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool or bool((found < 0).any()):
            raise ConfigError(
                message(
                    "`sample_id` does not number the samples",
                    where="the call of the model",
                    expected="one whole number from 0 on for each sample of the batch, as a tensor [N]",
                    received=f"{found.dtype} of shape {tuple(found.shape)}",
                    next_step="Add a column with each sample's position in the data set",
                )
            )
        if found.numel() and int(found.max()) >= MOST_SAMPLES:
            raise ConfigError(
                message(
                    "`sample_id` is too large for a position in a data set",
                    where="the call of the model",
                    expected=f"whole numbers below {MOST_SAMPLES}",
                    received=str(int(found.max())),
                    next_step="Number the samples from 0 on instead of using hashes or names",
                )
            )
        self._ids = found.detach().cpu().long()

    def factors(self, samples: int) -> Tensor | None:
        """``[S]`` what is known of the samples of the batch, 1 for those not seen yet; None without numbers."""
        ids = self._ids
        if ids is None or len(ids) != samples:
            return None
        self._grow(ids)
        return self.values[ids].double().nan_to_num(nan=1.0).clamp(1e-3, 1e3)

    def watch(self, outputs: list[Tensor], samples: int) -> None:
        """Note the gradients of the outputs that have a row per sample."""
        ids, self._ids = self._ids, None
        if ids is None or len(ids) != samples or samples < 2:
            return
        energies: list[Tensor] = []
        self._noted.append((ids, energies))
        for out in outputs:
            node: Any = out.grad_fn
            if out.ndim < 2 or out.shape[0] != samples or node is None:
                continue
            place = out.output_nr
            # Mixed precision casts the outputs after the model has made a loss of them.
            while type(node).__name__.startswith("ToCopyBackward") and node.next_functions[0][0] is not None:
                node, place = node.next_functions[0]
            node.register_prehook(_Norms(energies, place))

    def forget(self) -> None:
        """The forward pass that was to see them did not come to its end."""
        self._ids = None

    def settle(self) -> None:
        """Take over what was noted since the last call. What is not finite, or zero everywhere, is not."""
        noted, self._noted = self._noted, []
        for ids, energies in noted:
            if not energies:
                continue
            total = torch.stack([one.cpu() for one in energies]).sum(0)
            mean = float(total.mean())
            if not math.isfinite(mean) or mean <= 0:
                continue
            self._grow(ids)
            old, new = self.values[ids], total / mean
            self.values[ids] = torch.where(old.isnan(), new, NEWEST * new + (1 - NEWEST) * old)

    def _grow(self, ids: Tensor) -> None:
        size = int(ids.max()) + 1
        if size > len(self.values):
            self.values = torch.cat([self.values, torch.full((size - len(self.values),), math.nan)])

    def state(self) -> str:
        return base64.b64encode(self.values.numpy().tobytes()).decode()

    def load(self, state: str) -> None:
        raw = bytearray(base64.b64decode(state))
        self.values = torch.frombuffer(raw, dtype=torch.float32).clone() if raw else torch.empty(0)
        self._ids, self._noted = None, []

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "_ids": None, "_noted": []}
