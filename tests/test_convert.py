"""convert, revert and report: what they do, and that a model is untouched when they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn.errors import ActNNError, ConfigError, ConversionError
from hf_actnn.saving import compiled


def small() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())
    return nn.Sequential(body, nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 4))


def train(model: nn.Module) -> None:
    model(torch.randn(32, 64)).square().mean().backward()


def fingerprint(model: nn.Module) -> list:
    return [(path, type(module), sorted(module.__dict__)) for path, module in model.named_modules()]


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = torch.compile(nn.Linear(4, 4), backend="eager")

    def forward(self, x):
        return self.part(x)


def compiled_in_place() -> nn.Module:
    model = small()
    model[1].compile(backend="eager")
    return model


REFUSED = {
    "unknown level": (small, {"config": "L9"}, ConfigError, ["unknown level", "L0, L1, L2", "'L9'"]),
    "no bits": (small, {"bits": 0}, ConfigError, ["from 1 to 8", "Received 0"]),
    "too many bits": (small, {"bits": 9}, ConfigError, ["from 1 to 8", "Received 9"]),
    "fractional bits": (small, {"config": "L2", "bits": 2.5}, ConfigError, ["is an average", "2.5"]),
    "impossible budget": (small, {"bits": 0.5}, ConfigError, ["no allocation can meet", "0.5"]),
    "unknown field": (small, {"bit": 2}, ConfigError, ["'bit'", "keyword arguments", "bits"]),
    "unknown key": (small, {"config": {"levle": "L1"}}, ConfigError, ["'levle'", "level", "spelling"]),
    "skip of nothing": (small, {"skip": ("classifier",)}, ConfigError, ["`skip`", "'classifier'", "named_modules"]),
    "override of nothing": (small, {"overrides": {"head": 8}}, ConfigError, ["`overrides`", "'head'", "named_modules"]),
    "everything skipped": (small, {"skip": ("*",)}, ConversionError, ["left out", "skip=('*',)", "'L0'"]),
    "nothing to convert": (
        lambda: nn.Sequential(nn.Identity(), nn.Flatten()),
        {},
        ConversionError,
        ["nothing to convert", "Sequential", "3 modules", "the model you train"],
    ),
    "an empty module": (nn.Module, {}, ConversionError, ["nothing to convert"]),
    "a compiled model": (
        lambda: torch.compile(small(), backend="eager"),
        {},
        ConversionError,
        ["compiled model", "before torch.compile", "_orig_mod"],
    ),
    "a compiled part": (Compiled, {}, ConversionError, ["compiled model", "(at part)", "before torch.compile"]),
    "compiled in place": (compiled_in_place, {}, ConversionError, ["compiled model", "(at 1)"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_untouched(name):
    build, arguments, error, texts = REFUSED[name]
    model = build()
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        hf_actnn.convert(model, **arguments)
    assert isinstance(caught.value, ActNNError)
    for part in [*texts, "Expected", "Received"]:
        assert part in str(caught.value), str(caught.value)
    assert fingerprint(model) == before
    assert not hf_actnn.is_converted(model)


def test_a_refusal_leaves_a_converted_model_as_it_was():
    model = hf_actnn.convert(small(), bits=3, min_numel=0)
    before = fingerprint(model)
    with pytest.raises(ConfigError):
        hf_actnn.convert(model, skip=("nowhere",))
    assert fingerprint(model) == before
    assert hf_actnn.report(model).config.bits == 3
    train(model)


@pytest.mark.parametrize(
    "thing", [None, 3, "resnet50", nn.Linear, torch.relu, torch.zeros(3)], ids=lambda thing: type(thing).__name__
)
@pytest.mark.parametrize("verb", ["convert", "revert", "report"])
def test_not_a_module(verb, thing):
    with pytest.raises(ConversionError, match=r"Expected a .*Received .*"):
        getattr(hf_actnn, verb)(thing)
    assert not hf_actnn.is_converted(thing)


def test_report_of_a_plain_model():
    with pytest.raises(ConversionError, match=r"no report.*Sequential.*Expected a converted model.*convert\(model\)"):
        hf_actnn.report(small())


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()"])
def test_compiling_without_compression_is_said(how):
    model = hf_actnn.convert(nn.Linear(64, 4), bits=2, min_numel=0)
    compiled._warned.clear()
    if how == "model.compile()":
        model.compile(backend="eager")
    run = torch.compile(model, backend="eager") if how == "torch.compile(model)" else model
    try:
        with pytest.warns(hf_actnn.ActNNWarning, match="uncompressed"):
            run(torch.randn(32, 64)).sum().backward()
    finally:
        torch._dynamo.reset()


# -- skip and overrides ---------------------------------------------------------------------------------


def kept(model: nn.Module) -> dict[str, set]:
    train(model)
    found: dict[str, set] = {}
    for row in hf_actnn.report(model).rows:
        if row.kept in ("exact", "quantized"):
            found.setdefault(row.module, set()).add(row.bits if row.kept == "quantized" else row.reason)
    return found


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"bits": 4}, {"0.0": 4, "2": 4}),
        ({"bits": 4, "skip": ("0",)}, {"0.0": "skip '0'", "2": 4}),  # with all beneath it
        ({"bits": 4, "skip": ("?.0",)}, {"0.0": "skip '?.0'", "2": 4}),
        ({"bits": 4, "overrides": {"0": 8}}, {"0.0": 8, "2": 4}),
        ({"bits": 4, "overrides": {"0": "exact"}}, {"0.0": "override '0'", "2": 4}),
        ({"bits": 4, "overrides": {"*": 2, "0.*": 6}}, {"0.0": 6, "2": 2}),  # the last that matches holds
        ({"bits": 4, "overrides": {"0.*": 6, "*": 2}}, {"0.0": 2, "2": 2}),
        ({"bits": 4, "overrides": {"0": 8}, "skip": ("0.0",)}, {"0.0": "skip '0.0'", "2": 4}),
        ({"config": "L0", "overrides": {"2": 4}}, {"0.0": "level L0 compresses nothing", "2": 4}),
    ],
    ids=str,
)
def test_skip_and_overrides(arguments, expected):
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Softsign(), nn.Linear(64, 4))
    hf_actnn.convert(model, min_numel=0, **arguments)
    found = kept(model)
    for path, how in expected.items():
        assert how in found[path], (path, found)


def test_exact_norms():
    for level, how in (("L1", "exact"), ("L2", "quantized")):
        model = hf_actnn.convert(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 4)), level, min_numel=0)
        train(model)
        rows = [row for row in hf_actnn.report(model).rows if row.kind == "layer_norm" and row.nbytes == 32 * 64 * 4]
        assert [row.kept for row in rows] == [how]


def test_min_numel():
    model = hf_actnn.convert(small(), bits=2, min_numel=32 * 64 + 1)
    train(model)
    rows = hf_actnn.report(model).rows
    assert not any(row.kept == "quantized" for row in rows)
    assert any(row.reason == "too small to pay" for row in rows)


# -- the report -----------------------------------------------------------------------------------------


def test_report_before_and_after_a_step():
    model = hf_actnn.convert(small(), bits=2, min_numel=0, skip=("2",))
    before = hf_actnn.report(model)
    assert not before.observed and before.config.bits == 2
    assert {row.module for row in before.rows} == {name for name, _ in model.named_modules()}
    assert [row.reason for row in before.left_alone] == ["skip '2'"]
    assert "no training forward pass seen yet" in str(before)
    train(model)
    after = hf_actnn.report(model)
    assert after.observed
    assert all(row.saves > 0 for row in after.rows)
    assert {row.bits for row in after.rows if row.kept == "quantized"} == {2}
    text = str(after)
    assert all(word in text for word in ("module", "kept as", "0.1", "layer_norm", "skip '2'"))
    lines = text.splitlines()
    assert len(lines) == len(after.rows) + 3
    whole, *parts = (float(number) for number in re.findall(r"\d+\.\d+", lines[-1]))
    assert whole == pytest.approx(sum(row.nbytes for row in after.rows) / 1e6, abs=1e-3)
    assert sum(parts) == pytest.approx(whole, abs=1e-3 * len(parts))


def test_report_bytes_are_what_autograd_meant_to_save():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    hf_actnn.convert(model, bits=2, min_numel=0)
    model(torch.randn(16, 64)).sum().backward()
    total = {row.module: 0 for row in hf_actnn.report(model).rows}
    for row in hf_actnn.report(model).rows:
        if row.kept != "parameter":
            total[row.module] += row.nbytes
    assert total == {"0": 16 * 64 * 4, "1": 16 * 32 * 4, "2": 16 * 32 * 4}


def test_scripted_parts_are_left_alone():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Linear(64, 64))
    model = nn.Sequential(scripted, nn.GELU(), nn.Linear(64, 4))
    hf_actnn.convert(model, bits=2, min_numel=0)
    assert type(model[0]) is type(scripted)
    train(model)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert "quantized" in {row.kept for row in hf_actnn.report(model).rows if row.kind == "gelu"}
    hf_actnn.revert(model)
    assert not hf_actnn.is_converted(model)


class _Sealed(type):
    """A metaclass that lets nobody derive from its classes."""

    def __new__(mcs, name, bases, names):
        if any(isinstance(base, mcs) for base in bases):
            raise TypeError(f"{bases[-1].__name__} is final")
        return super().__new__(mcs, name, bases, names)


class _Final(nn.Module, metaclass=_Sealed):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("level", [None, "L1"])
def test_a_class_that_takes_no_subclass_leaves_the_model_as_it_was(level):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    if level is not None:
        hf_actnn.convert(model, level)
    model.append(_Final())
    before = [(type(module), dict(module.__dict__).get("_actnn")) for module in model.modules()]
    with pytest.raises(ConversionError, match=r"(?s)2.*_Final: TypeError: _Final is final.*without this module"):
        hf_actnn.convert(model, "L2")
    assert [(type(module), module.__dict__.get("_actnn")) for module in model.modules()] == before


def test_parts_converted_one_by_one_are_all_reported():
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.GELU()), nn.Linear(64, 64), hf_actnn.nn.Linear(64, 64))
    hf_actnn.convert(model[0], bits=2, min_numel=0)
    hf_actnn.convert(model[1], bits=2, min_numel=0)
    model(torch.randn(32, 64)).sum().backward()
    assert {row.module for row in hf_actnn.report(model).rows} == {"0.0", "0.1", "1", "2"}
