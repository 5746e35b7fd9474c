"""Backward passes that read codes give the gradients of those that read decoded tensors, and decode none as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_actnn
from hf_actnn import codec
from hf_actnn.codec import backward
from hf_actnn.errors import ConfigError
from hf_actnn.saving import fused
from hf_actnn.saving.kept import Kept, Quantized, probe
from hf_actnn.saving.scope import observers

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of tests are small, and are cut all the same."""
    monkeypatch.setattr(fused, "SMALLEST", {"cpu": 1})
    monkeypatch.setattr(fused, "RUN", 64)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- parts of a packed tensor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 3, 5, 5), (6, 300), (6, 2, 700), (12, 64)])
@pytest.mark.parametrize("bits", [*range(1, 9), "mixed"])
def test_parts_are_those_of_the_whole(bits, shape, dtype):
    x = values(*shape, dtype=dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    widths = torch.tensor([1, 8, 3, 2, 2, 5], dtype=torch.uint8) if bits == "mixed" else bits
    packed = codec.quantize(x, widths, seed=3)
    whole = packed.dequantize().as_strided((x.numel(),), (1,))
    unit = packed.unit
    assert unit and x.numel() % unit == 0
    for first in range(0, x.numel(), unit):
        for last in {first + unit, min(first + 3 * unit, x.numel()), x.numel()}:
            part = packed.part(first, last)
            assert part.shape == (last - first,) and torch.equal(part, whole[first:last])


def test_exact_groups_come_with_the_whole_alone():
    packed = codec.quantize(torch.full((4, 300), 1e38), 2)
    assert packed.patch is not None and packed.unit == 0


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8], ids=str
)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 255, 256, 257, 700, 2**16 + 3])
def test_selection(numel, dtype):
    bits = values(numel, seed=1) > 0
    codes = codec.pack_mask(bits.view(-1), "nonzero")
    x = values(numel).mul(100).to(dtype)
    if dtype.is_floating_point and numel > 10:
        x[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.nan, -torch.nan])
    found = backward.select_by_mask(x, codes)
    assert found.dtype == dtype
    expected = torch.where(bits, x, torch.zeros((), dtype=dtype))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    if numel > 8:  # memory that is not aligned
        x = torch.cat([x[:1], x])[1:]
        assert torch.equal(backward.select_by_mask(x, codes).view(torch.uint8), expected.view(torch.uint8))


# -- gradients --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A convolutional stage whose input goes to two convolutions, one of them with a stride."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 3, 2, padding=1)
        self.short = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, **more) for n in (8, 8, 16))  # type: ignore[arg-type]
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)), inplace=True)
        y = F.relu(self.norms[1](self.first(x)))
        return self.head(F.relu_(self.norms[2](self.last(y)) + self.short(x)).mean((2, 3)))


class Block(nn.Module):
    """A transformer's MLP between two norms; the first linear layer's input goes to a second one too."""

    def __init__(self, act: str = "gelu") -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(20, 24), nn.LayerNorm(24)
        self.up, self.gate, self.down = nn.Linear(24, 48), nn.Linear(24, 48), nn.Linear(48, 24)
        self.act = {"gelu": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}[act]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        return self.down(self.act(self.up(y)) * self.gate(y)) + self.down(F.silu(self.up(x)))


