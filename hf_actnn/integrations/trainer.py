"""Compressed activations in the Hugging Face Trainer: a callback, a flag, and a Trainer that reads the flag.

One class does the work, `ActNNCallback`. It converts the model as soon as the Trainer exists, which is before the
optimizer, the distributed wrapper and anything else that looks at the model; measures one training forward; and adds
what it measured to the Trainer's logs. The flag and the mixin only decide whether such a callback is there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from hf_actnn.config import ActNNConfig
from hf_actnn.convert import controller, convert
from hf_actnn.errors import ConfigError, NotAvailableError, message
from hf_actnn.integrations.accelerate import no_engine
from hf_actnn.nn.mixin import SAMPLE_ID
from hf_actnn.precision.controller import Controller
from hf_actnn.record import Record
from hf_actnn.record.record import check_ending


def _inner(model: nn.Module) -> nn.Module:
    """The model inside whatever wraps it, a compiled form included."""
    return cast(nn.Module, extract_model_from_parallel(model, keep_torch_compile=False))


class ActNNCallback(TrainerCallback, ExportableState):
    """Trains a Trainer's model with compressed activations: `Trainer(..., callbacks=[ActNNCallback("L3")])`.

    The Trainer's model is converted in place when the Trainer is made. A model that appears later (from `model_init`,
    in each trial of a hyper-parameter search), or that of a Trainer that gets the callback through `add_callback`, is
    converted when training begins. The callback's configuration always applies: a model that was converted before is
    reconfigured.

    The first training forward of every `train()` is measured, and the Trainer's training logs then carry

    * `actnn_ratio`: bytes autograd would have kept for the backward pass over the bytes that are kept,
    * `actnn_bytes_per_sample`: bytes kept, per sample of the batch.

    At the levels that choose bits (L2.5 and up, `bits="auto"`) the callback drives the model's controller, once per
    optimizer step, and the logs carry

    * `actnn_bits`: bits per quantised value, on average,
    * `actnn_added_variance`: the variance that quantisation adds to the gradient, as a share of the mini-batch's own.

    The controller's state travels in the Trainer's checkpoints, so that a resumed run goes on with the same bits and
    the same rounding. Resuming from a checkpoint that has none, or one of another configuration, gives a warning.

    They reach `state.log_history`, the reporting tools of `report_to` and every other callback. After a run
    `callback.record.save("bits.html")` writes a page of it, with the bits of each layer over time.

    Args:
        config: a level ("L0", "L1", "L2", "L2.5", "L3", "L4", "L5"), an `ActNNConfig`, a dict of its fields, or the
            path of a JSON file.

    Attributes:
        record: of the training that runs, or of the last one; None before the first.

    Raises:
        ConfigError: a configuration that means nothing.
    """

    def __init__(self, config: ActNNConfig | str | dict[str, Any] | None = None) -> None:
        self.config = ActNNConfig.resolve(config)
        self.record: Record | None = None
        #: What a checkpoint held of the controller, when the Trainer makes the callback anew from it.
        self.saved: dict[str, Any] | None = None
        self._controller: Controller | None = None

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint: the configuration, and the controller's state once there is a model."""
        saved = self._controller.state_dict() if self._controller is not None else self.saved
        return {"args": {"config": self.config.to_dict()}, "attributes": {"saved": saved}}

    def apply(self, args: TrainingArguments, model: nn.Module) -> None:
        """Convert the model inside whatever wraps it.

        Raises:
            NotAvailableError: the Trainer is going to hand the model to DeepSpeed.
            ConversionError: the model has nothing that can be converted.
        """
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise NotAvailableError(no_engine("DeepSpeed", "TrainingArguments.deepspeed"))
        self._controller = controller(convert(_inner(model), self.config))

    def add_figures(self, logs: dict[str, Any]) -> None:
        """Add what was measured to a training log; evaluation logs and the closing summary stay as they are."""
        if "loss" in logs and self.record is not None:
            logs.update(self.record.metrics())

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Convert before the Trainer makes the optimizer and wraps the model."""
        self.apply(args, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Convert a model that came after the Trainer was made, and get ready to measure.

        Parameters stay the same objects: an optimizer or a distributed wrapper that holds them is not disturbed.
        """
        self.apply(args, kwargs["model"])
        self._resume(state)
        if self.record is not None:
            self.record.close()
        # A hook that counts would be compiled too.
        self.record = Record(_inner(kwargs["model"]), measures=not args.torch_compile)

    def _resume(self, state: TrainerState) -> None:
        """Hand the controller what the checkpoint holds, whether or not the Trainer restored the callback from it."""
        name = type(self).__name__
        known: Any = state.stateful_callbacks
        entry = known.get(name) if isinstance(known, dict) else None
        if isinstance(entry, list):
            entry = entry[0] if entry else None
        found = self.saved or ((entry or {}).get("attributes") or {}).get("saved")
        if state.global_step > 0 and self._controller is not None:
            self._controller.load_state_dict(found or {})
        self.saved = None
        if isinstance(known, dict):
            # The Trainer takes for granted, when it saves, that every callback was there before.
            known[name] = self.state()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All backward passes of the step have run: the controller's turn."""
        if self._controller is not None:
            self._controller.step()
        if self.record is not None:
            self.record.follow()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the history, which was written just before callbacks are told."""
        if logs is not None and state.log_history and state.log_history[-1].get("step") == state.global_step:
            self.add_figures(state.log_history[-1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the record that the arguments ask for, and leave no hook behind when no forward ever came."""
        if self.record is not None:
            self.record.close()
            path = getattr(args, "actnn_record", None)
            if path is not None and state.is_world_process_zero:
                self.record.save(path)


