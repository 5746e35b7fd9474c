"""How much less variance the gradient has where two roundings mirror each other, on trained weights.

    python benchmarks/mirrored.py --data path/to/cifar10 [--models resnet20 convnext swin vit_192] [--draws 16]

Two values with one between them are rounded by one dither and its mirror image (docs/codec.md, "Dither"). Measured
against the same codec with a dither for each value, at the same weights, batch and bits: relative variance as in
fidelity.py, the same bits for all, and L3 with bits that were chosen on other batches, the same ones both times; and
the same with each parameter's variance by the deviation of its gradient's values over batches, as bits are chosen by
and Adam steps (docs/theory.md, "Choosing bits"), for the plain sum is nearly all of a few parameters. And how alike
the gradients are that come back to places one and two apart, by convolution. Weights are those after so many steps of
the trainings of accuracy/variance.py (ResNet-20) and of fidelity.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
import fidelity
import timing
import variance

import hf_actnn

FIELDS: dict[str, dict[str, Any]] = {
    "1 bit": {"level": "L2", "bits": 1},
    "2 bits": {"level": "L2", "bits": 2},
    "4 bits": {"level": "L2", "bits": 4},
    "L3, 1.5 bits": {"level": "L3", "bits": 1.5, "update_interval": 1},
    "L3": {"level": "L3", "update_interval": 1},
}
ROUNDINGS = {"mirrored": contextlib.nullcontext, "independent": fidelity.independently}


def trained(name: str, data: Path, steps: int) -> nn.Module:
    images, labels = fidelity.read(data, "train", 10_000)
    if name in variance.MODELS:
        [(_, model, _)] = variance.moments(name, images, labels, [steps])
        return model
    return fidelity.trained(name, images, labels, steps)


def alike(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """By convolution, of the gradient of its output: the correlation (about zero) of values one and two places apart in
    a row of an image."""
    found: dict[str, list[float]] = {}

    def note(name: str, grad: Tensor) -> None:
        width, power = grad.shape[-1], float(grad.square().mean())
        if width > 2 and power > 0:
            found[name] = [float((grad[..., :-d] * grad[..., d:]).mean()) / power for d in (1, 2)]

    def watch(name: str) -> Any:
        return lambda module, args, out: out.register_hook(functools.partial(note, name)) and None

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in convolutions]
    fidelity.gradient(model, *batch)
    for hook in hooks:
        hook.remove()
    return found


def weights_of(model: nn.Module, batches: fidelity.Batches, count: int = 12) -> Tensor:
    """``[P]`` for each value of the gradient: one over the deviation of its parameter's values between batches; 0 for
    parameters whose gradients are nothing but rounding errors."""
    gradients = torch.stack([fidelity.gradient(model, *batches()) for _ in range(count)]).double()
    sizes = [p.numel() for p in model.parameters() if p.grad is not None]
    of_value = torch.stack([part.mean() for part in gradients.var(0).split(sizes)])
    alive = of_value > variance.ALIVE * of_value.median()
    return torch.where(alive, of_value.rsqrt(), 0.0).repeat_interleave(torch.tensor(sizes))


def measured(
    model: nn.Module,
    fields: dict[str, Any],
    batches: fidelity.Batches | None,
    batch: tuple[Tensor, Tensor],
    draws: int,
    weights: Tensor | None = None,
) -> dict[str, Any]:
    """Relative variance of both roundings with their standard errors, and the ratio of the two with its own; the same
    of squared errors that are weighted value by value, where weights are given."""
    exact = fidelity.gradient(model, *batch)
    hf_actnn.convert(model, **fields)
    controller = hf_actnn.controller(model)
    for _ in range(3 if controller.adaptive else 0):
        fidelity.gradient(model, *batches(len(batch[0])))
        controller.step()
    controller.active = False
    errors: dict[str, list[Tensor]] = {}
    for rounding, context in ROUNDINGS.items():
        with context():
            errors[rounding] = [(fidelity.gradient(model, *batch) - exact).double() for _ in range(draws)]
    hf_actnn.revert(model)
    row: dict[str, Any] = {}
    for name, by in (("", None), ("weighted_", weights)):
        if name and by is None:
            continue
        scale = (exact.double().square() if by is None else exact.double().square() * by).sum().item()
        for rounding, found in errors.items():
            squared = [float((e.square() if by is None else e.square() * by).sum()) / scale for e in found]
            row[name + rounding] = {
                "variance": statistics.mean(squared),
                "standard_error": statistics.stdev(squared) / math.sqrt(draws),
            }
        one, other = (row[name + rounding] for rounding in ROUNDINGS)
        row[f"{name}ratio"] = one["variance"] / other["variance"]
        relative = math.hypot(*(part["standard_error"] / part["variance"] for part in (one, other)))
        row[f"{name}ratio_standard_error"] = row[f"{name}ratio"] * relative
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_ACTNN_DATA", "data")) / "cifar10")
    parser.add_argument(
        "--models", nargs="+", default=["resnet20", "convnext", "swin", "vit_192"],
        choices=[*variance.MODELS, *fidelity.MODELS], metavar="MODEL",
    )  # fmt: skip
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    if options.draws < 2:
        parser.error(f"--draws {options.draws}: a standard error takes at least 2")
    images, labels = fidelity.read(options.data, "train", 10_000)
    batch = fidelity.Batches(images, labels, seed=7)(fidelity.BATCH)
    rows, gradients = [], {}
    for name in options.models:
        model = trained(name, options.data, options.steps)
        gradients[name] = alike(model, batch)
        weights = weights_of(model, fidelity.Batches(images, labels, seed=11))
        for bits, fields in FIELDS.items():
            others = fidelity.Batches(images, labels, seed=9)
            row = {"model": name, "bits": bits, **measured(model, fields, others, batch, options.draws, weights)}
            rows.append(row)
            print(
                f"{name:10s} {bits:12s} {row['mirrored']['variance']:.4g} of {row['independent']['variance']:.4g}: "
                f"{row['ratio']:.3f} ± {row['ratio_standard_error']:.3f}, weighted "
                f"{row['weighted_ratio']:.3f} ± {row['weighted_ratio_standard_error']:.3f}",
                flush=True,
            )
        about = {"steps": options.steps, "draws": options.draws, "batch": fidelity.BATCH}
        timing.write("mirrored", {**about, "rows": rows, "gradients_one_and_two_places_apart": gradients})


if __name__ == "__main__":
    main()
