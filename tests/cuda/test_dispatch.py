"""From Python to the CUDA kernels and back: operators, bindings, kernels, all but the device.

CPU tensors are sent the way of CUDA tensors, to a module built from csrc/cuda whose kernels run on the CPU.
"""

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn.codec import mixed, native, ops, pack_mask, pack_uint, quantize, reference, sample_spread
from hf_actnn.codec import unpack_mask as to_values
from hf_actnn.codec import unpack_uint as to_integers
from tests.cuda.test_backward_on_cpu import ATEN, check_gradient, selected
from tests.cuda.test_on_cpu import DTYPES, same, sample
from tests.models import assert_same, gradients

LAUNCH = ops._launch
WIDTHS = torch.tensor([1, 8, 2, 2, 3, 7, 5, 4, 6, 1], dtype=torch.uint8)


class Counted:
    """A module that counts the calls of each of its functions."""

    def __init__(self, module) -> None:
        self.module, self.calls = module, {}

    def __getattr__(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(self.module, name)


@pytest.fixture(autouse=True)
def kernels(module, monkeypatch):
    counted = Counted(module)
    monkeypatch.setattr(ops, "_on_cpu", lambda x: False)
    monkeypatch.setattr(ops, "_launch", lambda kernel, x, *arguments: kernel(*arguments, 0, 0))
    monkeypatch.setattr(native, "cuda", lambda device: counted)
    return counted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [256, 96, 50])
def test_uniform_and_mixed(kernels, dtype, row_length):
    x = sample(row_length * 20, dtype, 1)
    for module, bits, specified, back in (
        (ops, 3, reference.quantize, reference.dequantize),
        (mixed, WIDTHS, reference.quantize_mixed, reference.dequantize_mixed),
    ):
        expected = specified(x, bits, row_length, 256, 1, 2)
        codes, meta, exact = module.quantize(x, bits, row_length, 256, 1, 2)
        assert same(codes, expected[0])
        assert same(meta, expected[1])
        assert exact is None
        values = module.dequantize(codes, meta, bits, row_length, 256, x.numel(), torch.float32)
        assert same(values, back(*expected[:2], bits, row_length, 256, x.numel(), torch.float32))
        advance = torch.tensor([5])
        moved = module.quantize(x, bits, row_length, 256, 1, 2, advance)[0]
        assert same(moved, specified(x, bits, row_length, 256, 1, 7)[0])
    for name in ("quantize", "dequantize", "quantize_mixed", "dequantize_mixed"):
        assert kernels.calls[name] > 0


def test_operators_count_exact_groups(kernels):
    x = torch.randn(2560)
    x[300], x[900] = 1e38, -2e38
    got = torch.ops.hf_actnn.quantize(x, 2, 256, 256, 1, 2)
    assert all(same(a, b) for a, b in zip(got, reference.quantize(x, 2, 256, 256, 1, 2), strict=True))
    nbytes = mixed.plan(2560, 256, WIDTHS, 256).nbytes
    got = torch.ops.hf_actnn.quantize_mixed(x, WIDTHS, 256, 256, nbytes, 1, 2)
    assert all(same(a, b) for a, b in zip(got, reference.quantize_mixed(x, WIDTHS, 256, 256, 1, 2), strict=True))
    assert int(got[2]) == 2


