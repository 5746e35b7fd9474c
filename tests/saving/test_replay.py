"""What is computed from parameters and constants alone is computed again, to the bit, and costs no bytes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from tests.saving.bench import Bench, kinds, run


def _standardised(m, x):
    """As timm's weight standardisation."""
    weight = F.batch_norm(m.w.reshape(1, 16, -1), None, None, m.g, training=True, eps=1e-6).reshape_as(m.w)
    return F.conv2d(x, weight, padding=1)


def _by_hand(m, x):
    weight = m.w - m.w.mean(dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, weight / weight.std(dim=(1, 2, 3), keepdim=True), padding=1)


_INDEX = (torch.arange(25).view(5, 5) * 7 % 13).view(-1)


def _relative_positions(m, q):
    """As Swin's windows: a table gathered for each pair of places, and a mask that differs by window."""
    bias = m.w[_INDEX].view(5, 5, 4).permute(2, 0, 1).contiguous().unsqueeze(0)
    mask = torch.zeros(6, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -100.0)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias + mask)


def _positions_from_a_network(m, x):
    """As Swin v2: an in-place ReLU between two layers that see constants alone."""
    table = 16 * torch.sigmoid(m.second(F.relu(m.first(torch.linspace(-1, 1, 128).view(64, 2)), inplace=True)))
    return x * table.view(1, 64, 4)


def _queries(m, x):
    """As DETR's decoder: the first layer's queries are parameters, spread over the batch and dropped out."""
    queries = m.norm(m.w.unsqueeze(0).repeat(4, 1, 1) + torch.zeros(4, 9, 32))
    queries = F.dropout(m.first(queries), 0.2)
    return F.scaled_dot_product_attention(queries, x, x) * queries


CASES = {
    "standardised weight": (_standardised, [(4, 16, 6, 6)], {"w": (16, 16, 3, 3), "g": (16,)}),
    "standardised by hand": (_by_hand, [(4, 16, 6, 6)], {"w": (16, 16, 3, 3)}),
    "relative positions": (_relative_positions, [(6, 4, 5, 8)], {"w": (13, 4)}),
    "positions from a network": (
        _positions_from_a_network,
        [(3, 64, 4)],
        {"first": lambda: nn.Linear(2, 48), "second": lambda: nn.Linear(48, 4)},
    ),
    "queries": (
        _queries,
        [(4, 9, 32)],
        {"w": (9, 32), "first": lambda: nn.Linear(32, 32), "norm": lambda: nn.LayerNorm(32)},
    ),
}


def _build(name):
    function, shapes, members = CASES[name]
    torch.manual_seed(0)
    made = {key: torch.randn(value) if isinstance(value, tuple) else value() for key, value in members.items()}
    return Bench(function, **made), [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    plain, inputs = _build(name)
    expected_out, expected = run(plain, inputs)
    for level, exact in (({"config": "L0"}, True), ({"bits": 8, "min_numel": 0}, False)):
        out, found = run(hf_actnn.convert(copy.deepcopy(plain), **level), inputs)
        assert torch.equal(out, expected_out)
        for key, gradient in found.items():
            if exact:
                assert torch.equal(gradient, expected[key]), key
            else:
                assert (gradient - expected[key]).norm() <= 0.02 * expected[key].norm(), key


@pytest.mark.parametrize("name", CASES)
def test_nothing_large_is_held(name):
    """What was made of parameters alone is no part of the bytes."""
    plain, inputs = _build(name)
    with hf_actnn.track_memory(plain) as before:
        plain(*[value.requires_grad_() for value in inputs])
    model = hf_actnn.convert(plain, bits=2, min_numel=0)
    with hf_actnn.track_memory(model) as after:
        out = model(*inputs)
    assert after.saved_bytes < before.saved_bytes / 4, (before.saved_bytes, after.saved_bytes)
    del out
    if name != "relative positions":  # there it is read by an attention that is run again, and saved by nobody
        assert any("computed again" in kept for found in kinds(model).values() for kept in found)


def test_random_operations_are_not_run_again():
    """Noise made of a parameter's shape would differ the second time."""
    weight = nn.Parameter(torch.randn(64, 64))
    bench = Bench(lambda m, x: x @ (m.w * torch.rand_like(m.w)), w=weight.detach())
    x = torch.randn(8, 64)
    _, expected = run(bench, [x])
    _, found = run(hf_actnn.convert(copy.deepcopy(bench), bits=8, min_numel=0), [x])
    assert (found["x0"] - expected["x0"]).abs().max() < 1e-5


def test_a_parameter_changed_meanwhile_is_an_error():
    """The weight that is standardised again must be the one of the forward pass."""
    model, inputs = _build("standardised by hand")
    hf_actnn.convert(model, bits=4, min_numel=0)
    out = model(*[value.requires_grad_() for value in inputs])
    with torch.no_grad():
        model.w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_constant_written_to_is_not_made_again():
    def function(m, x):
        table = torch.zeros(64, 64) + m.w
        with torch.no_grad():
            table.mul_(3)
        return x @ table

    bench = Bench(function, w=torch.randn(64, 64))
    x = torch.randn(8, 64)
    _, expected = run(bench, [x])
    _, found = run(hf_actnn.convert(bench, bits=8, min_numel=0), [x])
    assert torch.allclose(found["x0"], expected["x0"], atol=1e-5)


# -- the same of losses over enlarged maps -----------------------------------------------------------------------------


class Segments(nn.Module):
    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 16, 1)
        self.smoothing = smoothing

    def forward(self, x, labels):
        logits = F.interpolate(self.head(x), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, ignore_index=255)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_over_an_enlarged_map(smoothing):
    """Its gradient is exact to the bit, and what it holds is the small map."""
    torch.manual_seed(0)
    plain = Segments(smoothing)
    x, labels = torch.randn(2, 8, 16, 16), torch.randint(0, 16, (2, 64, 64))
    labels[:, :3] = 255
    plain(x, labels).backward()
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2, overrides={"head": "exact"})
    model.zero_grad()
    with hf_actnn.track_memory(model) as memory:
        loss = model(x, labels)
    loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert memory.saved_bytes < 0.25 * memory.uncompressed_bytes


