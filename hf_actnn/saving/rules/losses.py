"""Losses and what feeds them are exact: every gradient starts there.

Exact is not the same as held: the logits of a segmentation are a small map enlarged, and what a loss computed from them
it computes again, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_actnn.saving.kept import Exact
from hf_actnn.saving.recipes import Recipe
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from torch import Tensor

    from hf_actnn.saving.call import Call
    from hf_actnn.saving.kept import Kept


_LOG_SOFTMAX = frozenset(functions("log_softmax"))


_OF_CLASSES = frozenset(functions("cross_entropy", "nll_loss"))


def _keep_loss(call: Call) -> None:
    if call.function in _OF_CLASSES:
        _keep_classes(call)
    _keep_enlarged(call)


def _keep_classes(call: Call) -> None:
    """The class of each pixel, lossless in a few bits.

    The forward pass has refused whatever is neither a class nor the one to be left out, on a GPU as on the CPU.
    """
    data, target = call.argument(0, "input"), call.argument(1, "target")
    left_out = call.argument(4, "ignore_index", -100)
    count = data.shape[1] if data.dim() > 1 else data.shape[0]
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, target) and tensor.device.type in ("cpu", "cuda"):
            call.whole_numbers(slot, count, left_out)


def _keep_enlarged(call: Call) -> None:
    data = call.argument(0, "input")
    source = call.kept_of(data)
    if source is None or isinstance(source, Exact) or not source.same_bits:
        return
    if call.function in _LOG_SOFTMAX and call.argument(1, "dim") is None:
        return
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, data):
            call.keep(slot, source)
        elif tensor.shape == data.shape and _made_by(tensor) == "LogSoftmaxBackward0":
            call.keep(slot, _log_softmax(call, source, tensor))


def _made_by(tensor: Tensor) -> str:
    return "" if tensor.grad_fn is None else tensor.grad_fn.name()


def _log_softmax(call: Call, source: Kept, tensor: Tensor) -> Recipe:
    """What `cross_entropy` and `log_softmax` save; autocast computes it in fp32."""
    dim = call.argument(1, "dim", -1) if call.function in _LOG_SOFTMAX else 1 if tensor.dim() > 1 else 0
    dtype = tensor.dtype
    return Recipe("log_softmax", lambda value: value.to(dtype).log_softmax(dim), [source], tensor, repeats=True)


LOSS = register(
    Rule("loss", _keep_loss, bounded="kept exactly", exact_reason="a loss is exact"),
    functions(
        "cross_entropy",
        "nll_loss",
        "log_softmax",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "cosine_embedding_loss",
        "ctc_loss",
        "gaussian_nll_loss",
        "poisson_nll_loss",
        "hinge_embedding_loss",
        "margin_ranking_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "triplet_margin_with_distance_loss",
        "logsumexp",
    ),
)
