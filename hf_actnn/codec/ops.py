"""The codec as torch operators: schema, checks and fake implementations together.

In namespace ``hf_actnn``: ``quantize``, ``dequantize``, ``pack_mask``, ``unpack_mask``, ``pack_uint``, ``unpack_uint``.
All work on flat tensors and are functional. CPU and CUDA tensors go to the compiled kernels, those of any other device
and where there are no kernels to ``reference.py``; the bytes are the same. The functions of the same names in this
module are the way in: they call the kernels directly where nothing is tracing, since a dispatched call costs three
times a direct one and a training step makes hundreds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hf_actnn.codec import arena, buffers, native, reference
from hf_actnn.errors import CodecError, message

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.uint8, torch.int32, torch.int64)
_MASK_INPUTS = (*FLOATS, torch.bool, torch.uint8)
_MASK_OUTPUTS = (*FLOATS, torch.bool, torch.uint8)
# How the kernels name a dtype (csrc/codec.h).
_CODE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
}
_CONVERT = "Ask for one of these, and convert the result"
_PREDICATE = {name: index for index, name in enumerate(reference.PREDICATES)}


# --------------------------------------------------------------------------- checks


def _fail(what: str, **parts: str) -> None:
    raise CodecError(message(what, **parts))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_bits(bits: int) -> None:
    """Raise unless ``bits`` is a width the codec has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        _fail(
            "No such code width",
            where="bits",
            expected="an integer from 1 to 8",
            received=repr(bits),
            next_step="Choose a width in that range",
        )


def check_group_size(group_size: int) -> None:
    """Raise unless ``group_size`` is one the kernels take."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or not 1 <= group_size <= reference.MAX_GROUP:
        _fail(
            "No such group size",
            where="group_size",
            expected=f"an integer from 1 to {reference.MAX_GROUP}",
            received=repr(group_size),
            next_step="256 is the usual choice: metadata then costs 1/8 bit per element",
        )


def _check_flat(x: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dim() != 1 or not x.is_contiguous():
        _fail(
            "The operator takes a flat tensor",
            where=name,
            expected="one dimension, contiguous",
            received=f"shape {tuple(x.shape)}, strides {tuple(x.stride())}",
            next_step="Use hf_actnn.codec.quantize, which keeps shapes and strides",
        )
    if x.dtype not in dtypes:
        _fail(
            "Unsupported dtype",
            where=name,
            expected=_names(dtypes),
            received=str(x.dtype),
            next_step="Convert the tensor, or keep it exact",
        )


def _check_rows(numel: int, row_length: int) -> None:
    if row_length < 1 and numel > 0 or row_length >= 1 and numel % row_length != 0:
        _fail(
            "The rows do not fill the tensor",
            where="row_length",
            expected=f"a divisor of {numel} elements",
            received=str(row_length),
            next_step="Pass the length of the dimension that groups must not straddle",
        )


def _check_codes(codes: Tensor, expected: int) -> None:
    _check_flat(codes, "codes", (torch.uint8,))
    if codes.numel() != expected:
        _fail(
            "The codes do not fit the sizes given",
            where="codes",
            expected=f"{expected} bytes",
            received=f"{codes.numel()} bytes",
            next_step="Pass the bits, row_length, group_size and numel that the tensor was packed with",
        )


@lru_cache(maxsize=4096, typed=True)
def plan(numel: int, row_length: int, bits: int, group_size: int) -> reference.Layout:
    """The layout of a tensor's codes, or an error that says which number is wrong. Cached: a model has few shapes."""
    check_bits(bits)
    check_group_size(group_size)
    _check_rows(numel, row_length)
    return reference.layout(numel, row_length, bits, group_size)


def _check_quantize(x: Tensor, bits: int, row_length: int, group_size: int, advance: Tensor | None) -> reference.Layout:
    _check_flat(x, "x", FLOATS)
    _check_advance(advance, x)
    return plan(x.numel(), row_length, bits, group_size)


def _check_dequantize(
    codes: Tensor, meta: Tensor, bits: int, row_length: int, group_size: int, numel: int, dtype: torch.dtype
) -> None:
    _check_coded(codes, meta, plan(numel, row_length, bits, group_size), dtype)


