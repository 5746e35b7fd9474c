"""The scheme of the paper as it was, for comparison: Chen et al., "ActNN", ICML 2021, sections 3.2 and 4.

    python benchmarks/accuracy/original.py --bits 2 [--adaptive] train.py --its arguments ...

runs a script that trains with transformers' Trainer. Every tensor that an operation of the model saves is coded for
itself, however often others have saved it too: the values of a sample one after another, in groups of 256, rounded at
random to so many bits everywhere. A ReLU keeps one bit of each value. Statistics of normalisations and of attention,
parameters, tensors of less than two dimensions and what is computed outside of the model's submodules, which is the
loss, are exact. Operations that the paper has no layer for are treated in the same way: the paper's implementation left
them as they are.

With ``--adaptive`` the bits of samples and of saved tensors are chosen, so many on average: those which minimise
``sum_i C_i / (2^b_i - 1)^2`` (section 4.2), with ``C_n = (K / 4) G |R_n|^2 / I * |dy_n|^2`` for sample ``n`` of the
input of a convolution or linear layer: ranges ``R_n`` of its groups of ``G`` values, ``K`` positions of a kernel and
``I`` of the input, and the gradient ``dy`` of the output. What other operations save has the average of the last such
input before it, as normalisations have in the paper's implementation. Gradients are those of the step before, as means
over samples, since which sample it was is not known; averages are chosen every :data:`INTERVAL` steps, and within one
the samples' bits from their ranges each time.

Codes and their metadata are hf_actnn's: a minimum and a step are rounded before the values are, so the codes are
unbiased, which those of the paper's implementation are not quite. Each value is rounded for itself, as in the paper:
where hf_actnn's roundings mirror each other, one of them is taken from a second draw.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_actnn import codec
from hf_actnn.precision import solver

GROUP = 256
INTERVAL = 10
MOST_BITS = 8
#: Functions that keep only where their output is above zero.
RELUS = ("relu", "relu_")
ATTENTION = "scaled_dot_product_attention"


class Save(NamedTuple):
    """What one saved tensor of a step came to.

    Attributes:
        spread: [samples], ``G |R_n|^2``.
        numel: values of a sample.
        positions: ``K / I``; None of what is no layer's input, and follows the last one.
    """

    spread: Tensor
    numel: int
    positions: float | None


class _Mask(NamedTuple):
    codes: Tensor
    like: Tensor


class Independent(NamedTuple):
    """A tensor coded twice: what is mirrored in the one is taken from the other, so that no two roundings are related.

    It has the bytes of one of them, for codes of as many bits could be drawn so at once.
    """

    first: codec.PackedTensor
    second: codec.PackedTensor
    row: int

    @classmethod
    def of(cls, x: Tensor, bits: int | Tensor, seed: int, stream: int, row: int) -> Independent:
        """``row`` values of ``x`` are cut into groups for themselves; streams ``2 stream`` and ``2 stream + 1``."""
        draws = (codec.quantize(x, bits, GROUP, seed, 2 * stream + i, row) for i in range(2))
        return cls(*draws, row)

    @property
    def nbytes(self) -> int:
        return self.first.nbytes

    def dequantize(self) -> Tensor:
        at, device = self.first.layout, self.first.codes.device
        place = torch.arange(self.first.numel, device=device)
        mirrored = place // self.row % 4 >= 2 if at.rows_mirrored else place % self.row % at.group % 4 >= 2
        first, second = (packed.dequantize().view(-1) for packed in (self.first, self.second))
        return torch.where(mirrored, second, first).view(self.first.shape)


class Original:
    """Codes what a model saves.

    Args:
        model: whose submodules' operations are coded while it is in training.
        bits: per value; a whole number where they are not chosen.
        adaptive: whether bits are chosen per sample and per saved tensor, ``bits`` on average.
        seed: of the rounding.

    Attributes:
        nbytes: kept in the last forward pass, of what was coded.
        bytes_per_sample: the same, of one sample, in the first forward pass.
    """

    def __init__(self, model: nn.Module, bits: float, adaptive: bool = False, seed: int = 0) -> None:
        if not adaptive and bits != int(bits):
            raise SystemExit(f"--bits {bits}: a whole number, or --adaptive")
        self._model, self._bits, self._adaptive, self._seed = model, bits, adaptive, seed
        self._stream = self._steps = 0
        self._averages: list[float] = []
        self._gradients: dict[int, Tensor] = {}
        self._saves: dict[int, Save] = {}
        self._count = self._inside = 0
        self._now: tuple[str, float | None] = ("", None)
        self.nbytes = 0
        self.bytes_per_sample: float | None = None
        for module in model.children():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._inside -= 1

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass of a step."""
        if self._adaptive and self._steps % INTERVAL == 1:
            self._choose()
        self._steps += 1
        self._count, self.nbytes, self._saves, self._samples = 0, 0, {}, 0
        own = {tensor.untyped_storage()._cdata for tensor in [*self._model.parameters(), *self._model.buffers()]}
        with _Watch(self), torch.autograd.graph.saved_tensors_hooks(lambda x: self._pack(x, own), _unpack):
            yield
        if self.bytes_per_sample is None and self._samples:
            self.bytes_per_sample = self.nbytes / self._samples

    # -- one tensor -----------------------------------------------------------------------------------------------

    def _pack(self, x: Tensor, own: set[int]) -> Any:
        function, positions = self._now
        if (
            not self._inside
            or x.untyped_storage()._cdata in own
            or not x.is_floating_point()
            or x.ndim < 2
            or (function == ATTENTION and x.ndim < 4)  # the logarithm of a sum for each query
        ):
            return x
        if function in RELUS:
            flat = x.detach().contiguous().view(-1)
            mask = codec.pack_mask(flat, "gt")
            self.nbytes += mask.nbytes
            return _Mask(mask, torch.empty_like(x, device="meta"))
        index, self._count = self._count, self._count + 1
        samples, x = len(x), x.detach().contiguous()
        self._samples = self._samples or samples
        row = x.numel() // max(samples, 1)
        if not row:
            return x
        bits: int | Tensor = int(self._bits)
        if self._adaptive:
            spread = codec.sample_spread(x, samples, row, GROUP)
            self._saves[index] = Save(spread, row, positions)
            bits = self._of_samples(index, spread)
        self._stream += 1
        packed = Independent.of(x, bits, self._seed, self._stream, row)
        self.nbytes += packed.nbytes
        return packed

    def _of_samples(self, index: int, spread: Tensor) -> Tensor:
        """Bits of the samples of one tensor, within its own average."""
        average = self._averages[index] if index < len(self._averages) else self._bits
        chosen = solver.solve(spread, torch.ones(len(spread)), math.floor(average * len(spread)), 1, MOST_BITS)
        return chosen.to(torch.uint8)

    # -- all of them ----------------------------------------------------------------------------------------------

    def saw(self, first: int, out: Any) -> None:
        """An operation has come to an end that saved the tensors from ``first`` on."""
        if not self._adaptive or not isinstance(out, Tensor) or not out.requires_grad:
            return
        for index in range(first, self._count):
            out.register_hook(functools.partial(self._note, index))

    def _note(self, index: int, gradient: Tensor) -> None:
        self._gradients[index] = gradient.square().sum() / len(gradient)

    def _choose(self) -> None:
        """Averages of the tensors, from the last step's ranges and gradients."""
        layers = [
            (i, save, save.positions)
            for i, save in sorted(self._saves.items())
            if i in self._gradients and save.positions is not None
        ]
        if not layers:
            return
        costs = torch.cat([save.spread * at / 4 * self._gradients[i].double() for i, save, at in layers])
        weights = torch.cat([torch.full_like(save.spread, save.numel) for _, save, _ in layers])
        costs = torch.where(costs.isfinite(), costs, 0)
        bits = solver.solve(costs, weights, self._bits * float(weights.sum()), 1, MOST_BITS).double()
        parts = bits.split([len(save.spread) for _, save, _ in layers])
        of_layer = {i: float(part.mean()) for (i, _, _), part in zip(layers, parts, strict=True)}
        last: float = MOST_BITS
        self._averages = [last := of_layer.get(i, last) for i in range(max(self._saves) + 1)]


