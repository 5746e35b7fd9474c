"""Trains a vision transformer and a residual network on real images, as they are and with compressed activations.

    python examples/demo/demo.py --out demo

Prints one table and writes it as `demo.json` and as a picture, `demo.png`. Each row is a run of `train.py` in its own
process, with the same seed, the same split and the same order of the data. In all of them large tensors have pages of
their own, so that the peak is what was in use at once; in the C library's heap, which `--heap` leaves them in, what was
freed may stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a picture
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TITLES = {"vit": "Hugging Face ViT", "resnet": "Hugging Face ResNet"}
COLUMNS = ("model", "level", "test accuracy", "activations per image", "ratio", "peak RSS growth", "time per step")


#: For glibc: tensors of 128 KiB and more outside of its heap.
PAGES = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def environment(heap: bool) -> dict[str, str]:
    """What a run is given: this process's own, but for settings of malloc, which are the demo's in any shell."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # Waiting threads sleep instead of spinning: on a machine that is busy otherwise, spinning costs many times more.
    return {"OMP_WAIT_POLICY": "PASSIVE", **own, **({} if heap else PAGES)}


def run(model: str, level: str, folder: Path, words: list[str], heap: bool) -> dict[str, Any]:
    """Train once in a process of its own and read what it measured."""
    result = folder / f"{model}-{level}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "train.py"), "--model", model, "--level", level, "--result", str(result)]
    command += words
    print(f"\n{TITLES[model]}, {'uncompressed' if level == 'none' else level}", flush=True)
    # stdout carries the figures, read from the file instead; stderr carries the Trainer's progress bar.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(heap))
    return json.loads(result.read_text())


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table, as people read it."""
    return (
        TITLES[result["model"]],
        "uncompressed" if result["level"] == "none" else result["level"],
        f"{100 * result['test_accuracy']:.1f} %",
        f"{result['activation_bytes_per_image'] / 1e3:,.1f} kB",
        f"{result['ratio']:.1f}x",
        f"{result['peak_rss_growth_bytes'] / 1e6:,.0f} MB",
        f"{1e3 * result['seconds_per_step']:.0f} ms",
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows under their headings, columns aligned."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """The table as bars: what is kept, what the process grew by, what a step takes, how well the model does."""
    panels = [
        ("activations kept per image (kB)", "activation_bytes_per_image", 1e-3),
        ("peak RSS growth (MB)", "peak_rss_growth_bytes", 1e-6),
        ("time per step (ms)", "seconds_per_step", 1e3),
        ("test accuracy (%)", "test_accuracy", 1e2),
    ]
    models = list(dict.fromkeys(result["model"] for result in results))
    levels = list(dict.fromkeys(result["level"] for result in results))
    colours = dict(zip(levels, ("#9aa5b1", "#1f6feb", "#2da44e", "#bf8700"), strict=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.4))
    for axis, (title, key, scale) in zip(axes, panels, strict=True):
        for index, level in enumerate(levels):
            chosen = [result for result in results if result["level"] == level]
            places = [models.index(result["model"]) + (index - (len(levels) - 1) / 2) * 0.38 for result in chosen]
            label = "uncompressed" if level == "none" else f"hf_actnn {level}"
            bars = axis.bar(places, [result[key] * scale for result in chosen], 0.36, color=colours[level], label=label)
            texts = [f"{result[key] * scale:.3g}" for result in chosen]
            if key == "activation_bytes_per_image" and level != "none":
                texts = [f"{text}\n({result['ratio']:.1f}x less)" for text, result in zip(texts, chosen, strict=True)]
            axis.bar_label(bars, texts, fontsize=8, padding=2)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(models)), [TITLES[model].removeprefix("Hugging Face ") for model in models])
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(levels), frameon=False)
    title = f"Training on scikit-learn's digits, batches of {results[0]['batch']}, same seed and data order"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for demo.json and demo.png")
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--levels", nargs="+", default=["none", "L2"])
    parser.add_argument("--epochs", type=float, help="for a shorter run")
    parser.add_argument("--batch", type=int, help="images in a batch, in place of 256")
    parser.add_argument("--heap", action="store_true", help="leave large tensors in the C library's heap")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    given = {"--epochs": options.epochs, "--batch": options.batch}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    rows = [(model, level) for model in options.models for level in options.levels]
    results = [run(model, level, options.out, words, options.heap) for model, level in rows]
    text = table([row(result) for result in results])
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    (options.out / "demo.json").write_text(json.dumps({"machine": machine, "runs": results}, indent=2) + "\n")
    picture(results, options.out / "demo.png")
    print(f"\n{text}\n\nThe same as a picture: {options.out / 'demo.png'}")


if __name__ == "__main__":
    main()
