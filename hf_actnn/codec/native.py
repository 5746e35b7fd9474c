"""Finds the compiled kernels, on first use, or says why it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from hf_actnn.errors import ActNNWarning, NativeError, message


class _Kernels:
    """One compiled module."""

    def __init__(self, kind: str, build: str, cost: str) -> None:
        self.kind = kind
        self.name = f"hf_actnn._native_{kind.lower()}"
        self.build = build
        self.cost = cost
        self.found: ModuleType | None = None
        self.reason = ""
        self.looked = False
        self._warned = False
        self._lock = threading.Lock()

    def module(self) -> ModuleType | None:
        """The module, or None where there is none, with one warning that says what that costs."""
        if not self.looked:
            self.look()
        if self.found is None and not self._warned:
            self._warned = True
            warnings.warn(
                message(
                    f"The compiled {self.kind} kernels are missing, so {self.cost}",
                    expected=f"a module {self.name}",
                    next_step=self.build,
                ),
                ActNNWarning,
                stacklevel=4,
            )
        return self.found

    def look(self) -> None:
        """Load the module if it is there.

        Raises:
            NativeError: it is there but cannot be loaded.
        """
        with self._lock:
            if self.looked:
                return
            if importlib.util.find_spec(self.name) is None:
                self.reason = f"{self.name} is not built"
                self.looked = True
                return
            try:
                self.found = importlib.import_module(self.name)
            except Exception as error:  # the loader's reasons differ: OSError, ImportError, our own ValueError
                # Not remembered: the next use says it again instead of quietly taking the slow path.
                self.reason = f"{type(error).__name__}: {error}"
                raise NativeError(
                    message(
                        f"The compiled {self.kind} kernels are there but cannot be loaded",
                        where=self.name,
                        received=self.reason,
                        next_step=f"{self.build}, or delete the file to run on plain torch",
                    )
                ) from error
            self.looked = True

    def available(self) -> bool:
        """Whether they can be loaded; never warns or raises."""
        try:
            if not self.looked:
                self.look()
        except NativeError:
            pass
        return self.found is not None


_cpu = _Kernels(
    "CPU",
    "Build it with `HF_ACTNN_BUILD=cpu pip install -e . --no-build-isolation` (a C++17 compiler is all it needs)",
    "plain torch packs and unpacks, 10 to 100 times slower",
)
_cuda = _Kernels(
    "CUDA",
    "Build it with `HF_ACTNN_BUILD=cuda pip install -e . --no-build-isolation` (it needs nvcc, and no GPU)",
    "plain torch packs and unpacks CUDA tensors: some 400 kernel launches and several temporaries of the tensor's size "
    "where one launch would do",
)
_probed: set[int] = set()


def module() -> ModuleType | None:
    """The compiled module for the CPU, or None where there is none, with one warning that says what that costs.

    Raises:
        NativeError: the module is there but cannot be loaded; the text ends with the loader's own words.
    """
    return _cpu.module()


def cuda(device: int) -> ModuleType | None:
    """The compiled module for CUDA devices, or None where there is none, with one warning that says what that costs.

    Args:
        device: number of the device that it is wanted for.

    Raises:
        NativeError: the module cannot be loaded, or the device cannot run what is in it.
    """
    kernels = _cuda.module()
    if kernels is not None and device not in _probed:
        try:
            with torch.cuda.device(device) if torch.cuda.is_available() else nullcontext():
                kernels.probe(device)
        except RuntimeError as error:
            raise NativeError(
                message(
                    "The compiled CUDA kernels do not run on this device",
                    where=f"cuda:{device}",
                    expected=f"a driver for this runtime, and a device of an architecture in {kernels.architectures()}",
                    received=str(error),
                    next_step="Update the driver, or build for the device with TORCH_CUDA_ARCH_LIST set to its "
                    f"capability, or delete {_cuda.name} to run on plain torch",
                )
            ) from error
        _probed.add(device)
    return kernels


def status() -> dict[str, Any]:
    """What is in use on the CPU, for people; never warns or raises.

    Returns:
        ``available``, ``variant`` (avx512, avx2 or portable), ``threads`` (where they come from) and ``reason`` (why
        none is).
    """
    if not _cpu.available() or _cpu.found is None:
        return {"available": False, "variant": None, "threads": None, "reason": _cpu.reason}
    return {
        "available": True,
        "variant": _cpu.found.variant(),
        "threads": _cpu.found.thread_backend(),
        "reason": None,
    }


def cuda_status() -> dict[str, Any]:
    """What is built for CUDA devices, for people; never warns or raises, and asks nothing of a driver.

    Returns:
        ``available``, ``architectures`` (those built for, as TORCH_CUDA_ARCH_LIST names them) and ``reason`` (why none
        is).
    """
    if not _cuda.available() or _cuda.found is None:
        return {"available": False, "architectures": None, "reason": _cuda.reason}
    return {"available": True, "architectures": _cuda.found.architectures(), "reason": None}
