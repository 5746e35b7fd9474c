"""Tiny models of every family that the coverage page names: converted, each computes what it did and trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import families
from coverage import Step


@pytest.fixture(scope="module", params=list(families.FAMILIES.values()), ids=lambda family: family.key)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def exact(family):
    """The unconverted model's step; a model that does not repeat itself would show nothing."""
    try:
        step = Step(family)
    except families.UnavailableError as error:
        pytest.skip(str(error))
    again = Step(family)
    assert step.same_forward(again) and step.same_gradients(again), "the unconverted model does not repeat itself"
    return step


def test_training(family, exact):
    """The forward pass to the bit, buffers and torch's generator included; gradients close at 8 bits."""
    step = Step(family, bits=8)
    assert step.same_forward(exact)
    assert step.cosine(exact) > family.floor


def test_level_l0(family, exact):
    step = Step(family, config="L0")
    assert step.same_forward(exact)
    assert step.same_gradients(exact)


def test_eval(family, exact):
    assert Step(family, train=False, bits=8).same_forward(Step(family, train=False))


def test_autocast(family):
    """Under bf16 autocast the forward pass has the same bits; gradients are those of bf16, whose own step is 2^-8."""
    try:
        exact = Step(family, True)
    except families.UnavailableError as error:
        pytest.skip(str(error))
    step = Step(family, True, bits=8)
    assert step.same_forward(exact)
    assert step.cosine(exact) > 1 - 2 * (1 - family.floor)
