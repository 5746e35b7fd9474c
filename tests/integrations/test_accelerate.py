"""`hf_actnn.integrations.accelerate.prepare`, in one process and under `accelerate launch` with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import hf_actnn
from hf_actnn.errors import ActNNWarning, ConversionError, NotAvailableError
from hf_actnn.integrations.accelerate import prepare
from tests import forks
from tests.integrations.processes import needs_gloo
from tests.integrations.small import Pictures, assert_same_weights, make_resnet, weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
pytest.importorskip("timm")
import distributed

STOP, STEPS = 6, 12
WAYS = ["one process", "DDP", "FSDP2, resharding"]
SETTINGS = ["uncompressed", "8 bits", "auto"]


pytestmark = pytest.mark.usefixtures("own_accelerator")


def ready(accelerator: Accelerator, **settings: Any) -> tuple[torch.nn.Module, Any]:
    model = make_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return prepare(accelerator, model, optimizer, **{"update_interval": 3, "min_numel": 64, **settings})


def train(accelerator: Accelerator, model: Any, optimizer: Any, first: int, last: int) -> list[float]:
    """A loop without a line for compression."""
    data, losses = Pictures(32), []
    for step in range(first, last):
        for part in range(accelerator.gradient_accumulation_steps):
            at = torch.randperm(32, generator=torch.Generator().manual_seed(100 * step + part))[:8]
            with accelerator.accumulate(model):
                loss = model(pixel_values=data.pixels[at], labels=data.labels[at]).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("settings", [{"config": "L3"}, {}], ids=["L3", "auto"])
def test_a_stopped_loop_goes_on_bit_for_bit(tmp_path, precision, accumulate, settings):
    def start() -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)

    accelerator = start()
    model, optimizer = ready(accelerator, **settings)
    train(accelerator, model, optimizer, 0, STOP)
    accelerator.save_state(str(tmp_path / "half"))
    expected = train(accelerator, model, optimizer, STOP, STEPS)

    accelerator = start()
    resumed, optimizer = ready(accelerator, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActNNWarning)
        accelerator.load_state(str(tmp_path / "half"))
    assert train(accelerator, resumed, optimizer, STOP, STEPS) == expected
    assert_same_weights(weights(model), weights(resumed))
    found, whole = hf_actnn.controller(resumed), hf_actnn.controller(model)
    assert found.steps == whole.steps == STEPS
    assert found.bits() == whole.bits() and found.history == whole.history
    assert [entry["step"] for entry in found.history] == [1, 2, 3, 4, 7, 10]


def test_a_checkpoint_from_before_can_be_resumed(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = make_resnet()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    ready(accelerator, config="L3")
    with pytest.warns(ActNNWarning, match="chosen anew"):
        accelerator.load_state(str(tmp_path))


def test_a_checkpoint_holds_the_models_that_are_there(tmp_path):
    """One after the other with the same accelerator."""
    accelerator = Accelerator(cpu=True)
    first, _ = ready(accelerator, config="L3")
    accelerator.free_memory()
    second, optimizer = ready(accelerator, config="L3")
    train(accelerator, second, optimizer, 0, 2)
    accelerator.save_state(str(tmp_path))
    (state,) = json.loads((tmp_path / "hf_actnn.json").read_text())
    assert state["steps"] == 2 and hf_actnn.controller(first).steps == 0


@pytest.mark.parametrize("anew", ["prepare", "convert"])
def test_a_model_that_is_converted_anew_goes_on_choosing(tmp_path, anew):
    """A cell of a notebook that is run twice, for one: the optimizer drives the model's new controller alone."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = ready(accelerator, config="L3")
    train(accelerator, model, optimizer, 0, 2)
    before = hf_actnn.controller(model)
    if anew == "prepare":
        prepare(accelerator, model, optimizer, bits=3.5, update_interval=3, min_numel=64)
    else:
        hf_actnn.convert(model, bits=3.5, update_interval=3, min_numel=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActNNWarning)
        train(accelerator, model, optimizer, 2, 8)
    after = hf_actnn.controller(model)
    assert before is not after and before.steps == 2
    assert after.steps == 6 and after.bits()
    accelerator.save_state(str(tmp_path))
    (state,) = json.loads((tmp_path / "hf_actnn.json").read_text())
    assert state["steps"] == 6
    hf_actnn.revert(model)
    train(accelerator, model, optimizer, 8, 9)
    assert after.steps == 6


