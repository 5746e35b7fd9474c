"""The callback, the flag and the mixin in the Hugging Face Trainer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import hf_actnn
from hf_actnn import ActNNCallback, ActNNConfig, ActNNTrainer, ActNNTrainingArguments
from hf_actnn.errors import ConfigError
from hf_actnn.integrations.trainer import ActNNTrainerMixin
from tests.integrations.small import Pictures, assert_same_weights, make_resnet, make_vit, weights

ROOT = Path(__file__).resolve().parents[2]


def train(trainer: Trainer, **kwargs: Any) -> dict[str, torch.Tensor]:
    trainer.train(**kwargs)
    return weights(trainer.model)


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def total_saved(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Bytes kept by one training forward, and the ratio, measured here and not by the callback."""
    model.train()
    with hf_actnn.track_memory(model) as memory:
        loss = model(**batch).loss
        kept, ratio = memory.saved_bytes, memory.ratio
    del loss
    return kept, ratio


# -- when the model is converted -------------------------------------------------------------------------------------


class WatchedTrainer(Trainer):
    """Notes whether the model was converted when the optimizer was made."""

    seen: list[bool]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), hf_actnn.is_converted(self.model)]
        return super().create_optimizer(*args, **kwargs)


def test_callback_converts_when_the_trainer_is_made(arguments, data):
    model = make_vit()
    trainer = WatchedTrainer(
        model, TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback("L2")]
    )
    assert trainer.model is model
    assert hf_actnn.is_converted(model)
    trainer.train()
    assert trainer.seen == [True]


def test_callback_class_without_arguments_chooses_bits(arguments, data):
    trainer = Trainer(make_vit(), TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback])
    callback = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, ActNNCallback))
    assert callback.config == ActNNConfig(bits="auto")
    assert hf_actnn.is_converted(trainer.model)


def test_callback_added_later_still_converts(arguments, data):
    trainer = Trainer(make_vit(), TrainingArguments(**arguments()), train_dataset=data)
    trainer.add_callback(ActNNCallback("L2"))
    assert not hf_actnn.is_converted(trainer.model)
    trainer.train()
    assert hf_actnn.is_converted(trainer.model)
    assert training_logs(trainer)[0]["actnn_ratio"] > 2


@pytest.mark.parametrize("with_flag", [False, True], ids=["callback", "flag"])
def test_every_model_of_model_init_is_converted(arguments, data, with_flag):
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(make_vit())
        return made[-1]

    if with_flag:
        trainer: Trainer = type("Watched", (ActNNTrainerMixin, WatchedTrainer), {})(
            model_init=model_init, args=ActNNTrainingArguments(**arguments(), actnn="L2"), train_dataset=data
        )
    else:
        trainer = WatchedTrainer(
            model_init=model_init,
            args=TrainingArguments(**arguments()),
            train_dataset=data,
            callbacks=[ActNNCallback("L2")],
        )
    # What a hyper-parameter search does: train() again and again, a new model each time.
    for trial in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        assert len(made) == trial + 2  # one more was made by the constructor
        assert hf_actnn.is_converted(made[-1])
        assert training_logs(trainer)[0]["actnn_ratio"] > 2
    if with_flag:
        assert trainer.seen == [True, True]  # before the optimizer


def test_a_search_over_levels_is_followed(arguments, data):
    trainer = ActNNTrainer(
        model_init=lambda: make_vit(),
        args=ActNNTrainingArguments(**arguments(max_steps=1), actnn="L2"),
        train_dataset=data,
    )
    ratios = []
    for level in ("L2", None, "L1"):
        trainer.args.actnn = level  # as a hyper-parameter search sets a trial's arguments
        trainer.train()
        assert hf_actnn.is_converted(trainer.model) is (level is not None)
        ratios.append(training_logs(trainer)[0].get("actnn_ratio"))
    assert ratios[1] is None
    assert ratios[0] > ratios[2] > 1


