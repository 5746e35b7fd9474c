"""Whole models: the forward pass and torch's generator are untouched, gradients are equal or close."""

from __future__ import annotations

import pytest
import torch

import hf_actnn
from hf_actnn.saving.call import Slot
from hf_actnn.saving.kept import Blank, Exact, Mask, Offsets, Quantized
from hf_actnn.saving.recipes import Recipe, Rerunnable, View
from tests.models import EXAMPLES, assert_same, batch, cosine, logits, make, step, twins, whole

pytest.importorskip("transformers")
pytest.importorskip("timm")

MODELS = list(EXAMPLES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {"config": "L0"},  # the hooks alone
        {"config": "L1"},  # normalisations exact
        {"bits": 2, "min_numel": 0},  # everything that a rule can code is coded
    ],
    ids=["L0", "L1", "2bits"],
)
def test_forward_is_bit_identical(name, fields):
    plain, converted = twins(make(name))
    hf_actnn.convert(converted, **fields)
    images, labels = batch(name)
    expected, expected_state, expected_grads = step(plain, images, labels)
    found, state, grads = step(converted, images, labels)
    assert torch.equal(found, expected)
    assert torch.equal(state, expected_state), "torch's generator was drawn from"
    assert grads.keys() == expected_grads.keys()
    # Running statistics come out of the forward pass too.
    assert_same(dict(converted.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_at_l0_are_bit_identical(name):
    plain, converted = twins(make(name))
    hf_actnn.convert(converted, "L0")
    images, labels = batch(name)
    assert_same(step(converted, images, labels)[2], step(plain, images, labels)[2])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_at_8_bits_are_close(name):
    plain, converted = twins(make(name))
    hf_actnn.convert(converted, bits=8, min_numel=0)
    images, labels = batch(name)
    expected = step(plain, images, labels)[2]
    found = step(converted, images, labels)[2]
    assert cosine(found, expected) > 0.999
    # Parameter by parameter, too: attention weighs little in the gradient of random weights. Of a bias before a batch
    # norm the true gradient is zero, so the error is measured against no less than a thousandth of the whole.
    floor = 1e-3 * whole(expected).norm()
    errors = {key: ((found[key] - expected[key]).norm() / max(floor, expected[key].norm())).item() for key in found}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 0.15, (worst, errors[worst])
    assert any(row.kept == "quantized" for row in hf_actnn.report(converted).rows)
    different = [key for key in found if not torch.equal(found[key], expected[key])]
    assert different, "nothing was coded"


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of what was made to keep a tensor since the test began."""
    names: list[str] = []

    def watch(cls: type) -> None:
        original = cls.__init__

        def __init__(self, *args, **kwargs):
            names.append(cls.__name__)
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", __init__)

    for cls in (Slot, Exact, Quantized, Mask, Offsets, Blank, View, Recipe, Rerunnable):
        watch(cls)
    return names


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
def test_nothing_is_stored_without_training(name, mode, made):
    plain, converted = twins(make(name))
    hf_actnn.convert(converted, bits=2, min_numel=0)
    images, _ = batch(name)
    outputs = []
    for model in (plain, converted):
        torch.manual_seed(3)
        if mode == "eval":
            model.eval()
            outputs.append(logits(model, images))
        else:
            with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
                outputs.append(logits(model, images))
    assert torch.equal(*outputs)
    assert not made
    assert not hf_actnn.report(converted).observed
    logits(converted.train(), images)
    assert made, "the count itself does not work"
