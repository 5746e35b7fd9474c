"""Batch normalisations in front of a ReLU: its bit is the sign of what is coded, whose levels span half as much."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.saving import scope as scopes
from hf_actnn.saving.rules import norms

KINDS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


#: Ways to write a ReLU.
FORMS = {
    "function": relu,
    "in place": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.relu(),
    "torch": lambda x: torch.relu_(x),
    "module": nn.ReLU(inplace=True),
}


def name_of(function: Any) -> str:
    return function.__name__


class Block(nn.Module):
    """Two convolutions, a batch normalisation and an activation between them."""

    def __init__(self, dimensions: int = 4, affine: bool = True, activation: Any = relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = CONVOLUTIONS[dimensions](8, 64, 1)
        self.norm = KINDS[dimensions](64, affine=affine)
        self.second = CONVOLUTIONS[dimensions](64, 8, 1)
        self.activation = activation
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.norm(self.first(x))))


def picture(dimensions: int = 4, samples: int = 8, size: int = 4) -> Tensor:
    return torch.randn(samples, 8, *[size] * (dimensions - 2), generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module, x: Tensor, **autocast: Any) -> Tensor:
    """Of a linear function of the output, so that nothing but what is kept is random."""
    model.zero_grad()
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each normalisation in front of a ReLU was folded."""
    found: list[bool] = []
    keep = norms._keep_folded
    monkeypatch.setattr(norms, "_keep_folded", lambda *args: found.append(keep(*args)) or found[-1])
    return found


def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_keep_folded", lambda *args: False)


def held(model: nn.Module, x: Tensor) -> float:
    with hf_actnn.track_memory(model) as memory:
        model(x).sum().backward()
    return memory.saved_bytes


