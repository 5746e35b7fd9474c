"""Benchmarks whose points are processes of their own say what went wrong in one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import launching

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


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path):
    """As a launcher's workers, which outlive it."""
    beat = tmp_path / "beat"
    worker = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('.')\n    time.sleep(0.01)"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {worker!r}]).wait()"
    with pytest.raises(subprocess.TimeoutExpired):
        launching.run_to_end([sys.executable, "-c", launcher], 3)
    time.sleep(0.5)
    beats = beat.stat().st_size
    time.sleep(0.5)
    assert beats == beat.stat().st_size > 0


def test_what_a_command_says_and_how_it_ended(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['WHO']); print('no', file=sys.stderr); sys.exit(3)"
    done = launching.run_to_end([sys.executable, "-c", code], 60, tmp_path, {"WHO": "you"})
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} you\n", "no\n")
