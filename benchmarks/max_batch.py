"""The largest batch, depth, width and resolution that train under a memory limit.

    python benchmarks/max_batch.py [--vary batch depth width resolution] [--limit 16GB 24GB all] [--precision fp32]
        [--models resnet50 ...] [--methods plain ...] [--device cuda]

What is varied, as in the table of the largest models of Chen et al. 2021, which deepens the second stage too:

* ``batch``: images of ``--image-size`` px in a batch.
* ``depth``: blocks in the third stage of a bottleneck ResNet, the others as they are; a block is three layers.
* ``width``: channels of a ResNet's first bottlenecks; those of the others follow (64 in a ResNet, 128 in a wide one).
* ``resolution``: side of the images. This and the two before it have ``--batch`` images in a batch.

Models are timm's, with random weights and random images. A try is a process of its own that trains some steps: forward,
loss, backward, optimizer. The methods:

* ``plain``; ``checkpoint``: timm's own gradient checkpointing; ``save_on_cpu``: PyTorch's, with pinned memory;
  ``compile:0.5`` and the like: torch.compile with that ``activation_memory_budget``, by inductor on a GPU, and on a CPU
  by ``aot_eager``, which has the same partitioner and needs no compiler.
* ``L0`` to ``L5`` and ``auto``: hf_actnn. Peaks are those of the first steps, the measuring one among them; the bits
  that ``auto`` chooses are those for random weights and images, and may be others later in a training.
* ``checkpoint+L2`` and the like: a checkpoint and a level.
* ``free``: saved tensors cost nothing and come back as zeros, so what remains are weights, optimizer and the transients
  of single operations. Its gradients mean nothing. With what hf_actnn keeps in codes on top it is what a level is
  measured against, here called its ceiling. A level may lie above it: where it reads codes in parts its transients are
  smaller than those of whole tensors, and its codes need not all be there when these are.

``--limit`` is in GB (10^9 bytes) or GiB. On a GPU it holds for PyTorch's allocator: the CUDA context comes on top, and
what swaps is limited by the host's memory as well. On a CPU it holds for the resident set of the whole process, Python
and libraries included: a parent watches it and ends the process above the limit. Large tensors are in pages of their
own there (MALLOC_MMAP_THRESHOLD_), so that what is freed leaves the resident set.

Two small tries say how memory grows, further ones bracket the largest size to 2 %. Every finished point is written to
benchmarks/results/max_batch.json at once, and is not tried again without ``--again``; one that ended in an error is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import limits
import memory
import timing
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.codec import native
from hf_actnn.commands import training
from hf_actnn.commands.sizes import parse
from hf_actnn.commands.watch import PAGES, high_water, watched
from hf_actnn.errors import ActNNWarning, NativeError
from hf_actnn.integrations import named

RESULTS = Path(__file__).parent / "results"
MODELS = (
    *("resnet50", "resnet152", "wide_resnet101_2"),
    *("densenet201", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"),
)
#: Blocks in the stages of bottleneck ResNets.
STAGES = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
    "wide_resnet101_2": (3, 4, 23, 3),
}
#: Models that are built for one size of images.
SIZED = ("vit", "swin")
METHODS = (
    *("plain", "checkpoint", "save_on_cpu", "compile:0.5", "compile:0.1"),
    *("L0", "L1", "L2", "L3", "L4", "L5", "auto", "free"),
)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-4),
}


class Quantity(NamedTuple):
    """What is varied: its step, the power of it that memory grows with, the size tried first and the largest tried."""

    step: int
    power: int
    first: int
    cap: int


QUANTITIES = {
    "batch": Quantity(1, 1, 8, 2**16),
    "depth": Quantity(1, 1, 8, 2**12),
    "width": Quantity(4, 1, 64, 2**13),
    "resolution": Quantity(16, 2, 96, 2**13),
}


def limit_name(text: str) -> str:
    """A limit as it is given; an argparse type."""
    if text != "all":
        parse(text)
    return text


def method_name(text: str) -> str:
    """A method, another level of hf_actnn, or another budget; an argparse type."""
    if text in METHODS or re.fullmatch(r"compile:(0(\.\d+)?|1)", text):
        return text
    return training.way(text)


def limit_of(point: dict[str, Any]) -> int:
    """Bytes that a point may use."""
    return int(point["memory"]) if point["limit"] == "all" else parse(point["limit"])


def title(point: dict[str, Any]) -> str:
    """A point for those who watch."""
    return " ".join(point[name] for name in ("vary", "limit", "model", "method"))


# -- one try, in a process of its own ----------------------------------------------------------------------------------


def build(model: str, vary: str, size: int, image_size: int) -> nn.Module:
    """A model of timm in training mode; at another depth or width where that is varied."""
    import timm

    fields: dict[str, Any] = {"img_size": image_size} if model.startswith(SIZED) else {}
    if vary == "depth":
        first, second, _, last = STAGES[model]
        fields["layers"] = (first, second, size, last)
    elif vary == "width":
        fields["base_width"] = size
    torch.manual_seed(0)
    return timm.create_model(model, pretrained=False, **fields).train()


class Method(NamedTuple):
    """What a step calls for the forward pass, what is on around it, and what follows the backward pass."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    after: Callable[[], None] = lambda: None