def test_callback_reconfigures_a_converted_model(arguments, data):
    batch = torch.utils.data.default_collate([data[index] for index in range(8)])
    model = hf_actnn.convert(make_vit(), bits=8)
    at_eight, _ = total_saved(model, batch)
    trainer = Trainer(
        model, TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback({"bits": 2})]
    )
    at_two, _ = total_saved(trainer.model, batch)
    assert at_two < 0.6 * at_eight


def test_torch_compile(arguments, data):
    """The Trainer compiles the converted model, and its losses are those of compiling the plain one."""
    losses = []
    for callbacks in ([], [ActNNCallback({"level": "L2", "bits": 8})]):
        torch._dynamo.reset()
        arguments_ = TrainingArguments(**arguments(max_steps=2), torch_compile=True)
        trainer = Trainer(make_vit(dropout=0.0, layers=1), arguments_, train_dataset=data, callbacks=callbacks)
        trainer.train()
        losses.append([log["loss"] for log in training_logs(trainer)])
        assert hf_actnn.is_converted(trainer.model) == bool(callbacks)
    assert losses[1][0] == losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# -- the flag --------------------------------------------------------------------------------------------------------


def parse(*words: str) -> ActNNTrainingArguments:
    return HfArgumentParser(ActNNTrainingArguments).parse_args_into_dataclasses(list(words))[0]


def test_flag_on_the_command_line(tmp_path, data, arguments):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    assert parse(*words).actnn is None
    parsed = parse(*words, "--actnn", "L2")
    assert parsed.actnn == "L2"
    trainer = ActNNTrainer(make_vit(), parsed, train_dataset=data)
    assert hf_actnn.is_converted(trainer.model)


@pytest.mark.parametrize("as_file", [False, True])
def test_flag_takes_fields(tmp_path, data, as_file):
    fields = json.dumps({"bits": 3, "skip": ["classifier"]})
    if as_file:
        path = tmp_path / "fields.json"
        path.write_text(fields)
        fields = str(path)
    parsed = parse("--output_dir", str(tmp_path), "--use_cpu", "--actnn_config", fields)
    trainer = ActNNTrainer(make_vit(), parsed, train_dataset=data)
    assert trainer._actnn.config == ActNNConfig(bits=3, skip=("classifier",))


def test_flag_sets_the_level_over_the_fields(tmp_path, data):
    parsed = parse("--output_dir", str(tmp_path), "--use_cpu", "--actnn", "L1", "--actnn_config", '{"group_size": 128}')
    trainer = ActNNTrainer(make_vit(), parsed, train_dataset=data)
    assert trainer._actnn.config == ActNNConfig(level="L1", group_size=128)


def test_arguments_survive_json(arguments):
    made = ActNNTrainingArguments(**arguments(), actnn="L1", actnn_config={"seed": 5})
    again = HfArgumentParser(ActNNTrainingArguments).parse_dict(
        json.loads(made.to_json_string()), allow_extra_keys=True
    )[0]
    assert (again.actnn, again.actnn_config) == ("L1", {"seed": 5})


def test_without_the_flag_nothing_changes(arguments, data):
    for made in (ActNNTrainingArguments(**arguments()), TrainingArguments(**arguments())):
        trainer = ActNNTrainer(make_vit(), made, train_dataset=data)
        trainer.train()
        assert not hf_actnn.is_converted(trainer.model)
        assert "actnn_ratio" not in training_logs(trainer)[0]


@pytest.mark.parametrize(
    ("flag", "error", "says"),
    [
        ({"actnn": "L9"}, ConfigError, "L9"),
        ({"actnn_config": {"bits": 9}}, ConfigError, "9"),
        ({"actnn_config": {"bitz": 2}}, ConfigError, "bitz"),
        ({"actnn_config": "missing.json"}, ConfigError, "missing.json"),
    ],
)
def test_a_wrong_flag_stops_at_once(arguments, flag, error, says):
    with pytest.raises(error, match=says):
        ActNNTrainingArguments(**arguments(), **flag)


