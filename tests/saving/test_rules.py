"""One row per form of a rule: the forward pass is the same, and gradients are what the rule says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from tests.saving.bench import Bench, assert_unbiased, kinds, run

EXACT, CLOSE = "exact", "close"
CODED = {"quantized"}
WEIGHTED = {"quantized", "parameter"}
MASK = {"mask"}
SIDED = {"recipe: side"}
LOGSIGMOID = {"quantized", "recipe: logsigmoid"}
NORM = {"quantized", "exact", "parameter"}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the rule, a slash, and the form.
        function: ``function(module, *inputs)``.
        shapes: of the inputs.
        kept: how the saves of the rule's operation are kept.
        gradients: EXACT where a code must not touch them, CLOSE where it may.
        members: parameters (by shape) and submodules.
        unbiased: gradients that are linear in what is coded.
    """

    name: str
    function: Callable[..., Tensor]
    shapes: Sequence[Sequence[int]]
    kept: set[str]
    gradients: str = CLOSE
    members: dict[str, Any] = {}  # noqa: RUF012
    unbiased: Sequence[str] = ()


def module(
    name: str,
    op: Callable[[], nn.Module],
    shape: Sequence[int],
    kept: set[str],
    gradients: str = CLOSE,
    unbiased: Sequence[str] = (),
) -> Case:
    return Case(name, lambda m, x: m.op(x), [shape], kept, gradients, {"op": op}, unbiased)


def elementwise(
    name: str,
    kept: set[str],
    gradients: str,
    functional: Callable,
    op: Callable[[], nn.Module],
    in_place: Callable | None,
    shape: Sequence[int] = (4, 8, 40),
) -> list[Case]:
    cases = [
        Case(f"{name}/functional", lambda m, x: functional(x), [shape], kept, gradients),
        module(f"{name}/module", op, shape, kept, gradients),
    ]
    if in_place is not None:
        # The clone is a tensor that nobody saved; the sum keeps the in-place result from being the model's output.
        cases.append(Case(f"{name}/in place", lambda m, x: in_place(x.clone()) + 0, [shape], kept, gradients))
    return cases


_IMAGE, _SIGNAL, _VOLUME = (3, 4, 12, 10), (3, 4, 40), (2, 4, 6, 5, 7)


def _linear() -> list[Case]:
    weights = {"w": (24, 40), "b": (24,)}
    return [
        Case("linear/functional", lambda m, x: F.linear(x, m.w, m.b), [(4, 6, 40)], WEIGHTED, CLOSE, weights, ("w",)),
        Case("linear/one row", lambda m, x: F.linear(x, m.w), [(40,)], WEIGHTED, CLOSE, {"w": (24, 40)}),
        # Not a view of anything dense: a strided input is packed as it is read.
        Case(
            "linear/strided input",
            lambda m, x: F.linear(x[:, ::2], m.w, m.b),
            [(4, 12, 40)],
            WEIGHTED,
            CLOSE,
            weights,
            ("w",),
        ),
        Case(
            "linear/transposed input",
            lambda m, x: F.linear(x.transpose(1, 2), m.w, m.b),
            [(4, 40, 6)],
            WEIGHTED,
            CLOSE,
            weights,
            ("w",),
        ),
        # A weight that is an activation (as hypernetworks have) is coded like one.
        Case(
            "linear/activation as weight",
            lambda m, x, y: F.linear(x, y),
            [(6, 40), (24, 40)],
            CODED,
            CLOSE,
            {},
            ("x0", "x1"),
        ),
        module("linear/module", lambda: nn.Linear(40, 24), (4, 6, 40), WEIGHTED, unbiased=("op.weight",)),
        module(
            "linear/timm's own weight use",
            lambda: nn.Linear(40, 24, bias=False),
            (4, 40),
            WEIGHTED,
            unbiased=("op.weight",),
        ),
    ]