def apply(method: str, model: nn.Module, device: torch.device, **fields: Any) -> Method:
    """Make a model train in a way; ``fields`` are those of hf_actnn's configuration beside the level.

    Raises:
        NativeError: hf_actnn without its kernels.
    """
    if training.checkpoints(method):
        named.checkpoint(model)
        method = training.level_of(method)
    if method == "save_on_cpu":
        return Method(model, lambda: torch.autograd.graph.save_on_cpu(pin_memory=True))
    if method == "free":
        return Method(model, lambda: torch.autograd.graph.saved_tensors_hooks(memory.forget, memory.zeros))
    if method.startswith("compile:"):
        torch._functorch.config.activation_memory_budget = float(method.partition(":")[2])
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        return Method(torch.compile(model, backend=backend, dynamic=False))
    if method != training.PLAIN:
        kernels = native.cuda_status() if device.type == "cuda" else native.status()
        if not kernels["available"]:
            raise NativeError(f"hf_actnn's kernels are not built, and without them there is no point: {kernels}")
        hf_actnn.convert(model, *([] if method == "auto" else [method]), **fields)
        return Method(model, after=hf_actnn.controller(model).step)
    return Method(model)


def train(point: dict[str, Any], size: int) -> dict[str, Any]:
    """Train some steps in this process.

    Returns:
        ``peak``: bytes that the limit holds for, the allocator's reserved on a GPU, else the peak resident set;
        ``seconds`` of a step, the median without the first; on a GPU ``allocated`` and ``resident`` too. Of hf_actnn
        ``kept``: accounted bytes in the last step, codes, metadata and exact tensors.

    Raises:
        NativeError: hf_actnn without its kernels.
        Exception: what training raises.
    """
    device, vary = torch.device(point["device"]), point["vary"]
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(limit_of(point) / point["memory"], device)
    batch = size if vary == "batch" else point["batch"]
    side = size if vary == "resolution" else point["image_size"]
    model = build(point["model"], vary, size, side).to(device)
    method = apply(point["method"], model, device, update_interval=point.get("update_interval"))
    optimizer = OPTIMIZERS[point["optimizer"]](model.parameters())
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    seconds, kept = [], None
    for number in range(point["steps"]):
        counts = number == point["steps"] - 1 and hf_actnn.is_converted(model)
        counts &= not training.checkpoints(point["method"])  # what is kept inside of them is not seen
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with (
            hf_actnn.track_memory(model) if counts else contextlib.nullcontext() as counted,
            method.around(),
            torch.autocast(device.type, torch.bfloat16, enabled=point["precision"] == "bf16"),
        ):
            loss = F.cross_entropy(method.forward(images), labels)
        kept = counted.saved_bytes if counted else None
        loss.backward()
        method.after()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    found = {"seconds": statistics.median(seconds[1:] or seconds), "peak": high_water()}
    if kept is not None:
        found["kept"] = kept
    if device.type == "cuda":
        found |= {"resident": found["peak"], "allocated": torch.cuda.max_memory_allocated(device)}
        found["peak"] = torch.cuda.max_memory_reserved(device)
    return found


def failure(error: Exception) -> dict[str, Any]:
    """What is noted of an error: its text, unless it is for want of memory."""
    if training.is_for_memory(error):
        return {"status": "out of memory"}
    return {"status": "error", "error": f"{type(error).__name__}: {error}"[:2000]}


