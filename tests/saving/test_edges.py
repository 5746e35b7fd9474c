"""Where a rule or a recipe could go wrong without anyone noticing: gradients agree with the uncompressed ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.errors import SavedTensorError
from tests.saving.bench import Bench, kinds, run


def _queue(m, x):
    """As momentum contrast: a buffer is cloned, used, and written to in the same forward pass."""
    query = m.op(x)
    logits = query @ m.queue.clone().detach()
    with torch.no_grad():
        m.queue[:, : len(x)] = query.detach().T
    return logits * m.scale


class _Queue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op, self.scale = nn.Linear(32, 32), nn.Parameter(torch.randn(64))
        self.register_buffer("queue", torch.randn(32, 64))

    def forward(self, x):
        return _queue(self, x)


def _source_written(m, x):
    grown = m.op(x)[:, None] + 1
    enlarged = F.interpolate(grown, scale_factor=4)
    grown.mul_(2.0)
    return enlarged[:, 0] * m.w + grown.mean()


def _weight_written(m, x):
    table = (m.w * 2).repeat(4, 1)
    with torch.no_grad():
        m.w.clamp_(-0.1, 0.1)
    return m.op(x) * table


def _weight_written_through_data(m, x):
    table = (m.w * 2).repeat(4, 1)
    m.w.data.clamp_(-0.1, 0.1)
    return m.op(x) * table


def _list_changed(m, x):
    shifts = [1, 2]
    rolled = m.op(x).tanh().roll(shifts, (0, 1))
    shifts[0] = 5
    return F.linear(rolled, m.w)


def _counts_changed(m, x):
    counts = torch.full((32,), 4)
    repeated = m.op(x).tanh().repeat_interleave(counts, dim=1)
    counts[0], counts[1] = 8, 0
    return repeated * m.w


def _mask_changed(m, x):
    mask = torch.ones(32, 32, dtype=torch.bool).tril()
    heads = m.op(x).view(4, 2, 32, 32)
    out = F.scaled_dot_product_attention(heads, heads, heads, mask)
    mask.fill_(True)
    return out


def _mask_changed_without_batch(m, x):
    mask = torch.ones(32, 32, dtype=torch.bool).tril()
    heads = m.op(x)
    out = F.scaled_dot_product_attention(heads, heads, heads, mask)
    mask.fill_(True)
    return out


def _assigned(m, x):
    hidden = m.op(x) + 0
    hidden[hidden > 0] = 0.0
    hidden[:, 3] = m.w
    return hidden * hidden


def _clamp(low, high, scale=1.0):
    return lambda m, x: (m.op(x) * scale).clamp(low, high) / scale


def _unequal(x):
    sizes = torch.ones(x.shape[0], 1, *x.shape[2:])
    sizes.view(-1)[::5] = 1e-4
    return x * sizes


CASES = {
    # values that tell inside from outside, in dtypes that round them
    "clamp within bfloat16": (_clamp(-1000.0, 1000.0, 2000.0), [(16, 32)], {}, torch.bfloat16),
    "clamp within float16": (_clamp(-5000.0, 5000.0, 10000.0), [(16, 32)], {}, torch.float16),
    "clamp above": (_clamp(1e8, None, 2e8), [(16, 32)], {}, torch.float32),
    "clamp below": (_clamp(None, 1e9, 2e9), [(16, 32)], {}, torch.float32),
    "clamp to a point": (_clamp(0.1, 0.1), [(16, 32)], {}, torch.float32),
    "clamp with nothing inside": (_clamp(0.1, -0.1), [(16, 32)], {}, torch.float32),
    "clamp from infinity": (_clamp(float("inf"), None), [(16, 32)], {}, torch.float32),
    "hardtanh within bfloat16": (
        lambda m, x: F.hardtanh(m.op(x) * 2000, -1000.3, 1000.3) / 1000,
        [(16, 32)],
        {},
        torch.bfloat16,
    ),
    "hardtanh that is narrow": (
        lambda m, x: F.hardtanh(m.op(x) * 2000, 1000.0, 1001.0) / 1000,
        [(16, 32)],
        {},
        torch.bfloat16,
    ),
    # which of two saves is which
    "div rounded": (
        lambda m, x: torch.div(m.op(x) * 5, m.w, rounding_mode="floor") * m.op(x),
        [(16, 32)],
        {"w": (32,)},
        torch.float32,
    ),
    "div of halves": (
        lambda m, x: F.linear(torch.div(*(m.op(x).sigmoid() + 0.5).chunk(2, -1)), m.w),
        [(16, 32)],
        {"w": (8, 16)},
        torch.float32,
    ),
    "div by itself": (
        lambda m, x: (lambda h: F.linear(h / h, m.w))(m.op(x).sigmoid() + 0.5),
        [(16, 32)],
        {"w": (8, 32)},
        torch.float32,
    ),
    # exponents that are tensors
    "pow of tensors": (lambda m, x: (m.op(x).sigmoid() + 0.5) ** m.w, [(16, 32)], {"w": (32,)}, torch.float32),
    "pow of a tensor two": (
        lambda m, x: (m.op(x).sigmoid() + 0.5).pow(m.w * 0 + 2),
        [(16, 32)],
        {"w": (1,)},
        torch.float32,
    ),
    "pow of a number": (lambda m, x: torch.pow(2.0, m.op(x)), [(16, 32)], {}, torch.float32),
    # what recipes refer to is written to, as it may be
    "source written to": (_source_written, [(16, 32)], {"w": (128,)}, torch.float32),
    "weight written to": (_weight_written, [(16, 32)], {"w": (4, 32)}, torch.float32),
    "weight written to through data": (_weight_written_through_data, [(16, 32)], {"w": (4, 32)}, torch.float32),
    "list changed": (_list_changed, [(16, 32)], {"w": (8, 32)}, torch.float32),
    "counts changed": (_counts_changed, [(16, 32)], {"w": (128,)}, torch.float32),
    "mask changed": (_mask_changed, [(8, 32, 32)], {}, torch.float32),
    "mask changed, no batch": (_mask_changed_without_batch, [(8, 32, 32)], {}, torch.float32),
    "assigned to": (_assigned, [(16, 32)], {"w": (16,)}, torch.float32),
    # the rest
    "table with a bound": (
        lambda m, x: m.op(x) * F.embedding(torch.arange(16), m.w, max_norm=1.0).exp(),
        [(16, 32)],
        {"w": (16, 32)},
        torch.float32,
    ),
    "log_softmax of no dimension": (
        lambda m, x: m.op(x) * F.log_softmax(m.w * 2),
        [(16, 32)],
        {"w": (16, 32)},
        torch.float32,
    ),
    "full of a tensor": (
        lambda m, x: m.op(x) * torch.full((16, 32), m.w.detach()) * torch.full_like(x, m.w.detach()),
        [(16, 32)],
        {"w": ()},
        torch.float32,
    ),
    # small beside large
    "normalize across groups": (lambda m, x: F.normalize(_unequal(x), dim=1), [(4, 32, 6, 6)], {}, torch.float32),
    "norm across groups": (
        lambda m, x: _unequal(x).norm(dim=(2, 3), keepdim=True) * x,
        [(4, 32, 6, 6)],
        {},
        torch.float32,
    ),
    "std across groups": (lambda m, x: (x * m.w).std(0), [(16, 32)], {"w": (32,)}, torch.float32),
    "normalize of rows": (lambda m, x: F.normalize(m.op(_unequal(x)), dim=1), [(16, 32)], {}, torch.float32),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_gradients(name):
    function, shapes, members, dtype = CASES[name]
    torch.manual_seed(0)
    made = {key: torch.randn(shape) for key, shape in members.items()}
    if "std" in name:
        made["w"][::8] *= 1e-4
    plain = Bench(function, op=nn.Linear(32, 32), **made).to(dtype)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    out, expected = run(copy.deepcopy(plain), inputs)
    converted = hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=0)
    found_out, found = run(converted, inputs)
    assert torch.equal(out, found_out)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        error = (gradient - expected[key]).double().norm() / expected[key].double().norm().clamp_min(1e-3)
        assert error < 0.03, (key, error)


def test_small_vectors_beside_large_ones():
    """With a code over several vectors, the gradient of a small one's norm would be the error of the large one's."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 6, 6)
    small = torch.zeros(4, 1, 6, 6, dtype=torch.bool)
    small.view(-1)[::5] = True
    x = torch.where(small, x * 1e-4, x)
    model = Bench(lambda m, x: x.norm(dim=1))
    _, expected = run(model, [x])
    _, found = run(hf_actnn.convert(model, bits=4, min_numel=0), [x])
    error = (found["x0"] - expected["x0"]) * small
    assert 0 < error.norm() < 0.2 * (expected["x0"] * small).norm()


