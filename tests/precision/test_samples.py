"""Bits per sample: the assignment against all combinations, and what is remembered of a data set's samples."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.errors import ConfigError
from hf_actnn.precision.samples import SampleTable, assign
from hf_actnn.precision.sensitivity import harmlessness
from tests.precision.small import adaptive, backward, batch, codes, net, widths

# -- assign -----------------------------------------------------------------------------------------------------------


def whole(found: int | Tensor, samples: int) -> Tensor:
    if isinstance(found, int):
        return torch.full((samples,), found)
    assert found.dtype == torch.uint8 and found.shape == (samples,) and found.device.type == "cpu"
    assert found.unique().numel() > 1  # one number says it where all are equal
    return found.long()


def objective(weights: Tensor, bits: Tensor) -> float:
    return float((weights * harmlessness(bits)).sum())


@pytest.mark.parametrize("low, high", [(1, 8), (2, 6), (1, 3), (4, 5)])
@pytest.mark.parametrize("samples", [2, 3, 5])
def test_few_samples_are_served_as_by_trying_all(samples, low, high):
    every = torch.tensor(list(itertools.product(range(low, high + 1), repeat=samples)))
    ladder = harmlessness(every)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.exp(4 * torch.randn(samples, generator=generator, dtype=torch.float64))
        average = low + (high - low) * float(torch.rand((), generator=generator))
        bits = whole(assign(weights, average, low, high), samples)
        assert low <= bits.min() and bits.max() <= high
        assert bits.sum() <= average * samples + 1e-5
        best = (ladder * weights).sum(1)[every.sum(1) <= average * samples + 1e-6].min()
        assert objective(weights, bits) == pytest.approx(float(best), rel=1e-12)


@pytest.mark.parametrize("average", [1, 1.1, 1.5, 2, 2.49, 3.0001, 4, 7.99, 8])
@pytest.mark.parametrize("samples", [2, 7, 64, 1000])
def test_the_mean_is_the_average_rounded_down(samples, average):
    weights = torch.exp(3 * torch.randn(samples, generator=torch.Generator().manual_seed(samples)))
    bits = whole(assign(weights, average, 1, 8), samples)
    assert int(bits.sum()) == int(average * samples + 1e-6)


@pytest.mark.parametrize("average", [0, 1, 1.99, 2, 6, 7, 100])
def test_an_average_out_of_the_range_is_the_end_of_it(average):
    bits = whole(assign(torch.rand(6), average, 2, 6), 6)
    assert bits.min() >= 2 and bits.max() <= 6
    assert bits.double().mean() == min(max(int(average), 2), 6)


def test_equal_weights_get_bits_that_differ_by_one_at_most():
    for average in (2, 2.5, 3.25):
        bits = whole(assign(torch.ones(16), average, 1, 8), 16)
        assert int(bits.sum()) == 16 * average and bits.max() - bits.min() == int(average % 1 > 0)
    assert assign(torch.full((16,), 3.0), 4, 1, 8) == 4
    assert assign(torch.ones(16), 5, 5, 5) == 5


def test_a_larger_weight_never_gets_fewer_bits():
    weights = torch.exp(3 * torch.randn(200, generator=torch.Generator().manual_seed(0)))
    bits = whole(assign(weights, 2.3, 1, 8), 200)[weights.argsort()]
    assert (bits.diff() >= 0).all() and bits[0] == 1 and bits[-1] > 4


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e290])
def test_the_scale_of_the_weights_does_not_count(scale):
    weights = torch.exp(torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal(whole(assign(weights * scale, 2.5, 1, 8), 20), whole(assign(weights, 2.5, 1, 8), 20))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_weights_that_say_nothing_count_as_the_mean(value):
    weights = torch.tensor([1.0, 4.0, 16.0, value, 7.0, value], dtype=torch.float64)
    filled = torch.where(weights.isfinite() & (weights > 0), weights, 7.0)
    bits = whole(assign(weights, 3, 1, 8), 6)
    assert torch.equal(bits, whole(assign(filled, 3, 1, 8), 6))
    assert bits[3] >= 3 and int(bits.sum()) == 18  # nobody is starved
    assert assign(torch.full((6,), value), 3, 1, 8) == 3


def test_the_weights_are_not_written_to():
    weights = torch.tensor([1.0, 0.0, math.nan, 2.0])
    before = weights.clone()
    assign(weights, 2.5, 1, 8)
    torch.testing.assert_close(weights, before, rtol=0, atol=0, equal_nan=True)


# -- sample_id reaches whom it is for ---------------------------------------------------------------------------------


class Wary(nn.Module):
    """Notes what its forward pass is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 8)
        self.given: list[dict[str, Any]] = []

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.given.append(kwargs)
        return self.inner(x)