def test_masks_integers_and_spread(kernels):
    x = sample(3000, torch.float32, 1)
    codes = pack_mask(x, "inside", -0.5, 0.5)
    assert same(codes, reference.pack_mask(x, "inside", -0.5, 0.5))
    assert same(
        to_values(codes, 3000, 2.0, -1.0, torch.float16), reference.unpack_mask(codes, 3000, 2.0, -1.0, torch.float16)
    )
    values = (torch.arange(3000) % 9).to(torch.uint8)
    codes = pack_uint(values, 4)
    assert same(codes, reference.pack_uint(values, 4))
    assert torch.equal(to_integers(codes, 4, 3000, torch.int64), values.long())
    torch.testing.assert_close(sample_spread(x, 10, 300), reference.sample_spread(x, 10, 300, 256), rtol=1e-12, atol=0)
    assert {"pack_mask", "unpack_mask", "pack_uint", "unpack_uint", "sample_spread"} <= kernels.calls.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_made_of_codes(module, dtype):
    """The bindings take their arguments in the order that is written down for them."""
    x, code, out = sample(20 * 96, dtype, 1), ops._CODE[dtype], torch.empty(20 * 96, dtype=dtype)
    grad, n = torch.randn(x.numel()).to(dtype), x.numel()
    for function in ATEN:
        codes, meta, _ = reference.quantize(x, 3, 96, 64, 1, 2)
        cut = codes.data_ptr(), meta.data_ptr(), n, 96, 64
        module.activation_backward(*cut, 3, code, function, grad.data_ptr(), out.data_ptr(), 0, 0)
        check_gradient(out, function, grad, reference.dequantize(codes, meta, 3, 96, 64, n, dtype))
        codes, meta, _ = reference.quantize_mixed(x, WIDTHS, 96, 64, 1, 2)
        cut, places = (codes.data_ptr(), meta.data_ptr(), n, 96, 64), torch.empty(len(WIDTHS), dtype=torch.int64)
        widths = WIDTHS.data_ptr(), len(WIDTHS), places.data_ptr()
        module.activation_backward_mixed(*cut, *widths, code, function, grad.data_ptr(), out.data_ptr(), 0, 0)
        check_gradient(out, function, grad, reference.dequantize_mixed(codes, meta, WIDTHS, 96, 64, n, dtype))
    codes = reference.pack_mask(x, "gt", 0.0, 0.0)
    module.select_by_mask(grad.data_ptr(), code, codes.data_ptr(), n, out.data_ptr(), 0, 0)
    assert same(out, selected(grad, codes))
    for name, arguments in (  # of nothing at all
        ("activation_backward", (0, 0, 0, 0, 256, 3, code, 0, 0, 0)),
        ("activation_backward_mixed", (0, 0, 0, 0, 256, 0, 0, 0, code, 0, 0, 0)),
        ("select_by_mask", (0, code, 0, 0, 0)),
    ):
        getattr(module, name)(*arguments, 0, 0)


def test_a_group_that_is_huge_comes_back_as_nan(kernels):
    """Finding out would stall the device, so nothing is patched."""
    x = torch.ones(512)
    x[3] = 1e38
    packed = quantize(x, 2)
    assert packed.patch is None
    assert packed.dequantize()[:256].isnan().all()
    assert packed.dequantize()[256:].eq(1).all()


def test_empty_tensors(kernels):
    assert quantize(torch.empty(0, 8), 2).dequantize().shape == (0, 8)
    assert quantize(torch.empty(0, 8), WIDTHS).dequantize().shape == (0, 8)
    assert pack_mask(torch.empty(0), "gt").numel() == 0


def test_a_model_has_the_gradients_of_the_cpu_kernels(kernels, monkeypatch):
    """The bytes are the same, so the backward pass is, bit for bit."""

    def model():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.GELU())
        return hf_actnn.convert(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 5 * 5, 4)), "L2")

    def step():
        made = model()
        torch.manual_seed(1)
        made(torch.randn(4, 3, 16, 16)).square().sum().backward()
        return gradients(made)

    on_cuda = step()
    assert kernels.calls["quantize"] > 0
    assert kernels.calls["pack_mask"] > 0
    monkeypatch.undo()
    assert_same(on_cuda, step())


class Tokens(nn.Module):
    """A transformer's parts: what a linear layer behind a normalisation or an activation reads."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.activation, self.outer = (
            nn.LayerNorm(48),
            nn.Linear(48, 96),
            activation,
            nn.Linear(96, 8),
        )

    def forward(self, x):
        return self.outer(self.activation(self.inner(self.norm(x))))


class CastTokens(Tokens):
    """As CUDA's autocast has it: normalised in fp32, and cast for what is next."""

    def forward(self, x):
        y = self.norm(x).to(torch.bfloat16)
        return torch.nn.functional.linear(y, self.inner.weight.to(torch.bfloat16)).float().mean(1)


