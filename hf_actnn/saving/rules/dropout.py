"""Dropout: one exact bit per value; the output is rebuilt from the input and the bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call

_RANK_CHANGES = (F.dropout1d, F.dropout2d, F.dropout3d)


def _keep_scale(p: float, dtype: torch.dtype) -> float:
    """What a kept value is multiplied by, rounded as torch rounds it: ``noise.div_(1 - p)``."""
    return torch.ones((), dtype=dtype).div_(1 - p).item()


def _keep_dropout(call: Call) -> None:
    p = call.argument(1, "p", 0.5)
    if not 0 < p < 1:
        return
    for slot, noise in call.open_slots():
        if noise.numel() < call.policy.min_numel:
            continue
        if noise.dtype == torch.bool:
            mask = call.mask(slot, noise, "nonzero", 0.0, 0.0, on=1.0, off=0.0)
            call.output_masked(call.before, mask, 1.0 / (1.0 - p))
        elif noise.is_floating_point():
            scale = _keep_scale(p, noise.dtype)
            mask = call.mask(slot, noise, "nonzero", 0.0, 0.0, on=scale, off=0.0)
            if call.function not in _RANK_CHANGES:
                call.output_masked(call.before, mask, scale)


def _keep_alpha_dropout(call: Call) -> None:
    """The noise takes two values, 0 and a constant: kept as bits where giving them back reproduces it exactly."""
    p = call.argument(1, "p", 0.5)
    if not 0 < p < 1:
        return
    alpha = 1.7580993408473766
    factor = 1.0 / ((alpha * alpha * p + 1) * (1 - p)) ** 0.5
    for slot, noise in call.open_slots():
        if noise.device.type != "cpu" or noise.numel() < call.policy.min_numel or not noise.is_floating_point():
            continue  # checking would stall other devices
        scale = torch.ones((), dtype=noise.dtype).mul_(factor).item()
        if bool(((noise == 0) | (noise == scale)).all()):
            call.mask(slot, noise, "nonzero", 0.0, 0.0, on=scale, off=0.0)


DROPOUT = register(
    Rule(
        "dropout",
        _keep_dropout,
        bounded="one exact bit per value",
        needs_before=True,
        lossless=True,
        exact_reason="one value per sample or channel",
    ),
    functions("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
)
ALPHA_DROPOUT = register(
    Rule(
        "alpha_dropout",
        _keep_alpha_dropout,
        bounded="one exact bit per value",
        exact_reason="noise of more than two values",
    ),
    functions("alpha_dropout", "feature_alpha_dropout"),
)
