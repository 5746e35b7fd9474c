"""The variance that keeping an activation as a code gives a gradient: closed forms, operation by operation.

Training does not use them: `hf_actnn.saving.tape` measures the same on the backward formulas themselves. They are the
law that the measurement is tested against, and that the documentation quotes.

Chen et al., "ActNN", ICML 2021, section 3.2: a layer's backward pass gives `dx, dW = G(dy, C(x))`, linear in the
incoming gradient `dy` and, for `dW` of a linear layer or a convolution, in the context `C(x)`. The rounding of the
context has the mean `x`, hence these gradients have no bias, and their variance follows from that of the rounding
(section 4.1, appendix).

Everywhere `v` is the variance of what is kept, value by value, in its unit squared. Results are sums over all entries
of a gradient, in the gradient's unit squared, as float64 tensors without dimensions. What is linear in the kept values
is exact; the rest is of first order in the error: terms of order `v^2` are missing. Values err independently of each
other here. Roundings that mirror each other (docs/codec.md) do not: between two such values there is the term of their
covariance besides, below zero where what they are multiplied by has one sign. Ours: the exact `f (1 - f)` of a value at
the fraction `f` of a step, padding and groups of channels counted exactly, and the forms for elementwise functions,
layer norm, softmax and products of two kept tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn.codec import PackedTensor, reference
from hf_actnn.errors import CodecError, message

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# -- of the values kept -----------------------------------------------------------------------------------------------


def exact(x: Tensor, packed: PackedTensor) -> Tensor:
    """Variance of each value over the dither: `step^2 f (1 - f)`, `f` the fraction of a step the value lies at.

    A value rounds up with probability `f` (Chen et al., eq. 5). The step that counts is the one stored: rounded up to
    bfloat16. The dither's 256 levels move `f` by at most 1/512, which is neglected.

    Args:
        x: what was quantised, any floating dtype and strides, `[*shape]`.
        packed: what :func:`hf_actnn.quantize` made of it.

    Returns:
        `[*shape]` float64; 0 in groups that are constant, kept exact or not finite.

    Raises:
        CodecError: `x` has another shape, or the code is not "uniform".
    """
    if x.shape != packed.shape:
        raise CodecError(
            message(
                "This is not what was quantised",
                where="x",
                expected=f"a tensor of shape {tuple(packed.shape)}",
                received=f"one of shape {tuple(x.shape)}",
                next_step="Pass the tensor that quantize was called with",
            )
        )
    minimum, step = _per_value(packed)
    # Values were coded from fp32, whatever their own dtype.
    value = x.detach().to(torch.float32).to(torch.float64)
    fraction = torch.where(step > 0, (value - minimum) / step, 0.0).frac()
    return (fraction - fraction * fraction) * (step * step)


def estimate(packed: PackedTensor) -> Tensor:
    """Variance of each value where nothing is known of it but its code: `step^2 / 6`.

    The mean of `f (1 - f)` over fractions spread evenly (Chen et al., section 4.1).

    Args:
        packed: `[*shape]`.

    Returns:
        `[*shape]` float64; 0 as in :func:`exact`.
    """
    _, step = _per_value(packed)
    return step * step / 6


def bound(packed: PackedTensor) -> Tensor:
    """The most that the variance of each value can be: `step^2 / 4`, that of a value midway between two codes.

    Args:
        packed: `[*shape]`.

    Returns:
        `[*shape]` float64; 0 as in :func:`exact`.
    """
    _, step = _per_value(packed)
    return step * step / 4


def _per_value(packed: PackedTensor) -> tuple[Tensor, Tensor]:
    """Minimum and step of each value's group, `[*shape]` float64; 0 and 0 in groups whose values have no error."""
    if packed.code != "uniform":
        raise CodecError(
            message(
                "The variance of this code is not known",
                where="packed",
                expected="the code 'uniform'",
                received=f"the code {packed.code!r}",
                next_step="Quantise with code='uniform'",
            )
        )
    at = reference.layout(packed.numel, packed.row_length, 1, packed.group_size)
    meta = packed.meta.to(torch.float64)
    # Both marks, of a group kept exact and of one that is not finite, are no numbers above zero.
    coded = (meta[:, 1] > 0).unsqueeze(1)
    meta = torch.where(coded, meta, 0.0).view(at.n_rows, at.groups_per_row, 2)
    sizes = torch.full((at.groups_per_row,), at.group, device=meta.device)
    sizes[-1:] = at.tail
    values = meta.repeat_interleave(sizes, 1).view(-1, 2)
    minimum, step = values.T.contiguous()
    return minimum.as_strided(packed.shape, packed.stride), step.as_strided(packed.shape, packed.stride)