class Both(Block):
    """Convolutions of what the ReLU gives and of what it is given, whose weights' gradients are linear in these."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.third = nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.second(self.activation(y)) + self.third(y)


def linear_gradients(model: Both) -> Tensor:
    """``[2, weights]``"""
    gradients(model, picture())
    return torch.stack([model.second.weight.grad.flatten(), model.third.weight.grad.flatten()]).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [4, 40])  # groups of many channels, and of one
def test_the_variance_falls_for_eight_bytes_a_channel(form, size, monkeypatch):
    x = picture(size=size)
    exact = gradients(Block(), x)

    def found() -> tuple[float, float]:
        models = [hf_actnn.convert(Block(activation=FORMS[form]), bits=2, min_numel=64, seed=s) for s in range(12)]
        errors = [gradients(model, x) - exact for model in models]
        return held(models[0], x), sum(float(one[-520:].square().sum()) for one in errors)  # of the second one

    ran = watch(monkeypatch)
    nbytes, variance = found()
    assert ran and all(ran)
    unfolded(monkeypatch)
    before, other = found()
    assert nbytes == before + 8 * 64
    assert variance < other / 2


def is_unbiased(found: Tensor, exact: Tensor) -> bool:
    """Whether independent draws have the exact gradient for a mean: the product of the errors of two draws has the
    squared bias for its mean. To five deviations, which the products themselves tell."""
    errors, count = found - exact, len(found)
    products = (errors @ errors.T).fill_diagonal_(0)
    pairs = count * (count - 1)
    deviation = math.sqrt(2 * float(products.square().sum()) / pairs**2)
    return float(products.sum()) / pairs < 5 * deviation


def both(bits: int, count: int = 300, activation: Any = relu) -> list[bool]:
    exact = linear_gradients(Both(activation=activation))
    models = (
        hf_actnn.convert(Both(activation=activation), bits=bits, min_numel=64, seed=seed) for seed in range(count)
    )
    found = torch.stack([linear_gradients(model) for model in models], dim=1)
    return [is_unbiased(*one) for one in zip(found, exact, strict=True)]


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("activation", [relu, F.leaky_relu], ids=name_of)
def test_gradients_are_right_on_average(bits, activation):
    assert both(bits, activation=activation) == [True, True]


@pytest.mark.parametrize("activation", [F.relu6, F.hardtanh, F.hardsigmoid], ids=name_of)
def test_between_two_corners_the_bias_is_small(activation):
    """One bit says that a value lies between them, none on which side of both it lies. The codes alone, cut off at the
    corners, would have four times that."""
    exact = linear_gradients(Both(activation=activation))[0]
    models = (hf_actnn.convert(Both(activation=activation), bits=4, min_numel=64, seed=seed) for seed in range(150))
    errors = torch.stack([linear_gradients(model)[0] for model in models]) - exact
    products = (errors @ errors.T).fill_diagonal_(0)
    bias = math.sqrt(max(float(products.sum()), 0) / (150 * 149)) / float(exact.norm())
    assert bias < (0.0008 if activation is F.hardsigmoid else 0.006)


@pytest.mark.parametrize("planted", ["behind the corner", "before it"])
def test_a_bias_would_be_seen(planted, monkeypatch):
    """What lies on one side comes back a twentieth too near to the corner."""
    masked = norms.Masked

    def biased(name: str, source: Any, mask: Any, on: float, like: Tensor, off: float = 0.0) -> Any:
        if planted == "before it":
            return masked(name, source, mask, on, like, off=0.95 * off)
        return masked(name, source, mask, 0.95 * on if name else on, like, off=off)

    monkeypatch.setattr(norms, "Masked", biased)
    assert both(2) == ([False, True] if planted == "behind the corner" else [True, False])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dimensions", [3, 4, 5])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "autocast", "float64", "running"])
def test_gradients_are_close_at_eight_bits(form, dimensions, affine, monkeypatch):
    x, autocast = picture(dimensions), {}
    model, exact = (Block(dimensions, affine) for _ in range(2))
    if form == "channels_last":
        if dimensions != 4:
            pytest.skip("has no such layout")
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "float64":
        x, model, exact = x.double(), model.double(), exact.double()
    elif form == "autocast":
        autocast = {"dtype": torch.bfloat16}
    elif form == "running":
        for one in (model, exact):
            one.norm.eval()
            one.norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
            one.norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(4))
        x = torch.randn(2, 8, *{3: [4096], 4: [64, 64], 5: [16, 16, 16]}[dimensions])
    hf_actnn.convert(model, bits=8, min_numel=64)
    ran = watch(monkeypatch)
    found, expected = gradients(model, x, **autocast), gradients(exact, x, **autocast)
    assert ran == [True]
    assert F.cosine_similarity(found, expected, dim=0) > (0.999 if autocast else 0.9999)
    assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


def test_weights_that_are_zero_and_corners_that_are_far(monkeypatch):
    """Where all values are on one side, there is nothing to fold by."""
    model, exact = Block(), Block()
    for one in (model, exact):
        with torch.no_grad():
            one.norm.weight[:8], one.norm.bias[:8] = 0.0, 1.0
            one.norm.weight[8:12], one.norm.bias[8:12] = 0.0, 0.0
            one.norm.weight[12:20], one.norm.bias[12:20] = 1e-6, -1.0
            one.norm.weight[20:28], one.norm.bias[20:28] = -0.5, 5.0
            one.norm.weight[28:32], one.norm.bias[28:32] = 1.0, -2.5
    hf_actnn.convert(model, bits=8, min_numel=64)
    ran = watch(monkeypatch)
    found, expected = gradients(model, picture()), gradients(exact, picture())
    assert ran == [True] and found.isfinite().all()
    assert F.cosine_similarity(found, expected, dim=0) > 0.999


def test_what_the_normalisation_gives_may_be_read_by_others_too(monkeypatch):
    class Gate(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            return self.second(F.relu(y) + y.sigmoid() * y)

    model, exact, ran = hf_actnn.convert(Gate(), bits=8, min_numel=64), Gate(), watch(monkeypatch)
    found, expected = gradients(model, picture()), gradients(exact, picture())
    assert ran == [True]
    assert F.cosine_similarity(found, expected, dim=0) > 0.999


@pytest.mark.parametrize("between", ["another function", "nothing", "gelu", "a view", "other data"])
def test_only_a_relu_that_follows_folds(between, monkeypatch):
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            if between == "another function":
                y = F.relu(y * 2)
            elif between == "gelu":
                y = F.gelu(y)
            elif between == "a view":
                y = F.relu(y.transpose(2, 3))
            elif between == "other data":
                y = y + F.relu(x.mean())
            else:
                return y
            return self.second(y)

    model, exact, ran = hf_actnn.convert(Other(), bits=8, min_numel=64), Other(), watch(monkeypatch)
    for one in (model, exact):
        if between == "nothing":
            del one.second
    found, expected = gradients(model, picture()), gradients(exact, picture())
    assert ran == []
    assert F.cosine_similarity(found, expected, dim=0) > 0.999


def test_a_normalisation_that_waits_is_decided_on_before_anything_else(monkeypatch):
    """At the end of the model, where a forward pass ends in an error, and where an autograd.Function comes next."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert ctx.saved_tensors[0].shape == grad.shape
            return grad * 2

    class Last(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.way = nn.BatchNorm2d(64), way

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x.sin())
            if self.way == "error":
                raise RuntimeError("on purpose")
            return Twice.apply(y) if self.way == "autograd.Function" else y

    x = torch.randn(8, 64, 4, 4)
    for way in ("end", "autograd.Function"):
        found = gradients(hf_actnn.convert(Last(way), bits=8, min_numel=64), x)
        assert F.cosine_similarity(found, gradients(Last(way), x), dim=0) > 0.999
    with pytest.raises(RuntimeError, match="on purpose"):
        hf_actnn.convert(Last("error"), bits=8, min_numel=64)(x)
    assert scopes.current() is None


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    x.mul_(2)
    return x


