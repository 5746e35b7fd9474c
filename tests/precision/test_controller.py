"""The controller: what it chooses and when, what it costs, and that nothing upsets it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.errors import ActNNWarning, ConfigError, ConversionError
from hf_actnn.precision import controller as module
from hf_actnn.precision import sensitivity
from hf_actnn.precision.controller import AIM, MOST_CALLS, Controller
from hf_actnn.saving import scope
from tests.precision.small import adaptive, backward, batch, codes, gradient, held, net, train, widths

AVERAGES = [2, 2.5, 3, 4]


def assert_same_run(left: tuple[nn.Module, Controller], right: tuple[nn.Module, Controller], steps: range) -> None:
    """Both go on with the same gradients and bits, and have adapted."""
    for step in steps:
        (found,), (expected,) = train(*left, range(step, step + 1)), train(*right, range(step, step + 1))
        assert torch.equal(found, expected), step
        assert left[1].bits() == right[1].bits() != {}


# -- before the first update ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_first_step_is_the_uniform_one(bits, per_sample):
    model, controller = adaptive(net(2), bits=bits, per_sample=per_sample, seed=5)
    uniform = hf_actnn.convert(net(2), level="L2", bits=bits, min_numel=64, seed=5)
    assert controller.bits() == {} and controller.history == []
    assert torch.equal(backward(model), backward(uniform))  # it measures, and disturbs nothing
    controller.step()
    assert not torch.equal(backward(model), backward(uniform))


def test_the_first_step_is_the_uniform_one_where_a_map_is_enlarged():
    """A code that stands behind several values each is finer, whoever is going to choose."""

    def bits(**settings: Any) -> list[int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 1))
        hf_actnn.convert(model, min_numel=64, **settings)
        if settings["level"] != "L2":
            hf_actnn.controller(model)
        made = []
        quantize = hf_actnn.codec.quantize
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                hf_actnn.codec, "quantize", lambda x, bits, *a, **k: made.append(bits) or quantize(x, bits, *a, **k)
            )
            model(batch(4)[0])
        return made

    for average in (2, 4):
        uniform = bits(level="L2", bits=average)
        assert max(uniform) == average + 1
        assert bits(level="L3", bits=average) == uniform == bits(level="L2.5", bits=average)
    assert bits(level="L3", bits="auto") == uniform


@pytest.mark.parametrize("count", [16, 7, 2])
@pytest.mark.parametrize("average", AVERAGES)
def test_before_the_first_update_every_tensor_has_the_average(average, count):
    """In whole bits: those that there is a choice of are chosen from what is known, and nothing is."""
    model, _ = adaptive(bits=average)
    found = codes(lambda: model(batch(count)[0]))
    assert len(found) == 5
    for packed in found.values():
        assert widths(packed, count).tolist() == [int(average)] * count


def test_a_controller_nobody_asks_for_measures_nothing():
    """Asking for it says that steps will be told."""
    model = hf_actnn.convert(net(), level="L3", update_interval=1, min_numel=64)
    backward(model)
    assert hf_actnn.controller(model)._tape is None


def test_bits_stay_where_the_controller_is_not_active():
    model, controller = adaptive(bits=2, update_interval=1)
    train(model, controller, range(2))
    before = controller.bits()
    controller.active = False
    train(model, controller, range(2, 5))
    assert controller.bits() == before and len(controller.history) == 2


# -- bits and bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_bits_differ_and_bytes_stay_within_those_of_uniform_bits(average, per_sample):
    model, controller = adaptive(net(2), bits=average, per_sample=per_sample)
    train(model, controller, range(2))
    bits = controller.bits()
    assert len(bits) == 7 and len(set(bits.values())) >= 3
    assert max(bits.values()) - min(bits.values()) >= 1
    assert controller.history[-1]["average_bits"] <= average
    assert controller.history[-1]["average_bits"] > average - 0.3  # what may be spent is spent
    for count in (16, 32, 7, 5, 1):  # not only the batch that was measured
        below = held(hf_actnn.convert(net(2), level="L2", bits=int(average), min_numel=64), count)
        uniform = float(below)
        if average % 1:
            above = held(hf_actnn.convert(net(2), level="L2", bits=int(average) + 1, min_numel=64), count)
            uniform = below + (average % 1) * (above - below)
        found = held(model, count, seed=9)
        assert found <= uniform + len(bits) * count  # a byte per sample for its width
        assert found > 0.8 * uniform or count < 8


def test_bytes_stay_within_those_of_uniform_bits_where_groups_are_padded():
    """Groups of 169 and 49 values: 4 bits of them take 85 and 25 bytes, 3 bits 64 + 1 and 19 + 1."""
    model, controller = adaptive(bits=4, per_sample=False)
    F.cross_entropy(model(batch(16, size=13)[0]), batch(16)[1]).backward()
    controller.step()
    fractions = sum(bits % 1 > 0 for bits in controller.bits().values())
    uniform = held(hf_actnn.convert(net(), level="L2", bits=4, min_numel=64), 16, size=13)
    assert held(model, 16, size=13) <= uniform + fractions * 16


def test_history_tells_the_bytes_of_the_codes():
    model, controller = adaptive(bits=2.5)
    train(model, controller, range(3))
    found = codes(lambda: model(batch(16)[0]))
    assert set(found) == set(controller.bits())
    entry = controller.history[-1]
    assert sum(packed.codes.nbytes for packed in found.values()) == 16 * entry["bytes_per_sample"]
    values = sum(math.prod(packed.shape) for packed in found.values()) / 16
    assert entry["average_bits"] == pytest.approx(8 * entry["bytes_per_sample"] / values, rel=1e-12)
    for key, packed in found.items():
        assert float(widths(packed, 16).double().mean()) == controller.bits()[key]


def test_history_is_complete():
    model, controller = adaptive(update_interval=3)
    train(model, controller, range(8))
    assert [entry["step"] for entry in controller.history] == [1, 2, 3, 4, 7]
    for entry in controller.history:
        assert set(entry) == {"step", "average_bits", "bytes_per_sample", "added_variance", "relative_variance"}
        assert all(math.isfinite(value) and value > 0 for value in entry.values())
    controller.bits().clear()
    assert controller.bits()  # what is handed out is a copy


def squared_errors(model: nn.Module, exact: Tensor, draws: int) -> Tensor:
    return torch.stack([(backward(model).double() - exact).square().sum() for _ in range(draws)])


@pytest.mark.parametrize("settings", [{}, {"per_sample": False}], ids=["samples", "tensors"])
def test_the_gradient_varies_less_than_at_uniform_bits(settings):
    """Four standard errors apart: wrong in one run of 30,000, were there no difference; and not by a hair."""
    model, controller = adaptive(net(2), bits=2, update_interval=1000, **settings)
    backward(model, seed=7)  # adapts to another batch than it is judged by
    controller.step()
    exact = backward(hf_actnn.convert(net(2), "L0")).double()
    uniform = squared_errors(hf_actnn.convert(net(2), level="L2", bits=2, min_numel=64, seed=1), exact, 100)
    chosen = squared_errors(model, exact, 100)
    error = math.sqrt(float(uniform.var() + chosen.var()) / 100)
    assert float(uniform.mean() - chosen.mean()) > 4 * error
    assert chosen.mean() < 0.9 * uniform.mean()


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "updates"),
    [(1, list(range(1, 13))), (3, [1, 2, 3, 4, 7, 10]), (10, [1, 2, 3, 5, 9, 11]), (None, [1, 2, 3, 5, 9])],
)
def test_updates_come_once_per_interval_and_at_powers_of_two_before(interval, updates, monkeypatch):
    made = []
    monkeypatch.setattr(scope, "Tape", lambda *args, make=scope.Tape: made.append(1) or make(*args))
    model, controller = adaptive(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), update_interval=interval
    )
    seen: dict[int, int] = {}
    for step in range(1, 13):
        before, count = controller.bits(), len(made)
        F.cross_entropy(model(torch.randn(16, 32)), torch.arange(16) % 8).backward()
        controller.step()
        seen[step] = len(made) - count
        if step not in updates:
            assert controller.bits() == before
    assert [entry["step"] for entry in controller.history] == updates
    assert seen == {step: int(step in updates) for step in seen}  # nothing is measured in between


def test_the_default_interval():
    model, controller = adaptive(nn.Sequential(nn.Linear(32, 8)), update_interval=None)
    for _ in range(210):
        F.cross_entropy(model(torch.randn(16, 32)), torch.arange(16) % 8).backward()
        controller.step()
    assert [entry["step"] for entry in controller.history] == [1, 2, 3, 5, 9, 17, 33, 65, 129, 201]


@pytest.mark.parametrize("micro", [2, 3, 6])
def test_accumulation_is_one_step(micro):
    """Micro-batches are measured together, up to a limit, and their sum says what the batch does."""
    model, controller = adaptive(bits=2)
    whole, single = adaptive(bits=2)
    for step in range(4):
        measured = [0]
        for part in range(micro):
            x, y = batch(8, seed=10 * step + part)
            (F.cross_entropy(model(x), y) / micro).backward()
            assert controller._calls[id(model)] == part + 1
            measured.append(len(controller._tape.harms))
        grew = [after > before for before, after in itertools.pairwise(measured)]
        assert grew == [part < MOST_CALLS for part in range(micro)]
        controller.step()
        assert controller.steps == len(controller.history) == step + 1
        parts = [batch(8, seed=10 * step + part) for part in range(micro)]
        F.cross_entropy(whole(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts])).backward()
        single.step()
    assert controller.bits().keys() == single.bits().keys()
    for key, bits in controller.bits().items():
        assert bits == pytest.approx(single.bits()[key], abs=1), key
    # Relative to the mini-batch's variance, quantisation adds the same, however the batch was cut.
    found, expected = controller.history[-1]["added_variance"], single.history[-1]["added_variance"]
    assert found == pytest.approx(expected, rel=0.35)


def test_a_forward_pass_without_a_backward_pass_does_not_count():
    model, controller = adaptive(bits=2, per_sample=False)
    other, alone = adaptive(bits=2, per_sample=False)
    backward(model), backward(other)
    model(batch(16, seed=3)[0])  # a metric of the training mode, say
    controller.step(), alone.step()
    assert controller.history[0]["relative_variance"] == pytest.approx(alone.history[0]["relative_variance"], rel=1e-6)
    assert controller.history[0]["added_variance"] == pytest.approx(alone.history[0]["added_variance"], rel=1e-6)


# -- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [1, 2, 4.5, 8])
def test_ranges_numbers_and_exactness_are_respected(average):
    overrides = {"1": (2, 6), "4": 3, "10": "exact"}
    model, controller = adaptive(bits=average, overrides=overrides)
    for step in range(3):
        found = codes(lambda step=step: backward(model, seed=step))
        assert not any(key.startswith("10:") for key in found)
        assert {"0:convolution", "1:batch_norm", "4:batch_norm"} <= set(found)
        assert widths(found["1:batch_norm"], 16).min() >= 2 and widths(found["1:batch_norm"], 16).max() <= 6
        assert widths(found["4:batch_norm"], 16).unique().tolist() == [3]
        controller.step()
        bits = controller.bits()
        assert bits.keys() == found.keys()
        assert 2 <= bits["1:batch_norm"] <= 6 and bits["4:batch_norm"] == 3
    # Those that may be chosen keep to the average among themselves, as far as their ranges let them.
    free = {key: math.prod(packed.shape) for key, packed in found.items() if key != "4:batch_norm"}
    allowed = {key: min(max(average, 2), 6) if key == "1:batch_norm" else average for key in free}
    assert sum(bits[key] * free[key] for key in free) <= sum(allowed[key] * free[key] for key in free) + 1e-6


def test_l25_chooses_samples_and_no_tensors():
    model, controller = adaptive(level="L2.5", bits=3)
    x, y = batch(16)
    x[:8] *= 20
    F.cross_entropy(model(x), y).backward()
    controller.step()
    assert set(controller.bits().values()) == {3.0}
    found = codes(lambda: model(x))
    assert all(int(widths(packed, 16).sum()) <= 48 for packed in found.values())
    first = widths(found["0:convolution"], 16).double()
    assert first[:8].mean() > first[8:].mean() + 2


# -- nothing starves --------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two branches, of which one may be shut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
        self.right = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
        self.gate = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.gate * self.right(2 * x)


def run_gated(gates: list[float], average: int = 3) -> Controller:
    model, controller = adaptive(Gated(), bits=average)
    for step, gate in enumerate(gates):
        model.gate = gate
        generator = torch.Generator().manual_seed(step)
        F.cross_entropy(model(torch.randn(32, 32, generator=generator)), torch.arange(32) % 8).backward()
        controller.step()
        assert len(controller.history) == step + 1
        assert all(1 <= bits <= 8 for bits in controller.bits().values())
        assert controller.history[-1]["average_bits"] <= average
    return controller


def test_a_branch_without_gradient_is_not_starved_and_recovers():
    shut = run_gated([0.0, 0.0])
    right = [bits for key, bits in shut.bits().items() if key.startswith("right")]
    assert right and min(right) >= 1
    # Where there are enough for all, its share of the costs is that of the least: it does not stay at one bit.
    assert all(2 <= bits < 3 for key, bits in run_gated([0.0, 0.0], 5).bits().items() if key.startswith("right"))
    opened, always = run_gated([0.0, 0.0] + [1.0] * 8), run_gated([1.0] * 10)
    for key, bits in opened.bits().items():
        assert bits == pytest.approx(always.bits()[key], abs=0.5), key
    one = run_gated([0.0, 1.0])  # the next update alone gives them more
    assert sum(bits for key, bits in one.bits().items() if key.startswith("right")) > sum(right)


def test_a_loss_of_zero_teaches_nothing():
    model, controller = adaptive(bits=2)
    for _ in range(2):
        backward(model, scale=0.0)
        controller.step()
        assert controller.bits() == {} and controller.history == []
    backward(model)
    controller.step()
    before = controller.bits()
    assert [entry["step"] for entry in controller.history] == [3] and min(before.values()) >= 1
    backward(model, scale=0.0)
    controller.step()
    assert controller.bits() == before


@pytest.mark.parametrize("frozen", ["0", "4", "10"])
def test_frozen_layers(frozen):
    model, controller = adaptive(bits=2)
    model.get_submodule(frozen).requires_grad_(False)
    train(model, controller, range(3))
    assert len(controller.history) == 3
    assert all(1 <= bits <= 8 for bits in controller.bits().values())
    assert controller.history[-1]["average_bits"] <= 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_nothing_to_train_at_all():
    model, controller = adaptive(bits=2)
    model.requires_grad_(False)
    x = batch(4)[0].requires_grad_()
    model(x).sum().backward()
    controller.step()
    assert controller.steps == 1 and controller.history == []
    assert x.grad.isfinite().all()


def test_layers_that_are_frozen_later_leave_the_budget():
    """Linear probing first, or last: what is not kept any more has no bits to give away."""
    model, controller = adaptive(bits=2)
    train(model, controller, range(2))
    model[:10].requires_grad_(False).eval()
    train(model, controller, range(2, 10))
    uniform = hf_actnn.convert(copy.deepcopy(model), level="L2", bits=2, min_numel=64)
    assert held(model, 16) <= held(uniform, 16) + 16 * len(codes(lambda: model(batch(16)[0])))


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_gradients_that_are_not_finite_are_skipped(scale):
    model, controller = adaptive(bits=2, update_interval=1000)
    backward(model, scale=scale)
    controller.step()
    assert (controller.steps, controller.bits(), controller.history) == (1, {}, [])
    backward(model)
    controller.step()  # the step after it is measured, not one an interval away
    assert [entry["step"] for entry in controller.history] == [2]
    assert all(math.isfinite(value) for value in controller.history[0].values())
    assert controller._tape is None


def test_one_overflow_among_micro_batches_spoils_no_average():
    model, controller = adaptive(bits=2)
    train(model, controller, range(2))
    before, kept = controller.bits(), dict(controller._kept)
    backward(model)
    backward(model, scale=math.inf)
    controller.step()
    assert controller.bits() == before and controller._kept == kept
    backward(model)
    controller.step()
    assert all(math.isfinite(one.cost) for one in controller._kept.values())
    assert controller.history[-1]["step"] == 4


def test_a_step_without_any_pass():
    model, controller = adaptive(bits=2)
    controller.step()
    with torch.no_grad():
        model(batch()[0])
    model.eval()(batch()[0])
    controller.step()
    assert (controller.steps, controller.history) == (2, [])
    backward(model.train())
    controller.step()
    assert len(controller.history) == 1


def test_a_forward_pass_that_raises_is_not_waited_for():
    model, controller = adaptive(bits=2)
    with pytest.raises(RuntimeError):
        model(torch.randn(16, 4, 16, 16))
    assert controller._tape is None
    backward(model)
    controller.step()
    assert len(controller.history) == 1


# -- copies and company -----------------------------------------------------------------------------------------------


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("when", ["after step()", "before step()"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_by_themselves(how, when):
    """A copy between two steps goes on as the original does, and neither disturbs the other."""
    model, controller = adaptive(bits=2, update_interval=2)
    train(model, controller, range(3))
    if when == "before step()":
        backward(model, seed=3)
    twin = COPIES[how](model)
    other = hf_actnn.controller(twin)
    assert other is not controller and other.bits() == controller.bits() and other.history == controller.history
    if when == "before step()":  # the graph is not copied, so the copy measures in its next step
        controller.step(), other.step()
        backward(twin)
        other.step()
        assert len(other.history) == len(controller.history) + (1 if controller.history[-1]["step"] < 4 else 0)
        return
    count = len(controller.history)
    alone = train(twin, other, range(3, 8))
    assert len(controller.history) == count
    for left, right in zip(alone, train(model, controller, range(3, 8)), strict=True):
        assert torch.equal(left, right)
    assert other.history == controller.history and len(controller.history) > count


def test_two_models_at_once_are_independent():
    def pair() -> list[tuple[nn.Module, Controller]]:
        return [adaptive(bits=2, update_interval=2), adaptive(bits=3, level="L3", seed=4, per_sample=False)]

    expected = pair()
    apart = [train(*one, range(5)) for one in expected]
    found = pair()
    (first, one), (second, two) = found
    mixed: list[list[Tensor]] = [[], []]
    for step in range(5):  # forward, forward, backward, backward
        losses = [F.cross_entropy(model(batch(16, step)[0]), batch(16, step)[1]) for model in (first, second)]
        for place, model, loss in ((1, second, losses[1]), (0, first, losses[0])):
            model.zero_grad()
            loss.backward()
            mixed[place].append(gradient(model))
        for model, controller in found:
            controller.step()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
    for left, right in zip(apart, mixed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert [c.history for _, c in found] == [c.history for _, c in expected]
    assert one.bits() != two.bits()


def test_converting_again_begins_anew():
    model, old = adaptive(bits=2)
    train(model, old, range(2))
    kept = old.bits()
    hf_actnn.convert(model, level="L3", bits=2, update_interval=1, min_numel=64)
    new = hf_actnn.controller(model)
    assert new is not old and hf_actnn.controller(model) is new
    assert (new.steps, new.bits(), new.history) == (0, {}, [])
    assert all(int(widths(packed, 16).sum()) == 32 for packed in codes(lambda: model(batch()[0])).values())
    new._tape = None
    train(model, new, range(1))
    old.step()
    assert new.bits() and len(new.history) == 1 and old.bits() == kept


# -- a target in place of an average ----------------------------------------------------------------------------------


def test_auto_meets_the_target_and_spends_less_for_a_larger_one():
    spent = []
    for share in (0.01, 0.1, 1.0):
        model, controller = adaptive(level="L2", bits="auto", max_added_variance=share)
        train(model, controller, range(4))
        for entry in controller.history:
            assert entry["added_variance"] <= share
            assert entry["added_variance"] <= AIM * share * 1.01  # a part is held back for readings that are too low
        # Nor are bits wasted: one fewer for everything would mean about four times the variance.
        assert controller.history[-1]["added_variance"] > 0.6 * AIM * share
        spent.append(controller.history[-1]["average_bits"])
    assert 1 <= spent[2] < spent[1] - 0.5 < spent[0] - 1


def test_auto_takes_the_most_bits_where_the_target_cannot_be_met():
    model, controller = adaptive(bits="auto", max_added_variance=1e-9)
    train(model, controller, range(2))
    assert set(controller.bits().values()) == {8.0}


class TwoScales(nn.Module):
    """Two branches alike, but one's output, and with it the gradients of its parameters, is a thousandth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = (
            nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + 1e-3 * self.small(x)


