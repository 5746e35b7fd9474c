"""Two processes of one script that find each other, without a launcher."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launching import free_port
from tests import forks

ROOT = Path(__file__).resolve().parents[2]

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def run_two(script: Path, folder: Path, timeout: float = 180) -> list[dict[str, Any]]:
    """What each of two processes writes to ``<rank>.json`` in a folder, which is their only argument."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **shared, "PYTHONPATH": str(ROOT)}
    done = forks.server().run([__file__, str(script), str(folder)], timeout, folder, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _as_two(script: str, *arguments: str) -> int:
    """Run the script in two forks of this process. Returns in both of them, and here when both have ended: with the
    number of those that failed."""
    forked = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            return 0
        forked.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in forked)


if __name__ == "__main__":
    sys.exit(_as_two(*sys.argv[1:]))
