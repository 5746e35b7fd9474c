"""The torch operators: schemas, fakes, dispatch and tracing."""

import pytest
import torch

from hf_actnn.codec import mixed, ops, quantize, reference
from hf_actnn.errors import CodecError

X = torch.randn(600)
CODES, META, _ = reference.quantize(X, 3, 200, 64, 1, 2)
MASK = reference.pack_mask(X, "gt", 0.0, 0.0)
OFFSETS = (torch.arange(600) % 9).to(torch.uint8)
OPS = torch.ops.hf_actnn

CALLS = {
    "quantize": (OPS.quantize.default, (X, 3, 200, 64, 1, 2)),
    "dequantize": (OPS.dequantize.default, (CODES, META, 3, 200, 64, 600, torch.float16)),
    "pack_mask": (OPS.pack_mask.default, (X, "inside", -1.0, 1.0)),
    "unpack_mask": (OPS.unpack_mask.default, (MASK, 600, 1.0, 0.0, torch.float32)),
    "pack_uint": (OPS.pack_uint.default, (OFFSETS, 4)),
    "unpack_uint": (OPS.unpack_uint.default, (reference.pack_uint(OFFSETS, 4), 4, 600, torch.int64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_operator_and_direct_call_agree(name):
    op, args = CALLS[name]
    by_op, direct = op(*args), getattr(ops, name)(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(by_op), torch.utils._pytree.tree_leaves(direct), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else int(a) == b


@pytest.mark.parametrize("name", CALLS)
def test_other_devices_have_the_reference(name):
    """On the meta device only shapes exist; they must come from the fake, not from a kernel."""
    op, args = CALLS[name]
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    expected = CALLS[name][0](*CALLS[name][1])
    for a, b in zip(torch.utils._pytree.tree_leaves(op(*args)), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


def test_compiles_without_a_break():
    def step(x):
        codes, meta, _ = OPS.quantize(x.view(-1), 2, x.shape[-1], 256, 0, 0)
        return OPS.dequantize(codes, meta, 2, x.shape[-1], 256, x.numel(), x.dtype).view_as(x)

    x = torch.randn(4, 300)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), step(x))


def test_fake_mode_takes_the_operator():
    with torch._subclasses.FakeTensorMode():
        y = quantize(torch.empty(8, 300), 2).dequantize()
    assert y.shape == (8, 300)
    assert isinstance(y, torch._subclasses.FakeTensor)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: OPS.quantize(X.view(2, 300), 2, 300, 256, 0, 0), ("flat", "(2, 300)", "codec.quantize")),
        (lambda: OPS.quantize(X[::2], 2, 300, 256, 0, 0), ("contiguous", "strides (2,)")),
        (lambda: OPS.quantize(X, 2, 7, 256, 0, 0), ("row_length", "divisor of 600")),
        (lambda: OPS.dequantize(CODES[1:], META, 3, 200, 64, 600, torch.float32), ("codes", "bytes")),
        (lambda: OPS.dequantize(CODES, META[1:], 3, 200, 64, 600, torch.float32), ("metadata", "(12, 2)", "(11, 2)")),
        (lambda: OPS.dequantize(CODES, META, 3, 200, 64, 600, torch.int32), ("dtype", "torch.int32")),
        (lambda: ops.quantize(X, 3, 200, 64, 1, 2, torch.zeros(1)), ("advance", "int64", "torch.float32")),
        (lambda: OPS.quantize(X, 3, 200, 64, 1, 2, torch.zeros(2, dtype=torch.int64)), ("advance", "(2,)")),
    ],
)
def test_checks(call, words):
    with pytest.raises(CodecError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_advance_is_added_to_the_stream():
    """By the kernels, by the operator and by the specification; a sum beyond 64 bits wraps round."""
    widths = torch.tensor([2, 5, 8], dtype=torch.uint8)
    for stream, step in ((2, 5), (2**33, -3), (2**63 - 1, 2), (2**64 - 1, 1)):
        advance = torch.tensor([step])
        for module, bits in ((ops, 3), (mixed, widths)):
            moved = module.quantize(X, bits, 200, 64, 1, stream, advance)[0]
            assert torch.equal(moved, module.quantize(X, bits, 200, 64, 1, stream + step)[0])
        expected = ops.quantize(X, 3, 200, 64, 1, stream + step)[0]
        assert torch.equal(reference.quantize(X, 3, 200, 64, 1, stream, advance)[0], expected)
        assert torch.equal(OPS.quantize(X, 3, 200, 64, 1, ops._signed(stream), advance)[0], expected)
        assert torch.equal(quantize(X, 3, 64, 1, stream, row_length=200, advance=advance).codes, expected)
