"""Interleaved timing: every contender once per round, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(
    contenders: dict[str, Callable[[], Any]], rounds: int = 15, warmup: int = 2, settle: int = 0
) -> dict[str, float]:
    """Median seconds of a call of each contender.

    Args:
        contenders: name -> function without arguments.
        rounds: timed calls of each.
        warmup: untimed calls of each before them.
        settle: untimed calls before each timed one, for contenders that leave the C library's heap to each other: who
            frees much has the next one fault its pages in again.
    """
    for _ in range(warmup):
        for call in contenders.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            for _ in range(settle):
                call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


#: How a tensor's values are rounded, from when results say so: docs/codec.md, "Mirrored roundings".
ROUNDINGS = "mirrored"


def environment() -> dict[str, Any]:
    """What a published number depends on: versions, processor, threads, date."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(v, 2) for v in os.getloadavg()],  # of others too: above 0 before the run, the figures are low
        "capability": torch.backends.cpu.get_cpu_capability(),
        "roundings": ROUNDINGS,
    }


def write(name: str, results: dict[str, Any]) -> Path:
    """Write results and the environment to ``benchmarks/results/<name>.json``."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
    return path
