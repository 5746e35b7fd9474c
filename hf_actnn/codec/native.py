"""Finds the compiled kernels, on first use, or says why it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from types import ModuleType
from typing import Any

from hf_actnn.errors import ActNNWarning, NativeError, message

NAME = "hf_actnn._native_cpu"
_BUILD = "Build it with `HF_ACTNN_BUILD=cpu pip install -e . --no-build-isolation` (a C++17 compiler is all it needs)"

_lock = threading.Lock()
_looked = False
_warned = False
_module: ModuleType | None = None
_reason = ""


def module() -> ModuleType | None:
    """The compiled module, or None where there is none, with one warning that says what that costs.

    Raises:
        NativeError: the module is there but cannot be loaded; the text ends with the loader's own words.
    """
    global _warned
    if not _looked:
        _look()
    if _module is None and not _warned:
        _warned = True
        warnings.warn(
            message(
                "The compiled CPU kernels are missing, so plain torch packs and unpacks, 10 to 100 times slower",
                expected=f"a module {NAME}",
                next_step=_BUILD,
            ),
            ActNNWarning,
            stacklevel=3,
        )
    return _module


def _look() -> None:
    global _looked, _module, _reason
    with _lock:
        if _looked:
            return
        if importlib.util.find_spec(NAME) is None:
            _reason = f"{NAME} is not built"
            _looked = True
            return
        try:
            _module = importlib.import_module(NAME)
        except Exception as error:  # the loader's reasons differ: OSError, ImportError, our own ValueError
            # Not remembered: the next use says it again instead of quietly taking the slow path.
            _reason = f"{type(error).__name__}: {error}"
            raise NativeError(
                message(
                    "The compiled CPU kernels are there but cannot be loaded",
                    where=NAME,
                    received=_reason,
                    next_step=f"{_BUILD}, or delete the file to run on plain torch",
                )
            ) from error
        _looked = True


def status() -> dict[str, Any]:
    """What is in use, for people; never warns or raises.

    Returns:
        ``available``, ``variant`` (avx512, avx2 or portable), ``threads`` (where they come from) and ``reason`` (why
        none is).
    """
    try:
        if not _looked:
            _look()
    except NativeError:
        pass
    if _module is None:
        return {"available": False, "variant": None, "threads": None, "reason": _reason}
    return {"available": True, "variant": _module.variant(), "threads": _module.thread_backend(), "reason": None}