@pytest.mark.parametrize("then", ["relu", "nothing"])
def test_what_no_function_mode_sees_changes_the_output(then):
    class Scripted(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = doubled(self.norm(self.first(x)))
            return self.second(F.relu(y) if then == "relu" else y)

    found = gradients(hf_actnn.convert(Scripted(), bits=8, min_numel=64), picture())
    expected = gradients(Scripted(), picture())
    assert F.cosine_similarity(found, expected, dim=0) > 0.999
    assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


def test_a_forward_pass_that_is_interrupted_can_be_differentiated():
    model, exact = hf_actnn.convert(Block(), bits=8, min_numel=64), Block()
    found = []
    for one in (model, exact):
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: Any, out: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(out)
            raise StopIteration

        one.norm.register_forward_hook(stop)
        with pytest.raises(StopIteration):
            one(picture())
        weights = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(1))
        (seen[0] * weights).sum().backward()
        found.append(one.first.weight.grad.flatten())
    assert F.cosine_similarity(*found, dim=0) > 0.999


def test_running_statistics_that_training_overwrites():
    found = []
    for model in (hf_actnn.convert(Block(), bits=8, min_numel=64), Block()):
        model.norm.eval()
        x = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(5))
        out = model(x)
        model.norm.train()
        model(3 * x + 1)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out * weights).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*found, dim=0) > 0.999


def test_a_channel_that_running_statistics_do_not_fit_spoils_no_other(monkeypatch):
    model, exact, ran = hf_actnn.convert(Block(), bits=4, min_numel=64), Block(), watch(monkeypatch)
    for one in (model, exact):
        one.norm.eval()
        one.norm.running_var[3] = 0.0
        one.norm.weight.data[3] = 1e-3
    found, expected = gradients(model, picture())[-520:], gradients(exact, picture())[-520:]
    assert ran == [] and F.cosine_similarity(found, expected, dim=0) > 0.99


def test_a_relu_that_is_left_out_folds_nothing(monkeypatch):
    ran = watch(monkeypatch)
    model = hf_actnn.convert(Block(activation=nn.ReLU()), bits=8, min_numel=64, skip=["activation"])
    gradients(model, picture())
    assert ran == []


def test_parameters_that_change_before_the_backward_pass_are_told():
    """As autograd itself tells it."""
    model = hf_actnn.convert(Block(), bits=8, min_numel=64)
    out = model(picture())
    with torch.no_grad():
        model.norm.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bits_are_chosen_for_what_is_folded(monkeypatch):
    model = hf_actnn.convert(Block(), level="L3", min_numel=64, update_interval=1)
    ran = watch(monkeypatch)
    for _ in range(3):
        gradients(model, picture())
        hf_actnn.controller(model).step()
    assert ran == [True] * 3
    assert "norm:batch_norm" in hf_actnn.controller(model).bits()
    found = hf_actnn.variance_report(model, lambda: gradients(model, picture()))
    assert found is not None
