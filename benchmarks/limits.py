"""Processes under a limit of memory, and the largest size that fits one."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Between two looks at a process; in more it could take much more than it is allowed.
POLL_SECONDS = 0.003
#: A process that takes longer hangs.
TRY_SECONDS = 1800
#: How many times the largest size that fitted the next one may be: a line through small sizes is not to be trusted far.
JUMP = 16
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def parse(text: str) -> int:
    """Bytes of `16GB`, `1.5GiB`, `500MB`.

    Raises:
        ValueError: it is none of that kind.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    if found is None:
        raise ValueError(f"a limit is {text!r}; expected something like 16GB, 1.5GiB or 500MB")
    return int(float(found.group(1)) * UNITS[found.group(2)])


def resident(process: int) -> int:
    """Bytes of a process's resident set now; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def watched(
    command: list[str],
    limit: int | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = TRY_SECONDS,
) -> dict[str, Any]:
    """Run a command that prints JSON, and end it above a limit of its resident set in bytes.

    Returns:
        What it printed, or ``status`` "out of memory" if it went above the limit, or was killed for memory;
        "error" with the text if it ended in any other way.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=out, stderr=told, env={**os.environ, **(environment or {})})
        start, above, late = time.monotonic(), False, False
        try:
            while process.poll() is None and not (above or late):
                time.sleep(POLL_SECONDS)
                above = limit is not None and resident(process.pid) > limit
                late = time.monotonic() - start > seconds
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        told.seek(0)
        lines, errors = out.read().splitlines(), told.read()
    if above or process.returncode == -signal.SIGKILL and not late:
        return {"status": "out of memory"}
    if late:
        return {"status": "error", "error": f"no result after {seconds:.0f} s"}
    if process.returncode or not lines:
        return {"status": "error", "error": errors[-2000:] or f"ended with {process.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    # Between two looks it may have been above.
    if limit is not None and found["status"] == "ok" and found["peak"] > limit:
        return {**found, "status": "out of memory"}
    return found


def search(
    attempt: Callable[[int], float | None], limit: float, first: int, cap: int, power: int = 1, tolerance: float = 0.02
) -> int:
    """The largest size that fits, to within a share of it or 1; 0 where nothing fits.

    Args:
        attempt: size -> peak in bytes, or None where it does not fit.
        limit: in bytes; it only aims the tries.
        first: size tried first.
        cap: the largest size to try.
        power: memory is about linear in this power of the size.
        tolerance: share of the size that may lie between what fits and what does not.
    """
    fits: dict[int, float] = {}
    low, high, size, pushed = 0, cap + 1, min(first, cap), 0
    while True:
        peak = attempt(size)
        if peak is None:
            high = size
        else:
            low, fits[size] = size, peak
        gap = max(1, int(tolerance * low))
        if high - low <= gap:
            return low
        aimed = _aimed(fits, low, high, limit, power, tolerance)
        # Away from the last try by at least the gap, and by twice as much each time the line leads nowhere. What lay
        # far ahead and did not fit leaves the line in doubt by a part of the way.
        if peak is None:
            bottom, top = low + gap, high - (max(gap, (high - low) // 8) << pushed)
        else:
            bottom, top = low + (gap << pushed), high - gap
        size = min(max(aimed, bottom), top) if bottom <= top else (low + high) // 2
        pushed = pushed + 1 if size != aimed else 0


def _aimed(fits: dict[int, float], low: int, high: int, limit: float, power: int, tolerance: float) -> int:
    """The size a little below where a line through two that fitted meets the limit: one that fits says more than one
    that does not."""
    if not fits:
        return high // 2
    if len(fits) == 1:
        return 2 * low
    # Far enough apart that noise does not tilt the line.
    before = max((size for size in fits if size <= low / 2), default=min(fits))
    slope = (fits[low] - fits[before]) / (low**power - before**power)
    # Where it does not rise, other things set the peak so far.
    room = (limit - fits[low]) / slope if slope > 0 else math.inf
    return int(min((low**power + room) ** (1 / power) * (1 - tolerance / 2), JUMP * low))
