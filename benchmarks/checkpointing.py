"""Gradient checkpointing and compression, alone and together: bytes, peaks, time, and the gradient.

    python benchmarks/checkpointing.py [--models vit_b16 resnet50] [--level L2] [--skip time] [--data path/to/cifar10]

Four parts, any of which `--skip` leaves out; what the last run found of them then stays in the results.

* bytes: what is held between the forward and the backward pass at 224 px, fp32, per image, and what checkpoints hold of
  it; beside it an independent count of every storage that the forward pass made and that is still alive.
* peaks: the slope of the peak resident set of a training step over the batch, each point a process of its own, with
  large tensors in pages of their own (MALLOC_MMAP_THRESHOLD_).
* time: a training step of each way, all in turns; medians of wall-clock and of processor time.
* gradients: on weights trained for some hundred steps on CIFAR-10 (those of fidelity.py), the cosine with the exact
  gradient, by the bits of what checkpoints keep: where that is all that is coded; with what blocks save when they run
  again; and with what a level codes outside of checkpoints.

Ways: plain; level, compression alone; checkpoint, PyTorch's alone; both; coded_again, both with recompute_bits=8.
Checkpoints are timm's own switch, of the kind that `--reentrant` says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fidelity
import timing
import torch
import torch.nn.functional as F
from memory import StoragesMade
from torch import Tensor, nn

import hf_actnn
from hf_actnn.commands.watch import PAGES, high_water, watched
from hf_actnn.config import EXACT
from hf_actnn.integrations import named

MODELS = {"vit_b16": "vit_base_patch16_224", "resnet50": "resnet50"}
WAYS = ("plain", "level", "checkpoint", "both", "coded_again")
PARTS = ("bytes", "peaks", "time", "gradients")
TRAINED = ("vit_s", "resnet18")
BITS = (4, 5, 6, 8)


def make(name: str, way: str, level: str, reentrant: bool) -> nn.Module:
    """A model in training mode, the same weights each time, set up for one of the ways."""
    import timm
    from timm.layers import set_reentrant_ckpt

    torch.manual_seed(0)
    model = timm.create_model(MODELS[name]).train()
    if way in ("checkpoint", "both", "coded_again"):
        set_reentrant_ckpt(reentrant)
        named.checkpoint(model)
    if way in ("level", "both"):
        hf_actnn.convert(model, level)
    if way == "coded_again":
        hf_actnn.convert(model, level, recompute_bits=8)
    return model


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Images and labels; nobody but the graph holds what the model makes of them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 224, 224, generator=generator)
    return images, torch.randint(0, 1000, (size,), generator=generator)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    loss_of(model, images, labels).backward()
    model.zero_grad(set_to_none=True)


# -- the parts ---------------------------------------------------------------------------------------------------------


def held(model: nn.Module, size: int) -> dict[str, float]:
    """Bytes per image between the passes."""
    data = batch(size)
    with hf_actnn.track_memory(model) as memory:
        loss = loss_of(model, *data)
        # The images are the loop's, which holds them whoever else does.
        found = {"held": memory.saved_bytes / size, "of_checkpoints": memory.checkpoint_bytes / size}
    del loss
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *data]}
    with StoragesMade(known) as storages:
        loss = loss_of(model, *data)
        alive = storages.alive()
    del loss
    return {**found, "alive": alive / size}


def peak(name: str, way: str, level: str, reentrant: bool, size: int) -> None:
    """One training step in this process; prints its peak resident set in bytes, as JSON."""
    model, data = make(name, way, level, reentrant), batch(size)
    loss_of(model, *data).backward()
    print(json.dumps({"status": "ok", "peak": high_water()}))


def slope(name: str, way: str, level: str, reentrant: bool, sizes: tuple[int, int], repeats: int) -> float:
    """Bytes of peak resident set per image."""
    peaks = []
    for size in sizes:
        words = [name, way, level, str(int(reentrant)), str(size)]
        command = [sys.executable, __file__, "--peak", *words]
        runs = [watched(command, environment=PAGES) for _ in range(repeats)]
        failed = next((run for run in runs if run["status"] != "ok"), None)
        if failed is not None:
            raise RuntimeError(f"{' '.join(words)}: {failed.get('error', failed['status'])}")
        peaks.append(statistics.median(run["peak"] for run in runs))
    return (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])


def timed(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step of each, on the wall and of the processor, all in turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            begun = time.perf_counter(), time.process_time()
            call()
            if turn:  # the first of each warms up
                seconds[name]["wall"].append(time.perf_counter() - begun[0])
                seconds[name]["processor"].append(time.process_time() - begun[1])
    return {name: {clock: statistics.median(values) for clock, values in one.items()} for name, one in seconds.items()}


def gradients(name: str, data: Path, level: str, reentrant: bool, draws: int, steps: int) -> Iterator[dict[str, Any]]:
    """Cosines with the exact gradient, by the bits of what checkpoints keep, over draws of the rounding."""
    from timm.layers import set_reentrant_ckpt

    images, labels = fidelity.read(data, "train", 20000)
    model = fidelity.trained(name, images, labels, steps)
    values = fidelity.Batches(images, labels, seed=7)(fidelity.MODELS[name].images)
    exact = fidelity.gradient(model, *values).double()
    set_reentrant_ckpt(reentrant)
    named.checkpoint(model)
    default = hf_actnn.ActNNConfig().effective_checkpoint_bits
    ways = [("boundaries", {"level": "L0", "checkpoint_bits": bits}) for bits in BITS]
    ways += [("boundaries and blocks", {"level": "L0", "checkpoint_bits": default, "recompute_bits": default})]
    ways += [(f"{level} too", {"level": level, "checkpoint_bits": bits}) for bits in (default, EXACT)]
    for coded, fields in ways:
        cosines, errors, total = [], [], torch.zeros_like(exact)
        for draw in range(draws):
            hf_actnn.convert(model, fields, seed=1000 + draw)
            found = fidelity.gradient(model, *values).double()
            cosines.append(F.cosine_similarity(found, exact, dim=0).item())
            errors.append(((found - exact).square().sum() / exact.square().sum()).item())
            total += found - exact
        hf_actnn.revert(model)
        yield {
            "model": name,
            "coded": coded,
            "checkpoint_bits": fields["checkpoint_bits"],
            "cosine": statistics.mean(cosines),
            "least_cosine": min(cosines),
            **fidelity.summary(errors, total, exact.square().sum().item()),
        }


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: bytes, peaks and times of each way."""
    level, reentrant = arguments.level, arguments.reentrant
    found: dict[str, Any] = {}
    if "bytes" not in arguments.skip:
        found["bytes"] = {way: held(make(name, way, level, reentrant), 2) for way in WAYS}
    if "peaks" not in arguments.skip:
        sizes = tuple(arguments.sizes)
        found["peaks"] = {way: slope(name, way, level, reentrant, sizes, arguments.repeats) for way in WAYS}
    if "time" not in arguments.skip:
        data = batch(arguments.batch)
        steps = {way: partial(step, make(name, way, level, reentrant), *data) for way in WAYS}
        found["batch"], found["time"] = arguments.batch, timed(steps, arguments.rounds)
    return found