# -- of gradients -----------------------------------------------------------------------------------------------------


def linear(grad: Tensor, v: Tensor) -> Tensor:
    """Of `dW = dy^T x` of a linear layer that keeps `x`: `sum_n |dy_n|^2 sum_i v_ni`. Exact.

    Chen et al., section 4.1. `n` counts rows: tokens, not samples.

    Args:
        grad: `dy`, `[..., O]`.
        v: `[..., I]`, with the same leading dimensions.
    """
    return (_squared(grad).sum(-1) * v.double().sum(-1)).sum()


def convolution(
    grad: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Of `dW` of a convolution that keeps `x`. Exact.

    An entry of `dW` is a sum over samples `n` and positions `p` of `dy_nop x_ni(ps + kd)`, in which no value of `x`
    comes twice. Summed over entries:

        sum_n sum_g sum_p (sum_{o in g} dy_nop^2) (sum_k sum_{i in g} v_ni(ps + kd))

    The last factor is a convolution of the channels' sum with a kernel of ones, in which padding counts for nothing.
    For a transposed convolution `dy` and `x` change places. Convolutions are in the appendix of Chen et al.; that
    padding and groups are counted exactly is ours.

    Args:
        grad: `dy`, `[N, O, *out]` with one to three dimensions behind the channels.
        v: `[N, I, *in]`.
        kernel_size, stride, padding, dilation, groups: of the layer. A layer that pads with anything but zeros keeps
            the padded tensor: pass its variance and no padding.
        transposed: whether it is a transposed convolution. Its `output_padding` is not needed.
    """
    energy = _squared(grad).unflatten(1, (groups, -1)).sum(2)
    noise = v.double().unflatten(1, (groups, -1)).sum(2)
    near, far = (noise, energy) if transposed else (energy, noise)
    dimensions = far.ndim - 2
    kernel = (kernel_size,) * dimensions if isinstance(kernel_size, int) else tuple(kernel_size)
    # Every group of every sample is a sample of one channel.
    ones = far.new_ones(1, 1, *kernel)
    reach = _CONVOLUTIONS[dimensions](far.flatten(0, 1).unsqueeze(1), ones, None, stride, padding, dilation)
    reach = reach.view(*near.shape[:2], *reach.shape[2:])
    # Output padding may let the kernel fit once more than the input has positions.
    return (near * reach[tuple(slice(size) for size in near.shape)]).sum()


def elementwise(grad: Tensor, second_derivative: Tensor, v: Tensor) -> Tensor:
    """Of `dx = dy f'(x)` of an elementwise function that keeps `x`: `sum dy^2 f''(x)^2 v`. First order.

    A function that keeps its result `y` (tanh, sigmoid) reads its derivative off that: pass the variance of `y`, and
    the derivative of `f'` by `y`, which is `-2y` or `1 - 2y`. Ours.

    Args:
        grad: `dy`, `[*shape]`.
        second_derivative: of `f`, at the values kept, `[*shape]`.
        v: `[*shape]`.
    """
    return (_squared(grad) * _squared(second_derivative) * v.double()).sum()


def layer_norm(
    grad: Tensor, normalized: Tensor, rstd: Tensor, weight: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Of `dx` and `dw` of a layer norm that keeps `x`, its statistics exact. First order for `dx`, exact for `dw`.

    With `r` one over the standard deviation, `h = (x - mean) r`, `g = dy w`, means over the `D` values of a row,

        dx = r (g - mean(g) - h mean(g h)),    dw = sum_n dy h

    An error `e` of `h`, of variance `u = r^2 v`, moves `dx` by `-r (e mean(g h) + h mean(g e))`. The second term is the
    same multiple of `h` for a whole row, and about as large as the first where `g` has little to do with `h`:

        Var(dx) = sum_n r^2 (mean(g h)^2 sum u + sum h^2 sum g^2 u / D^2 + 2 mean(g h) sum h g u / D)
        Var(dw) = sum dy^2 u

    Ours.

    Args:
        grad: `dy`, `[..., *normalized_shape]`.
        normalized: `h`, same shape.
        rstd: `r`, one number per row, `[...]` or with ones behind.
        weight: `w`, `[*normalized_shape]`, or None.
        v: of `x`, same shape as `dy`.

    Returns:
        Variance of `dx`, of `dw`.
    """
    rows = rstd.numel()
    scale = grad.new_ones(()) if weight is None else weight.reshape(1, -1)
    return _normalisation(grad.reshape(rows, -1), normalized.reshape(rows, -1), rstd, scale, v.reshape(rows, -1))


def batch_norm(
    grad: Tensor, normalized: Tensor, rstd: Tensor, weight: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Of `dx` and `dw` of a batch norm in training that keeps `x`, its statistics exact.

    :func:`layer_norm`'s equations with channels in place of rows, `w` one number per channel. With running statistics
    (`eval`) `dx` does not depend on what is kept. Batch norm is in the appendix of Chen et al.; this form is ours.

    Args:
        grad: `dy`, `[N, C, ...]`.
        normalized: `h`, same shape.
        rstd: `r`, `[C]`.
        weight: `w`, `[C]`, or None.
        v: of `x`, same shape as `dy`.

    Returns:
        Variance of `dx`, of `dw`.
    """
    dy, h, u = (one.transpose(0, 1).flatten(1) for one in (grad, normalized, v))
    return _normalisation(dy, h, rstd, grad.new_ones(()) if weight is None else weight.view(-1, 1), u)


def _normalisation(grad: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`grad`, `h`, `v` `[R, D]`, each row with statistics of its own; `weight` broadcast over them."""
    dy, h, r2 = grad.double(), h.double(), rstd.double().reshape(-1, 1).square()
    u, g = v.double() * r2, dy * weight.detach().double()
    count = h.shape[1]
    along = (g * h).mean(1)
    moved = (
        along.square() * u.sum(1)
        + h.square().sum(1) * (g.square() * u).sum(1) / count**2
        + 2 * along * (h * g * u).sum(1) / count
    )
    return (r2.squeeze(1) * moved).sum(), (dy.square() * u).sum()


def softmax(grad: Tensor, p: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    """Of `dx = p (dy - s)`, `s = sum p dy`, of a softmax that keeps its result `p`. First order.

    An error `e` of `p` moves `dx` by `e (dy - s) - p sum(dy e)`, of variance

        sum_i v_i (dy_i - s)^2 + p_i^2 sum_j dy_j^2 v_j - 2 p_i dy_i (dy_i - s) v_i

    Ours.

    Args:
        grad: `dy`, `[*shape]`.
        p: the probabilities, `[*shape]`.
        v: of `p`, `[*shape]`.
        dim: in which they sum to one.
    """
    dy, p, v = grad.double(), p.double(), v.double()
    rest = dy - (p * dy).sum(dim, keepdim=True)
    shared = (dy.square() * v).sum(dim, keepdim=True)
    return (v * rest.square() + p.square() * shared - 2 * p * dy * rest * v).sum()


def matmul(grad: Tensor, v_left: Tensor | None = None, v_right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of `dA = dY B^T` and `dB = A^T dY` of a product `Y = A B` that keeps what it needs of A and B. Exact.

    `Var(dA) = sum_n (sum_m dY_mn^2) (sum_k v_kn)` with the variance of B, `Var(dB)` likewise with that of A. Ours.

    Args:
        grad: `dY`, `[..., M, N]`.
        v_left: of A, `[..., M, K]`; None if A is kept exactly.
        v_right: of B, `[..., K, N]`; None if B is kept exactly. Leading dimensions broadcast as in the product.

    Returns:
        Variance of `dA`, of `dB`.
    """
    energy = _squared(grad)
    nothing = energy.new_zeros(())
    left = nothing if v_right is None else (energy.sum(-2) * v_right.double().sum(-2)).sum()
    right = nothing if v_left is None else (energy.sum(-1) * v_left.double().sum(-1)).sum()
    return left, right


def total(parts: Iterable[Tensor]) -> Tensor:
    """What one kept tensor adds that serves several operations: the sum over them.

    Exact where they lead to gradients of different tensors, as a variance summed over entries has no covariances. Where
    two of them add up in one gradient, their covariance is missing.

    Args:
        parts: variances, each without dimensions.
    """
    return torch.stack([part.double() for part in parts]).sum()


def _squared(values: Tensor) -> Tensor:
    return values.detach().double().square()
