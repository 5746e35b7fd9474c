"""Trains an image classifier on your images with the Hugging Face Trainer; `--actnn L2` keeps activations in 4 bits.

Every argument of TrainingArguments works too, from the command line or a JSON file; see README.md beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torchvision.transforms import v2
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    TimmWrapperConfig,
    set_seed,
)

from hf_actnn import ActNNTrainer, ActNNTrainingArguments


@dataclass
class DataArguments:
    dataset: str = field(
        metadata={
            "help": "A dataset on the hub, a folder of images (a subfolder per class) or of parquet files, or a glob."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    image_column: str | None = field(default=None, metadata={"help": "Found by its type if not given."})
    label_column: str | None = field(default=None, metadata={"help": "Found by its type if not given."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; else `test`, `validation`, or a tenth of `train`."}
    )
    image_size: int = field(default=224, metadata={"help": "Images are resized to this many pixels a side."})
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images only."})


@dataclass
class ModelArguments:
    model: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={
            "help": "A model on the hub or in a folder; with --from_scratch also a type (vit, ...) or a timm name."
        },
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the model's config as a JSON object, for --from_scratch."}
    )


def read_data(arguments: DataArguments) -> DatasetDict:
    """Whatever `--dataset` names, as a `train` and a `test` split."""
    path = Path(arguments.dataset)
    if path.is_dir() and any(path.glob("*.parquet")):
        data = load_dataset("parquet", data_dir=str(path))
    elif path.is_dir():
        data = load_dataset("imagefolder", data_dir=str(path))
    elif arguments.dataset.endswith(".parquet"):
        data = load_dataset("parquet", data_files=arguments.dataset)
    else:
        data = load_dataset(arguments.dataset, arguments.dataset_config)
    names = [arguments.test_split] if arguments.test_split else ["test", "validation"]
    test = next((name for name in names if name in data), None)
    if test is None and arguments.test_split:
        raise SystemExit(f"--test_split {arguments.test_split}: the dataset has the splits {', '.join(data)}")
    if test is None:
        data = data["train"].train_test_split(test_size=0.1, seed=0)
    else:
        data = DatasetDict(train=data["train"], test=data[test])
    for split, limit in (("train", arguments.max_train_samples), ("test", arguments.max_eval_samples)):
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))
    return data


def columns(data: Dataset, arguments: DataArguments) -> tuple[str, str]:
    """Names of the image and the label column."""

    def first(kind: type, given: str | None, flag: str) -> str:
        found = given or next((name for name, feature in data.features.items() if isinstance(feature, kind)), None)
        if found not in data.features:
            raise SystemExit(f"Name the column with {flag}; the dataset has {', '.join(data.features)}")
        return found

    return (
        first(Image, arguments.image_column, "--image_column"),
        first(ClassLabel, arguments.label_column, "--label_column"),
    )


def set_transforms(data: DatasetDict, arguments: DataArguments, image: str, label: str) -> None:
    """Rows become `pixel_values` [3, H, W] in -1..1 and `labels`; training images are mirrored."""
    size = (arguments.image_size, arguments.image_size)
    to_pixels = [
        v2.ToImage(),
        v2.Resize(size, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    transforms = {
        "train": v2.Compose([v2.RandomHorizontalFlip(0.5 if arguments.random_flip else 0.0), *to_pixels]),
        "test": v2.Compose(to_pixels),
    }
    for split, transform in transforms.items():
        data[split].set_transform(
            lambda rows, transform=transform: {
                "pixel_values": [transform(picture.convert("RGB")) for picture in rows[image]],
                "labels": rows[label],
            }
        )


def make_model(arguments: ModelArguments, labels: list[str], image_size: int) -> torch.nn.Module:
    """The model with a head for these labels."""
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if not arguments.from_scratch:
        return AutoModelForImageClassification.from_pretrained(arguments.model, ignore_mismatched_sizes=True, **named)
    fields = {**named, **json.loads(arguments.config_overrides or "{}")}
    config: PreTrainedConfig
    if arguments.model in CONFIG_MAPPING:
        if "image_size" in CONFIG_MAPPING[arguments.model]().to_dict():
            fields.setdefault("image_size", image_size)
        config = AutoConfig.for_model(arguments.model, **fields)
    elif is_timm(arguments.model):
        config = TimmWrapperConfig(architecture=arguments.model.removeprefix("timm/"), **fields)
    else:
        config = AutoConfig.from_pretrained(arguments.model, **fields)
    return AutoModelForImageClassification.from_config(config)


def is_timm(name: str) -> bool:
    """Whether timm can build a model of this name."""
    import timm

    return timm.is_model(name.removeprefix("timm/").split(".")[0])


def main() -> None:
    parser = HfArgumentParser((DataArguments, ModelArguments, ActNNTrainingArguments))
    data_arguments, model_arguments, training_arguments = parser.parse_args_into_dataclasses()
    training_arguments.remove_unused_columns = False  # the images are decoded on the fly, below
    set_seed(training_arguments.seed)

    data = read_data(data_arguments)
    image, label = columns(data["train"], data_arguments)
    set_transforms(data, data_arguments, image, label)

    trainer = ActNNTrainer(
        model=make_model(model_arguments, data["train"].features[label].names, data_arguments.image_size),
        args=training_arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())},
    )
    result = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
