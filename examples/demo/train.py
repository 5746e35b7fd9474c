"""Trains one small model on scikit-learn's digits with the Hugging Face Trainer, and writes what it measured as JSON.

    python examples/demo/train.py --model vit --level L2 --result out/vit-L2.json

`demo.py` runs this file once per row of its table, each in a process of its own, so that a peak of memory belongs to
one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_actnn import ActNNCallback, track_memory


class Digits(Dataset):
    """The 1,797 handwritten digits that come with scikit-learn, enlarged from 8 x 8, in a fixed split."""

    def __init__(self, train: bool, size: int) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
        images, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        self.pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear")
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def vit() -> torch.nn.Module:
    """A vision transformer with 17 tokens of width 128."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def resnet() -> torch.nn.Module:
    """A residual network of three basic blocks."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[64, 128, 256],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


# Model, image size, epochs, learning rate.
MODELS = {"vit": (vit, 16, 24, 2e-3), "resnet": (resnet, 32, 8, 4e-3)}
# Large enough for the activations to be most of what training takes.
BATCH = 256


class StepTimes(TrainerCallback):
    """Notes the seconds of every optimizer step and the memory the process holds when training begins."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0
        self.rss_before = 0

    def on_train_begin(self, *args, **kwargs) -> None:
        self.rss_before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def on_step_begin(self, *args, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def activation_bytes(model: torch.nn.Module, data: Dataset, size: int) -> tuple[float, float]:
    """Bytes per image that a training forward keeps for backward, and how many times less that is than torch's."""
    batch = torch.utils.data.default_collate([data[index] for index in range(size)])
    model.train()
    with track_memory(model) as memory:
        loss = model(**batch).loss
        kept, ratio = memory.saved_bytes, memory.ratio
    del loss
    return kept / size, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--level", default="none", help="none, or a level such as L2")
    parser.add_argument("--batch", type=int, default=BATCH, help="images in a batch")
    parser.add_argument("--epochs", type=float, help="instead of the model's own number")
    parser.add_argument("--result", type=Path, help="write the measurements here")
    options = parser.parse_args()

    build, size, epochs, learning_rate = MODELS[options.model]
    train, test = Digits(train=True, size=size), Digits(train=False, size=size)
    if not 1 <= options.batch <= len(train):
        parser.error(
            f"--batch takes 1 to {len(train)} images, as many as there are to train on, and got {options.batch}: "
            "give another number, or leave it out"
        )
    set_seed(0)
    model = build()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch,
                per_device_eval_batch_size=250,
                num_train_epochs=options.epochs or epochs,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=20,
                weight_decay=0.05,
                logging_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=not sys.stderr.isatty(),  # a log would get a line per step
                use_cpu=True,
                seed=0,
            ),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            callbacks=[times] if options.level == "none" else [times, ActNNCallback(options.level)],
        )
        trainer.train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tested = trainer.evaluate()
    kept, ratio = activation_bytes(model, train, options.batch)
    result = {
        "model": options.model,
        "level": options.level,
        "test_accuracy": tested["eval_accuracy"],
        "activation_bytes_per_image": kept,
        "ratio": ratio,
        "peak_rss_growth_bytes": peak - times.rss_before,
        "seconds_per_step": statistics.median(times.seconds),
        "steps": len(times.seconds),
        "batch": options.batch,
    }
    if options.result:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