class Mobile(nn.Module):
    """Activations of normalisations' outputs, depthwise and transposed convolutions, in one dimension and in three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=8, dilation=2)
        self.back, self.deep = nn.ConvTranspose1d(8, 8, 4, stride=2), nn.Conv3d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.BatchNorm3d(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norms[0](self.first(x)))
        x = F.silu(self.norms[1](self.depthwise(x)), inplace=True)
        x = F.hardtanh(self.back(x), -0.5, 0.5)
        cube = x[..., :32].reshape(len(x), 2, 4, 4, 8)
        return F.threshold(self.norms[2](self.deep(cube)), 0.1, 0.0)


NETWORKS = {
    "convolutions": (Residual, (8, 3, 12, 12)),
    "convolutions, odd sizes": (Residual, (7, 3, 9, 11)),
    "a batch of one": (Residual, (1, 3, 12, 12)),
    "norms without weights": (lambda: Residual(affine=False), (8, 3, 12, 12)),
    "norms without running values": (lambda: Residual(track_running_stats=False), (8, 3, 12, 12)),
    "gelu": (Block, (8, 9, 20)),
    "gelu by tanh": (lambda: Block("tanh"), (8, 9, 20)),
    "silu, two dimensions": (lambda: Block("silu"), (64, 20)),
    "one and three dimensions": (Mobile, (8, 4, 32)),
}


def seeded(build) -> nn.Module:
    torch.manual_seed(0)
    return build()


def gradients(model: nn.Module, x: Tensor, fuse: bool, level: object = "L2", **fields: object) -> list[Tensor]:
    """Of the parameters that have any, and of the input."""
    model = hf_actnn.convert(copy.deepcopy(model), level, fused_backward=fuse, min_numel=0, **fields)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model(x).square().sum().backward()
    return [one.grad for one in (x, *model.parameters()) if one.grad is not None]


def close(found: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    assert len(found) == len(expected)
    largest = max(float(one.abs().max()) for one in expected)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        # A bias before a normalisation has a gradient of rounding errors.
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(float(b.abs().max()), largest / 10))


@pytest.fixture
def uses(monkeypatch) -> list[tuple[object, bool]]:
    """Which functions were asked to read codes, and whether they did."""
    found: list[tuple[object, bool]] = []

    def watched(inner):
        def run(function, *args, **kwargs):
            out = inner(function, *args, **kwargs)
            found.append((function, out is not None))
            return out

        return run

    monkeypatch.setattr(fused, "_FUSED", {key: watched(inner) for key, inner in fused._FUSED.items()})
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same(name, layout, uses):
    build, shape = NETWORKS[name]
    model, x = seeded(build), values(*shape)
    if layout == torch.channels_last:
        if len(shape) != 4:
            pytest.skip("has no such layout")
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    expected = gradients(model, x, False)
    assert not uses
    close(gradients(model, x, True), expected, 2e-5)
    read = {function for function, did in uses if did}
    if len(x) > 1:
        assert (aten.convolution_backward.default if "dimensions" in name or len(shape) == 4 else aten.mm.default) in (
            read | {aten.convolution_backward.default if name == "silu, two dimensions" else None}
        )
    model, x = model.double(), x.double()
    close(gradients(model, x, True), gradients(model, x, False), 1e-12)


def test_every_function_of_the_table_is_used(uses):
    for build, shape in NETWORKS.values():
        gradients(seeded(build), values(*shape), True)
    assert {function for function, did in uses if did} == set(fused._FUSED)


@pytest.mark.parametrize("act", ["gelu", "tanh", "silu"])
def test_activations_are_the_same_to_the_bit(act):
    class Activation(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2  # autograd does not save this
            return F.silu(x) if act == "silu" else F.gelu(x, approximate="none" if act == "gelu" else "tanh")

    for dtype in (torch.float32, torch.bfloat16):
        x = values(8, 40, 64, dtype=dtype)  # vectors of a processor end where runs do
        for left, right in zip(*(gradients(Activation(1, 1), x, fuse) for fuse in (True, False)), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 3}, {"level": "L3"}, {"level": "L2.5"}, {"level": "L1"}])
@pytest.mark.parametrize("name", ["convolutions", "gelu"])
def test_bits_of_any_kind(name, settings):
    build, shape = NETWORKS[name]
    model, x = seeded(build), values(*shape)
    fields = {"level": settings.get("level"), **settings}
    close(*(gradients(model, x, fuse, **fields) for fuse in (True, False)), 2e-5)


def test_bits_that_differ_between_samples(uses):
    """What is chosen after a step is read in the next."""
    found = []
    for fuse in (True, False):
        model = hf_actnn.convert(seeded(Residual), "L3", fused_backward=fuse, update_interval=2, min_numel=0)
        x, controller = values(8, 3, 12, 12), hf_actnn.controller(model)
        x[:4] *= 4
        for _ in range(6):
            model.zero_grad()
            model(x).square().sum().backward()
            controller.step()
        controller.active = False  # what follows is an ordinary step
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([one.grad for one in model.parameters()])
    close(*found, 2e-5)
    assert any(function is aten.convolution_backward.default and did for function, did in uses)


@pytest.mark.parametrize("frozen", ["stem", "first", "norms", "all but head"])
def test_frozen_layers(frozen):
    model = seeded(Residual)
    for name, one in model.named_parameters():
        one.requires_grad_(not name.startswith("head") if frozen != "all but head" else name.startswith("head"))
        if name.startswith(frozen):
            one.requires_grad_(False)
    x = values(8, 3, 12, 12)
    close(*(gradients(model, x, fuse) for fuse in (True, False)), 2e-5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_outputs():
    model = hf_actnn.convert(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 0)), "L2", min_numel=0)
    model(values(64, 24)).sum().backward()
    assert model[1].weight.grad.shape == (0, 24) and not model[0].weight.grad.any()


def test_evaluation_mode():
    model, x = seeded(Residual), values(8, 3, 12, 12)
    model(x)
    model.eval()
    close(*(gradients(model, x, fuse) for fuse in (True, False)), 2e-5)


def test_autocast():
    model, x = seeded(Residual), values(8, 3, 12, 12)

    def run(fuse: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, x, fuse)

    close(run(True), run(False), 2e-2)


def test_a_bias_in_the_noise_would_show():
    """The tolerance of these tests is far below what one wrong sample does."""
    model, x = seeded(Residual), values(8, 3, 12, 12)
    wrong = fused._parts

    def without_the_last(*args):
        return wrong(*args)[:-1]

    expected = gradients(model, x, False)
    fused._parts = without_the_last
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            close(gradients(model, x, True), expected, 2e-5)
    finally:
        fused._parts = wrong


# -- what is never there ----------------------------------------------------------------------------------------------


def watch_decoding(monkeypatch) -> list[int]:
    """Sizes of what is decoded at a time."""
    sizes: list[int] = []
    whole, part = codec.PackedTensor.dequantize, codec.PackedTensor.part

    def dequantize(self, *args):
        out = whole(self, *args)
        sizes.append(out.numel())
        return out

    def some(self, *args):
        out = part(self, *args)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(codec.PackedTensor, "dequantize", dequantize)
    monkeypatch.setattr(codec.PackedTensor, "part", some)
    return sizes


@pytest.mark.parametrize(("name", "shape"), [("convolutions", (16, 3, 24, 24)), ("gelu", (32, 50, 20))])
def test_no_large_tensor_is_decoded_as_a_whole(name, shape, monkeypatch):
    model, x = seeded(NETWORKS[name][0]), values(*shape)
    sizes = watch_decoding(monkeypatch)
    gradients(model, x, False)
    largest = max(sizes)
    sizes.clear()
    gradients(model, x, True)
    assert max(sizes) <= largest / 4


@pytest.mark.parametrize(("name", "shape"), [("convolutions", (16, 3, 24, 24)), ("gelu", (32, 50, 20))])
def test_nor_on_a_step_that_is_measured(name, shape, monkeypatch):
    """Such a step runs each layer several times, and its peak is that of the training."""
    model, x = hf_actnn.convert(seeded(NETWORKS[name][0]), "L3", min_numel=0), values(*shape)
    controller = hf_actnn.controller(model)
    sizes = watch_decoding(monkeypatch)
    model(x.requires_grad_()).square().sum().backward()
    controller.step()
    assert controller.history
    gradients(model, x.detach(), False)
    largest = max(sizes)
    sizes[:] = sizes[: sizes.index(largest)]
    assert max(sizes) <= largest / 4


def test_a_kernel_that_reads_codes_does_not_read_disturbed_ones(monkeypatch):
    """What a measured step adds to a tensor is not in its codes; with them the tensor would seem to do no harm."""
    packed = codec.quantize(values(4, 64), 2)
    packed.codes, packed.meta, packed.device = packed.codes.to("meta"), packed.meta.to("meta"), torch.device("meta")
    kept, read = Quantized(packed), []
    monkeypatch.setattr(backward, "activation_backward", lambda function, grad, *_, **__: read.append(grad) or grad)
    stand_in, grad = fused.Deferred(kept, lambda: torch.empty(4, 64, device="meta")), torch.empty(4, 64, device="meta")
    with probe.disturbing(kept, None):
        aten.gelu_backward(grad, stand_in)
    assert not read
    aten.gelu_backward(grad, stand_in)
    assert len(read) == 1


def test_who_gets_parts(monkeypatch):
    """Elsewhere than on a CPU only activations have a kernel: a stand-in would cost time and be of no use to others."""
    monkeypatch.setattr(fused, "SMALLEST", {"cpu": 100, "meta": 100})
    here, there = torch.empty(10, 20), torch.empty(10, 20, device="meta")
    assert fused.pays(here, on_cuda=False, summed=0) and fused.pays(there, on_cuda=True, summed=0)
    assert not fused.pays(there, on_cuda=False, summed=0)
    assert not fused.pays(here[:2], on_cuda=True, summed=0)
    assert fused.pays(here, on_cuda=False, summed=100) and not fused.pays(here, on_cuda=False, summed=101)
    assert not fused.pays(here.bfloat16(), on_cuda=False, summed=1)


def test_small_tensors_are_decoded_as_they_were(monkeypatch, uses):
    monkeypatch.setattr(fused, "SMALLEST", {"cpu": 2**20})
    gradients(seeded(Residual), values(8, 3, 12, 12), True)
    assert not uses


# -- where others look on ---------------------------------------------------------------------------------------------


def converted(fuse: bool = True) -> tuple[nn.Module, Tensor]:
    return hf_actnn.convert(seeded(Residual), "L2", fused_backward=fuse, min_numel=0), values(8, 3, 12, 12)


def test_second_derivatives():
    found = []
    for fuse in (True, False):
        model, x = converted(fuse)
        (grad,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True))
    close(*([one for one in grads if one is not None] for grads in found), 2e-5)


def test_a_graph_that_is_kept():
    model, x = converted()
    loss = model(x).square().sum()
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_by_vmap():
    found = []
    for fuse in (True, False):
        model, x = converted(fuse)
        out = model(x)
        found.append(
            torch.autograd.grad(
                out, list(model.parameters()), torch.eye(5).repeat(3, 2, 1)[:, :8], is_grads_batched=True
            )
        )
    close(*map(list, found), 2e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.between = nn.Linear(24, 20)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.blocks[0], x, use_reentrant=reentrant)
            return checkpoint(self.blocks[1], self.between(x), use_reentrant=reentrant)

    model, x = seeded(Two), values(8, 9, 20)
    close(*(gradients(model, x, fuse) for fuse in (True, False)), 2e-5)


def test_what_a_node_shows_outside_a_backward_pass_is_a_plain_tensor():
    model = hf_actnn.convert(seeded(Block), "L2", min_numel=0)
    node, seen = model(values(8, 9, 20)).sum().grad_fn, []
    todo = [node]
    while todo:
        one = todo.pop()
        seen += [getattr(one, name) for name in dir(one) if name in ("_saved_self", "_saved_mat1")]
        todo += [following for following, _ in one.next_functions if following is not None]
    assert len(seen) > 3 and all(type(one) is Tensor for one in seen if one is not None)


def test_any_other_function_gets_the_values():
    packed = codec.quantize(values(4, 64), 8)
    kept: Kept = Quantized(packed)
    got = fused.Deferred(kept, kept.get)
    expected = packed.dequantize()
    assert torch.equal(got + 1, expected + 1)
    assert torch.equal(torch.cat([got, got]), torch.cat([expected, expected]))
    assert torch.equal(aten.gelu_backward(expected.t(), got.t()), aten.gelu_backward(expected.t(), expected.t()))
    transposed = values(64, 4).t()  # a gradient in another layout
    assert torch.equal(aten.gelu_backward(transposed, got), aten.gelu_backward(transposed, expected))


def test_parts_of_recipes_are_those_of_the_whole():
    """Of whatever autograd saves in these networks and can be had in parts."""
    kinds: set[str] = set()

    class Watcher:
        def saved(self, slot, tensor, path, function):
            kept = slot.kept
            if not kept.unit or kept.form is None:
                return
            whole = kept.get()
            flat = whole.as_strided((whole.numel(),), (1,), whole.storage_offset())
            runs = fused._runs(kept, whole.numel(), 1)
            if runs:
                kinds.add(f"{type(kept).__name__} {getattr(kept, 'name', '')}")
                torch.testing.assert_close(torch.cat([kept.part(*run) for run in runs]), flat, rtol=1e-6, atol=1e-6)
                assert torch.equal(kept.part(runs[0][0], runs[-1][1]), flat)

        def copied(self, kept, path):
            pass

        def moved(self, leaf, to_host):
            pass

    observers().append(Watcher())
    try:
        for build, shape in NETWORKS.values():
            gradients(seeded(build), values(*shape), True)
    finally:
        observers().pop()
    assert {"Masked relu", "Recipe silu", "Recipe layer_norm"} <= {kind.strip() for kind in kinds}, kinds


# -- the switch -------------------------------------------------------------------------------------------------------


def test_the_switch():
    assert hf_actnn.ActNNConfig().fused_backward
    assert not hf_actnn.ActNNConfig(fused_backward=False).fused_backward
    with pytest.raises(ConfigError, match="fused_backward"):
        hf_actnn.ActNNConfig(fused_backward=1)  # type: ignore[arg-type]
