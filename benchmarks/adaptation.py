"""What choosing bits costs: a step that collects and its update, one whose gradients are compared with those of the
step before, and every other step, against fixed bits.

    python benchmarks/adaptation.py [--models resnet50 vit_b16 convnext_t] [--rounds 5]

The contenders take turns in every round; medians. `share` is what it comes to on average at the default interval: the
more of a collecting step and its update, once in so many steps, of the steps compared before it, and of all others.
`bits="auto"` collects and compares in the same way; L3 holds as many bytes as what it is measured against. Peaks of the
resident set of a process that makes ordinary steps, and of one that collects as well, stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import models
import step
import timing
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.commands.watch import PAGES
from hf_actnn.config import UPDATE_INTERVAL
from hf_actnn.precision.minibatch import WINDOW


def one_step(model: nn.Module, data: dict, due: bool = False, compared: bool = False) -> Callable[[], None]:
    """A step of a model; `due` says whether it collects, and then it updates too."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        controller = hf_actnn.controller(model)
        controller._due, controller._watching = due, due or compared
        output = model(data["pixel_values"])
        F.cross_entropy(getattr(output, "logits", output), data["labels"]).backward()
        controller.step()

    return run


def measure(name: str, rounds: int) -> dict[str, object]:
    build, size, what = step.MODELS[name]
    data = models.batch(size)
    fixed = hf_actnn.convert(build(), "L2", bits=2)
    chosen = hf_actnn.convert(copy.deepcopy(fixed), "L3")
    one_step(chosen, data, due=True)()
    contenders = {
        "fixed": one_step(fixed, data),
        "chosen": one_step(chosen, data),
        "compared": one_step(chosen, data, compared=True),
        "collecting": one_step(chosen, data, due=True),
    }
    # Settled: a step is compared with the one before only if that one was looked at too.
    seconds = timing.interleaved(contenders, rounds=rounds, warmup=1, settle=1)
    every = (seconds["chosen"] - seconds["fixed"]) / seconds["fixed"]
    more = {kind: (seconds[kind] - seconds["chosen"]) / seconds["fixed"] for kind in ("compared", "collecting")}
    update = (more["collecting"] + WINDOW * more["compared"]) / UPDATE_INTERVAL
    return {
        "model": what,
        "batch": size,
        "rounds": rounds,
        "seconds": seconds,
        "every_step": every,
        "compared": more["compared"],
        "updates": update,
        "share": every + update,
        "interval": UPDATE_INTERVAL,
    }


def peak(name: str, collects: bool) -> int:
    build, size, _ = step.MODELS[name]
    model, data = hf_actnn.convert(build(), "L3"), models.batch(size)
    for due in (False, collects, collects):
        one_step(model, data, due)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peaks(name: str) -> dict[str, dict[str, int]]:
    """With the C library's heap as it is, and with large tensors in pages of their own, as in `memory.py`."""
    own = {**os.environ, **PAGES}
    return {
        key: {how: int(_run("--peak", name, how, environment=where)) for how in ("ordinary", "collecting")}
        for key, where in (("peak_rss", None), ("peak_rss_pages", own))
    }


def _run(*arguments: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(step.MODELS), choices=list(step.MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.rounds)))
        return
    if options.peak:
        print(peak(options.peak[0], options.peak[1] == "collecting"))
        return
    rows = {}
    for name in options.models:
        row = json.loads(_run("--one", name, "--rounds", str(options.rounds)))
        row |= peaks(name)
        rows[name] = row
        shares = {key: round(row[key], 4) for key in ("every_step", "updates", "share")}
        print(name, shares, row["peak_rss"], row["peak_rss_pages"], flush=True)
        timing.write("adaptation", {"models": rows})


if __name__ == "__main__":
    main()
