"""The variance of the gradient over the drawing of the batch, from steps one after the other, against the truth."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import pickle
import statistics
import warnings
import weakref
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.errors import ActNNWarning
from hf_actnn.precision import controller as module
from hf_actnn.precision.minibatch import LEAST, WINDOW, MinibatchVariance
from tests.precision.small import adaptive, backward, batch, gradient, net, train

POOL = 400


class Problem:
    """Fixed weights, and batches drawn from a pool: what varies between steps is the drawing alone.

    With batch normalisation the gradient of a sample depends on the others of its batch, so that no split of a single
    gradient by sample tells how gradients of batches differ.
    """

    def __init__(self, normalised: bool, width: int = 24) -> None:
        torch.manual_seed(0)
        norm: nn.Module = nn.BatchNorm1d(width) if normalised else nn.Identity()
        self.model = nn.Sequential(nn.Linear(10, width), norm, nn.ReLU(), nn.Linear(width, 4)).train()
        self.x = torch.randn(POOL, 10) + 0.5
        self.y = (self.x[:, :4].argmax(1) + (torch.rand(POOL) < 0.3)) % 4
        self.generator = torch.Generator().manual_seed(1)
        self.sizes = [p.numel() for p in self.model.parameters()]

    def gradient(self, size: int = 16, scale: float = 1.0, passes: int = 1) -> Tensor:
        """Of a new batch, in so many micro-batches."""
        self.model.zero_grad()
        for _ in range(passes):
            chosen = torch.randint(POOL, (size,), generator=self.generator)
            loss = F.cross_entropy(self.model(self.x[chosen]), self.y[chosen])
            (loss * scale / passes).backward()
        return gradient(self.model)

    def truth(self, draws: int = 1500, **settings: float) -> tuple[float, float]:
        """The variance; and what estimates it without bias, but in the geometric mean of pairs for each parameter."""
        drawn = torch.stack([self.gradient(**settings) for _ in range(draws)]).double()
        return float(drawn.var(0).sum()), sum(typical(one) for one in drawn.split(self.sizes, 1))


def windows(problem: Problem, count: int, steps: int = WINDOW + 1, **settings: float) -> list[float]:
    """An estimate from each of several windows that have nothing in common."""
    found = []
    for _ in range(count):
        variance = MinibatchVariance()
        for _ in range(steps):
            variance.watch(problem.model.parameters())
            problem.gradient(**settings)
            variance.step()
        found.append(total(variance))
    return found


def mean(gradients: Iterable[Tensor]) -> float:
    """Geometric, of half the squared differences."""
    logs = [math.log(float((b - a).double().square().sum()) / 2) for a, b in itertools.pairwise(gradients)]
    return math.exp(statistics.mean(logs))


def typical(gradients: Tensor) -> float:
    """The mean of :func:`mean`, put right as for normal numbers: by what a sample of these says."""
    values = gradients.shape[1]
    squares = torch.randn(4000, values, generator=torch.Generator().manual_seed(0)).double().square().sum(1)
    return mean(gradients) * values / float(squares.log().mean().exp())


def total(variance: MinibatchVariance) -> float:
    return sum(variance.take().values())


def apart(found: list[float], truth: float) -> float:
    """Standard errors between the mean of the estimates, as logarithms, and the truth."""
    logs = [math.log(one / truth) for one in found]
    return statistics.mean(logs) / (statistics.stdev(logs) / math.sqrt(len(logs)))


@pytest.mark.parametrize(
    ("normalised", "settings"),
    [(False, {}), (True, {}), (True, {"scale": 512.0}), (False, {"passes": 3}), (True, {"size": 5})],
    ids=["plain", "batchnorm", "scaled", "micro-batches", "odd"],
)
def test_it_is_the_variance_of_the_gradient(normalised, settings):
    """Four standard errors of 40 windows from the geometric mean of pairs, which a bias of a tenth would exceed."""
    problem = Problem(normalised)
    variance, typical = problem.truth(**settings)
    found = windows(problem, 40, **settings)
    assert abs(apart(found, typical)) < 4
    assert (
        abs(apart([1.1 * one for one in found], typical)) > 4 or abs(apart([0.9 * one for one in found], typical)) > 4
    )
    assert 0.7 * variance < typical < 1.02 * variance


def test_one_window_is_within_half_of_it():
    problem = Problem(True)
    variance, _ = problem.truth()
    assert all(0.5 * variance < one < 2 * variance for one in windows(problem, 20))


def test_one_outlier_does_not_decide():
    """Of 17 gradients one is ten times as long."""
    problem = Problem(False, width=16)
    plain, upset = windows(problem, 1)[0], MinibatchVariance()
    for step in range(WINDOW + 1):
        upset.watch(problem.model.parameters())
        problem.gradient(scale=10.0 if step == 8 else 1.0)
        upset.step()
    assert total(upset) < 2.5 * plain


def test_a_choice_of_values_stands_for_all():
    """Of 40,000 values some hundreds are looked at; the squares of all are as much as theirs on average over models."""
    ratios = []
    for seed in range(30):
        torch.manual_seed(seed)
        layer = nn.Linear(200, 200, bias=False)
        variance, gradients = MinibatchVariance(), []
        for _ in range(3):
            variance.watch(layer.parameters())
            layer.zero_grad()
            layer(torch.randn(16, 200)).square().sum().backward()
            gradients.append(gradient(layer))
            variance.step()
        assert variance._last is not None and LEAST < len(variance._last) < 40000 / 50
        ratios.append(total(variance) / mean(gradients))
    assert abs(apart(ratios, 1.0)) < 4 and statistics.stdev(ratios) < 0.3


def test_small_parameters_are_looked_at_whole():
    problem = Problem(False, width=16)
    variance = MinibatchVariance()
    gradients = []
    for _ in range(4):
        variance.watch(problem.model.parameters())
        gradients.append(problem.gradient().double())
        variance.step()
    expected = sum(typical(one) for one in torch.stack(gradients).split(problem.sizes, 1))
    assert total(variance) == pytest.approx(expected, rel=0.02)
    assert variance.take() == {}  # the next window has begun


def test_parameters_without_values_and_with_one():
    """A scalar's squared difference is a hundredth of its mean as often as not; a geometric mean has to know."""
    empty, scalar = nn.Parameter(torch.zeros(0, 48)), nn.Parameter(torch.zeros(()))
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(200):
        variance = MinibatchVariance()
        for _ in range(WINDOW + 1):
            variance.watch([empty, scalar])
            (scalar * torch.randn((), generator=generator) + empty.sum()).backward()
            variance.step()
        found.append(variance.take())
    assert all(one.keys() == {id(scalar)} for one in found)
    values = [one[id(scalar)] for one in found]
    assert math.exp(statistics.mean(map(math.log, values))) == pytest.approx(1.0, rel=0.15)


