"""Hugging Face's published example scripts, as they are, through `hf-actnn run`: do they train, and what do they keep?

    python benchmarks/unmodified.py --scripts path/to/scripts --data path/to/data [--level L3] [--only NAME ...]

`--scripts` is a folder with the scripts named in TASKS, from examples/pytorch of transformers; none is changed. They
need `evaluate` and `albumentations`. `--data` is a folder with the parquet files of `cifar10`, `camvid` and `bccd` in
folders of these names. Each script trains a small model with random weights for some steps and evaluates it, without a
network: once at L0, which keeps what autograd keeps, and once at the level. Data, model and metrics are local folders.

`--timm path/to/train.py` runs timm's script too, on CIFAR-10, with one line added behind the one that makes the model.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pages
import timing

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, IMAGES, SIZE = 4, 8, 40, 128
PLACES = ["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"]
PLACES += ["Bicyclist", "void"]
CELLS = ["RBC", "WBC", "Platelets"]

_COMMON = [
    *("--output_dir", "out", "--learning_rate", "1e-4", "--seed", "0"),
    *("--per_device_train_batch_size", str(BATCH), "--per_device_eval_batch_size", str(BATCH)),
]
_TRAINER = [
    *("--do_train", "--do_eval", "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no"),
    *("--remove_unused_columns", "False", "--report_to", "none", "--use_cpu"),
]
_LOOP = ["--max_train_steps", str(STEPS)]
_CLASSIFY = ["--dataset_name", "cifar10", "--model_name_or_path", "vit", "--label_column_name", "label"]
_SEGMENT = ["--dataset_name", "camvid", "--model_name_or_path", "segformer"]
_DETECT = ["--dataset_name", "bccd", "--model_name_or_path", "detr", "--image_square_size", str(SIZE)]
#: The arguments of each script.
TASKS = {
    "run_image_classification": [*_CLASSIFY, *_TRAINER],
    "run_image_classification_no_trainer": [*_CLASSIFY, *_LOOP],
    "run_semantic_segmentation": [*_SEGMENT, *_TRAINER],
    "run_semantic_segmentation_no_trainer": [*_SEGMENT, *_LOOP],
    "run_object_detection": [*_DETECT, *_TRAINER, "--eval_do_concat_batches", "False"],
    "run_object_detection_no_trainer": [*_DETECT, *_LOOP],
}
_TIMM = [
    *("--num-classes", "10", "--epochs", "1", "--batch-size", str(BATCH), "--device", "cpu", "--no-prefetcher"),
    *("--workers", "1"),
]
#: Its loop steps no controller, so no level that chooses bits.
TIMM_LEVEL = "L2"
#: Models of timm, with the arguments that make their images small.
TIMM_MODELS = {
    "resnet18": ["--img-size", str(SIZE)],
    "vit_tiny_patch16_224": ["--img-size", str(SIZE), "--model-kwargs", f"img_size={SIZE}"],
}
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "albumentations", "timm")

# `evaluate` loads a metric from a folder of its name, where it would otherwise ask the hub.
ACCURACY = """
import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(predictions)}
"""
MEAN_IOU = """
import datasets
import evaluate
import numpy as np

class MeanIoU(evaluate.Metric):
    def _info(self):
        rows = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": rows, "references": rows})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index, reduce_labels=False):
        found, right = np.array(predictions), np.array(references)
        found, right = found[right != ignore_index], right[right != ignore_index]
        both = np.bincount(found[found == right], minlength=num_labels)
        of_right, of_found = np.bincount(right, minlength=num_labels), np.bincount(found, minlength=num_labels)
        with np.errstate(invalid="ignore"):
            accuracy, iou = both / of_right, both / (of_right + of_found - both)
        return {
            "mean_iou": np.nanmean(iou), "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": both.sum() / len(right),
            "per_category_iou": iou, "per_category_accuracy": accuracy,
        }
