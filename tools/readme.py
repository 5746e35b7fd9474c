"""Writes what was measured, and what of it speaks against us, into README.md, from files in benchmarks/results.

python tools/readme.py            # rewrite the two regions, each between two marks
python tools/readme.py --check    # exit 1 if they are not what the files say
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import results  # in this folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FULL_SIZE = {"resnet50": "ResNet-50", "vit_b16": "ViT-B/16", "convnext_t": "ConvNeXt-T"}
#: Their names on the front of memory and time.
IN_FRONT = {"resnet50": "resnet50", "vit_b16": "vit_b", "convnext_t": "convnext_t"}
#: Of those who compress, without a compiler and without checkpoints.
LEVELS = ("L1", "L2", "L3")
TASKS = {
    "cifar10-resnet": "ResNet-20, CIFAR-10, accuracy",
    "cifar10-vit": "small ViT, CIFAR-10, accuracy",
    "camvid-segformer": "SegFormer, CamVid, mIoU",
    "camvid-upernet": "UperNet, CamVid, mIoU",
    "bccd-rtdetr": "RT-DETR, BCCD, mAP50",
}
LARGEST = {
    "resnet50": "ResNet-50",
    "swin_tiny_patch4_window7_224": "Swin-T",
    "vit_base_patch16_224": "ViT-B/16",
}
NAMES = {"vit": "Hugging Face ViT", "resnet": "Hugging Face ResNet"}


def demo(results: dict[str, Any]) -> list[str]:
    """The demo's table."""
    lines = [
        "| model | level | test accuracy | activations per image | ratio | peak RSS growth | time per step |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        cells = [
            NAMES[run["model"]],
            "uncompressed" if run["level"] == "none" else run["level"],
            f"{100 * run['test_accuracy']:.1f} %",
            f"{run['activation_bytes_per_image'] / 1e3:,.1f} kB",
            f"{run['ratio']:.1f}x",
            f"{run['peak_rss_growth_bytes'] / 1e6:,.0f} MB",
            f"{1e3 * run['seconds_per_step']:.0f} ms",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"`make demo`, small models on 8 x 8 digits, batches of {results['runs'][0]['batch']}, large tensors in pages "
        f"of their own, one seed; {results['machine']} "
        "([benchmarks/results/demo.json](benchmarks/results/demo.json)).",
    ]
    return lines


def _with_pages(front: dict[str, Any]) -> str:
    """What steps take, of plain training, where all tensors have pages of their own."""
    ratios = {model: _over_plain(row, "seconds_per_image").get("L3") for model, row in front["models"].items()}
    said = [f"{ratios[model]:.2f} for {FULL_SIZE[name]}" for name, model in IN_FRONT.items() if ratios.get(model)]
    if not said:
        return ""
    file = "[front.json](benchmarks/results/front.json)"
    beside = any("note" in front["models"][model] for model in IN_FRONT.values() if ratios.get(model))
    where = "in one thread, some beside another process" if beside else "in one thread"
    return f" (with pages for both, {where}: {', '.join(said)}; {file})"


def _over_plain(row: dict[str, Any], what: str) -> dict[str, float]:
    """Of a model on the front: each way's figure over plain training's."""
    found = {way: one[what] for way, one in row["ways"].items() if one["status"] == "ok"}
    return {way: value / found["plain"] for way, value in found.items() if "plain" in found}