def _convolutions() -> list[Case]:
    cases = []
    for dimensions, shape in ((1, _SIGNAL), (2, _IMAGE), (3, _VOLUME)):
        for kind in ("conv", "conv_transpose"):
            function = getattr(F, f"{kind}{dimensions}d")
            cls = getattr(nn, f"{'Conv' if kind == 'conv' else 'ConvTranspose'}{dimensions}d")
            name = f"{kind}{dimensions}d"
            weight = (4, 4, *[3] * dimensions)

            def functional(m, x, function=function):
                return function(x, m.w, m.b, stride=2, padding=1)

            def op(cls=cls):
                return cls(4, 8, 3, padding=1, groups=2, dilation=1, bias=False)

            weights = {"w": weight, "b": (4,)}
            cases += [
                Case(f"{name}/functional", functional, [shape], WEIGHTED, CLOSE, weights, ("w",)),
                module(f"{name}/module, groups", op, shape, WEIGHTED, unbiased=("op.weight",)),
            ]
    cases += [
        Case(
            "conv2d/torch's form",
            lambda m, x: torch.conv2d(x, m.w, padding="same", dilation=2),
            [_IMAGE],
            WEIGHTED,
            CLOSE,
            {"w": (4, 4, 3, 3)},
            ("w",),
        ),
        module("conv2d/depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), _IMAGE, WEIGHTED, unbiased=("op.weight",)),
        module(
            "conv2d/reflect padding",
            lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            _IMAGE,
            WEIGHTED,
            unbiased=("op.weight",),
        ),
        Case(
            "conv2d/channels_last",
            lambda m, x: F.conv2d(x.contiguous(memory_format=torch.channels_last), m.w),
            [_IMAGE],
            WEIGHTED,
            CLOSE,
            {"w": (4, 4, 3, 3)},
            ("w",),
        ),
    ]
    return cases


def _batch_norm_in_eval() -> nn.Module:
    norm = nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return norm


def _norms() -> list[Case]:
    affine = {"w": (4,), "b": (4,)}
    rows = {"w": (40,), "b": (40,)}
    return [
        Case(
            "batch_norm/functional",
            lambda m, x: F.batch_norm(x, None, None, m.w, m.b, training=True),
            [_IMAGE],
            NORM,
            CLOSE,
            affine,
            ("w",),
        ),
        module("batch_norm/module 1d", lambda: nn.BatchNorm1d(4), _SIGNAL, NORM, unbiased=("op.weight",)),
        module("batch_norm/module 2d", lambda: nn.BatchNorm2d(4), _IMAGE, NORM, unbiased=("op.weight",)),
        module("batch_norm/module 3d", lambda: nn.BatchNorm3d(4), _VOLUME, NORM, unbiased=("op.weight",)),
        module("batch_norm/not affine", lambda: nn.BatchNorm2d(4, affine=False), _IMAGE, NORM),
        # With running statistics the gradient is linear in the input throughout.
        module("batch_norm/eval in a training model", _batch_norm_in_eval, _IMAGE, NORM, unbiased=("op.weight",)),
        Case(
            "layer_norm/functional",
            lambda m, x: F.layer_norm(x, (40,), m.w, m.b),
            [(4, 6, 40)],
            NORM,
            CLOSE,
            rows,
            ("w",),
        ),
        module("layer_norm/module", lambda: nn.LayerNorm(40), (4, 6, 40), NORM, unbiased=("op.weight",)),
        module("layer_norm/two dimensions", lambda: nn.LayerNorm((12, 10)), _IMAGE, NORM, unbiased=("op.weight",)),
        module("layer_norm/no bias", lambda: nn.LayerNorm(40, bias=False), (4, 40), NORM, unbiased=("op.weight",)),
        Case("group_norm/functional", lambda m, x: F.group_norm(x, 2, m.w, m.b), [_IMAGE], NORM, CLOSE, affine, ("w",)),
        module("group_norm/module", lambda: nn.GroupNorm(2, 4), _IMAGE, NORM, unbiased=("op.weight",)),
        Case("instance_norm/functional", lambda m, x: F.instance_norm(x), [_IMAGE], {"quantized", "exact"}),
        module("instance_norm/module 1d", lambda: nn.InstanceNorm1d(4, affine=True), _SIGNAL, {"quantized", "exact"}),
        module("instance_norm/module 2d", lambda: nn.InstanceNorm2d(4, affine=True), _IMAGE, {"quantized", "exact"}),
        module("instance_norm/module 3d", lambda: nn.InstanceNorm3d(4), _VOLUME, {"quantized", "exact"}),
        Case("rms_norm/functional", lambda m, x: F.rms_norm(x, (40,), m.w), [(4, 6, 40)], set(), CLOSE, {"w": (40,)}),
        module("rms_norm/module", lambda: nn.RMSNorm(40), (4, 6, 40), set()),
    ]


def _activations() -> list[Case]:
    cases = [
        # The exact side of each value's corner, in one bit: at any bit width gradients are equal.
        *elementwise("relu", MASK, EXACT, F.relu, nn.ReLU, torch.relu_),
        *elementwise(
            "relu6", MASK, EXACT, lambda x: F.relu6(5 * x), nn.ReLU6, lambda x: F.relu6(x.mul_(5), inplace=True)
        ),
        *elementwise(
            "leaky_relu",
            MASK,
            EXACT,
            lambda x: F.leaky_relu(x, 0.2),
            nn.LeakyReLU,
            lambda x: F.leaky_relu(x, 0.1, inplace=True),
        ),
        *elementwise(
            "hardsigmoid",
            MASK,
            EXACT,
            lambda x: F.hardsigmoid(3 * x),
            nn.Hardsigmoid,
            lambda x: F.hardsigmoid(x, inplace=True),
        ),
        *elementwise(
            "hardtanh",
            MASK,
            EXACT,
            lambda x: F.hardtanh(x, -0.5, 0.7),
            nn.Hardtanh,
            lambda x: F.hardtanh_(x, -0.5, 0.7),
        ),
        # The smooth ones read a coded input; sigmoid, tanh and softmax a coded output.
        *elementwise("gelu", CODED, CLOSE, F.gelu, lambda: nn.GELU(approximate="tanh"), None),
        *elementwise("silu", CODED, CLOSE, F.silu, nn.SiLU, lambda x: F.silu(x, inplace=True)),
        *elementwise("hardswish", SIDED, CLOSE, F.hardswish, nn.Hardswish, lambda x: F.hardswish(x, inplace=True)),
        *elementwise("mish", CODED, CLOSE, F.mish, nn.Mish, lambda x: F.mish(x, inplace=True)),
        *elementwise("elu", SIDED, CLOSE, lambda x: F.elu(x, 0.7), nn.ELU, lambda x: F.elu_(x, 0.7)),
        *elementwise("selu", SIDED, CLOSE, F.selu, nn.SELU, None),
        *elementwise("celu", CODED, CLOSE, lambda x: F.celu(x, 0.7), nn.CELU, lambda x: F.celu(x, inplace=True)),
        *elementwise("glu", CODED, CLOSE, lambda x: F.glu(x, 1), nn.GLU, None),
        *elementwise("logsigmoid", LOGSIGMOID, CLOSE, F.logsigmoid, nn.LogSigmoid, None),
        *elementwise(
            "threshold",
            MASK,
            EXACT,
            lambda x: F.threshold(x, 0.3, -2.0),
            lambda: nn.Threshold(0.1, 20.0),
            lambda x: F.threshold_(x, 0.3, 0.0),
        ),
        *elementwise("softplus", CODED, CLOSE, lambda x: F.softplus(x, 2, 10), nn.Softplus, None),
        *elementwise("sigmoid", CODED, CLOSE, torch.sigmoid, nn.Sigmoid, torch.sigmoid_),
        *elementwise("tanh", CODED, CLOSE, torch.tanh, nn.Tanh, Tensor.tanh_),
        *elementwise("softmax", CODED, CLOSE, lambda x: F.softmax(3 * x, dim=-1), lambda: nn.Softmax(dim=-1), None),
        Case("softmax/over the middle", lambda m, x: torch.softmax(x, 1), [(4, 8, 40)], CODED),
        Case("relu/method", lambda m, x: x.relu(), [(4, 40)], MASK, EXACT),
        Case("relu/strided", lambda m, x: F.relu(x[:, ::3]), [(4, 120)], MASK, EXACT),
        Case(
            "relu/channels_last",
            lambda m, x: F.relu(x.contiguous(memory_format=torch.channels_last)),
            [_IMAGE],
            MASK,
            EXACT,
        ),
    ]
    return cases


def _dropouts() -> list[Case]:
    flat, channels = (4, 8, 40), {"exact", "mask"}
    return [
        *elementwise(
            "dropout",
            MASK,
            EXACT,
            lambda x: F.dropout(x, 0.3),
            lambda: nn.Dropout(0.1),
            lambda x: F.dropout(x, 0.3, inplace=True),
            flat,
        ),
        Case("dropout/torch's form", lambda m, x: torch.dropout(x, 0.3, True), [flat], MASK, EXACT),
        Case("dropout/everything", lambda m, x: F.dropout(x, 1.0), [flat], set(), EXACT),
        Case("dropout/nothing", lambda m, x: F.dropout(x, 0.0) + 0, [flat], set(), EXACT),
        # One value per channel: kept exactly or as a mask, no matter.
        module("dropout/1d", lambda: nn.Dropout1d(0.3), flat, channels, EXACT),
        module("dropout/2d", lambda: nn.Dropout2d(0.3), _IMAGE, channels, EXACT),
        module("dropout/3d", lambda: nn.Dropout3d(0.3), _VOLUME, channels, EXACT),
        module("alpha_dropout/module", lambda: nn.AlphaDropout(0.3), flat, channels, EXACT),
        module("alpha_dropout/features", lambda: nn.FeatureAlphaDropout(0.3), _IMAGE, channels, EXACT),
    ]


OFFSETS = {"offsets", "shape only"}


def _pools() -> list[Case]:
    cases = []
    for dimensions, shape in ((1, _SIGNAL), (2, _IMAGE), (3, _VOLUME)):
        maximum, average = getattr(F, f"max_pool{dimensions}d"), getattr(F, f"avg_pool{dimensions}d")
        adaptive_max, adaptive = (getattr(F, f"adaptive_{kind}_pool{dimensions}d") for kind in ("max", "avg"))
        forms: dict[str, dict[str, Any]] = {
            "plain": {"kernel_size": 2},
            "overlapping": {"kernel_size": 3, "stride": 1},
            "padded": {"kernel_size": 3, "stride": 2, "padding": 1},
            "dilated": {"kernel_size": 2, "stride": 1, "dilation": 2},
            # The last window hangs over the edge.
            "ceil_mode": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        }
        for form, options in forms.items():
            cases.append(
                Case(
                    f"max_pool{dimensions}d/{form}",
                    lambda m, x, f=maximum, o=options: f(x, **o),
                    [shape],
                    OFFSETS,
                    EXACT,
                )
            )
        cases += [
            Case(
                f"max_pool{dimensions}d/ties",
                lambda m, x, f=maximum: f(x.mul(2).round(), 3, 2),
                [shape],
                OFFSETS,
                EXACT,
            ),
            module(
                f"max_pool{dimensions}d/module",
                lambda d=dimensions: getattr(nn, f"MaxPool{d}d")(2),
                shape,
                OFFSETS,
                EXACT,
            ),
            Case(
                f"max_pool{dimensions}d/with indices",
                lambda m, x, f=maximum: f(x, 2, return_indices=True)[0],
                [shape],
                OFFSETS,
                EXACT,
            ),
            Case(
                f"adaptive_max_pool{dimensions}d/uneven", lambda m, x, f=adaptive_max: f(x, 3), [shape], OFFSETS, EXACT
            ),
            Case(
                f"adaptive_avg_pool{dimensions}d/uneven",
                lambda m, x, f=adaptive: f(x, 3),
                [shape],
                {"shape only"},
                EXACT,
            ),
            Case(
                f"avg_pool{dimensions}d/padded",
                lambda m, x, f=average: f(x, 3, 2, 1, count_include_pad=False),
                [shape],
                {"shape only"},
                EXACT,
            ),
            module(
                f"avg_pool{dimensions}d/module",
                lambda d=dimensions: getattr(nn, f"AvgPool{d}d")(2),
                shape,
                {"shape only"},
                EXACT,
            ),
        ]
    cases += [
        Case(
            "max_pool2d/channels_last",
            lambda m, x: F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 3, 2, 1),
            [_IMAGE],
            OFFSETS,
            EXACT,
        ),
        Case("max_pool2d/no batch", lambda m, x: F.max_pool2d(x, 2), [(4, 12, 10)], OFFSETS, EXACT),
        Case("adaptive_avg_pool2d/one", lambda m, x: F.adaptive_avg_pool2d(x, 1), [_IMAGE], set(), EXACT),
        Case(
            "interpolate/bilinear",
            lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            [_IMAGE],
            set(),
            EXACT,
        ),
        Case("interpolate/nearest", lambda m, x: F.interpolate(x, size=(5, 7)), [_IMAGE], set(), EXACT),
        Case("pad/zeros", lambda m, x: F.pad(x, (1, 2, 3, 0)), [_IMAGE], set(), EXACT),
        Case("pad/reflect", lambda m, x: F.pad(x, (1, 2), mode="reflect"), [_SIGNAL], {"shape only"}, EXACT),
        Case("cat/two", lambda m, x, y: torch.cat([x, y], 1), [_IMAGE, _IMAGE], set(), EXACT),
        Case("cat/stack", lambda m, x, y: torch.stack([x, y], 1), [_IMAGE, _IMAGE], set(), EXACT),
    ]
    return cases


