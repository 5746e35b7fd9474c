"""Time and memory of a training step on a GPU: plainly, with checkpointing, at hf_actnn's levels, with save_on_cpu.

    python benchmarks/step_gpu.py [--models resnet50 ...] [--methods plain ...] [--budget SECONDS] [--rounds 7]
        [--out FILE] [--device cuda] [--batch N] [--image-size N]

Models have random weights and random images, under bf16 autocast; weights are fp32. They go by the names that
``hf-actnn estimate`` takes: timm's, or ``front:segformer`` and the others of front.py. A step is forward, loss and
backward, without the optimizer; the loss is a classifier's cross-entropy, and of what a segmenter or a detector gives a
mean square, as in front.py. The batch is the one at which the peak of plain training is a quarter of the
device's memory, by a straight line through two small ones. The ways to train:

* ``plain``; ``checkpoint``: the library's own gradient checkpointing; ``save_on_cpu``: PyTorch's, with pinned memory.
* ``L2``, ``L3``, ``L4``, ``auto``: hf_actnn, with its controller called after each step. Where bits are chosen, the
  first step is measured and chooses them; those that are timed are ordinary ones. The bits that ``auto`` chooses are
  those for random weights and images.
* ``L3 unfused``: L3 whose backward passes read decoded tensors (``fused_backward=False``).

All of them share one set of weights. Each has its turn in every round, in one order and the reverse in turns; medians.
``save_on_cpu`` is slow and pins as much of the host as it keeps: it takes turns with L4 alone, fewer times, at the end
and at an eighth of the batch. Peaks are the allocator's in an
ordinary step by itself, with what is always there: weights, gradients, images. What is kept is counted for plain
training and hf_actnn; checkpoints and save_on_cpu keep theirs where it cannot be seen.

A model has a process of its own and its share of ``--budget``, and writes what it has found to
benchmarks/results/step_gpu.json (``--out``) as it goes on. Where time is short, there are fewer rounds, and what no aim
asks for is left out.

``--device cpu`` is for trying the script: there is no L4, no save_on_cpu and no memory of a device, and ``--batch`` is
8 unless given.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import codec_gpu
import max_batch
import timing
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import hf_actnn
from hf_actnn.integrations import named

RESULTS = Path(__file__).parent / "results" / "step_gpu.json"
MODELS = ("resnet50", "vit_base_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224")
#: So many steps that none after the first is measured for new bits.
NEVER = {"update_interval": 10**6}
#: name -> (method of max_batch.py, fields of hf_actnn's configuration), those that aims are about first.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "checkpoint": ("checkpoint", {}),
    "L3": ("L3", NEVER),
    "L4": ("L4", NEVER),
    "save_on_cpu": ("save_on_cpu", {}),
    "L2": ("L2", NEVER),
    "auto": ("auto", NEVER),
    "L3 unfused": ("L3", {**NEVER, "fused_backward": False}),
}
ASKED_FOR = ("plain", "checkpoint", "L3", "L4", "save_on_cpu")
#: On a CPU there is nothing to move to.
ON_A_DEVICE = ("L4", "save_on_cpu")
#: Whose kept tensors hooks of ours would not see.
HIDDEN = ("checkpoint", "save_on_cpu")
#: ratio of step times -> what it is to be at most, or at least.
AIMS = {
    "L3 / plain": 1.12,
    "(L3 - plain) / (checkpoint - plain)": 1 / 3,
    "L4 / L3": 1.03,
    "save_on_cpu / L4": 5.0,
}
AT_LEAST = ("save_on_cpu / L4",)
#: Of the device's memory, at the peak of plain training.
SHARE = 1 / 4
#: Batches that the line goes through: what is kept sets their peaks, not gradients and workspaces.
SMALL = (32, 64)
LEAST_ROUNDS, SLOW_ROUNDS = 3, 2
#: Shares of a model's time, from its start: until when ways that no aim asks for are still prepared, and until when
#: rounds go on where save_on_cpu is to follow.
EXTRAS_UNTIL, ROUNDS_UNTIL = 0.5, 0.8
#: By which the batch is divided where save_on_cpu has its turns.
SLOW_PART = 8
#: Kept back of a model's time for the last round to end in.
RESERVE_SECONDS = 1.0


# -- one model, in a process of its own --------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, not copies of them: what is always there is there once."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class Way:
    """The model trained in one way.

    Args:
        batch: what the model is called with, on the device.
        device: to train on. A batch need not tell: not all in it are tensors.

    Attributes:
        found: ``status``, "ok" until something fails, and what :meth:`prepare` finds.
    """

    def __init__(self, name: str, model: nn.Module, batch: Any, device: torch.device) -> None:
        self.name, self.batch, self.device = name, batch, device
        self.found: dict[str, Any] = {"status": "ok"}
        self._given = model

    @property
    def works(self) -> bool:
        """Whether nothing has failed so far."""
        return self.found["status"] == "ok"

    def step(self) -> float:
        """Seconds of one step."""
        device = self.device
        self.model.zero_grad(set_to_none=True)
        synchronize(device)
        start = time.perf_counter()
        with self.method.around(), torch.autocast(device.type, torch.bfloat16):
            loss = named.loss(self.method.forward, self.batch)
        loss.backward()
        self.method.after()
        synchronize(device)
        return time.perf_counter() - start

    def peaks(self) -> dict[str, Any]:
        """Bytes of the device in a step that has the allocator to itself: ``allocated`` and ``reserved`` at most, and
        ``before``, allocated when it began. Nothing on a CPU."""
        device = self.device
        if device.type != "cuda":
            self.step()
            return {}
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.step()
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "before": before,
        }

    def start(self) -> None:
        """Make a model that trains this way."""
        method, fields = METHODS[self.name]
        self.model = sharing(self._given)
        self.method = max_batch.apply(method, self.model, self.device, **fields)

    def prepare(self) -> None:
        """All that comes before steps are timed: the first step, after which bits are chosen; what is kept; peaks."""
        self.start()
        start = time.perf_counter()
        self.found["first_step"] = self.peaks()
        self.found["first_step"]["seconds"] = round(time.perf_counter() - start, 3)
        if hf_actnn.is_converted(self.model) and hf_actnn.controller(self.model).adaptive:
            hf_actnn.controller(self.model).active = False  # no more of it among the steps that are timed
            history = hf_actnn.controller(self.model).history
            if not history:
                raise RuntimeError("the first step chose no bits")
            self.found["average_bits"] = history[-1]["average_bits"]
        if self.name not in HIDDEN:
            with hf_actnn.track_memory(self.model) as kept:
                self.step()
            self.found |= {"kept_bytes": kept.saved_bytes, "swapped_bytes": kept.swapped_bytes}
        self.found |= self.peaks()

    def tried(self, call: Callable[[], Any]) -> Any:
        """What a call returns; None if it fails, which is noted."""
        try:
            return call()
        except Exception as error:
            self.found |= max_batch.failure(error)
        # Here nothing refers to the frames of the error any more, nor to their tensors.
        print(f"    {self.name}: {self.found['status']} {self.found.get('error', '')}", flush=True)
        self._given.zero_grad(set_to_none=True)
        gc.collect()
        return None


def cut(batch: Any, samples: int) -> Any:
    """The first samples of a batch. Numbers, and tensors that have not as many rows as the first that has several
    dimensions, belong to all samples, and stay."""
    shapes = [value.shape for value in tree_leaves(batch) if isinstance(value, Tensor) and value.ndim]
    length = next((shape[0] for shape in shapes if len(shape) > 1), shapes[0][0] if shapes else 0)

    def first(value: Any) -> Any:
        return value[:samples] if isinstance(value, Tensor) and value.ndim and len(value) == length else value

    return tree_map(first, batch)


def batch_for(peak: Callable[[int], float], target: float) -> tuple[int, dict[int, float]]:
    """The batch whose peak is a little below the target, a multiple of 8, and the peaks of the small ones that say so.

    Raises:
        ValueError: peaks do not grow with the batch, or so fast that 8 are too many.
    """
    tries = {size: peak(size) for size in SMALL}
    small, large = SMALL
    slope = (tries[large] - tries[small]) / (large - small)
    batch = int(small + (target - tries[small]) / slope) // 8 * 8 if slope > 0 else 0
    if batch < 8:
        raise ValueError(f"no batch of 8 or more has a peak of {target:.0f} bytes, by those of small ones: {tries}")
    return batch, tries


def take_turns(
    ways: Sequence[Way], seconds: dict[str, list[float]], rounds: int, until: float, save: Callable[[], None]
) -> None:
    """A step of each in every round, forwards and backwards in turns, so that it does not matter who follows whom.

    The first round is not counted: the allocator gets to know all of them.

    Args:
        ways: who takes part.
        seconds: name -> where times are put.
        rounds: counted rounds at most.
        until: time of day after which no round begins that will not have ended, :data:`LEAST_ROUNDS` or ``rounds``
            having passed.
        save: called after each round.
    """
    for number in range(rounds + 1):
        start = time.time()
        for way in ways if number % 2 else reversed(ways):
            taken = way.tried(way.step) if way.works else None
            if number and taken is not None:
                seconds.setdefault(way.name, []).append(taken)
        save()
        if number >= LEAST_ROUNDS and 2 * time.time() - start > until:
            break


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Ratios of median times, of steps that took turns with each other; those of :data:`AIMS` first."""
    times, slow = ({name: statistics.median(one) for name, one in row[key].items()} for key in ("seconds", "slow"))
    found = {f"{name} / plain": value / times["plain"] for name, value in times.items() if "plain" in times}
    if {"L3", "checkpoint", "plain"} <= times.keys() and times["checkpoint"] > times["plain"]:
        added = times["checkpoint"] - times["plain"]
        found["(L3 - plain) / (checkpoint - plain)"] = (times["L3"] - times["plain"]) / added
    if {"L3", "L4"} <= times.keys():
        found["L4 / L3"] = times["L4"] / times["L3"]
    if {"L4", "save_on_cpu"} <= slow.keys():
        found["save_on_cpu / L4"] = slow["save_on_cpu"] / slow["L4"]
    found.pop("plain / plain", None)
    return {name: found[name] for name in (*AIMS, *(other for other in found if other not in AIMS)) if name in found}