def test_flag_and_callback_must_agree(arguments, data):
    made = ActNNTrainingArguments(**arguments(), actnn="L1")
    with pytest.raises(ConfigError, match="twice"):
        ActNNTrainer(make_vit(), made, train_dataset=data, callbacks=[ActNNCallback("L2")])
    trainer = ActNNTrainer(make_vit(), made, train_dataset=data, callbacks=[ActNNCallback("L1")])
    assert sum(isinstance(cb, ActNNCallback) for cb in trainer.callback_handler.callbacks) == 1


def test_a_trainer_that_does_not_read_the_flag_refuses_to_train(arguments, data):
    made = ActNNTrainingArguments(**arguments(), actnn="L2")
    with pytest.raises(ConfigError, match="ActNNTrainer"):
        Trainer(make_vit(), made, train_dataset=data).train()
    trainer = Trainer(make_vit(), made, train_dataset=data, callbacks=[ActNNCallback("L2")])  # does what it asks for
    trainer.train()
    assert training_logs(trainer)[0]["actnn_ratio"] > 2
    with pytest.raises(ConfigError, match="ActNNTrainer"):
        Trainer(make_vit(), made, train_dataset=data, callbacks=[ActNNCallback("L1")]).train()
    Trainer(make_vit(), ActNNTrainingArguments(**arguments()), train_dataset=data).train()


class OwnLossTrainer(Trainer):
    """A Trainer subclass with a constructor and a loss of its own."""

    def __init__(self, weight: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = weight
        self.losses = 0

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.losses += 1
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = self.weight * nn.functional.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


def test_mixin_gives_any_trainer_the_flag(arguments, data):
    class Mine(ActNNTrainerMixin, OwnLossTrainer):
        pass

    trainer = Mine(0.5, make_vit(), ActNNTrainingArguments(**arguments(), actnn="L2"), train_dataset=data)
    trainer.train()
    assert hf_actnn.is_converted(trainer.model)
    assert trainer.losses == 4
    assert training_logs(trainer)[0]["actnn_ratio"] > 2


def test_callback_in_a_subclassed_trainer(arguments, data):
    trainer = OwnLossTrainer(
        0.5, make_vit(), TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback("L2")]
    )
    trainer.train()
    assert trainer.losses == 4
    assert training_logs(trainer)[0]["actnn_ratio"] > 2


# -- training is the same training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_vit, make_resnet])
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2, "max_steps": 2}], ids=["plain", "accumulation"]
)
def test_l0_trains_to_the_same_bits(arguments, data, make, changes):
    """Nothing the callback does, measuring included, disturbs random numbers, data order or gradients."""
    plain = train(Trainer(make(), TrainingArguments(**arguments(**changes)), train_dataset=data))
    ours = train(
        Trainer(make(), TrainingArguments(**arguments(**changes)), train_dataset=data, callbacks=[ActNNCallback("L0")])
    )
    assert_same_weights(plain, ours)


@pytest.mark.parametrize("make", [make_vit, make_resnet])
def test_l2_learns(arguments, make):
    trainer = Trainer(
        make(),
        TrainingArguments(**arguments(max_steps=40, learning_rate=2e-3, per_device_train_batch_size=16)),
        train_dataset=Pictures(64),
        callbacks=[ActNNCallback("L2")],
    )
    trainer.train()
    losses = [log["loss"] for log in training_logs(trainer)]
    assert losses[-1] < 0.5 * losses[0]


def test_accumulation_changes_neither_the_figures_nor_the_gradient(arguments, data):
    """Two halves of a batch give the gradient of the whole, up to the rounding of 8 bits."""
    results = []
    for changes in ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 2}):
        gradients: dict[str, torch.Tensor] = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})  # noqa: B023

        trainer = Trainer(
            make_vit(dropout=0.0),
            TrainingArguments(**arguments(max_steps=1, **changes)),
            train_dataset=data,
            callbacks=[ActNNCallback({"bits": 8}), Keep()],
        )
        trainer.train()
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        results.append((flat, training_logs(trainer)[0]["actnn_bytes_per_sample"]))
    (whole, bytes_whole), (halves, bytes_halves) = results
    assert torch.cosine_similarity(whole, halves, dim=0) > 0.999
    assert bytes_halves == pytest.approx(bytes_whole, rel=0.1)