def _products() -> list[Case]:
    both = ("x0", "x1")
    return [
        Case("matmul/operator", lambda m, x, y: x @ y, [(3, 8, 32), (3, 32, 8)], CODED, CLOSE, {}, both),
        Case("matmul/broadcast", lambda m, x, y: torch.matmul(x, y), [(2, 3, 8, 32), (32, 8)], CODED, CLOSE, {}, both),
        Case(
            "matmul/transposed",
            lambda m, x, y: x.matmul(y.transpose(-1, -2)),
            [(2, 3, 8, 32), (2, 3, 8, 32)],
            CODED,
            CLOSE,
            {},
            both,
        ),
        # Heads split off one projection, as in every eager attention.
        Case(
            "matmul/heads",
            lambda m, x, y: x.view(2, 8, 2, 32).transpose(1, 2) @ y.view(2, 8, 2, 32).permute(0, 2, 3, 1),
            [(2, 8, 64), (2, 8, 64)],
            {"quantized"},
            CLOSE,
            {},
            both,
        ),
        Case("matmul/a parameter", lambda m, x: x @ m.w, [(4, 8, 32)], WEIGHTED, CLOSE, {"w": (32, 8)}, ("w",)),
        Case("matmul/mm", lambda m, x, y: torch.mm(x, mat2=y), [(8, 32), (32, 8)], CODED, CLOSE, {}, both),
        Case("matmul/vector", lambda m, x, y: x @ y, [(8, 32), (32,)], CODED, CLOSE, {}, both),
        Case("matmul/bmm", lambda m, x, y: torch.bmm(x, y), [(3, 8, 32), (3, 32, 8)], CODED, CLOSE, {}, both),
        Case("matmul/same tensor", lambda m, x: x @ x, [(16, 16)], CODED, CLOSE, {}, ("x0",)),
        Case(
            "baddbmm/functional",
            lambda m, c, x, y: torch.baddbmm(c, x, y, beta=0.5, alpha=2.0),
            [(3, 8, 8), (3, 8, 32), (3, 32, 8)],
            CODED,
            CLOSE,
            {},
            ("x1", "x2"),
        ),
        Case("mul/operator", lambda m, x, y: x * y, [(4, 8, 40), (4, 8, 40)], CODED, CLOSE, {}, both),
        # Squeeze and excite.
        Case("mul/gate", lambda m, x, y: x.mul(y), [_IMAGE, (3, 4, 1, 1)], CODED, CLOSE, {}, both),
        # Layer scale.
        Case("mul/a parameter", lambda m, x: m.w * x, [(4, 8, 40)], WEIGHTED, CLOSE, {"w": (40,)}, ("w",)),
        Case("mul/in place", lambda m, x, y: x.clone().mul_(y), [(4, 8, 40), (4, 8, 40)], CODED, CLOSE, {}, both),
        Case("mul/square", lambda m, x: x * x, [(4, 8, 40)], CODED, CLOSE, {}, ("x0",)),
    ]


