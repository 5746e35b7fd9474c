"""Bits by a target: is the variance what was asked for, is the score as good, and how many bytes does it take?

    python benchmarks/adaptive.py --data path/to/data [--tasks resnet vit segformer] [--seeds 0 1 2] [--share 0.1]
        [--interval 10] [--times 1]

`--data` is a folder with the parquet files of `cifar10` and `camvid` in folders of these names. Each task is trained
with `bits="auto"` and uncompressed, from the same weights and with the same batches. At three points of each compressed
training the variance that quantisation adds to the gradient is measured by Monte Carlo at the bits of that moment, over
several batches. For each parameter it stands over the variance of exact gradients of these batches; the mean of these
shares over all parameters is what `max_added_variance` bounds. `share_of_sum` is the share of all parameters' summed
variance.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fidelity
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn

INTERVAL = 10
#: Batches whose gradients are computed at each point, exactly and compressed.
BATCHES = 32
Batches = Callable[[], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """What is trained how."""

    title: str
    build: Callable[[], nn.Module]
    read: Callable[[Path], tuple[Tensor, Tensor, Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    score: Callable[[nn.Module, Tensor, Tensor], float]
    metric: str
    batch: int
    steps: int
    rate: float


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def small_resnet() -> nn.Module:
    """ResNet with two basic blocks in each of three stages of 32, 64 and 128 channels, for 32 x 32."""
    import timm

    model = timm.create_model("resnet10t", num_classes=10, channels=(32, 64, 128, 256), stem_width=16)
    model.conv1[0].stride = (1, 1)
    model.maxpool = nn.Identity()
    return model


def read_cifar(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*fidelity.read(data / "cifar10", "train", 20000), *fidelity.read(data / "cifar10", "test", 4000))


def classify(model: nn.Module, values: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(values), labels)


# -- CamVid ------------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH, CLASSES, VOID = 96, 128, 11, 11


def segformer() -> nn.Module:
    import transformers

    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_labels=CLASSES,
            hidden_sizes=[32, 64, 128, 160],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 4, 5],
            decoder_hidden_size=96,
            semantic_loss_ignore_index=255,
        )
    )


def read_camvid(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import numpy
    import pyarrow.parquet
    from PIL import Image

    found: list[Tensor] = []
    for split in ("train", "test"):
        table = pyarrow.parquet.read_table(data / "camvid" / f"{split}.parquet")
        images, masks = [], []
        for image, mask in zip(table.column("image").to_pylist(), table.column("mask").to_pylist(), strict=True):
            picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB").resize((WIDTH, HEIGHT), Image.BILINEAR)
            images.append(numpy.array(picture))
            masks.append(numpy.array(Image.open(io.BytesIO(mask["bytes"])).resize((WIDTH, HEIGHT), Image.NEAREST)))
        target = torch.from_numpy(numpy.stack(masks)).long()
        target[target >= VOID] = 255
        found += [torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(), target]
    return found[0], found[1], found[2], found[3]


def segment(model: nn.Module, values: Tensor, masks: Tensor) -> Tensor:
    return model(pixel_values=values, labels=masks).loss


def mean_iou(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    model.eval()
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    with torch.no_grad():
        for values, target in zip(images.split(16), masks.split(16), strict=True):
            logits = F.interpolate(model(pixel_values=fidelity.pixels(values)).logits, (HEIGHT, WIDTH), mode="bilinear")
            seen = target != 255
            pairs = target[seen] * CLASSES + logits.argmax(1)[seen]
            counts += torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)
    both = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - both
    return (both / union.clamp(min=1))[union > 0].mean().item()


TASKS: dict[str, Task] = {
    "resnet": Task(
        "ResNet on CIFAR-10", small_resnet, read_cifar, classify, fidelity.accuracy, "accuracy", 64, 240, 2e-3
    ),
    "vit": Task(
        "ViT, width 192, on CIFAR-10",
        lambda: fidelity.vit(192, 6),
        read_cifar,
        classify,
        fidelity.accuracy,
        "accuracy",
        64,
        320,
        5e-4,
    ),
    "segformer": Task("SegFormer on CamVid", segformer, read_camvid, segment, mean_iou, "mean IoU", 8, 400, 1e-3),
}


class Shuffled:
    """Random batches, mirrored at random; the masks of images with them."""

    def __init__(self, images: Tensor, targets: Tensor, size: int, seed: int) -> None:
        self.images, self.targets, self.size = images, targets, size
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.images), (self.size,), generator=self.generator)
        values, targets = fidelity.pixels(self.images[chosen]), self.targets[chosen]
        if torch.rand((), generator=self.generator) < 0.5:
            values, targets = values.flip(-1), targets.flip(-1) if targets.ndim > 1 else targets
        return values.contiguous(), targets.contiguous()


def gradient(task: Task, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model.train()
    torch.manual_seed(0)
    task.loss(model, *batch).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def squares(difference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((one - other[name]).square().sum()) for name, one in difference.items()}


def added_variance(task: Task, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Of a model in training, at the bits it has now: measured on copies, which leave it as it is."""
    compressed = copy.deepcopy(model)
    hf_actnn.controller(compressed).active = False
    exact = hf_actnn.revert(copy.deepcopy(model))
    drawn = [batches() for _ in range(BATCHES)]
    gradients = [gradient(task, exact, batch) for batch in drawn]
    names = list(gradients[0])
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in names}
    apart = [squares(g, mean) for g in gradients]
    errors = [squares(gradient(task, compressed, batch), g) for batch, g in zip(drawn, gradients, strict=True)]
    minibatch = {name: sum(one[name] for one in apart) / (BATCHES - 1) for name in names}
    sizes = {name: mean[name].numel() for name in names}
    # A bias before a normalisation has a gradient of rounding errors.
    usual = statistics.median(minibatch[name] / sizes[name] for name in names)
    alive = [name for name in names if minibatch[name] / sizes[name] > 1e-6 * usual]
    shares = [statistics.mean(error[name] / minibatch[name] for name in alive) for error in errors]
    return {
        "share": statistics.mean(shares),
        "standard_error": statistics.stdev(shares) / math.sqrt(len(shares)),
        "share_of_sum": sum(error[name] for error in errors for name in names) / BATCHES / sum(minibatch.values()),
        "largest_share": max(statistics.mean(error[name] for error in errors) / minibatch[name] for name in alive),
        "predicted": hf_actnn.controller(model).history[-1]["added_variance"],
        "bits": hf_actnn.controller(model).history[-1]["average_bits"],
    }


