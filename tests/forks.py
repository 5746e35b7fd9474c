"""Python commands in processes that are forked from one which has imported what they import.

On a small machine a script that imports torch and transformers starts in ten seconds, a fork in a fraction of one. What
it runs is what a new process would; what a new process does before and while it imports is tested with new processes.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
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
        self,
        words: Sequence[str],
        timeout: float,
        folder: Path,
        environment: Mapping[str, str],
        *,
        nested: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """What ``python *words`` does: a script or ``-m module``, and arguments.

        Args:
            timeout: in seconds; then the fork is ended, with all that it started.
            folder: to run it in.
            environment: all of it. What modules read as they are imported is the server's, but for OMP_NUM_THREADS.
            nested: a Python that it starts is a fork of it as well: see :func:`_forked`.

        Raises:
            subprocess.TimeoutExpired: it took longer.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            files = Path(place, "stdout"), Path(place, "stderr")
            job = [list(words), timeout, str(folder), dict(environment), [str(file) for file in files], nested]
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
    gc.freeze()  # or each collection in a fork would go through all that was imported
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


#: What starts a new process, for who asks `subprocess` for one.
_new_process = subprocess.Popen._execute_child  # type: ignore[attr-defined]


#: Of a new process's owner, mask and group -> what they are if nobody has set them.
_UNSET = {"gid": None, "gids": None, "uid": None, "umask": -1, "process_group": -1}


def _forked(process: Any, args: Any, *rest: Any) -> None:
    """Start a script of this project, or of a test, in a fork of the process that asks for one: of a launcher the
    ranks, of `hf-actnn estimate` its runs.

    What acts as an interpreter starts is not there in a fork: who has HF_ACTNN in the environment gets a new process.
    """
    given = inspect.signature(_new_process).bind(process, args, *rest).arguments
    environment = dict(os.environ if given["env"] is None else given["env"])
    words = _ours(args, environment)
    # What only a new process can have.
    special = any(given.get(name) for name in ("pass_fds", "shell", "preexec_fn", "executable"))
    special |= any(given.get(name, unset) != unset for name, unset in _UNSET.items())
    if not words or special:
        _new_process(process, args, *rest)
        return
    pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
    of_the_parent = [end for end in (pipes[1], pipes[2], pipes[4]) if end != -1]
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    if process.pid:
        process._child_created = True
        process._close_pipe_fds(*pipes)
        return
    code = 1
    try:
        for end in of_the_parent:
            os.close(end)  # or the end of what it reads would never come
        for number, end in enumerate((pipes[0], pipes[3], pipes[5])):
            if end != -1:
                os.dup2(end, number)
        if given["start_new_session"]:
            os.setsid()
        _forget()
        code = _python(words, str(given["cwd"] or os.getcwd()), environment)
    except BaseException:
        traceback.print_exc()
    finally:
        # Not as an interpreter ends: the launcher's objects are here, without the threads that they would wait for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ours(args: Any, environment: Mapping[str, str]) -> list[str]:
    """What Python is to run, where a fork can do it; nothing otherwise."""
    words = [str(word) for word in args] if isinstance(args, (list, tuple)) else []
    if words[:1] != [sys.executable] or any(name.startswith("HF_ACTNN") for name in environment):
        return []
    words = words[2:] if words[1:2] == ["-u"] else words[1:]
    script = words[:1] != [] and words[0].endswith(".py") and "site-packages" not in words[0]
    return words if script or words[:2] == ["-m", "hf_actnn.commands.probe"] else []


def _forget() -> None:
    """What a launcher has asked to be done on signals and at its end, and where its script is."""
    del sys.path[0]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    if "multiprocessing.util" in sys.modules:
        atexit.register(sys.modules["multiprocessing.util"]._exit_function)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]


def _python(words: list[str], folder: str, environment: Mapping[str, str]) -> int:
    """What ``python *words`` does up to its end, and the code that it would end with."""
    try:
        _run(words, folder, environment)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    return code


def _become(words: list[str], folder: str, environment: dict[str, str], files: list[str], nested: bool) -> None:
    """Do what a new process would that is given these words."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if nested:
        subprocess.Popen._execute_child = _forked  # type: ignore[attr-defined]
    _run(words, folder, environment)


def _run(words: list[str], folder: str, environment: Mapping[str, str]) -> None:
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