_HEADS = [(2, 2, 9, 16)] * 3
RERUN = {"recipe: rerun"}


def _attention() -> list[Case]:
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, 0] = True
    bias = torch.randn(9, 9, generator=torch.Generator().manual_seed(2))
    sdpa = F.scaled_dot_product_attention

    def self_attention(m, x):
        return m.op(x, x, x, need_weights=False)[0]

    return [
        Case("scaled_dot_product_attention/plain", lambda m, q, k, v: sdpa(q, k, v), _HEADS, RERUN),
        Case("scaled_dot_product_attention/scaled", lambda m, q, k, v: sdpa(q, k, v, scale=0.1), _HEADS, RERUN),
        Case("scaled_dot_product_attention/causal", lambda m, q, k, v: sdpa(q, k, v, is_causal=True), _HEADS, RERUN),
        Case(
            "scaled_dot_product_attention/boolean mask", lambda m, q, k, v: sdpa(q, k, v, attn_mask=mask), _HEADS, RERUN
        ),
        Case("scaled_dot_product_attention/bias", lambda m, q, k, v: sdpa(q, k, v, bias), _HEADS, RERUN | {"exact"}),
        Case(
            "scaled_dot_product_attention/learned bias",
            lambda m, q, k, v: sdpa(q, k, v, attn_mask=m.w),
            _HEADS,
            RERUN,
            CLOSE,
            {"w": (9, 9)},
        ),
        Case(
            "scaled_dot_product_attention/learned bias, causal",
            lambda m, q, k, v: sdpa(q, k, v, attn_mask=m.w.tril() - 1e4 * torch.ones(9, 9).triu(1)),
            _HEADS,
            RERUN,
            CLOSE,
            {"w": (9, 9)},
        ),
        Case(
            "scaled_dot_product_attention/bias made of data",
            lambda m, q, k, v: sdpa(q, k, v, attn_mask=q @ k.transpose(-1, -2)),
            _HEADS,
            {"quantized"},
        ),
        Case(
            "scaled_dot_product_attention/one projection",
            lambda m, x: sdpa(*x.view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)),
            [(2, 9, 96)],
            RERUN,
        ),
        Case(
            "scaled_dot_product_attention/one head of a width that is padded",
            lambda m, q, k, v: sdpa(q, k, v),
            [(2, 1, 9, 20)] * 3,
            RERUN,
        ),
        Case(
            "scaled_dot_product_attention/dropout",
            lambda m, q, k, v: sdpa(q, k, v, dropout_p=0.2),
            _HEADS,
            {"quantized", "mask", "recipe: dropout"},
        ),
        Case(
            "multi_head_attention_forward/module",
            self_attention,
            [(2, 9, 32)],
            set(),
            CLOSE,
            {"op": lambda: nn.MultiheadAttention(32, 2, batch_first=True)},
        ),
        Case(
            "multi_head_attention_forward/weights asked for, dropout",
            lambda m, x: m.op(x, x, x)[0],
            [(2, 9, 32)],
            set(),
            CLOSE,
            {"op": lambda: nn.MultiheadAttention(32, 2, dropout=0.2, batch_first=True)},
        ),
    ]