class TransposedTokens(Tokens):
    """What is cast is in another order than what was normalised."""

    def forward(self, x):
        y = self.norm(x).transpose(1, 2).to(torch.bfloat16, memory_format=torch.contiguous_format)
        return torch.nn.functional.linear(y, self.outer.weight[:, :30].to(torch.bfloat16)).float().mean(1)


class MovedTokens(Tokens):
    """As windows are cut: rolled, permuted, joined, padded, and cast at the end."""

    def forward(self, x):
        y = self.norm(x).roll(3, 1).view(4, 5, 6, 48).permute(0, 2, 1, 3).contiguous().view(-1, 48)
        y = torch.nn.functional.pad(torch.cat([y, y.flip(0)]), (0, 0, 1, 2)).to(torch.bfloat16)
        return torch.nn.functional.linear(y, self.inner.weight.to(torch.bfloat16)).float()


class FlatTokens(Tokens):
    def forward(self, x):
        y = self.norm(x).view(-1, 48).to(torch.bfloat16)
        return torch.nn.functional.linear(y, self.inner.weight.to(torch.bfloat16)).float()


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *layers, nn.Conv2d(8, 8, 3))


REBUILT = {
    "batch norm": (lambda: images(), (4, 3, 16, 16), {"rebuild_by_channel"}),
    "batch norm, ReLU": (lambda: images(nn.ReLU()), (4, 3, 16, 16), {"rebuild_by_channel"}),
    "batch norm, ReLU in place": (lambda: images(nn.ReLU(inplace=True)), (4, 3, 16, 16), {"rebuild_by_channel"}),
    "batch norm, dropout": (lambda: images(nn.Dropout(0.3)), (4, 3, 16, 16), {"rebuild_by_channel"}),
    "batch norm, SiLU": (lambda: images(nn.SiLU()), (4, 3, 16, 16), {"rebuild_by_channel"}),
    "GELU": (lambda: Tokens(nn.GELU()), (4, 30, 48), {"rebuild_by_row", "rebuild_activation"}),
    "tanh GELU": (lambda: Tokens(nn.GELU("tanh")), (4, 30, 48), {"rebuild_by_row", "rebuild_activation"}),
    "SiLU": (lambda: Tokens(nn.SiLU()), (4, 30, 48), {"rebuild_by_row", "rebuild_activation"}),
    "cast": (lambda: CastTokens(nn.GELU()), (4, 30, 48), {"rebuild_by_row"}),
    "cast in another shape": (lambda: FlatTokens(nn.GELU()), (4, 30, 48), {"rebuild_by_row"}),
    "moved and cast": (lambda: MovedTokens(nn.GELU()), (4, 30, 48), {"rebuild_by_row"}),
    "cast in another order": (lambda: TransposedTokens(nn.GELU()), (4, 30, 48), set()),
}


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", REBUILT)
def test_what_recipes_make_in_one_pass(kernels, monkeypatch, name, memory_format, bits):
    """Gradients are those of decoding and plain operations."""
    make, shape, wanted = REBUILT[name]
    if len(shape) < 4 and memory_format is torch.channels_last:
        pytest.skip("has no such layout")
    monkeypatch.setattr("hf_actnn.saving.fused.SMALLEST", {"cpu": 2**40})

    def step():
        torch.manual_seed(0)
        made = hf_actnn.convert(make(), "L2", bits=bits, min_numel=1).to(memory_format=memory_format)
        x = torch.randn(shape)
        x = x.to(memory_format=memory_format) if len(shape) == 4 else x
        made(x).square().sum().backward()
        return gradients(made)

    on_cuda = step()
    assert wanted <= kernels.calls.keys()
    if "ReLU" in name:  # folded, with the ReLU's bits for signs, and out of place: no pass is for the signs alone
        assert "scale_by_mask" not in kernels.calls and kernels.calls["affine"] == 1
    assert kernels.calls.get("unpack_mask", 0) <= 1  # in the backward pass of the ReLU itself
    monkeypatch.undo()
    for key, one in step().items():
        torch.testing.assert_close(on_cuda[key], one, rtol=1e-5, atol=1e-5 * float(one.abs().max()), msg=key)


