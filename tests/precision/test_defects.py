"""One test per defect of the original implementation, where it is one of adaptation: none is repeated here."""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn import codec
from tests.precision.small import LABELS, adaptive, backward, batch, codes, gradient, held, net, train, widths


@pytest.mark.parametrize("level", ["L2.5", "L3"])
def test_the_first_step_has_no_all_zero_sensitivities(level):
    """Of 128 samples 109 got 1 bit and 18 got 8: before anything is known, samples that are alike get alike bits."""
    model, _ = adaptive(level=level, bits=2)
    found = codes(lambda: backward(model, 128))
    assert len(found) == 5
    for key, packed in found.items():
        bits = widths(packed, 128)
        assert int(bits.sum()) == 256, key
        assert bits.min() >= 1 and bits.max() <= 3, key
        assert (bits == 2).sum() >= 64, key


def test_metadata_is_not_rounded_after_packing():
    """The minimum and the step were rounded to bf16 after the codes were made, which is a bias: with widths of their
    own, samples far from 0 come back right on average, and so does the gradient of a linear layer."""
    model, controller = adaptive(nn.Sequential(nn.Linear(256, 8)), bits=3, update_interval=1000)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 256, generator=generator) * torch.logspace(-1, 1, 16)[:, None] + 100.3
    direction = torch.randn(16, 8, generator=generator)
    (model(x) * direction).sum().backward()
    controller.step()
    (packed,) = codes(lambda: model(x)).values()
    assert packed.widths is not None and packed.widths.unique().numel() >= 3
    draws = 400
    total, squares = torch.zeros(8, 256, dtype=torch.float64), torch.zeros(8, 256, dtype=torch.float64)
    for _ in range(draws):
        model.zero_grad()
        (model(x) * direction).sum().backward()
        found = model[0].weight.grad.double()
        total += found
        squares += found.square()
    exact = direction.double().T @ x.double()
    mean = total / draws
    error = ((squares / draws - mean.square()) / (draws - 1)).sqrt()
    scores = (mean - exact) / error
    assert error.max() < 1 and scores.abs().max() < 5  # 2,048 of them: one in 800 runs, were there no bias
    assert abs(float(scores.mean())) < 5 / math.sqrt(scores.numel()) + 0.05
    assert float(scores.square().mean()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    "settings", [{"level": "L2.5"}, {"level": "L3"}, {"level": "L3", "per_sample": False}], ids=str
)
def test_more_than_65535_rows_do_not_overflow(settings):
    """A grid of blocks had one dimension per row: 70,000 of them are coded, measured, and give the right gradient."""
    torch.manual_seed(0)
    rows = 70_000
    model, controller = adaptive(nn.Sequential(nn.Linear(8, 8)), bits=6, **settings)
    x, direction = torch.randn(rows, 8), torch.randn(rows, 8)
    x[-1], direction[-1] = 50.0, 50.0  # the last row decides
    exact = direction.T @ x
    for _ in range(2):
        model.zero_grad()
        (model(x) * direction).sum().backward()
        assert torch.allclose(model[0].weight.grad, exact, rtol=0.05, atol=15)
        controller.step()
    assert len(controller.history) == 2
    assert controller.bits() == {"0:linear": 6.0}


def test_two_models_do_not_share_state():
    """Everything was global: a second model, another in size and order, leaves the first one's bits as they are."""
    model, controller = adaptive(bits=2)
    other, others = adaptive(nn.Sequential(nn.Flatten(), nn.Linear(768, 96), nn.GELU(), nn.Linear(96, LABELS)), bits=4)
    alone, expected = adaptive(bits=2)
    for step in range(4):
        x, y = batch(16, step)
        left, right = F.cross_entropy(model(x), y), F.cross_entropy(other(x), y)
        model.zero_grad(), other.zero_grad()
        right.backward()
        left.backward()
        found = gradient(model)
        others.step()
        controller.step()
        assert torch.equal(found, backward(alone, 16, step))
        expected.step()
    assert controller.bits() == expected.bits() and controller.history == expected.history
    assert others.bits() and not others.bits().keys() & controller.bits().keys()
    assert others.history[-1]["average_bits"] > 3 > controller.history[-1]["average_bits"]