def last(arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of the last run with these settings, or none yet."""
    settings = {"level": arguments.level, "reentrant": arguments.reentrant}
    path = Path(__file__).parent / "results" / f"{arguments.output}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found.pop("environment", None)
    alike = {key: found.get(key) for key in settings} == settings
    return found if alike else {**settings, "models": {}}


def told(name: str, found: dict[str, Any]) -> str:
    """A line per way."""
    lines = [name]
    for way in WAYS:
        words = [f"  {way:11}"]
        if "bytes" in found:
            words += [f"{key} {value / 1e6:.2f} MB" for key, value in found["bytes"][way].items()]
        if "peaks" in found:
            words.append(f"peak {found['peaks'][way] / 1e6:.2f} MB")
        if "time" in found:
            words += [f"{clock} {seconds:.3f} s" for clock, seconds in found["time"][way].items()]
        lines.append(", ".join(words))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--level", default="L2", help="one that chooses no bits")
    parser.add_argument("--reentrant", action="store_true", help="the older kind of checkpoint")
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS)
    parser.add_argument("--sizes", type=int, nargs=2, default=(4, 12), help="batches between which slopes are taken")
    parser.add_argument("--repeats", type=int, default=3, help="processes behind each peak")
    parser.add_argument("--batch", type=int, default=4, help="of the steps that are timed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_ACTNN_DATA", "data")) / "cifar10")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", default="checkpointing")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, way, level, reentrant, size = arguments.peak
        return peak(name, way, level, bool(int(reentrant)), int(size))
    results = last(arguments)
    for name in arguments.models if set(PARTS[:3]) - set(arguments.skip) else ():
        results["models"][name] = {**results["models"].get(name, {}), **measure(name, arguments)}
        print(told(name, results["models"][name]), flush=True)
    if "gradients" not in arguments.skip:
        results["gradients"] = []
        kind = arguments.level, arguments.reentrant
        for name in TRAINED:
            for row in gradients(name, arguments.data, *kind, arguments.draws, arguments.steps):
                results["gradients"].append(row)
                words = (f"{key} {value:.6g}" if isinstance(value, float) else value for key, value in row.items())
                print(*words, flush=True)
    print(timing.write(arguments.output, results).name)


if __name__ == "__main__":
    main()
