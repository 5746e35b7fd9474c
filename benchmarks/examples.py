"""The examples' trainings on real data, uncompressed and compressed, paired by seed and data order.

    python benchmarks/examples.py --data path/to/data [--tasks segformer ...] [--seeds 0 1 2] [--jobs 2] [--resume]

`--data` is a folder with the parquet files of `cifar10`, `camvid` and `bccd` in folders of these names. Every run is an
example's own train.py in a process of one thread; a seed fixes weights, order and augmentation, so that the two runs of
a pair differ in the rounding alone. Finished runs are kept as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pages
import timing

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("none", "L2")
#: Of a difference of pairs, by their number: Student's t at 97.5 %.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Task(NamedTuple):
    """One training.

    Attributes:
        example: folder of the example.
        data: folder of the data.
        score: name of the metric, as the example saves it.
        chance: what guessing the most frequent answer scores.
        arguments: of train.py.
    """

    example: str
    data: str
    score: str
    chance: float
    arguments: list[str]


def _config(**fields: Any) -> list[str]:
    return ["--from_scratch", "--config_overrides", json.dumps(fields)]


def every(batch: int, rate: float, epochs: float) -> list[str]:
    return [
        *("--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", "16"),
        *("--learning_rate", str(rate), "--num_train_epochs", str(epochs), "--warmup_steps", "50"),
    ]


SMALL_VIT = _config(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, patch_size=4)
_STREET = ["--ignored_class", "11", "--height", "120", "--width", "160", *every(8, 1e-3, 12)]
_CELLS = ["--height", "160", "--width", "224", "--weight_decay", "1e-4"]
_CIFAR = ["--image_size", "32", "--max_train_samples", "10000", "--max_eval_samples", "5000"]
TASKS = {
    "vit": Task(
        "image_classification",
        "cifar10",
        "accuracy",
        0.1,
        [
            *("--model", "vit", *_CIFAR, *every(64, 1e-3, 3)),
            *SMALL_VIT,
        ],
    ),
    "resnet": Task(
        "image_classification",
        "cifar10",
        "accuracy",
        0.1,
        ["--model", "resnet10t", "--from_scratch", *_CIFAR, *every(64, 2e-3, 3)],
    ),
    "segformer": Task(
        "semantic_segmentation",
        "camvid",
        "mean_iou",
        0.03,
        [
            *("--model", "segformer", *_STREET),
            *_config(
                hidden_sizes=[32, 64, 128, 160],
                depths=[1, 1, 1, 1],
                num_attention_heads=[1, 2, 4, 5],
                decoder_hidden_size=96,
            ),
        ],
    ),
    "upernet": Task(
        "semantic_segmentation",
        "camvid",
        "mean_iou",
        0.03,
        [
            *("--model", "upernet", *_STREET),
            *_config(
                backbone_config={
                    "model_type": "convnext",
                    "depths": [1, 1, 2, 1],
                    "hidden_sizes": [32, 64, 128, 160],
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
                hidden_size=64,
                use_auxiliary_head=False,
            ),
        ],
    ),
    "rt_detr": Task(
        "object_detection",
        "bccd",
        "map_50",
        0.0,
        [
            *("--model", "rt_detr", *_CELLS, *every(8, 1e-3, 30)),
            *_config(
                backbone_config={
                    "model_type": "rt_detr_resnet",
                    "embedding_size": 32,
                    "hidden_sizes": [32, 64, 96, 128],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage2", "stage3", "stage4"],
                },
                freeze_backbone_batch_norms=False,
                encoder_in_channels=[64, 96, 128],
                encoder_hidden_dim=96,
                encoder_ffn_dim=192,
                encoder_attention_heads=4,
                hidden_expansion=0.5,
                d_model=96,
                decoder_in_channels=[96, 96, 96],
                decoder_ffn_dim=192,
                decoder_layers=2,
                decoder_attention_heads=4,
                num_queries=60,
                num_denoising=40,
            ),
        ],
    ),
}


def run(
    task: Task,
    seed: int,
    data: Path,
    words: Sequence[str] = (),
    launcher: Sequence[str | Path] = (),
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, Any]:
    """One training: its score, its losses, seconds, and what it kept per image.

    Args:
        words: further arguments of train.py.
        launcher: a script and its arguments that run train.py, in place of Python.
        device: `cpu`, or `cuda` for the GPU that transformers' Trainer finds.
        threads: of torch's operations on the CPU.

    Raises:
        RuntimeError: train.py ended in an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, *map(str, launcher), str(ROOT / "examples" / task.example / "train.py")),
            *task.arguments,
            *("--dataset", str(data / task.data), "--seed", str(seed), "--output_dir", folder),
            *(["--use_cpu"] if device == "cpu" else []),
            *("--report_to", "none", "--disable_tqdm", "True", "--save_strategy", "no", "--logging_steps", "50"),
            *words,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        begin = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        scores = json.loads((Path(folder) / "eval_results.json").read_text())
        trained = json.loads((Path(folder) / "train_results.json").read_text())
    found: dict[str, Any] = {
        "losses": [float(value) for value in re.findall(r"'loss': '?([0-9.e+-]+|nan)", done.stdout)],
        "score": scores[f"eval_{task.score}"],
        "scores": {key: value for key, value in scores.items() if isinstance(value, float)},
        "train_seconds": trained["train_runtime"],
        "seconds": time.time() - begin,
    }
    for key in ("actnn_ratio", "actnn_bytes_per_sample"):
        values = re.findall(rf"'{key}': '?([0-9.e+]+)", done.stdout)
        if values:
            found[key] = float(values[-1])
    return found