@pytest.mark.parametrize("settings", [{}, {"per_sample": False}, {"level": "L2.5"}, {"bits": "auto"}], ids=str)
def test_a_changed_batch_size_does_not_break(settings):
    """Buffers were made for the first batch: any size comes next, in the middle of an interval or at an update."""
    model, controller = adaptive(update_interval=2, **settings)
    for step, count in enumerate([16, 7, 1, 33, 2, 16, 5, 1]):
        found = codes(lambda count=count, step=step: backward(model, count, step))
        assert gradient(model).isfinite().all()
        for key, packed in found.items():
            assert packed.widths is None or packed.widths.shape == (count,), key
            if controller.bits():
                assert widths(packed, count).double().mean() <= controller.bits()[key] + 1e-9
        controller.step()
    assert [entry["step"] for entry in controller.history] == [1, 2, 3, 5, 7]


class Crossed(nn.Module):
    """Runs its layers in an order that is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.order = ("first", "second", "third")

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = F.gelu(getattr(self, name)(x))
        return x


def test_another_layer_order_does_not_break():
    """Layers were told apart by the order of their first pass: bits belong to a module and an operation in it."""
    model, controller = adaptive(Crossed(), bits=3)
    orders = [("first", "second", "third"), ("third", "first", "second"), ("second",), ("first", "second", "third")]
    for order in orders * 2:
        model.order = order
        found = codes(lambda: model(torch.randn(16, 64)).square().sum().backward())
        assert found and {key.split(":")[0] for key in found} <= {"", *order}
        before = controller.bits()
        for key, packed in found.items():
            if key in before:
                assert int(widths(packed, 16).sum()) == int(before[key] * 16 + 1e-6), key
        controller.step()
        assert found.keys() <= controller.bits().keys()
        assert all(1 <= bits <= 8 for bits in controller.bits().values())
    assert len(controller.history) == 8


def test_a_layer_used_twice_has_two_names():
    """One entry per layer object: a layer that is called twice keeps two tensors, each with its bits."""
    model, controller = adaptive(Crossed(), bits=3)
    model.order = ("first", "first")
    for _ in range(2):
        found = codes(lambda: model(torch.randn(16, 64)).square().sum().backward())
        controller.step()
    assert len(found) >= 2 and found.keys() == controller.bits().keys()


class Calls:
    """Counts, by the function of ours that asked, how often a tensor's value was asked for."""

    #: All ways by which Python gets at a value; on a device each of them waits for it.
    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        for name in self.NAMES:
            monkeypatch.setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))

    def _counting(self, name: str, original: Any) -> Any:
        def asked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if "hf_actnn" in frame.f_code.co_filename:
                self.counts[f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_name}:{name}"] += 1
            return original(tensor, *args, **kwargs)

        return asked


#: Where values are asked for that belong on the CPU whatever the device: the widths, and what they are chosen from.
OF_WIDTHS = ("mixed.py:", "packed.py:", "samples.py:assign:", "reference.py:")


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("level", ["L2", "L2.5", "L3"])
def test_a_step_between_updates_reads_no_value_of_a_tensor(monkeypatch, level, bits):
    """`.item()` in every layer made the host wait for the device: between updates nothing but widths is read, and they
    are never on a device; with whole bits per tensor nothing at all."""
    model, controller = adaptive(level=level, bits=bits, update_interval=1000)
    train(model, controller, range(3))
    calls = Calls(monkeypatch)
    train(model, controller, range(3, 4))
    assert [key for key in calls.counts if not key.startswith(OF_WIDTHS)] == []
    assert bool(calls.counts) == (level == "L3")  # it does count; at L2.5 these samples are too alike to differ in bits


def test_whole_bits_per_tensor_read_nothing(monkeypatch):
    """The same without samples: not even widths."""
    model, controller = adaptive(bits=3, update_interval=1000, per_sample=False)
    train(model, controller, range(3))
    state = controller.state_dict()
    state["plan"] = {key: float(round(bits)) for key, bits in state["plan"].items()}
    controller.load_state_dict(state)
    calls = Calls(monkeypatch)
    train(model, controller, range(3, 4))
    assert not calls.counts


@pytest.mark.parametrize("per_sample", [True, False])
def test_an_update_reads_all_sums_at_once(monkeypatch, per_sample):
    """Nor does the step that measures wait in every node: its sums come with one transfer, at the end."""
    model, controller = adaptive(bits=2, per_sample=per_sample, update_interval=1000)
    calls = Calls(monkeypatch)
    backward(model)
    during = dict(calls.counts)
    assert not [key for key in during if key.startswith("sensitivity.py")]
    # A generator on the CPU, and a look at what lies there; elsewhere there is none.
    on_a_cpu = ("tape.py:_place:__int__", "tape.py:_harm:__bool__")
    assert not [key for key in during if not key.startswith((*OF_WIDTHS, *on_a_cpu))]
    controller.step()
    assert [key for key in calls.counts if key.endswith(":cpu")] == ["sensitivity.py:__init__:cpu"]
    assert calls.counts["sensitivity.py:__init__:cpu"] == 1  # what is read after it lies on the CPU
    assert len(controller.history) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_device_is_not_waited_for_between_updates(per_sample):
    """The same on the device itself, where bits are chosen per tensor alone; per sample, one transfer per tensor."""
    model, controller = adaptive(net().cuda(), bits=2, per_sample=per_sample, update_interval=1000)
    x, y = (one.cuda() for one in batch(16))

    def step():
        F.cross_entropy(model(x), y).backward()
        controller.step()

    for _ in range(3):  # each of which is measured
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn" if per_sample else "error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(controller.history) == 3


