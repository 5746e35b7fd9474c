"""Adaptive bits in the Trainer: stopped and resumed runs, what is logged, and the samples' numbers."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import hf_actnn
from hf_actnn import ActNNCallback, ActNNConfig, ActNNTrainer, ActNNTrainingArguments
from hf_actnn.errors import ActNNWarning, ConfigError
from hf_actnn.precision.controller import Controller
from tests.integrations.small import Pictures, assert_same_weights, make_resnet, make_vit, weights

Dataset = pytest.importorskip("datasets").Dataset
CONFIG = ActNNConfig(level="L3", update_interval=3, min_numel=64)
STOP, STEPS = 6, 12
LOGGED = ("loss", "grad_norm", "learning_rate", "actnn_bits")


def make(
    arguments: Callable[..., dict[str, Any]],
    data: Any,
    config: ActNNConfig | None = CONFIG,
    kind: type[Trainer] = Trainer,
    flags: dict[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    changes = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STOP, **changes}
    made = (ActNNTrainingArguments if flags else TrainingArguments)(**arguments(**changes), **(flags or {}))
    callbacks = [] if config is None else [ActNNCallback(config)]
    return kind(make_resnet(), made, train_dataset=data, callbacks=callbacks)


def run(trainer: Trainer, resume: Path | None = None) -> tuple[Trainer, Controller, list[str]]:
    """Train; the controller, and what we warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    told = [str(one.message) for one in caught if issubclass(one.category, ActNNWarning)]
    return trainer, hf_actnn.controller(trainer.model), told


def checkpoint(trainer: Trainer, to: Path) -> Path:
    """The one in the middle, out of the way of a run that writes into the same folder."""
    shutil.copytree(Path(trainer.args.output_dir) / f"checkpoint-{STOP}", to)
    return to


def logs(trainer: Trainer, *keys: str) -> list[dict[str, float]]:
    return [{key: log.get(key) for key in keys} for log in trainer.state.log_history if "loss" in log]


