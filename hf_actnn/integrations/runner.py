"""Run a script in this process as `python script.py` or `python -m module` would."""

from __future__ import annotations

import builtins
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from hf_actnn.errors import ActNNError, message
from hf_actnn.integrations.unmodified import say


def run(target: str, arguments: Sequence[str], *, module: bool = False) -> None:
    """Run it as `__main__`, with its own `sys.argv` and first entry of `sys.path`.

    What it raises, SystemExit included, goes through. An error that ends the process is shown without the frames that
    are not the script's.

    Args:
        target: path of a Python file, or a module's name if `module`.
        arguments: the script's.
        module: as `python -m`.
    """
    sys.argv = [target, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(target))
    sys.excepthook = _show_error
    if module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        _run_file(os.path.abspath(target))


def _run_file(path: str) -> None:
    """runpy would show the script its own path in sys.argv[0] and give back `__main__` before the process ends."""
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def check(target: str, module: bool) -> None:
    """Raise ActNNError where there is no such script or module."""
    if module:
        sys.path.insert(0, os.getcwd())
        try:
            there = importlib.util.find_spec(target.partition(".")[0]) is not None
        finally:
            del sys.path[0]
    else:
        there = os.path.isfile(target)
    if not there:
        raise ActNNError(
            message(
                f"there is no such {'module' if module else 'script'}",
                where=target,
                expected="a module that `python -m` can run" if module else "the path of a Python file",
                received="a name that cannot be imported" if module else f"no file in {os.getcwd()}",
                next_step="Options of hf-actnn run stand before the script, the script's own behind it",
            )
        )


def _show_error(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """As Python shows it, but from the script on."""
    at = frames
    while at is not None:
        own = at.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>")
        at = at.tb_next
        if own:
            frames = at
    sys.__excepthook__(kind, error.with_traceback(frames), frames)
    if isinstance(error, ModuleNotFoundError) and error.name and not _is_there(error.name):
        say(
            message(
                "the script needs a package that is not there",
                where=error.name,
                expected="it beside hf_actnn in the same environment",
                received=f"nothing of that name for {sys.executable}",
                next_step="Install it there; many examples list what they need in a requirements.txt beside them",
            )
        )


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None
