"""The kinds of kept tensor: each gives back, when asked, what autograd saved.

``get`` returns the tensor; ``fresh`` says whether the caller owns the memory it returns (and may write to it);
``leaves`` lists the objects that hold bytes, each of which may stand behind several kept tensors.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hf_actnn import codec
from hf_actnn.errors import SavedTensorError, message
from hf_actnn.saving.sharded import check_gathered

Others = Literal["whole", "size", "nothing"]


class _Probe(threading.local):
    """What a tape asks of the tensors that are given back while it runs a node again; see `saving.tape`."""

    #: Saves that the node in hand has read, where anyone wants to know, and the backward pass it belongs to.
    read: list[Any] | None = None
    task = -1
    #: One quantised tensor, and what is added to its values; what reruns gave in the meantime.
    kept: Quantized | None = None
    noise: Any = None
    values: dict[int, list[Tensor]] | None = None
    #: What a function of single values has given undisturbed; who works through them in parts may give no result then,
    #: but the squared distance to it.
    undisturbed: Tensor | None = None
    energy: Tensor | None = None
    #: What is asked of the gradient of an operation's input: the "whole", its squared "size", or "nothing". Who makes
    #: that and a parameter's at once may give none for the latter two; the size then goes into `energy`.
    others: Others = "whole"

    def begin(self) -> None:
        """A node that is listened to begins."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            at_end_of_backward(self.clear)
            self.task = task
        self.read = []

    def saw(self, slot: Any) -> None:
        if torch._C._current_graph_task_id() != self.task:
            self.clear()  # what is left of a pass that raised
        elif self.read is not None:
            self.read.append(slot)

    def clear(self) -> None:
        self.read, self.task = None, -1

    @contextlib.contextmanager
    def disturbing(self, kept: Quantized, noise: Any, undisturbed: Tensor | None = None) -> Iterator[None]:
        self.kept, self.noise, self.values = kept, noise, {}
        self.undisturbed, self.energy = undisturbed, None
        try:
            yield
        finally:
            self.kept = self.noise = self.values = self.undisturbed = self.energy = None

    @contextlib.contextmanager
    def asking(self, others: Others) -> Iterator[None]:
        """A rerun of which no more is needed than this, beside gradients of parameters."""
        self.others, self.energy = others, None
        try:
            yield
        finally:
            self.others = "whole"


probe = _Probe()


@lru_cache(maxsize=4096)
def is_dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether a tensor fills a stretch of memory without gaps or overlaps."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 0:
            return True
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def fills_its_memory(tensor: Tensor) -> bool:
    """:func:`is_dense`, quick for the usual case."""
    return tensor.is_contiguous() or is_dense(tensor.shape, tensor.stride())


