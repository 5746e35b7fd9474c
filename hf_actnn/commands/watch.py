"""A process of its own for a measurement, ended above a limit of memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Between two looks at a process; in more it could take much more than it is allowed.
POLL_SECONDS = 0.003
#: A process that takes longer hangs.
TRY_SECONDS = 1800
#: An environment with tensors in pages of their own, where the resident set is what is in use. glibc raises the size
#: from which on that is so, 128 KiB at first, up to 32 MiB as larger ones are freed, unless it is given; in its heap
#: what was freed may stay, and how much of it differs from run to run.
PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
#: Words of errors that are for want of memory, from allocators, CUDA's libraries and the operating system.
NO_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


def resident(process: int) -> int:
    """Bytes of a process's resident set now; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def high_water() -> int:
    """Peak of this program's resident set in bytes. Not getrusage's: that begins with what the parent had when it
    forked."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def available() -> int | None:
    """Bytes that the machine could still give; None where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


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