_BOTH = ("x0", "x1")


def _arithmetic() -> list[Case]:
    pair, plane = [(4, 8, 40), (4, 8, 40)], [(4, 8, 40)]
    bits = {"mask"}

    def above(y):  # divisors stay away from zero
        return y.abs() + 0.5

    return [
        Case(
            "addcmul/by a parameter",
            lambda m, x, y: torch.addcmul(x, m.w, y),
            pair,
            WEIGHTED,
            CLOSE,
            {"w": (40,)},
            ("w",),
        ),
        Case("addcmul/two", lambda m, x, y: torch.addcmul(x, x, y), pair, CODED, CLOSE, {}, _BOTH),
        Case("div/operator", lambda m, x, y: x / above(y), pair, {"quantized", "exact"}, CLOSE, {}, ("x1",)),
        Case(
            "div/by a column",
            lambda m, x: x.div(above(m.w)),
            plane,
            {"quantized", "recipe: computed again"},
            CLOSE,
            {"w": (8, 1)},
            ("w",),
        ),
        Case("div/one over", lambda m, x: 1 / above(x), plane, {"exact"}, EXACT),
        Case("div/rounded", lambda m, x, y: torch.div(x, above(y), rounding_mode="floor") + x, pair, set(), EXACT),
        Case("exp/method", lambda m, x: x.exp(), plane, CODED, CLOSE, {}, ("x0",)),
        Case("pow/square", lambda m, x: x**2, plane, CODED, CLOSE, {}, ("x0",)),
        Case("pow/cube", lambda m, x: x.pow(3), plane, CODED),
        Case("pow/root", lambda m, x: above(x) ** 0.5, plane, {"exact"}, EXACT),
        Case("square/function", lambda m, x: torch.square(x), plane, CODED, CLOSE, {}, ("x0",)),
        Case("clamp/two bounds", lambda m, x: x.clamp(-0.5, 1.0), plane, bits, EXACT),
        Case("clamp/minimum", lambda m, x: torch.clamp(x, min=0.1), plane, bits, EXACT),
        Case("clamp/maximum", lambda m, x: x.clip(max=0.1), plane, bits, EXACT),
        Case("clamp/clamp_min", lambda m, x: x.clamp_min(0.1), plane, bits, EXACT),
        Case("clamp/clamp_max", lambda m, x: torch.clamp_max(x, 0.1), plane, bits, EXACT),
        Case("clamp/at the bounds", lambda m, x: x.round().clamp(-1.0, 1.0), plane, bits, EXACT),
        Case("clamp/a tensor", lambda m, x, y: torch.clamp(x, max=y), pair, {"exact"}, EXACT),
        Case("where/two", lambda m, x, y: torch.where(x > 0.2, x, y), pair, bits, EXACT),
        Case("where/masked_fill", lambda m, x: x.masked_fill(x > 0.2, -1.0), plane, bits, EXACT),
    ]


