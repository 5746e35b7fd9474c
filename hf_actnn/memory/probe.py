"""Measure one training forward pass of a model that somebody else calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from hf_actnn.memory.track import MemoryReport, own_storages
from hf_actnn.saving.scope import observers
from hf_actnn.saving.tape import batch_size


def measure_next_forward(model: nn.Module, done: Callable[[MemoryReport, int], None]) -> ExitStack:
    """Track the next training forward pass of a converted model, then take the hooks off again.

    Hooks, because who calls it is not to be changed. They only count; no tensor and no random number is touched.
    `track_memory` would not do here: a forward hook runs inside the scope of the converted model, whose saved-tensor
    hooks it would displace, so what the scope reports to its observers is counted instead.

    Args:
        model: a converted model.
        done: called with what was kept and the number of samples in the batch, unless the forward pass raised.

    Returns:
        What takes the hooks off when it is closed, whether or not a forward pass came.
    """
    probe = ExitStack()
    measured: list[MemoryReport] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled() and not measured:
            measured.append(MemoryReport(own_storages(module)))
            observers().append(measured[0])

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not measured:
            return
        memory = measured[0]
        observers().remove(memory)
        probe.close()
        if output is not None:
            done(memory, batch_size(args, kwargs, getattr(module, "main_input_name", "")))

    probe.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    # always_call: a forward that raises must not leave an observer behind.
    probe.callback(model.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
    return probe