@pytest.mark.parametrize("how", ["callback", "model_init"])
def test_bf16(arguments, data, how):
    """Autocast is put around the model's forward by accelerate; conversion before and after that keeps the same."""
    given = {"model": make_vit()} if how == "callback" else {"model_init": lambda: make_vit()}
    trainer = Trainer(
        **given,
        args=TrainingArguments(**arguments(bf16=True)),
        train_dataset=data,
        callbacks=[ActNNCallback("L2")],
    )
    trainer.train()
    logs = training_logs(trainer)
    assert logs[0]["actnn_ratio"] > 2
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs)
    pixels = next(iter(trainer.get_train_dataloader()))
    kept, _ = total_saved(trainer.model, pixels)
    assert kept / 8 == pytest.approx(logs[0]["actnn_bytes_per_sample"], rel=0.02)


def test_activation_checkpointing_through_the_trainer(arguments, data):
    # An older name of the switch.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    switch = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"

    def run(callbacks: list) -> Trainer:
        trainer = Trainer(
            make_vit(),
            TrainingArguments(**arguments(**{switch: True})),
            train_dataset=data,
            callbacks=callbacks,
        )
        trainer.train()
        return trainer

    plain, ours = run([]), run([ActNNCallback("L0")])
    assert_same_weights(weights(plain.model), weights(ours.model))
    assert torch.isfinite(torch.tensor(training_logs(run([ActNNCallback("L2")]))[-1]["loss"]))


# -- evaluation and prediction ---------------------------------------------------------------------------------------


def test_evaluation_and_prediction_inside_training_store_nothing(arguments, data):
    kept: list[int] = []

    class Tracked(Trainer):
        def prediction_step(self, model, *args, **kwargs):
            with hf_actnn.track_memory(model) as memory:
                result = super().prediction_step(model, *args, **kwargs)
                kept.append(memory.saved_bytes)
            return result

    trainer = Tracked(
        make_vit(),
        TrainingArguments(**arguments(eval_strategy="steps", eval_steps=1, eval_on_start=True)),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[ActNNCallback("L2")],
    )
    trainer.train()
    ours = trainer.predict(data).predictions
    assert len(kept) == 2 * (1 + 4) + 2
    assert set(kept) == {0}
    assert [log for log in trainer.state.log_history if "eval_loss" in log]
    assert not any("actnn_ratio" in log for log in trainer.state.log_history if "eval_loss" in log)

    plain = hf_actnn.revert(trainer.model).eval()
    with torch.no_grad():
        expected = torch.cat([plain(data.pixels[start : start + 16]).logits for start in (0, 16)])
    assert torch.equal(torch.from_numpy(ours), expected)


# -- what is logged --------------------------------------------------------------------------------------------------


def test_logs_carry_what_was_measured(arguments, data):
    seen: list[dict[str, float]] = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = Trainer(
        make_vit(), TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback("L2"), Reader()]
    )
    trainer.train()
    kept, ratio = total_saved(trainer.model, torch.utils.data.default_collate([data[index] for index in range(8)]))
    for log in training_logs(trainer) + [log for log in seen if "loss" in log]:
        assert log["actnn_ratio"] == pytest.approx(ratio, rel=0.02)
        assert log["actnn_bytes_per_sample"] == pytest.approx(kept / 8, rel=0.02)
    assert not any("actnn_ratio" in log for log in seen if "train_runtime" in log)
    json.dumps(trainer.state.log_history)


def test_reporting_tools_see_the_figures_with_the_flag(arguments, data):
    """Reporting tools come first in the list of callbacks."""
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = ActNNTrainer(make_vit(), ActNNTrainingArguments(**arguments(), actnn="L2"), train_dataset=data)
    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    assert seen[0]["actnn_ratio"] > 2