def variances(model: nn.Module, count: int = 24) -> dict[str, tuple[float, float]]:
    """Variance added to the gradient of each parameter, and that of the exact one, by Monte Carlo."""
    exact = hf_actnn.revert(copy.deepcopy(model))
    added, drawn = {}, {name: [] for name, _ in model.named_parameters()}
    for seed in range(1000, 1000 + count):
        backward(model, seed=seed)
        backward(exact, seed=seed)
        for (name, found), right in zip(model.named_parameters(), exact.parameters(), strict=True):
            added[name] = added.get(name, 0.0) + float((found.grad - right.grad).square().sum())
            drawn[name].append(right.grad.clone())
    return {name: (added[name] / count, float(torch.stack(one).var(0).sum())) for name, one in drawn.items()}


def shares(model: nn.Module) -> dict[str, float]:
    """The former over the latter."""
    return {name: added / own for name, (added, own) in variances(model).items()}


def test_auto_leaves_no_parameter_to_the_noise(monkeypatch):
    """Within a factor of two of what is asked for, on average over parameters; the smaller branch fares no worse."""

    def run() -> dict[str, float]:
        model, controller = adaptive(TwoScales(), bits="auto", max_added_variance=0.1, update_interval=4)
        train(model, controller, range(24), lr=0.0)
        controller.active = False
        return shares(model)

    found = run()
    mean = sum(found.values()) / len(found)
    assert 0.5 * AIM * 0.1 < mean < 2 * AIM * 0.1
    assert max(found.values()) < 1
    small, large = (
        sum(share for name, share in found.items() if name.startswith(part)) / 6 for part in ("small", "large")
    )
    assert small < 3 * large
    # Summed over all parameters, the variance of the smaller branch is nothing, and so is what it gets.
    monkeypatch.setattr(sensitivity, "read", lambda tape, weigh, read=sensitivity.read: read(tape))
    summed = run()
    assert max(share for name, share in summed.items() if name.startswith("small")) > 3 * max(found.values())


