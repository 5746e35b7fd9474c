"""The gradient's variance over a training: what drawing the batch gives it, and what quantisation adds in which layers.

    python benchmarks/accuracy/variance.py --data path/to/cifar10 [--models resnet20 vit] [--draws 8]

`--data` is a folder with CIFAR-10's train.parquet (default: $HF_ACTNN_DATA/cifar10). A model is trained uncompressed;
at some of its steps the weights are taken as they are then, and a copy is converted: with 2 bits everywhere; at L3,
which chooses 2 bits on average; and with `bits="auto"`. Bits are chosen at these weights, over batches of their own.
What `variance_report` predicts from one backward pass stands beside Monte Carlo over draws of the rounding, for all
kept tensors together and for each by itself, relative to the squared gradient of the batch. The mini-batch's variance
is measured between batches, beside what the report tells from one.

`shares` are by parameter, over some batches: the variance that quantisation adds over the variance that the drawing of
the batch gives the exact gradient; their mean, the largest, and all added variance over all of the mini-batch's.
Parameters whose gradient is nothing but rounding errors are left out of the first two.

Writes benchmarks/results/variance.json as it goes on.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fidelity
import timing
from small import resnet20

import hf_actnn

#: Steps after which gradients are looked at.
AT = (0, 50, 200, 600)
BATCH, COUNT = 32, 16
MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "resnet20": (lambda: resnet20(num_classes=10), 2e-3),
    "vit": (lambda: fidelity.vit(128, 4, 4), 1e-3),
}
#: Of the steps at the same weights in which bits are chosen, the last being one that does.
INTERVAL, CHOOSING = 10, 21
WAYS: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "L3": {"level": "L3", "update_interval": INTERVAL},
    "auto": {"bits": "auto", "update_interval": INTERVAL},
}
#: A parameter's variance per value is above this share of the median, or it is rounding errors.
ALIVE = 1e-6


def shares(exact: nn.Module, compressed: nn.Module, batches: fidelity.Batches) -> dict[str, Any]:
    """By parameter: see above."""
    drawn = [batches(BATCH) for _ in range(COUNT)]
    true = torch.stack([fidelity.gradient(exact, *batch) for batch in drawn]).double()
    found = torch.stack([fidelity.gradient(compressed, *batch) for batch in drawn]).double()
    sizes = [parameter.numel() for parameter in exact.parameters()]
    names = [name for name, _ in exact.named_parameters()]
    own = torch.stack([part.sum() for part in true.var(0).split(sizes)])
    added = torch.stack([part.sum() for part in (found - true).square().mean(0).split(sizes)])
    per_value = own / torch.tensor(sizes)
    alive = per_value > ALIVE * per_value.median()
    share = added[alive] / own[alive]
    kept = [name for name, one in zip(names, alive.tolist(), strict=True) if one]
    return {
        "mean": share.mean().item(),
        "largest": share.max().item(),
        "parameter": kept[int(share.argmax())],
        "of_sum": (added.sum() / own.sum()).item(),
    }


def look(model: nn.Module, batches: fidelity.Batches, draws: int) -> dict[str, Any]:
    """All ways at these weights."""
    model = copy.deepcopy(model).train()
    values, labels = batches(BATCH)
    exact = fidelity.gradient(model, values, labels)
    found: dict[str, Any] = {"minibatch": fidelity.minibatch_variance(model, batches, exact, BATCH, COUNT)}
    untouched = copy.deepcopy(model)
    for way, fields in WAYS.items():
        hf_actnn.convert(model, **fields)
        controller = hf_actnn.controller(model)
        for _ in range(CHOOSING if controller.adaptive else 0):
            fidelity.gradient(model, *batches(BATCH))
            controller.step()
        controller.active = False
        by_parameter = shares(untouched, model, batches)

        def step() -> None:
            F.cross_entropy(model(values), labels).backward()

        model.zero_grad()
        report = hf_actnn.variance_report(model, step, draws=draws)
        found[way] = {
            "predicted": report.predicted,
            "measured": report.measured,
            "standard_error": report.standard_error,
            "minibatch_predicted": report.minibatch,
            "shares": by_parameter,
            "average_bits": sum(8 * row.nbytes for row in report.rows)
            / sum(8 * row.nbytes / row.bits for row in report.rows),
            "tensors": [row._asdict() for row in report.rows],
        }
        hf_actnn.revert(model)
    return found


def moments(
    name: str, images: Tensor, labels: Tensor, at: Collection[int], batch: int = BATCH
) -> Iterator[tuple[int, nn.Module, float]]:
    """Train uncompressed; after each of the steps `at`, a copy of the model and the loss of the next batch."""
    build, rate = MODELS[name]
    torch.manual_seed(0)
    model, batches = build().train(), fidelity.Batches(images, labels, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    for step in range(max(at) + 1):
        values, wanted = batches(batch)
        loss = F.cross_entropy(model(values), wanted)
        if step in at:
            yield step, copy.deepcopy(model), loss.item()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def study(name: str, images: Tensor, labels: Tensor, draws: int, save: Callable[[dict[str, Any]], None]) -> None:
    """Train, and look."""
    steps: dict[str, Any] = {}
    for step, model, loss in moments(name, images, labels, AT):
        steps[str(step)] = {"loss": loss, **look(model, fidelity.Batches(images, labels, 2 + step), draws)}
        save(steps)
        mean = {way: round(steps[str(step)][way]["shares"]["mean"], 4) for way in WAYS}
        print(f"{name}, step {step}: loss {loss:.3f}, mean shares {mean}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_ACTNN_DATA", "data")) / "cifar10")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    images, labels = fidelity.read(options.data, "train", 10_000)
    models: dict[str, Any] = {}
    for name in options.models:

        def save(steps: dict[str, Any], name: str = name) -> None:
            models[name] = steps
            timing.write("variance", {"batch": BATCH, "draws": options.draws, "batches": COUNT, "models": models})

        study(name, images, labels, options.draws, save)


if __name__ == "__main__":
    main()