def saved_bytes(task: Task, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    with hf_actnn.track_memory(model) as memory:
        gradient(task, model, batch)
    return memory.saved_bytes / len(batch[0])


def run(
    name: str, data: tuple[Tensor, ...], seed: int, share: float | None, interval: int = INTERVAL, times: int = 1
) -> dict[str, Any]:
    """One training, so many times as long as it is meant to be; with a share it is compressed and measured on the
    way."""
    task = TASKS[name]
    task = task._replace(steps=times * task.steps)
    torch.manual_seed(seed)
    model = task.build()
    row: dict[str, Any] = {"task": name, "seed": seed, "share": share, "steps": task.steps, "interval": interval}
    if share is not None:
        hf_actnn.convert(model, bits="auto", max_added_variance=share, update_interval=interval, seed=seed)
        controller = hf_actnn.controller(model)
        row["points"] = []
    batches = Shuffled(data[0], data[1], task.batch, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, task.steps, pct_start=0.15)
    losses = []
    for step in range(1, task.steps + 1):
        values, targets = batches()
        model.train()
        loss = task.loss(model, values, targets)
        optimizer.zero_grad()
        loss.backward()
        if share is not None:
            controller.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if share is not None and step in (task.steps // 4, task.steps // 2, task.steps - 20):
            fresh = Shuffled(data[0], data[1], task.batch, 1000 + seed)
            row["points"].append({"step": step, **added_variance(task, model, fresh)})
            print(name, seed, row["points"][-1], flush=True)
    if share is not None:
        batch = Shuffled(data[0], data[1], task.batch, 2000)()
        controller.active = False
        row["bytes_per_sample"] = saved_bytes(task, model, batch)
        hf_actnn.convert(model, "L2")
        row["bytes_per_sample_L2"] = saved_bytes(task, model, batch)
        hf_actnn.revert(model)
    row["loss"] = statistics.mean(losses[-task.steps // 10 :])
    row["score"] = task.score(model, data[2], data[3])
    return row


def paired(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Differences of scores by seed; as good if no worse than the larger of a point and two standard errors."""
    for name, task in TASKS.items():
        scores: dict[bool, dict[int, float]] = {True: {}, False: {}}
        for row in rows:
            if row["task"] == name and row["steps"] == task.steps:
                scores[row["share"] is not None][row["seed"]] = row["score"]
        seeds = sorted(scores[True].keys() & scores[False].keys())
        if len(seeds) < 2:
            continue
        differences = [scores[True][seed] - scores[False][seed] for seed in seeds]
        mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
        yield {
            "task": name,
            "pairs": len(seeds),
            "plain": statistics.mean(scores[False][seed] for seed in seeds),
            "compressed": statistics.mean(scores[True][seed] for seed in seeds),
            "difference": mean,
            "standard_error": error,
            "as_good": mean >= -max(0.01, 2 * error),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_ACTNN_DATA"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--interval", type=int, default=INTERVAL)
    parser.add_argument("--times", type=int, default=1, help="how many times as long each training is")
    options = parser.parse_args()
    if options.data is None or not (Path(options.data) / "cifar10").is_dir():
        raise SystemExit("--data names no folder with `cifar10` and `camvid`")
    path = Path(timing.__file__).parent / "results" / "adaptive.json"
    for name in options.tasks:
        data = TASKS[name].read(Path(options.data))
        for seed in options.seeds:
            for share in (options.share, None):
                row = run(name, data, seed, share, options.interval, options.times)
                print({key: value for key, value in row.items() if key != "points"}, flush=True)
                # Read again: runs of other tasks may be writing beside this one.
                known = json.loads(path.read_text())["rows"] if path.exists() else []
                same = ("task", "seed", "share", "steps", "interval")
                rows = [one for one in known if any(one[key] != row[key] for key in same)] + [row]
                timing.write("adaptive", {"rows": rows, "paired": list(paired(rows))})


if __name__ == "__main__":
    main()