@pytest.mark.parametrize("min_numel", [0, 1024])
def test_queue(min_numel):
    torch.manual_seed(0)
    plain, x = _Queue(), torch.randn(16, 32)
    _, expected = run(copy.deepcopy(plain), [x])
    _, found = run(hf_actnn.convert(plain, bits=8, min_numel=min_numel), [x])
    for key, gradient in found.items():
        assert (gradient - expected[key]).norm() < 0.03 * expected[key].norm()


@pytest.mark.parametrize("min_numel", [0, 1024])
def test_second_forward_pass_moves_buffers(min_numel):
    """Spectral norm turns its vectors in place in each forward pass; the first pass' graph still reads the old ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(32, 64)),
        nn.ReLU(),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(64, 32)),
    )
    x = torch.randn(16, 32)

    def gradients(model):
        (model(x).sum() - model(-x).pow(2).sum()).backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(copy.deepcopy(model))
    for gradient, right in zip(gradients(hf_actnn.convert(model, bits=8, min_numel=min_numel)), expected, strict=True):
        assert (gradient - right).norm() < 0.03 * right.norm()


def test_what_is_copied_before_a_write_is_counted():
    def function(m, x):
        table = (m.w * 2).repeat(64, 1)
        if m.training and m.write:
            with torch.no_grad():
                m.w.clamp_(-0.1, 0.1)
        return m.op(x) * table

    held = []
    for write in (False, True):
        model = Bench(function, op=nn.Linear(32, 32), w=torch.randn(1, 32))
        model.write = write
        hf_actnn.convert(model, bits=2, min_numel=0)
        with hf_actnn.track_memory(model) as tracked:
            model(torch.randn(64, 32))
        held.append(tracked.saved_bytes)
    assert held[1] == held[0] + 32 * 4


def test_one_mask_is_kept_once():
    mask = torch.rand(16, 32) > 0.5

    def masked(m, x):
        for _ in range(24):
            x = (x * 1.5).masked_fill(mask, 0.0)
        return x

    model = hf_actnn.convert(Bench(masked), bits=2, min_numel=0)
    with hf_actnn.track_memory(model) as tracked:
        model(torch.randn(16, 32, requires_grad=True))
    assert 0 < tracked.saved_bytes < 2 * mask.numel() / 8


def test_a_copied_weight_is_not_coded():
    """einsum folds a permuted weight into a copy; the input's gradient reads that copy alone, and stays exact."""
    torch.manual_seed(0)
    model = Bench(lambda m, x: torch.einsum("bij,jki->bk", x, m.w), w=torch.randn(16, 8, 32))
    x = torch.randn(4, 32, 16)
    _, expected = run(copy.deepcopy(model), [x])
    _, found = run(hf_actnn.convert(model, bits=2, min_numel=0), [x])
    assert torch.equal(found["x0"], expected["x0"])
    assert not torch.equal(found["w"], expected["w"])
    assert "quantized" in kinds(model)["einsum"]


