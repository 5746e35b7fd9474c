"""Compressed activations in a loop of one's own with accelerate: one call in place of `accelerator.prepare`.

    model, optimizer, loader = prepare(accelerator, model, optimizer, loader, config="L3")

The rest of the loop stays as it is, whatever `accelerate launch` makes of it: one process, DDP or FSDP2.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from hf_actnn.config import ActNNConfig
from hf_actnn.convert import controller, convert, is_converted
from hf_actnn.errors import ConversionError, NotAvailableError, message
from hf_actnn.precision.controller import Controller

#: In a checkpoint of an accelerator: the state of each controller that is driven here, as JSON. Beside the first
#: process's each other one has its own, `hf_actnn_1.json` and so on, for each knows other samples.
STATE_FILE = "hf_actnn.json"
_MODELS: WeakKeyDictionary[Accelerator, list[ref[nn.Module]]] = WeakKeyDictionary()
#: The models whose controllers an optimizer steps, in the same order in every process.
_DRIVEN: WeakKeyDictionary[AcceleratedOptimizer, list[ref[nn.Module]]] = WeakKeyDictionary()
#: They run the backward pass themselves, and were never run with this package.
_ENGINES = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    *others: Any,
    config: ActNNConfig | str | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """Convert a model and have accelerate prepare it, with the optimizer and all else that the loop uses.

    The optimizer's `step` then steps the model's controller, and `accelerator.save_state` and `load_state` take its
    state along. No further line is needed, and :meth:`Controller.step` is not to be called.

    Args:
        accelerator: that the loop trains with.
        model: plain, or converted before; it is converted anew where `config` or `overrides` say how.
        *others: what `Accelerator.prepare` takes beside the model, an optimizer with parameters of the model included.
        config: an :class:`ActNNConfig`, a level (``"L3"``), a mapping of fields or a path of JSON; ``bits="auto"`` if
            nothing is named.
        **overrides: fields of the configuration to replace, for example ``bits=2``.

    Returns:
        A tuple of the prepared model and `others` in their order, as `Accelerator.prepare` does.

    Raises:
        NotAvailableError: the accelerator trains in a way that compressed activations do not work with.
        ConfigError: a configuration that means nothing.
        ConversionError: something that cannot be converted, or no optimizer of the model.
    """
    check_supported(accelerator, "prepare")
    place = _place_of_optimizer(model, others)
    if config is not None or overrides or not is_converted(model):
        convert(model, config, **overrides)
    controller(model)  # from here on its step is promised
    prepared = accelerator.prepare(model, *others)
    drive(prepared[place + 1], model)
    keep_state(accelerator, model)
    return prepared


def drive(optimizer: AcceleratedOptimizer, model: nn.Module) -> None:
    """Have the steps of a prepared optimizer step a model's controller first, when the gradients of a whole step are
    there. That is the controller which the model has then: another one once it was converted anew.

    A step that loss scaling then skips is none to the optimizer, but the controller has to hear of it: it drops what
    overflowed.
    """
    if optimizer in _DRIVEN:
        _remember(_DRIVEN[optimizer], model)
        return
    driven = _DRIVEN[optimizer] = [ref(model)]
    step = optimizer.step

    @functools.wraps(step)
    def both(*args: Any, **kwargs: Any) -> Any:
        if optimizer.gradient_state.sync_gradients:  # else gradients accumulate
            for known in driven:
                one = known()
                if one is not None and is_converted(one):
                    controller(one).step()
        return step(*args, **kwargs)

    optimizer.step = both  # type: ignore[method-assign]


def keep_state(accelerator: Accelerator, model: nn.Module) -> None:
    """Have the state of a converted model's controller travel in an accelerator's checkpoints.

    In a file of its own: `register_for_checkpointing` would make checkpoints with it and without it exclude each other,
    and would give every process the state of the first.
    """
    if accelerator in _MODELS:
        _remember(_MODELS[accelerator], model)
        return
    kept = _MODELS[accelerator] = [ref(model)]
    own = STATE_FILE if accelerator.is_main_process else STATE_FILE.replace(".", f"_{accelerator.process_index}.")

    def present() -> list[Controller]:
        """Of the models that the accelerator has not been told to forget."""
        parts = {id(part) for prepared in accelerator._models for part in prepared.modules()}
        return [controller(one) for known in kept if (one := known()) is not None and id(one) in parts]

    def save(models: Any, weights: Any, folder: str) -> None:
        with open(os.path.join(folder, own), "w") as file:
            json.dump([one.state_dict() for one in present()], file)
        if accelerator.is_main_process:
            _remove_others(folder, accelerator.num_processes)

    def load(models: Any, folder: str) -> None:
        states: list[Any] = []
        paths = [os.path.join(folder, name) for name in (own, STATE_FILE)]  # saved by fewer processes, perhaps
        path = next(filter(os.path.exists, paths), None)
        if path is not None:
            with open(path) as file:
                states = json.load(file)
        for at, one in enumerate(present()):
            one.load_state_dict(states[at] if at < len(states) else {})  # which warns

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _remember(known: list[ref[nn.Module]], model: nn.Module) -> None:
    """Once, however often a model is prepared."""
    if all(one() is not model for one in known):
        known.append(ref(model))


def _remove_others(folder: str, processes: int) -> None:
    """Take away what more processes left in a folder before: a later run with as many would read it."""
    stem, ending = os.path.splitext(STATE_FILE)
    for name in os.listdir(folder):
        found = re.fullmatch(rf"{stem}_(\d+){re.escape(ending)}", name)
        if found is not None and int(found[1]) >= processes:
            os.remove(os.path.join(folder, name))


def check_supported(accelerator: Accelerator, where: str) -> None:
    """Raise NotAvailableError where an accelerator trains in a way that compressed activations do not work with."""
    engine = _ENGINES.get(accelerator.distributed_type)
    if engine is not None:
        raise NotAvailableError(no_engine(engine, where))


def no_engine(engine: str, where: str) -> str:
    """The message for an engine that was never run with this package."""
    return message(
        f"Compressed activations are not available under {engine}: its engine owns the model, the gradients and the "
        "optimizer, and nothing here was ever run with it",
        where=where,
        expected="one process, DDP or FSDP2",
        received=engine,
        next_step="FSDP2 shards gradients and optimizer states as ZeRO-2 does, and with resharding parameters as "
        "ZeRO-3 does: `accelerate launch --use_fsdp --fsdp_version 2`",
    )


def _place_of_optimizer(model: nn.Module, others: tuple[Any, ...]) -> int:
    """Which of the others is an optimizer of the model; of several the first."""
    own = {id(parameter) for parameter in model.parameters()}
    for place, one in enumerate(others):
        if isinstance(one, Optimizer) and any(id(p) in own for group in one.param_groups for p in group["params"]):
            return place
    raise ConversionError(
        message(
            "nothing would step the model's controller",
            where=f"prepare(accelerator, {type(model).__name__}, ...)",
            expected="an optimizer with parameters of the model in the same call",
            received=", ".join(type(one).__name__ for one in others) or "the model alone",
            next_step="Pass it: model, optimizer = prepare(accelerator, model, optimizer, config=...)",
        )
    )
