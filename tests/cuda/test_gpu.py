"""The CUDA kernels on a GPU: bytes, streams, devices, graphs, no waiting, and what compute-sanitizer says."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn.codec import (
    inplace,
    mixed,
    native,
    ops,
    pack_mask,
    pack_uint,
    quantize,
    rebuild,
    reference,
    rounding_variance,
    sample_spread,
)
from hf_actnn.codec import unpack_mask as to_values
from hf_actnn.codec import unpack_uint as to_integers
from tests.codec import masks
from tests.cuda.test_backward_on_cpu import ATEN, check_activations, check_gradient, gradients, selected
from tests.cuda.test_on_cpu import CUTS, DTYPES, Large, same, sample
from tests.cuda.test_rebuild_on_cpu import NARROW, check_activation, check_by_channel, check_by_row, check_in_place

pytestmark = pytest.mark.gpu
WIDTHS = torch.tensor([1, 8, 2, 2, 3, 7, 5, 4, 6, 1], dtype=torch.uint8)


@pytest.fixture(autouse=True)
def built():
    if native.cuda(0) is None:
        pytest.skip("the CUDA kernels are not built")


def check(x: torch.Tensor, bits, row_length: int, group_size: int = 256, seed: int = 3, stream: int = 2**33 + 7):
    """``x`` on the CPU; the kernels' bytes for it are the specification's."""
    device, n = torch.device("cuda"), x.numel()
    y = x.to(device)
    module = ops if isinstance(bits, int) else mixed
    specified = reference.quantize if isinstance(bits, int) else reference.quantize_mixed
    back = reference.dequantize if isinstance(bits, int) else reference.dequantize_mixed
    codes, meta, exact = specified(x, bits, row_length, group_size, seed, stream)
    assert ops._direct(y) is native.cuda(0)
    got = module.quantize(y, bits, row_length, group_size, seed, stream)
    assert same(got[0].cpu(), codes)
    assert same(got[1].cpu(), meta)
    assert got[2] is None
    for dtype in DTYPES:
        values = module.dequantize(codes.to(device), meta.to(device), bits, row_length, group_size, n, dtype)
        assert same(values.cpu(), back(codes, meta, bits, row_length, group_size, n, dtype)), dtype
    if isinstance(bits, int):
        counted = torch.ops.hf_actnn.quantize(y, bits, row_length, group_size, seed, stream)
        assert same(counted[0].cpu(), codes)
        assert same(counted[2].cpu(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_bytes(name, dtype):
    row_length, group_size, rows = CUTS[name]
    for bits in range(1, 9):
        check(sample(rows[-1] * row_length, dtype, bits), bits, row_length, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [256, 192, 1000, 500_009])
def test_bytes_of_large_tensors(row_length, dtype):
    rows = 600_000 // row_length
    for bits in (2, 3, 8):
        check(sample(rows * row_length, dtype, bits), bits, row_length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [256, 64, 250, 7])
def test_bytes_of_mixed_widths(row_length, dtype):
    check(sample(len(WIDTHS) * 21 * row_length, dtype, 1), WIDTHS, row_length)


def test_bytes_of_unaligned_memory():
    for dtype in DTYPES:
        x = sample(1 + 256 * 40, dtype, 1)
        codes, meta, _ = reference.quantize(x[1:], 3, 256, 256, 1, 2)
        got = ops.quantize(x.cuda()[1:], 3, 256, 256, 1, 2)
        assert same(got[0].cpu(), codes)
        assert same(got[1].cpu(), meta)


def test_bytes_of_more_than_2_to_the_31_elements():
    large = Large(torch.bfloat16, 256, 2, elements=2**31)
    if torch.cuda.mem_get_info()[0] < 3 * large.numel:
        pytest.skip("less memory than such a tensor and its codes take")
    x = torch.zeros(large.numel, dtype=torch.bfloat16, device="cuda")
    x[-large.x.numel() :] = large.x.cuda()
    codes, meta, _ = ops.quantize(x, 2, 256, 256, 5, 6)
    assert same(codes[-large.codes.numel() :].cpu(), large.codes)
    assert same(meta[-len(large.meta) :].cpu(), large.meta)
    del x
    values = ops.dequantize(codes, meta, 2, 256, 256, large.numel, torch.bfloat16)[-large.x.numel() :]
    expected = reference.dequantize(large.codes, large.meta, 2, 256, 256, large.x.numel(), torch.bfloat16)
    assert same(values.cpu(), expected)


@pytest.mark.parametrize("offset", [0, 1])
def test_masks_and_small_integers(offset):
    for n in (1, 255, 256, 257, 100_003):
        for dtype in DTYPES:
            x = sample(n + offset, dtype, 1)[offset:]
            y = sample(n + offset, dtype, 1).cuda()[offset:]
            for name in reference.PREDICATES:
                codes = reference.pack_mask(x, name, -0.25, 0.5)
                assert same(pack_mask(y, name, -0.25, 0.5).cpu(), codes)
            for on, off in masks.pairs(dtype):
                values = to_values(codes.cuda(), n, on, off, dtype)
                assert same(values.cpu(), reference.unpack_mask(codes, n, on, off, dtype)), (n, dtype, on, off)
        x = (torch.arange(n) * 37 % 256).to(torch.uint8)
        for bits in range(1, 9):
            codes = reference.pack_uint(x, bits)
            assert same(pack_uint(x.cuda(), bits).cpu(), codes)
            for dtype in ops.INTS:
                got = to_integers(codes.cuda(), bits, n, dtype)
                assert same(got.cpu(), reference.unpack_uint(codes, bits, n, dtype))


class Backward:
    """The kernels that make gradients of codes, called as the runner of those on the CPU is."""

    def __init__(self, offset: int = 0) -> None:
        #: How far, in elements, tensors lie from where an allocation begins.
        self.offset = offset

    def there(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(self.offset), x]).cuda()[self.offset :]

    def activation_backward(self, codes, meta, bits, row_length, group_size, function, grad):
        codes, meta, grad = self.there(codes), meta.cuda(), self.there(grad)
        kernels, out = native.cuda(grad.device.index), self.there(torch.empty_like(grad, device="cpu"))
        cut = (codes.data_ptr(), meta.data_ptr(), grad.numel(), row_length, group_size)
        into = (ops._CODE[grad.dtype], function, grad.data_ptr(), out.data_ptr())
        if isinstance(bits, int):
            ops._launch(kernels.activation_backward, grad, *cut, bits, *into)
        else:
            places = torch.empty(len(bits), dtype=torch.int64, device="cuda")
            widths = (bits.data_ptr(), len(bits), places.data_ptr())
            ops._launch(kernels.activation_backward_mixed, grad, *cut, *widths, *into)
        return out.cpu()

    def select_by_mask(self, x, codes):
        codes, x = self.there(codes), self.there(x)
        kernels, out = native.cuda(x.device.index), self.there(torch.empty_like(x, device="cpu"))
        into = (codes.data_ptr(), x.numel(), out.data_ptr())
        ops._launch(kernels.select_by_mask, x, x.data_ptr(), ops._CODE[x.dtype], *into)
        return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_gradients_of_activations(name, dtype):
    row_length, group_size, rows = CUTS[name]
    for bits in range(1, 9):
        check_activations(Backward(), 2 * sample(rows[-1] * row_length, dtype, bits), bits, row_length, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_activations_with_mixed_widths_and_unaligned(dtype):
    for row_length in (256, 192, 250):
        check_activations(Backward(), sample(len(WIDTHS) * 21 * row_length, dtype, 1), WIDTHS, row_length)
    check_activations(Backward(offset=1), sample(256 * 40, dtype, 1), 3, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_activations_are_as_near_as_torchs(dtype):
    x, grad = (torch.randn(2**20, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))
    codes, meta, _ = ops.quantize(3 * x, 8, 256, 256, 1, 2)
    values = ops.dequantize(codes, meta, 8, 256, 256, x.numel(), dtype)
    for function, aten in ATEN.items():
        check_gradient(aten(grad.cuda(), values.cuda()).cpu(), function, grad, values)
        got = Backward().activation_backward(codes, meta, 8, 256, 256, function, grad)
        check_gradient(got, function, grad, values)


@pytest.mark.parametrize("offset", [0, 1])
def test_selection(offset):
    for n in (1, 255, 256, 257, 100_003):
        for dtype in DTYPES:
            x, codes = gradients(n, dtype, n), reference.pack_mask(sample(n, dtype, 1), "gt", 0.0, 0.0)
            assert same(Backward(offset).select_by_mask(x, codes), selected(x, codes))


class Rebuilding:
    """The kernels that make tensors of codes in one pass, called as the runner of those on the CPU is."""

    def made(self, name, coded, *arguments):
        codes, meta, bits, row_length, group_size, numel, dtype = coded
        codes, meta, kernels = codes.cuda(), meta.cuda(), native.cuda(0)
        cut = (codes.data_ptr(), meta.data_ptr(), numel, row_length, group_size)
        widths = (bits, 0, 0, 0)
        if not isinstance(bits, int):
            places = torch.empty(len(bits), dtype=torch.int64, device="cuda")
            widths = (0, bits.data_ptr(), len(bits), places.data_ptr())
        *arguments, out = arguments
        there = [one.cuda() if isinstance(one, torch.Tensor) else one for one in arguments]
        numbers = (one.data_ptr() if isinstance(one, torch.Tensor) else 0 if one is None else one for one in there)
        ops._launch(getattr(kernels, name), codes, *cut, *widths, ops._CODE[dtype], *numbers, out.data_ptr())
        return out.cpu()

    def rebuild_by_channel(self, *arguments):
        *coded, scale, shift, inner = arguments[:10]
        mask, on, signs = arguments[10:] + (None, 1.0, False)[len(arguments[10:]) :]
        out = torch.empty(coded[5], dtype=coded[6], device="cuda")
        return self.made("rebuild_by_channel", coded, scale, shift, scale.numel(), inner, mask, on, signs, out)

    def rebuild_by_row(self, *arguments):
        *coded, dtype, mean, factor, weight, bias, width = arguments
        out = torch.empty(coded[5], dtype=dtype, device="cuda")
        return self.made("rebuild_by_row", coded, ops._CODE[dtype], mean, factor, weight, bias, width, out)

    def rebuild_activation(self, *arguments):
        *coded, function = arguments
        return self.made("rebuild_activation", coded, function, torch.empty(coded[5], dtype=coded[6], device="cuda"))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_tensors_made_of_codes_in_one_pass(name, dtype):
    row_length, group_size, rows = CUTS[name]
    for bits in (1, 2, 3, 8):
        x = sample(rows[-1] * row_length, dtype, bits)
        for channels, inner in ((5, 3), (3, 16), (64, 1), (7, 49)):
            check_by_channel(Rebuilding(), x, bits, row_length, group_size, channels, inner)
        check_by_row(Rebuilding(), x, bits, row_length, group_size, row_length)
        check_activation(Rebuilding(), x, bits, row_length, group_size)


class InPlace:
    """What changes tensors in place, through its functions in Python."""

    def affine(self, values, scale, shift, inner, mask=None, off=0.0):
        channels, n = scale.numel(), values.numel()
        rows = -(-n // (channels * inner))  # the last sample may be a part of one in the tests
        there = torch.zeros(rows * channels * inner, dtype=values.dtype, device="cuda")
        there[:n] = values.cuda()
        there, scale, shift = there.view(rows, channels, inner), scale.cuda(), shift.cuda()
        if mask is None:
            out = inplace.channel_affine_(there, scale, shift)
        else:
            bits = torch.zeros(there.numel(), device="cuda")
            bits[:n] = reference.unpack_mask(mask, n, 1.0, 0.0, torch.float32).cuda()
            out = inplace.channel_affine(there, scale, shift, pack_mask(bits, "gt"), off)
        return out.view(-1)[:n].cpu()

    def scale_by_mask(self, values, codes, on, off=0.0):
        return inplace.scale_by_mask_(values.cuda(), codes.cuda(), on, off).cpu()

    def normalize(self, values, mean, factor, weight, bias):
        there = [None if one is None else one.cuda() for one in (mean[:, None], factor[:, None], weight, bias)]
        return inplace.normalize_(values.cuda().view(len(mean), -1), *there).view(-1).cpu()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_in_place(dtype):
    for n in (1, 257, 1000, 8000, 100_096):
        check_in_place(InPlace(), n, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variance_of_rounding(dtype):
    for row_length in (256, 192, 250, 7, 3000):
        x = sample(40 * row_length, dtype, 1)
        packed = quantize(x, 3, row_length=row_length, seed=1)
        expected = rounding_variance(x, packed, samples=20)
        there = packed.holding(packed.codes.cuda(), packed.meta.cuda())
        got = rounding_variance(x.cuda(), there, samples=20).cpu()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_tensors_made_of_codes_of_mixed_widths(dtype):
    for row_length in (256, 192, 250):
        x = sample(len(WIDTHS) * 12 * row_length, dtype, 1)
        check_by_channel(Rebuilding(), x, WIDTHS, row_length, 256, 12, row_length)
        check_by_row(Rebuilding(), x, WIDTHS, row_length, 256, row_length)
        check_activation(Rebuilding(), x, WIDTHS, row_length)


class Both(nn.Module):
    """Convolutions behind batch normalisation, and linear layers behind a layer normalisation and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
            nn.Conv2d(64, 10, 3),
        )
        self.tokens = nn.Sequential(
            *(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
        )

    def forward(self, x):
        return self.images(x).mean((2, 3)) + self.tokens(x.reshape(len(x), 27, 64)).mean(1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("level", ["L2", "L3"])
def test_gradients_with_and_without_one_pass(level, autocast, memory_format, monkeypatch):
    """In one pass the bits are those of several, but for activations."""
    torch.manual_seed(0)
    made = Both().cuda().to(memory_format=memory_format)
    x = torch.randn(16, 3, 24, 24, device="cuda").to(memory_format=memory_format)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    calls = []
    by_row, by_channel = rebuild.by_row, rebuild.by_channel

    def gradient():
        model = copy.deepcopy(made)
        hf_actnn.convert(model, level, seed=1)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(x).float().square().mean()
            loss.backward()
            hf_actnn.controller(model).step()
        return torch.cat([one.grad.flatten() for one in model.parameters()])

    def counting(function):
        def call(*arguments):
            out = function(*arguments)
            calls.append(out is not None)
            return out

        return call

    monkeypatch.setattr(rebuild, "by_row", counting(by_row))
    monkeypatch.setattr(rebuild, "by_channel", counting(by_channel))
    once = gradient()
    assert len(calls) >= 6 and all(calls)
    monkeypatch.setattr(rebuild, "possible", lambda packed: False)
    monkeypatch.setattr(rebuild, "by_row", by_row)
    monkeypatch.setattr(rebuild, "by_channel", by_channel)
    twice = gradient()
    assert float((once - twice).norm() / twice.norm()) < (5e-3 if autocast else 2e-5)


def test_sample_spread():
    x = sample(20 * 3000, torch.float32, 1)
    got = sample_spread(x.cuda(), 20, 300)
    torch.testing.assert_close(got.cpu(), reference.sample_spread(x, 20, 300, 256), rtol=1e-12, atol=0)


def test_the_current_stream_is_used():
    """Values that appear late on a side stream: work on any other stream would read what was there before."""
    x, y = sample(256 * 4000, torch.float32, 1), torch.zeros(256 * 4000, device="cuda")
    late = x.cuda()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        y.copy_(late)
        packed = quantize(y, 2, seed=1, stream=2)
        mixed_codes = quantize(y, WIDTHS, row_length=256, seed=1, stream=2)
        back = packed.dequantize()
    side.synchronize()
    expected = quantize(x, 2, seed=1, stream=2)
    assert same(packed.codes.cpu(), expected.codes)
    assert same(mixed_codes.codes.cpu(), quantize(x, WIDTHS, row_length=256, seed=1, stream=2).codes)
    codes, meta = expected.codes, expected.meta
    assert same(back.cpu(), reference.dequantize(codes, meta, 2, x.numel(), 256, x.numel(), x.dtype))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    x = sample(256 * 40, torch.float32, 1)
    with torch.cuda.device(0):
        packed = quantize(x.to("cuda:1"), 2, seed=1)
        assert packed.codes.device == packed.dequantize().device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        assert torch.zeros(1, device="cuda").device == torch.device("cuda:0")
    assert same(packed.codes.cpu(), quantize(x, 2, seed=1).codes)


@pytest.mark.parametrize("bits", [2, WIDTHS], ids=["uniform", "mixed"])
def test_a_graph_draws_other_numbers_in_each_replay(bits):
    x = sample(256 * 400, torch.float32, 1)
    y, step = x.cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    arguments = {"row_length": 256, "seed": 1, "stream": 7, "advance": step}
    quantize(y, bits, **arguments).dequantize()  # loads the kernels, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = quantize(y, bits, **arguments)
        back = packed.dequantize()
        step += 1
    seen = []
    for replay in range(3):
        graph.replay()
        torch.cuda.synchronize()
        expected = quantize(x, bits, row_length=256, seed=1, stream=7 + replay)
        assert same(packed.codes.cpu(), expected.codes), replay
        seen.append(back.clone())
    assert not same(seen[0], seen[1])


def test_a_graph_of_a_whole_step_rounds_afresh_in_each_replay():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 64)).cuda()  # linear: without bias
    x = torch.randn(512, 256, device="cuda")

    def step() -> None:
        model(x).square().sum().backward()

    step()
    exact = torch.cat([one.grad.flatten() for one in model.parameters()]).double()
    hf_actnn.convert(model, bits=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = []
    for _ in range(200):
        for one in model.parameters():
            one.grad.zero_()
        graph.replay()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters()]).double())
    stacked = torch.stack(found)
    assert not torch.equal(stacked[0], stacked[1])
    along = stacked @ (exact / exact.norm())
    assert abs(along.mean() - exact.norm()) < 4 * along.std() / len(found) ** 0.5