def _check_coded(codes: Tensor, meta: Tensor, at: reference.Layout, dtype: torch.dtype) -> None:
    if (  # at a glance, as always but once
        (codes.dtype, codes.shape) == (torch.uint8, (at.nbytes,))
        and (meta.dtype, meta.shape) == (torch.bfloat16, (at.n_groups, 2))
        and codes.is_contiguous()
        and meta.is_contiguous()
        and meta.device == codes.device
        and dtype in FLOATS
    ):
        return
    _check_codes(codes, at.nbytes)
    if meta.dtype != torch.bfloat16 or meta.shape != (at.n_groups, 2) or not meta.is_contiguous():
        _fail(
            "The metadata does not fit the sizes given",
            where="meta",
            expected=f"contiguous bfloat16 of shape ({at.n_groups}, 2)",
            received=f"{meta.dtype} of shape {tuple(meta.shape)}, strides {tuple(meta.stride())}",
            next_step="Pass the metadata that quantize returned with these codes",
        )
    if meta.device != codes.device:
        _fail(
            "Codes and metadata lie on different devices",
            where="meta",
            expected=str(codes.device),
            received=str(meta.device),
            next_step="Move one of them",
        )
    if dtype not in FLOATS:
        _fail("Unsupported dtype", where="dtype", expected=_names(FLOATS), received=str(dtype), next_step=_CONVERT)


def _check_pack_mask(x: Tensor, predicate: str) -> None:
    if predicate not in _PREDICATE:
        _fail(
            "No such predicate",
            where="predicate",
            expected=", ".join(reference.PREDICATES),
            received=repr(predicate),
            next_step="docs/codec.md says what each of them means",
        )
    _check_flat(x, "x", _MASK_INPUTS if predicate == "nonzero" else FLOATS)


def _check_unpack_mask(codes: Tensor, numel: int, on: float, off: float, dtype: torch.dtype) -> None:
    _check_codes(codes, reference.uint_nbytes(numel, 1))
    if dtype not in _MASK_OUTPUTS:
        _fail(
            "Unsupported dtype", where="dtype", expected=_names(_MASK_OUTPUTS), received=str(dtype), next_step=_CONVERT
        )
    if dtype == torch.uint8 and not (0 <= on < 256 and 0 <= off < 256):
        _fail(
            "No such values in uint8",
            where="on, off",
            expected="numbers from 0 to 255",
            received=f"{on}, {off}",
            next_step="Pass a floating-point dtype for values like these",
        )


def _check_unpack_uint(codes: Tensor, bits: int, numel: int, dtype: torch.dtype) -> None:
    check_bits(bits)
    _check_codes(codes, reference.uint_nbytes(numel, bits))
    if dtype not in INTS:
        _fail("Unsupported dtype", where="dtype", expected=_names(INTS), received=str(dtype), next_step=_CONVERT)


def _check_advance(advance: Tensor | None, x: Tensor) -> None:
    if advance is None:
        return
    if advance.dtype != torch.int64 or advance.numel() != 1 or advance.device != x.device:
        _fail(
            "This cannot advance the stream",
            where="advance",
            expected=f"one int64 on {x.device}",
            received=f"{advance.dtype} of shape {tuple(advance.shape)} on {advance.device}",
            next_step="Pass a tensor of one number that lies where the values do, or none",
        )


_dispatch_modes, _is_wrapped = torch._C._len_torch_dispatch_stack, torch._C._functorch.is_functorch_wrapped_tensor


def _plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor that nothing traces or wraps."""
    return type(x) is Tensor and _dispatch_modes() == 0 and not is_compiling() and not _is_wrapped(x)


def _on_cpu(x: Tensor) -> bool:
    """Which of the two compiled modules a CPU or CUDA tensor goes to; their calls differ in the last arguments."""
    return x.is_cpu


def _kernels(x: Tensor) -> Any:
    """The compiled module for the device of ``x``, a CPU or CUDA tensor, or None."""
    return native.module() if _on_cpu(x) else native.cuda(x.device.index)


def _direct(x: Tensor) -> Any:
    """The compiled module if ``x`` is a plain CPU or CUDA tensor that nothing traces, else None."""
    return _kernels(x) if (x.is_cpu or x.is_cuda) and _plain(x) else None


def _launch(kernel: Any, x: Tensor, *arguments: Any) -> Any:
    """Call a kernel with what it has to know of where ``x`` is: the threads it may use; on CUDA the device, which is
    the current one meanwhile, and its current stream."""
    if _on_cpu(x):
        return kernel(*arguments, torch.get_num_threads())
    device = x.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    if device == torch._C._cuda_getDevice():
        return kernel(*arguments, device, stream)
    with torch.cuda.device(device):
        return kernel(*arguments, device, stream)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _signed(value: int) -> int:
    """Any Python integer as the 64-bit integer with the same low bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


