"""DDP and FSDP2 with two processes: gradients are those of one process, parameters are gathered but never kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.processes import needs_gloo, run_two

pytestmark = needs_gloo

WORKER = Path(__file__).with_name("sharded_worker.py")
#: Ways that pass gradients on as they are.
EXACT = ["ddp", "static graph", "find unused", "bucket view", "fsdp2", "fsdp2 kept", "fsdp2 by layer", "fsdp1"]
SHARDED = ["fsdp2", "fsdp2, converted after", "fsdp2 kept", "fsdp2 by layer"]
ADAPTIVE = ["ddp", "fsdp2", "ddp auto", "fsdp2 auto", "fsdp2 checkpoints"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_two(WORKER, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", [*EXACT, "fsdp2, converted after", "fp16 hook", "power sgd", "fsdp2 bf16"])
def test_the_loss_is_the_same_and_the_gradient_near(ranks, way):
    for rank in ranks:
        found = rank["ways"][way]
        assert found["loss"] == found["plain"]["loss"]
        assert 1e-4 < found["error"] < 0.01  # of 8 bits: something was compressed
        assert found["saved"] < found["raw"] / (3 if way == "fsdp2 bf16" else 6)


@pytest.mark.parametrize("way", EXACT)
def test_what_it_is_compared_with_is_the_gradient_of_one_process(ranks, way):
    assert ranks[0]["ways"][way]["plain"]["error"] < 1e-6
    assert ranks[0]["ways"][way]["error"] == ranks[1]["ways"][way]["error"]  # of all processes


@pytest.mark.parametrize("way", SHARDED)
def test_gathered_parameters_are_not_kept(ranks, way):
    """What is held is what DDP holds, and copies of vectors: of weights and biases of the five normalisations."""
    for rank in ranks:
        ddp, found = rank["ways"]["ddp"], rank["ways"][way]
        assert found["raw"] == ddp["raw"]
        assert found["saved"] - ddp["saved"] == 5 * 2 * 64 * 4


def test_processes_round_apart(ranks):
    """On the same data: or averaging would gain nothing. The bias that there is at two bits is all that is alike."""
    for rank in ranks:
        noise = rank["noise"]
        assert noise["again"] == pytest.approx(1)
        assert abs(noise["seeds"]) < 0.3
        assert noise["processes"] == pytest.approx(noise["seeds"], abs=0.1)


@pytest.mark.parametrize("way", ADAPTIVE)
def test_processes_hold_the_same_bits(ranks, way):
    first, second = (rank[way] for rank in ranks)
    assert first["bits"] == second["bits"] and len(set(first["bits"].values())) > (1 if "checkpoints" in way else 2)
    assert first["history"] == second["history"]
    assert [entry["step"] for entry in first["history"]] == [1, 2, 3, 5, 9]


@pytest.mark.parametrize("way", ["fsdp2", "fsdp2 auto"])
def test_a_sharded_model_adapts_as_a_replicated_one(ranks, way):
    """The variance of the batch's drawing is known too, which a sharded parameter's own gradient does not show."""
    sharded, replicated = ranks[0][way], ranks[0][way.replace("fsdp2", "ddp")]
    for at, (found, expected) in enumerate(zip(sharded["history"], replicated["history"], strict=True)):
        # The first update comes of the same bits everywhere. After it a difference in the last digit may choose others.
        near, variance = (0.001, 0.001) if at == 0 else (0.1, 0.25)
        assert found["average_bits"] == pytest.approx(expected["average_bits"], abs=near)
        assert found["added_variance"] == pytest.approx(expected["added_variance"], rel=variance)
    assert sharded["losses"] == pytest.approx(replicated["losses"], rel=0.02)


def test_a_model_that_is_sharded_is_reverted(ranks):
    assert ranks[0]["reverted"]


def test_what_does_not_work_is_refused(ranks):
    refused = ranks[0]["refused"]
    assert refused["flattened"].startswith("NotAvailableError") and "fsdp_version: 2" in refused["flattened"]
    assert refused["split"].startswith("NotAvailableError") and "blocks.0.up" in refused["split"]
    assert refused["scattered"].startswith("SavedTensorError") and "one fully_shard call" in refused["scattered"]