class _Watch(TorchFunctionMode):
    """Knows which operation runs."""

    def __init__(self, scheme: Original) -> None:
        super().__init__()
        self._scheme = scheme

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scheme, first = self._scheme, self._scheme._count
        before, scheme._now = scheme._now, (getattr(func, "__name__", ""), _positions(func, args))
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            scheme._now = before
        if scheme._count > first:
            scheme.saw(first, out)
        return out


def _positions(func: Callable[..., Any], args: tuple[Any, ...]) -> float | None:
    """``K / I`` of a convolution or linear layer, over the groups of a depthwise one; else None."""
    name = getattr(func, "__name__", "")
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return None
    x, weight = args[:2]
    if name.startswith("conv") and weight.ndim > 2:
        groups = x.shape[1] // weight.shape[1]
        return math.prod(weight.shape[2:]) / math.prod(x.shape[2:]) / (groups if groups == x.shape[1] else 1)
    return 1.0 / math.prod(x.shape[1:-1]) if name == "linear" else None


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _Mask):
        flat = codec.unpack_mask(kept.codes, kept.like.numel(), 1.0, 0.0, kept.like.dtype)
        return flat.view(kept.like.shape)
    return kept if isinstance(kept, Tensor) else kept.dequantize()


def install(bits: float, adaptive: bool) -> dict[int, Original]:
    """Have transformers' Trainer compute losses of models in training under the scheme: that of each model."""
    from transformers import Trainer

    plain = Trainer.compute_loss
    schemes: dict[int, Original] = {}

    def compute_loss(self: Trainer, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return plain(self, model, *args, **kwargs)
        if id(model) not in schemes:
            schemes[id(model)] = Original(model, bits, adaptive, self.args.seed)
        with schemes[id(model)].forward():
            return plain(self, model, *args, **kwargs)

    Trainer.compute_loss = compute_loss
    return schemes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--adaptive", action="store_true", help="bits per sample and per saved tensor")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    schemes = install(options.bits, options.adaptive)
    sys.argv = [str(options.script), *options.arguments]
    sys.path.insert(0, str(options.script.parent.resolve()))
    runpy.run_path(str(options.script), run_name="__main__")
    for scheme in schemes.values():
        print({"actnn_bytes_per_sample": scheme.bytes_per_sample})


if __name__ == "__main__":
    main()