def compared(runs: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Compressed minus uncompressed over the seeds that have both: mean, standard error, 95 % interval."""
    pairs = [
        (runs[f"{name}/none/{seed}"]["score"], runs[f"{name}/L2/{seed}"]["score"])
        for seed in sorted({int(key.rsplit("/", 1)[1]) for key in runs if key.startswith(f"{name}/")})
        if f"{name}/none/{seed}" in runs and f"{name}/L2/{seed}" in runs
    ]
    if len(pairs) < 2:
        return None
    differences = [compressed - plain for plain, compressed in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    mean = statistics.mean(differences)
    reach = STUDENT[len(pairs)] * error
    return {
        "pairs": len(pairs),
        "plain": statistics.mean(plain for plain, _ in pairs),
        "compressed": statistics.mean(compressed for _, compressed in pairs),
        "difference": mean,
        "standard_error": error,
        "interval": [mean - reach, mean + reach],
        "as_good": mean >= -max(0.01, 2 * error),
    }


def _section(results: dict[str, Any], example: str) -> list[str]:
    lines = [
        "| model | score | chance | uncompressed | L2 | difference, 95 % interval | activations | minutes, plain, L2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = results["runs"]
    for name, task in TASKS.items():
        found = compared(runs, name)
        if task.example != example or found is None:
            continue
        mean = {
            level: statistics.mean(
                one["train_seconds"] for key, one in runs.items() if key.startswith(f"{name}/{level}/")
            )
            for level in LEVELS
        }
        ratio = statistics.mean(one["actnn_ratio"] for key, one in runs.items() if key.startswith(f"{name}/L2/"))
        low, high = (100 * value for value in found["interval"])
        lines.append(
            f"| {name} | {task.score} | {100 * task.chance:.0f} | {100 * found['plain']:.1f} | "
            f"{100 * found['compressed']:.1f} | {100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f}) | "
            f"{ratio:.1f}x less | {mean['none'] / 60:.1f}, {mean['L2'] / 60:.1f} |"
        )
    machine = results["environment"]
    lines += [
        "",
        f"Per cent; means of {len(results['seeds'])} seeds, pairs of the same seed and data order; intervals by "
        "Student's t. "
        f"`benchmarks/examples.py` on {machine['cpu']}, one thread a run, torch {machine['torch']}, {machine['date']} "
        "([examples.json](../../benchmarks/results/examples.json)).",
    ]
    return lines


def write_pages(results: dict[str, Any]) -> None:
    """Put what was measured into the README of each example."""
    for example in {task.example for task in TASKS.values()}:
        page = ROOT / "examples" / example / "README.md"
        pages.write_section(page, "measured", ["## Measured", "", *_section(results, example)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_ACTNN_DATA"), help="default: $HF_ACTNN_DATA")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; times are then no measurement")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the output has already")
    parser.add_argument("--page", action="store_true", help="only write the pages, from the output that is there")
    options = parser.parse_args()
    path = Path(timing.__file__).parent / "results" / "examples.json"
    if options.page:
        return write_pages(json.loads(path.read_text()))
    if options.data is None or not Path(options.data).is_dir():
        raise SystemExit("--data names no folder: give one with cifar10, camvid and bccd")
    runs: dict[str, Any] = {}
    if options.resume and path.exists():
        runs = json.loads(path.read_text())["runs"]
    todo = [
        (name, level, seed)
        for seed in options.seeds
        for name in options.tasks
        for level in LEVELS
        if f"{name}/{level}/{seed}" not in runs
    ]

    def one(at: int) -> None:
        name, level, seed = todo[at]
        runs[f"{name}/{level}/{seed}"] = found = run(
            TASKS[name], seed, Path(options.data), [] if level == "none" else ["--actnn", level]
        )
        print(f"{at + 1} of {len(todo)}: {name} {level} seed {seed}: {found['score']:.4f}", flush=True)
        seeds = sorted({int(key.rsplit("/", 1)[1]) for key in runs})
        paired = {task: compared(dict(runs), task) for task in TASKS}
        timing.write("examples", {"seeds": seeds, "paired": paired, "runs": dict(sorted(runs.items()))})

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, range(len(todo))))
    write_pages(json.loads(path.read_text()))
    for name, found in json.loads(path.read_text())["paired"].items():
        if found:
            print(name, found)


if __name__ == "__main__":
    main()