def test_a_forward_that_raises_leaves_no_hook_behind(arguments, data):
    model = make_vit()
    trainer = Trainer(model, TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback("L2")])
    forward = model.classifier.forward

    def broken(*args: Any) -> torch.Tensor:
        raise MemoryError("no more")

    model.classifier.forward = broken
    hooks_before = (len(model._forward_hooks), len(model._forward_pre_hooks))
    with pytest.raises(MemoryError, match="no more"):
        trainer.train()
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks_before
    # Nothing is left on this thread: a tensor saved now is the tensor given back.
    x = torch.randn(4096, requires_grad=True)
    y = x.exp()
    assert y.grad_fn._saved_result is not None
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], x.detach().exp())
    model.classifier.forward = forward
    trainer.train()
    assert training_logs(trainer)[0]["actnn_ratio"] > 2


# -- saving and resuming ---------------------------------------------------------------------------------------------


def test_saved_model_is_plain_and_loads_without_the_package(arguments, data, tmp_path):
    trainer = Trainer(make_vit(), TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback("L2")])
    trainer.train()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert "actnn" not in json.dumps(config).lower()

    trainer.model.eval()
    with torch.no_grad():
        torch.save({"pixels": data.pixels, "logits": trainer.model(data.pixels).logits}, tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["hf_actnn"] = None  # not there
import torch
from transformers import AutoModelForImageClassification
model, loading = AutoModelForImageClassification.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(model.eval()(expected["pixels"]).logits, expected["logits"])
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ViTForImageClassification"


def test_a_loaded_model_is_plain_here_too(arguments, data, tmp_path):
    trainer = Trainer(
        make_resnet(), TrainingArguments(**arguments()), train_dataset=data, callbacks=[ActNNCallback("L2")]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert not hf_actnn.is_converted(loaded)
    assert_same_weights(weights(trainer.model), weights(loaded))


def checkpointed(arguments: Any, **changes: Any) -> dict[str, Any]:
    return arguments(save_strategy="steps", save_steps=2, **changes)


@pytest.mark.parametrize("first", ["callback", "none"])
def test_resume_goes_on_as_if_never_stopped(arguments, data, first):
    """At L0 gradients are exact, so the resumed run must end on the very bits, whatever the first half ran with."""
    whole = train(Trainer(make_resnet(), TrainingArguments(**arguments()), train_dataset=data))
    before = [ActNNCallback("L0")] if first == "callback" else []
    Trainer(make_resnet(), TrainingArguments(**checkpointed(arguments)), train_dataset=data, callbacks=before).train()
    checkpoint = Path(arguments()["output_dir"]) / "checkpoint-2"
    trainer = Trainer(
        make_resnet(),
        TrainingArguments(**checkpointed(arguments)),
        train_dataset=data,
        callbacks=[ActNNCallback("L0")],
    )
    resumed = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert [log["step"] for log in training_logs(trainer)] == [1, 2, 3, 4]
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("restore", [False, True])
def test_resume_at_l2_logs_and_saves_again(arguments, data, restore):
    made = TrainingArguments(**checkpointed(arguments), restore_callback_states_from_checkpoint=restore)
    Trainer(make_resnet(), made, train_dataset=data).train()  # a checkpoint made without the callback
    trainer = ActNNTrainer(
        make_resnet(),
        ActNNTrainingArguments(**checkpointed(arguments), restore_callback_states_from_checkpoint=restore, actnn="L2"),
        train_dataset=data,
    )
    trainer.train(resume_from_checkpoint=str(Path(made.output_dir) / "checkpoint-2"))
    assert training_logs(trainer)[-1]["actnn_ratio"] > 2
    assert (Path(made.output_dir) / "checkpoint-4" / "model.safetensors").exists()


def test_best_model_is_loaded_at_the_end(arguments, data):
    trainer = Trainer(
        make_resnet(),
        TrainingArguments(**checkpointed(arguments), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[ActNNCallback("L2")],
    )
    trainer.train()
    best = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert hf_actnn.is_converted(trainer.model)
    assert_same_weights(weights(best), weights(trainer.model))