"""


def write_data(data: Path, folder: Path) -> None:
    """A few images of each data set with the columns that the scripts read."""
    from datasets import load_dataset

    def some(name: str, split: str) -> Any:
        return load_dataset("parquet", data_files=str(data / name / f"{split}.parquet"), split=f"train[:{IMAGES}]")

    def with_ids(row: dict[str, Any], index: int) -> dict[str, Any]:
        objects = row["objects"]
        return {"image_id": index, "objects": {**objects, "area": [box[2] * box[3] for box in objects["bbox"]]}}

    for split, of in (("train", "train"), ("validation", "test"), ("test", "test")):
        made = {
            "cifar10": some("cifar10", of),
            "camvid": some("camvid", of).rename_columns({"mask": "label"}),
        }
        cells = some("bccd", of)
        labels = cells.features["objects"]
        cells = cells.map(with_ids, with_indices=True)
        features = cells.features.copy()
        features["objects"] = {**features["objects"], "category": labels["category"]}
        made["bccd"] = cells.cast(features)
        for name, part in made.items():
            (folder / name).mkdir(exist_ok=True)
            part.to_parquet(folder / name / f"{split}.parquet")
    # The names of classes are asked of the hub: what was downloaded once lies like this.
    cached = folder / "home" / "hub" / "datasets--camvid"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "id2label.json").write_text(json.dumps(dict(enumerate(PLACES))))


def write_models(folder: Path) -> None:
    """Small models with random weights, each with its image processor."""
    import transformers as tf

    tf.set_seed(0)
    small = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    tf.ViTForImageClassification(tf.ViTConfig(**small, image_size=64, patch_size=8, num_labels=10)).save_pretrained(
        folder / "vit"
    )
    tf.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "vit")
    segformer = tf.SegformerConfig(hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64, num_labels=len(PLACES))
    tf.SegformerForSemanticSegmentation(segformer).save_pretrained(folder / "segformer")
    tf.SegformerImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "segformer")
    backbone = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
              (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}  # fmt: skip
    detr = tf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        num_queries=20, num_labels=len(CELLS), **layers,
    )  # fmt: skip
    tf.DetrForObjectDetection(detr).save_pretrained(folder / "detr")
    tf.DetrImageProcessor().save_pretrained(folder / "detr")


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a script: this project, and no network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }


def trained(command: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """What a training of one model wrote into report.json, or the end of what it said; and all that it said."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=surroundings(folder), capture_output=True, text=True, timeout=900
    )
    if done.returncode or not report.exists():
        return {"error": (done.stdout + done.stderr)[-1500:]}, done.stderr
    (model,) = json.loads(report.read_text())["models"]
    return model, done.stderr


def run(script: Path, words: list[str], folder: Path, level: str) -> dict[str, Any]:
    """One script at one level: what was measured, or the end of what it said."""
    command = ["-m", "hf_actnn", "run", "--level", level, "--report", "report.json", str(script)]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        options = [out if word == "out" else word for word in _COMMON]
        model, printed = trained([*command, *options, *words], folder)
    if "error" in model:
        return model
    said = re.findall(r"hf-actnn: (.+)", printed)
    return {key: model[key] for key in ("model", "saved_bytes", "samples", "steps")} | {"said": said}


def compared(script: Path, at: Callable[[str], dict[str, Any]], level: str) -> dict[str, Any]:
    """A script at L0 and at a level."""
    wants = re.search(r'^check_min_version\("(.+)"\)', script.read_text(), re.MULTILINE)
    found: dict[str, Any] = {
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "asks_for_transformers": wants[1] if wants else None,
    }
    found |= {"plain": at("L0"), level: at(level)}
    if all("error" not in found[one] for one in ("plain", level)):
        found["ratio"] = round(found["plain"]["saved_bytes"] / found[level]["saved_bytes"], 2)
    return found


# Runs a script as runpy does and has its call of convert measured: such a script goes through no `hf-actnn run`.
MEASURED = """
import json, runpy, sys
import hf_actnn
from hf_actnn.memory import measure_next_forward

convert = hf_actnn.convert

def measuring(model, config):
    def done(memory, samples):
        found = {"model": type(model).__name__, "saved_bytes": memory.saved_bytes, "samples": samples}
        with open("report.json", "w") as file:
            json.dump({"models": [found]}, file)

    measure_next_forward(convert(model, config), done)
    return model

hf_actnn.convert = measuring
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def with_line(source: str, level: str) -> str:
    """timm's script with one line behind the statement that makes the model."""
    lines = source.splitlines(keepends=True)
    (made,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node).startswith("model = create_model(")
    )
    lines.insert(made.end_lineno, f'{" " * made.col_offset}import hf_actnn; hf_actnn.convert(model, "{level}")\n')
    return "".join(lines)