# --------------------------------------------------------------------------- kernels behind the operators


def _make_codes(
    kernel: Any,
    x: Tensor,
    at: reference.Layout,
    row_length: int,
    group_size: int,
    widths: tuple[int, ...],
    seed: int,
    stream: int,
    advance: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, int | None]:
    """Codes, metadata and, on a CPU, the number of exact groups; on CUDA it is added to ``count``, if there is one.

    Args:
        widths: the bits, or where those of the samples lie; as the kernel takes them.
    """
    device = x.device
    arenas = arena.serving()
    if arenas is None:  # a call of arena.empty would take longer, and so would a tuple
        codes = torch.empty(at.nbytes, dtype=torch.uint8, device=device)
        meta = torch.empty(at.n_groups, 2, dtype=torch.bfloat16, device=device)
    else:
        codes = arenas.on(device).empty((at.nbytes,), torch.uint8)
        meta = arenas.on(device).empty((at.n_groups, 2), torch.bfloat16)
    cut = (x.data_ptr(), _CODE[x.dtype], x.numel(), row_length, group_size, *widths)
    into = codes.data_ptr(), meta.data_ptr()
    if _on_cpu(x):
        if advance is not None:
            stream = _signed(stream + int(advance))
        return codes, meta, kernel(*cut, seed, stream, *into, torch.get_num_threads())
    return codes, meta, _launch(kernel, x, *cut, seed, stream, _address(advance), *into, _address(count))


