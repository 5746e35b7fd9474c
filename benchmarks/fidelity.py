"""How far the gradient is from the exact one, on trained weights, and what store-once, recipes and rows do to that.

    python benchmarks/fidelity.py --data path/to/cifar10 [--models vit_s resnet18] [--draws 24] [--steps 300]

`--data` is a folder with CIFAR-10's train.parquet and test.parquet (default: $HF_ACTNN_DATA/cifar10). Models are
trained uncompressed first, for random weights flatter low bits; the weights stay in .cache/fidelity and are used again.

Relative variance: the mean over draws of the rounding of |g - g_exact|^2, over |g_exact|^2, all parameters as one
vector. It holds the variance and the squared bias, which is estimated apart.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.codec import native, reference
from hf_actnn.saving import call as saving_call
from hf_actnn.saving.identity import Registry
from hf_actnn.saving.kept import Exact, Kept, Quantized

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "fidelity"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "fidelity.md"
BATCH = 32
BITS = (2, 3, 4, 6, 8)
ADAPTIVE_BITS = (2, 3, 4)
AT_ORIGINAL = "L3, the original's bytes"


# -- models and data ---------------------------------------------------------------------------------------------------


def vit(width: int, depth: int = 12, patch: int = 8) -> nn.Module:
    """A vision transformer with a class token, on 32 x 32; width 384 is ViT-S."""
    import timm

    return timm.create_model(
        "vit_small_patch16_224",
        img_size=32,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
        num_classes=10,
    )


def resnet() -> nn.Module:
    """ResNet-18 with the stem for small images: one 3 x 3 convolution, no pooling."""
    import timm

    model = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def convnext() -> nn.Module:
    """ConvNeXt with blocks of 48 to 384 channels and patches of 2."""
    import timm

    return timm.create_model(
        "convnext_tiny", num_classes=10, depths=(2, 2, 4, 2), dims=(48, 96, 192, 384), patch_size=2
    )


def swin() -> nn.Module:
    """Swin with blocks of 48 to 192 channels, patches of 2 and windows of 4."""
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=10,
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=48,
        depths=(2, 4, 2),
        num_heads=(2, 4, 8),
    )


class Made(NamedTuple):
    """How a model is made and trained; ``title`` is the page's."""

    title: str
    build: Callable[[], nn.Module]
    rate: float = 5e-4
    #: Where training starts, for what would take too long from random weights, and its steps then.
    start: str = ""
    steps: int = 0
    #: Images of the batch that gradients are taken of.
    images: int = 32


MODELS: dict[str, Made] = {
    "vit_s_patch8": Made("ViT-S, 16 patches and a class token", lambda: vit(384)),
    "vit_s": Made(
        "ViT-S, 64 patches and a class token",
        lambda: vit(384, patch=4),
        start="vit_s_patch8",
        steps=150,
        images=16,
    ),
    "resnet18": Made("ResNet-18", resnet, rate=1e-3),
    "vit_192": Made("ViT, width 192, depth 6, 16 patches and a class token", lambda: vit(192, 6)),
    "convnext": Made("ConvNeXt, 48 to 384 channels", convnext),
    "swin": Made("Swin, 48 to 192 channels", swin),
}


