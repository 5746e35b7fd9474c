"""Models by name: of timm, of Hugging Face transformers, or of a function of one's own; with a batch for each."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from hf_actnn.errors import ConfigError, ConversionError, NotAvailableError, message

#: Side of the images where neither the caller nor the model says anything.
IMAGE_SIZE = 224
#: Names that timm would ask a server for.
_REMOTE = ("hf-hub:", "hf_hub:")


class Named(NamedTuple):
    """A model that was found by its name.

    Attributes:
        model: in training mode, with random weights unless a function of the caller's loaded others.
        source: ``"timm"``, ``"transformers"`` or ``"python"``.
        image: channels, height and width of an image; None where the caller's function gave a batch.
        batch: number of samples -> what the model is called with.
    """

    model: nn.Module
    source: str
    image: tuple[int, int, int] | None
    batch: Callable[[int], Any]


def load(name: str, image_size: int | None = None) -> Named:
    """Build a model by its name. Nothing is downloaded.

    Args:
        name: ``package.module:function``, where the function returns a model, or a model and a batch; a directory with
            a ``config.json`` of Hugging Face; a model of timm; or a repository whose configuration is in the local
            cache of Hugging Face.
        image_size: side of square images; the model's own if None.

    Raises:
        ConfigError: no model has that name, or it does not take images.
        NotAvailableError: the library that knows the name is not installed.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(
            message("images have no such size", where="--image-size", expected="1 or more", received=str(image_size))
        )
    torch.manual_seed(0)
    if ":" in name and not name.startswith(_REMOTE):
        return _of_python(name, image_size)
    if Path(name, "config.json").is_file():
        return _of_transformers(name, image_size)
    timm = _optional("timm")
    if timm is not None and not name.startswith(_REMOTE) and timm.is_model(name):
        return _of_timm(timm, name, image_size)
    hub = "/" in name and not name.startswith(_REMOTE) and _optional("transformers") is not None
    if hub or Path(name).is_dir():
        return _of_transformers(name, image_size)
    raise _unknown(name, timm)