def assert_same_history(left: Controller, right: Controller) -> None:
    assert len(left.history) == len(right.history)
    for one, other in zip(left.history, right.history, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
        assert all(one[key] == other[key] for key in ("step", "average_bits", "bytes_per_sample"))


# -- stop and resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
@pytest.mark.parametrize("restore", [True, False], ids=["restored", "from the state"])
def test_a_stopped_run_goes_on_bit_for_bit(arguments, data, tmp_path, restore, changes):
    changes = {**changes, "restore_callback_states_from_checkpoint": restore}
    whole, expected, told = run(make(arguments, data, **changes))
    assert told == [] and whole.state.global_step == STEPS
    assert [entry["step"] for entry in expected.history] == [1, 2, 3, 4, 7, 10]
    assert len({entry["bytes_per_sample"] for entry in expected.history}) <= 2
    assert len(set(expected.bits().values())) >= 3

    resumed, found, told = run(make(arguments, data, **changes), checkpoint(whole, tmp_path / "half"))
    assert told == [] and resumed.state.global_step == STEPS
    assert logs(resumed, *LOGGED) == logs(whole, *LOGGED)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert found.bits() == expected.bits() and found.steps == STEPS
    assert_same_history(found, expected)
    for left, right in zip(logs(resumed, "actnn_added_variance"), logs(whole, "actnn_added_variance"), strict=True):
        assert left["actnn_added_variance"] == pytest.approx(right["actnn_added_variance"], rel=1e-9)


def test_without_the_state_the_resumed_run_would_differ(arguments, data, tmp_path, monkeypatch):
    """The test above can tell."""
    whole, expected, _ = run(make(arguments, data))
    monkeypatch.setattr(Controller, "load_state_dict", lambda self, state: None)
    resumed, found, _ = run(make(arguments, data), checkpoint(whole, tmp_path / "half"))
    assert logs(resumed, "loss")[:STOP] == logs(whole, "loss")[:STOP]
    assert logs(resumed, "loss")[STOP:] != logs(whole, "loss")[STOP:]
    assert found.steps == STEPS - STOP and found.bits() != expected.bits()


@pytest.mark.parametrize("level", ["L2", "L2.5"])
def test_other_levels_go_on_bit_for_bit(arguments, data, tmp_path, level):
    config = ActNNConfig(level=level, min_numel=64, update_interval=3)
    whole, _, _ = run(make(arguments, data, config))
    resumed, _, told = run(make(arguments, data, config), checkpoint(whole, tmp_path / "half"))
    assert told == []
    assert logs(resumed, "loss", "grad_norm") == logs(whole, "loss", "grad_norm")
    assert_same_weights(weights(whole.model), weights(resumed.model))


def test_the_checkpoint_is_json_and_small(arguments, data):
    trainer, controller, _ = run(make(arguments, data))
    state = json.loads((Path(trainer.args.output_dir) / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ActNNCallback"]
    assert saved["args"]["config"] == json.loads(CONFIG.to_json_string())
    assert saved["attributes"]["saved"] == json.loads(json.dumps(controller.state_dict()))
    assert len(json.dumps(saved)) < 150_000  # in the steps before an update some hundred values per parameter too


@pytest.mark.parametrize("restore", [True, False])
def test_a_checkpoint_made_without_the_callback(arguments, data, tmp_path, restore):
    plain = make(arguments, data, None, restore_callback_states_from_checkpoint=restore)
    plain.train()
    half = checkpoint(plain, tmp_path / "half")
    trainer, controller, told = run(make(arguments, data, restore_callback_states_from_checkpoint=restore), half)
    assert len(told) == 1, told
    assert "not taken over" in told[0] and "a checkpoint without a state" in told[0]
    assert controller.steps == STEPS - STOP and [entry["step"] for entry in controller.history] == [1, 2, 3, 4]
    # It was saved again, and goes on from there.
    last = json.loads((Path(trainer.args.output_dir) / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert last["stateful_callbacks"]["ActNNCallback"]["attributes"]["saved"]["steps"] == STEPS - STOP
    again = make(arguments, data, max_steps=STEPS + 2, restore_callback_states_from_checkpoint=restore)
    shutil.copytree(Path(trainer.args.output_dir) / f"checkpoint-{STEPS}", tmp_path / "whole")
    _, controller, told = run(again, tmp_path / "whole")
    assert told == [] and controller.steps == STEPS - STOP + 2


@pytest.mark.parametrize(
    "before",
    [{"level": "L2"}, {"level": "L3", "bits": 3}, {"level": "L3", "seed": 1}, {"level": "L3", "bits": "auto"}],
    ids=str,
)
def test_a_checkpoint_of_another_configuration(arguments, data, tmp_path, before):
    first, _, _ = run(make(arguments, data, ActNNConfig(min_numel=64, **before), max_steps=STOP))
    trainer, controller, told = run(make(arguments, data), checkpoint(first, tmp_path / "half"))
    assert len(told) == 1, told
    field, value = list(before.items())[-1]
    assert "not taken over" in told[0] and f"{field}={value!r}" in told[0].split("Received")[1]
    assert controller.config == CONFIG
    assert [entry["step"] for entry in controller.history] == [1, 2, 3, 4]
    last = json.loads((Path(trainer.args.output_dir) / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert last["stateful_callbacks"]["ActNNCallback"]["args"]["config"]["level"] == "L3"


def test_a_restored_callback_brings_its_configuration(arguments, data, tmp_path):
    """What the Trainer's option means: the callback is made anew as the checkpoint describes it."""
    first, _, _ = run(make(arguments, data, ActNNConfig(level="L3", bits=3, min_numel=64), max_steps=STOP))
    trainer = make(arguments, data, restore_callback_states_from_checkpoint=True)
    _, controller, told = run(trainer, checkpoint(first, tmp_path / "half"))
    assert told == [] and controller.config.bits == 3 and controller.steps == STEPS


def test_a_checkpoint_of_l3_goes_on_without_the_callback(arguments, data, tmp_path):
    first, _, _ = run(make(arguments, data))
    plain = make(arguments, data, None)
    plain.train(resume_from_checkpoint=str(checkpoint(first, tmp_path / "half")))
    assert plain.state.global_step == STEPS and not hf_actnn.is_converted(plain.model)


@pytest.mark.parametrize("restore", [True, False])
def test_the_flag_resumes_as_the_callback_does(arguments, data, tmp_path, restore):
    flags = {"actnn": "L3", "actnn_config": {"update_interval": 3, "min_numel": 64}}
    changes = {"kind": ActNNTrainer, "flags": flags, "restore_callback_states_from_checkpoint": restore}
    whole, expected, _ = run(make(arguments, data, None, **changes))
    resumed, found, told = run(make(arguments, data, None, **changes), checkpoint(whole, tmp_path / "half"))
    assert told == []
    assert sum(isinstance(one, ActNNCallback) for one in resumed.callback_handler.callbacks) == 1
    assert logs(resumed, *LOGGED) == logs(whole, *LOGGED)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert found.bits() == expected.bits()
    # The flag does what the callback does.
    shutil.rmtree(whole.args.output_dir)
    other, controller, _ = run(make(arguments, data))
    assert_same_weights(weights(whole.model), weights(other.model))
    assert controller.history == expected.history


def test_training_twice_begins_twice(arguments, data):
    trainer = make(arguments, data, save_strategy="no")
    _, first, told = run(trainer)
    _, second, more = run(trainer)
    assert told == more == []
    assert first is not second and second.steps == STEPS and len(second.history) == len(first.history)


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Trainer, ActNNTrainer])
def test_logs_carry_bits_and_added_variance_after_the_first_update(arguments, data, kind):
    trainer, controller, _ = run(make(arguments, data, save_strategy="no", kind=kind))
    found = [log for log in trainer.state.log_history if "loss" in log]
    assert len(found) == STEPS
    updates = {entry["step"]: entry for entry in controller.history}
    newest = None
    for log in found:  # the controller's turn is before the log of the step
        newest = updates.get(log["step"], newest)
        assert newest is not None
        assert log["actnn_bits"] == newest["average_bits"]
        assert log["actnn_added_variance"] == newest["added_variance"]
        assert 1.5 < log["actnn_bits"] <= 2 and 0 < log["actnn_added_variance"] < 10
    assert len({log["actnn_added_variance"] for log in found}) == len(updates)
    assert not any("actnn_bits" in log for log in trainer.state.log_history if "train_runtime" in log)


def test_logs_before_the_first_update_and_at_other_levels(arguments, data):
    trainer, _, _ = run(make(arguments, data, ActNNConfig(level="L2"), save_strategy="no", max_steps=2))
    assert not any("actnn_bits" in log or "actnn_added_variance" in log for log in trainer.state.log_history)
    callback = ActNNCallback(CONFIG)
    callback.apply(trainer.args, trainer.model)
    written = {"loss": 1.0}
    callback.add_figures(written)
    assert written == {"loss": 1.0}


@pytest.mark.parametrize("config", [{"level": "L3"}, {"level": "L2.5"}, {"bits": "auto"}], ids=str)
def test_it_learns(arguments, config):
    trainer, controller, _ = run(
        make(
            arguments,
            Pictures(64),
            ActNNConfig(update_interval=10, min_numel=64, **config),
            max_steps=40,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            save_strategy="no",
        )
    )
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.5 * losses[0]
    assert [entry["step"] for entry in controller.history] == [1, 2, 3, 5, 9, 11, 21, 31]
    if config.get("bits") == "auto":
        assert all(entry["added_variance"] <= 0.1 for entry in controller.history)


# -- the samples' numbers ---------------------------------------------------------------------------------------------


class Numbered(Pictures):
    """As a torch data set whose items carry their number."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "sample_id": torch.tensor(index), "note": torch.tensor(0)}


def numbered_dataset(count: int) -> Dataset:
    data = Pictures(count)
    return Dataset.from_dict(
        {
            "pixel_values": data.pixels.tolist(),
            "labels": data.labels.tolist(),
            "sample_id": list(range(count)),
            "note": ["not for the model"] * count,
        }
    ).with_format("torch")


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Knows all columns and therefore cannot bring one back that was taken off."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


FLAGS = {"actnn": "L3", "actnn_config": {"update_interval": 3, "min_numel": 64}}
DATA = {"datasets": numbered_dataset, "torch": Numbered}


@pytest.mark.parametrize("kind", DATA)
def test_the_trainer_keeps_the_column_of_numbers(arguments, kind):
    """Two epochs: every sample of the data set is known, and the other unused column is gone."""
    data = DATA[kind](32)
    made = ActNNTrainingArguments(
        **arguments(max_steps=8, eval_strategy="steps", eval_steps=4, remove_unused_columns=True), **FLAGS
    )
    trainer = ActNNTrainer(make_resnet(), made, train_dataset=data, eval_dataset=data, data_collator=collate)
    seen: list[set[str]] = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    _, controller, told = run(trainer)
    assert told == []
    assert controller.table.values.shape == (32,)
    assert controller.table.values.isfinite().all()
    assert controller.table.values.mean() == pytest.approx(1, abs=0.2)
    assert seen and all("sample_id" not in keys and "note" not in keys for keys in seen)
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2 and all(map(math.isfinite, evaluated))

    table = controller.table.values.clone()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-6)
    assert trainer.predict(data).predictions.shape == (32, 4)
    assert torch.equal(controller.table.values, table)  # evaluation teaches nothing


@pytest.mark.parametrize("flags", [None, FLAGS], ids=["plain", "flag"])
def test_evaluation_with_numbers_is_the_plain_one(arguments, flags):
    made = (ActNNTrainingArguments if flags else TrainingArguments)(**arguments(), **(flags or {}))
    trainer = ActNNTrainer(make_resnet(), made, eval_dataset=numbered_dataset(32), data_collator=collate)
    plain = Trainer(make_resnet(), TrainingArguments(**arguments()), eval_dataset=Pictures(32))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_without_the_flag_the_column_is_taken_off(arguments):
    trainer = ActNNTrainer(
        make_resnet(),
        ActNNTrainingArguments(**arguments(max_steps=1)),
        train_dataset=numbered_dataset(32),
        data_collator=collate,
    )
    trainer.train()
    assert not hf_actnn.is_converted(trainer.model)


def test_the_column_is_kept_for_a_callback_too(arguments):
    trainer = ActNNTrainer(
        make_resnet(),
        TrainingArguments(**arguments(max_steps=4)),
        train_dataset=numbered_dataset(32),
        data_collator=collate,
        callbacks=[ActNNCallback(CONFIG)],
    )
    _, controller, _ = run(trainer)
    assert controller.table.values.isfinite().sum() == 32


def test_a_stopped_run_with_numbers_goes_on_bit_for_bit(arguments, tmp_path):
    changes = {"kind": ActNNTrainer, "flags": FLAGS}
    whole, expected, _ = run(make(arguments, Numbered(32), None, **changes))
    half = checkpoint(whole, tmp_path / "half")
    saved = json.loads((half / "trainer_state.json").read_text())["stateful_callbacks"]["ActNNCallback"]
    assert saved["attributes"]["saved"]["table"]
    resumed, found, told = run(make(arguments, Numbered(32), None, **changes), half)
    assert told == []
    assert expected.table.values.isfinite().all()
    assert torch.equal(found.table.values, expected.table.values)
    assert logs(resumed, *LOGGED) == logs(whole, *LOGGED)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    # The numbers matter: without them the run is another one.
    shutil.rmtree(whole.args.output_dir)
    other, _, _ = run(make(arguments, Pictures(32), None, **changes))
    assert logs(other, "loss") != logs(whole, "loss")


# -- reporting tools and the record -----------------------------------------------------------------------------------

FIGURES = ("actnn_ratio", "actnn_bytes_per_sample", "actnn_bits", "actnn_added_variance")


class Tool(TrainerCallback):
    """Stands where the Trainer puts the tools of `report_to`: before the callbacks that it is given."""

    seen: ClassVar[list[dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("kind", [Trainer, ActNNTrainer])
def test_reporting_tools_see_the_figures(arguments, data, kind, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tool)
    monkeypatch.setattr(Tool, "seen", [])
    trainer, _, _ = run(make(arguments, data, save_strategy="no", kind=kind, report_to="tensorboard"))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.index(Tool) < kinds.index(ActNNCallback)
    told = [log for log in Tool.seen if "loss" in log]
    assert len(told) == STEPS and all(set(FIGURES) <= set(log) for log in told)
    assert [{key: log[key] for key in FIGURES} for log in told] == logs(trainer, *FIGURES)


def test_tensorboard_has_the_figures(arguments, data, tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer, _, _ = run(make(arguments, data, save_strategy="no", report_to="tensorboard"))
    (folder,) = {path.parent for path in (tmp_path / "board").rglob("*tfevents*")}
    board = accumulators.EventAccumulator(str(folder))
    board.Reload()
    for key in FIGURES:
        written = [event.value for event in board.Scalars(f"train/{key}")]
        assert written == pytest.approx([log[key] for log in logs(trainer, key)], rel=1e-6)


def test_a_trainer_without_the_callback_logs_what_it_did(arguments, data):
    trainer, _, _ = run(make(arguments, data, save_strategy="no"))
    model = hf_actnn.revert(trainer.model)
    plain = Trainer(model, trainer.args, train_dataset=data)
    plain.train()
    assert not any(key.startswith("actnn") for log in plain.state.log_history for key in log)


def test_the_record_of_a_run(arguments, data, tmp_path):
    trainer, controller, _ = run(make(arguments, data, save_strategy="no"))
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, ActNNCallback))
    found = callback.record.to_dict()
    assert found["steps"] == STEPS and [entry["step"] for entry in found["updates"]] == [1, 2, 3, 4, 7, 10]
    assert {one["name"]: one["bits"][-1] for one in found["tensors"]} == pytest.approx(controller.bits(), abs=5e-4)
    ratios = {entry["uncompressed_bytes"] / entry["saved_bytes"] for entry in found["measured"]}
    assert {log["actnn_ratio"] for log in logs(trainer, "actnn_ratio")} <= ratios
    callback.record.save(tmp_path / "record.html")
    assert "bits by layer" in (tmp_path / "record.html").read_text()


def test_the_arguments_name_a_record(tmp_path, data):
    path = tmp_path / "new" / "folder" / "record.json"  # made at the end, not a reason to lose the run there
    words = ["--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--use_cpu", "--report_to", "none"]
    words += ["--actnn", "L3", "--actnn_record", str(path)]
    (args,) = HfArgumentParser(ActNNTrainingArguments).parse_args_into_dataclasses(words)
    ActNNTrainer(make_vit(), args, train_dataset=data).train()
    assert json.loads(path.read_text())["steps"] == 3
    with pytest.raises(ConfigError, match=r"\.html"):
        ActNNTrainingArguments(str(tmp_path), actnn="L3", actnn_record="record.pdf")
    with pytest.raises(ConfigError, match="nothing to record"):
        ActNNTrainingArguments(str(tmp_path), actnn_record="record.json")


def test_the_stopped_run_has_the_whole_record(arguments, data, tmp_path):
    whole, expected, _ = run(make(arguments, data))
    _, found, _ = run(make(arguments, data), checkpoint(whole, tmp_path / "half"))
    assert found.chosen == expected.chosen and len(found.chosen) >= 3