@pytest.mark.gpu
def test_another_stream_than_the_default_is_used():
    """Kernels ran on the default stream whatever the current one: a step on another adapts as well."""
    model, controller = adaptive(net().cuda(), bits=2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for seed in range(3):
            x, y = (one.cuda() for one in batch(16, seed))
            F.cross_entropy(model(x), y).backward()
            controller.step()
    stream.synchronize()
    assert len(controller.history) == 3 and gradient(model).isfinite().all()


def test_no_bf16_no_autocast_no_cpu():
    """All three work: this test runs on the CPU, under autocast, and adapts."""
    model, controller = adaptive(bits=2)
    for seed in range(3):
        x, y = batch(16, seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        assert gradient(model).isfinite().all()
        controller.step()
    assert len(controller.history) == 3 and len(set(controller.bits().values())) >= 3
    assert all(math.isfinite(value) for value in controller.history[-1].values())
    _, full = train_like(bits=2)
    for key, bits in controller.bits().items():  # the same sensitivities, whatever the precision
        assert bits == pytest.approx(full[key], abs=1), key


def train_like(**settings: Any) -> tuple[nn.Module, dict[str, float]]:
    model, controller = adaptive(**settings)
    for seed in range(3):
        backward(model, 16, seed)
        controller.step()
    return model, controller.bits()


def test_a_model_in_bf16_adapts():
    """Parameters and activations in bf16 themselves."""
    model, controller = adaptive(net().bfloat16(), bits=2)
    for seed in range(3):
        x, y = batch(16, seed)
        F.cross_entropy(model(x.bfloat16()).float(), y).backward()
        controller.step()
    assert len(controller.history) == 3 and len(set(controller.bits().values())) >= 3


def test_no_retain_graph():
    """A graph is run twice, on a step that measures and on one that does not: twice the gradient."""
    for updates in (1, 1000):
        model, controller = adaptive(bits=2, update_interval=updates)
        train(model, controller, range(1), lr=0.0)
        x, y = batch(16)
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        once = gradient(model)
        loss.backward()
        assert torch.allclose(gradient(model), 2 * once, rtol=1e-5, atol=1e-7)
        controller.step()
        assert all(1 <= bits <= 8 for bits in controller.bits().values())
        assert controller.history[-1]["average_bits"] <= 2


def test_pretrained_weights_survive():
    """Layers were made anew: conversion and adaptation leave the parameters in place, and the forward pass exact."""
    model = net()
    before, parameters = copy.deepcopy(model), list(model.parameters())
    _, controller = adaptive(model)
    train(model, controller, range(3), lr=0.0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    x = batch(16)[0]
    assert controller.bits() and torch.equal(model(x), before(x))


@pytest.mark.parametrize("count", [4, 16])
def test_it_saves_memory_and_says_how_much(count):
    """No measured report: bits that were chosen are those that are reported and held."""
    model, controller = adaptive(bits=2)
    train(model, controller, range(2))
    with hf_actnn.track_memory(model) as memory:
        F.cross_entropy(model(batch(count)[0]), batch(count)[1]).backward()
    assert memory.ratio > 8
    assert memory.saved_bytes == held(model, count)
    reported = {f"{row.module}:{row.kind}": row.bits for row in hf_actnn.report(model).rows if row.kept == "quantized"}
    assert reported == pytest.approx(controller.bits())


def test_a_bias_on_a_transposed_convolution_and_rows_of_tokens():
    """What raised: a transposed convolution with a bias, and three dimensions in a linear layer; both adapt."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.linear = nn.ConvTranspose2d(3, 8, 2, stride=2, bias=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.gelu(self.up(x)).flatten(2).mT).mean(1)

    model, controller = adaptive(Tokens(), bits=2)
    train(model, controller, range(3))
    assert len(controller.history) == 3 and len(controller.bits()) >= 2
    assert codec.quantize(torch.randn(4, 64), 2).bits == 2
