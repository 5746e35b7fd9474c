"""How much a value's gradient tells of the curvature along it: what the weights of parameters rest on.

    python benchmarks/accuracy/curvature.py --data path/to/cifar10 [--models resnet20 vit]

`--data` is a folder with CIFAR-10's train.parquet (default: $HF_ACTNN_DATA/cifar10). A model is trained uncompressed;
at some of its steps, by parameter: the mean square of a value's gradient over batches, and the mean of the Hessian's
diagonal by Hutchinson's estimator (Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007), one
vector of random signs for each batch.

Adam divides noise of variance `V` in a value's gradient by the root of the mean square `s` of that gradient; a step
then raises the loss by half of the curvature `H` along it times `V / s`, on average. Where `H` grows as `s^a`, that is
`V s^(a - 1)`. `slope` is `a`: that of the line through the logarithms, weighted by the root of the numbers of values,
without parameters whose curvature comes out negative.

Writes benchmarks/results/curvature.json as it goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fidelity
import timing
from variance import ALIVE, MODELS, moments

#: Steps after which it is measured.
AT = (50, 200, 600)
BATCH, COUNT = 64, 16


def look(model: nn.Module, batches: fidelity.Batches) -> dict[str, Any]:
    """By parameter, at these weights."""
    parameters = dict(model.named_parameters())
    squares = dict.fromkeys(parameters, 0.0)
    curvature = dict.fromkeys(parameters, 0.0)
    # The other kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(COUNT):
            images, labels = batches(BATCH)
            loss = F.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            signs = [torch.randint(0, 2, one.shape).to(one.dtype).mul_(2).sub_(1) for one in gradients]
            along = sum((one * sign).sum() for one, sign in zip(gradients, signs, strict=True))
            products = torch.autograd.grad(along, list(parameters.values()))
            for name, one, sign, product in zip(parameters, gradients, signs, products, strict=True):
                squares[name] += one.detach().square().mean().item() / COUNT
                curvature[name] += (sign * product).mean().item() / COUNT
    rows = {
        name: {"values": one.numel(), "square": squares[name], "curvature": curvature[name]}
        for name, one in parameters.items()
    }
    least = ALIVE * float(np.median([row["square"] for row in rows.values()]))
    used = [row for row in rows.values() if row["square"] > least and row["curvature"] > 0]
    square, curved, count = (np.array([row[key] for row in used]) for key in ("square", "curvature", "values"))
    slope = np.polyfit(np.log(square), np.log(curved), 1, w=np.sqrt(count))[0]
    return {
        "slope": float(slope),
        "unweighted": float(np.polyfit(np.log(square), np.log(curved), 1)[0]),
        "ratio": float(np.median(curved / square)),
        "used": len(used),
        "parameters": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_ACTNN_DATA", "data")) / "cifar10")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    images, labels = fidelity.read(options.data, "train", 10_000)
    models: dict[str, Any] = {}
    for name in options.models:
        models[name] = {}
        for step, model, _ in moments(name, images, labels, AT, BATCH):
            found = look(model, fidelity.Batches(images, labels, seed=2 + step))
            models[name][str(step)] = found
            timing.write("curvature", {"batch": BATCH, "batches": COUNT, "models": models})
            told = {key: round(found[key], 2) for key in ("slope", "unweighted", "ratio")}
            print(f"{name}, step {step}: {told}, {found['used']} of {len(found['parameters'])}", flush=True)


if __name__ == "__main__":
    main()
