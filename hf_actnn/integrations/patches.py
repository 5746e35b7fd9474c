"""What `hf_actnn_startup` changes in modules of transformers and accelerate when they have been imported.

Each function takes the module. None imports anything that the script does not import itself.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from hf_actnn.config import AUTO, LEVELS
from hf_actnn.convert import is_converted
from hf_actnn.errors import ConversionError, NotAvailableError, message
from hf_actnn.integrations.unmodified import process

#: The Trainers there are, and whether their models are compressed here. Each prepares its model with accelerate too.
_TRAINERS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def patch_trainer(module: Any) -> None:
    """A Trainer of any class gets an `ActNNCallback`, unless the script turns compression on itself."""
    process.config()  # a wrong one should stop the script here, not after the data has been read
    construct = module.Trainer.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        _compress(self)

    module.Trainer.__init__ = __init__


def _compress(trainer: Any) -> None:
    from hf_actnn.integrations.trainer import ActNNCallback, config_of

    model = trainer.model
    callbacks = trainer.callback_handler.callbacks
    own = any(isinstance(callback, ActNNCallback) for callback in callbacks)
    own = own or (is_converted(model) and not process.follows(model))
    _TRAINERS[trainer] = not own and config_of(trainer.args) is None
    if not _TRAINERS[trainer]:
        process.leave_to_script(f"the model of {type(trainer).__name__}")
        return
    _check_compiler(trainer.accelerator, type(trainer).__name__, 'Give the Trainer callbacks=[ActNNCallback("L2")]')
    callback = ActNNCallback(process.config())
    try:
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    except ConversionError as error:
        process.refuse(model, error)
        return
    process.follow(model, callback.config)
    callbacks.insert(0, callback)  # before those that print and log, so that they have its figures


def patch_parser(module: Any) -> None:
    """`--actnn` in scripts whose parser fills TrainingArguments, where they do not have it."""
    construct, parse_dict = module.HfArgumentParser.__init__, module.HfArgumentParser.parse_dict

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if _fills_training_arguments(self) and "--actnn" not in self._option_string_actions:
            self.add_argument("--actnn", action=_TakeLevel, choices=[*LEVELS, AUTO], help="level of compression")
            self._takes_actnn = True

    @functools.wraps(parse_dict)
    def take_level(self: Any, args: dict[str, Any], *more: Any, **kwargs: Any) -> Any:
        if getattr(self, "_takes_actnn", False) and "actnn" in args:
            process.level = args["actnn"]
            process.config()
            args = {key: value for key, value in args.items() if key != "actnn"}
        return parse_dict(self, args, *more, **kwargs)

    module.HfArgumentParser.__init__, module.HfArgumentParser.parse_dict = __init__, take_level


class _TakeLevel(argparse.Action):
    """Keeps the level for this process; the script's namespace does not show it."""

    def __init__(self, option_strings: Any, dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, metavar="LEVEL", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        process.level = values


def _fills_training_arguments(parser: Any) -> bool:
    module = sys.modules.get("transformers.training_args")
    return module is not None and any(issubclass(one, module.TrainingArguments) for one in parser.dataclass_types)


def patch_accelerator(module: Any) -> None:
    """`prepare` converts what will be trained, and a prepared optimizer's step drives the controllers."""
    process.config()
    prepare, prepare_model = module.Accelerator.prepare, module.Accelerator.prepare_model
    step = module.AcceleratedOptimizer.step

    @functools.wraps(prepare)
    def convert_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        for one in args:
            _convert(self, one)
        return prepare(self, *args, **kwargs)

    @functools.wraps(prepare_model)
    def convert_one(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("evaluation_mode", args[1] if len(args) > 1 else False):
            _convert(self, model)
        return prepare_model(self, model, *args, **kwargs)

    @functools.wraps(step)
    def drive(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.gradient_state.sync_gradients:  # accumulating: no step yet
            return step(self, *args, **kwargs)
        held = {id(one) for group in self.param_groups for one in group["params"]}
        process.about_to_step(held)
        result = step(self, *args, **kwargs)
        if not self.step_was_skipped:
            process.stepped(held, speaks=self.accelerator_state.is_main_process)
        return result

    module.Accelerator.prepare, module.Accelerator.prepare_model = convert_all, convert_one
    module.AcceleratedOptimizer.step = drive


def _convert(accelerator: Any, model: Any) -> None:
    trainer = next((one for one in _TRAINERS if one.accelerator is accelerator), None)
    if not isinstance(model, nn.Module) or (trainer is not None and not _TRAINERS[trainer]) or not process.wants(model):
        return
    # Not before: accelerate itself is being imported when this module is.
    from hf_actnn.integrations.accelerate import check_supported, keep_state

    check_supported(accelerator, "Accelerator.prepare")
    _check_compiler(accelerator, "Accelerator.prepare", "Call hf_actnn.convert(model, bits=4) before prepare()")
    if process.take(model, drive=trainer is None) is not None:
        keep_state(accelerator, model)


def _check_compiler(accelerator: Any, where: str, what_to_write: str) -> None:
    """Refuse models that are going to be compiled: the hooks that count would be compiled too."""
    compiler = accelerator.state.dynamo_plugin.backend.value
    if compiler != "NO":
        raise NotAvailableError(
            message(
                "What a compiled model keeps cannot be watched from outside its script",
                where=where,
                expected="no dynamo backend",
                received=f"the dynamo backend {compiler}",
                next_step=f"{what_to_write} in the script, and run it by itself",
            )
        )


#: By the module's name.
PATCHES: dict[str, Callable[[Any], None]] = {
    "transformers.trainer": patch_trainer,
    "transformers.hf_argparser": patch_parser,
    "accelerate.accelerator": patch_accelerator,
}