_PLACES = torch.arange(3 * 8 * 9).view(3, 8, 9) * 5 % 8


def _reductions() -> list[Case]:
    plane, spread = [(3, 8, 40)], {"quantized", "exact"}
    return [
        Case("amax/one dimension", lambda m, x: x.amax(1), plane, {"mask", "exact"}, EXACT),
        Case("amax/two, kept", lambda m, x: torch.amax(x, (0, 2), keepdim=True), plane, {"mask", "exact"}, EXACT),
        Case("amax/all", lambda m, x: torch.amin(x, dim=()), plane, {"mask", "exact"}, EXACT),
        Case("amax/ties", lambda m, x: x.round().amax(2), plane, {"mask", "exact"}, EXACT),
        Case("norm/last", lambda m, x: x.norm(dim=-1, keepdim=True), plane, spread, CLOSE, {}, ("x0",)),
        Case("norm/spatial", lambda m, x: torch.norm(x, p=2, dim=(1, 2)), plane, spread, CLOSE, {}, ("x0",)),
        Case("norm/vector_norm", lambda m, x: torch.linalg.vector_norm(x, dim=-1), plane, spread, CLOSE, {}, ("x0",)),
        Case(
            "norm/across rows",
            lambda m, x: torch.linalg.vector_norm(x, dim=1),
            plane,
            {"recipe: norm", "exact"},
            CLOSE,
            {},
            ("x0",),
        ),
        Case("norm/first power", lambda m, x: x.norm(p=1, dim=-1), plane, {"exact"}, EXACT),
        Case("max/one dimension", lambda m, x: x.max(1).values, plane, {"offsets"}, EXACT),
        Case("max/topk", lambda m, x: torch.topk(x, 5, dim=-1)[0], plane, {"offsets"}, EXACT),
        Case("max/sort", lambda m, x: x.sort(dim=2, descending=True).values, plane, {"offsets"}, EXACT),
        Case("max/all", lambda m, x: x.max(), plane, {"exact"}, EXACT),
        Case("gather/places", lambda m, x: x.gather(2, _PLACES), plane, {"shape only", "exact"}, EXACT),
        Case(
            "gather/repeated places",
            lambda m, x: x.gather(1, _PLACES[:, :6, :1].repeat(1, 1, 40)),
            plane,
            {"shape only", "recipe: repeat"},
            EXACT,
        ),
        Case("normalize/last", lambda m, x: F.normalize(x, dim=-1), plane, set()),
        Case("var/method", lambda m, x: x.var(dim=(1, 2)), plane, CODED, CLOSE, {}, ("x0",)),
        Case("std/within rows", lambda m, x: torch.std(x, dim=-1), plane, spread, CLOSE, {}, ("x0",)),
        Case("std/across rows", lambda m, x: torch.std(x, dim=1), plane, {"exact"}, EXACT),
        Case("var/with mean", lambda m, x: sum(torch.var_mean(x, dim=-1)), plane, CODED, CLOSE, {}, ("x0",)),
    ]