def test_states_of_processes_that_are_gone_leave_a_checkpoint(tmp_path):
    """Else a run with as many as before would give each process bits of another time."""
    accelerator = Accelerator(cpu=True)
    ready(accelerator, config="L3")
    gone = [tmp_path / f"hf_actnn_{rank}.json" for rank in (1, 12)]
    for path in (*gone, tmp_path / "hf_actnn_1.txt", tmp_path / "my_hf_actnn_1.json"):
        path.write_text("[]")
    accelerator.save_state(str(tmp_path))
    assert not any(path.exists() for path in gone)
    assert {"hf_actnn.json", "hf_actnn_1.txt", "my_hf_actnn_1.json"} <= {path.name for path in tmp_path.iterdir()}


def test_what_is_prepared_comes_back_in_order():
    accelerator = Accelerator(cpu=True)
    model = make_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    found = prepare(accelerator, model, DataLoader(Pictures(8)), optimizer, schedule, config="L2")
    assert [type(one).__name__ for one in found[1:]] == [
        "DataLoaderShard",
        "AcceleratedOptimizer",
        "AcceleratedScheduler",
    ]
    assert found[0] is model and hf_actnn.report(model).config.level == "L2"


def test_a_model_that_is_converted_stays_as_it_is():
    accelerator = Accelerator(cpu=True)
    model = hf_actnn.convert(make_resnet(), bits=3)
    prepare(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert hf_actnn.report(model).config.bits == 3


def test_the_optimizer_has_to_come_along():
    model = make_resnet()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConversionError, match="an optimizer with parameters of the model in the same call"):
        prepare(Accelerator(cpu=True), model, other, config="L3")
    assert not hf_actnn.is_converted(model)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_are_refused(engine):
    """Neither is installed; of the accelerator only its answer to the question which engine it uses is made up."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType[engine]
    model = make_resnet()
    with pytest.raises(NotAvailableError, match="fsdp_version 2"):
        prepare(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), config="L3")
    assert not hf_actnn.is_converted(model)


def test_deepspeed_is_refused_in_a_trainer(arguments):
    """The plug-in is what TrainingArguments(deepspeed=...) makes; without the package neither it nor a Trainer with it
    can be made, so the callback is asked."""
    from transformers import TrainingArguments

    args = TrainingArguments(**arguments())
    args.deepspeed_plugin = object()
    model = make_resnet()
    with pytest.raises(NotAvailableError, match="DeepSpeed"):
        hf_actnn.ActNNCallback("L2").apply(args, model)
    assert not hf_actnn.is_converted(model)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The launcher is a fork, and so are the processes that it starts."""

    def launched(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        return forks.server().run(command[1:], timeout, forks.ROOT, os.environ, nested=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.launching, "run_to_end", launched)
        return distributed.measure(WAYS, SETTINGS, steps=4, timeout=240)


@needs_gloo
@pytest.mark.parametrize("way", WAYS[1:])
class TestTwoProcesses:
    def test_there_are_two(self, found, way):
        assert found[WAYS[0]]["processes"] == 1 and found[way]["processes"] == 2
        assert found[way]["auto"]["way"] == f"DistributedType.{'MULTI_CPU' if way == 'DDP' else 'FSDP'}"

    def test_losses_are_those_of_one_process(self, found, way):
        one, two = found[WAYS[0]], found[way]
        assert two["uncompressed"]["losses"] == pytest.approx(one["uncompressed"]["losses"], rel=1e-5)
        for name in SETTINGS:  # the forward pass is exact, so the first loss does not know of compression
            assert two[name]["losses"][0] == two["uncompressed"]["losses"][0]
        assert two["8 bits"]["losses"] == pytest.approx(one["8 bits"]["losses"], rel=2e-3)
        assert two["auto"]["losses"] == pytest.approx(one["auto"]["losses"], rel=0.05)

    def test_gradients_are_as_near_as_those_of_one_process(self, found, way):
        one, two = found[WAYS[0]], found[way]
        assert two["uncompressed"]["gradient_error"] < 1e-5
        for name in ("8 bits", "auto"):
            assert two[name]["gradient_error"] == pytest.approx(one[name]["gradient_error"], rel=0.3)

    def test_each_process_keeps_its_share(self, found, way):
        one, two = found[WAYS[0]], found[way]
        for name in SETTINGS:
            assert two[name]["saved_bytes"] == pytest.approx(2 * [one[name]["saved_bytes"][0] / 2], rel=0.03)
        assert two["8 bits"]["saved_bytes"][0] < two["uncompressed"]["saved_bytes"][0] / 6

    def test_parameters_are_gathered_no_longer_than_without_compression(self, found, way):
        for name in SETTINGS:
            assert found[way][name]["gathered_bytes"] == found[way]["uncompressed"]["gathered_bytes"]

    def test_a_stopped_run_goes_on_bit_for_bit(self, found, way):
        for name in SETTINGS:
            assert found[way][name]["resumed_exactly"]