def child(point: dict[str, Any], size: int) -> None:
    """One try; prints what came of it as JSON."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ActNNWarning)
        try:
            found: dict[str, Any] = {"status": "ok", **train(point, size)}
        except Exception as error:
            found = failure(error)
    said = [str(one.message) for one in caught if issubclass(one.category, ActNNWarning)]
    print(json.dumps({**found, "warnings": said} if said else found))


# -- searching, in the parent ------------------------------------------------------------------------------------------


class Failed(Exception):
    """A try ended in an error that is not for want of memory."""


def measure(point: dict[str, Any], attempt: Callable[[dict[str, Any], int], dict[str, Any]]) -> dict[str, Any]:
    """Find the largest size of a point.

    Returns:
        The point with ``largest``, or None and the ``error``; ``capped``, where larger ones may fit; the ``tries`` in
        their order.
    """
    quantity, tries = QUANTITIES[point["vary"]], []

    def one(count: int) -> float | None:
        size = quantity.step * count
        found = {"size": size, **attempt(point, size)}
        tries.append(found)
        used = f", {found['peak'] / 1e9:.2f} GB" if "peak" in found else ""
        print(f"    {size}: {found['status']}{used}", flush=True)
        if found["status"] == "error":
            raise Failed(found["error"])
        return found["peak"] if found["status"] == "ok" else None

    first, cap = (max(1, point[name] // quantity.step) for name in ("first", "cap"))
    try:
        largest: int | None = quantity.step * limits.search(
            one, limit_of(point), first, cap, quantity.power, point["tolerance"]
        )
        error = None
    except Failed as failure:
        largest, error = None, str(failure)
    at_largest = next((found for found in tries if found["size"] == largest), {})
    return {
        **point,
        "largest": largest,
        "capped": all(found["status"] == "ok" for found in tries),
        "seconds": at_largest.get("seconds"),
        "peak": at_largest.get("peak"),
        "error": error,
        "tries": tries,
    }


# -- the points --------------------------------------------------------------------------------------------------------


def facts(device: str) -> dict[str, Any]:
    """What a point depends on beyond its options. A GPU is asked by another process: this one would keep a part of it
    for itself."""
    if device == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        name, allocator, threads = timing.environment()["cpu"], "pages", torch.get_num_threads()
    else:
        code = "import sys, torch; p = torch.cuda.get_device_properties(sys.argv[1]); print(p.total_memory, p.name)"
        done = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"There is no device {device} that torch can use: {done.stderr.strip().splitlines()[-1]}")
        size, _, name = done.stdout.strip().partition(" ")
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        total, allocator, threads = int(size), " ".join(filter(None, map(os.environ.get, names))), None
    return {
        "device": device,
        "device_name": name,
        "memory": total,
        "allocator": allocator,
        "threads": threads,
        "torch": torch.__version__,
    }


def refused(point: dict[str, Any]) -> str | None:
    """Why there is no such point, or None."""
    method, vary = point["method"], point["vary"]
    if point["device"] == "cpu" and training.level_of(method) in ("save_on_cpu", "L4", "L5"):
        return "left out: on a CPU there is nothing to move to"
    if vary in ("depth", "width") and point["model"] not in STAGES:
        return f"left out: {vary} is that of one of {', '.join(STAGES)}"
    if limit_of(point) > point["memory"]:
        return f"left out: the limit is above the device's {point['memory'] / 1e9:.1f} GB"
    return None


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All that were asked for and can be, in order; prints why others cannot."""
    on_cpu = options.device == "cpu"
    shared = {**facts(options.device), "precision": options.precision, "optimizer": options.optimizer}
    shared |= {"steps": options.steps, "tolerance": options.tolerance}
    found = []
    for vary in options.vary:
        # The paper's largest models are made from a ResNet-152.
        models = options.models or (MODELS if vary == "batch" else ("resnet152",))
        quantity = QUANTITIES[vary]
        sizes = {
            "batch": None if vary == "batch" else options.batch or (4 if on_cpu else 64),
            "image_size": None if vary == "resolution" else options.image_size,
            "first": options.first or quantity.first,
            "cap": options.cap or quantity.cap,
        }
        for limit in options.limit or (["2GB"] if on_cpu else ["16GB", "24GB", "all"]):
            for model in models:
                for method in options.methods:
                    point = {**shared, **sizes, "vary": vary, "limit": limit, "model": model, "method": method}
                    reason = refused(point)
                    if reason:
                        print(f"{title(point)}: {reason}", flush=True)
                    else:
                        found.append(point)
    return found


def attempt(point: dict[str, Any], size: int) -> dict[str, Any]:
    """One try in a process of its own, ended above the limit on a CPU."""
    command = [sys.executable, __file__, "--try", json.dumps([point, size])]
    if point["device"] != "cpu":
        return watched(command)
    return watched(command, limit_of(point), PAGES)