def test_a_pair_across_an_unseen_step_does_not_count():
    problem = Problem(False)
    variance = MinibatchVariance()
    for watched in (True, False, True):
        if watched:
            variance.watch(problem.model.parameters())
        problem.gradient()
        variance.step()
    assert variance.take() == {}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_begins_anew(bad):
    """After it a scaler's scale is another one."""
    problem = Problem(False, width=16)
    variance, gradients = MinibatchVariance(), []
    for scale in (1024.0, 1024.0, bad, 512.0, 512.0):
        variance.watch(problem.model.parameters())
        gradients.append(problem.gradient(scale=scale).double())
        variance.step()
    expected = sum(typical(one) for one in torch.stack(gradients[3:]).split(problem.sizes, 1))
    assert total(variance) == pytest.approx(expected, rel=0.02)


def test_a_layer_that_is_skipped_has_no_gradient():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    variance = MinibatchVariance()
    for used in (layers, layers[:1]):
        variance.watch(layers.parameters())
        sum(layer(torch.ones(1, 4)).sum() for layer in used).backward()
        variance.step()
    # The gradients of the second layer were 20 times 1, those of the first have not changed.
    found = variance.take()
    assert found.keys() == {id(parameter) for parameter in layers[1].parameters()}
    ones = torch.stack([torch.ones(16), torch.zeros(16)])
    assert found[id(layers[1].weight)] == pytest.approx(typical(ones), rel=0.02)


def test_two_parts_and_a_shared_parameter_count_once():
    problem, again = Problem(False, width=16), Problem(False, width=16)
    both, once = MinibatchVariance(), MinibatchVariance()
    for _ in range(3):
        both.watch(problem.model[:2].parameters())
        both.watch(problem.model.parameters())
        once.watch(again.model.parameters())
        problem.gradient()
        again.gradient()
        both.step()
        once.step()
    assert list(both.take().values()) == list(once.take().values())