def test_soft_labels_are_not_taken_for_log_probabilities():
    torch.manual_seed(0)
    bench = Bench(
        lambda m, x: F.cross_entropy(F.interpolate(m.op(x), scale_factor=4.0), torch.ones(2, 16, 32, 32) / 16),
        op=nn.Conv2d(8, 16, 1),
    )
    x = torch.randn(2, 8, 8, 8)
    _, expected = run(bench, [x])
    _, found = run(hf_actnn.convert(bench, bits=2, min_numel=0, overrides={"op": "exact"}), [x])
    assert torch.equal(found["x0"], expected["x0"])


def test_an_enlarged_map_that_a_convolution_reads_is_coded():
    """Holding the small map in fp32 would cost more than two bits of the large one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1))
    hf_actnn.convert(model, bits=2)
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(2, 8, 32, 32)).sum()
    assert memory.ratio > 10


def _shifted_windows(m, q):
    """As Swin in Hugging Face: the mask is painted into a constant, compared with itself, and added to a bias."""
    painted = torch.zeros(1, 10, 1)
    for at, part in enumerate((slice(0, 5), slice(5, 8), slice(8, 10))):
        painted[:, part, :] = at
    windows = painted.view(2, 5)
    mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
    bias = m.w[_INDEX].view(5, 5, 4).permute(2, 0, 1).contiguous().unsqueeze(0)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias + mask.repeat(3, 1, 1).unsqueeze(1))


def test_painted_constants_are_constants():
    torch.manual_seed(0)
    plain, q = Bench(_shifted_windows, w=torch.randn(13, 4)), torch.randn(6, 4, 5, 8)
    expected_out, expected = run(plain, [q])
    model = hf_actnn.convert(plain, bits=8, min_numel=0)
    out, found = run(model, [q])
    assert torch.equal(out, expected_out)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name
    assert kinds(model)["scaled_dot_product_attention"] == {"recipe: rerun"}


def test_a_part_of_a_projection_is_coded_by_rows_of_all_its_heads():
    """Two heads of 16 that a token keeps side by side share a group: half the scales of one group for each."""
    torch.manual_seed(0)

    def attention(m, x):
        q, k = m.op(x).view(4, 8, 3, 2, 16).permute(2, 0, 3, 1, 4)[:2].unbind(0)
        return q @ k.transpose(-2, -1)

    model = hf_actnn.convert(Bench(attention, op=nn.Linear(32, 96)), bits=2, min_numel=0)
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(4, 8, 32, requires_grad=True))
    rows = 3 * 4 * 8  # the linear layer's input, q and k
    assert memory.saved_bytes == rows * (32 * 2 // 8 + 4)