class Kept:
    """A tensor in some form, able to give itself back."""

    __slots__ = ("__weakref__",)
    kind = "kept"
    fresh = True
    #: Whether what comes back has the very bits of what was saved.
    same_bits = False

    def get(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how it gives its tensor back")

    def get_as(self, dtype: torch.dtype) -> Tensor:
        """What :meth:`get` gives, cast to a narrower dtype. Where moves come in between, they have less to move after
        the cast than before."""
        return self.get().to(dtype)

    def leaves(self) -> Iterator[Kept]:
        yield self

    @property
    def form(self) -> Any:
        """What has the shape, stride, dtype and device of the tensor, where it fills its memory; else None."""
        return None

    @property
    def unit(self) -> int:
        """Elements of which :meth:`part` gives any number in a row, in storage order; 0 where only the whole can be
        had."""
        return 0

    def part(self, start: int, stop: int) -> Tensor:
        """Some of the values in storage order, one dimension, the caller's own. Both ends are multiples of
        :attr:`unit`."""
        raise TypeError(f"{type(self).__name__} cannot be had in parts")

    @property
    def nbytes(self) -> int:
        """Bytes this object itself holds; 0 for what only refers to others."""
        return 0


class Swapped(Protocol):
    """Where the bytes of a leaf are once a swapper has taken them; see `saving.swap`."""

    def get(self) -> tuple[Tensor, ...]:
        """The leaf's parts, on their device."""
        ...

    def original(self) -> Tensor | None:
        """The first part, if it is still the very tensor that was saved."""
        ...

    def drop(self) -> None:
        """Let go of the tensors that were saved: they are about to be written to."""
        ...


class Leaf(Kept):
    """Holds bytes itself. A swapper may take its ``parts``: stand-ins without memory are then left in their place."""

    __slots__ = ("swapped",)
    swapped: Swapped | None

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that may be taken, the leaf's own; none where that would be of no use."""
        return ()

    def hand_over(self, swapped: Swapped) -> None:
        """``swapped`` gives the parts from here on."""
        raise TypeError(f"{type(self).__name__} has no parts to hand over")


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor of these sizes and this dtype that takes no memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class Exact(Leaf):
    """The tensor itself, by reference, with the version it had.

    Saved-tensor hooks switch autograd's own version check off, so it is made here.
    """

    __slots__ = ("tensor", "version", "parameter", "where", "lent")
    kind = "exact"
    fresh = False
    same_bits = True

    def __init__(self, tensor: Tensor, *, parameter: bool = False, where: str = "") -> None:
        self.version = tensor._version
        # Detached: a saved output would otherwise hold its own node, a cycle that only the collector frees.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.parameter = parameter
        self.where = where
        self.lent = False  # noted by the session as one that recipes read
        self.swapped = None

    def get(self) -> Tensor:
        if self.swapped is None:
            return self._checked(self.tensor)
        (tensor,) = self.swapped.get()
        original = self.swapped.original()
        return tensor if original is None else self._checked(original)

    def _checked(self, tensor: Tensor) -> Tensor:
        if tensor._version != self.version:
            raise SavedTensorError(
                message(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(tensor.shape)} {tensor.dtype} is at version {tensor._version}",
                    where=self.where,
                    expected=f"version {self.version}",
                    received=f"version {tensor._version}",
                    next_step="Make the change out of place, or after backward()",
                )
            )
        if self.parameter:
            check_gathered(tensor, self.where)
        return tensor

    def original(self) -> Tensor | None:
        """The very tensor that was saved, as long as it is referred to."""
        return self.tensor if self.swapped is None else self.swapped.original()

    def secure(self) -> bool:
        """Refer to the tensor no longer: it is about to be written to. Whether a copy of it had to be made."""
        if self.swapped is not None:
            self.swapped.drop()
            return False
        if self.tensor._version != self.version:
            return False
        self.tensor = self.tensor.detach().clone()
        self.version, self.parameter = self.tensor._version, False
        return True

    def parts(self) -> tuple[Tensor, ...]:
        tensor = self.tensor
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_complex()
        if self.parameter or not plain or not fills_its_memory(tensor):
            return ()
        return (tensor,)

    def hand_over(self, swapped: Swapped) -> None:
        self.swapped, self.tensor = swapped, stand_in(self.tensor)

    @property
    def nbytes(self) -> int:
        return 0 if self.parameter else self.tensor.untyped_storage().nbytes()


class Quantized(Leaf):
    """A randomly quantised code of the tensor; its expectation is the tensor.

    ``form`` is the packed tensor, whose sizes may always be read, and ``packed`` the same with its bytes. ``name`` is
    the tensor's where bits are chosen; ``item`` says more of it on a step that is measured.
    """

    __slots__ = ("_form", "name", "item")
    kind = "quantized"

    def __init__(self, packed: codec.PackedTensor, name: str = "", item: Any = None) -> None:
        self._form = packed
        self.name = name
        self.item = item
        self.swapped = None

    @property
    def form(self) -> codec.PackedTensor:
        return self._form

    @property
    def unit(self) -> int:
        return self._form.unit

    def part(self, start: int, stop: int) -> Tensor:
        value = self.packed.part(start, stop)
        if probe.kept is self and probe.noise is not None:
            value += probe.noise.part(start, stop)
        return value

    @property
    def packed(self) -> codec.PackedTensor:
        return self.form if self.swapped is None else self.form.holding(*self.swapped.get())

    def parts(self) -> tuple[Tensor, ...]:
        return self.form.codes, self.form.meta

    def hand_over(self, swapped: Swapped) -> None:
        codes, meta = self.parts()
        self.swapped, self._form = swapped, self.form.holding(stand_in(codes), stand_in(meta))

    def get(self) -> Tensor:
        value = self.packed.dequantize()
        if probe.kept is self and probe.noise is not None:
            probe.noise.add_to(value)
        return value

    def get_as(self, dtype: torch.dtype) -> Tensor:
        # Decoded to fp16, what is beyond its range would be its largest value, where a cast gives inf.
        if probe.kept is self or self.form.dtype != torch.float32 or dtype != torch.bfloat16:
            return self.get().to(dtype)
        return self.packed.dequantize(dtype)

    @property
    def nbytes(self) -> int:
        return self.form.nbytes