def test_a_window_goes_on_from_its_state_bit_for_bit():
    problem = Problem(True)
    variance = MinibatchVariance()
    for step in range(6):
        if step == 3:
            other = MinibatchVariance()
            other.load(json.loads(json.dumps(variance.state())))
            fresh = copy.deepcopy(problem)
            fresh.generator.set_state(problem.generator.get_state())
        for one, where in ((variance, problem), (other, fresh)) if step >= 3 else ((variance, problem),):
            one.watch(where.model.parameters())
            where.gradient()
            one.step()
    assert variance.state() == other.state()
    assert list(variance.take().values()) == list(other.take().values())


@pytest.mark.parametrize(
    "state", [{"last": "?", "total": []}, {"last": "", "total": [1.0]}, {"last": "", "total": [[1.0]]}, {"last": ""}]
)
def test_garbage_is_no_state(state):
    with pytest.raises((ValueError, KeyError)):
        MinibatchVariance().load(state)


# -- in the controller ------------------------------------------------------------------------------------------------


def test_steps_are_compared_before_an_update_and_at_no_other_time():
    model, controller = adaptive(update_interval=3 * WINDOW, min_numel=64)
    looked = []
    for step in range(1, 2 * 3 * WINDOW + 2):
        backward(model, seed=step)
        looked.append(bool(controller._drawing._picked))
        controller.step()
        assert not controller._drawing._handles and not controller._drawing._nodes
    updates = [entry["step"] for entry in controller.history]
    assert updates == [1, 2, 3, 5, 9, 17, 33, 49, 97]
    wanted = [any(update - WINDOW <= step <= update for update in updates) for step in range(1, len(looked) + 1)]
    assert looked == wanted and not all(looked)


def test_a_model_let_go_of_in_the_middle_is_freed():
    model, controller = adaptive()
    x, y = batch(16)
    loss = F.cross_entropy(model(x), y)
    freed = weakref.ref(model[0].weight)
    del model, controller, loss
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("how", ["inactive", "inactive in the middle", "forgotten"])
def test_nobody_looks_where_nobody_asks(how, monkeypatch):
    monkeypatch.setattr(module, "FORGOTTEN", 3)
    model, controller = adaptive()
    train(model, controller, range(2))
    if how == "forgotten":
        model, controller = adaptive()
        with pytest.warns(ActNNWarning, match="step"):
            for seed in range(5):
                backward(model, seed=seed)
    else:
        if how == "inactive in the middle":
            backward(model)
        controller.active = False
        backward(model)
    assert not controller._drawing._handles and controller._drawing._last is None


def test_nothing_is_left_on_parameters():
    """A hook on a parameter would be warned of, and lost, when the model is saved."""
    model, controller = adaptive()
    train(model, controller, range(3))
    model(batch(16)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.dumps(model)
    assert all(not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("passes", [1, 6])
def test_the_share_is_that_of_the_exact_gradients(passes):
    """`added_variance` is over the variance of whole steps, whatever was measured of them, parameters by the deviation
    of their gradients.

    Within a factor of 1.5: the weights stay, so that every update learns the same.
    """
    model, controller = adaptive(net(), bits=2, update_interval=8)
    exact = hf_actnn.convert(net(), "L0")

    def one(network: nn.Module, seed: int) -> Tensor:
        network.zero_grad()
        for part in range(passes):
            x, y = batch(16, seed * passes + part)
            (F.cross_entropy(network(x), y) / passes).backward()
        return gradient(network)

    for step in range(33):
        one(model, step)
        controller.step()
    sizes = [p.numel() for p in exact.parameters()]
    drawn = torch.stack([one(exact, seed) for seed in range(100, 164)]).double().var(0)
    controller.active = False
    errors = [(one(model, seed) - one(exact, seed)).double().square() for seed in range(100, 132)]
    own = torch.stack([part.sum() for part in drawn.split(sizes)])
    added = torch.stack([part.sum() for part in torch.stack(errors).mean(0).split(sizes)])
    alive = own > 1e-6 * own.max()  # without the biases before a normalisation
    assert len(own) - int(alive.sum()) == 2, own
    weights = own[alive] ** -module.BALANCE
    expected = float((weights * added[alive]).sum() / (weights * own[alive]).sum())
    assert controller.history[-1]["added_variance"] == pytest.approx(expected, rel=0.5)
