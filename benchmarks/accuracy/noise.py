"""Noise that schemes add to the gradient at equal bits, hf_actnn's and the paper's, on weights of a training.

    python benchmarks/accuracy/noise.py --data path/to/data [--tasks resnet20 segformer] [--batches 24]

Scores of two schemes at 1.5 bits differ by less than trainings of one seed do (results/accuracy.md), so they cannot say
which rounds better; the gradient can. `--data` is a folder with the parquet files of `cifar10` and `camvid` in folders
of these names. At some steps of an uncompressed training each scheme chooses its bits on three batches, as it does in a
training, and codes what so many other batches save: its error is the difference to their exact gradients. Of each
parameter ``p`` of ``n_p`` values that is a variance ``V_p``, beside ``S_p``, that of the exact gradients between these
batches. Written down are, each with the standard error that the batches' scatter gives,

* ``of_sum``: ``sum V_p / sum S_p``, which counts for steps along the gradient, as SGD's;
* ``as_adam``: ``sum V_p sqrt(n_p / S_p) / sum sqrt(n_p S_p)``, which counts for steps of which each value's is divided
  by the size it usually has (docs/theory.md, "Choosing bits");
* ``mean_share``: the mean of ``V_p / S_p``.

Parameters whose gradients are nothing but rounding errors are left out of the last two. The paper's scheme is that of
original.py, with its rules for bits and a dither for each value; "independent" is hf_actnn with the latter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import original
import torch
import variance
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptive
import fidelity
import timing

import hf_actnn

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
#: Batches that bits are chosen on.
BEFORE = 3


class Task(NamedTuple):
    """A training, and the steps of it that are looked at."""

    build: Callable[[], nn.Module]
    loss: Loss
    rate: float
    batch: int
    at: tuple[int, ...]


class Way(NamedTuple):
    """A scheme: fields of `ActNNConfig`, or bits of the paper's and whether it chooses them."""

    fields: dict[str, Any] | None = None
    original: tuple[float, bool] | None = None
    independent: bool = False


def _chosen(bits: float, independent: bool = False) -> Way:
    return Way({"level": "L3", "bits": bits, "update_interval": 1}, independent=independent)


TASKS = {
    "resnet20": Task(variance.MODELS["resnet20"][0], adaptive.classify, 2e-3, 64, (50, 300, 900)),
    "segformer": Task(adaptive.segformer, adaptive.segment, 1e-3, 8, (50, 200, 400)),
}
WAYS = {
    **{f"original, {bits:g} bits on average": Way(original=(bits, True)) for bits in (2, 1.5)},
    "original, 2 bits": Way(original=(2, False)),
    **{f"L3, {bits:g} bits": _chosen(bits) for bits in (2, 1.5)},
    **{f"L3, {bits:g} bits, independent": _chosen(bits, True) for bits in (2, 1.5)},
    "L2, 2 bits": Way({"level": "L2", "bits": 2}),
}


def batches_of(task: str, data: Path, seed: int) -> Callable[[], Batch]:
    """Random batches of a task's training images."""
    if task == "segformer":
        images, masks = adaptive.read_camvid(data)[:2]
        return adaptive.Shuffled(images, masks, TASKS[task].batch, seed)
    batches = fidelity.Batches(*fidelity.read(data / "cifar10", "train", 10_000), seed)
    return lambda: batches(TASKS[task].batch)


def moments(task: Task, batches: Callable[[], Batch]) -> Iterator[tuple[int, nn.Module]]:
    """Train uncompressed; a copy of the model after each of the task's steps."""
    torch.manual_seed(0)
    model = task.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.05)
    for step in range(max(task.at) + 1):
        if step in task.at:
            yield step, copy.deepcopy(model)
        optimizer.zero_grad()
        task.loss(model, *batches()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def gradient(model: nn.Module, loss: Loss, batch: Batch, forward: Any = contextlib.nullcontext) -> Tensor:
    """``[P]`` in float64; running statistics stay what they were, and dropouts draw the same each time."""
    model.zero_grad(set_to_none=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    with forward():
        value = loss(model, *batch)
    value.backward()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def errors(model: nn.Module, task: Task, way: Way, before: list[Batch], drawn: list[Batch], exact: Tensor) -> Tensor:
    """``[batches, P]``: what the scheme adds to the gradients of `drawn`."""
    model = copy.deepcopy(model)
    if way.original is not None:
        scheme = original.Original(model, *way.original)
        for batch in before:
            gradient(model, task.loss, batch, scheme.forward)
        found = [gradient(model, task.loss, batch, scheme.forward) for batch in drawn]
        return torch.stack(found) - exact
    hf_actnn.convert(model, **way.fields or {})
    controller = hf_actnn.controller(model)
    for batch in before if controller.adaptive else []:
        gradient(model, task.loss, batch)
        controller.step()
    controller.active = False
    with fidelity.independently() if way.independent else contextlib.nullcontext():
        found = [gradient(model, task.loss, batch) for batch in drawn]
    return torch.stack(found) - exact


def noise(added: Tensor, own: Tensor, sizes: Tensor) -> dict[str, dict[str, float]]:
    """The three figures, with standard errors.

    Args:
        added: [batches, parameters], squared errors.
        own: [parameters], variances between batches.
        sizes: [parameters], values.
    """
    per_value = own / sizes
    alive = per_value > variance.ALIVE * per_value.median()
    weights = {
        "of_sum": torch.full_like(own, 1.0) / own.sum(),
        "as_adam": torch.where(alive, (sizes / own).sqrt(), 0.0) / (sizes * own)[alive].sqrt().sum(),
        "mean_share": torch.where(alive, 1 / own, 0.0) / alive.sum(),
    }
    found = {}
    for name, by in weights.items():
        each = (added * by).sum(1).tolist()
        found[name] = {"value": statistics.mean(each), "standard_error": statistics.stdev(each) / math.sqrt(len(each))}
    return found


def look(model: nn.Module, task: Task, batches: Callable[[], Batch], count: int) -> dict[str, Any]:
    """Every way at these weights."""
    before, drawn = ([batches() for _ in range(n)] for n in (BEFORE, count))
    exact = torch.stack([gradient(model, task.loss, batch) for batch in drawn])
    sizes = [p.numel() for p in model.parameters() if p.grad is not None]

    def by_parameter(values: Tensor) -> Tensor:
        return torch.stack([part.sum(-1) for part in values.split(sizes, -1)], -1)

    own = by_parameter(exact.var(0))
    return {
        name: noise(by_parameter(errors(model, task, way, before, drawn, exact).square()), own, torch.tensor(sizes))
        for name, way in WAYS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_ACTNN_DATA", "data")))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--batches", type=int, default=24)
    options = parser.parse_args()
    if options.batches < 2:
        parser.error(f"--batches {options.batches}: a variance between batches takes at least 2")
    tasks: dict[str, Any] = {}
    for name in options.tasks:
        task, tasks[name] = TASKS[name], {}
        others = batches_of(name, options.data, seed=7)
        for step, model in moments(task, batches_of(name, options.data, seed=1)):
            tasks[name][str(step)] = found = look(model, task, others, options.batches)
            for way, row in found.items():
                told = ", ".join(f"{key} {one['value']:.4f} ± {one['standard_error']:.4f}" for key, one in row.items())
                print(f"{name} {step:4d} {way:32s} {told}", flush=True)
            sizes = {key: one.batch for key, one in TASKS.items() if key in tasks}
            timing.write("noise", {"batches": options.batches, "batch": sizes, "tasks": tasks})


if __name__ == "__main__":
    main()