def read(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images, `[N, 3, 32, 32]` uint8, and labels of a split."""
    import numpy
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(data / f"{split}.parquet").slice(0, count)
    images = [
        numpy.array(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table.column("image").to_pylist()
    ]
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        table.column("label").to_pylist()
    )


def pixels(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1)


class Batches:
    """Random training batches: mirrored and shifted by up to four pixels."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, size: int = BATCH) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.images), (size,), generator=self.generator)
        values = F.pad(pixels(self.images[chosen]), (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,), generator=self.generator).tolist()
        values = values[:, :, top : top + 32, left : left + 32]
        return (values.flip(-1) if torch.rand((), generator=self.generator) < 0.5 else values), self.labels[chosen]


def train(model: nn.Module, batches: Batches, steps: int, rate: float) -> list[float]:
    """AdamW with a warm-up and a cosine; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    warmup = min(50, steps // 4)

    def schedule(step: int) -> float:
        return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    model.train()
    for _ in range(steps):
        values, labels = batches()
        loss = F.cross_entropy(model(values), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(pixels(part)).argmax(1)) for part in images.split(250)]
    return (torch.cat(right) == labels).float().mean().item()


def resized(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A vision transformer's weights for another size of patch."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    found = dict(weights)
    patch = model.patch_embed.patch_size
    found["patch_embed.proj.weight"] = resample_patch_embed(weights["patch_embed.proj.weight"], list(patch))
    found["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], list(model.patch_embed.grid_size))
    return found


def trained(name: str, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """The model after so many steps; from the cache if it is there."""
    made = MODELS[name]
    torch.manual_seed(0)
    model = made.build()
    path = CACHE / f"{name}_{steps + made.steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    if made.start:
        model.load_state_dict(resized(trained(made.start, images, labels, steps).state_dict(), model))
    train(model, Batches(images, labels, seed=1), made.steps or steps, made.rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


# -- other ways to keep, for comparison --------------------------------------------------------------------------------


@contextlib.contextmanager
def separately() -> Iterator[None]:
    """Every save gets a code of its own: nothing is found again, no output is a recipe.

    Weights, statistics and masks are kept as ever. The rerun of attention stays, for without it nothing trains; what it
    gives back, the projection after it codes.
    """
    find = Registry.find

    def found(self: Registry, tensor: Tensor) -> Kept | None:
        kept = find(self, tensor)
        return kept if isinstance(kept, Exact) else None

    def own(self: saving_call.Call, slots: Any, rows: str | None = None) -> None:
        for slot in slots:
            tensor = slot.tensor
            if not tensor.is_floating_point() or self.is_weight(tensor):
                self.exact(slot, "not data")
            else:
                layout = self.scope.registry.layout(tensor)
                within = layout is not None and layout.numel == tensor.numel()
                slot.kept = self.pack(tensor, (layout.rows if within else None) or rows)

    def argument(self: saving_call.Call, slot: Any, given: Any, rows: str | None = None) -> Kept:
        self.data_all([slot], rows)
        return slot.kept

    with (
        mock.patch.object(Registry, "find", found),
        mock.patch.object(saving_call.Call, "data_all", own),
        mock.patch.object(saving_call.Call, "data_argument", argument),
        mock.patch.object(saving_call.Call, "output_recipe", lambda *args, **options: None),
        mock.patch.object(saving_call.Call, "output_masked", lambda *args, **options: None),
    ):
        yield


@contextlib.contextmanager
def straddling() -> Iterator[None]:
    """Groups of 256 over the whole tensor, whatever its rows."""

    def code(self: saving_call.Call, tensor: Tensor, length: int) -> Kept:
        policy = self.policy
        if policy.bits is None or tensor.numel() < max(policy.min_numel, 1):
            return Exact(tensor, where=self.where)
        return Quantized(
            hf_actnn.codec.quantize(
                tensor,
                policy.bits,
                256,
                seed=self.scope.seed,
                stream=self.scope.next_stream(),
                row_length=tensor.numel(),
            )
        )

    with mock.patch.object(saving_call.Call, "code", code):
        yield


@contextlib.contextmanager
def independently() -> Iterator[None]:
    """No two roundings mirror each other: what mirrors is taken from a stream of its own. Done by the specification in
    plain torch, for the kernels know but one dither."""
    kernels = [mock.patch.object(native, name, lambda *device: None) for name in ("module", "cuda")]
    mirrored = reference.dither

    def dither(
        n_groups: int, group: int, seed: int, stream: Any, device: Any = "cpu", rows_mirrored: int = 0
    ) -> Tensor:
        return mirrored(n_groups, group, seed, stream, device, max(n_groups, 1))  # as one row, which mirrors none

    with mock.patch.object(reference, "dither", dither), kernels[0], kernels[1]:
        yield


@contextlib.contextmanager
def original() -> Iterator[None]:
    """As the original keeps it: every save by itself as it is, in flat groups, every value rounded for itself."""
    flat = mock.patch("hf_actnn.saving.rows.GROUPS_OF_ONE_SPREAD", 0)
    with separately(), straddling(), independently(), flat:
        yield


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "once": contextlib.nullcontext,
    "separately": separately,
    "straddling": straddling,
    "original": original,
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def gradient(model: nn.Module, values: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    F.cross_entropy(model(values), labels).backward()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def summary(errors: list[float], total: Tensor, scale: float) -> dict[str, Any]:
    """Of the squared errors of some draws, relative to `scale`, and the sum of the errors."""
    draws, mean = len(errors), statistics.mean(errors)
    # |mean error|^2 holds the squared bias and the variance over the number of draws; the errors hold both whole.
    of_mean = (total / draws).square().sum().item() / scale
    return {
        "draws": draws,
        "variance": mean,
        "standard_error": statistics.stdev(errors) / math.sqrt(draws),
        "squared_bias": (draws * of_mean - mean) / (draws - 1),
    }


def relative_variance(
    model: nn.Module, batch: tuple[Tensor, Tensor], exact: Tensor, bits: int, way: str, draws: int
) -> dict[str, Any]:
    """Of one way to keep at one width: the relative variance with its standard error, squared bias, and bytes."""
    scale = exact.double().square().sum().item()
    errors: list[float] = []
    total = torch.zeros_like(exact, dtype=torch.float64)
    held = 0
    with WAYS[way]():
        for draw in range(draws):
            hf_actnn.convert(model, "L2", bits=bits, seed=1000 + draw)
            if draw == 0:
                with hf_actnn.track_memory(model) as memory:
                    found = gradient(model, *batch)
                held = memory.saved_bytes
            else:
                found = gradient(model, *batch)
            error = (found - exact).double()
            errors.append(error.square().sum().item() / scale)
            total += error
    hf_actnn.revert(model)
    return {"bits": bits, "way": way, **summary(errors, total, scale), "bytes": held}


def adaptive_variance(
    model: nn.Module,
    batches: Batches,
    batch: tuple[Tensor, Tensor],
    exact: Tensor,
    bits: float,
    draws: int,
    way: str = "L3",
) -> dict[str, Any]:
    """The same of bits chosen per tensor and sample, after three updates on other batches than the one measured."""
    scale = exact.double().square().sum().item()
    hf_actnn.convert(model, "L3", bits=bits, update_interval=1)
    controller = hf_actnn.controller(model)
    for _ in range(3):
        gradient(model, *batches(len(batch[0])))
        controller.step()
    controller.active = False  # no more updates
    with hf_actnn.track_memory(model) as memory:
        gradient(model, *batch)
    errors: list[float] = []
    total = torch.zeros_like(exact, dtype=torch.float64)
    for _ in range(draws):
        error = (gradient(model, *batch) - exact).double()
        errors.append(error.square().sum().item() / scale)
        total += error
    hf_actnn.revert(model)
    return {"bits": bits, "way": way, **summary(errors, total, scale), "bytes": memory.saved_bytes}


def minibatch_variance(model: nn.Module, batches: Batches, exact: Tensor, images: int, count: int = 32) -> float:
    """The variance that drawing another batch gives the gradient by itself, over |g_exact|^2 of the batch in hand, so
    that it stands beside the variance of the rounding as it is."""
    gradients = torch.stack([gradient(model, *batches(images)) for _ in range(count)])
    return (gradients.var(0).double().sum() / exact.double().square().sum()).item()


def study(name: str, data: Path, draws: int, steps: int) -> Iterator[dict[str, Any]]:
    """The rows of one model, as they are finished."""
    images, labels = read(data, "train", 20000)
    model = trained(name, images, labels, steps)
    score = accuracy(model, *read(data, "test", 2000))
    batch = Batches(images, labels, seed=7)(MODELS[name].images)
    exact = gradient(model, *batch)
    noise = minibatch_variance(model, Batches(images, labels, seed=8), exact, MODELS[name].images)
    held: dict[tuple[int, str], int] = {}
    about = {
        "model": name,
        "images": MODELS[name].images,
        "steps": steps,
        "accuracy": score,
        "minibatch_variance": noise,
    }
    rounded = {"roundings": timing.ROUNDINGS}
    for bits in BITS:
        for way in ("once", "separately", "straddling", "original"):
            if way != "once" and bits not in (2, 4):
                continue
            row = relative_variance(model, batch, exact, bits, way, draws)
            held[bits, way] = row["bytes"]
            yield {**about, **({} if way == "original" else rounded), **row}
        if bits in ADAPTIVE_BITS:
            others = Batches(images, labels, seed=9)
            yield {**about, **rounded, **adaptive_variance(model, others, batch, exact, bits, draws)}
    # What the original's bytes at 2 bits buy.
    a_bit = held[3, "once"] - held[2, "once"]
    average = math.floor(100 * (2 + (held[2, "original"] - held[2, "once"]) / a_bit)) / 100
    others = Batches(images, labels, seed=9)
    yield {**about, **rounded, **adaptive_variance(model, others, batch, exact, min(average, 8.0), draws, AT_ORIGINAL)}


def short_trainings(name: str, data: Path, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """From random weights, paired by seed and data order: the loss of the last tenth, by width."""
    images, labels = read(data, "train", 20000)
    test = read(data, "test", 2000)
    for seed in range(seeds):
        for bits in (None, 4, 2):
            torch.manual_seed(seed)
            random.seed(seed)
            model = MODELS[name].build()
            if bits is not None:
                hf_actnn.convert(model, "L2", bits=bits, seed=seed)
            losses = train(model, Batches(images, labels, seed=seed), steps, MODELS[name].rate)
            yield {
                "model": name,
                "seed": seed,
                "bits": bits,
                "steps": steps,
                "loss": statistics.mean(losses[-(steps // 10) :]),
                "accuracy": accuracy(model, *test),
            }


# -- the page --------------------------------------------------------------------------------------------------------


def _row(rows: list[dict[str, Any]], model: str, bits: int | None, way: str) -> dict[str, Any] | None:
    return next((r for r in rows if r["model"] == model and r["way"] == way and bits in (None, r["bits"])), None)


def _ratio(row: dict[str, Any], of: dict[str, Any]) -> tuple[float, float]:
    """Of two variances, with its standard error."""
    ratio = row["variance"] / of["variance"]
    relative = math.hypot(row["standard_error"] / row["variance"], of["standard_error"] / of["variance"])
    return ratio, ratio * relative


_INTRODUCTION = """# Fidelity

How far gradients are from the exact ones, on weights trained for some hundred steps on CIFAR-10: random weights flatter
low bits. Written by `python benchmarks/fidelity.py --data path/to/cifar10` from `benchmarks/results/fidelity.json`
({cpu}, torch {torch}, {date}).

* *Variance*: the mean of |g - g exact|^2 over |g exact|^2 over independent draws of the rounding, all parameters as one
  vector, beside its standard error. *Mini-batch*: what drawing another batch of the same size does to the gradient.
* *once*: levels L1 and L2 as they are, the same bits for all, each tensor kept once and outputs rebuilt. *separately*:
  every save with a code of its own. *straddling*: as *once*, but in groups of 256 over the whole tensor instead of
  within rows. *original*: both, and each value rounded for itself. *L3*: kept as *once*, with bits per kept tensor and
  sample that were chosen on three other batches.
"""
#: (bits, way) of ours and of the other, and what the comparison is called.
_COMPARED: tuple[tuple[int | None, str, int, str, str], ...] = (
    (4, "once", 4, "separately", "Kept once against every save by itself, at 4 bits"),
    (2, "once", 2, "straddling", "Within rows against straddling groups, at 2 bits"),
    (2, "once", 2, "original", "The same bits for all against the original's way, at 2 bits"),
    *((bits, "L3", bits, "once", f"Chosen bits against the same for all, {bits} on average") for bits in ADAPTIVE_BITS),
    (None, AT_ORIGINAL, 2, "original", "Chosen bits against the original's way at 2 bits, given its bytes"),
)
#: Of the mini-batch's own variance: what is added below it is taken for harmless.
HARMLESS = 0.1


def _adaptive(results: dict[str, Any]) -> Iterator[str]:
    yield from (
        "## Bits by a target",
        "",
        'Trainings from random weights with `bits="auto"`: at three points of each the variance that quantisation',
        "adds, by Monte Carlo against exact gradients over several batches, as a share of the mini-batch's own",
        "variance, measured between exact gradients; the mean of these shares over parameters, those left out whose",
        "gradient is nothing but rounding errors. The trainings are short, so bits are chosen anew every 10 steps; the",
        "longer one has the default interval of 200. Scores are paired by seed and data order. Written from",
        "`benchmarks/results/adaptive.json`, which `benchmarks/adaptive.py` makes.",
        "",
        "| training | steps | interval | seed | allowed | added at three points | average bits there | bytes per image "
        "| at L2 | score | uncompressed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    )
    rows = results["rows"]
    for row in sorted(rows, key=lambda row: (row["task"], row["steps"], row["seed"])):
        if row["share"] is None:
            continue
        plain = next(
            (r for r in rows if not r["share"] and all(r[key] == row[key] for key in ("task", "seed", "steps"))), None
        )
        cells = [
            row["task"],
            str(row["steps"]),
            str(row["interval"]),
            str(row["seed"]),
            f"{row['share']:g}",
            ", ".join(f"{point['share']:.3f}" for point in row["points"]),
            ", ".join(f"{point['bits']:.2f}" for point in row["points"]),
            f"{row['bytes_per_sample'] / 1000:.1f} kB",
            f"{row['bytes_per_sample_L2'] / 1000:.1f} kB",
            f"{100 * row['score']:.1f} %",
            f"{100 * plain['score']:.1f} %" if plain else "",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for pair in results["paired"]:
        yield (
            f"* {pair['task']}: mean difference of the score {100 * pair['difference']:+.2f} ± "
            f"{100 * pair['standard_error']:.2f} points over {pair['pairs']} pairs."
        )
    yield ""


_CONCLUSION = """## What follows

The same 2 bits for all add to a transformer's gradient from half of what the drawing of the batch adds to more than all
of it, 4 bits a few percent; a residual network takes 2 bits at a tenth. Most of it comes from a few small tensors, such
as the inputs of the first and the last layer. With bits chosen per tensor, 2 on average add a few percent at most in
the larger models and 16 % in the narrow ViT. So bits are chosen by default; who wants fixed bits takes L2 for
transformers. Groups within rows matter where rows differ: nine times less variance in the narrow ViT of the table, next
to nothing in ViT-S.
"""


def _page(results: dict[str, Any]) -> Iterator[str]:
    rows = results["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    yield _INTRODUCTION.format(**results["environment"])
    of_ours = [row for row in rows if row["way"] != "original"]
    if alone := [model for model in models if not all("roundings" in row for row in of_ours if row["model"] == model)]:
        those = "All" if len(alone) == len(models) else ", ".join(MODELS[model].title for model in alone)
        yield (
            f"{those}: each value was rounded for itself, not in pairs that mirror each other as now\n"
            "([The codec](codec.md#dither) says what that changes).\n"
        )
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        yield from (
            f"## {MODELS[model].title}",
            "",
            f"{first['steps']} steps, test accuracy {100 * first['accuracy']:.1f} %, batch of {first['images']}, "
            f"{first['draws']} draws; mini-batch variance {first['minibatch_variance']:.2f}.",
            "",
            "| bits | kept | variance | of the mini-batch's | squared bias | bytes per image |",
            "|---|---|---|---|---|---|",
        )
        for row in mine:
            share = 100 * row["variance"] / row["minibatch_variance"]
            yield (
                f"| {row['bits']} | {row['way']} | {row['variance']:.4g} ± {row['standard_error']:.1g} | "
                f"{share:.2g} % | "
                f"{max(row['squared_bias'], 0):.1g} | {row['bytes'] / row['images'] / 1000:.1f} kB |"
            )
        yield ""
        for bits, way, their_bits, their_way, what in _COMPARED:
            ours, other = _row(rows, model, bits, way), _row(rows, model, their_bits, their_way)
            if ours and other:
                ratio, error = _ratio(ours, other)
                held = ours["bytes"] / other["bytes"]
                yield f"* {what}: {ratio:.3g} ± {error:.1g} of the variance, {held:.3g} of the bytes."
        for way, what in (("once", "the same for all"), ("L3", "chosen")):
            harmless = [
                row["bits"]
                for row in mine
                if row["way"] == way and row["variance"] < HARMLESS * row["minibatch_variance"]
            ]
            if harmless:
                yield (
                    f"* The fewest bits measured that add less than a tenth of the mini-batch's variance, {what}: "
                    f"{min(harmless)}."
                )
        yield ""
    yield _CONCLUSION
    adaptive = Path(timing.__file__).parent / "results" / "adaptive.json"
    if adaptive.exists():
        yield from _adaptive(json.loads(adaptive.read_text()))
    if results["trainings"]:
        yield from (
            "## Short trainings from random weights",
            "",
            "Same weights, batches and schedule in each row: mean loss of the last tenth of the steps, and accuracy",
            "on 2,000 test images (a point is within its noise).",
            "",
            "| model | steps | seed | uncompressed | 4 bits | 2 bits |",
            "|---|---|---|---|---|---|",
        )
        table: dict[tuple[str, int, int], dict[int | None, dict[str, Any]]] = {}
        for row in results["trainings"]:
            table.setdefault((row["model"], row["steps"], row["seed"]), {})[row["bits"]] = row
        for (model, steps, seed), found in table.items():
            cells = [
                f"{found[bits]['loss']:.3f}, {100 * found[bits]['accuracy']:.1f} %" if bits in found else ""
                for bits in (None, 4, 2)
            ]
            yield f"| {model} | {steps} | {seed} | {' | '.join(cells)} |"
        yield ""


def write_page(results: dict[str, Any]) -> None:
    PAGE.write_text("\n".join(_page(results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("HF_ACTNN_DATA")
    parser.add_argument("--data", type=Path, default=Path(default) / "cifar10" if default else None)
    parser.add_argument("--models", nargs="+", default=["vit_s", "resnet18"], choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--trainings", nargs="*", default=["vit_192", "resnet18"], choices=list(MODELS), metavar="MODEL"
    )
    parser.add_argument("--training_steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what the output has already of other models")
    parser.add_argument("--page", action="store_true", help="only write the page, from the output that is there")
    options = parser.parse_args()
    path = Path(timing.__file__).parent / "results" / "fidelity.json"
    if options.page:
        return write_page(json.loads(path.read_text()))
    if options.data is None or not (options.data / "train.parquet").is_file():
        raise SystemExit("--data names no folder with train.parquet and test.parquet of CIFAR-10")
    results: dict[str, list[dict[str, Any]]] = {"rows": [], "trainings": []}
    if options.resume and path.exists():
        known = json.loads(path.read_text())
        results["rows"] = [row for row in known["rows"] if row["model"] not in options.models]
        results["trainings"] = [row for row in known["trainings"] if row["model"] not in options.trainings]
    for name in options.models:
        for row in study(name, options.data, options.draws, options.steps):
            results["rows"].append(row)
            print(
                {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            timing.write("fidelity", results)
    for name in options.trainings:
        for row in short_trainings(name, options.data, options.training_steps, options.seeds):
            results["trainings"].append(row)
            print(row, flush=True)
            timing.write("fidelity", results)
    write_page(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
