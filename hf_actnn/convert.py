"""Turn compression on and off for a model, and say what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from hf_actnn import nn as _counterparts  # noqa: F401  the registry is filled by importing it
from hf_actnn.config import ActNNConfig
from hf_actnn.errors import ConversionError, message
from hf_actnn.nn.mixin import Member, check_forward, join, leave, membership
from hf_actnn.nn.registry import KINDS, kind_of
from hf_actnn.precision.controller import Controller
from hf_actnn.saving.policy import policies
from hf_actnn.saving.session import Observation, Session


def convert(
    model: nn.Module, config: ActNNConfig | str | Mapping[str, Any] | None = None, **overrides: Any
) -> nn.Module:
    """Keep a model's activations compressed for the backward pass. In place; the same object is returned.

    Only classes change: parameters, buffers, hooks, names, optimizer references stay what they are. Convert before
    wrapping in DDP, FSDP or an optimizer or after, as suits. A converted model is reconfigured: it begins anew, with a
    new :func:`controller` that knows nothing of bits chosen before.

    Args:
        model: any module. Compression is on while it, or a part of it, runs in training mode with gradients.
        config: an :class:`ActNNConfig`, a level (``"L3"``), a mapping of fields or a path of JSON; ``bits="auto"`` if
            nothing is named. Levels that choose bits want :func:`controller`; until its first step all tensors get the
            average, or 4 bits.
        **overrides: fields of the configuration to replace, for example ``bits=2``.

    Raises:
        ConfigError: a field that cannot mean anything, or a pattern that matches no module.
        ConversionError: something that cannot be converted. The model is then as it was.
    """
    _check_model(model)
    if config is None:
        resolved = ActNNConfig.from_dict(overrides, where="the keyword arguments")
    else:
        resolved = ActNNConfig.resolve(config)
        resolved = resolved.replace(**overrides) if overrides else resolved
    modules = dict(_convertible(model))
    found = policies(resolved, modules)
    if resolved.effective_bits is not None and all(policy.bits is None for policy in found.values()):
        raise ConversionError(
            message(
                "everything in the model is left out",
                where=type(model).__name__,
                expected="at least one module to compress",
                received=f"skip={resolved.skip!r}, overrides={dict(resolved.overrides)!r}",
                next_step="Narrow the patterns, or use level 'L0'",
            )
        )
    session = Session(resolved, adaptation=Controller(resolved))
    before = {path: (membership(module), type(module)) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            join(module, Member(path, found[path], session))
    except Exception as error:
        for done, (member, _) in before.items():
            if member is not None:
                join(modules[done], member)
            else:
                leave(modules[done])
            if done == path:
                break
        raise ConversionError(
            message(
                "a module's class does not take a subclass, so the model was left as it was",
                where=path or type(model).__name__,
                expected="a class that can be subclassed and assigned",
                received=f"{before[path][1].__qualname__}: {type(error).__name__}: {error}",
                next_step="Convert the parts around it one by one, without this module",
            )
        ) from error
    return model


def controller(model: nn.Module) -> Controller:
    """The controller of a converted model, which chooses bits at the levels that do.

    Args:
        model: a converted model, or what wraps it.

    Raises:
        ConversionError: the model is not converted, or its parts were converted one by one.
    """
    found = controller_of(model)
    found.asked_for = True
    return found


def controller_of(model: nn.Module) -> Controller:
    """As :func:`controller`, for those who only look: it does not count as a promise to call ``step()``.

    Raises:
        ConversionError: as there.
    """
    found: dict[int, Controller] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        member = membership(module)
        if member is not None and member.session.controller is not None:
            found[id(member.session.controller)] = cast(Controller, member.session.controller)
    if len(found) != 1:
        received = f"{len(found)} parts that were converted by themselves" if found else "no converted model"
        if not found and is_converted(model):
            received = "layers of hf_actnn.nn in a model that is not converted"
        raise ConversionError(
            message(
                "there is no controller" if not found else "the parts of this model have a controller each",
                where=type(model).__name__,
                expected="a model that convert() was called on as a whole",
                received=received,
                next_step="Call hf_actnn.convert(model) first",
            )
        )
    (only,) = found.values()
    return only


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: classes, behaviour and pickles are as before. A plain model is left as it is."""
    if not isinstance(model, nn.Module):
        raise ConversionError(_not_a_module(model))
    for module in model.modules():
        leave(module)
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether a model, or any part of it, is converted."""
    return isinstance(model, nn.Module) and any(membership(module) is not None for module in model.modules())


def _not_a_module(model: Any) -> str:
    return message(
        "this is not a model",
        expected="a torch.nn.Module",
        received=type(model).__name__,
        next_step="Pass the module itself; of a pipeline or a trainer that is its .model",
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(_not_a_module(model))
    for path, module in model.named_modules():
        if (
            isinstance(module, torch._dynamo.OptimizedModule)
            or getattr(module, "_compiled_call_impl", None) is not None
        ):
            raise ConversionError(
                message(
                    "a compiled model cannot be converted",
                    where=path or type(model).__name__,
                    expected="the model before torch.compile",
                    received=type(module).__name__,
                    next_step="Convert first, and compile the converted model; of a torch.compile'd model the "
                    "original is model._orig_mod",
                )
            )
        check_forward(module, path or type(model).__name__)
    if not any(any(cls in KINDS for cls in type(module).__mro__) for module in model.modules()) and (
        not any(True for _ in model.parameters())
    ):
        raise ConversionError(
            message(
                "there is nothing to convert",
                where=type(model).__name__,
                expected="a model with parameters, or with a layer that hf_actnn.nn knows",
                received=f"{sum(1 for _ in model.modules())} modules, none of them either",
                next_step="Check that this is the model you train",
            )
        )


def _convertible(model: nn.Module) -> Any:
    """(path, module) of every module that has a forward pass of its own that Python runs."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
            continue  # ModuleList and the like are never called
        yield path, module


