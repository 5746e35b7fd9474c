"""Peak memory against time of every way to train, on a CPU: which of them nothing beats in both.

    python benchmarks/front.py [--models resnet50 ...] [--ways plain ...] [--rounds 2] [--again]

Eleven models at their own size of images, fp32, random weights and images; what a detector or a segmenter gives goes
into a mean square, as their losses add nothing that a way to train could save. The ways:

* ``plain``; ``checkpoint``: the library's own gradient checkpointing.
* ``compile:0.5`` and the like: torch.compile by inductor with that ``activation_memory_budget``; at 1 as it comes.
* ``L1``, ``L2``, ``L3``, ``auto``: hf_actnn. Where bits are chosen they were chosen before anything is timed, and
  the peak is that of steps that choose bits too. ``checkpoint+L2``: both. ``compile+L2``: by block where the model has
  blocks in a row, else as a whole.

``save_on_cpu`` has no place on a CPU, where it copies what is there already.

A point is a process of its own, whose C library gives large tensors pages of their own, so that the resident set is
what is in use. Memory is the slope of the peak over the batch, between a third of the batch and all of it; gradients of
parameters are there all the time, so that they are no part of it. Time is the processor's, of all threads, for forward
and backward pass: the median of three steps, and of the rounds, in each of which all ways of a model have their turn
one after the other. Bytes kept are PyTorch's and hf_actnn's own count before the backward pass; a checkpoint keeps what
it has where that does not see it.

Each finished model is written to benchmarks/results/front.json at once; what is known is not measured again without
``--again``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from torch import nn

import hf_actnn
from hf_actnn.commands import training
from hf_actnn.commands.probe import Gauge
from hf_actnn.commands.progress import Progress
from hf_actnn.commands.watch import PAGES, watched
from hf_actnn.errors import ActNNError, ActNNWarning
from hf_actnn.integrations import named

RESULTS = Path(__file__).parent / "results" / "front.json"
#: Untimed steps, in each of which bits are chosen, and timed ones, in which they are not. The peak is that of all but
#: the first, which compiles: in the second there are bits that were chosen before.
FIRST, STEPS, INTERVAL = 2, 3, 1
COMPILE = "compile"


class Model(NamedTuple):
    """What is trained: a name that `named.load` takes, and the larger of two batches."""

    name: str
    batch: int


def segformer() -> nn.Module:
    """SegFormer-B0 with its decoder, 150 classes."""
    import transformers

    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=150))


def detr() -> nn.Module:
    """DETR with a ResNet-50 whose batch normalisations are frozen, as published."""
    import transformers

    backbone = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone)
    return transformers.DetrForObjectDetection(config)


def yolos() -> nn.Module:
    """YOLOS-S for images of 224 px."""
    import transformers

    config = transformers.YolosConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=[224, 224]
    )
    return transformers.YolosForObjectDetection(config)


MODELS = {
    "resnet50": Model("resnet50", 12),
    "resnet152": Model("resnet152", 6),
    "densenet201": Model("densenet201", 6),
    "efficientnet_b0": Model("efficientnet_b0", 12),
    "vit_b": Model("vit_base_patch16_224", 6),
    "deit_s": Model("deit_small_patch16_224", 12),
    "swin_t": Model("swin_tiny_patch4_window7_224", 6),
    "convnext_t": Model("convnext_tiny", 6),
    "segformer_b0": Model("front:segformer", 12),
    "detr_r50": Model("front:detr", 6),
    "yolos_s": Model("front:yolos", 6),
}
WAYS = (
    *("plain", "checkpoint", f"{COMPILE}:1", f"{COMPILE}:0.75", f"{COMPILE}:0.5", f"{COMPILE}:0.25"),
    *("L1", "L2", "L3", "auto", "checkpoint+L2", f"{COMPILE}+L2"),
)
#: Those of other people; what is left is ours.
OTHERS = tuple(way for way in WAYS if way.split(":")[0] in ("plain", "checkpoint", COMPILE))


# -- one point, in a process of its own --------------------------------------------------------------------------------


def compiled(model: nn.Module) -> Callable[..., Any]:
    """By block where a list of modules of one kind holds most of the parameters, else as a whole."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    for rows in model.modules():
        alike = isinstance(rows, nn.ModuleList | nn.Sequential) and len(rows) > 3 and len({type(one) for one in rows})
        if alike == 1 and sum(parameter.numel() for parameter in rows.parameters()) > whole / 2:
            for block in rows:
                block.compile()
            return model
    return torch.compile(model)


def prepared(model: nn.Module, way: str) -> tuple[Callable[..., Any], Callable[[], None]]:
    """The model as a way runs it, and what follows each backward pass."""
    if way.startswith(f"{COMPILE}:"):
        torch._functorch.config.activation_memory_budget = float(way.partition(":")[2])
        return torch.compile(model), lambda: None
    if way.startswith(f"{COMPILE}+"):
        hf_actnn.convert(model, way.partition("+")[2])
        return compiled(model), lambda: None
    if training.checkpoints(way):
        named.checkpoint(model)
    return model, training.compress(model, training.level_of(way), update_interval=INTERVAL)