def test_nothing_waits_for_the_device():
    x = sample(256 * 400, torch.float32, 1).cuda()
    flat, offsets = x.view(-1), torch.ones(1000, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantize(x, 2).dequantize()
        quantize(x, WIDTHS, row_length=256).dequantize()
        to_values(pack_mask(flat, "gt"), flat.numel())
        to_integers(pack_uint(offsets, 4), 4, 1000)
        sample_spread(x, 10, 256)
        torch.ops.hf_actnn.quantize(flat, 2, 256, 256, 0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(32 * 8 * 8),
        nn.Linear(32 * 8 * 8, 10),
    )


STEPS = 12


def train(device: str, fields: dict, memory_format: torch.memory_format) -> tuple[list[float], list[dict[str, float]]]:
    """Losses, and what the controller chose."""
    model = hf_actnn.convert(network(), **fields).to(device, memory_format=memory_format)
    controller = hf_actnn.controller(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        target = torch.randint(10, (16,), generator=generator)
        x = torch.randn(16, 3, 16, 16, generator=generator)
        x[torch.arange(16), 0, target] += 2  # a bright line says which class it is
        loss = nn.functional.cross_entropy(model(x.to(device, memory_format=memory_format)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses], controller.history


# Dither is the same on both; sums of many products are not rounded alike, and now and then that changes a code. Where
# bits are chosen for each sample, the CPU chooses others. So losses may lie somewhat further apart than those of two
# seeds do on a CPU.
TRAININGS = {
    "L1": ({"level": "L1"}, 0.02),
    "L2": ({"level": "L2"}, 0.02),
    "default": ({}, 0.02),
    "default, more updates": ({"update_interval": 4}, 0.02),
    "L3": ({"level": "L3", "update_interval": 4}, 0.03),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_that_of_the_cpu(name, memory_format, monkeypatch):
    """In channels_last too, where cuDNN's batch normalisation may save more than mean and scale."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fields, tolerance = TRAININGS[name]
    (on_cpu, chosen), (on_gpu, chosen_there) = (train(device, fields, memory_format) for device in ("cpu", "cuda"))
    assert on_cpu[-1] < 0.8 * on_cpu[0]
    assert on_gpu == pytest.approx(on_cpu, rel=tolerance)
    assert [update["step"] for update in chosen_there] == [update["step"] for update in chosen]
    bits, bits_there = ([update["average_bits"] for update in updates] for updates in (chosen, chosen_there))
    assert bits_there == pytest.approx(bits, abs=0.5)


@pytest.mark.parametrize("fields", [{"level": "L2"}, {}], ids=["L2", "default"])
def test_a_training_step_does_not_wait_for_the_device(fields):
    """But for the steps that measure, after which bits are chosen on the host."""
    model = hf_actnn.convert(network(), **fields).cuda()
    controller = hf_actnn.controller(model)
    x, target = torch.randn(16, 3, 16, 16, device="cuda"), torch.zeros(16, dtype=torch.int64, device="cuda")

    def step():
        nn.functional.cross_entropy(model(x), target).backward()
        controller.step()

    for _ in range(17):
        step()
    updates = len(controller.history)
    assert updates == (0 if fields else 6)  # before the first step, and at powers of two
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):  # in each of them gradients are compared with those of the step before
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(controller.history) == updates


# Every kernel once, on small tensors of exactly the size asked for.
SMALL_CASE = """
import torch
from hf_actnn.codec import native, ops, pack_mask, pack_uint, quantize, sample_spread, unpack_mask, unpack_uint
from hf_actnn.codec import inplace, rounding_variance
kernels = native.cuda(0)
widths = torch.tensor([1, 2, 3, 8, 5], dtype=torch.uint8)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for row in (256, 192, 250, 7, 3000):
        x = torch.randn(15, row, device="cuda").to(dtype)
        for bits in (1, 3, 8, widths):
            quantize(x, bits, group_size=1000 if row == 3000 else 256, row_length=row).dequantize()
        sample_spread(x, 5, row)
        flat = x.view(-1)
        mask, out = pack_mask(flat, "gt"), torch.empty_like(flat)
        unpack_mask(mask, flat.numel(), 1.0, 0.0, dtype)
        code, n, into = ops._CODE[dtype], flat.numel(), (flat.data_ptr(), out.data_ptr())
        ops._launch(kernels.select_by_mask, flat, into[0], code, mask.data_ptr(), n, into[1])
        codes, meta, _ = ops.quantize(flat, 3, row, 256, 1, 2)
        for function in range(3):
            cut = (codes.data_ptr(), meta.data_ptr(), n, row, 256, 3)
            ops._launch(kernels.activation_backward, flat, *cut, code, function, *into)
        if dtype is torch.float64:
            continue
        scale, cut = torch.randn(row, device="cuda"), (*cut[:5], 3, 0, 0, 0, code)
        for inner, channels in ((1, row), (4, row // 4), (7, 1)):
            for signs in (False, True):
                arguments = (scale.data_ptr(), scale.data_ptr(), channels, inner, mask.data_ptr(), 1.5, signs, into[1])
                ops._launch(kernels.rebuild_by_channel, flat, *cut, *arguments)
        rows = torch.randn(15, device="cuda")
        arguments = (rows.data_ptr(), rows.data_ptr(), scale.data_ptr(), scale.data_ptr(), row, into[1])
        ops._launch(kernels.rebuild_by_row, flat, *cut, code, *arguments)
        for function in range(3):
            ops._launch(kernels.rebuild_activation, flat, *cut, function, into[1])
        inplace.scale_by_mask_(flat, mask, 1.5)
        inplace.channel_affine_(x.view(15, row, 1), scale, scale)
        inplace.channel_affine(x.view(15, row, 1), scale, scale, mask, -1.0)
        if dtype is torch.float32:
            inplace.normalize_(x, rows[:, None], rows[:, None], scale, scale)
        rounding_variance(x, quantize(x, 2, row_length=row))
values = torch.randint(9, (1000,), device="cuda").to(torch.uint8)
for dtype in (torch.uint8, torch.int32, torch.int64):
    unpack_uint(pack_uint(values, 4), 4, 1000, dtype)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_CASE],
        # Without torch's cache every tensor is an allocation, and its end is where the tool thinks it is.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=47,  # twice, within the limit that tools/gpu.sh has for both
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "done" in done.stdout