def full_size(memory: dict[str, Any], step: dict[str, Any], front: dict[str, Any]) -> list[str]:
    """Bytes and times of full-size models."""
    lines = [
        "",
        f"| 224 px, fp32, {memory['bits']} bits | activations, plain | hf_actnn | ratio "
        "| peak memory, plain | hf_actnn | ratio | time per step, of plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in memory["per_image"].items():
        time = step["models"].get(name, {}).get("over_plain", {}).get("hf_actnn")
        cells = [
            FULL_SIZE[name],
            f"{row['plain_bytes'] / 1e6:.1f} MB",
            f"{row['held_bytes'] / 1e6:.2f} MB",
            f"{row['ratio']:.1f}x",
            *_peaks(row),
            f"{time:.2f}" if time else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = memory["environment"]
    lines += [
        "",
        "Bytes per image. Peak memory: what another image adds to the peak of the resident set, with large tensors in "
        f"pages of their own; time with glibc's heap as it is{_with_pages(front)}. "
        "`benchmarks/memory.py` and `benchmarks/step.py` (ResNet and ConvNeXt of timm in the latter), random weights; "
        f"{machine['cpu']}, {machine['cpus']} cores ([memory.json](benchmarks/results/memory.json), "
        "[step.json](benchmarks/results/step.json)).",
    ]
    return lines


def chosen_bits(fidelity: dict[str, Any]) -> list[str]:
    """What it does to gradients to choose the bits."""
    lines = [
        "",
        "| trained on CIFAR-10 | variance added to the gradient, 2 bits for all | 2 on average, chosen (L3) | of it |",
        "|---|---|---|---|",
    ]
    names = {"resnet18": "ResNet-18", "vit_s": "ViT-S", "vit_192": "ViT, width 192"}
    found = {(row["model"], row["bits"], row["way"]): row for row in fidelity["rows"]}
    for model, name in names.items():
        if (model, 2, "L3") in found:
            same, chosen = found[model, 2, "once"]["variance"], found[model, 2, "L3"]["variance"]
            lines.append(f"| {name} | {same:.3f} | {chosen:.4f} | {chosen / same:.3f} |")
    machine = fidelity["environment"]
    lines += [
        "",
        "Relative to the squared gradient, by Monte Carlo, after some hundred steps; equal bytes within 0.5 % "
        f"([fidelity.json](benchmarks/results/fidelity.json), {machine['cpu']}). Measured with earlier weights of "
        "parameters ([Theory](docs/theory.md#choosing-bits)), as was RT-DETR's score at L3 below."
        + rounded_alone([row for row in fidelity["rows"] if row["way"] != "original"]),
    ]
    return lines


def rounded_alone(of_ours: list[dict[str, Any]]) -> str:
    """A sentence on figures of a codec whose roundings did not mirror each other yet."""
    count = sum("roundings" not in one for one in of_ours)
    what = "These figures of hf_actnn" if count == len(of_ours) else f"{count} of its {len(of_ours)} figures"
    return f" {what} are of values rounded each for itself ([The codec](docs/codec.md#dither))." if count else ""


def scores(accuracy: dict[str, Any]) -> list[str]:
    """What models score after training from random weights, and their training loss beside the uncompressed one."""
    sys.path[:0] = [str(ROOT / "benchmarks" / "accuracy"), str(ROOT / "benchmarks")]
    import run

    ways = {run.PLAIN: "uncompressed", "auto": '`bits="auto"`', "L3": "L3", "original-2": "original scheme, 2 bits"}
    lines = [
        "",
        f"| trained on real images | {' | '.join([*ways.values(), 'seeds'])} |",
        f"|---|{'---|' * len(ways)}---|",
    ]
    further = []
    for task, name in TASKS.items():
        found = {way: run.scores(accuracy["runs"], task, way) for way in ways}
        # Of the same seeds in the whole row: a scheme that has more of them has others.
        ends = sorted(set.intersection(*(set(values) for values in found.values())))
        seeds = {end.partition("@")[0] for end in ends}
        runs = {key: one for key, one in accuracy["runs"].items() if key.rpartition("/")[2] in ends}
        where = " (on a GPU)" if all("@" in end for end in ends) else ""
        if len(seeds) < run.SEEDS:
            # By seed alone, where schemes ran on different devices. Losses are of pairs on one device all the same.
            found = {way: run.of_seeds(values) for way, values in found.items()}
            ends = sorted(seeds := set.intersection(*(set(values) for values in found.values())))
            runs, where = accuracy["runs"], " (some runs on a GPU)"
        if len(seeds) < run.SEEDS:
            continue  # a task counts when all of its seeds are there
        cells = []
        for way, values in found.items():
            lost = None if way == run.PLAIN else run.loss(runs, task, way)
            more = "" if lost is None else f" ({100 * lost.mean:+.1f} %{run.of_paired(lost.seeds, len(seeds))})"
            cells.append(f"{100 * statistics.mean(values[end] for end in ends):.1f}{more}")
        lines.append(f"| {name}{where} | {' | '.join([*cells, str(len(seeds))])} |")
        for way in (one for one in ways if one != run.PLAIN):
            whole = run.compared(accuracy["runs"], task, way)
            if whole is not None and runs is not accuracy["runs"] and whole["pairs"] > len(ends):
                further.append(
                    f"{ways[way]} on {name.split(',')[0]} {100 * whole['difference']:+.1f} points from uncompressed "
                    f"({whole['seeds']} seeds, {whole['pairs']} runs)"
                )
    if len(lines) == 3:
        return []
    return [
        *lines,
        "",
        "Means of scores of the same seeds for all of a row; in brackets the training loss at the end relative to "
        "uncompressed, which scatters less. "
        + (f"Over all of their runs: {'; '.join(further)}. " if further else "")
        + 'Bits of L3 are 2 on average; `"auto"` chooses how many. The original scheme is that of '
        "the paper, every save for itself. Spreads, intervals, bytes and what does not hold: "
        "[Accuracy against bits](docs/results/accuracy.md) "
        "([accuracy.json](benchmarks/results/accuracy.json))."
        + rounded_alone(
            [row["machine"] for key, row in accuracy["runs"].items() if key.split("/")[1] in ("auto", "L3")]
        ),
    ]


def largest(results: dict[str, Any]) -> list[str]:
    """A sentence on the largest batches under a limit of memory on a CPU."""
    found = {
        (row["model"], row["limit"], row["method"]): row["largest"]
        for row in results["rows"]
        if row["vary"] == "batch" and row["device"] == "cpu" and row["precision"] == "fp32" and row["largest"]
    }
    said = [
        f"{LARGEST[model]} in {limit} {ours} images at L3, {found[model, limit, 'plain']} plainly"
        for (model, limit, method), ours in found.items()
        if method == "L3" and model in LARGEST and (model, limit, "plain") in found
    ]
    if not said:
        return []
    machine = results["environment"]
    return [
        "",
        f"The largest batches: {'; '.join(said)}. The memory is that of the process, Python, weights and momentum "
        f"included; 224 px, fp32, `benchmarks/max_batch.py`; {machine['cpu']}, {machine['cpus']} cores "
        "([Memory and speed](docs/results/speed.md), [max_batch.json](benchmarks/results/max_batch.json)).",
    ]


def limits() -> str:
    """What of all that was measured speaks most against us, in one line of a list."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    lines = ["* **The least favourable figures** of the tables above and of these pages:"]
    families = found["coverage"]["families"]
    ratios = {
        (key, kind): row[kind]["ratio"] for key, row in families.items() for kind in ("fp32", "bf16") if kind in row
    }
    low, kind = min(ratios, key=ratios.__getitem__)
    off = min(families, key=lambda key: families[key].get("cosine_4", 1.0))
    lines.append(
        f"the smallest ratio of bytes at 224 px {ratios[low, kind]:.1f} ({low.split('/')[1]}, {kind}), the lowest "
        f"cosine of a gradient at fixed 4 bits {families[off]['cosine_4']:.2f} ({off.split('/')[1]}), both of "
        f"[{len(families)} families](docs/coverage.md) with random weights;"
    )
    times, peaks = _on_a_gpu(found)
    slow, high = max(times, key=times.__getitem__), min(peaks, key=peaks.__getitem__)
    lines.append(
        f"the slowest step on a GPU {times[slow]:.2f} times plain training's ({slow}) and the smallest reduction of "
        f"the allocator's peak {peaks[high]:.1f} times ({high}, [Memory and speed](docs/results/speed.md));"
    )
    times, least = _on_a_cpu(found), _reductions_on_a_cpu(found)
    slow, low = max(times, key=times.__getitem__), min(least, key=least.__getitem__)
    lines.append(
        f"on a CPU {times[slow]:.2f} times ({slow}) and {least[low]:.1f} times ({low}, "
        "[Memory and speed](docs/results/speed.md));"
    )
    demo = {(run["model"], run["level"]): run["peak_rss_growth_bytes"] for run in found["demo_heap"]["runs"]}
    growth = {model: demo[model, "L2"] / demo[model, "none"] for model in NAMES}
    high = max(growth, key=growth.__getitem__)
    lines.append(
        f"the peak of a small model in batches of {found['demo_heap']['runs'][0]['batch']} {growth[high]:.2f} times "
        f"plain training's ({NAMES[high]}, L2, glibc's heap as it is; "
        "[demo_heap.json](benchmarks/results/demo_heap.json), `demo.py --batch 64 --heap`);"
    )
    lines.append(_lost(found["accuracy"]["runs"]))
    return "\n  ".join(lines) + "\n"


def _lost(runs: dict[str, Any]) -> str:
    """The largest mean loss of score, of schemes with several seeds, and of those with one where that is larger."""
    sys.path[:0] = [str(ROOT / "benchmarks" / "accuracy"), str(ROOT / "benchmarks")]
    import run

    ours = [name for name, scheme in run.SCHEMES.items() if scheme.fields]
    compared, single = [], {}
    for task in TASKS:
        plain = run.scores(runs, task, run.PLAIN)
        for scheme in ours:
            one = run.compared(runs, task, scheme)
            if one is not None:
                compared.append(one)
            else:
                for end, score in run.scores(runs, task, scheme).items():
                    if end in plain:
                        single[task, scheme] = plain[end] - score
    worst = min(compared, key=lambda one: one["difference"])
    lost, reach = (100 * abs(value) for value in (worst["difference"], worst["interval"][1] - worst["difference"]))
    text = (
        f"the largest mean loss of score {lost:.1f} ± {reach:.1f} points "
        f"({run.SCHEMES[worst['scheme']].title}, {TASKS[worst['task']]}; 95 %, {worst['seeds']} seeds"
    )
    most = max(single, key=single.__getitem__, default=None)
    if most is not None and 100 * single[most] > lost:
        task, scheme = most
        text += f"), of a single seed {100 * single[most]:.1f} ({run.SCHEMES[scheme].title}, {TASKS[task]}"
    return f"{text}; [Accuracy against bits](docs/results/accuracy.md))."


def _on_a_gpu(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Times of steps on a GPU over plain training's, and how many times smaller the allocator's peak is, of what is
    allocated and of what is reserved; by model, level and file."""
    times, peaks = {}, {}
    for file in results.GPU:
        for model, row in found[file]["models"].items():
            for way, ratio in results.gpu_times(row).items():
                if way in ("plain", "checkpoint"):
                    continue
                name = f"{model.split('_patch')[0]}, {way}, {file}.json"
                times[name] = ratio
                for peak in ("allocated", "reserved"):
                    peaks[f"{name}, {peak}"] = row["methods"]["plain"][peak] / row["methods"][way][peak]
    return times, peaks


def _on_a_cpu(found: dict[str, Any]) -> dict[str, float]:
    """Times of steps on a CPU over plain training's, without compiler and checkpoints, by model and level."""
    times = {}
    for file in ("demo", "demo_heap"):
        demo = {(run["model"], run["level"]): run["seconds_per_step"] for run in found[file]["runs"]}
        times |= {f"{NAMES[model]}, {file}, L2": demo[model, "L2"] / demo[model, "none"] for model in NAMES}
    times |= {f"{model}, L3": row["over_plain"]["hf_actnn"] for model, row in found["step"]["models"].items()}
    for model, row in found["front"]["models"].items():
        ratios = _over_plain(row, "seconds_per_image")
        for level in (one for one in LEVELS if one in ratios):
            name = f"{model}, {level}"
            times[name] = max(ratios[level], times.get(name, 0.0))  # step.json has some of them too
    return times


def _reductions_on_a_cpu(found: dict[str, Any]) -> dict[str, float]:
    """How many times smaller the peak of a step is, one that chooses bits included, by model and level."""
    peaks = {}
    for model, row in found["front"]["models"].items():
        ratios = _over_plain(row, "peak_per_image")
        peaks |= {f"{model}, {level}": 1 / ratios[level] for level in LEVELS if level in ratios}
    return peaks


def _peaks(row: dict[str, float]) -> list[str]:
    slopes = [row.get(f"rss_slope_pages_{mode}") for mode in ("plain", "hf_actnn")]
    if None in slopes:
        return ["", "", ""]
    plain, ours = slopes
    return [f"{plain / 1e6:.0f} MB", f"{ours / 1e6:.0f} MB", f"{plain / ours:.1f}x"]


def region() -> str:
    """What belongs between the marks now."""
    path = RESULTS / "demo.json"
    if not path.exists():
        return "No results are stored yet: `make demo` measures on your machine.\n"
    lines = demo(json.loads(path.read_text()))
    full = [RESULTS / f"{name}.json" for name in ("memory", "step", "front")]
    if all(path.exists() for path in full):
        lines += full_size(*(json.loads(path.read_text()) for path in full))
    if (RESULTS / "max_batch.json").exists():
        lines += largest(json.loads((RESULTS / "max_batch.json").read_text()))
    if (RESULTS / "fidelity.json").exists():
        lines += chosen_bits(json.loads((RESULTS / "fidelity.json").read_text()))
    if (RESULTS / "accuracy.json").exists():
        lines += scores(json.loads((RESULTS / "accuracy.json").read_text()))
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--demo" in sys.argv[1:-1]:
        made = Path(sys.argv[sys.argv.index("--demo") + 1])
        shutil.copyfile(made / "demo.json", RESULTS / "demo.json")
        shutil.copyfile(made / "demo.png", ROOT / "docs" / "images" / "demo.png")
    readme = ROOT / "README.md"
    text = new = readme.read_text()
    for name, made in {"results": region(), "limits": limits()}.items():
        begin, end = (f"<!-- {name}: {edge}" for edge in ("begin.", "end -->"))
        head, rest = new.split(begin, 1)
        mark, rest = rest.split("\n", 1)
        _, tail = rest.split(end, 1)
        space = "\n" if name == "results" else ""  # a list goes on
        new = f"{head}{begin}{mark}\n{space}{made}{space}{end}{tail}"
    if "--check" in sys.argv[1:]:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
