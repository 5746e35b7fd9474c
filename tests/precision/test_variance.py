"""The closed forms of the variance against the real codec: thousands of draws of what is kept, put through torch's own
backward formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_actnn
from hf_actnn.codec import reference, rounding_variance
from hf_actnn.errors import CodecError
from hf_actnn.precision import variance

DRAWS = 2000
#: Of the ratio of a closed form to the mean over draws, whose own standard error is asked to be below MARGIN / 5.
MARGIN = 0.05
aten = torch.ops.aten


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(x: Tensor, bits: int, row_length: int, group_size: int = 256) -> tuple[Tensor, Tensor]:
    """Draws of what comes back `[DRAWS, *shape]`, and the exact variance of each value `[*shape]`.

    Rows have groups and dither of their own, so copies of a tensor, end to end, are independent draws of it. The forms
    are those of values that err independently: what mirrors another is taken from a second draw.
    """
    copies = x.flatten().repeat(DRAWS, 1)
    one, other = (
        hf_actnn.quantize(copies, bits, group_size, seed=seed, row_length=row_length).dequantize() for seed in (1, 2)
    )
    at, place = reference.layout(copies.numel(), row_length, bits, group_size), torch.arange(copies.numel())
    mirrored = place // row_length % 4 >= 2 if at.rows_mirrored else place % row_length % at.group % 4 >= 2
    drawn = torch.where(mirrored.view(copies.shape), other, one)
    return drawn.view(DRAWS, *x.shape), variance.exact(x, hf_actnn.quantize(x, bits, group_size, row_length=row_length))


def measured(found: Tensor, without: Tensor) -> tuple[float, float]:
    """Mean squared distance of gradients `[DRAWS, ...]` to the one without quantisation, and its standard error."""
    squared = (found.double() - without.double()).flatten(1).square().sum(1)
    return squared.mean().item(), squared.std().item() / math.sqrt(len(squared))


def ratio(form: Tensor, found: Tensor, without: Tensor) -> float:
    mean, error = measured(found, without)
    assert error < MARGIN / 5 * mean, "too few draws, or values, to tell"
    return form.item() / mean


# -- values -----------------------------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(6, 500),
    "relu": lambda: normal(6, 500).relu(),
    "constant": lambda: torch.full((6, 500), 3.3),
    "a constant group among others": lambda: torch.cat([torch.full((3, 500), -0.1), normal(3, 500)]),
    "huge offset": lambda: normal(6, 500) + 1e6,
    "one outlier": lambda: normal(6, 500).index_fill_(1, torch.tensor([7]), 1e4),
    "tiny": lambda: normal(6, 500) * 1e-39,
    "large": lambda: normal(6, 500) * 1e36,
    "short rows": lambda: normal(1000, 3),
    "half": lambda: normal(6, 500).half(),
    "bfloat16": lambda: normal(6, 500).bfloat16(),
    "double": lambda: normal(6, 500, dtype=torch.float64),
    "transposed": lambda: normal(500, 6).T,
    "strided": lambda: normal(6, 1000)[:, ::2],
    "channels last": lambda: normal(2, 6, 10, 25).to(memory_format=torch.channels_last),
    "not finite": lambda: normal(6, 500).index_fill_(0, torch.tensor([2]), torch.nan),
    "kept exactly": lambda: normal(6, 500).index_fill_(0, torch.tensor([2]), 3e38),
}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", VALUES)
def test_exact_is_the_codec_s_and_below_the_bound(name, bits):
    x = VALUES[name]()
    packed = hf_actnn.quantize(x, bits, group_size=96)
    exact, bound = variance.exact(x, packed), variance.bound(packed)
    assert exact.shape == bound.shape == x.shape
    assert exact.dtype == bound.dtype == torch.float64
    assert (exact >= 0).all()
    assert (exact <= bound).all()
    assert torch.equal(bound > 0, variance.estimate(packed) > 0)
    torch.testing.assert_close(exact.sum(), rounding_variance(x, packed).sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ["constant", "a constant group among others", "not finite", "kept exactly"])
def test_no_step_no_variance(name):
    x = VALUES[name]().clamp(max=3e38)
    packed = hf_actnn.quantize(x, 2, group_size=100)
    whole = x.view(6, 5, 100)
    without = (whole.amax(-1) == whole.amin(-1)) & (whole.amin(-1) == whole.amin(-1).bfloat16())
    without |= ~whole.isfinite().all(-1) | (whole.abs() >= 2.0**126).any(-1)
    without = without.repeat_interleave(100, 1).view(x.shape)
    for form in (variance.estimate(packed), variance.bound(packed), variance.exact(x, packed)):
        assert (form[without] == 0).all()


def test_a_constant_that_is_no_bf16_number_has_the_step_that_is_stored():
    packed = hf_actnn.quantize(torch.full((1, 300), 3.3), 1)
    steps = packed.meta[:, 1].double()
    assert (steps > 0).all()
    assert torch.equal(variance.bound(packed).unique(), (steps.square() / 4).unique())


@pytest.mark.parametrize("widths", [(1, 8, 3), (2, 2, 5)])
def test_widths_per_sample(widths):
    x = normal(3, 4, 10, 10)
    packed = hf_actnn.quantize(x, torch.tensor(widths, dtype=torch.uint8))
    exact = variance.exact(x, packed)
    assert (exact <= variance.bound(packed)).all()
    torch.testing.assert_close(exact.flatten(1).sum(1), rounding_variance(x, packed), rtol=1e-12, atol=0.0)


def test_exact_of_every_value():
    x = normal(512)
    drawn, form = kept(x, 2, 512)
    found = (drawn.double() - x).square().mean(0)
    # The dither has 256 levels: f is off by up to 1/512, so that a variance is by up to 1/512 of a squared step.
    step2 = 4 * variance.bound(hf_actnn.quantize(x, 2))
    assert ((found - form).abs() < step2 * (4.5 * 0.5 / math.sqrt(DRAWS) + 1 / 512)).all()
    assert abs(form.sum() / found.sum() - 1) < 0.01


@pytest.mark.parametrize("bits", range(2, 9))
def test_estimate_of_values_spread_out(bits):
    x = torch.rand(64, 256, generator=torch.Generator().manual_seed(bits))
    packed = hf_actnn.quantize(x, bits)
    assert abs(variance.estimate(packed).sum() / variance.exact(x, packed).sum() - 1) < 0.1
    if bits >= 3:
        x = normal(64, 256)
        packed = hf_actnn.quantize(x, bits)
        assert abs(variance.estimate(packed).sum() / variance.exact(x, packed).sum() - 1) < 0.1


def test_refuses_another_tensor():
    with pytest.raises(CodecError, match="not what was quantised"):
        variance.exact(normal(4, 8), hf_actnn.quantize(normal(8, 4), 2))


def test_refuses_another_code():
    packed = hf_actnn.quantize(normal(4, 8), 2)
    packed.code = "another"
    with pytest.raises(CodecError, match="another"):
        variance.bound(packed)


# -- gradients of parameters: linear in what is kept, so exact at any width --------------------------------------------


def of_weight(function: Callable[[Tensor, Tensor], Tensor], weight: Tensor, grad: Tensor) -> Callable[[Tensor], Tensor]:
    """From what is kept `[D, *x]` to gradients of the weight `[D, *weight]`, by autograd."""

    def backward(x: Tensor) -> Tensor:
        _, pull = torch.func.vjp(lambda w: function(x, w), weight)
        return pull(grad)[0]

    return torch.func.vmap(backward, chunk_size=250)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("shape", [(24,), (4, 6)], ids=str)
def test_linear(bits, shape):
    x, weight, grad = normal(*shape, 64), normal(32, 64, seed=1), normal(*shape, 32, seed=2)
    drawn, v = kept(x, bits, 64)
    backward = of_weight(F.linear, weight, grad)
    assert ratio(variance.linear(grad, v), backward(drawn), backward(x[None])[0]) == pytest.approx(1, abs=MARGIN)


CONVOLUTIONS: dict[str, dict] = {
    "1d": {"size": (24,), "kernel": (3,), "padding": 1},
    "1d stride dilation": {"size": (24,), "kernel": (3,), "stride": 2, "padding": 2, "dilation": 2},
    "1d transposed": {"size": (12,), "kernel": (4,), "stride": 2, "padding": 1, "transposed": True},
    "2d": {"size": (8, 7), "kernel": (3, 3), "padding": 1},
    "2d no padding": {"size": (8, 8), "kernel": (3, 3)},
    "2d same": {"size": (7, 7), "kernel": (5, 3), "padding": "same"},
    "2d strides": {"size": (9, 8), "kernel": (3, 2), "stride": (2, 3), "padding": (1, 0)},
    "2d dilation": {"size": (9, 9), "kernel": (3, 3), "padding": (2, 3), "dilation": (2, 3)},
    "2d groups": {"size": (8, 8), "kernel": (3, 3), "padding": 1, "groups": 4},
    "2d depthwise": {"size": (8, 8), "kernel": (5, 5), "padding": 2, "groups": 8},
    "2d patches": {"size": (8, 8), "kernel": (4, 4), "stride": 4},
    "2d pointwise": {"size": (6, 6), "kernel": (1, 1)},
    "2d transposed": {"size": (4, 5), "kernel": (3, 2), "stride": (2, 3), "padding": (1, 0), "transposed": True},
    "2d transposed groups": {
        "size": (5, 5),
        "kernel": (3, 3),
        "stride": 2,
        "padding": 1,
        "groups": 2,
        "transposed": True,
    },
    "2d transposed output padding": {
        "size": (4, 4),
        "kernel": (2, 2),
        "stride": 1,
        "dilation": 3,
        "output_padding": 2,
        "transposed": True,
    },
    "3d": {"size": (4, 5, 4), "kernel": (3, 3, 3), "padding": 1},
    "3d groups stride": {"size": (4, 6, 5), "kernel": (2, 3, 2), "stride": (1, 2, 1), "groups": 2},
    "3d transposed": {"size": (3, 3, 3), "kernel": (2, 2, 2), "stride": 2, "transposed": True},
}
IN, OUT = 8, 16


class Convolution:
    """One case: tensors, the operation, and how it is passed to the closed form."""

    def __init__(self, name: str) -> None:
        case = dict(CONVOLUTIONS[name])
        size, kernel, transposed = case.pop("size"), case.pop("kernel"), case.pop("transposed", False)
        groups = case.get("groups", 1)
        function = getattr(F, f"conv{'_transpose' * transposed}{len(size)}d")
        channels = (IN, OUT // groups) if transposed else (OUT, IN // groups)
        self.x, self.weight = normal(4, IN, *size), normal(*channels, *kernel, seed=1)
        self.function = lambda x, w: function(x, w, **case)
        # Samples and places differ in size, so that what a form exchanges or forgets shows.
        self.grad = normal(*self.function(self.x, self.weight).shape, seed=2).exp()
        self.x *= torch.linspace(0.3, 2, 4).view(-1, 1, *[1] * len(size))
        self.settings = {key: value for key, value in case.items() if key != "output_padding"}
        self.settings |= {"kernel_size": kernel, "transposed": transposed}

    def form(self, v: Tensor, **changes) -> Tensor:
        return variance.convolution(self.grad, v, **{**self.settings, **changes})

    def draws(self, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """The variance of the kept values, gradients over draws, and the one without quantisation."""
        drawn, v = kept(self.x, bits, self.x[0].numel())
        backward = of_weight(self.function, self.weight, self.grad)
        return v, backward(drawn), backward(self.x[None])[0]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    case = Convolution(name)
    v, found, without = case.draws(2)
    assert ratio(case.form(v), found, without) == pytest.approx(1, abs=MARGIN)


# -- gradients of activations: first order ----------------------------------------------------------------------------


def second_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.double().requires_grad_()
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("name", ["gelu", "gelu tanh", "silu", "tanh", "sigmoid"])
def test_elementwise(name, bits):
    x, grad = normal(8, 128), normal(8, 128, seed=1)
    backward: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": lambda value: aten.gelu_backward(grad, value),
        "gelu tanh": lambda value: aten.gelu_backward(grad, value, approximate="tanh"),
        "silu": lambda value: aten.silu_backward(grad, value),
        "tanh": lambda value: aten.tanh_backward(grad, value),
        "sigmoid": lambda value: aten.sigmoid_backward(grad, value),
    }
    if name in ("tanh", "sigmoid"):  # these keep their result
        x = getattr(torch, name)(x)
        second = -2 * x if name == "tanh" else 1 - 2 * x
    else:
        functions = {"gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
        second = second_derivative(functions[name], x)
    drawn, v = kept(x, bits, 128)
    found = torch.stack([backward[name](one) for one in drawn])
    form = variance.elementwise(grad, second, v)
    assert ratio(form, found, backward[name](x)) == pytest.approx(1, abs=MARGIN)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(64,), (4, 16)], ids=str)
def test_layer_norm(bits, affine, shape):
    # A part of the gradient along the values, so that the covariance of both terms counts.
    x = normal(8, 3, *shape) + 0.5
    grad = normal(8, 3, *shape, seed=1) + 0.7 * x
    weight, bias = (normal(*shape, seed=2).exp(), torch.zeros(shape)) if affine else (None, None)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, 1e-5)
    drawn, v = kept(x, bits, shape[-1])
    mask = [True, affine, False]

    def backward(value: Tensor) -> tuple[Tensor, ...]:
        return aten.native_layer_norm_backward(grad, value, shape, mean, rstd, weight, bias, mask)

    found, without = list(zip(*map(backward, drawn), strict=True)), backward(x)
    forms = variance.layer_norm(grad, (x - mean) * rstd, rstd, weight, v)
    assert ratio(forms[0], torch.stack(found[0]), without[0]) == pytest.approx(1, abs=MARGIN)
    if affine:
        assert ratio(forms[1], torch.stack(found[1]), without[1]) == pytest.approx(1, abs=MARGIN)


def batch_norm_draws(x: Tensor, grad: Tensor, weight: Tensor | None, drawn: Tensor) -> tuple[Tensor, ...]:
    """Of `dx`, `dw` `[D, ...]` by torch's formula: draws lie beside each other as further channels."""

    def wide(values: Tensor) -> Tensor:
        return values.transpose(0, 1).flatten(1, 2)  # [D, N, C, ...] -> [N, D C, ...]

    count, channels = len(drawn), x.shape[1]
    others = [dim for dim in range(x.ndim) if dim != 1]
    mean, rstd = x.mean(others), (x.var(others, correction=0) + 1e-5).rsqrt()
    weights = None if weight is None else weight.repeat(count)
    dx, dw, _ = aten.native_batch_norm_backward(
        wide(grad.expand(count, *grad.shape)),
        wide(drawn),
        weights,
        None,
        None,
        mean.repeat(count),
        rstd.repeat(count),
        True,
        1e-5,
        [True, weight is not None, False],
    )
    dx = dx.unflatten(1, (count, channels)).transpose(0, 1)
    return dx, (None if dw is None else dw.view(count, channels)), mean, rstd


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [(), (20,), (5, 5), (3, 3, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batch_norm(bits, size, affine):
    samples, channels = (64, 32) if not size else (6, 24)
    x = normal(samples, channels, *size) + 0.5
    grad = normal(samples, channels, *size, seed=1) + 0.7 * x
    weight = normal(channels, seed=2).mul(0.5).exp() if affine else None
    drawn, v = kept(x, bits, x[0].numel())
    dx, dw, mean, rstd = batch_norm_draws(x, grad, weight, drawn)
    dx0, dw0, *_ = batch_norm_draws(x, grad, weight, x[None])
    form = (-1, *[1] * len(size))
    forms = variance.batch_norm(grad, (x - mean.view(form)) * rstd.view(form), rstd, weight, v)
    assert ratio(forms[0], dx, dx0[0]) == pytest.approx(1, abs=MARGIN)
    if affine:
        assert ratio(forms[1], dw, dw0[0]) == pytest.approx(1, abs=MARGIN)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("bits", [6, 8])
def test_softmax(bits, dim):
    p, grad = normal(4, 16, 32).softmax(dim), normal(4, 16, 32, seed=1)
    drawn, v = kept(p, bits, 32)
    found = aten._softmax_backward_data(grad.expand_as(drawn), drawn, dim if dim < 0 else dim + 1, torch.float32)
    without = aten._softmax_backward_data(grad, p, dim, torch.float32)
    assert ratio(variance.softmax(grad, p, v, dim), found, without) == pytest.approx(1, abs=MARGIN)


@pytest.mark.parametrize("broadcast", [False, True], ids=["batched", "broadcast"])
def test_matmul(broadcast):
    left, right = normal(3, 16, 24), normal(*(() if broadcast else (3,)), 24, 12, seed=1)
    grad = normal(3, 16, 12, seed=2).exp()
    drawn_left, v_left = kept(left, 2, 24)
    drawn_right, v_right = kept(right, 2, 12)
    of_left, of_right = variance.matmul(grad, v_left, v_right)

    def d_right(left: Tensor) -> Tensor:
        found = left.mT @ grad
        return found.sum(-3) if broadcast else found

    assert ratio(of_left, grad @ spread(drawn_right, 5).mT, grad @ right.mT) == pytest.approx(1, abs=MARGIN)
    assert ratio(of_right, d_right(drawn_left), d_right(left)) == pytest.approx(1, abs=MARGIN)
    assert variance.matmul(grad, v_left=v_left)[0] == variance.matmul(grad, v_right=v_right)[1] == 0


def spread(draws: Tensor, dimensions: int) -> Tensor:
    """`[D, K, N]` -> `[D, 1, K, N]` where a batch comes between."""
    return draws if draws.ndim == dimensions - 1 else draws.unsqueeze(1)


# -- several at once --------------------------------------------------------------------------------------------------


def test_a_shared_tensor_carries_the_sum():
    """Two linear layers and a normalisation that keep one tensor once, so that all three see the same errors."""
    x = normal(24, 64)
    grads = [normal(24, 16, seed=1), normal(24, 16, seed=2), normal(24, 64, seed=3)]
    rstd = (x.var(-1, correction=0) + 1e-5).rsqrt()
    h = (x - x.mean(-1, keepdim=True)) * rstd[:, None]
    drawn, v = kept(x, 3, 64)
    parts = [*(variance.linear(grad, v) for grad in grads[:2]), variance.layer_norm(grads[2], h, rstd, None, v)[1]]

    def backward(value: Tensor) -> Tensor:
        weights = [(grad.mT @ value).flatten(1) for grad in grads[:2]]
        scale = (grads[2] * (value - x.mean(-1, keepdim=True)) * rstd[:, None]).sum(-2)
        return torch.cat([*weights, scale], 1)

    form = variance.total(parts)
    assert form.shape == ()
    assert ratio(form, backward(drawn), backward(x[None])[0]) == pytest.approx(1, abs=MARGIN)
    assert form > 1.2 * max(parts)


# -- what a mistake would do ------------------------------------------------------------------------------------------


def without_shared_term(grad: Tensor, h: Tensor, rstd: Tensor, v: Tensor) -> Tensor:
    """`layer_norm`'s with the error of each value on its own."""
    along = (grad * h).mean(-1)
    return (rstd.squeeze(-1) ** 4 * along**2 * v.sum(-1)).sum()


MISTAKES: dict[str, tuple[str, dict]] = {
    "kernel reach forgotten": ("2d", {"kernel_size": (1, 1), "padding": 0}),
    "padding counted as data": ("2d", {"padding": "circular"}),
    "groups forgotten": ("2d groups", {"groups": 1}),
    "spacing forgotten": ("2d dilation", {"dilation": 1, "padding": (1, 1)}),
    "transposed without its stride": ("2d transposed groups", {"stride": 1}),
}


@pytest.mark.parametrize("name", [*MISTAKES, "the bound for the variance", "errors of a row on their own"])
def test_a_mistake_is_noticed(name):
    if name == "errors of a row on their own":
        x, grad = normal(24, 64), normal(24, 64, seed=1)
        _, mean, rstd = torch.native_layer_norm(x, (64,), None, None, 1e-5)
        drawn, v = kept(x, 4, 64)
        mask = [True, False, False]
        args = (64,), mean, rstd, None, None, mask
        found = torch.stack([aten.native_layer_norm_backward(grad, one, *args)[0] for one in drawn])
        without = aten.native_layer_norm_backward(grad, x, *args)[0]
        wrong = without_shared_term(grad, (x - mean) * rstd, rstd, v)
    elif name == "the bound for the variance":
        case = Convolution("2d")
        _, found, without = case.draws(2)
        wrong = case.form(variance.bound(hf_actnn.quantize(case.x, 2, row_length=case.x[0].numel())))
    else:
        case = Convolution(MISTAKES[name][0])
        changes = dict(MISTAKES[name][1])
        v, found, without = case.draws(2)
        if changes.get("padding") == "circular":
            v, changes = F.pad(v, (1, 1, 1, 1), mode="circular"), {"padding": 0}
        wrong = case.form(v, **changes)
    assert ratio(wrong, found, without) != pytest.approx(1, abs=MARGIN)