class Halves(nn.Module):
    """Two branches alike, each on a half of the picture; one's output is three hundredths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = (
            nn.Sequential(nn.Flatten(), nn.Linear(384, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = (half.clone() for half in x.chunk(2, dim=2))
        return self.large(top) + 0.03 * self.small(bottom)


def test_a_budget_is_shared_between_the_sum_and_the_parameters(monkeypatch):
    """The branch that makes nearly all of the sum has a few times the variance that it has where the sum alone counts,
    and the other much less; where all values count alike the sum is far from its least. Large parameters count by the
    number of their values: without, what Adam's steps make of the variance is more."""

    def run(power: float) -> tuple[float, float, float]:
        monkeypatch.setattr(module, "BALANCE", power)
        model, controller = adaptive(Halves(), bits=2.5, update_interval=4)
        train(model, controller, range(24), lr=0.0)
        controller.active = False
        found = variances(model)
        large, small = (
            sum(added / own for name, (added, own) in found.items() if name.startswith(part)) / 6
            for part in ("large", "small")
        )
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return large, small, sum(added * (sizes[name] / own) ** 0.5 for name, (added, own) in found.items())

    found, summed, alike = run(module.BALANCE), run(0.0), run(1.0)
    assert found[0] < 5 * summed[0] < alike[0]
    assert found[1] < summed[1] / 3
    read = sensitivity.read

    def read_without_sizes(tape, weigh):
        tape.sizes.clear()
        return read(tape, weigh)

    monkeypatch.setattr(sensitivity, "read", read_without_sizes)
    assert found[2] < run(0.5)[2]