def _sampling() -> list[Case]:
    image, places = (2, 4, 12, 10), (2, 6, 7, 2)
    sampled = {"quantized", "recipe: half precision"}

    def sample(x, grid, **options):
        return F.grid_sample(x, grid.tanh(), align_corners=False, **options)

    def attended(m, x, y):
        """As deformable attention does: samples weighted and summed."""
        samples = torch.stack([sample(x, y), sample(x, y + 0.1)], -1).flatten(-2)
        return (samples * m.w).sum(-1)

    return [
        Case("grid_sample/bilinear", lambda m, x, y: sample(x, y), [image, places], sampled),
        Case(
            "grid_sample/border",
            lambda m, x, y: sample(x, y, padding_mode="border"),
            [image, places],
            sampled,
        ),
        Case("grid_sample/weighted", attended, [image, places], sampled, CLOSE, {"w": (14,)}),
        Case(
            "einsum/two",
            lambda m, x, y: torch.einsum("bij,bkj->bik", x, y),
            [(3, 8, 32), (3, 6, 32)],
            CODED,
            CLOSE,
            {},
            _BOTH,
        ),
        Case(
            "einsum/permuted",
            lambda m, x, y: torch.einsum("bchw,bdwh->bcd", x, y),
            [(2, 3, 8, 6), (2, 5, 6, 8)],
            CODED,
            CLOSE,
            {},
            _BOTH,
        ),
        Case(
            "einsum/a parameter",
            lambda m, x: torch.einsum("bij,jk->bki", x, m.w),
            [(3, 8, 32)],
            WEIGHTED,
            CLOSE,
            {"w": (32, 6)},
            ("w",),
        ),
    ]


