"""Forward passes that a CUDA graph captures draw afresh in each replay; here with a host that pretends to capture."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import hf_actnn
from hf_actnn import codec
from hf_actnn.errors import NotAvailableError
from hf_actnn.saving import replays
from hf_actnn.saving.session import Session


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))  # linear: then gradients have no bias


def gradient(model: nn.Module) -> Tensor:
    model.zero_grad()
    model(torch.randn(32, 64, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    return torch.cat([one.grad.flatten() for one in model.parameters()])


@pytest.fixture
def pretend(monkeypatch):
    """A CPU stands for the device, and every pass has the number that a graph would have built in."""
    capturing = [False]
    monkeypatch.setattr(replays, "_KINDS", ("cpu",))
    monkeypatch.setattr(replays, "is_capturing", lambda device: capturing[0])
    monkeypatch.setattr(Session, "next_step", lambda self: 7)
    return capturing


@pytest.mark.parametrize("bits", [2, 4])
def test_each_replay_draws_afresh(pretend, bits):
    model = hf_actnn.convert(net(), bits=bits)
    ordinary = [gradient(model) for _ in range(2)]
    assert torch.equal(*ordinary)  # a pass has its number built in
    pretend[0] = True
    found = [gradient(model) for _ in range(200)]
    for a, b in itertools.combinations([*found[:4], ordinary[0]], 2):
        assert not torch.equal(a, b)
    exact = gradient(hf_actnn.revert(model))
    stacked = torch.stack(found).double()
    # Along the exact gradient, four standard errors: odds of 1 in 16,000.
    along = stacked @ (exact / exact.norm()).double()
    assert abs(along.mean() - exact.norm()) < 4 * along.std() / len(found) ** 0.5
    assert along.std() > 0


def test_no_two_passes_meet(pretend, monkeypatch):
    """Two passes in one graph, of gradient accumulation say, have two numbers; so have two graphs that take turns."""
    model, streams, quantize = hf_actnn.convert(net(), bits=2), [], codec.quantize

    def watched(x, bits, group_size, seed, stream, *, advance, **more):
        streams.append(stream + int(advance))
        return quantize(x, bits, group_size, seed, stream, advance=advance, **more)

    gradient(model)
    pretend[0] = True
    monkeypatch.setattr(codec, "quantize", watched)
    for number in (10, 11, 10, 11, 10, 11):
        monkeypatch.setattr(Session, "next_step", lambda self, number=number: number)
        gradient(model)
    assert len(set(streams)) == len(streams) == 12


def test_a_capture_without_a_pass_before_is_refused(pretend):
    model = hf_actnn.convert(net(), "L2")
    pretend[0] = True
    with pytest.raises(NotAvailableError, match="before any has run"):
        gradient(model)
    pretend[0] = False
    gradient(model)  # nothing is left of it
    pretend[0] = True
    gradient(model)


def test_nothing_is_measured_in_a_capture(pretend):
    model = hf_actnn.convert(net(), "L3", update_interval=2)
    controller = hf_actnn.controller(model)
    gradient(model)
    controller.step()
    pretend[0] = True
    for _ in range(6):
        gradient(model)
    assert controller._tape is None and not controller._calls


def test_a_device_without_graphs_counts_nothing():
    counts = replays.Replays()
    assert counts.begin(torch.device("cpu"), "here") is None and not counts._counts
