"""Which kept tensors cost the gradient how much: predicted from one step, and measured where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_actnn.errors import ConversionError, message
from hf_actnn.nn.mixin import membership
from hf_actnn.precision import sensitivity
from hf_actnn.precision.sensitivity import Reading
from hf_actnn.saving.session import Session


class VarianceRow(NamedTuple):
    """One kept tensor.

    Attributes:
        name: module path and operation, as in ``controller(model).bits()``.
        bits: of its values, on average.
        nbytes: of its codes, for the batch.
        predicted: variance that it adds to the gradient of all parameters, over the squared gradient.
        measured: the same by Monte Carlo; None if not asked for.
        standard_error: of ``measured``.
    """

    name: str
    bits: float
    nbytes: float
    predicted: float
    measured: float | None = None
    standard_error: float | None = None

    @property
    def module(self) -> str:
        return self.name.partition(":")[0]


class VarianceReport:
    """What quantisation adds to the gradient's variance, by kept tensor.

    Attributes:
        rows: :class:`VarianceRow` of each quantised tensor, the most harmful first.
        predicted: their sum.
        measured, standard_error: of all together by Monte Carlo; None if not asked for.
        minibatch: variance of the gradient over the drawing of the batch, over the squared gradient; nan if it could
            not be told. Told from the samples of one batch as if they did not see each other: in trainings of a
            ResNet-20, whose batch normalisations let them, up to 4.2 times what it was between batches, of a ViT
            up to 2.4 times (`benchmarks/accuracy/variance.py`). `bits="auto"` goes by differences between steps.
    """

    def __init__(
        self, rows: list[VarianceRow], minibatch: float, measured: float | None, standard_error: float | None
    ) -> None:
        self.rows = sorted(rows, key=lambda row: -row.predicted)
        self.predicted = sum(row.predicted for row in rows)
        self.minibatch, self.measured, self.standard_error = minibatch, measured, standard_error

    def by_module(self, depth: int | None = None) -> dict[str, float]:
        """Predicted variance by module path, paths cut to ``depth`` parts."""
        found: dict[str, float] = {}
        for row in self.rows:
            path = ".".join(row.module.split(".")[:depth]) if depth is not None else row.module
            found[path] = found.get(path, 0.0) + row.predicted
        return found

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("kept tensor", "bits", "MB", "predicted", "share", "measured")]
        for row in self.rows:
            share = row.predicted / self.predicted if self.predicted else 0.0
            table.append(
                (
                    row.name,
                    f"{row.bits:.3g}",
                    f"{row.nbytes / 1e6:.3f}",
                    f"{row.predicted:.3g}",
                    f"{100 * share:.1f} %",
                    _with_error(row.measured, row.standard_error),
                )
            )
        total = sum(row.nbytes for row in self.rows) / 1e6
        measured = _with_error(self.measured, self.standard_error)
        table.append(("all", "", f"{total:.3f}", f"{self.predicted:.3g}", "", measured))
        if self.measured is None:
            table = [line[:-1] for line in table]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = ["Variance that quantisation adds to the gradient, relative to the squared gradient"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        if math.isfinite(self.minibatch) and self.minibatch > 0:
            lines.append(
                f"The drawing of the mini-batch adds at most about {self.minibatch:.3g}, told from this one; "
                f"quantisation {100 * self.predicted / self.minibatch:.2g} % of that."
            )
        return "\n".join(lines)

    def plot(self, path: str | Path, most: int = 30) -> None:
        """Write a picture: predicted variance of the most harmful tensors, with the measured one where there is one.

        Raises:
            ImportError: matplotlib is not installed; it comes with ``pip install hf-actnn[plots]``.
        """
        from matplotlib.figure import Figure

        rows = self.rows[:most][::-1]
        figure = Figure(figsize=(8, 1.2 + 0.22 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(rows)), [row.predicted for row in rows], color="#4477aa", label="predicted")
        measured = [
            (at, row.measured, row.standard_error or 0.0) for at, row in enumerate(rows) if row.measured is not None
        ]
        if measured:
            axes.errorbar(
                [value for _, value, _ in measured],
                [at for at, _, _ in measured],
                xerr=[2 * error for _, _, error in measured],
                fmt="o",
                color="#cc6677",
                label="measured, two standard errors",
            )
        axes.set_yticks(range(len(rows)), [f"{row.name}  {row.bits:.3g} bits" for row in rows], fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("variance added to the gradient / squared gradient")
        axes.legend()
        figure.savefig(path, dpi=150)


def _with_error(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:.3g} ± {error:.1g}"


def variance_report(model: nn.Module, step_fn: Callable[[], Any], draws: int = 0) -> VarianceReport:
    """The variance that quantisation adds to the gradient, by kept tensor (Chen et al. 2021, section 4.1).

    Args:
        model: a converted model, in training mode, at any level; its bits are taken as they are.
        step_fn: runs one forward and backward pass, on the same batch at every call, and no optimizer step. Gradients,
            buffers and torch's random state are afterwards what they were.
        draws: of the rounding, for a Monte Carlo measurement beside the prediction: first of all tensors together, then
            of each one with all others kept exactly. It takes `draws` steps per tensor; 0 leaves it out.

    Raises:
        ConversionError: the model is not converted, its parts were converted one by one, or the step made no gradient.
    """
    sessions = {id(m.session): m.session for module in model.modules() if (m := membership(module)) is not None}
    if len(sessions) != 1:
        raise ConversionError(
            message(
                "there is nothing to report" if not sessions else "the parts of this model were converted one by one",
                where=type(model).__name__,
                expected="a model that convert() was called on as a whole",
                received=f"{len(sessions)} converted models in one",
                next_step="Call hf_actnn.convert(model) first",
            )
        )
    (session,) = sessions.values()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    watch = _Watch(session)
    with _as_before(model, session):
        session.adaptation = watch

        def gradient(**how: Any) -> Tensor:
            watch.set(**how)
            for parameter in parameters:
                parameter.grad = None
            torch.manual_seed(0)
            step_fn()
            grads = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
            if not grads:
                raise ConversionError(
                    message(
                        "the step made no gradient",
                        where="variance_report",
                        expected="a step_fn that runs the model and calls backward()",
                        next_step="Put the model in training mode, and call loss.backward() in step_fn",
                    )
                )
            return torch.cat(grads)

        exact = gradient(exact=True)
        scale = float(exact.double().square().sum()) or math.nan
        gradient(collect=True)
        reading = Reading({}, 0.0, math.nan, 0.0) if watch.tape is None else sensitivity.read(watch.tape)
        watch.tape = None

        def measured(**how: Any) -> tuple[float, float] | tuple[None, None]:
            if draws < 2:
                return None, None
            errors = torch.tensor(
                [float((gradient(**how).double() - exact).square().sum()) / scale for _ in range(draws)]
            )
            return float(errors.mean()), float(errors.std()) / math.sqrt(draws)

        together = measured()
        rows = [
            VarianceRow(key, *watch.sizes[key], one.variance / scale, *measured(only=key))
            for key, one in reading.kept.items()
        ]
    return VarianceReport(rows, reading.minibatch / scale, *together)


class _Watch:
    """Stands in for the controller while a report is made: same bits, but it collects, and can keep others exactly."""

    adaptive = True

    def __init__(self, session: Session) -> None:
        self.behind = session.adaptation
        self.controller = session.controller
        self.tape: Any = None
        self.sizes: dict[str, tuple[float, float]] = {}
        self.steps = 0
        self.set()

    def set(self, exact: bool = False, collect: bool = False, only: str | None = None) -> None:
        self.exact, self.collect, self.only = exact, collect, only

    def next_forward(self) -> int:
        self.steps += 1
        return self.steps

    def step(self) -> None:
        """A step function may tell the controller; here that means nothing."""

    def identify(self, ids: Any) -> None:
        if self.behind is not None:
            self.behind.identify(ids)

    def begin(self, samples: int, root: torch.nn.Module) -> Any:
        return self.tape if self.collect else False

    def gathered(self, parameter: torch.nn.Parameter) -> None:
        pass

    def keeps(self, key: str) -> bool:
        return self.exact or (self.only is not None and key != self.only)

    def widths(self, key: str, samples: int, policy: Any, spread: Callable[[], Tensor]) -> int | Tensor:
        return policy.uniform if self.behind is None else self.behind.widths(key, samples, policy, spread)

    def recorded(self, tape: Any) -> None:
        self.tape = tape
        for key, item in tape.items.items():
            bits = float(item.bits.mean())
            self.sizes[key] = bits, item.numel * len(item.bits) * bits / 8

    def failed(self) -> None:
        pass

    def end(self, outputs: list[Tensor], samples: int) -> None:
        pass


@contextmanager
def _as_before(model: nn.Module, session: Session) -> Iterator[None]:
    """Leave no trace in the model, its session or torch's random state."""
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    adaptation, controller, notes = session.adaptation, session.controller, session.notes
    devices = {parameter.device.index for parameter, _ in grads if parameter.is_cuda}
    with torch.random.fork_rng(devices=[device for device in devices if device is not None]):
        try:
            session.controller = _Watch(session)  # counts the forward passes of the report apart from the run's
            yield
        finally:
            session.adaptation, session.controller, session.notes = adaptation, controller, notes
            for parameter, grad in grads:
                parameter.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
