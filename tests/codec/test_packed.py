"""PackedTensor: shapes, strides, bytes, pickles, defaults, and what is refused."""

import copy
import pickle
import weakref

import pytest
import torch

import hf_actnn.codec as codec
from hf_actnn.codec import CODES, Code, default_row_length, packed_nbytes, quantize
from hf_actnn.errors import CodecError


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 8, 10).transpose(0, 2),
        torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        torch.randn(5, 1, 7).as_strided((5, 1, 7), (7, 99, 1)),  # an odd stride where it means nothing
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.randn(100)[20:60],
    ],
    ids=["transposed", "channels_last", "channels_last_3d", "size one", "scalar", "empty", "offset"],
)
def test_dense_tensors_keep_their_strides(x):
    p = quantize(x, 8)
    y = p.dequantize()
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    torch.testing.assert_close(y, x, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "x", [torch.randn(8, 20)[:, ::2], torch.randn(8, 1).expand(8, 5), torch.randn(6, 8, 4).transpose(0, 2)[1:3]]
)
def test_other_tensors_are_made_dense_in_the_same_order(x):
    y = quantize(x, 8).dequantize()
    assert y.shape == x.shape
    assert y.stride() == x.clone().stride()
    torch.testing.assert_close(y, x, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.empty(4, 197, 192), 192),  # tokens
        (torch.empty(4, 197, 192).transpose(1, 2), 192),
        (torch.empty(8, 3, 5, 7), 105),  # a sample
        (torch.empty(8, 3, 5, 7).to(memory_format=torch.channels_last), 105),
        (torch.empty(1, 3, 5, 7), 105),  # a batch of one is one sample
        (torch.empty(10, 64, 1), 64),  # dimensions of size one do not count
        (torch.empty(50), 50),
        (torch.empty(()), 1),
        (torch.empty(0, 4), 0),
    ],
)
def test_default_rows(x, expected):
    assert default_row_length(tuple(x.shape), x.stride()) == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes(bits):
    p = quantize(torch.randn(16, 256, 14, 14), bits)
    assert p.nbytes == packed_nbytes(p.numel, p.row_length, bits) == p.numel // 8 * bits + p.numel // 256 * 4


def test_object():
    x = torch.randn(3, 300)
    x[1, 5] = 3e38
    p = quantize(x, 3, group_size=64, seed=5)
    assert repr(p) == (
        "PackedTensor(shape=(3, 300), float32, cpu, uniform 3 bits, groups of 64 in rows of 300, "
        f"{p.nbytes} bytes, 1 groups exact)"
    )
    for other in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
        assert torch.equal(other.dequantize(), p.dequantize())
    assert weakref.ref(p)() is p
    assert p.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_fp16_saturates():
    """The step is rounded up, so the highest level may lie beyond the largest half."""
    y = quantize(torch.tensor([0.0, 65504.0, 60000.0]).half(), 2).dequantize()
    assert torch.isfinite(y).all()


def test_requires_grad_and_subclasses_of_no_concern():
    x = torch.nn.Parameter(torch.randn(300))
    y = quantize(x, 4).dequantize()
    assert not y.requires_grad


def test_codes_register_by_name(monkeypatch):
    def halve(flat, bits, row_length, group_size, seed, stream):
        return flat.to(torch.float16).view(torch.uint8), torch.empty(0, 2, dtype=torch.bfloat16), 0

    def back(codes, meta, bits, row_length, group_size, numel, dtype):
        return codes.view(torch.float16).to(dtype)

    monkeypatch.setitem(CODES, "half", Code(halve, back))
    x = torch.randn(4, 5)
    p = quantize(x, 8, code="half")
    assert "half" in repr(p)
    assert torch.equal(p.dequantize(), x.half().float())


F32 = torch.randn(12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(F32, 0), ("bits", "from 1 to 8", "Received 0")),
        (lambda: quantize(F32, 9), ("bits", "from 1 to 8", "Received 9")),
        (lambda: quantize(F32, 2.5), ("bits", "2.5")),
        (lambda: quantize(F32 > 0, 2), ("floating-point", "torch.bool", "pack_mask")),
        (lambda: quantize(torch.arange(4), 2), ("floating-point", "torch.int64")),
        (lambda: quantize(F32, 2, group_size=0), ("group_size", "1 to 4096", "Received 0")),
        (lambda: quantize(F32, 2, group_size=5000), ("group_size", "5000")),
        (lambda: quantize(F32, 2, row_length=5), ("row_length", "divisor of 12", "Received 5")),
        (lambda: quantize(F32, 2, row_length=0), ("row_length", "divisor of 12")),
        (lambda: quantize(F32, 2, code="zip"), ("No such code", "uniform", "'zip'")),
        (lambda: codec.pack_mask(F32, "above"), ("predicate", "not_le", "'above'")),
        (lambda: codec.pack_mask(F32.view(3, 4), "gt"), ("flat", "(3, 4)")),
        (lambda: codec.pack_mask(torch.arange(3), "nonzero"), ("dtype", "torch.int64")),
        (lambda: codec.pack_mask(F32 > 0, "gt"), ("dtype", "torch.bool")),
        (lambda: codec.unpack_mask(torch.zeros(3, dtype=torch.uint8), 30), ("4 bytes", "3 bytes")),
        (lambda: codec.unpack_mask(F32.byte(), 96, 1.0, -torch.inf, torch.uint8), ("on, off", "0 to 255", "1.0, -inf")),
        (lambda: codec.pack_uint(F32, 2), ("uint8", "float32")),
        (lambda: codec.unpack_uint(torch.zeros(3, dtype=torch.uint8), 4, 6, torch.int16), ("dtype", "int16")),
    ],
)
def test_refusals_say_what_where_and_what_next(call, words):
    with pytest.raises(CodecError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