def _make_values(
    kernel: Any,
    codes: Tensor,
    meta: Tensor,
    row_length: int,
    group_size: int,
    widths: tuple[int, ...],
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """What codes stand for; ``widths`` as in :func:`_make_codes`."""
    cut = (codes.data_ptr(), meta.data_ptr(), numel, row_length, group_size, *widths, _CODE[dtype])
    if _on_cpu(codes):
        out = buffers.empty(numel, dtype)
        kernel(*cut, out.data_ptr(), torch.get_num_threads())
    else:
        out = torch.empty(numel, dtype=dtype, device=codes.device)
        _launch(kernel, codes, *cut, out.data_ptr())
    return out


def _native_pack_mask(kernels: Any, x: Tensor, predicate: str, lo: float, hi: float) -> Tensor:
    codes = arena.empty((reference.uint_nbytes(x.numel(), 1),), torch.uint8, x.device)
    _launch(
        kernels.pack_mask, x, x.data_ptr(), _CODE[x.dtype], x.numel(), _PREDICATE[predicate], lo, hi, codes.data_ptr()
    )
    return codes


def _native_unpack_mask(kernels: Any, codes: Tensor, numel: int, on: float, off: float, dtype: torch.dtype) -> Tensor:
    out = buffers.empty(numel, dtype) if _on_cpu(codes) else torch.empty(numel, dtype=dtype, device=codes.device)
    _launch(kernels.unpack_mask, codes, codes.data_ptr(), numel, _CODE[dtype], on, off, out.data_ptr())
    return out


def _native_pack_uint(kernels: Any, values: Tensor, bits: int) -> Tensor:
    codes = arena.empty((reference.uint_nbytes(values.numel(), bits),), torch.uint8, values.device)
    _launch(kernels.pack_uint, values, values.data_ptr(), values.numel(), bits, codes.data_ptr())
    return codes


def _native_unpack_uint(kernels: Any, codes: Tensor, bits: int, numel: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(numel, dtype=dtype, device=codes.device)
    _launch(kernels.unpack_uint, codes, codes.data_ptr(), numel, bits, _CODE[dtype], out.data_ptr())
    return out


# --------------------------------------------------------------------------- operators

_library = torch.library.Library("hf_actnn", "DEF")


def _operator(schema: str, compiled: Any, elsewhere: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, compiled, device)
    _library.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_actnn::{name}", fake, lib=_library)


def _quantize_compiled(x, bits, row_length, group_size, seed, stream, advance=None):
    at = _check_quantize(x, bits, row_length, group_size, advance)
    kernels = _kernels(x)
    if kernels is None:
        return reference.quantize(x, bits, row_length, group_size, seed, stream, advance)
    count = None if _on_cpu(x) else torch.zeros(1, dtype=torch.int32, device=x.device)
    kernel = kernels.quantize
    codes, meta, exact = _make_codes(kernel, x, at, row_length, group_size, (bits,), seed, stream, advance, count)
    return codes, meta, torch.tensor([exact], dtype=torch.int32) if count is None else count


def _quantize_elsewhere(x, bits, row_length, group_size, seed, stream, advance=None):
    _check_quantize(x, bits, row_length, group_size, advance)
    return reference.quantize(x, bits, row_length, group_size, seed, stream, advance)


def _quantize_fake(x, bits, row_length, group_size, seed, stream, advance=None):
    at = reference.layout(x.numel(), row_length, bits, group_size)
    return (
        x.new_empty(at.nbytes, dtype=torch.uint8),
        x.new_empty((at.n_groups, 2), dtype=torch.bfloat16),
        x.new_empty(1, dtype=torch.int32),
    )


def _dequantize_compiled(codes, meta, bits, row_length, group_size, numel, dtype):
    _check_dequantize(codes, meta, bits, row_length, group_size, numel, dtype)
    kernels = _kernels(codes)
    if kernels is None:
        return reference.dequantize(codes, meta, bits, row_length, group_size, numel, dtype)
    return _make_values(kernels.dequantize, codes, meta, row_length, group_size, (bits,), numel, dtype)


def _dequantize_elsewhere(codes, meta, bits, row_length, group_size, numel, dtype):
    _check_dequantize(codes, meta, bits, row_length, group_size, numel, dtype)
    return reference.dequantize(codes, meta, bits, row_length, group_size, numel, dtype)


def _pack_mask_compiled(x, predicate, threshold_lo, threshold_hi):
    _check_pack_mask(x, predicate)
    kernels = _kernels(x)
    if kernels is None:
        return reference.pack_mask(x, predicate, threshold_lo, threshold_hi)
    return _native_pack_mask(kernels, x, predicate, threshold_lo, threshold_hi)


def _pack_mask_elsewhere(x, predicate, threshold_lo, threshold_hi):
    _check_pack_mask(x, predicate)
    return reference.pack_mask(x, predicate, threshold_lo, threshold_hi)


def _unpack_mask_compiled(codes, numel, on, off, dtype):
    _check_unpack_mask(codes, numel, on, off, dtype)
    kernels = _kernels(codes)
    if kernels is None:
        return reference.unpack_mask(codes, numel, on, off, dtype)
    return _native_unpack_mask(kernels, codes, numel, on, off, dtype)


def _unpack_mask_elsewhere(codes, numel, on, off, dtype):
    _check_unpack_mask(codes, numel, on, off, dtype)
    return reference.unpack_mask(codes, numel, on, off, dtype)


def _pack_uint_compiled(values, bits):
    check_bits(bits)
    _check_flat(values, "values", (torch.uint8,))
    kernels = _kernels(values)
    return reference.pack_uint(values, bits) if kernels is None else _native_pack_uint(kernels, values, bits)


def _pack_uint_elsewhere(values, bits):
    check_bits(bits)
    _check_flat(values, "values", (torch.uint8,))
    return reference.pack_uint(values, bits)


def _unpack_uint_compiled(codes, bits, numel, dtype):
    _check_unpack_uint(codes, bits, numel, dtype)
    kernels = _kernels(codes)
    if kernels is None:
        return reference.unpack_uint(codes, bits, numel, dtype)
    return _native_unpack_uint(kernels, codes, bits, numel, dtype)


def _unpack_uint_elsewhere(codes, bits, numel, dtype):
    _check_unpack_uint(codes, bits, numel, dtype)
    return reference.unpack_uint(codes, bits, numel, dtype)


_operator(
    "quantize(Tensor x, int bits, SymInt row_length, int group_size, int seed, int stream, Tensor? advance=None) "
    "-> (Tensor, Tensor, Tensor)",
    _quantize_compiled,
    _quantize_elsewhere,
    _quantize_fake,
)
_operator(
    "dequantize(Tensor codes, Tensor meta, int bits, SymInt row_length, int group_size, SymInt numel, "
    "ScalarType dtype) -> Tensor",
    _dequantize_compiled,
    _dequantize_elsewhere,
    lambda codes, meta, bits, row_length, group_size, numel, dtype: codes.new_empty(numel, dtype=dtype),
)
_operator(
    "pack_mask(Tensor x, str predicate, float threshold_lo, float threshold_hi) -> Tensor",
    _pack_mask_compiled,
    _pack_mask_elsewhere,
    lambda x, predicate, threshold_lo, threshold_hi: x.new_empty(
        reference.uint_nbytes(x.numel(), 1), dtype=torch.uint8
    ),
)
_operator(
    "unpack_mask(Tensor codes, SymInt numel, float on, float off, ScalarType dtype) -> Tensor",
    _unpack_mask_compiled,
    _unpack_mask_elsewhere,
    lambda codes, numel, on, off, dtype: codes.new_empty(numel, dtype=dtype),
)
_operator(
    "pack_uint(Tensor values, int bits) -> Tensor",
    _pack_uint_compiled,
    _pack_uint_elsewhere,
    lambda values, bits: values.new_empty(reference.uint_nbytes(values.numel(), bits), dtype=torch.uint8),
)
_operator(
    "unpack_uint(Tensor codes, int bits, SymInt numel, ScalarType dtype) -> Tensor",
    _unpack_uint_compiled,
    _unpack_uint_elsewhere,
    lambda codes, bits, numel, dtype: codes.new_empty(numel, dtype=dtype),
)


# --------------------------------------------------------------------------- the way in


def quantize(
    x: Tensor,
    bits: int,
    row_length: int,
    group_size: int,
    seed: int = 0,
    stream: int = 0,
    advance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | int | None]:
    """Quantise a flat tensor; see :func:`hf_actnn.codec.reference.quantize`. The count of exact groups comes as an
    integer where reading it costs nothing, and as None where counting takes a launch of its own."""
    seed, stream = _signed(seed), _signed(stream)
    kernels = _direct(x)
    if kernels is None:
        return torch.ops.hf_actnn.quantize(x, bits, row_length, group_size, seed, stream, advance)
    at = _check_quantize(x, bits, row_length, group_size, advance)
    return _make_codes(kernels.quantize, x, at, row_length, group_size, (bits,), seed, stream, advance, None)


def dequantize(
    codes: Tensor, meta: Tensor, bits: int, row_length: int, group_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """Values of a flat tensor; see :func:`hf_actnn.codec.reference.dequantize`."""
    kernels = _direct(codes)
    if kernels is None:
        return torch.ops.hf_actnn.dequantize(codes, meta, bits, row_length, group_size, numel, dtype)
    _check_dequantize(codes, meta, bits, row_length, group_size, numel, dtype)
    return _make_values(kernels.dequantize, codes, meta, row_length, group_size, (bits,), numel, dtype)


def pack_mask(x: Tensor, predicate: str, threshold_lo: float = 0.0, threshold_hi: float = 0.0) -> Tensor:
    """One bit per element of a flat tensor; see :func:`hf_actnn.codec.reference.predicate`."""
    kernels = _direct(x)
    if kernels is None:
        return torch.ops.hf_actnn.pack_mask(x, predicate, threshold_lo, threshold_hi)
    _check_pack_mask(x, predicate)
    return _native_pack_mask(kernels, x, predicate, threshold_lo, threshold_hi)


def unpack_mask(
    codes: Tensor, numel: int, on: float = 1.0, off: float = 0.0, dtype: torch.dtype = torch.bool
) -> Tensor:
    """``on`` or ``off`` for every bit of a mask: ``[numel]``."""
    kernels = _direct(codes)
    if kernels is None:
        return torch.ops.hf_actnn.unpack_mask(codes, numel, on, off, dtype)
    _check_unpack_mask(codes, numel, on, off, dtype)
    return _native_unpack_mask(kernels, codes, numel, on, off, dtype)


def pack_uint(values: Tensor, bits: int) -> Tensor:
    """Small integers of a flat uint8 tensor in ``bits`` bits each."""
    kernels = _direct(values)
    if kernels is None:
        return torch.ops.hf_actnn.pack_uint(values, bits)
    return _pack_uint_compiled(values, bits)


def unpack_uint(codes: Tensor, bits: int, numel: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Inverse of :func:`pack_uint`: ``[numel]`` of uint8, int32 or int64."""
    kernels = _direct(codes)
    if kernels is None:
        return torch.ops.hf_actnn.unpack_uint(codes, bits, numel, dtype)
    return _unpack_uint_compiled(codes, bits, numel, dtype)