def test_a_budget_that_drowns_the_gradient_is_called_too_small(monkeypatch):
    """Once, and not in the first steps; what was asked for by share is not, and enough bits are not."""
    monkeypatch.setattr(module, "SETTLED", 1)
    for fields in ({"bits": 8}, {"bits": "auto", "max_added_variance": 4.0}):
        model, controller = adaptive(**fields)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, controller, range(4))
    monkeypatch.setattr(module, "TOO_MUCH", 1e-6)
    monkeypatch.setattr(module, "SETTLED", 4)
    model, controller = adaptive(bits=2, update_interval=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, controller, range(3))
    with pytest.warns(ActNNWarning, match="more variance to the gradient") as said:
        train(model, controller, range(3, 12))
    assert len(said) == 1 and "bits=4" in str(said[0].message)


def test_noise_does_not_pass_for_the_gradient_s_own_variance(monkeypatch):
    """Gradients of steps differ by what quantisation adds too. A parameter that has more noise than gradient would get
    ever more if that counted as its own."""

    def run() -> float:
        model, controller = adaptive(TwoScales(), bits="auto", max_added_variance=1.0, update_interval=4)
        train(model, controller, range(24), lr=0.0)
        controller.active = False
        found = shares(model)
        return sum(found.values()) / len(found)

    assert 0.5 * AIM < run() < 1.5 * AIM
    monkeypatch.setattr(module, "_without", lambda seen, added: seen)
    assert run() > 1.5 * AIM


