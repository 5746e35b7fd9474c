"""The figures of a training run, as they are now and as they were."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from hf_actnn import pages
from hf_actnn.convert import controller_of
from hf_actnn.errors import ConfigError, message
from hf_actnn.memory import MemoryReport, measure_next_forward
from hf_actnn.precision.controller import Controller
from hf_actnn.record import plot

_ENDINGS = (".html", ".json", ".png")


def record(model: nn.Module) -> Record:
    """Follow a converted model while it trains.

    `record.metrics()` gives figures for any logger, `record.save("bits.html")` a page of the whole run.

    Args:
        model: a converted model. Levels that choose bits want their :func:`controller` stepped as ever.

    Raises:
        ConversionError: the model is not converted, or its parts were converted one by one.
    """
    return Record(model)


class Record:
    """Figures of a converted model in training; `hf_actnn.record(model)` makes one.

    The next training forward pass is measured, and after that the first one after each update of the bits that
    :meth:`follow` or :meth:`metrics` notices. Measuring only counts: no tensor and no random number is touched.

    Args:
        measures: whether forward passes are measured. Not under torch.compile, which would compile the counting too.

    Attributes:
        measured: one entry per measured forward pass: ``step``, the controller's steps before it; ``saved_bytes`` and
            ``uncompressed_bytes``, what was kept for the backward pass and what was meant to be kept; ``samples`` of
            the batch.
    """

    def __init__(self, model: nn.Module, measures: bool = True) -> None:
        self.measured: list[dict[str, int]] = []
        self._measures = measures
        self._name = type(model).__name__
        self._places = {path: at for at, (path, _) in enumerate(model.named_modules())}
        self._controller = controller_of(model)
        # A record may outlive its model, and is read then.
        self._model = weakref.ref(model)
        self._probe = ExitStack()
        self._measure()

    @property
    def controller(self) -> Controller:
        """The model's, or the last one it had."""
        model = self._model()
        if model is not None:
            self._controller = controller_of(model)  # another one once the model was converted anew
        return self._controller

    def metrics(self) -> dict[str, float]:
        """The figures as they are now, under names for a logger.

        * ``actnn_ratio``: bytes meant to be kept for the backward pass over the bytes kept,
        * ``actnn_bytes_per_sample``: bytes kept, per sample of the batch,
        * ``actnn_bits``: bits per quantised value on average, once bits were chosen,
        * ``actnn_added_variance``: the variance that quantisation adds to the gradient, as a share of the mini-batch's
          own, once that is known.

        The first two are those of the newest measured forward pass. It calls :meth:`follow`.
        """
        found: dict[str, float] = {}
        if self.measured and self.measured[-1]["saved_bytes"]:
            newest = self.measured[-1]
            found["actnn_ratio"] = newest["uncompressed_bytes"] / newest["saved_bytes"]
            found["actnn_bytes_per_sample"] = newest["saved_bytes"] / newest["samples"]
        history = self.controller.history
        if history:
            found["actnn_bits"] = history[-1]["average_bits"]
            if math.isfinite(history[-1]["added_variance"]):
                found["actnn_added_variance"] = history[-1]["added_variance"]
        self.follow()
        return found

    def follow(self) -> None:
        """Have the next training forward pass measured if the bits were chosen anew since the last one."""
        if len(self.controller.history) != self._updates:
            self._measure()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values.

        Returns:
            ``model``; ``setting``, its level or bits in a word; ``config``; ``steps``; ``measured`` as above;
            ``updates``, the controller's history, None for a variance that is not known; ``tensors``, one entry per
            kept tensor whose bits were chosen: its ``name``, the ``layer`` (module path) that saves it, its ``values``
            per sample, and its average ``bits`` after each update (None where it was not seen); ``layers``, the same by
            layer, weighted by the values. Both in the order of the model's modules.
        """
        owner = self.controller
        values = owner.values()
        tensors = [
            {"name": name, "layer": name.partition(":")[0], "values": values[name], "bits": bits}
            for name, bits in owner.chosen.items()
        ]
        tensors.sort(key=lambda one: self._places.get(one["layer"], len(self._places)))
        return {
            "model": self._name,
            "setting": owner.config.level if owner.config.bits is None else f"bits={owner.config.bits}",
            "config": owner.config.to_dict(),
            "steps": owner.steps,
            "measured": [dict(entry) for entry in self.measured],
            "updates": [{key: _known(value) for key, value in entry.items()} for entry in owner.history],
            "layers": _by_layer(tensors, len(owner.history)),
            "tensors": tensors,
        }

    def save(self, path: str | Path) -> None:
        """Write the record: a page that needs nothing else (.html), a picture (.png, needs matplotlib), or numbers
        (.json). Its folder is made where there is none.

        Raises:
            ConfigError: the name ends in something else.
            NotAvailableError: a picture without matplotlib.
        """
        path = Path(path)
        check_ending(path, "Record.save")
        found = self.to_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            plot.save(found, path)
        elif path.suffix == ".html":
            path.write_text(page(found), encoding="utf-8")
        else:
            path.write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")

    def close(self) -> None:
        """Measure no more; what was recorded stays."""
        self._probe.close()

    def _measure(self) -> None:
        self._probe.close()
        self._updates = len(self.controller.history)
        model = self._model()
        if model is not None and self._measures:
            self._probe = measure_next_forward(model, self._take)

    def _take(self, memory: MemoryReport, samples: int) -> None:
        self.measured.append(
            {
                "step": self.controller.steps,
                "saved_bytes": memory.saved_bytes,
                "uncompressed_bytes": memory.uncompressed_bytes,
                "samples": samples,
            }
        )


def page(found: Mapping[str, Any]) -> str:
    """What `Record.to_dict` returns, as an HTML page."""
    return pages.fill("record", f"{found['model']}: bits by layer over time", found)


def check_ending(path: Path, where: str) -> None:
    """Refuse a file that :meth:`Record.save` could not write, before a run whose record is meant for it.

    Raises:
        ConfigError: its name ends in something else.
        NotAvailableError: a picture without matplotlib.
    """
    if path.suffix not in _ENDINGS:
        raise ConfigError(
            message(
                "there is no such form of a record",
                where=where,
                expected=f"a name that ends in {', '.join(_ENDINGS)}",
                received=str(path),
                next_step="Name a page (.html), a picture (.png) or numbers (.json)",
            )
        )
    if path.suffix == ".png":
        pages.need_matplotlib(where)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _by_layer(tensors: list[dict[str, Any]], updates: int) -> list[dict[str, Any]]:
    inside: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        inside.setdefault(tensor["layer"], []).append(tensor)
    return [
        {
            "layer": layer,
            "values": sum(one["values"] for one in found),
            "bits": [_mean(found, at) for at in range(updates)],
        }
        for layer, found in inside.items()
    ]


def _mean(tensors: list[dict[str, Any]], at: int) -> float | None:
    seen = [(one["values"], one["bits"][at]) for one in tensors if one["bits"][at] is not None]
    total = sum(values for values, _ in seen)
    return round(sum(values * bits for values, bits in seen) / total, 3) if total else None