CASES = [
    *_linear(),
    *_convolutions(),
    *_norms(),
    *_activations(),
    *_dropouts(),
    *_pools(),
    *_products(),
    *_attention(),
    *_arithmetic(),
    *_reductions(),
    *_sampling(),
]


def build(case: Case) -> tuple[Bench, list[Tensor]]:
    torch.manual_seed(0)
    members = {
        name: torch.randn(member) if isinstance(member, tuple) else member() for name, member in case.members.items()
    }
    inputs = [torch.randn(shape) for shape in case.shapes]
    return Bench(case.function, **members), inputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case):
    plain, inputs = build(case)
    expected_out, expected = run(plain, inputs)
    # 2 bits for what must be exact, since no code may come near it; 8 for what must be close.
    bits = 2 if case.gradients == EXACT else 8
    converted = hf_actnn.convert(copy.deepcopy(plain), bits=bits, min_numel=0)
    out, found = run(converted, inputs)
    assert torch.equal(out, expected_out)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if case.gradients == EXACT:
            assert torch.equal(gradient, expected[name]), name
        else:
            error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
            # A step is 1/255 of a group's range of some 5 standard deviations; attention multiplies three codes.
            assert error < 0.04, (name, error)
            assert gradient.stride() == expected[name].stride(), name
    if case.gradients == CLOSE:
        assert any(not torch.equal(found[name], expected[name]) for name in found), "nothing was coded"


@pytest.mark.parametrize("case", [case for case in CASES if case.kept], ids=lambda case: case.name)
def test_kept_as_the_rule_says(case):
    model, inputs = build(case)
    hf_actnn.convert(model, bits=2, min_numel=0)
    run(model, inputs)
    found = kinds(model)
    name = case.name.partition("/")[0]
    name = "convolution" if name.startswith("conv") else name
    name = "avg_pool" if "avg_pool" in name else name
    name = "hardtanh" if case.name == "relu6/module" else name  # as torch itself has it
    kept = CODED if case.name == "elu/module" else case.kept  # its derivative has no jump
    assert found.get(name, set()), found
    if name in ("dropout", "alpha_dropout") or "max_pool1d" in name:
        assert found[name] <= kept, found
    else:
        assert found[name] == kept, found


@pytest.mark.parametrize("case", [case for case in CASES if case.unbiased], ids=lambda case: case.name)
def test_gradients_are_unbiased(case):
    model, inputs = build(case)
    assert_unbiased(model, inputs, case.unbiased)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("function", "corners"),
    [(F.hardswish, (-3.0, 3.0)), (F.selu, (0.0,)), (lambda x, inplace: F.elu(x, 0.5, inplace), (0.0,))],
    ids=["hardswish", "selu", "elu"],
)
def test_a_jump_is_never_read_off_a_code(function, corners, in_place):
    """Values just beside a corner: with codes a tenth apart, many come back on the other side of it."""
    x = torch.cat(
        [corner + 0.05 * torch.randn(4, 512, generator=torch.Generator().manual_seed(1)) for corner in corners]
    )
    x[:, ::64] *= 2  # so that a group spans more than the corner's neighbourhood
    x = torch.cat([x, -x])
    model = Bench(lambda m, x: function(x + 0, inplace=in_place))
    _, expected = run(model, [x])
    _, found = run(hf_actnn.convert(model, bits=6, min_numel=0), [x])
    error = (found["x0"] - expected["x0"]).abs() / expected["x0"].abs().amax()
    assert 0 < error.max() < 0.1