class Exponential(nn.Module):
    """A weight that is the exponential of a parameter, and twenty times as steep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(768, 64), nn.Linear(64, 8)
        self.logarithm = nn.Parameter(3 + torch.randn(64, 64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(1)))
        return self.last(torch.tanh(F.linear(5e-3 * hidden, self.logarithm.exp())))


def test_auto_knows_a_weight_that_is_computed_from_a_parameter():
    """The gradient of the weight, of which the operation tells, is in other units than that of the parameter."""
    model, controller = adaptive(Exponential(), bits="auto", max_added_variance=0.1, update_interval=4)
    train(model, controller, range(16), lr=0.0)
    controller.active = False
    assert shares(model)["logarithm"] < 0.08 * AIM  # 0.1 where the units are mixed up


def test_auto_does_not_serve_a_bias_that_has_no_gradient():
    """What a normalisation takes out has a gradient of rounding errors, and any noise is large beside those."""

    def bits(bias: bool) -> float:
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 8)),
        )
        torch.manual_seed(0)
        for one in model:
            if hasattr(one, "reset_parameters"):
                one.reset_parameters()
        model, controller = adaptive(model, bits="auto", update_interval=4)
        train(model, controller, range(16), lr=0.0)
        return controller.history[-1]["average_bits"]

    assert bits(True) < bits(False) + 0.5


def test_auto_works_with_one_sample_at_a_time():
    """The gradients of steps differ, where the samples of one cannot."""
    model, controller = adaptive(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), bits="auto")
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        F.cross_entropy(model(torch.randn(1, 64, generator=generator)), torch.tensor([step])).backward()
        controller.step()
    assert math.isnan(controller.history[0]["added_variance"])
    assert 0 < controller.history[-1]["added_variance"] <= 0.1
    assert set(controller.bits().values()) != {4.0}


def test_auto_begins_with_four_bits():
    model, _ = adaptive(bits="auto")
    found = codes(lambda: model(batch(16)[0]))
    assert all(int(widths(packed, 16).sum()) == 64 for packed in found.values())


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_there_is_a_controller_only_where_there_is_a_converted_model():
    with pytest.raises(ConversionError, match="no controller"):
        hf_actnn.controller(net())
    with pytest.raises(ConversionError, match="no controller"):
        hf_actnn.controller("model")  # type: ignore[arg-type]
    model = net()
    hf_actnn.convert(model[0], "L3")
    hf_actnn.convert(model[3], "L3")
    with pytest.raises(ConversionError, match="2 parts that were converted by themselves"):
        hf_actnn.controller(model)
    model, _ = adaptive()
    with pytest.raises(ConversionError, match="no controller"):
        hf_actnn.controller(hf_actnn.revert(model))


def test_layers_made_by_themselves_have_no_controller():
    with pytest.raises(ConversionError, match="no controller"):
        hf_actnn.controller(nn.Sequential(hf_actnn.nn.Linear(8, 8, actnn="L3")))


def test_the_controller_of_what_wraps_the_model():
    model, controller = adaptive()
    assert hf_actnn.controller(nn.Sequential(model)) is controller


@contextlib.contextmanager
def our_warnings(count: int) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield (found := [])
    found += [str(one.message) for one in caught if issubclass(one.category, ActNNWarning)]
    assert len(found) == count, found


@pytest.mark.parametrize("asked", [False, True])
def test_a_forgotten_step_is_told_once(monkeypatch, asked):
    monkeypatch.setattr(module, "FORGOTTEN", 3)
    model = hf_actnn.convert(nn.Sequential(nn.Linear(32, 64)), level="L3", min_numel=64)
    if asked:
        hf_actnn.controller(model)
    with our_warnings(0):
        for _ in range(3):
            model(torch.randn(4, 32)).sum().backward()
    with our_warnings(1) as found:
        for _ in range(6):
            model(torch.randn(4, 32)).sum().backward()
    assert "nothing has called the controller's step()" in found[0]
    assert "level=L3" in found[0] and "hf_actnn.controller(model).step()" in found[0]


def test_no_word_of_steps_where_they_are_called_or_not_needed(monkeypatch):
    monkeypatch.setattr(module, "FORGOTTEN", 3)
    with our_warnings(0):
        model, controller = adaptive(nn.Sequential(nn.Linear(32, 64)))
        for _ in range(6):
            model(torch.randn(4, 32)).sum().backward()
            controller.step()
        for level in ("L0", "L1", "L2"):
            model = hf_actnn.convert(nn.Sequential(nn.Linear(32, 64)), level, min_numel=64)
            for _ in range(6):
                model(torch.randn(4, 32)).sum().backward()


def test_a_forgotten_step_holds_no_measurements_without_end(monkeypatch):
    monkeypatch.setattr(module, "FORGOTTEN", 20)
    model, controller = adaptive(nn.Sequential(nn.Linear(32, 64)))
    for _ in range(15):
        model(torch.randn(4, 32)).sum().backward()
    assert controller._tape.items.keys() == {"0:linear"}
    nodes = len(controller._tape.nodes)
    model(torch.randn(4, 32)).sum().backward()
    assert len(controller._tape.nodes) == nodes


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
def test_levels_that_choose_nothing_have_a_controller_that_counts(level):
    model, controller = adaptive(level=level)
    train(model, controller, range(2))
    assert (controller.steps, controller.bits(), controller.history) == (2, {}, [])
    assert controller._tape is None


# -- state ------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and plain(one) for key, one in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, str, bool)


@pytest.mark.parametrize("settings", [{}, {"per_sample": False}, {"bits": "auto"}], ids=["L3", "tensors", "auto"])
def test_state_is_plain_and_goes_on_as_before(settings):
    model, controller = adaptive(update_interval=2, **settings)
    train(model, controller, range(5))
    state = controller.state_dict()
    assert plain(state)
    twin, other = adaptive(net(), update_interval=2, **settings)
    twin.load_state_dict(model.state_dict())
    with our_warnings(0):
        other.load_state_dict(json.loads(json.dumps(state)))
    assert json.dumps(other.state_dict()) == json.dumps(state)
    assert other.bits() == controller.bits() and other.steps == 5
    assert_same_run((model, controller), (twin, other), range(5, 10))
    assert other.history == controller.history
    assert len(controller.history) > len(state["history"])  # what was handed out did not grow with it


def test_state_does_not_depend_on_the_order_of_keys():
    """As the Trainer writes its state."""
    model, controller = adaptive()
    train(model, controller, range(3))
    twin, other = adaptive(net())
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(json.loads(json.dumps(controller.state_dict(), sort_keys=True)))
    assert_same_run((model, controller), (twin, other), range(3, 10))
    assert other.history == controller.history


def test_state_before_the_first_step():
    _, controller = adaptive()
    state = json.loads(json.dumps(controller.state_dict()))
    model, other = adaptive()
    other.load_state_dict(state)
    train(model, other, range(2))
    assert [entry["step"] for entry in other.history] == [1, 2]


def test_state_at_a_level_without_choice_keeps_the_rounding():
    model, controller = adaptive(level="L2")
    train(model, controller, range(3))
    twin, other = adaptive(net(), level="L2")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert torch.equal(train(model, controller, range(3, 4))[0], train(twin, other, range(3, 4))[0])


@pytest.mark.parametrize("change", [{"level": "L2.5"}, {"bits": 3}, {"seed": 1}, {"bits": "auto"}], ids=str)
def test_state_of_other_settings_is_told_and_left(change):
    model, controller = adaptive()
    train(model, controller, range(2))
    other_model, other = adaptive(**change)
    with our_warnings(1) as found:
        other.load_state_dict(controller.state_dict())
    ((field, value),) = change.items()
    assert "not taken over" in found[0] and f"Expected {field}={value!r}" in found[0]
    assert (other.steps, other.bits(), other.history) == (0, {}, [])
    train(other_model, other, range(1))
    assert len(other.history) == 1


def test_state_of_another_model_is_told_and_let_go_of():
    other_model, other = adaptive(torch.nn.Sequential(torch.nn.Sequential(net())))
    train(other_model, other, range(3))
    model, controller = adaptive(net())
    fresh, untouched = adaptive(net())
    fresh.load_state_dict(model.state_dict())
    controller.load_state_dict(other.state_dict())
    with our_warnings(1) as found:
        train(model, controller, range(4))
    assert "let go of" in found[0] and f"such as {min(other.bits())!r}" in found[0]
    train(fresh, untouched, range(4))
    assert controller.bits().keys() == untouched.bits().keys()
    assert controller.steps == 7


def test_parts_that_take_turns_keep_what_is_known_of_both():
    model = hf_actnn.convert(nn.ModuleList([net(), net()]), level="L3", min_numel=64, update_interval=1)
    chooses = hf_actnn.controller(model)
    with our_warnings(0):
        for step in range(6):
            train(model[step % 2], chooses, range(step, step + 1))
    assert {name.split(".")[0] for name in chooses._kept} == {"0", "1"}


def test_no_state_is_told_where_bits_are_chosen():
    _, controller = adaptive()
    with our_warnings(1) as found:
        controller.load_state_dict({})
    assert "a checkpoint without a state" in found[0]
    _, fixed = adaptive(level="L2")
    with our_warnings(0):
        fixed.load_state_dict({})


@pytest.mark.parametrize("garbage", [None, "state", 3, [1, 2], {"a": 1}, {"model": {}, "optimizer": {}}], ids=str)
def test_garbage_is_no_state(garbage):
    model, controller = adaptive()
    train(model, controller, range(1))
    before = json.dumps(controller.state_dict())
    with pytest.raises(ConfigError, match="not the state of a controller"):
        controller.load_state_dict(garbage)
    assert json.dumps(controller.state_dict()) == before


@pytest.mark.parametrize("missing", ["due", "kept", "plan", "table"])
def test_half_a_state_is_no_state(missing):
    model, controller = adaptive()
    train(model, controller, range(2))
    state = controller.state_dict()
    del state[missing]
    _, other = adaptive()
    with pytest.raises(ConfigError, match="not the state of a controller"):
        other.load_state_dict(state)
    assert other.steps == 0
