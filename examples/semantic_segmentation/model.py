"""The segmentation model that the arguments name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from data import IGNORED
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForSemanticSegmentation


@dataclass
class ModelArguments:
    model: str = field(
        default="nvidia/mit-b0",
        metadata={
            "help": "A model on the hub or in a folder; with --from_scratch also a type (segformer, upernet, ...)."
        },
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the model's config as a JSON object, for --from_scratch."}
    )


def make_model(arguments: ModelArguments, labels: list[str]) -> torch.nn.Module:
    """The model with a head for these labels."""
    fields = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    if arguments.from_scratch:
        fields |= json.loads(arguments.config_overrides or "{}")
    if arguments.from_scratch and arguments.model in CONFIG_MAPPING:
        config = AutoConfig.for_model(arguments.model, **fields)
    else:
        config = AutoConfig.from_pretrained(arguments.model, **fields)
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):  # as SegFormer and as UperNet call it
        if hasattr(config, name):
            setattr(config, name, IGNORED)
    if arguments.from_scratch:
        return AutoModelForSemanticSegmentation.from_config(config)
    return AutoModelForSemanticSegmentation.from_pretrained(
        arguments.model, config=config, ignore_mismatched_sizes=True
    )