def train(name: str, way: str, batch_size: int, timed: bool) -> dict[str, Any]:
    """Some steps in this process: the ``peak``, and where they are ``timed`` ``seconds`` and ``saved_bytes``."""
    found = named.load(name)
    run, after = prepared(found.model, way)
    batch, gauge = found.batch(batch_size), Gauge(torch.device("cpu"))
    peaks, seconds = [], []

    def step() -> None:
        # Gradients stay: where they come and go, the peak of a small batch is that of the last of them.
        found.model.zero_grad(set_to_none=False)
        gauge.reset()
        start = time.process_time()
        named.loss(run, batch).backward()
        seconds.append(time.process_time() - start)
        after()
        peaks.append(gauge.peak())

    for _ in range(FIRST):
        step()
    if not timed:
        return {"peak": max(peaks[1:])}
    if training.level_of(way) != training.PLAIN and COMPILE not in way:
        hf_actnn.controller(found.model).active = False
    seconds.clear()
    for _ in range(STEPS):
        step()
    told = {"peak": max(peaks[1:]), "seconds": statistics.median(seconds)}
    if way.startswith("checkpoint"):
        return told
    with hf_actnn.track_memory(found.model) as memory:
        held = named.loss(run, batch)
    del held
    return {**told, "saved_bytes": memory.saved_bytes}


def child(name: str, way: str, batch_size: int, timed: bool) -> dict[str, Any]:
    """What came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActNNWarning)
        try:
            return {"status": "ok", **train(name, way, batch_size, timed)}
        except ActNNError as error:
            return {"status": "refused", "error": str(error)}
        except Exception as error:
            return {"status": "error", "error": f"{type(error).__name__}: {error}"[:2000]}


def attempt(model: Model, way: str, batch_size: int, timed: bool = True) -> dict[str, Any]:
    """The same from a process of its own."""
    command = [sys.executable, __file__, "--point", model.name, way, str(batch_size), "timed" if timed else "peak"]
    return watched(command, environment=PAGES)


# -- all of them -------------------------------------------------------------------------------------------------------


def known() -> dict[str, Any]:
    """Models measured so far."""
    return json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}


def measure(key: str, ways: list[str], rounds: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Points of one model."""
    model = MODELS[key]
    small = max(1, model.batch // 3)
    rows: dict[str, Any] = {}
    for way in ways:
        told(f"{key}: {way}, a batch of {small}")
        first = attempt(model, way, small, timed=False)
        rows[way] = {"status": first["status"]}
        if first["status"] == "ok":
            rows[way] |= {"peaks": {str(small): first["peak"], str(model.batch): []}, "seconds": []}
        else:
            rows[way]["error"] = first.get("error", "")
    for at in range(rounds):
        for way in ways[:: 1 if at % 2 == 0 else -1]:
            row = rows[way]
            if row["status"] != "ok":
                continue
            told(f"{key}: {way}, round {at + 1}")
            found = attempt(model, way, model.batch)
            if found["status"] != "ok":
                row |= {"status": found["status"], "error": found.get("error", "")}
                continue
            row["peaks"][str(model.batch)].append(found["peak"])
            row["seconds"].append(found["seconds"] / model.batch)
            if "saved_bytes" in found:
                row["kept_per_image"] = found["saved_bytes"] / model.batch
    for row in rows.values():
        if row["status"] == "ok":
            large = statistics.median(row["peaks"][str(model.batch)])
            row["peak_per_image"] = (large - row["peaks"][str(small)]) / (model.batch - small)
            row["seconds_per_image"] = statistics.median(row["seconds"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what is known already")
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        name, way, size, kind = options.point
        with contextlib.redirect_stdout(sys.stderr):  # what a model prints is no result
            result = child(name, way, int(size), kind == "timed")
        print(json.dumps(result))
        return
    with Progress(len(options.models)) as progress:
        for key in options.models:
            earlier = known().get(key, {})
            before = earlier.get("ways", {})
            # Times are compared within a model, so what is missing has its turns beside plain training.
            missing = [way for way in options.ways if options.again or way not in before]
            if missing:
                ways = list(dict.fromkeys(["plain", *missing]))
                rows = measure(key, ways, options.rounds, progress.say)
                factor = 1.0
                if "plain" in before and rows["plain"]["status"] == before["plain"]["status"] == "ok":
                    factor = before["plain"]["seconds_per_image"] / rows["plain"]["seconds_per_image"]
                for way, row in rows.items():
                    if way in missing or way not in before:
                        if "seconds_per_image" in row:
                            row["seconds_per_image"] *= factor  # in units of the plain training known before
                        before[way] = row
                found = {"batch": MODELS[key].batch, "environment": timing.environment(), "ways": before}
                if "note" in earlier and set(before) - set(missing):
                    found["note"] = earlier["note"]  # of what was not measured again
                timing.write("front", {"models": {**known(), key: found}})
            progress.advance()


if __name__ == "__main__":
    main()