def known(output: str) -> list[dict[str, Any]]:
    """Rows measured so far."""
    path = RESULTS / f"{output}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def is_of(row: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether a row is a point's."""
    return all(row.get(key) == value for key, value in point.items())


def ceiling(row: dict[str, Any], free: dict[str, Any] | None) -> float | None:
    """The batch that would fit if what hf_actnn keeps came on top of the peak of training whose saved tensors cost
    nothing: along the line through the latter's smallest and largest try, with what is kept of a sample on top. None
    where that is not known. No bound: see above."""
    if free is None or row["vary"] != "batch" or not row["largest"]:
        return None
    kept = sorted((found["size"], found["kept"]) for found in row["tries"] if "kept" in found)
    fits = sorted((found["size"], found["peak"]) for found in free["tries"] if found["status"] == "ok")
    if not kept or len(fits) < 2:
        return None
    (small, low), (large, high) = fits[0], fits[-1]
    slope = (high - low) / (large - small)
    return (limit_of(row) - (low - small * slope)) / (slope + kept[-1][1] / kept[-1][0])


def table(rows: list[dict[str, Any]]) -> None:
    """Print the largest sizes of one quantity under one limit; beside each how many times that of plain training it is,
    how many times training is whose saved tensors cost nothing, and the share of its ceiling."""
    models, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "method"))
    found = {(row["model"], row["method"]): row for row in rows}
    print(f"\nlargest {rows[0]['vary']} under {rows[0]['limit']}, {rows[0]['precision']}, {rows[0]['device_name']}")
    print("(times plain / times plain of saved tensors that cost nothing; share of the ceiling, codes included)")
    print(" " * 14 + "".join(f"{model[:26]:>28s}" for model in models))
    for method in methods:
        cells = []
        for model in models:
            row = found.get((model, method))
            size, plain, free = (found.get((model, one), {}).get("largest") for one in (method, "plain", "free"))
            text = "-" if row is None else "error" if size is None else f"{'>=' if row['capped'] else ''}{size}"
            if size and plain:
                text += f"  {size / plain:.2f}" + (f" / {free / plain:.2f}" if free else "")
            most = ceiling(row, found.get((model, "free"))) if row else None
            text += f"; {size / most:.2f}" if most else ""
            cells.append(f"{text:>28s}")
        print(f"{method:14s}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", default=["batch"], choices=list(QUANTITIES))
    parser.add_argument(
        "--limit", nargs="+", type=limit_name, help="16GB 24GB all on a GPU, 2GB on a CPU unless said otherwise"
    )
    parser.add_argument("--models", nargs="+", help="of timm; all six for batch, else resnet152")
    parser.add_argument("--methods", nargs="+", type=method_name, default=list(METHODS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--optimizer", default="sgd", choices=list(OPTIMIZERS))
    parser.add_argument("--batch", type=int, help="where it is not varied: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--image-size", type=int, default=224, help="where it is not varied")
    parser.add_argument("--steps", type=int, default=4, help="of a try")
    parser.add_argument("--first", type=int, help="the size tried first")
    parser.add_argument("--cap", type=int, help="the largest size to try")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--again", action="store_true", help="measure what is known already")
    parser.add_argument("--output", default="max_batch")
    parser.add_argument("--try", dest="one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return child(*json.loads(options.one))
    if options.device == "cpu" and "all" in (options.limit or ()):
        parser.error("on a CPU `--limit all` would leave nothing to others; give a size")
    wanted = points(options)
    for number, point in enumerate(wanted, 1):
        place = f"[{number}/{len(wanted)}] {title(point)}"
        if not options.again and any(is_of(row, point) and row["error"] is None for row in known(options.output)):
            print(f"{place}: known")
            continue
        print(place, flush=True)
        row = measure(point, attempt)
        print(f"    largest {row['largest']}" if row["error"] is None else f"    error: {row['error']}", flush=True)
        # Read again: another run may be writing beside this one.
        others = [one for one in known(options.output) if not is_of(one, point)]
        timing.write(options.output, {"rows": [*others, row]})
    rows = known(options.output)
    for vary, limit in dict.fromkeys((point["vary"], point["limit"]) for point in wanted):
        chosen = [point for point in wanted if (point["vary"], point["limit"]) == (vary, limit)]
        table([row for point in chosen for row in rows if is_of(row, point)])


if __name__ == "__main__":
    main()
