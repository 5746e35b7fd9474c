"""Two processes: they exchange what they measured, so that both hold the same bits, whatever data each has seen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integrations.processes import needs_gloo, run_two

pytestmark = needs_gloo

#: What each of the two processes runs: once with the exchange, once without it.
SCRIPT = """
import contextlib, json, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_actnn
from hf_actnn.precision import controller as module

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
exchange = module._of_all_processes


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(),
        nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 8),
    )


def batch(step):
    # Of another kind on each rank: on the second a few samples are far larger than the others.
    generator = torch.Generator().manual_seed(100 * step + rank)
    count = 16 if step % 3 != 2 else (10, 3)[rank]  # every third step is the last of its epoch, of unequal batches
    x = torch.randn(count, 3, 8, 8, generator=generator)
    if rank == 1:
        x[::4] *= 30
    return x, torch.randint(0, 8, (count,), generator=generator)


def run(exchanging, **settings):
    module._of_all_processes = exchange if exchanging else lambda readings: readings
    inner = hf_actnn.convert(net(), level="L3", update_interval=1, min_numel=64, **settings)
    model = DistributedDataParallel(inner, broadcast_buffers=False)
    controller = hf_actnn.controller(model)
    assert controller is hf_actnn.controller(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps, gradients = [], []
    for step in range(8):
        alone = step == 4  # the second rank has run out of samples, the first has some left
        if not (alone and rank == 1):
            x, y = batch(step)
            with model.no_sync() if alone else contextlib.nullcontext():
                F.cross_entropy(model(x), y).backward()
        controller.step()
        if not alone:
            gradients.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).double().sum()))
            optimizer.step()
        optimizer.zero_grad()
        steps.append(controller.bits())
    return {"bits": steps, "history": controller.history, "gradients": gradients}


found = {
    "exchanged": run(True),
    "tensors": run(True, per_sample=False, bits=3),
    "auto": run(True, bits="auto"),
    "apart": run(False),
}
module._of_all_processes = exchange
# A stopped run: each process loads the state that the first has written.
inner = hf_actnn.convert(net(), level="L3", update_interval=1, min_numel=64)
controller = hf_actnn.controller(inner)
for step in range(2):
    x, y = batch(step)
    F.cross_entropy(inner(x), y).backward()
    controller.step()
states = [controller.state_dict() if rank == 0 else None]
dist.broadcast_object_list(states)
again = hf_actnn.controller(hf_actnn.convert(inner, level="L3", update_interval=1, min_numel=64))
again.load_state_dict(states[0])
x, y = batch(3)
F.cross_entropy(inner(x), y).backward()
again.step()
found["resumed"] = {"bits": [again.bits()], "history": again.history}
# A loss that overflows on one of the ranks is left out by both, and by both in the next step made good.
x, y = batch(4)
(F.cross_entropy(inner(x), y) * (float("inf") if rank else 1.0)).backward()
again.step()
skipped = len(again.history)
F.cross_entropy(inner(x), y).backward()
again.step()
found["overflow"] = {"bits": [again.bits()], "history": again.history, "skipped": skipped}
with open(sys.argv[1] + f"/{rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    return run_two(folder / "script.py", folder)


@pytest.mark.parametrize("which", ["exchanged", "tensors", "auto", "resumed", "overflow"])
def test_all_processes_hold_the_same_bits(ranks, which):
    first, second = (rank[which] for rank in ranks)
    assert first["bits"] == second["bits"]
    assert first["history"] == second["history"] and len(first["history"]) > 0
    for bits in first["bits"]:
        assert len(bits) >= 4
        assert len(set(bits.values())) >= 2 or which == "tensors"  # whole tensors are too coarse here to gain by it
        assert all(1 <= one <= 8 for one in bits.values())


def test_they_update_in_every_step(ranks):
    """Unequal last batches, and a step in which one process has no samples, included."""
    assert [entry["step"] for entry in ranks[0]["exchanged"]["history"]] == list(range(1, 9))
    assert len({json.dumps(bits) for bits in ranks[0]["exchanged"]["bits"]}) > 1


def test_without_the_exchange_they_would_differ(ranks):
    """What the tests above compare with tells processes apart: the same script, but for the exchange."""
    first, second = (rank["apart"] for rank in ranks)
    assert first["bits"] != second["bits"]
    assert sum(a != b for a, b in zip(first["bits"], second["bits"], strict=True)) >= 4
    assert len(first["history"]) == 8 and len(second["history"]) == 7  # the empty step is skipped by one alone


def test_the_gradients_are_those_of_all(ranks):
    for which in ("exchanged", "tensors", "auto", "apart"):
        assert ranks[0][which]["gradients"] == ranks[1][which]["gradients"]
    assert ranks[0]["exchanged"]["gradients"] != ranks[0]["apart"]["gradients"]


def test_an_overflow_on_one_is_skipped_by_all(ranks):
    for rank in ranks:
        assert rank["overflow"]["skipped"] == 3
        assert [entry["step"] for entry in rank["overflow"]["history"]] == [1, 2, 3, 5]


def test_what_both_hold_is_what_both_have_seen(ranks):
    """Between what each would have chosen alone, and within the average."""
    for entry in ranks[0]["exchanged"]["history"]:
        assert 1.5 < entry["average_bits"] <= 2
    assert ranks[0]["exchanged"]["bits"][0] not in (ranks[0]["apart"]["bits"][0], {})