def _add_figures_first(handler: type[CallbackHandler]) -> None:
    """Have the figures in a log before any callback is told of it.

    The reporting tools of `report_to` stand in front of the callbacks that a Trainer is given, and a callback has no
    way to the list that it is in. Handlers without an `ActNNCallback` do what they did.
    """
    tell = handler.on_log

    @functools.wraps(tell)
    def on_log(self: Any, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> Any:
        for callback in self.callbacks:
            if isinstance(callback, ActNNCallback):
                callback.add_figures(logs)
        return tell(self, args, state, control, logs, **kwargs)

    handler.on_log = on_log  # type: ignore[method-assign]


def _refuse_unread_flag(handler: type[CallbackHandler]) -> None:
    """Have a training stopped whose arguments carry the flag and whose Trainer does not read it."""
    tell = handler.on_train_begin

    @functools.wraps(tell)
    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        asked = config_of(args) if isinstance(args, ActNNTrainingArguments) else None
        found = [callback.config for callback in self.callbacks if isinstance(callback, ActNNCallback)]
        if asked is not None and asked not in found:
            raise ConfigError(
                message(
                    "the arguments ask for compressed activations, and this Trainer does not read them",
                    where="Trainer.train",
                    expected="an ActNNTrainer, or a class with ActNNTrainerMixin in front",
                    received=f"actnn={args.actnn!r}, actnn_config={args.actnn_config!r} in ActNNTrainingArguments",
                    next_step="Make it an ActNNTrainer, or pass callbacks=[ActNNCallback(...)] and no flag",
                )
            )
        return tell(self, args, state, control, **kwargs)

    handler.on_train_begin = on_train_begin  # type: ignore[method-assign]


_add_figures_first(CallbackHandler)
_refuse_unread_flag(CallbackHandler)


@dataclass
class ActNNTrainingArguments(TrainingArguments):
    """TrainingArguments with a flag for compressed activations; `HfArgumentParser` then takes `--actnn L2`.

    They are for an `ActNNTrainer`. Another Trainer refuses to train with the flag set, as it would not read it.

    Args:
        actnn: the level, "L0", "L1", "L2", "L2.5", "L3", "L4", "L5" or "auto". Nothing is compressed while this
            and `actnn_config` are None.
        actnn_config: fields of `ActNNConfig` as a dict or JSON object, or the path of a JSON file. A level in `actnn`
            replaces the one in here.
        actnn_record: where to write the record of the run when it ends: a page (.html), a picture (.png) or numbers
            (.json).

    Raises:
        ConfigError: at construction, if they mean nothing.
    """

    # What TrainingArguments itself turns from a JSON string into a dict. No annotation: it is no field.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "actnn_config"]  # noqa: RUF012

    actnn: str | None = field(
        default=None,
        metadata={
            "help": "Keep activations for backward in few bits: L0, L1, L2, L2.5, L3, L4, L5 or auto. "
            "Off unless this or actnn_config is given."
        },
    )
    actnn_config: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of hf_actnn.ActNNConfig: a JSON object or the path of a JSON file."},
    )

    actnn_record: str | None = field(
        default=None,
        metadata={"help": "Where to write the bits by layer over time, at the end: .html, .png or .json."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is wrong should stop the script here, not after the data has been read.
        config = config_of(self)
        if self.actnn_record is not None:
            check_ending(Path(self.actnn_record), "actnn_record")
            if config is None:
                raise ConfigError(
                    message(
                        "there is nothing to record",
                        where="actnn_record",
                        expected="actnn or actnn_config beside it",
                        received="neither",
                        next_step="Name a level, as in --actnn L3",
                    )
                )


def config_of(args: TrainingArguments) -> ActNNConfig | None:
    """The configuration that training arguments ask for, or None if they ask for none.

    Raises:
        ConfigError: it means nothing.
    """
    level, fields = getattr(args, "actnn", None), getattr(args, "actnn_config", None)
    if level is None and fields is None:
        return None
    config = ActNNConfig.resolve(fields)
    return config if level is None else config.replace(level=level)


# A mixin for Trainers: type checkers see what it relies on, while at run time any class may stand behind it.
if TYPE_CHECKING:
    _Behind = Trainer
else:
    _Behind = object


class ActNNTrainerMixin(_Behind):
    """Gives any Trainer the flag: `class MyTrainer(ActNNTrainerMixin, SomeTrainer)`.

    With `args.actnn` or `args.actnn_config` set it behaves as if an `ActNNCallback` had been passed, and also converts
    the models of `model_init` before they are wrapped, and follows the arguments that a hyper-parameter search sets per
    trial. With neither set it changes nothing.
    """

    _actnn: ActNNCallback | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow_arguments()

    def _follow_arguments(self) -> None:
        """Make the callbacks and the model agree with the arguments as they are now."""
        config = config_of(self.args)
        found = [cb for cb in self.callback_handler.callbacks if isinstance(cb, ActNNCallback)]
        if self._actnn is not None and self._actnn not in found:
            self._actnn = found[0] if found else None  # made anew by the Trainer, from a checkpoint
        passed = next((cb for cb in found if cb is not self._actnn), None)
        if passed is not None and config is not None and passed.config != config:
            raise ConfigError(
                message(
                    "Compressed activations are turned on twice, in different ways",
                    where=type(self).__name__,
                    expected="either an ActNNCallback or the flag in the arguments",
                    received=f"callback {passed.config} and arguments {config}",
                    next_step="Drop one of them",
                )
            )
        if self._actnn is not None and (passed is not None or config is None or self._actnn.config != config):
            self.remove_callback(self._actnn)
            self._actnn = None
        if config is not None and passed is None:
            if self._actnn is None:
                self._actnn = ActNNCallback(config)
                self.add_callback(self._actnn)
            self._actnn.apply(self.args, cast(nn.Module, self.model))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Convert once more before making the optimizer.

        This is the last moment before the model is wrapped, after `model_init` has made a new model and after a
        hyper-parameter search has set this trial's arguments.
        """
        self._follow_arguments()
        return super().create_optimizer(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Let a column `sample_id` through to the converted model, which takes it off before its forward pass."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        compresses = any(isinstance(callback, ActNNCallback) for callback in self.callback_handler.callbacks)
        if columns is not None and SAMPLE_ID not in columns and compresses:
            columns.append(SAMPLE_ID)


class ActNNTrainer(ActNNTrainerMixin, Trainer):
    """The Hugging Face Trainer with the flag of `ActNNTrainingArguments`."""
