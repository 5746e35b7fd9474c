"""Adaptive bits in a loop of one's own with accelerate: its checkpoints carry the controller."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import hf_actnn
from hf_actnn.errors import ActNNWarning
from hf_actnn.precision.controller import Controller
from tests.integrations.small import Pictures, assert_same_weights, make_resnet, weights

STOP, STEPS = 6, 12


pytestmark = pytest.mark.usefixtures("own_accelerator")


class Run:
    """What a script does from its first line on; a second one is a second start of the script."""

    def __init__(self, register: bool = True, precision: str = "no", accumulate: int = 1, **settings) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
        settings = {"level": "L3", "update_interval": 3, "min_numel": 64, **settings}
        model = hf_actnn.convert(make_resnet(), **settings)
        self.controller = hf_actnn.controller(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if register:
            self.accelerator.register_for_checkpointing(self.controller)
        self.data = Pictures(32)
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            for part in range(self.accelerator.gradient_accumulation_steps):
                generator = torch.Generator().manual_seed(100 * step + part)
                at = torch.randperm(32, generator=generator)[:8]
                with self.accelerator.accumulate(self.model):
                    loss = self.model(pixel_values=self.data.pixels[at], labels=self.data.labels[at], sample_id=at).loss
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.controller.step()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.losses.append(loss.item())
        return self


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16"}, {"accumulate": 2}, {"level": "L2"}, {"bits": "auto"}],
    ids=["L3", "bf16", "accumulation", "L2", "auto"],
)
def test_a_stopped_loop_goes_on_bit_for_bit(tmp_path, settings):
    whole = Run(**settings).train(0, STOP)
    whole.accelerator.save_state(str(tmp_path / "half"))
    seen = len(whole.losses)
    whole.train(STOP, STEPS)

    resumed = Run(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActNNWarning)
        resumed.accelerator.load_state(str(tmp_path / "half"))
    assert resumed.controller.steps == STOP
    resumed.train(STOP, STEPS)
    assert resumed.losses == whole.losses[seen:]
    assert_same_weights(weights(whole.model), weights(resumed.model))
    found, expected = resumed.controller, whole.controller
    assert found.bits() == expected.bits() and found.history == expected.history and found.steps == STEPS
    torch.testing.assert_close(found.table.values, expected.table.values, rtol=0, atol=0, equal_nan=True)
    if settings.get("level") != "L2":
        assert [entry["step"] for entry in found.history] == [1, 2, 3, 4, 7, 10]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_samples_are_known_after_an_epoch(precision):
    run = Run(precision=precision).train(0, 20)
    assert run.controller.table.values.isfinite().sum() == 32


def test_without_registering_the_resumed_loop_differs(tmp_path):
    """The test above can tell."""
    whole = Run(register=False).train(0, STOP)
    whole.accelerator.save_state(str(tmp_path / "half"))
    whole.train(STOP, STEPS)
    resumed = Run(register=False)
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train(STOP, STEPS)
    assert resumed.losses[0] == whole.losses[STOP] and resumed.losses[1:] != whole.losses[STOP + 1 :]


def test_the_file_is_read_without_executing_anything(tmp_path):
    run = Run().train(0, 2)
    run.accelerator.save_state(str(tmp_path / "state"))
    (file,) = Path(tmp_path / "state").glob("custom_checkpoint_*.pkl")
    state = torch.load(file, weights_only=True)
    other = Controller(run.controller.config)
    other.load_state_dict(state)
    assert other.bits() == run.controller.bits() != {}


def test_a_checkpoint_of_another_level_is_told_once(tmp_path):
    Run(level="L2").train(0, 2).accelerator.save_state(str(tmp_path / "state"))
    run = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.accelerator.load_state(str(tmp_path / "state"))
    assert sum(issubclass(one.category, ActNNWarning) for one in caught) == 1
    assert run.controller.steps == 0
    run.train(2, 4)
    assert len(run.controller.history) == 2


def test_a_loop_learns():
    run = Run(update_interval=10).train(0, 60)
    assert sum(run.losses[-5:]) < 0.5 * sum(run.losses[:5])
    assert len(run.controller.history) == 10


def test_trackers_get_the_figures():
    class Tracker(GeneralTracker):
        name = "list"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int, dict[str, float]]] = []

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **kwargs):
            self.rows.append((step, values))

    tracker = Tracker()
    run = Run()
    run.accelerator.log_with = [tracker]
    run.accelerator.init_trackers("run")
    record = hf_actnn.record(run.model)
    for step in range(STEPS):
        run.train(step, step + 1)
        run.accelerator.log(record.metrics(), step=step)
    run.accelerator.end_training()
    assert [step for step, _ in tracker.rows] == list(range(STEPS))
    assert all(
        set(row) == {"actnn_ratio", "actnn_bytes_per_sample", "actnn_bits", "actnn_added_variance"}
        for _, row in tracker.rows
    )
    history = run.controller.history
    assert tracker.rows[-1][1]["actnn_bits"] == history[-1]["average_bits"]
    assert [entry["step"] for entry in record.measured][:2] == [0, 1] and len(record.measured) == 1 + len(history)
