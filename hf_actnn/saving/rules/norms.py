"""Normalisations: the input is coded, the statistics are exact, and the output is rebuilt from both.

With the operation's own statistics a rebuilt output is affine in the coded input, hence exactly unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn import codec
from hf_actnn.codec import ops, rebuild
from hf_actnn.saving.call import exact
from hf_actnn.saving.identity import LAST, SAMPLE
from hf_actnn.saving.kept import Exact, Geometry, Kept, Mask, fills_its_memory
from hf_actnn.saving.recipes import Masked, Masking, Recipe
from hf_actnn.saving.rows import mixes_spreads
from hf_actnn.saving.rules.rule import Rule, functions, register
from hf_actnn.saving.values import flat_storage

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call, Slot

_BOUNDED = "the gradient is quadratic in the normalised input, whose statistics are exact"
_EXACT_NORMS = "normalisations stay exact at this level"


def _keep_input(call: Call, rows: str | None) -> tuple[Kept | None, list[Slot]]:
    """Decide on the save that is the input.

    Returns:
        What gives the input back, None where autograd did not save it; and the saves that are neither input nor weight,
        in the order autograd saved them.
    """
    data = call.argument(0, "input")
    source: Kept | None = None
    rest: list[Slot] = []
    for slot in call.slots:
        tensor = slot.tensor
        assert tensor is not None
        if source is not None or not call.same_storage(tensor, data):
            if call.is_weight(tensor):
                continue
            if source is not None or tensor.numel() != data.numel():
                rest.append(slot)
                continue
        if call.policy.exact_norms:
            source = call.exact(slot, _EXACT_NORMS)
        else:
            source = call.data_argument(slot, data, rows)
            call.fuse(slot, summed=1)
    return source, rest


def _keep_statistics(call: Call, slots: list[Slot], size: int) -> list[Kept]:
    """The two that the operation computed for itself, which nobody else gets to see; fewer if it did not.

    They are told by their size, mean before scale. An operation may save more after them: cuDNN's batch normalisation
    leaves its backward pass bytes of its own.
    """
    found = [
        slot
        for slot in slots
        if slot.tensor is not None and slot.tensor.is_floating_point() and slot.tensor.numel() == size
    ][-2:]
    return [call.own(slot, "a statistic") for slot in found] if len(found) == 2 else []


def _parameters(call: Call, weight: Any, bias: Any) -> list[Kept]:
    """Weight and bias by reference, where the layer has them."""
    return [exact(call.scope, value, call.where) for value in (weight, bias) if isinstance(value, Tensor)]


def _widened(value: Tensor, statistic: Tensor) -> Tensor:
    """The value in the dtype of the statistics: under autocast they are wider than the input."""
    return value if value.dtype == statistic.dtype else value.to(statistic.dtype)


def _apply(
    value: Tensor, parameters: tuple[Tensor, ...], has_weight: bool, has_bias: bool, view: Callable[[Tensor], Tensor]
) -> Tensor:
    """``value * weight + bias``, in place."""
    if has_weight:
        value.mul_(view(parameters[0]))
    if has_bias:
        value.add_(view(parameters[-1]))
    return value


def _register_output(
    call: Call,
    source: Kept | None,
    statistics: list[Kept],
    weight: Any,
    bias: Any,
    normalise: Callable[..., Tensor],
    view: Callable[[Tensor], Tensor],
) -> None:
    """Make the output a recipe: ``normalise(input, *statistics) * weight + bias``."""
    has_weight, has_bias = isinstance(weight, Tensor), isinstance(bias, Tensor)
    count = len(statistics)

    def rebuild(value: Tensor, *rest: Tensor) -> Tensor:
        value = normalise(_widened(value, rest[0]), *rest[:count])
        return _apply(value, rest[count:], has_weight, has_bias, view)

    parents = [source, *statistics, *_parameters(call, weight, bias)]
    call.output_recipe(call.name, rebuild, parents, writes=True)


def _channel_view(dimensions: int) -> Callable[[Tensor], Tensor]:
    tail = (1,) * (dimensions - 2)
    return lambda parameter: parameter.view(1, -1, *tail)


def _batch_norm_arguments(call: Call) -> tuple[Any, Any, Any, Any, bool, float]:
    """weight, bias, running mean, running variance, training, eps: the two public forms order them differently."""
    at = call.argument
    if call.function is F.batch_norm:
        return (
            at(3, "weight"),
            at(4, "bias"),
            at(1, "running_mean"),
            at(2, "running_var"),
            at(5, "training", False),
            at(7, "eps", 1e-5),
        )
    return at(1, "weight"), at(2, "bias"), at(3, "running_mean"), at(4, "running_var"), at(5, "training"), at(7, "eps")


def _affine(coefficients: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """How a recipe makes ``first parent * scale + shift`` by channel; ``coefficients`` makes both of the others."""

    def again(value: Tensor, *others: Tensor) -> Tensor:
        scale, shift = coefficients(*others)
        return codec.channel_affine_(_widened(value, scale), scale, shift)

    def at_once(
        packed: codec.PackedTensor, others: list[Tensor], dtype: torch.dtype, mask: Masking | None
    ) -> Tensor | None:
        if dtype != packed.dtype:
            return None
        return rebuild.by_channel(packed, *coefficients(*others), *(mask or ()))

    return {"function": again, "writes": True, "at_once": at_once}


def _normalised(data: Tensor, middle: Tensor, scale: Tensor, signs: Tensor | None = None) -> Tensor:
    """``(data - middle) * scale`` by channel, in the dtype of the data and computed in fp32 or more: a half
    times a scale may be more than a half can be, before the mean is taken off. ``signs``, codes of a mask: times -1
    where its bit is not set."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    middle, scale = middle.to(wide), scale.to(wide)
    shift = -middle * scale
    # Broadcasting is slow on a CPU where maps are small; there the compiled pass knows fp32 alone.
    if ops._direct(data) is not None and (data.dtype == scale.dtype or not ops._on_cpu(data)):
        return codec.channel_affine(data, scale, shift, signs)
    view = _channel_view(data.dim())
    made = torch.addcmul(view(shift), data.to(scale.dtype), view(scale)).to(data.dtype)
    return made if signs is None else codec.scale_by_mask_(made, signs, 1.0, -1.0)


