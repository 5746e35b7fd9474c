"""A short training run in a process of its own, and the memory that it takes.

The peak of a step is measured in two phases, since only one of them grows with the batch: the forward and the backward
pass; and the optimizer's step, when the activations are gone and its own temporaries are there. The optimizer's state
is made before anything is measured.

Bits are chosen in each of the first two steps, so that such a step, the largest of a level that chooses bits, is
measured as it is later in a training: with the optimizer's state, and with bits that were chosen before. It takes
several times as long, and comes once in some hundred steps; so what is timed are steps after these, in which bits stay
as they are.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_actnn.codec import native
from hf_actnn.commands.training import (
    OPTIMIZERS,
    PLAIN,
    autocast,
    checkpoints,
    compress,
    device_of,
    is_for_memory,
    level_of,
    to,
    trained,
)
from hf_actnn.commands.watch import PAGES, high_water, watched
from hf_actnn.convert import controller, is_converted
from hf_actnn.errors import ActNNError, ActNNWarning, NativeError, message
from hf_actnn.integrations import named
from hf_actnn.memory import own_storages

#: Of a run.
STEPS = 3
#: At levels that choose bits: the first steps, in each of which they are chosen with this interval, and those behind
#: that are timed.
CHOOSING, UPDATE_INTERVAL, ORDINARY = 2, 2, 2


class Run(NamedTuple):
    """What is trained, and how.

    Attributes:
        model: a name that `named.load` takes.
        way: plain, checkpoint, a level, or both.
        limit: bytes that the process may have.
    """

    model: str
    image_size: int | None
    way: str
    optimizer: str
    precision: str
    device: str
    limit: int
    steps: int = STEPS


#: Share of the saved bytes that lies in tensors of the grain and more.
MOST = 0.75
#: Samples of the pass that tells it.
FEW = 2


def grain(model: nn.Module, batch: Any, samples: int) -> float:
    """Bytes per sample of the smallest of the tensors that hold most of what a plain model saves."""
    found: dict[int, int] = {}
    own = own_storages(model)

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        held = named.loss(model, batch)
    del held
    left = MOST * sum(found.values())
    for nbytes in sorted(found.values(), reverse=True):
        left -= nbytes
        if left <= 0:
            return nbytes / samples
    return 0.0


class Gauge:
    """The most memory that was in use since the last look: the resident set of this process, or, on a CUDA device, what
    torch's allocator has reserved."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Begin anew. Where the system does not allow that, the peak is that of the whole process."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_reserved(self._device)
        return high_water()


def train(run: Run, batch_size: int) -> dict[str, Any]:
    """Train some steps in this process.

    Returns:
        ``passes`` and ``update``: peak bytes of the forward and backward pass, and of the optimizer's step; ``peak``,
        the larger; ``seconds`` of the fastest step that chooses no bits, but the first; ``parameters`` and ``trained``:
        bytes of all parameters, and of those with a gradient; of a plain run of few samples its ``grain``.

    Raises:
        ActNNError: the model cannot be had, or not trained in this way.
        Exception: what training raises.
    """
    device = device_of(run.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, run.limit / total), device)
    found = named.load(run.model, run.image_size)
    model = found.model.to(device)
    after = _prepare(model, run.way, device)
    choosing = controller(model) if is_converted(model) else None
    chosen = min(run.steps, CHOOSING) if choosing is not None and choosing.adaptive else 0
    parameters = trained(model, run.model)
    optimizer = OPTIMIZERS[run.optimizer](parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    batch = to(found.batch(batch_size), device)
    told = {"grain": grain(model, batch, batch_size)} if run.way == PLAIN and batch_size <= FEW else {}
    gauge = Gauge(device)
    passes, update, seconds = [], [], []
    for at in range(chosen + ORDINARY if chosen else run.steps):
        if chosen and choosing is not None:
            choosing.active = at < chosen
        optimizer.zero_grad(set_to_none=True)
        gauge.reset()
        start = time.perf_counter()
        with autocast(device, run.precision):
            loss = named.loss(model, batch)
        loss.backward()
        after()
        passes.append(gauge.peak())
        del loss
        gauge.reset()
        optimizer.step()
        update.append(gauge.peak())
        seconds.append(time.perf_counter() - start)
    return {
        **told,
        "passes": max(passes),
        "update": max(update),
        "peak": max(*passes, *update),
        "seconds": min(seconds[chosen or 1 :] or seconds),
        "parameters": sum(parameter.nbytes for parameter in model.parameters()),
        "trained": sum(parameter.nbytes for parameter in parameters),
    }


def _prepare(model: nn.Module, way: str, device: torch.device) -> Any:
    if checkpoints(way):
        named.checkpoint(model)
    level = level_of(way)
    if level != PLAIN:
        kernels = native.cuda_status() if device.type == "cuda" else native.status()
        if not kernels["available"]:
            raise NativeError(
                message(
                    "the kernels are not built, so what compression takes cannot be measured",
                    where=f"level {level}",
                    received=str(kernels["reason"]),
                    next_step="`hf-actnn env` says what is missing; `--levels plain checkpoint` needs no kernels",
                )
            )
    return compress(model, level, UPDATE_INTERVAL)


def child(run: Run, batch_size: int) -> dict[str, Any]:
    """One run; what came of it, whatever it was."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ActNNWarning)
        try:
            found: dict[str, Any] = {"status": "ok", **train(run, batch_size)}
        except ActNNError as error:
            found = {"status": "refused", "error": str(error), "kind": type(error).__name__}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]
            found = {"status": "out of memory"} if is_for_memory(error) else {"status": "error", "error": text}
    said = list(dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, ActNNWarning)))
    return {**found, "warnings": said} if said else found


def attempt(run: Run, batch_size: int) -> dict[str, Any]:
    """One run in a process of its own: what :func:`child` says of it, or that it was ended above the limit."""
    command = [sys.executable, "-m", "hf_actnn.commands.probe", json.dumps([run._asdict(), batch_size])]
    if run.device != "cpu":
        return watched(command)
    return watched(command, run.limit, PAGES)


if __name__ == "__main__":
    fields, size = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):  # what a model prints is no result
        result = child(Run(**fields), size)
    print(json.dumps(result))
