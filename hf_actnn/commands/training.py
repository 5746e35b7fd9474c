"""What both commands do with a model: the ways to train it, and how it is prepared for one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hf_actnn.commands.watch import NO_MEMORY
from hf_actnn.config import LEVELS
from hf_actnn.convert import controller, convert
from hf_actnn.errors import ConfigError, message

#: As PyTorch has it, and with the model's own gradient checkpointing.
PLAIN, CHECKPOINT = "plain", "checkpoint"
#: Before a level: both.
WITH = f"{CHECKPOINT}+"
#: The default of convert().
AUTO = "auto"
PRECISIONS = ("fp32", "bf16")
#: What to do about a model that does not run on random images.
OTHER_INPUT = (
    "Another --image-size may be what it takes; a model that wants other input is named by a function, "
    "package.module:function, that returns it with a batch"
)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-4, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-5),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-5),
}


def way(text: str) -> str:
    """The name of a way to train: plain, checkpoint, auto, a level, or one of the last two behind ``checkpoint+``.

    Raises:
        ConfigError: it is none.
    """
    if text == WITH + PLAIN or level_of(text) not in (PLAIN, AUTO, *LEVELS):
        raise ConfigError(
            message(
                "there is no such level",
                where="--levels",
                expected=f"some of {PLAIN}, {CHECKPOINT}, {AUTO}, {', '.join(LEVELS)}, {WITH}L2 and the like",
                received=repr(text),
                next_step="The README has a table of levels",
            )
        )
    return text


def checkpoints(text: str) -> bool:
    """Whether a way to train uses the model's gradient checkpointing."""
    return text == CHECKPOINT or text.startswith(WITH)


def level_of(text: str) -> str:
    """The level of a way to train, ``plain`` where nothing is compressed."""
    return PLAIN if text == CHECKPOINT else text.removeprefix(WITH)


def compress(model: nn.Module, level: str, update_interval: int | None = None) -> Callable[[], None]:
    """Turn a level on.

    Args:
        update_interval: steps between two choices of bits; the configuration's own if None.

    Returns:
        What follows each backward pass.
    """
    if level == PLAIN:
        return lambda: None
    convert(model, None if level == AUTO else level, update_interval=update_interval)
    return controller(model).step


def trained(model: nn.Module, where: str) -> list[nn.Parameter]:
    """The parameters that get a gradient.

    Raises:
        ConfigError: there is none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ConfigError(
            message(
                "the model has no parameter to train",
                where=where,
                expected="a parameter with requires_grad",
                received=f"{sum(1 for _ in model.parameters())} parameters, none with it",
                next_step="Leave requires_grad on some",
            )
        )
    return found


def device_of(text: str) -> torch.device:
    """A device that is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        device, there = torch.device(text), torch.cuda.is_available()
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and not there):
        raise ConfigError(
            message(
                "there is no such device that torch can use here",
                where="--device",
                expected="cpu, or cuda where there is one",
                received=text,
                next_step="`hf-actnn env` says what is there",
            )
        )
    return device


def to(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, batch)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What the forward pass runs under."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def is_for_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or NO_MEMORY.search(str(error)) is not None
