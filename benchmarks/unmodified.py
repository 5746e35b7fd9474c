"""Hugging Face's published example scripts, as they are, through `hf-actnn run`: do they train, and what do they keep?

    python benchmarks/unmodified.py --scripts path/to/scripts --data path/to/data [--level L3] [--only NAME ...]

`--scripts` is a folder with the scripts named in TASKS, from examples/pytorch of transformers; none is changed. They
need `evaluate` and `albumentations`. `--data` is a folder with the parquet files of `cifar10`, `camvid` and `bccd` in
folders of these names. Each script trains a small model with random weights for some steps and evaluates it, without a
network: once at L0, which keeps what autograd keeps, and once at the level. Data, model and metrics are local folders.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "albumentations")

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


def run(script: Path, words: list[str], level: str, folder: Path) -> dict[str, Any]:
    """One script at one level: what was measured, or the end of what it said."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hf_actnn", "run", "--level", level, "--report", str(report), str(script)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    with tempfile.TemporaryDirectory(dir=folder) as out:
        options = [out if word == "out" else word for word in _COMMON]
        done = subprocess.run(
            [*command, *options, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
    if done.returncode or not report.exists():
        return {"error": (done.stdout + done.stderr)[-1500:]}
    (model,) = json.loads(report.read_text())["models"]
    said = re.findall(r"hf-actnn: (.+)", done.stderr)
    return {key: model[key] for key in ("model", "saved_bytes", "samples", "steps")} | {"said": said}


def compared(script: Path, words: list[str], level: str, folder: Path) -> dict[str, Any]:
    """A script at L0 and at a level."""
    wants = re.search(r'^check_min_version\("(.+)"\)', script.read_text(), re.MULTILINE)
    found: dict[str, Any] = {
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "asks_for_transformers": wants[1] if wants else None,
    }
    found |= {"plain": run(script, words, "L0", folder), level: run(script, words, level, folder)}
    if all("error" not in found[one] for one in ("plain", level)):
        found["ratio"] = round(found["plain"]["saved_bytes"] / found[level]["saved_bytes"], 2)
    return found


def write_page(results: dict[str, Any]) -> None:
    """Put what was measured into docs/scripts.md."""
    page = ROOT / "docs" / "scripts.md"
    level, versions = results["level"], results["versions"]
    lines = [
        f"| script | model | kept per image, plain | at {level} | ratio | steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results["scripts"].items():
        if "ratio" not in found:
            lines.append(f"| `{name}.py` | failed | | | | |")
            continue
        plain, kept = (found[one]["saved_bytes"] / found[one]["samples"] for one in ("plain", level))
        model, steps = found[level]["model"], found[level]["steps"]
        sizes = f"{plain / 1e3:,.0f} kB | {kept / 1e3:,.1f} kB | {found['ratio']:.1f}x"
        lines.append(f"| `{name}.py` | {model} | {sizes} | {steps} |")
    wanted = sorted({found["asks_for_transformers"] or "any" for found in results["scripts"].values()})
    lines += [
        "",
        "Hugging Face's example scripts as published, whose own check asks for transformers "
        f"{', '.join(wanted)} or newer, each with a small model with random weights and {IMAGES} real images,",
        f"trained and evaluated on a CPU with transformers {versions['transformers']}, accelerate "
        f"{versions['accelerate']}, torch {versions['torch']}. Plain is level L0, which keeps what autograd keeps.",
        "`benchmarks/unmodified.py` runs them from a folder that it is given; they are no part of this project.",
    ]
    head, rest = page.read_text().split("<!-- unmodified: begin.", 1)
    first, rest = rest.split("\n", 1)
    tail = rest.split("<!-- unmodified: end -->", 1)[1]
    page.write_text(
        f"{head}<!-- unmodified: begin.{first}\n\n" + "\n".join(lines) + f"\n\n<!-- unmodified: end -->{tail}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get
    parser.add_argument("--scripts", type=Path, default=default("HF_ACTNN_SCRIPTS"), help="default: $HF_ACTNN_SCRIPTS")
    parser.add_argument("--data", type=Path, default=default("HF_ACTNN_DATA"), help="default: $HF_ACTNN_DATA")
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
            script = Path(arguments.scripts) / f"{task}.py"
            found = compared(script.resolve(), TASKS[task], arguments.level, folder)
            results[task] = found
            print(task, found.get("ratio", "failed"), found[arguments.level].get("error", ""), flush=True)
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    found = {"level": arguments.level, "versions": versions, "scripts": results}
    timing.write("unmodified", found)
    write_page(found)


if __name__ == "__main__":
    main()
