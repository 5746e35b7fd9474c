"""Images and their boxes: read from the hub, from parquet files or in COCO's format, and made into tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


@dataclass
class DataArguments:
    dataset: str = field(
        metadata={
            "help": "A dataset on the hub or a folder of parquet files, with the columns `image` and `objects` (`bbox` "
            "as x, y, w, h in pixels, and `category`); or a folder with a subfolder per split that holds images and "
            "their annotations.json in COCO's format."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; else `test`, `validation`, or a tenth of `train`."}
    )
    height: int = field(default=480, metadata={"help": "Images are resized to so many pixels,"})
    width: int = field(default=640, metadata={"help": "and so many across."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images only."})


def read_data(arguments: DataArguments) -> DatasetDict:
    """Whatever `--dataset` names, as a `train` and a `test` split with the columns `image` and `objects`."""
    path = Path(arguments.dataset)
    if path.is_dir() and any(path.glob("*.parquet")):
        data = load_dataset("parquet", data_dir=str(path))
    elif path.is_dir():
        splits = [split for split in sorted(path.iterdir()) if (split / "annotations.json").is_file()]
        if not splits:
            raise SystemExit(f"{path} holds neither parquet files nor folders with an annotations.json")
        data = DatasetDict({split.name: _coco(split) for split in splits})
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
    missing = {"image", "objects"} - set(data["train"].features)
    if missing:
        raise SystemExit(f"No column {', '.join(missing)}; the dataset has {', '.join(data['train'].features)}")
    for split, limit in (("train", arguments.max_train_samples), ("test", arguments.max_eval_samples)):
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))
    return data


def _coco(split: Path) -> Dataset:
    content = json.loads((split / "annotations.json").read_text())
    categories = sorted(content["categories"], key=lambda category: category["id"])
    place = {category["id"]: at for at, category in enumerate(categories)}
    boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd", 0):
            boxes[annotation["image_id"]].append(annotation)
    names = ClassLabel(names=[category["name"] for category in categories])
    features = Features({"image": Image(), "objects": {"bbox": List(List(Value("float32"))), "category": List(names)}})
    rows = {
        "image": [str(split / image["file_name"]) for image in content["images"]],
        "objects": [
            {
                "bbox": [one["bbox"] for one in boxes[image["id"]]],
                "category": [place[one["category_id"]] for one in boxes[image["id"]]],
            }
            for image in content["images"]
        ],
    }
    return Dataset.from_dict(rows, features=features)


def class_names(data: DatasetDict) -> list[str]:
    """The names of the categories, or numbers where the dataset names none."""
    category = data["train"].features["objects"]["category"].feature
    if isinstance(category, ClassLabel):
        return list(category.names)
    highest = max((max(objects["category"], default=0) for objects in data["train"]["objects"]), default=0)
    return [str(number) for number in range(highest + 1)]


def set_transforms(data: DatasetDict, arguments: DataArguments) -> None:
    """Rows become `pixel_values` [3, H, W] in -1..1 and `labels`: `class_labels` [boxes] and `boxes` [boxes, 4], centre
    x and y, width and height, as shares of the image. Training images are cropped, mirrored and changed in colour."""
    size = (arguments.height, arguments.width)
    ratio = arguments.width / arguments.height
    to_float = v2.ToDtype(torch.float32, scale=True)
    transforms = {
        "train": v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.5, 1.0), ratio=(0.8 * ratio, 1.25 * ratio), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                to_float,
                v2.ColorJitter(brightness=0.2, contrast=0.2),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=2),
            ]
        ),
        "test": v2.Compose([v2.Resize(size, antialias=True), to_float, v2.SanitizeBoundingBoxes()]),
    }

    def rows(batch: dict[str, list[Any]], transform: v2.Compose) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"pixel_values": [], "labels": []}
        for picture, objects in zip(batch["image"], batch["objects"], strict=True):
            picture = picture.convert("RGB")
            boxes = tv_tensors.BoundingBoxes(
                torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4),
                format=tv_tensors.BoundingBoxFormat.XYWH,
                canvas_size=(picture.height, picture.width),
            )
            sample = {
                "image": v2.functional.to_image(picture),
                "boxes": boxes,
                "labels": torch.tensor(objects["category"]),
            }
            sample = transform(sample)
            centred = v2.functional.convert_bounding_box_format(
                sample["boxes"], new_format=tv_tensors.BoundingBoxFormat.CXCYWH
            )
            made["pixel_values"].append(torch.as_tensor(sample["image"]) * 2 - 1)
            made["labels"].append(
                {
                    "class_labels": sample["labels"].long(),
                    "boxes": torch.as_tensor(centred) / torch.tensor([*size[::-1], *size[::-1]]),
                }
            )
        return made

    for split, transform in transforms.items():
        data[split].set_transform(lambda batch, transform=transform: rows(batch, transform))


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Images are stacked; boxes, of which each image has its own number, stay a list."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


class AveragePrecision:
    """Collects detections and gives COCO's mean average precision."""

    def __init__(self, height: int, width: int, sigmoid: bool) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self.metric = MeanAveragePrecision()
        self.metric.warn_on_many_detections = False
        self.scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        self.sigmoid = sigmoid

    def add(self, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]]) -> None:
        """Count a batch.

        Args:
            logits: `[N, queries, classes]`, with one class more for "nothing" where they go through a softmax.
            boxes: `[N, queries, 4]`, as in the labels.
            labels: of each image.
        """
        logits = logits.float().cpu()
        scores, classes = (logits.sigmoid() if self.sigmoid else logits.softmax(-1)[..., :-1]).max(-1)
        found = [
            {"boxes": self._corners(one), "scores": score, "labels": kind}
            for one, score, kind in zip(boxes.float().cpu(), scores, classes, strict=True)
        ]
        wanted = [
            {"boxes": self._corners(one["boxes"].float().cpu()), "labels": one["class_labels"].cpu()} for one in labels
        ]
        self.metric.update(found, wanted)

    def _corners(self, boxes: Tensor) -> Tensor:
        centre, extent = boxes[..., :2], boxes[..., 2:]
        return torch.cat([centre - extent / 2, centre + extent / 2], -1) * self.scale

    def scores(self) -> dict[str, float]:
        """Mean average precision over overlaps from 0.5 to 0.95, and at 0.5."""
        found = self.metric.compute()
        return {"map": found["map"].item(), "map_50": found["map_50"].item()}
