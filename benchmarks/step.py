"""Time of a training step, against plain training and against the library's own gradient checkpointing.

    python benchmarks/step.py [--models resnet50 vit_b16 convnext_t] [--bits 2] [--rounds 7]

One process per model; the contenders take turns in every round, and the median over rounds is reported, so that a
slow minute of the machine hits all of them. A turn is two steps, of which the second is timed. A step is forward,
loss and backward, without the optimizer. The checkpointing is Hugging Face's for the ViT; Hugging Face's ResNet and
ConvNeXt have none, so timm's models and timm's switch stand there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import timing
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.integrations import named


def _timm(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).train()


def _checkpointed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    named.checkpoint(model)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet50": (lambda: _timm("resnet50"), 8, "timm resnet50"),
    "vit_b16": (lambda: models.make("vit_b16"), 4, "Hugging Face ViT-B/16"),
    "convnext_t": (lambda: _timm("convnext_tiny"), 4, "timm convnext_tiny"),
}


def measure(name: str, bits: int, rounds: int) -> dict[str, object]:
    build, size, what = MODELS[name]
    data = models.batch(size)
    plain = build()
    contenders = {
        "plain": plain,
        "hf_actnn": hf_actnn.convert(copy.deepcopy(plain), bits=bits),
        "checkpointing": _checkpointed(plain),
    }

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            output = model(data["pixel_values"])
            F.cross_entropy(getattr(output, "logits", output), data["labels"]).backward()

        return run

    seconds = timing.interleaved(
        {key: step(model) for key, model in contenders.items()}, rounds=rounds, warmup=1, settle=1
    )
    return {
        "model": what,
        "batch": size,
        "bits": bits,
        "rounds": rounds,
        "seconds": seconds,
        "over_plain": {key: value / seconds["plain"] for key, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="step")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.bits, arguments.rounds)))
        return
    rows = {}
    for name in arguments.models:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--bits",
            str(arguments.bits),
            "--rounds",
            str(arguments.rounds),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, {key: round(value, 3) for key, value in rows[name]["over_plain"].items()}, flush=True)
    malloc = os.environ.get("MALLOC_MMAP_THRESHOLD_", "default")
    path: Path = timing.write(arguments.output, {"malloc_mmap_threshold": malloc, "models": rows})
    print(path.name)


if __name__ == "__main__":
    main()