def test_backward_inside_autocast():
    """What the forward pass computed in full precision is not computed again in less."""
    torch.manual_seed(0)
    plain = Bench(lambda m, x: m.op(x)[:, None] * (m.w @ m.w)[None], op=nn.Linear(32, 32), w=torch.randn(32, 32))
    found = []
    for model in (plain, hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=0)):
        out = model(torch.ones(4, 32))
        with torch.autocast("cpu", torch.bfloat16):
            out.sum().backward()
        found.append(model.op.bias.grad)
    assert torch.equal(found[0], found[1])


def test_defaults_changed_before_backward():
    """Constants are made again as they were, whatever torch's default dtype has become."""
    torch.manual_seed(0)
    plain = Bench(
        lambda m, x: m.op(x) * torch.arange(0.0, 32.0) * torch.linspace(0, 1, 32).repeat(4, 1), op=nn.Linear(32, 32)
    )
    found = []
    for model in (plain, hf_actnn.convert(copy.deepcopy(plain), "L0"), hf_actnn.convert(copy.deepcopy(plain), bits=8)):
        out = model(torch.ones(4, 32))
        torch.set_default_dtype(torch.float64)
        try:
            out.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(model.op.bias.grad)
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], found[2])


def test_changed_after_the_forward_pass():
    """Outside the forward pass nobody sees a write in time: it is an error then, and no wrong gradient."""
    torch.manual_seed(0)
    model = hf_actnn.convert(
        Bench(lambda m, x: m.op(x) * (m.w * 2).repeat(4, 1), op=nn.Linear(32, 32), w=torch.randn(4, 32)),
        bits=2,
        min_numel=0,
    )
    out = model(torch.randn(16, 32))
    with torch.no_grad():
        model.w.mul_(2)
    with pytest.raises(SavedTensorError, match="modified by an inplace operation"):
        out.sum().backward()
