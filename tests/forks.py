"""Python commands in processes that are forked from one which has imported what they import.

On a small machine a script that imports torch and transformers starts in ten seconds, a fork in a fraction of one. What
it runs is what a new process would; what a new process does before and while it imports is tested with new processes.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: What examples and scripts import that is not of this project.
HOSTS = (
    *("torch", "transformers.trainer", "accelerate", "accelerate.commands", "datasets", "timm", "torchvision"),
    "matplotlib.pyplot",
)
#: Seconds between looks at whether a fork has ended.
PAUSE = 0.05


class Forks:
    """A process that has imported some modules, and forks. It ends with the process that made it."""

    def __init__(self, modules: Sequence[str] = HOSTS) -> None:
        # HF_ACTNN is for a fork to have, and to act upon.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_ACTNN")}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def run(
        self, words: Sequence[str], timeout: float, folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """What ``python *words`` does: a script or ``-m module``, and arguments.

        Args:
            timeout: in seconds; then the fork is ended, with all that it started.
            folder: to run it in.
            environment: all of it. What modules read as they are imported is the server's, but for OMP_NUM_THREADS.

        Raises:
            subprocess.TimeoutExpired: it took longer.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            files = Path(place, "stdout"), Path(place, "stderr")
            job = [list(words), timeout, str(folder), dict(environment), [str(file) for file in files]]
            try:
                self._server.stdin.write(json.dumps(job) + "\n")
                self._server.stdin.flush()
                reply = self._server.stdout.readline()
            except BaseException:  # a reply that nobody took would be the next one's
                self.end()
                raise
            if not reply:
                self.end()
                raise RuntimeError(f"the process that forks has ended: {self._server.wait()}")
            code = json.loads(reply)
            if code is None:
                raise subprocess.TimeoutExpired(list(words), timeout)
            return subprocess.CompletedProcess(list(words), code, *(file.read_text() for file in files))

    def end(self) -> None:
        """With the fork that runs; the next who asks for a server gets another."""
        self._server.terminate()
        server.cache_clear()


@functools.cache
def server() -> Forks:
    """One for all tests of a process."""
    return Forks()


def _serve(modules: Sequence[str]) -> Any:
    """Fork for each line that comes in. Returns in the forks, with what to do."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for line in requests:
        job = json.loads(line)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            requests.close()
            replies.close()
            return job
        try:
            code = _wait(child, job[1])
        except BaseException:
            _kill(child)
            raise
        replies.write(json.dumps(code) + "\n")
        replies.flush()
    return None


def _wait(child: int, timeout: float) -> int | None:
    """The exit code; None where it took too long."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(PAUSE)
    _kill(child)
    os.waitpid(child, 0)
    return None


def _kill(child: int) -> None:
    """With what it has started, unless it has had no time to make a session of its own."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)


def _become(words: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """Do what a new process would that is given these words."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    first = folder if module else str(Path(words[0]).resolve().parent)
    own = [one for one in environment.get("PYTHONPATH", "").split(os.pathsep) if one]
    sys.path = [first, *own, *(one for one in sys.path if one not in inherited)]
    import numpy
    import torch

    numpy.random.seed()  # as a new process would, each of them otherwise
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder: what is in it has the names of packages
    work = _serve(sys.argv[1:])
    if work is not None:
        _become(work[0], *work[2:])
