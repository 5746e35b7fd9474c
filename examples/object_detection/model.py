"""The detection model that the arguments name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForObjectDetection


@dataclass
class ModelArguments:
    model: str = field(
        default="PekingU/rtdetr_r18vd",
        metadata={"help": "A model on the hub or in a folder; with --from_scratch also a type (yolos, rt_detr, ...)."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the model's config as a JSON object, for --from_scratch."}
    )


def make_model(arguments: ModelArguments, labels: list[str], height: int, width: int) -> torch.nn.Module:
    """The model with a head for these labels."""
    fields = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    if not arguments.from_scratch:
        return AutoModelForObjectDetection.from_pretrained(arguments.model, ignore_mismatched_sizes=True, **fields)
    if arguments.model == "yolos":
        fields["image_size"] = [height, width]
    fields |= json.loads(arguments.config_overrides or "{}")
    if arguments.model in CONFIG_MAPPING:
        config = AutoConfig.for_model(arguments.model, **fields)
    else:
        config = AutoConfig.from_pretrained(arguments.model, **fields)
    return AutoModelForObjectDetection.from_config(config)


def scores_by_sigmoid(model: torch.nn.Module) -> bool:
    """Whether a model gives each class a probability of its own, instead of one distribution with a class "nothing"."""
    return bool(getattr(model.config, "use_focal_loss", False)) or model.config.model_type in (
        "deformable_detr",
        "conditional_detr",
    )
