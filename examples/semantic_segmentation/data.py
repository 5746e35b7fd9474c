"""Images and their masks: read from the hub, from parquet files or from folders, and made into tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

#: The label that losses and scores pass over.
IGNORED = 255


@dataclass
class DataArguments:
    dataset: str = field(
        metadata={
            "help": "A dataset on the hub, a folder of parquet files, or a folder with a subfolder per split that "
            "holds the folders `images` and `masks`, with files of the same names."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    image_column: str = field(default="image", metadata={"help": "Name of the column of images."})
    mask_column: str = field(default="mask", metadata={"help": "Name of the column of masks, a class per pixel."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; else `test`, `validation`, or a tenth of `train`."}
    )
    ignored_class: int | None = field(
        default=None, metadata={"help": "A class of the masks that is none, `void` say; 255 is passed over anyhow."}
    )
    class_names: str | None = field(
        default=None, metadata={"help": "Names of the classes, in order, between commas; else they are counted."}
    )
    height: int = field(default=512, metadata={"help": "Images are resized to so many pixels,"})
    width: int = field(default=512, metadata={"help": "and so many across."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images only."})


def read_data(arguments: DataArguments) -> DatasetDict:
    """Whatever `--dataset` names, as a `train` and a `test` split with the columns `image` and `mask`."""
    path = Path(arguments.dataset)
    if path.is_dir() and any(path.glob("*.parquet")):
        data = load_dataset("parquet", data_dir=str(path))
    elif path.is_dir():
        data = DatasetDict({split.name: _folder(split) for split in sorted(path.iterdir()) if split.is_dir()})
        if not data:
            raise SystemExit(f"{path} holds neither parquet files nor folders of splits")
    else:
        data = load_dataset(arguments.dataset, arguments.dataset_config)
    names = [arguments.test_split] if arguments.test_split else ["test", "validation", "val"]
    test = next((name for name in names if name in data), None)
    if test is None and arguments.test_split:
        raise SystemExit(f"--test_split {arguments.test_split}: the dataset has the splits {', '.join(data)}")
    if test is None:
        data = data["train"].train_test_split(test_size=0.1, seed=0)
    else:
        data = DatasetDict(train=data["train"], test=data[test])
    for column, flag in ((arguments.image_column, "--image_column"), (arguments.mask_column, "--mask_column")):
        if column not in data["train"].features:
            raise SystemExit(f"Name the column with {flag}; the dataset has {', '.join(data['train'].features)}")
    for split, limit in (("train", arguments.max_train_samples), ("test", arguments.max_eval_samples)):
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))
    return DatasetDict(
        {
            split: part.select_columns([arguments.image_column, arguments.mask_column]).rename_columns(
                {arguments.image_column: "image", arguments.mask_column: "mask"}
            )
            for split, part in data.items()
        }
    )


def _folder(split: Path) -> Dataset:
    images = sorted((split / "images").glob("*"))
    masks = {path.stem: str(path) for path in (split / "masks").glob("*")}
    without = [image.name for image in images if image.stem not in masks]
    if without or not images:
        raise SystemExit(f"{split}: no mask for {without[:3]}" if without else f"{split} has no folder `images`")
    columns = {"image": [str(image) for image in images], "mask": [masks[image.stem] for image in images]}
    return Dataset.from_dict(columns).cast_column("image", Image()).cast_column("mask", Image())


def class_names(data: DatasetDict, arguments: DataArguments) -> list[str]:
    """The names given, or numbers up to the highest class of the training masks."""
    if arguments.class_names:
        return [name.strip() for name in arguments.class_names.split(",")]
    highest = 0
    for mask in data["train"]["mask"]:
        values = set(mask.get_flattened_data() if hasattr(mask, "get_flattened_data") else mask.getdata())
        highest = max(highest, *(values - {IGNORED, arguments.ignored_class}), 0)
    return [str(number) for number in range(highest + 1)]


def set_transforms(data: DatasetDict, arguments: DataArguments) -> None:
    """Rows become `pixel_values` [3, H, W] in -1..1 and `labels` [H, W]; training images are cropped and mirrored."""
    size = (arguments.height, arguments.width)
    ratio = arguments.width / arguments.height
    scaled = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    crop = v2.RandomResizedCrop(size, scale=(0.4, 1.0), ratio=(0.8 * ratio, 1.25 * ratio), antialias=True)
    transforms = {
        "train": v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(), *scaled]),
        "test": v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), *scaled]),
    }

    def rows(batch: dict[str, list[Any]], transform: v2.Compose) -> dict[str, list[Tensor]]:
        made: dict[str, list[Tensor]] = {"pixel_values": [], "labels": []}
        for picture, mask in zip(batch["image"], batch["mask"], strict=True):
            classes = tv_tensors.Mask(v2.functional.pil_to_tensor(mask)[0])
            pixels, classes = transform(picture.convert("RGB"), classes)
            labels = torch.as_tensor(classes).long()
            if arguments.ignored_class is not None:
                labels = labels.masked_fill(labels == arguments.ignored_class, IGNORED)
            made["pixel_values"].append(torch.as_tensor(pixels) * 2 - 1)
            made["labels"].append(labels)
        return made

    for split, transform in transforms.items():
        data[split].set_transform(lambda batch, transform=transform: rows(batch, transform))


class Confusion:
    """Counts pixels by (class, class predicted); what the scores are made of."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count a batch: both `[N, H, W]`, integers; labels of :data:`IGNORED` are passed over."""
        classes = len(self.counts)
        valid = labels != IGNORED
        pairs = labels[valid].long() * classes + predicted[valid].long()
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes).to(self.counts.device)

    def scores(self) -> dict[str, float]:
        """Mean intersection over union of the classes that occur, and the share of pixels that are right."""
        counts = self.counts.double()
        right, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        union = labelled + predicted - right
        return {
            "mean_iou": (right / union)[labelled > 0].mean().item(),
            "pixel_accuracy": (right.sum() / counts.sum()).item(),
        }


def predicted_classes(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits `[N, classes, h, w]`, which may be of fewer pixels, to classes `[N, height, width]`."""
    if logits.shape[-2:] != (height, width):
        logits = torch.nn.functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return logits.argmax(1)