def facts(device: torch.device) -> dict[str, Any]:
    """What figures depend on."""
    return codec_gpu.device_facts(device) if device.type == "cuda" else {"device": "cpu", **timing.environment()}


def measure(model: str, options: argparse.Namespace, row: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill a model's row, saving it on the way."""
    began, until = time.time(), options.until - RESERVE_SECONDS
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        row["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    row |= {"environment": facts(device), "rounds": options.rounds}
    row |= {"seconds": {}, "slow": {}, "methods": {}, "slow_methods": {}}
    found = named.load(model, options.image_size)
    # Channels, height and width, the model's own where no size is asked for; none where a function gave the batch.
    row["image_shape"] = found.image
    given = found.model.to(device)

    def data(batch: int) -> Any:
        torch.manual_seed(1)
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, found.batch(batch))

    def peak(batch: int) -> float:
        plain = Way("plain", given, data(batch), device)
        plain.start()
        plain.step()  # libraries take their workspaces
        return plain.peaks()["allocated"]

    if options.batch is None:
        row["batch"], row["peaks_of_small_batches"] = batch_for(peak, SHARE * row["memory_bytes"])
    else:
        row["batch"] = options.batch
    whole = data(row["batch"])
    row["fixed_bytes"] = {
        "parameters": sum(parameter.nbytes for parameter in given.parameters()),
        "buffers": sum(buffer.nbytes for buffer in given.buffers()),
        "batch": sum(value.nbytes for value in tree_leaves(whole) if isinstance(value, Tensor)),
    }
    print(f"{model}: batch {row['batch']}, after {time.time() - began:.0f} s", flush=True)

    def prepared(name: str, samples: int = row["batch"], where: str = "methods") -> Way:
        way = Way(name, given, cut(whole, samples), device)
        row[where][name] = way.found
        start = time.time()
        way.tried(way.prepare)
        way.found["prepared_s"] = round(time.time() - start, 2)
        save()
        return way

    ways = []
    for name in options.methods:
        if name == "save_on_cpu":
            continue
        if name not in ASKED_FOR and time.time() > began + EXTRAS_UNTIL * (until - began):
            row["methods"][name] = {"status": "no time"}
        else:
            ways.append(prepared(name))
    slow = "save_on_cpu" in options.methods
    rounds_until = began + ROUNDS_UNTIL * (until - began) if slow else until
    take_turns(ways, row["seconds"], options.rounds, rounds_until, save)
    if slow:
        ways.clear()
        given.zero_grad(set_to_none=True)
        row["slow_batch"] = max(1, row["batch"] // SLOW_PART)
        few = [name for name in ("L4", "save_on_cpu") if name in options.methods]
        ways = [prepared(name, row["slow_batch"], "slow_methods") for name in few]
        take_turns(ways, row["slow"], SLOW_ROUNDS, until, save)


def child(model: str, options: argparse.Namespace) -> None:
    """Measure one model in this process."""
    row: dict[str, Any] = {}

    def save() -> None:
        if "seconds" in row:
            row["ratios"] = ratios(row)
        record(options.out, model, row)

    try:
        measure(model, options, row, save)
    except Exception as error:
        row |= max_batch.failure(error)
    else:
        row["status"] = "ok"
    save()


# -- all of them -------------------------------------------------------------------------------------------------------


def record(path: Path, model: str, row: dict[str, Any]) -> None:
    """Put a model's row into the file, which is whole at any time."""
    results = json.loads(path.read_text())
    results["models"][model] = row
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(beside, path)


def run(model: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A model's row, of a process that ends after so many seconds at the latest."""
    own = {**vars(options), "out": str(options.out), "until": time.time() + seconds, "one": model}
    try:
        command = [sys.executable, __file__, "--one", json.dumps(own)]
        status = subprocess.run(command, timeout=seconds, check=False).returncode
        ended = f"the process ended with {status}" if status else None
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    row: dict[str, Any] = json.loads(options.out.read_text())["models"].get(model, {})
    if ended:
        row |= {"status": "error", "error": ended}
        record(options.out, model, row)
    if row["status"] != "ok":
        print(f"{model}: {row['status']} {row.get('error', '')}", flush=True)
    return row


def cell(value: float | None, aim: float, at_least: bool) -> str:
    """A ratio, and whether it misses its aim; nothing misses nan."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (" missed" if (value < aim if at_least else value > aim) else "")


def gib(found: dict[str, Any]) -> str:
    """Peaks of one way, or why there are none."""
    if found.get("status", "ok") != "ok":
        return str(found["status"])
    return f"{found['allocated'] / 2**30:.2f} ({found['reserved'] / 2**30:.2f})" if "allocated" in found else "-"


def table(rows: dict[str, dict[str, Any]]) -> None:
    """Print ratios beside their aims, and peaks."""

    def line(title: str, aim: str, cells: Sequence[str]) -> None:
        print(f"{title:38s}{aim:>9s}" + "".join(f"{text[:18]:>20s}" for text in cells), flush=True)

    print()
    line("step times, medians", "aim", list(rows))
    line("images in a batch", "", [str(row.get("batch", "-")) for row in rows.values()])
    line("rounds", "", [str(max(map(len, row.get("seconds", {}).values()), default=0)) for row in rows.values()])
    others = dict.fromkeys(name for row in rows.values() for name in row.get("ratios", {}) if name not in AIMS)
    for name in (*AIMS, *others):
        aim, at_least = AIMS.get(name, math.nan), name in AT_LEAST
        text = f"{'>=' if at_least else '<='} {aim:.2f}" if name in AIMS else ""
        # The aims are for devices.
        aims = [aim if "memory_bytes" in row else math.nan for row in rows.values()]
        found = [row.get("ratios", {}).get(name) for row in rows.values()]
        line(name, text, [cell(value, aim, at_least) for value, aim in zip(found, aims, strict=True)])
    print("peak, GiB allocated (reserved)")
    for name in METHODS:
        found = [row.get("methods", {}).get(name, {}) for row in rows.values()]
        if any(found):
            line(f"  {name}", "", [gib(one) for one in found])


def _without_out(words: Sequence[str]) -> list[str]:
    """Arguments that say what is measured, not where it is written."""
    apart = {at for at, word in enumerate(words) if word == "--out"}
    skipped = apart | {at + 1 for at in apart}
    return [word for at, word in enumerate(words) if at not in skipped and not word.startswith("--out=")]


def main() -> None:
    """Run the models one after the other and print the table; ends nonzero if anything failed."""
    # Not abbreviated: --out is taken out of the command that is noted, by its name.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names that estimate takes")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=900, help="seconds for all models together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="in place of the one that fills a quarter of the memory")
    parser.add_argument("--image-size", type=int, help="side of the images; the model's own if not given")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        own = json.loads(options.one)
        return child(own["one"], argparse.Namespace(**{**own, "out": Path(own["out"])}))
    device = torch.device(options.device)
    if device.type == "cpu":
        print(f"On a CPU there is no memory of a device to measure, and none of {', '.join(ON_A_DEVICE)}: left out.")
        options.methods = [name for name in options.methods if name not in ON_A_DEVICE]
        options.batch = options.batch or 8
    elif device.type != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"This measures CUDA devices; {device} is none that torch sees here.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/step_gpu.py", *_without_out(sys.argv[1:])])
    head = {"aims": AIMS, "precision": "bf16 autocast", "command": command}
    options.out.write_text(json.dumps({**head, "models": {}}) + "\n")
    end, rows = time.time() + options.budget, {}
    for number, model in enumerate(options.models):
        rows[model] = run(model, options, max(end - time.time(), 0) / (len(options.models) - number))
    print(f"wrote {options.out}")
    table(rows)
    failed = [one for row in rows.values() for one in (row, *row.get("methods", {}).values())]
    sys.exit(any(one["status"] == "error" for one in failed))


if __name__ == "__main__":
    main()