def checkpoint(model: nn.Module) -> None:
    """Turn gradient checkpointing on, by the model's own switch.

    Raises:
        ConversionError: it has none, or does not support it.
    """
    # Those of timm and of transformers, and the latter's older name, which warns where both are.
    names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    switch = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    reason = f"none of {', '.join(names)}"
    if switch is not None:
        try:
            switch()
            return
        except (AssertionError, ValueError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {error}"
    raise ConversionError(
        message(
            "the model has no gradient checkpointing",
            where=type(model).__name__,
            expected="a model whose library can switch it on",
            received=reason,
            next_step="Leave `checkpoint` out",
        )
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on a batch and make one number of what it gives.

    That is its own loss where it has one; the cross-entropy of logits ``[N, classes]``; and the mean square of all
    numbers in the output, for want of a task, of anything else.

    Args:
        batch: a mapping of keyword arguments, a sequence of arguments, or the only argument.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (list, tuple)):
        output = model(*batch)
    else:
        output = model(batch)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own.sum()
    if isinstance(output, Tensor) and output.ndim == 2:
        labels = torch.arange(output.shape[0], device=output.device) % output.shape[1]
        return F.cross_entropy(output, labels)
    found = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise ConfigError(
            message(
                "there is nothing to train in what the model returns",
                where=type(model).__name__,
                expected="a tensor, or a structure of tensors",
                received=type(output).__name__,
                next_step="Name a function of your own, package.module:function, that returns a model which does",
            )
        )
    return torch.stack([value.float().square().mean() for value in found]).sum()


def _optional(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise NotAvailableError(
            message(
                f"{library} cannot be imported: operator torchvision::nms does not exist",
                where="torchvision, which it imports",
                expected="a torchvision that was built for the torch that is installed",
                received=str(error),
                next_step="Install both from one place; beside a torch without CUDA, `python "
                "tools/torchvision_without_cuda.py` of a checkout does it",
            )
        ) from error


def _unknown(name: str, timm: Any) -> Exception:
    forms = (
        "a model of timm, a directory with a Hugging Face config.json, a repository in the local Hugging Face cache, "
        "or package.module:function"
    )
    if timm is None or ("/" in name and _optional("transformers") is None):
        missing = "timm" if timm is None else "transformers"
        return NotAvailableError(
            message(
                f"no model is called {name!r} here, where {missing} is not installed",
                where="MODEL",
                expected=forms,
                received=repr(name),
                next_step=f'pip install "hf-actnn[{"timm" if timm is None else "hf"}]"',
            )
        )
    if name.startswith(_REMOTE):
        advice = "Download it first, and name its directory: nothing is downloaded here"
    else:
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        advice = f"Did you mean {' or '.join(close)}? " if close else ""
        advice += "timm.list_models() lists timm's"
    return ConfigError(
        message(f"no model is called {name!r}", where="MODEL", expected=forms, received=repr(name), next_step=advice)
    )


def _images(image: tuple[int, int, int]) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *image)


def _of_timm(timm: Any, name: str, size: int | None) -> Named:
    try:
        # A model that takes images of any size has no such argument.
        sized = {} if size is None else {"img_size": size}
        try:
            model = timm.create_model(name, pretrained=False, **sized)
        except TypeError:
            model = timm.create_model(name, pretrained=False)
    except Exception as error:
        raise ConfigError(
            message(
                "the model could not be made",
                where=name,
                expected="a model of timm, for images of the size asked for",
                received=f"{type(error).__name__}: {error}",
                next_step="Another --image-size may be what it takes",
            )
        ) from error
    channels, height, width = (getattr(model, "pretrained_cfg", None) or {}).get(
        "input_size", (3, IMAGE_SIZE, IMAGE_SIZE)
    )
    image = (channels, size or height, size or width)
    return Named(model.train(), "timm", image, _images(image))


def _of_transformers(name: str, size: int | None) -> Named:
    transformers = _optional("transformers")
    if transformers is None:
        raise NotAvailableError(
            message(
                "configurations of Hugging Face need transformers, which is not installed",
                where="MODEL",
                received=repr(name),
                next_step='pip install "hf-actnn[hf]"',
            )
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            message(
                "there is no configuration of a model",
                where=name,
                expected="a directory with a config.json, or a repository in the local Hugging Face cache",
                received=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                next_step="Download it first: nothing is downloaded here",
            )
        ) from error
    vision = getattr(config, "vision_config", config)
    if size is not None and hasattr(vision, "image_size"):
        vision.image_size = size
    model = _built(transformers, config)
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            message(
                "the model does not take images alone",
                where=name,
                expected="a model whose main input is pixel_values",
                received=f"{type(model).__name__}, which takes {getattr(model, 'main_input_name', None)}",
                next_step="Write a function that returns the model and a batch, and name it as package.module:function",
            )
        )
    sides = getattr(vision, "image_size", None) or IMAGE_SIZE
    height, width = (sides, sides) if isinstance(sides, int) else tuple(sides)[:2]
    image = (getattr(vision, "num_channels", 3), size or height, size or width)

    def batch(count: int) -> dict[str, Tensor]:
        made = {"pixel_values": torch.randn(count, *image)}
        if type(model).__name__.endswith("ForImageClassification"):
            made["labels"] = torch.arange(count) % config.num_labels
        return made

    return Named(model.train(), "transformers", image, batch)


def _built(transformers: Any, config: Any) -> nn.Module:
    """What the configuration says was trained with it; else a classifier, else the bare model."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)(config)
    classifiers = transformers.AutoModelForImageClassification
    known = type(config) in classifiers._model_mapping
    return (classifiers if known else transformers.AutoModel).from_config(config)


def _of_python(name: str, size: int | None) -> Named:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command's path begins with its own folder, not with the user's
    try:
        function = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            message(
                "the function that makes the model was not found",
                where=name,
                expected="package.module:function, importable from here",
                received=f"{type(error).__name__}: {error}",
                next_step="Run the command where `python -c 'import package.module'` works",
            )
        ) from error
    try:
        made = function() if callable(function) else function
    except Exception as error:
        raise ConfigError(
            message(
                "the function that makes the model failed",
                where=name,
                expected="a model, or a model and a batch",
                received=f"{type(error).__name__}: {error}",
                next_step="Call it in Python to see where",
            )
        ) from error
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            message(
                "the function returned no model",
                where=name,
                expected="a torch.nn.Module, or a pair of one and a batch",
                received=type(model).__name__,
                next_step="Return the model, or (model, batch)",
            )
        )
    if given is None:
        image = (3, size or IMAGE_SIZE, size or IMAGE_SIZE)
        return Named(model.train(), "python", image, _images(image))
    if size is not None:
        raise ConfigError(
            message(
                "the size of the images is given twice",
                where="--image-size",
                expected="a function that returns a model alone",
                received=f"--image-size {size}, and a batch from {name}",
                next_step="Leave one of them out",
            )
        )
    return Named(model.train(), "python", None, lambda count: _of_length(given, count))


def _of_length(batch: Any, count: int) -> Any:
    """A batch's samples, repeated or cut to a number of them."""

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or not value.shape[0]:
            return value
        return value[torch.arange(count, device=value.device) % value.shape[0]]

    return tree_map(fit, batch)
