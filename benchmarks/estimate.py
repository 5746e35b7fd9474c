"""The largest batch that `hf-actnn estimate` predicts, against the one found by trying under a limit.

    python benchmarks/estimate.py [--models resnet18 ...] [--ways plain checkpoint L3] [--limit 700MB]

Both hold for the resident set of the whole process on a CPU, with large tensors in pages of their own. A try is that of
benchmarks/max_batch.py: a process that trains three steps and is ended above the limit. Bits are chosen in each, so
twice while the optimizer has its state, as in every training but for its first step. What was predicted and 10 % more
or less are tried first, then what lies between, to 5 %. Each finished model is written to
benchmarks/results/estimate.json at once; what is known is not measured again without --again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import max_batch
import timing

from hf_actnn.commands import estimate
from hf_actnn.commands.sizes import parse

#: Small models, and images so small that a try takes seconds.
MODELS = {
    "resnet18": 64,
    "vit_tiny_patch16_224": 96,
    "convnext_atto": 64,
    "efficientnet_b0": 64,
    "densenet121": 64,
    "edgenext_xx_small": 96,
}
WAYS = ("plain", "checkpoint", "L3")
#: Share of the batch that may lie between what fits and what does not.
TOLERANCE = 0.05
RESULTS = Path(__file__).parent / "results" / "estimate.json"


def around(fits: Callable[[int], bool], guess: int, tolerance: float = TOLERANCE, apart: float = 0.1) -> int:
    """The largest size that fits, to within a share of it or 1, looked for around a guess."""
    low, high, size = 0, None, max(guess, 1)
    while high is None or high - low > max(1, int(tolerance * low)):
        if fits(size):
            low = size
            size = math.ceil(size * (1 + apart)) if high is None else (low + high) // 2
        else:
            high = size
            size = int(size * (1 - apart)) if low == 0 else (low + high) // 2
            if size == 0:
                return 0
    return low


def tried(model: str, way: str, limit: str, guess: int, optimizer: str) -> tuple[int, list[dict[str, Any]]]:
    """The largest batch that trains under a limit, and the tries."""
    point = {
        **max_batch.facts("cpu"),
        **{"vary": "batch", "model": model, "method": way, "limit": limit, "image_size": MODELS[model]},
        **{"optimizer": optimizer, "precision": "fp32", "steps": 3, "update_interval": 2},
    }
    tries = []

    def fits(size: int) -> bool:
        found = {"size": size, **max_batch.attempt(point, size)}
        print(f"    {size}: {found['status']}", flush=True)
        if found["status"] == "error":
            raise SystemExit(found["error"])
        tries.append(found)
        return bool(found["status"] == "ok")

    return around(fits, guess), tries


def measure(model: str, ways: list[str], limit: str, optimizer: str) -> list[dict[str, Any]]:
    """Rows of one model."""
    start = time.perf_counter()
    found = estimate.estimate(model, parse(limit), ways=ways, image_size=MODELS[model], optimizer=optimizer)
    seconds = time.perf_counter() - start
    rows = []
    for row in found["ways"]:
        if row["way"] not in ways or row["status"] != "ok":
            continue
        print(f"  {row['way']}: predicted {row['largest']}", flush=True)
        largest, tries = tried(model, row["way"], limit, row["largest"], optimizer)
        ran = {run["batch"]: run["peak"] for run in row["runs"]}
        rows.append(
            {
                **{"model": model, "image_size": MODELS[model], "way": row["way"], "limit": limit},
                **{"optimizer": optimizer, "predicted": row["largest"], "tried": largest},
                **{"predicted_over_tried": row["largest"] / largest if largest else None, "straight": row["straight"]},
                **{"runs": ran, "tries": tries, "seconds_of_estimate": seconds},
            }
        )
        print(f"  {row['way']}: predicted {row['largest']}, tried {largest}", flush=True)
    return rows


def known() -> list[dict[str, Any]]:
    """Rows measured so far."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--limit", default="700MB")
    parser.add_argument("--optimizer", default="sgd", choices=list(max_batch.OPTIMIZERS))
    parser.add_argument("--again", action="store_true", help="measure what is known already")
    options = parser.parse_args()
    for model in options.models:
        of_model = {"model": model, "limit": options.limit, "optimizer": options.optimizer}
        have = [row["way"] for row in known() if all(row[key] == value for key, value in of_model.items())]
        ways = [way for way in options.ways if options.again or way not in have]
        if not ways:
            print(f"{model}: known", flush=True)
            continue
        print(model, flush=True)
        rows = measure(model, ways, options.limit, options.optimizer)
        done = {(row["model"], row["limit"], row["optimizer"], row["way"]) for row in rows}
        others = [row for row in known() if (row["model"], row["limit"], row["optimizer"], row["way"]) not in done]
        timing.write("estimate", {"rows": others + rows})
    for row in known():
        share = f"{row['predicted'] / row['tried']:.3f}" if row["tried"] else "-"
        print(f"{row['model']:24s} {row['way']:12s} {row['predicted']:6d} / {row['tried']:6d} = {share}")


if __name__ == "__main__":
    main()
