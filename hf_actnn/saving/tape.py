"""What a backward pass shows of the gradient while it runs: whom quantisation harms, and how far the harm is carried.

On the one step in many that collects, every node of the autograd graph gets a hook. Where a node read quantised tensors
or made gradients of parameters, or a sum of what was broadcast, the hook runs that node's own backward formula again,
on the spot:

* with one of the quantised tensors disturbed by noise of the size that its rounding has. How far the results move is
  the variance that this tensor adds here: exactly so for gradients of parameters, while what moves in gradients of
  activations goes on through the rest of the pass;
* with random signs on the incoming gradient, which shows how much of a disturbance comes through this node, and how
  much of it ends in gradients of parameters;
* with one random sign per sample, half of them negative, which shows how far the gradients of samples differ.

So there is one law for every operation, with or without a rule, and no formula per operation that could be wrong or
missing. Nothing outlives its node but a few sums: `hf_actnn.precision.sensitivity` makes sensitivities of them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from hf_actnn import codec
from hf_actnn.errors import ActNNWarning, message
from hf_actnn.saving.kept import Others, Quantized, fills_its_memory, probe
from hf_actnn.saving.noise import SIGNS, Noise, Signs, sign_

#: Different draws of signs for samples.
_HALVES = 32
#: Where a gradient goes that goes to no node: to a parameter, or nowhere.
LEAF, NOTHING = -1, -2
#: Nodes that noise is followed through before it counts as independent from value to value.
FOLLOWED = 1
#: One value of the output is one of the input's, so noise that is independent from value to value goes on as it came.
_POINTWISE = (
    *("Relu", "Threshold", "Gelu", "Silu", "Mish", "Elu", "Softplus", "Sigmoid", "Tanh", "Hardtanh", "Hardswish"),
    *("Hardsigmoid", "LeakyRelu", "Clamp", "Pow", "Exp"),
)
#: Their Jacobian has one entry per row, so any signs come through as the gradient itself does, unless what was
#: broadcast gets a sum.
_DIAGONAL = (
    *_POINTWISE,
    *("Add", "Sub", "Neg", "Mul", "Div", "Dropout", "NativeDropout", "View", "UnsafeView", "Reshape", "Permute"),
    *("Transpose", "T", "Expand", "Unsqueeze", "Squeeze", "Slice", "Cat", "Select", "Split", "Unbind", "Clone"),
    *("ToCopy", "Alias", "AsStrided", "Stack", "Roll", "MaxPool", "Index"),
)

#: They give a weight on as it is, in another shape, order or precision: squared gradients before and after are alike.
_MOVES = (
    *("View", "UnsafeView", "Reshape", "Permute", "Transpose", "T", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Alias"),
    *("AsStrided", "Slice", "Select", "Split", "Unbind", "Contiguous"),
)

#: Noise has the size behind them that it has before: behind the first always, behind the others where nothing is scaled
#: or summed over what was broadcast.
_PASSED, _KEEPS = tuple(name for name in _MOVES if name != "AsStrided"), ("Add", "Sub", "Neg", "Roll")

_numbers = itertools.count()


class Item:
    """A quantised tensor on a collecting step: how its rounding errs, sample by sample.

    Attributes:
        tape: that it is on.
        batch: samples of the batch; ``S`` of them, or one, are told apart.
        key: name of the tensor, the same in every step.
        numel: values of one sample.
        bits: ``[S]`` float64, bits of each sample.
        variance: ``[S]`` float64, the exact variance of the rounding, summed over a sample's values.
        correlation: of the roundings of two values that mirror each other, without dimensions.
        low, high: bits that may be chosen.
        asked: bits on average, in the configuration.
        row_length, group_size: of its groups.
        sizes: ``[8]``, bytes of one sample's codes at 1 to 8 bits.
    """

    __slots__ = (
        "tape",
        "batch",
        "key",
        "numel",
        "bits",
        "variance",
        "correlation",
        "low",
        "high",
        "asked",
        "row_length",
        "group_size",
        "sizes",
    )

    def __init__(
        self,
        tape: Tape,
        key: str,
        packed: codec.PackedTensor,
        tensor: Tensor,
        samples: int,
        batch: int,
        low: int,
        high: int,
        asked: float,
    ) -> None:
        self.tape, self.batch = tape, batch
        self.key, self.low, self.high, self.asked = key, low, high, asked
        self.numel = tensor.numel() // samples
        self.row_length, self.group_size = rows, group = packed.row_length, packed.group_size
        meta = 4 * len(packed.meta)
        self.sizes = [(codec.packed_nbytes(tensor.numel(), rows, bits, group) - meta) / samples for bits in range(1, 9)]
        if packed.widths is None:
            self.bits = torch.full((samples,), float(packed.bits), dtype=torch.float64)
        else:
            self.bits = packed.widths.double()
        self.variance = codec.rounding_variance(tensor, packed, samples=samples)
        self.correlation = codec.rounding_correlation(tensor, packed)


class Node:
    """Sums of squares at one node of the graph; None where the backward pass did not come."""

    __slots__ = (
        "following",
        "entries",
        "owners",
        "out",
        "ins",
        "made",
        "parameters",
        "apart",
        "replayable",
        "name",
        "samples",
    )

    def __init__(
        self,
        following: list[int],
        entries: list[int],
        owners: list[int],
        replayable: bool,
        name: str,
        samples: int,
    ) -> None:
        #: For each input the node its gradient goes to, or LEAF for a parameter, or NOTHING; which of that node's
        #: outputs it belongs to; and the `id` of the parameter it ends in, or a number below zero for what is computed
        #: from parameters, a standardised weight say, whose gradient is in other units than theirs.
        self.following, self.entries, self.owners = following, entries, owners
        self.replayable, self.name, self.samples = replayable, name, samples
        self.out: Tensor | None = None
        self.ins: list[Tensor | None] = [None] * len(following)
        #: Gradients of parameters made here; their response to random signs for each value; and to one for each sample,
        #: half of them negative. Each by owner.
        self.made: dict[int, Tensor] = {}
        self.parameters: dict[int, Tensor] = {}
        self.apart: dict[int, Tensor] = {}

    def energies(self, into: dict[int, Tensor], leaves: list[int], grads: Any) -> None:
        """Add the sums of squares of parameters' gradients."""
        for j in leaves:
            owner = self.owners[j]
            into[owner] = _plus(into.get(owner), _energy((grads[j],)))