class _Statistics(NamedTuple):
    """How values are normalised by a mean and a scale.

    Attributes:
        size: how many values there are of each.
        normalise: ``(data, mean, scale) -> normalised data``, in the dtype of the data.
        to_input: what a recipe says of the way back, from the normalised data.
        by_sample: whether each sample has its own.
    """

    size: int
    normalise: Callable[[Tensor, Tensor, Tensor], Tensor]
    to_input: dict[str, Any]
    by_sample: bool


def _of_channels(data: Tensor) -> _Statistics:
    """Those of a batch normalisation."""

    def coefficients(middle: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return scale.reciprocal(), middle

    return _Statistics(data.shape[1], _normalised, _affine(coefficients), False)


def _by_channel(data: Tensor, groups: int) -> Callable[[Tensor], Tensor]:
    """Statistics of a sample's groups of channels, for each of the channels, to be broadcast over the data."""
    channels, tail = data.shape[1], (1,) * (data.dim() - 2)

    def view(statistic: Tensor) -> Tensor:
        each = statistic.view(-1, groups, 1).expand(-1, groups, channels // groups)
        return each.reshape(-1, channels, *tail)

    return view


def _of_groups(data: Tensor, groups: int) -> _Statistics:
    """Those of a group normalisation."""
    by_channel = _by_channel(data, groups)

    def wide(statistic: Tensor) -> Tensor:
        return by_channel(statistic.to(torch.promote_types(statistic.dtype, torch.float32)))

    def normalise(value: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
        return value.to(wide(scale).dtype).sub(wide(middle)).mul_(wide(scale)).to(value.dtype)

    def again(value: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
        return _widened(value, scale).mul_(wide(scale).reciprocal()).add_(wide(middle))

    return _Statistics(data.shape[0] * groups, normalise, {"function": again, "writes": True}, True)


def _whole_input(call: Call) -> tuple[Slot, Tensor, list[Slot], int] | None:
    """The save that is the input, the input, the saves that are neither this nor a weight, and how long rows of its
    code are, where it may be coded in another form than it has: it is all that its storage holds, and not kept yet."""
    data = call.argument(0, "input")
    slot = next((one for one in call.slots if one.tensor is not None and call.same_view(one.tensor, data)), None)
    if slot is None or call.in_place or slot.tensor is None:
        return None
    data = slot.tensor
    rest = [one for one in call.slots if one.tensor is not None and one is not slot and not call.is_weight(one.tensor)]
    whole = fills_its_memory(data) and data.numel() * data.itemsize == data.untyped_storage().nbytes()
    if not whole or call.scope.registry.find(data) is not None or not data.is_floating_point():
        return None
    length = call.length_of_rows(data.shape, data.stride(), SAMPLE, data.itemsize)
    return (slot, data, rest, length) if length else None


def _factor_and_shift(weight: Any, bias: Any, channels: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of the parameters by channel, or of ones and zeros where there are none, in the dtype of the statistics, which
    may be wider than theirs. ``(scale, *parameters) -> (weight, bias)``."""
    has_weight, has_bias = isinstance(weight, Tensor), isinstance(bias, Tensor)

    def of(scale: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        factor = parameters[0].to(scale.dtype) if has_weight else scale.new_ones(channels)
        return factor, parameters[-1].to(scale.dtype) if has_bias else scale.new_zeros(channels)

    return of


#: Deviations from the mean beyond which values are not folded: there is next to nothing on the other side.
FAR = 3.0


def _fold(factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """By channel: the normalised input at which the output is zero, or ``FAR`` on that side of the mean; and what the
    distance from it is multiplied with, to be of one range in all channels and positive where the output is."""
    corner = torch.nan_to_num(-shift / factor, nan=0.0).clamp_(-FAR, FAR)
    return corner, torch.where(factor < 0, -FAR, FAR) / (FAR + corner.abs())


def _keep_folded(call: Call, weight: Any, bias: Any, epsilon: float | None) -> bool:
    """Code what is behind a ReLU's corner together with what is before it, as the distance from it; False, and nothing
    done, where that cannot be.

    The ReLU keeps one bit for each value, which says on which side it lies. With this for a sign, the levels of the
    code have to span half as much: steps are half as wide, for eight bytes per channel. With `x'` the normalised input,
    `c` the corner and `s` a factor of the weight's sign, the code is that of ``u = s (x' - c)`` where the bit is set
    and of ``-u`` elsewhere, linear in the input either way, so that what comes back is right on average.

    Args:
        epsilon: that of running statistics; None where they are the batch's.
    """
    found = _whole_input(call)
    output = call.output
    if found is None or (output.stride(), output.dtype) != (found[1].stride(), found[1].dtype):
        return False
    slot, data, rest, length = found
    channels = data.shape[1]
    if epsilon is None:
        statistics = _keep_statistics(call, rest, channels)
    else:
        running = _batch_norm_arguments(call)[2:4]
        statistics = [exact(call.scope, value, call.where) for value in running]
        for one in statistics:  # which training overwrites, and their version does not tell
            call.scope.session.lend(one)
    if not statistics:
        return False
    parameters = _factor_and_shift(weight, bias, channels)

    def reciprocal(scale: Tensor) -> Tensor:
        return scale if epsilon is None else torch.rsqrt(scale + epsilon)

    def to_input(fold: Tensor, middle: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        (corner, slope), scale = fold.unbind(), reciprocal(scale)
        return (slope * scale).reciprocal(), corner / scale + middle

    def to_output(fold: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        (corner, slope), (factor, shift) = fold.unbind(), parameters(fold[0], *others)
        return factor / slope, factor * corner + shift

    flat = flat_storage(output)
    assert flat is not None
    mask = Mask(codec.pack_mask(flat, "not_le", 0.0, 0.0), Geometry(output), 1.0, 0.0)
    middle, scale = (one.get() for one in statistics)
    own = [one.detach() for one in (weight, bias) if isinstance(one, Tensor)]
    fold = torch.stack(_fold(*parameters(scale, *own)))
    factor, middle = to_input(fold, middle, scale)
    distance = _normalised(data.detach(), middle, factor.reciprocal_(), mask.codes)
    source = call.code(distance, length)
    del distance
    signed = Masked("", source, mask, 1.0, data, off=-1.0)
    by = Exact(fold, where=call.where)
    kept = Recipe("", parents=[signed, by, *statistics], like=data, samples=(True,) + (False,) * 3, **_affine(to_input))
    call.scope.registry.learn(data, kept)
    call.keep(slot, kept)
    call.fuse(slot, summed=1)
    others = [by, *_parameters(call, weight, bias)]
    how = {"samples": (True,) + (False,) * len(others), **_affine(to_output)}
    recipe = call.output_recipe(call.name, parents=[signed, *others], **how)
    if recipe is not None:
        half = Recipe(call.name, parents=[source, *others], like=output, **how)
        recipe.half = Masked("relu", half, mask, 1.0, output)
    return True


def _keep_normalised(call: Call, weight: Any, bias: Any, how: _Statistics) -> bool:
    """Code the normalised input in place of the input, which is then a recipe of it; False, and nothing done, where
    that cannot be.

    A group of values of several channels has a step for the widest of them, which is many times the deviation of the
    narrowest; and the backward pass divides by each one's own.
    """
    found = _whole_input(call)
    if found is None:
        return False
    slot, data, rest, length = found
    statistics = _keep_statistics(call, rest, how.size)
    if not statistics:
        return False
    normalised = how.normalise(data.detach(), *(one.get() for one in statistics))
    if normalised.stride() != data.stride():
        return False
    source = call.code(normalised, length)
    del normalised
    to_output = _factor_and_shift(weight, bias, data.shape[1])
    parents, apart = [source, *statistics], how.by_sample
    kept = Recipe("", parents=parents, like=data, samples=(True, apart, apart), **how.to_input)
    call.scope.registry.learn(data, kept)
    call.keep(slot, kept)
    call.fuse(slot, summed=1)
    output = [source, statistics[1], *_parameters(call, weight, bias)]
    samples = (True, apart) + (False,) * (len(output) - 2)
    call.output_recipe(call.name, parents=output, samples=samples, **_affine(to_output))
    return True


def _may_be_normalised(call: Call, data: Tensor, channels: int = 1) -> bool:
    """Whether it gains something to code the normalised input, of so many channels that are normalised together."""
    coded = not call.policy.exact_norms and call.policy.bits is not None
    return coded and mixes_spreads(data.shape, data.stride(), channels, call.policy)


def _keep_batch_norm(call: Call) -> None:
    weight, bias, running_mean, running_var, training, eps = _batch_norm_arguments(call)
    use_batch, data = training or running_mean is None, call.argument(0, "input")
    folds = call.next is not None and call.next.name == "relu" and not call.policy.exact_norms
    # On CUDA that is a pass more forwards, which so far small maps alone are given: with them it gains more than range.
    # And what running statistics normalise may be of any range, which groups of many channels would share.
    mixed = folds and _may_be_normalised(call, data)
    folds = folds and (mixed or data.is_cpu) and (use_batch or not mixed)
    if folds and _keep_folded(call, weight, bias, None if use_batch else eps):
        return
    if use_batch and _may_be_normalised(call, data) and _keep_normalised(call, weight, bias, _of_channels(data)):
        return
    source, rest = _keep_input(call, SAMPLE)
    if use_batch:
        statistics = _keep_statistics(call, rest, call.argument(0, "input").shape[1])
    else:
        statistics = [exact(call.scope, value, call.where) for value in (running_mean, running_var)]
    if not statistics:
        return
    has_weight, has_bias = isinstance(weight, Tensor), isinstance(bias, Tensor)

    def coefficients(middle: Tensor, scale: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that is one value per channel is joined first: one pass over the activation."""
        scale = scale if use_batch else torch.rsqrt(scale + eps)
        if has_weight:
            scale = scale * parameters[0]
        return scale, (parameters[-1] if has_bias else 0) - middle * scale

    parents = [source, *statistics, *_parameters(call, weight, bias)]
    samples = (True,) + (False,) * (len(parents) - 1)
    call.output_recipe(call.name, parents=parents, samples=samples, **_affine(coefficients))


def _keep_instance_norm(call: Call) -> None:
    at = call.argument
    data = at(0, "input")
    weight, bias = at(3, "weight"), at(4, "bias")
    source, rest = _keep_input(call, SAMPLE)
    size = data.shape[0] * data.shape[1]
    statistics = _keep_statistics(call, rest, size) if at(5, "use_input_stats", True) else []
    if not statistics:
        return
    tail, shape = (1,) * (data.dim() - 2), data.shape

    def normalise(value: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
        per_sample = (shape[0], shape[1], *tail)
        value = value.view(shape) if value.shape != shape else value
        return value.sub_(middle.view(per_sample)).mul_(scale.view(per_sample))

    if source is not None:
        source = call.kept_of(data) or source
    _register_output(call, source, statistics, weight, bias, normalise, _channel_view(data.dim()))


def _keep_layer_norm(call: Call) -> None:
    data, normalized = call.argument(0, "input"), call.argument(1, "normalized_shape")
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    source, rest = _keep_input(call, LAST if len(normalized) == 1 else None)
    statistics = _keep_statistics(call, rest, data.shape[: data.dim() - len(normalized)].numel())
    if not statistics:
        return
    has_weight, has_bias = isinstance(weight, Tensor), isinstance(bias, Tensor)

    def coefficients(
        middle: Tensor, scale: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return middle, scale, parameters[0] if has_weight else None, parameters[-1] if has_bias else None

    def again(value: Tensor, *others: Tensor) -> Tensor:
        return codec.normalize_(_widened(value, others[1]), *coefficients(*others))

    def at_once(
        packed: codec.PackedTensor, others: list[Tensor], dtype: torch.dtype, mask: Masking | None
    ) -> Tensor | None:
        return rebuild.by_row(packed, *coefficients(*others), dtype) if mask is None else None

    parents = [source, *statistics, *_parameters(call, weight, bias)]
    along = data.dim() > len(normalized)  # else all of it is one sample
    samples = (along,) * 3 + (False,) * (len(parents) - 3) if along else ()
    call.output_recipe(call.name, again, parents, writes=True, samples=samples, at_once=at_once)


def _keep_group_norm(call: Call) -> None:
    data, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    together = data.shape[1] // groups
    if _may_be_normalised(call, data, together) and _keep_normalised(call, weight, bias, _of_groups(data, groups)):
        return
    source, rest = _keep_input(call, SAMPLE)
    statistics = _keep_statistics(call, rest, data.shape[0] * groups)
    if not statistics:
        return
    by_channel = _by_channel(data, groups)

    def normalise(value: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
        return value.sub_(by_channel(middle)).mul_(by_channel(scale))

    _register_output(call, source, statistics, weight, bias, normalise, _channel_view(data.dim()))


def _keep_rms_norm(call: Call) -> None:
    """One fused operation saves input and rstd; the composite saves input (twice), rstd (twice) and ``x * rstd``."""
    data, weight = call.argument(0, "input"), call.argument(2, "weight")
    source: Kept | None = None
    factor: Kept | None = None
    normalised: Kept | None = None
    for slot, tensor in call.open_slots():
        if call.is_weight(tensor):
            continue
        if call.policy.exact_norms and tensor.numel() == data.numel():
            call.exact(slot, _EXACT_NORMS)
            source = source or slot.kept
        elif tensor.numel() != data.numel():
            factor = call.exact(slot, "a statistic")
        elif factor is None or call.same_storage(tensor, data) or source is None:
            source = call.data_argument(slot, data, LAST)
        elif call.kept_of(tensor) is not None:
            call.data(slot)
        else:
            normalised = Recipe("rms_norm", lambda value, scale: value * scale, [source, factor], tensor)
            call.keep(slot, normalised)
    if source is None or factor is None:
        return

    def normalise(value: Tensor, scale: Tensor) -> Tensor:
        return value.mul_(scale)

    _register_output(call, source, [factor], weight, None, normalise, lambda parameter: parameter)


BATCH_NORM = register(
    Rule("batch_norm", _keep_batch_norm, _BOUNDED, exact_reason="a statistic", looks_ahead=True),
    functions("batch_norm"),
)
INSTANCE_NORM = register(
    Rule("instance_norm", _keep_instance_norm, _BOUNDED, exact_reason="a statistic"), functions("instance_norm")
)
LAYER_NORM = register(
    Rule("layer_norm", _keep_layer_norm, _BOUNDED, exact_reason="a statistic"), functions("layer_norm")
)
GROUP_NORM = register(
    Rule("group_norm", _keep_group_norm, _BOUNDED, exact_reason="a statistic"), functions("group_norm")
)
RMS_NORM = register(Rule("rms_norm", _keep_rms_norm, _BOUNDED, exact_reason="a statistic"), functions("rms_norm"))