class Row(NamedTuple):
    """One line of a report.

    Attributes:
        module: path; the root's is empty.
        kind: of the module, or the name of the operation whose saves were observed.
        kept: how its saves are kept.
        bits: bits per value where they are coded, on average where they are chosen.
        saves: how many in the last training forward pass; 0 before there was one.
        nbytes: their bytes before compression, a tensor that several operations save counted for each.
        reason: why they are exact.
    """

    module: str
    kind: str
    kept: str
    bits: float | None
    saves: int
    nbytes: int
    reason: str


class ConversionReport:
    """What conversion does, module by module; with what was observed in the last training forward pass."""

    def __init__(self, rows: list[Row], config: ActNNConfig, observed: bool) -> None:
        self.rows = rows
        self.config = config
        self.observed = observed

    @property
    def left_alone(self) -> list[Row]:
        """The rows that are kept exactly although something could have been saved."""
        return [row for row in self.rows if row.kept == "exact"]

    def __str__(self) -> str:
        head = f"hf_actnn {self.config.level}" + (f", bits={self.config.bits}" if self.config.bits else "")
        lines = [
            f"{head}: {len({row.module for row in self.rows})} modules"
            + ("" if self.observed else " (no training forward pass seen yet: what it saves is listed after one)")
        ]
        table = [("module", "kind", "kept as", "bits", "saves", "MB before", "reason")]
        for row in self.rows:
            table.append(
                (
                    row.module or "(model)",
                    row.kind,
                    row.kept,
                    "" if row.bits is None else f"{row.bits:.3g}",
                    str(row.saves or ""),
                    f"{row.nbytes / 1e6:.3f}" if row.saves else "",
                    row.reason,
                )
            )
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        if self.observed:
            ways: dict[str, int] = {}
            for row in self.rows:
                way = row.kept.partition(":")[0]
                ways[way] = ways.get(way, 0) + row.nbytes
            shares = ", ".join(f"{way} {nbytes / 1e6:.3f}" for way, nbytes in sorted(ways.items()) if nbytes)
            lines.append(f"MB before, in all {sum(ways.values()) / 1e6:.3f}: {shares}")
        return "\n".join(lines)


def report(model: nn.Module) -> ConversionReport:
    """What is kept how, and what was left alone and why.

    Before the first training forward pass there is one row per module, with what the configuration says of it; after
    it, one row per module, operation and way of keeping, as observed.

    Raises:
        ConversionError: the model is not converted.
    """
    members = (
        {path: (module, found) for path, module in model.named_modules() if (found := membership(module)) is not None}
        if isinstance(model, nn.Module)
        else {}
    )
    if not members:
        raise ConversionError(
            message(
                "there is no report",
                where=type(model).__name__,
                expected="a converted model",
                received="a model without converted modules",
                next_step="Call hf_actnn.convert(model) first",
            )
        )
    # Parts may have been converted one by one: each has a session, and counts its paths from its own root.
    roots: dict[int, tuple[Session, str]] = {}
    bits: dict[tuple[int, str], float | None] = {}
    for path, (_, found) in members.items():
        root = path.removesuffix(found.path).rstrip(".") if path.endswith(found.path) else path
        roots.setdefault(id(found.session), (found.session, root))
        bits[id(found.session), found.path] = found.policy.bits
    config = next(iter(members.values()))[1].session.config
    rows = [
        _observed_row(note, root, _bits_of(session, note, bits.get((key, note.path))))
        for key, (session, root) in roots.items()
        for note in session.last
    ]
    observed = bool(rows)
    if not observed:
        rows = [
            Row(
                path,
                kind_of(module),
                "exact" if found.policy.bits is None else "by its operations' rules",
                found.policy.bits,
                0,
                0,
                found.policy.reason,
            )
            for path, (module, found) in members.items()
        ]
    return ConversionReport(rows, config, observed)


def _bits_of(session: Session, note: Observation, asked: float | None) -> float | None:
    """The bits chosen for what an operation made codes of, by their names in the controller; those asked for before."""
    plan = cast(Controller, session.controller).bits() if session.controller is not None else {}
    first = f"{note.path}:{note.function}"
    chosen = [value for key, value in plan.items() if key == first or key.startswith(first + "#")]
    return sum(chosen) / len(chosen) if chosen else asked


def _observed_row(note: Observation, root: str, bits: float | None) -> Row:
    return Row(
        ".".join(part for part in (root, note.path) if part),
        note.function,
        note.kind,
        bits if note.kind == "quantized" else None,
        note.saves,
        note.nbytes,
        note.reason if note.kind == "exact" else "",
    )