class Interested(Wary):
    def forward(self, x: Tensor, sample_id: Tensor | None = None) -> Tensor:
        self.given.append({} if sample_id is None else {"sample_id": sample_id})
        return self.inner(x)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("level", ["L0", "L2", "L2.5", "L3"])
def test_sample_id_reaches_only_a_forward_that_takes_it(level, mode):
    ids = torch.arange(4)
    for make in (Wary, Interested):
        model = hf_actnn.convert(make(), level, min_numel=64)
        model.train(mode != "eval")
        with torch.set_grad_enabled(mode != "no_grad"):
            model(torch.randn(4, 64), sample_id=ids)
            model(torch.randn(4, 64))
        with_ids, without = model.given
        assert without == {}
        assert (with_ids == {}) if make is Wary else (with_ids["sample_id"] is ids)
    plain = hf_actnn.convert(nn.Sequential(nn.Linear(64, 8)), level)  # would raise TypeError
    plain.train(mode != "eval")(torch.randn(4, 64), sample_id=ids)


def test_without_conversion_the_model_gets_what_it_is_given():
    model = hf_actnn.revert(hf_actnn.convert(Wary(), "L3"))
    model(torch.randn(4, 64), sample_id=torch.arange(4))
    assert set(model.given[0]) == {"sample_id"}
    with pytest.raises(TypeError):
        hf_actnn.revert(hf_actnn.convert(net(), "L3"))(batch(4)[0], sample_id=torch.arange(4))


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_teaches_nothing(training):
    model, controller = adaptive()
    model.train(training)
    with torch.set_grad_enabled(not training):
        model(batch(4)[0], sample_id=torch.arange(4))
    controller.step()
    assert controller.table.values.numel() == 0


WRONG = {
    "floats": torch.arange(4.0),
    "booleans": torch.tensor([True, False, True, False]),
    "negative": torch.tensor([0, 1, -1, 2]),
    "a column": torch.arange(4)[:, None],
    "a number": torch.tensor(3),
    "floats in a list": [0.5, 1.0],
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_numbers(what):
    model, controller = adaptive()
    with pytest.raises(ConfigError, match="does not number the samples"):
        model(batch(4)[0], sample_id=WRONG[what])
    backward(model, 4, sample_id=torch.arange(4))  # and it goes on
    controller.step()
    assert controller.table.values.isfinite().sum() == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_right_numbers(dtype):
    model, controller = adaptive()
    backward(model, 4, sample_id=torch.tensor([9, 2, 5, 0], dtype=dtype))
    controller.step()
    assert controller.table.values.isfinite().nonzero().flatten().tolist() == [0, 2, 5, 9]
    backward(model, 2, sample_id=[3, 4])
    controller.step()
    assert controller.table.values.isfinite().sum() == 6


def test_numbers_of_another_batch_size_are_left_aside():
    model, controller = adaptive()
    backward(model, 4, sample_id=torch.arange(3))
    controller.step()
    assert controller.table.values.isfinite().sum() == 0


def test_numbers_of_a_forward_pass_that_raised_are_forgotten():
    model, controller = adaptive()
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 16, 16), sample_id=torch.arange(4))
    backward(model, 4)
    controller.step()
    assert controller.table.values.isfinite().sum() == 0


# -- the table --------------------------------------------------------------------------------------------------------