class Harm(NamedTuple):
    """What one item's rounding does at one node: squared change of the parameters' gradients, by owner, and of the
    others."""

    key: str
    node: int
    direct: dict[int, Tensor]
    carried: list[tuple[int, Tensor]]


class Tape:
    """Filled during the forward and backward passes of one step.

    Args:
        seed: of the signs.
    """

    def __init__(self, seed: int) -> None:
        self._mark = f"hf_actnn tape {next(_numbers)}"
        self._owner = f"{self._mark}, owner"
        self.items: dict[str, Item] = {}
        #: Numbers of values of parameters, by owner.
        self.sizes: dict[int, int] = {}
        self.nodes: list[Node] = []
        self.harms: list[Harm] = []
        #: Noise on its way to a node: item, which of the node's outputs, noise, nodes to follow it through after that.
        self._coming: dict[int, list[tuple[str, int, Tensor, int]]] = {}
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._signs = Signs.draw(self._generator)
        self._told = False
        self._by_device: dict[tuple[torch.device, torch.dtype], Signs] = {}
        self._balanced: dict[tuple[int, torch.device, torch.dtype], Iterator[Tensor]] = {}

    def add(self, item: Item) -> None:
        self.items[item.key] = item

    # -- the graph ----------------------------------------------------------------------------------------------------

    def listen(self, outputs: Iterable[Tensor], samples: int) -> None:
        """Hook every node that the backward pass from these tensors can reach and that is not listened to yet.

        A model may be run in parts. What an earlier part has made is known by a mark on the node itself: a reference
        from here would keep the graph.
        """
        index: dict[Any, int] = {}
        order: list[Any] = []
        stack: list[tuple[Any, bool]] = [(out.grad_fn, False) for out in outputs if out.grad_fn is not None]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in index and self._mark not in node.metadata:
                index[node] = len(index)
                stack.append((node, True))
                stack.extend((into, False) for into, _ in node.next_functions if into is not None and into not in index)
        place: dict[Any, int] = {}
        owner: dict[Any, int] = {}
        for node in order:  # those nearer to the leaves come first
            following = []
            for into, _ in node.next_functions:
                if into is None:
                    following.append(NOTHING)
                elif hasattr(into, "variable"):
                    following.append(LEAF if isinstance(into.variable, torch.nn.Parameter) else NOTHING)
                else:
                    following.append(place[into] if into in place else into.metadata[self._mark])
            if hasattr(node, "variable"):
                owner[node] = id(node.variable)
                self.sizes[id(node.variable)] = node.variable.numel()
                continue
            owners = [
                0 if into is None else owner[into] if into in owner else into.metadata.get(self._owner, 0)
                for into, _ in node.next_functions
            ]
            if following and all(into == LEAF for into in following):
                # A transposed, cast or standardised weight: what goes in there goes to parameters.
                place[node] = LEAF if not _reads_data(node) else len(self.nodes)
            else:
                place[node] = len(self.nodes)
            node.metadata[self._mark] = place[node]
            name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
            if place[node] == LEAF:
                alone = len(owners) == 1 and name in _MOVES
                owner[node] = node.metadata[self._owner] = owners[0] if alone else -next(_numbers)
                continue
            # A function written in Python may do anything in its backward, a checkpoint even run one of its own.
            replayable = name != "CopySlices" and not isinstance(node, torch.autograd.function.BackwardCFunction)
            node.register_prehook(_begin)
            node.register_hook(_Hook(self, len(self.nodes)))
            entries = [entry for _, entry in node.next_functions]
            self.nodes.append(Node(following, entries, owners, replayable, name, samples))

    def measure(self, at: int, grad_inputs: tuple, grad_outputs: tuple) -> None:
        """After a node has run: what it did with the gradient, and what else it would have done."""
        read = probe.read
        if torch.is_grad_enabled():
            return  # create_graph: what is measured must not become a part of the graph
        node = self.nodes[at]
        node.out = _plus(node.out, _energy(grad_outputs))
        leaves = [j for j, into in enumerate(node.following) if into == LEAF and grad_inputs[j] is not None]
        others = [j for j, into in enumerate(node.following) if into >= 0 and grad_inputs[j] is not None]
        if leaves:
            node.energies(node.made, leaves, grad_inputs)
            for j in leaves:
                self.sizes.setdefault(node.owners[j], grad_inputs[j].numel())
        harmful: dict[int, tuple[Quantized, Item]] = {}
        for slot in read or ():
            for kept in slot.kept.leaves():
                if isinstance(kept, Quantized) and kept.item is not None and kept.item.tape is self:
                    harmful.setdefault(id(kept), (kept, kept.item))
        again: Any = torch._C._current_autograd_node()
        white = size = None

        def asking(less: Others) -> AbstractContextManager[None]:
            # What goes on to a parameter, of a table that a convolution's input was gathered from, is read by itself.
            return probe.asking("whole" if 0 in leaves else less)

        # What was broadcast gets a sum: of another size for a gradient that is alike everywhere than for noise.
        incoming = [grad.numel() for grad in grad_outputs if grad is not None]
        sums = len(incoming) == 1 and any(grad_inputs[j].numel() < incoming[0] for j in others)
        if node.replayable and (leaves or sums or (harmful and node.name not in _DIAGONAL)):
            with asking("size"):
                white = self._run(node, again, [self._signed(grad) for grad in grad_outputs], grad_inputs)
                size = probe.energy
        if white is None:
            for j in others:
                node.ins[j] = _plus(node.ins[j], _energy((grad_inputs[j],)))
            if leaves and not node.replayable:
                node.energies(node.parameters, leaves, grad_inputs)
        else:
            for j in others:
                told = size if white[j] is None and size is not None else _energy((white[j],))
                node.ins[j] = _plus(node.ins[j], told)
            if leaves:
                node.energies(node.parameters, leaves, white)
            del white
        if leaves and node.replayable and self._splits(grad_outputs, node.samples):
            signed = [self._signed(grad, node.samples) for grad in grad_outputs]
            with asking("nothing"):
                by_sample = self._run(node, again, signed, grad_inputs)
            if by_sample is not None:
                node.energies(node.apart, leaves, by_sample)
            del by_sample, signed
        if not node.replayable:
            for key, _, noise, _ in self._coming.pop(at, ()):
                self.harms.append(Harm(key, at, {}, [(at, _energy((noise,)))]))
            return
        single = others[0] if node.name in _POINTWISE and len(others) == 1 and not leaves else None
        for kept, item in harmful.values():
            # One value of a tensor that was broadcast disturbs many, all alike.
            alone = single if single is not None and kept.form.numel == grad_inputs[single].numel() else None
            # What a convolution read of a parameter is exact, so noise in the other factor moves that one's gradient.
            exact = node.name == "Convolution" and node.following[1] == LEAF and node.owners[1] > 0
            with (
                probe.disturbing(kept, self._noise(kept, item), None if alone is None else grad_inputs[alone]),
                probe.asking("nothing" if exact else "whole"),
            ):
                moved = self._run(node, again, grad_outputs, grad_inputs)
                energy = probe.energy
            if moved is None:
                continue
            if alone is not None and energy is not None:
                self.harms.append(Harm(item.key, at, {}, [(node.following[alone], energy)]))
                continue
            further = FOLLOWED if alone is None else 0
            self._harm(item.key, at, _differences(moved, grad_inputs, grad_outputs), leaves, others, further)
            del moved
        for key, entry, noise, further in self._coming.pop(at, ()):
            keeps = node.name in _KEEPS and not leaves and getattr(again, "_saved_alpha", 1) == 1
            if keeps and all(
                (grad_inputs[j].shape, grad_inputs[j].dtype) == (noise.shape, noise.dtype) for j in others
            ):
                size = _energy((noise,))
                self.harms.append(Harm(key, at, {}, [(node.following[j], size) for j in others]))
                continue
            one = [noise if place == entry else None for place in range(len(grad_outputs))]
            with asking("whole" if further else "size"):
                moved = self._run(node, again, one, grad_inputs)
                size = probe.energy
            if moved is None:
                self.harms.append(Harm(key, at, {}, [(at, _energy((noise,)))]))
                continue
            self._harm(key, at, moved, leaves, others, further, size)
            del one, noise, moved

    def _harm(
        self,
        key: str,
        at: int,
        moved: list[Tensor | None],
        leaves: list[int],
        others: list[int],
        further: int,
        size: Tensor | None = None,
    ) -> None:
        """Note how far an item's noise moved the gradients that a node gives, or of the one that it did not give its
        squared ``size`` alone.

        What goes on as noise is followed through the next node: a normalisation's is in part a multiple of what it
        normalised, and the convolution before it answers to that many times as strongly as to independent noise.
        """
        node = self.nodes[at]
        carried = []
        for j in others:
            noise, into = moved[j], node.following[j]
            if noise is None and size is not None:
                carried.append((into, size))
            if noise is None or not noise.numel():
                continue
            if noise.is_cpu and not torch.linalg.vector_norm(noise, math.inf):
                continue  # elsewhere to look would mean to wait
            if further > 0 and self.nodes[into].replayable and self.nodes[into].name not in _PASSED:
                self._coming.setdefault(into, []).append((key, node.entries[j], noise, further - 1))
            else:
                carried.append((into, _energy((noise,))))
        direct: dict[int, Tensor] = {}
        node.energies(direct, leaves, moved)
        self.harms.append(Harm(key, at, direct, carried))

    # -- randomness --------------------------------------------------------------------------------------------------

    def _place(self) -> int:
        """Where among the random signs a tensor begins."""
        return int(torch.randint(0, SIGNS, (), generator=self._generator, device="cpu"))

    def _signs_on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Signs:
        where = device, dtype
        signs = self._by_device.get(where)
        if signs is None:
            signs = self._by_device[where] = self._signs.to(*where)
        return signs

    def _signed(self, grad: Tensor | None, samples: int = 0) -> Tensor | None:
        if grad is None:
            return None
        if samples:
            return (grad.reshape(samples, -1) * self._halves(samples, grad)[:, None]).view(grad.shape)
        signed = grad.clone()
        if not fills_its_memory(signed):
            signed = signed.contiguous()
        signs = self._signs_on(grad.device, grad.dtype).independent
        sign_(signed.as_strided((signed.numel(),), (1,)), signs, self._place())
        return signed

    def _halves(self, samples: int, like: Tensor) -> Tensor:
        """``[S]`` random signs, as many of each as can be: what all samples have in common cancels out, and with it
        most of the scatter. Those of the next node lie on the device already."""
        where = samples, like.device, like.dtype
        if where not in self._balanced:
            signs = torch.ones(samples, device="cpu")
            signs[: samples // 2] = -1
            signs[samples // 2 * 2 :] = 0
            drawn = [signs[torch.randperm(samples, generator=self._generator, device="cpu")] for _ in range(_HALVES)]
            self._balanced[where] = itertools.cycle(torch.stack(drawn).to(like))
        return next(self._balanced[where])

    @staticmethod
    def _splits(grads: tuple, samples: int) -> bool:
        return samples > 1 and all(
            grad is None or (grad.ndim > 0 and grad.shape[0] > 0 and grad.shape[0] % samples == 0) for grad in grads
        )

    def _run(self, node: Node, again: Any, grads: Iterable[Tensor | None], like: tuple) -> list[Tensor | None] | None:
        """Another run of the node that has just run; None, for good, where it does not let itself be run again."""
        try:
            return _as(again(*grads), like)
        except Exception as error:
            node.replayable = False
            # What a checkpoint recomputes it gives back once, and others may have hooks of that kind too: a measurement
            # must not be what a training stops for.
            if not isinstance(error, torch.utils.checkpoint.CheckpointError) and not self._told:
                self._told = True
                warnings.warn(
                    message(
                        "an operation could not be run again to measure what quantisation does to it",
                        where=type(again).__name__,
                        expected="saved tensors that may be read twice",
                        received=f"{type(error).__name__}: {error}",
                        next_step="Nothing needs to be done: gradients are right, it only counts less for the bits",
                    ),
                    ActNNWarning,
                    stacklevel=2,
                )
            return None

    def _noise(self, kept: Quantized, item: Item) -> Noise:
        signs = self._signs_on(kept.packed.device)
        return Noise(kept.packed, item.variance, item.correlation, signs, self._place())


class _Hook:
    """Runs after one node. It refers to the tape and not to the node, which would never be freed."""

    __slots__ = ("tape", "at")

    def __init__(self, tape: Tape, at: int) -> None:
        self.tape, self.at = tape, at

    def __call__(self, grad_inputs: tuple, grad_outputs: tuple) -> None:
        self.tape.measure(self.at, grad_inputs, grad_outputs)
        codec.release()  # whole tensors were decoded, which the next node would have beside its own


def _begin(grad_outputs: tuple) -> None:
    probe.begin()


def _differences(moved: list[Tensor | None], grads: tuple, incoming: tuple) -> list[Tensor | None]:
    """``moved - grads``, in the memory of the first where it is nobody else's."""
    others = {one.untyped_storage()._cdata for one in (*grads, *incoming) if one is not None}
    found: list[Tensor | None] = []
    for j, (one, grad) in enumerate(zip(moved, grads, strict=True)):
        if one is None or grad is None:
            found.append(None)
            continue
        storage = one.untyped_storage()._cdata
        own = storage not in others and one.dtype == grad.dtype and fills_its_memory(one) and type(one) is Tensor
        found.append(one.sub_(grad) if own else one - grad)
        others.add(storage)
        moved[j] = None
    return found


def _reads_data(node: Any) -> bool:
    """Whether a node whose gradients all go to parameters works on data that needs no gradient itself: it would have
    saved them."""
    return any(name.startswith("_raw_saved") for name in dir(node)) and len(node.next_functions) > 1


def _plus(before: Tensor | None, more: Tensor) -> Tensor:
    return more if before is None else before + more


def _energy(tensors: Iterable[Tensor | None]) -> Tensor:
    """The sum of all squares, as a tensor without dimensions."""
    norms = []
    for tensor in tensors:
        if tensor is not None:
            real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            norms.append(torch.linalg.vector_norm(real, dtype=_wide(real)).double())
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return norms[0].square() if len(norms) == 1 else torch.stack(norms).square().sum()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _as(results: Any, like: tuple) -> list[Tensor | None]:
    """Gradients in the shapes that autograd brings them to after a node: summed over what was broadcast."""
    results = results if isinstance(results, tuple) else (results,)
    return [
        None
        if result is None or expected is None
        else (result if result.shape == expected.shape else result.sum_to_size(expected.shape))
        for result, expected in zip(results, like, strict=True)
    ]


def samples_in_order(tensor: Tensor, samples: int, row_length: int) -> int:
    """``samples`` if a tensor's values in storage order are theirs one after the other, as far as its shape tells; else
    1: the tensor is then treated as one sample."""
    if samples <= 1 or tensor.ndim == 0:
        return 1
    outermost = max(range(tensor.ndim), key=lambda dim: (tensor.shape[dim] > 1, tensor.stride(dim), -dim))
    if tensor.shape[outermost] % samples or (tensor.numel() // samples) % row_length:
        return 1
    return samples


def batch_size(args: tuple, kwargs: dict[str, Any], main: str = "") -> int:
    """Samples in a call.

    The length of its main input where that is known, else of the first tensor with two dimensions or more, of a list of
    images, or of the first vector. Of inputs with the sequence first it is the length of the sequence.
    """
    values = [kwargs[main]] if main in kwargs else []
    values += [*args, *kwargs.values()]
    for least in (2, 1):
        for value in values:
            found = _length(value, least)
            if found:
                return found
    return 1


def _length(value: Any, least: int) -> int:
    """Of a tensor with so many dimensions, or of what holds one; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim >= least else 0
    if isinstance(value, dict):
        return next((found for one in value.values() if (found := _length(one, least))), 0)
    if isinstance(value, (list, tuple)) and value:
        if isinstance(value[0], Tensor):
            return len(value) if value[0].ndim == 3 else _length(value[0], least)
        return len(value) if isinstance(value[0], dict) and _length(value[0], least) else 0
    return 0


def seed_of(key: int, step: int) -> int:
    """Of the signs of one step."""
    return (key ^ (step * 0x9E3779B97F4A7C15)) % 2**63
