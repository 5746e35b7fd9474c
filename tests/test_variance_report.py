"""The report of what quantisation costs: as measured, and without a trace in the model."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.errors import ConversionError


def model_and_step(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    hf_actnn.convert(model, **{"config": "L2", "min_numel": 64, **settings})
    return model, lambda: F.cross_entropy(model(x), y).backward()


def test_prediction_beside_the_truth():
    """Each tensor alone and all together. One prediction is off by up to two fifths, as its random signs fall."""
    predicted, measured = collections.Counter(), collections.Counter()
    for seed in range(8):
        model, step = model_and_step(seed=seed)
        report = hf_actnn.variance_report(model, step, draws=10)
        assert {row.name for row in report.rows} == {"0:convolution", "1:batch_norm", "5:gelu", "8:linear"}
        for row in [*report.rows, report]:
            assert row.measured is not None and row.standard_error is not None
            name = getattr(row, "name", "all")
            predicted[name] += row.predicted
            measured[name] += row.measured
        assert report.predicted == pytest.approx(sum(row.predicted for row in report.rows))
        assert report.rows == sorted(report.rows, key=lambda row: -row.predicted)
        assert 0 < report.minibatch < 100
    for name, value in measured.items():
        # An activation's noise goes on, and what of it cancels in the layers before is not foreseen.
        most = 1.4 if name == "5:gelu" else 1.2
        assert 0.8 < predicted[name] / value < most, name


@pytest.mark.parametrize("config", [{"config": "L2"}, {"config": "L3"}, {"config": None, "bits": "auto"}], ids=str)
def test_no_trace_is_left(config):
    model, step = model_and_step(**config)
    controller = hf_actnn.controller(model)
    for _ in range(2):
        step()
        controller.step()
    grads = [parameter.grad for parameter in model.parameters()]
    values = [grad.clone() for grad in grads]
    state, buffers = controller.state_dict(), [buffer.clone() for buffer in model.buffers()]
    random, rows = torch.get_rng_state(), hf_actnn.report(model).rows
    hf_actnn.variance_report(model, step, draws=2)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert all(map(torch.equal, grads, values))
    assert all(map(torch.equal, model.buffers(), buffers))
    assert torch.equal(torch.get_rng_state(), random)
    assert controller.state_dict() == state and hf_actnn.report(model).rows == rows
    assert hf_actnn.controller(model) is controller


def test_a_step_that_raises_leaves_no_trace():
    model, _ = model_and_step()
    controller = hf_actnn.controller(model)
    with pytest.raises(ZeroDivisionError):
        hf_actnn.variance_report(model, lambda: 1 / 0)
    assert hf_actnn.controller(model) is controller


def test_more_bits_harm_less():
    few, many = (hf_actnn.variance_report(*model_and_step(config="L2", bits=bits)).predicted for bits in (2, 6))
    assert many < few / 100


def test_as_a_table_and_by_module():
    model, step = model_and_step()
    report = hf_actnn.variance_report(model, step)
    text = str(report)
    assert "measured" not in text and "1:batch_norm" in text and "mini-batch" in text
    assert "±" in str(hf_actnn.variance_report(model, step, draws=2))
    assert report.by_module()["1"] == next(row.predicted for row in report.rows if row.module == "1")
    assert sum(report.by_module(0).values()) == pytest.approx(report.predicted)


def test_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model, step = model_and_step()
    hf_actnn.variance_report(model, step, draws=2).plot(tmp_path / "variance.png")
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_reported():
    with pytest.raises(ConversionError, match=r"nothing to report.*convert\(model\) first"):
        hf_actnn.variance_report(nn.Linear(3, 3), lambda: None)
    model, _ = model_and_step()
    with pytest.raises(ConversionError, match=r"made no gradient.*loss\.backward\(\)"):
        hf_actnn.variance_report(model, lambda: None)