def energies(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Squared norms of the loss's derivatives by the logits, by hand, relative to the batch's mean."""
    slope = (logits.detach().double().softmax(1) - F.one_hot(labels, logits.shape[1])) * weight[:, None]
    squared = slope.square().sum(1)
    return squared / squared.mean()


def test_the_table_is_a_moving_average_of_relative_squared_gradients():
    model, controller = adaptive()
    expected = torch.full((40,), math.nan, dtype=torch.float64)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randperm(40, generator=generator)[:16]
        x, y = batch(16, step)
        weight = torch.exp(torch.randn(16, generator=generator))
        logits = model(x, sample_id=ids)
        (F.cross_entropy(logits, y, reduction="none") * weight).mean().mul(10.0**step).backward()  # a scale: no matter
        new = energies(logits, y, weight)
        expected[ids] = torch.where(expected[ids].isnan(), new, 0.5 * new + 0.5 * expected[ids])
        controller.step()
        model.zero_grad()
    found = torch.full((40,), math.nan, dtype=torch.float64)
    found[: len(controller.table.values)] = controller.table.values.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_micro_batches_count_each():
    model, controller = adaptive()
    backward(model, 8, seed=0, sample_id=torch.arange(8))
    first = backward_energies(8, 0)
    backward(model, 8, seed=1, sample_id=torch.arange(8, 16))
    second = backward_energies(8, 1)
    controller.step()
    torch.testing.assert_close(controller.table.values.double(), torch.cat([first, second]), rtol=1e-4, atol=1e-6)


def backward_energies(count: int, seed: int) -> Tensor:
    x, y = batch(count, seed)
    return energies(net()(x), y, torch.ones(count))


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan])
def test_gradients_that_say_nothing_leave_the_table(scale):
    model, controller = adaptive()
    ids = torch.arange(16)
    backward(model, scale=scale, sample_id=ids)
    controller.step()
    assert controller.table.values.isfinite().sum() == 0
    backward(model, sample_id=ids)
    controller.step()
    before = controller.table.values.clone()
    assert before.isfinite().all()
    backward(model, scale=scale, sample_id=ids)
    controller.step()
    assert torch.equal(controller.table.values, before)


def test_samples_with_larger_gradients_get_more_bits_when_they_come_again():
    model, controller = adaptive(bits=3, update_interval=1000)
    x, y = batch(16)
    heavy = torch.zeros(16, dtype=torch.bool)
    heavy[torch.randperm(16, generator=torch.Generator().manual_seed(3))[:6]] = True
    weight = torch.where(heavy, 10.0, 1.0)
    ids = torch.arange(16) * 3
    (F.cross_entropy(model(x, sample_id=ids), y, reduction="none") * weight).mean().backward()
    first = codes(lambda: model(x, sample_id=ids))  # nothing is known before the step is told
    controller.step()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    again = codes(lambda: model(x[order], sample_id=ids[order]))
    unknown = codes(lambda: model(x[order]))
    others = codes(lambda: model(x[order], sample_id=ids[order] + 1))
    for key, packed in again.items():
        bits = widths(packed, 16)
        assert bits[heavy[order]].double().mean() >= bits[~heavy[order]].double().mean() + 1, key
        for without in (unknown, others):
            bits = widths(without[key], 16).double()
            assert abs(bits[heavy[order]].mean() - bits[~heavy[order]].mean()) < 1, key
        assert int(widths(packed, 16).sum()) == int(widths(unknown[key], 16).sum())
    assert first.keys() == again.keys()


def test_the_table_makes_the_gradient_vary_less():
    """What it is for: samples whose gradients are large are rounded more finely."""
    x, y = batch(16)
    weight = torch.where(torch.arange(16) < 4, 10.0, 1.0)
    ids = torch.arange(16)

    def gradients(model: nn.Module, draws: int, **kwargs: Any) -> Tensor:
        found = []
        for _ in range(draws):
            model.zero_grad()
            (F.cross_entropy(model(x, **kwargs), y, reduction="none") * weight).mean().backward()
            found.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
        return torch.stack(found)

    exact = gradients(net(), 1)
    model, controller = adaptive(bits=2, update_interval=1000)
    gradients(model, 1, sample_id=ids)
    controller.step()
    unknown = (gradients(model, 80) - exact).square().sum(1)
    known = (gradients(model, 80, sample_id=ids) - exact).square().sum(1)
    error = math.sqrt(float(unknown.var() + known.var()) / 80)
    assert float(unknown.mean() - known.mean()) > 4 * error
    assert known.mean() < 0.8 * unknown.mean()


def test_the_state_carries_the_table():
    model, controller = adaptive()
    backward(model, 4, sample_id=torch.tensor([7, 1, 3, 0]))
    controller.step()
    state = json.loads(json.dumps(controller.state_dict()))
    _, other = adaptive()
    other.load_state_dict(state)
    assert torch.equal(other.table.values.nan_to_num(-1), controller.table.values.nan_to_num(-1))
    assert other.table.values.isnan().sum() == 4


def test_an_empty_table_survives_its_state():
    table = SampleTable()
    table.load(SampleTable().state())
    assert table.values.shape == (0,)
    table.identify([0, 2])
    assert table.factors(2).tolist() == [1.0, 1.0]