class Geometry:
    """Shape, strides, dtype and device of a dense tensor, to be made again."""

    __slots__ = ("shape", "stride", "dtype", "device")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    @property
    def per_sample(self) -> int:
        """Elements of one entry of the first dimension, where storage holds one after the other; else 0."""
        size = self.shape[1:].numel()
        return size if self.shape and (self.stride[0] == size or self.shape[0] == 1) else 0

    def like(self, form: Any) -> bool:
        """Whether values in storage order are the same elements of both."""
        return tuple(self.shape) == tuple(form.shape) and tuple(self.stride) == tuple(form.stride)

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=dtype or self.dtype, device=self.device)

    def fit(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``value`` with exactly these strides, in this or another dtype; copied only where they differ."""
        dtype = dtype or self.dtype
        if value.shape != self.shape:
            value = value.reshape(self.shape)
        if value.stride() != self.stride or value.dtype != dtype or value.device != self.device:
            value = self.empty(dtype).copy_(value)
        return value

    def from_flat(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride)


class _Coded(Leaf):
    """Holds one tensor of codes."""

    __slots__ = ("_codes",)

    def __init__(self, codes: Tensor) -> None:
        self._codes = codes
        self.swapped = None

    @property
    def codes(self) -> Tensor:
        return self._codes if self.swapped is None else self.swapped.get()[0]

    def parts(self) -> tuple[Tensor, ...]:
        return (self._codes,)

    def hand_over(self, swapped: Swapped) -> None:
        self.swapped, self._codes = swapped, stand_in(self._codes)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes


class Mask(_Coded):
    """One bit per value, given back as one of two values of the saved tensor's dtype."""

    __slots__ = ("geometry", "on", "off")
    kind = "mask"

    def __init__(self, codes: Tensor, geometry: Geometry, on: float, off: float) -> None:
        super().__init__(codes)
        self.geometry, self.on, self.off = geometry, on, off

    @property
    def form(self) -> Geometry:
        return self.geometry

    def get(self) -> Tensor:
        geometry = self.geometry
        flat = codec.unpack_mask(self.codes, geometry.shape.numel(), self.on, self.off, geometry.dtype)
        return geometry.from_flat(flat)


class TwoValued(Mask):
    """A tensor that holds two values and no others, to the bit: a boolean one, or a mask that attention adds."""

    __slots__ = ()
    same_bits = True


class Offsets(_Coded):
    """Small integers in a few bits; ``decode`` turns them into what was saved: a pooling's flat indices, say, or the
    classes of pixels."""

    __slots__ = ("bits", "numel", "decode")
    kind = "offsets"
    same_bits = True

    def __init__(self, codes: Tensor, bits: int, numel: int, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__(codes)
        self.bits, self.numel, self.decode = bits, numel, decode

    def get(self) -> Tensor:
        return self.decode(codec.unpack_uint(self.codes, self.bits, self.numel, torch.int32))


class Blank(Kept):
    """A tensor of which the backward pass reads the shape alone. The memory is never touched, so it costs nothing."""

    __slots__ = ("geometry",)
    kind = "shape only"

    def __init__(self, tensor: Tensor) -> None:
        self.geometry = Geometry(tensor)

    def get(self) -> Tensor:
        return self.geometry.empty()


def at_end_of_backward(callback: Callable[[], None]) -> bool:
    """Call a method when the backward pass that is running on this thread ends; false when none is running.

    The method is referenced weakly: a graph that was freed meanwhile needs no clearing.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    reference = weakref.WeakMethod(callback)

    def run() -> None:
        target = reference()
        if target is not None:
            target()

    torch.autograd.Variable._execution_engine.queue_callback(run)  # type: ignore[attr-defined]
    return True