@pytest.fixture
def autocast_like_cuda():
    """Layer normalisations under autocast read an fp32 copy, of which torch functions see nothing; on a CPU they do
    not of themselves."""
    library = torch.library.Library("aten", "IMPL")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return torch.ops.aten.layer_norm(x.float(), shape, weight, bias, eps, cudnn_enable)

    library.impl("layer_norm", layer_norm, "AutocastCPU")
    yield
    library._destroy()


def test_a_normalisation_of_a_half_under_autocast(kernels, monkeypatch, autocast_like_cuda):
    """Its input is coded in half precision, and comes out of the codes as its output, cast for the next layer."""
    monkeypatch.setattr("hf_actnn.saving.fused.SMALLEST", {"cpu": 2**40})

    def step():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), nn.Linear(48, 96), nn.Linear(96, 8))
        made = hf_actnn.convert(layers, "L2", min_numel=1)
        with torch.autocast("cpu", torch.bfloat16):
            out = made(torch.randn(4, 30, 48))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        return gradients(made)

    on_cuda = step()
    assert kernels.calls["rebuild_by_row"] == 1
    monkeypatch.undo()
    assert_same(on_cuda, step())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_folded_in_halves(kernels, monkeypatch, memory_format):
    """Gradients are those of the separate steps, bit for bit; no pass is for the signs alone."""
    monkeypatch.setattr("hf_actnn.saving.fused.SMALLEST", {"cpu": 2**40})

    def step():
        torch.manual_seed(0)
        layers = images(nn.ReLU()).to(memory_format=memory_format)
        made = hf_actnn.convert(layers, "L2", bits=2, min_numel=1)
        with torch.autocast("cpu", torch.bfloat16):
            out = made(torch.randn(4, 3, 16, 16).to(memory_format=memory_format))
        out.float().square().sum().backward()
        return gradients(made)

    at_once = step()
    assert kernels.calls["affine"] == 1 and kernels.calls["rebuild_by_channel"] == 2
    assert "scale_by_mask" not in kernels.calls
    monkeypatch.setattr("hf_actnn.codec.rebuild.may_be", lambda packed: False)
    kernels.calls.clear()
    assert_same(at_once, step())
    assert kernels.calls["scale_by_mask"] == 2


def test_a_disturbed_tensor_is_not_made_of_its_codes(kernels, monkeypatch):
    """A step that measures adds noise to what was decoded: it sees what it sees on a CPU."""

    def chosen():
        torch.manual_seed(0)
        model = hf_actnn.convert(Tokens(nn.GELU()), bits="auto", update_interval=1, min_numel=1)
        controller = hf_actnn.controller(model)
        for _ in range(3):
            x = torch.randn(8, 30, 48)
            model(x).square().mean().backward()
            controller.step()
        return controller.history

    on_cuda = chosen()
    assert kernels.calls["rebuild_by_row"] > 0
    monkeypatch.undo()
    on_cpu = chosen()
    assert len(on_cpu) == len(on_cuda) == 3
    for there, here in zip(on_cuda, on_cpu, strict=True):
        assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize("current", [1, 0])
def test_a_launch_has_its_tensors_device_and_stream(monkeypatch, current):
    """And the device is the current one while it is made, as it is not always before and after."""
    devices = [current]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            devices.append(self.index)

        def __exit__(self, *_):
            devices.pop()

    class Values:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: devices[-1], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    assert LAUNCH(lambda *arguments: (devices[-1], *arguments), Values(), 7) == (1, 7, 1, 101)
    assert devices == [current]
