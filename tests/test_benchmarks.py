"""Benchmarks whose points are processes of their own say what went wrong in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
pytest.importorskip("timm")


def test_a_peak_that_cannot_be_measured_says_why():
    import checkpointing

    with pytest.raises(RuntimeError, match=r"no_such_model plain L2 0 1: [\s\S]*KeyError: 'no_such_model'"):
        checkpointing.slope("no_such_model", "plain", "L2", False, (1, 2), 1)


def test_a_mode_that_does_not_exist_is_refused():
    """It would be measured as the plain model."""
    command = [sys.executable, str(BENCHMARKS / "compiled.py"), "--modes", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "invalid choice: 'nonsense'" in done.stderr