def timm_trains(script: Path, model: str, folder: Path, level: str) -> dict[str, Any]:
    """timm's script at one level: what was measured, or the end of what it said."""
    (folder / "train_with_line.py").write_text(with_line(script.read_text(), level))
    words = ["--data-dir", "pictures", "--model", model, *_TIMM, *TIMM_MODELS[model], "--output", "timm_out"]
    found, _ = trained(["-c", MEASURED, "train_with_line.py", *words], folder)
    return found if "error" in found else {**found, "steps": IMAGES // BATCH}


def write_pictures(data: Path, folder: Path) -> None:
    """Images in a folder per split and class."""
    from datasets import load_dataset

    for split, of in (("train", "train"), ("val", "test")):
        file = str(data / "cifar10" / f"{of}.parquet")
        for index, row in enumerate(load_dataset("parquet", data_files=file, split=f"train[:{IMAGES}]")):
            place = folder / "pictures" / split / str(row["label"])
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{index}.png")


def tell(name: str, found: dict[str, Any], level: str) -> None:
    print(f"{name}: {found['ratio']}x" if "ratio" in found else f"{name}: failed", flush=True)
    print(found["plain"].get("error", ""), found[level].get("error", ""), flush=True)


def write_page(results: dict[str, Any]) -> None:
    """Put what was measured into docs/scripts.md."""
    page = ROOT / "docs" / "scripts.md"
    versions = results["versions"]
    lines = ["| script | model | level | kept per image, plain | at the level | ratio | steps |", "|---" * 7 + "|"]
    for name, found in results["scripts"].items():
        level = TIMM_LEVEL if name.startswith("timm") else results["level"]
        if "ratio" not in found:
            lines.append(f"| {name} | failed | {level} | | | | |")
            continue
        plain, kept = (found[one]["saved_bytes"] / found[one]["samples"] / 1e3 for one in ("plain", level))
        sizes = f"{plain:,.0f} kB | {kept:,.1f} kB | {found['ratio']:.1f}x"
        lines.append(f"| {name} | {found[level]['model']} | {level} | {sizes} | {found[level]['steps']} |")
    wanted = sorted({found["asks_for_transformers"] for found in results["scripts"].values()} - {None})
    lines += [
        "",
        "Hugging Face's example scripts as published, whose own check asks for transformers "
        f"{', '.join(wanted)} or newer, each with a small model with random weights and {IMAGES} real images,",
        f"trained and evaluated on a CPU with transformers {versions['transformers']}, accelerate "
        f"{versions['accelerate']}, timm {versions['timm']}, torch {versions['torch']}. Plain is level L0, which keeps",
        "what autograd keeps. `benchmarks/unmodified.py` runs them from a folder that it is given; they are no part of",
        "this project.",
    ]
    pages.write_section(page, "unmodified", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get
    parser.add_argument("--scripts", type=Path, default=default("HF_ACTNN_SCRIPTS"), help="default: $HF_ACTNN_SCRIPTS")
    parser.add_argument("--data", type=Path, default=default("HF_ACTNN_DATA"), help="default: $HF_ACTNN_DATA")
    parser.add_argument("--timm", type=Path, help="timm's train.py")
    parser.add_argument("--level", default="L3")
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="SCRIPT")
    arguments = parser.parse_args()
    for option, holds in (("scripts", "Hugging Face's example scripts"), ("data", "cifar10, camvid and bccd")):
        given = getattr(arguments, option)
        if given is None or not Path(given).is_dir():
            raise SystemExit(f"--{option} names no folder: give one with {holds}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for metric, source in (("accuracy", ACCURACY), ("mean_iou", MEAN_IOU)):
            (folder / metric).mkdir()
            (folder / metric / f"{metric}.py").write_text(source)
        write_data(Path(arguments.data), folder)
        write_models(folder)
        for task in arguments.only:
            script = Path(arguments.scripts).resolve() / f"{task}.py"
            results[task] = compared(script, partial(run, script, TASKS[task], folder), arguments.level)
            tell(task, results[task], arguments.level)
        if arguments.timm is not None:
            write_pictures(Path(arguments.data), folder)
        for model in TIMM_MODELS if arguments.timm is not None else ():
            task = f"timm's train.py, {model}"
            results[task] = compared(arguments.timm, partial(timm_trains, arguments.timm, model, folder), TIMM_LEVEL)
            tell(task, results[task], TIMM_LEVEL)
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    found = {"level": arguments.level, "versions": versions, "scripts": results}
    timing.write("unmodified", found)
    write_page(found)


if __name__ == "__main__":
    main()
