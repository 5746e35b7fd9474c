"""Train vision models in a fraction of the memory: activations are kept for backward as randomly quantised codes."""

from __future__ import annotations

import importlib
from typing import Any

from hf_actnn import errors, nn
from hf_actnn.codec import PackedTensor, quantize
from hf_actnn.config import ActNNConfig
from hf_actnn.convert import ConversionReport, controller, convert, is_converted, report, revert
from hf_actnn.errors import ActNNError, ActNNWarning
from hf_actnn.fidelity import VarianceReport, variance_report
from hf_actnn.memory import MemoryReport, track_memory
from hf_actnn.record import Record, record

__version__ = "0.1.0.dev0"

#: Names that need transformers, imported when they are first used.
_LAZY = dict.fromkeys(("ActNNCallback", "ActNNTrainer", "ActNNTrainingArguments"), "hf_actnn.integrations.trainer")

__all__ = [
    "ActNNCallback",
    "ActNNConfig",
    "ActNNError",
    "ActNNTrainer",
    "ActNNTrainingArguments",
    "ActNNWarning",
    "ConversionReport",
    "MemoryReport",
    "PackedTensor",
    "Record",
    "VarianceReport",
    "controller",
    "convert",
    "errors",
    "is_converted",
    "nn",
    "quantize",
    "record",
    "report",
    "revert",
    "track_memory",
    "variance_report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
