"""Writes docs/results from the JSON files in benchmarks/results: tables, plots, and where they come from.

python tools/results.py            # rewrite the pages and their pictures
python tools/results.py --check    # exit 1 if a page is not what the files say
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "benchmarks" / "accuracy"), str(ROOT / "benchmarks")]


def load(name: str) -> dict[str, Any] | None:
    """A file of results, where there is one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(one)} |" for one in (head, ["---"] * len(head), *rows)]


def source(name: str, command: str, machine: dict[str, Any], more: str = "") -> list[str]:
    """Where a table comes from."""
    cores = f", {machine['cpus']} cores" if "cpus" in machine else ""
    where = f"{machine.get('device', machine['cpu'])}{'' if 'device' in machine else cores}"
    file = f"[{name}.json](../../benchmarks/results/{name}.json)"
    return ["", f"`{command}`, {file}; {where}, torch {machine['torch']}, {machine['date']}.{more}", ""]


# -- accuracy ----------------------------------------------------------------------------------------------------------


def verdicts(runs: dict[str, Any]) -> list[str]:
    """What the pairs say of the claims, whether it is for us or not."""
    import run

    rows = []
    for task in run.TASKS:
        for scheme, other, claim in (
            ("auto", run.PLAIN, '`bits="auto"` no worse than uncompressed'),
            ("L3", run.PLAIN, "L3 no worse than uncompressed"),
            ("L3", "original-2", "L3 above the original scheme at 2 bits"),
            ("average-1.5", "original-adaptive-1.5", "L3 above the original scheme at 1.5 bits"),
        ):
            found = run.compared(runs, task, scheme, other)
            if found is None:
                continue
            mean, low, high = (100 * value for value in (found["difference"], *found["interval"]))
            if other == run.PLAIN:
                shown = low >= -100 * run.POINT
                said = ("yes" if shown else "yes, within the noise") if found["as_good"] else "**no**"
            else:
                said = "yes" if low > 0 else "**no**" if mean <= 0 else "yes, within the noise"
            rows.append([task, claim, str(found["pairs"]), f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", said])
    return table(["task", "claim", "pairs", "difference, 95 % interval", "held"], rows) if rows else []


def accuracy(pictures: bool) -> list[str] | None:
    """The page of scores."""
    results = load("accuracy")
    if results is None:
        return None
    import run

    runs = results["runs"]
    machines = sorted({json.dumps(one["machine"], sort_keys=True) for one in runs.values()})
    latest = max(map(json.loads, machines), key=lambda machine: machine["date"])
    lines = [
        "# Accuracy against bits",
        "",
        "Small models trained from random weights on real images, by the examples' own scripts. A seed fixes weights, "
        "order and augmentation, so runs of one seed differ in the rounding alone, and differences are paired by seed. "
        "The original scheme is that of the paper: every save for itself, groups of 256 values along a sample, bits "
        "uniform or by its rule (`benchmarks/accuracy/original.py` says what is the same and what is not).",
        "",
    ]
    found = verdicts(runs)
    if found:
        lines += ["## What the pairs say", "", *found, ""]
        lines += [
            "No worse: the mean difference is no lower than minus the larger of one point and two standard errors. "
            "With two or three pairs intervals are wide (Student's t). *Training loss*: of the last quarter of the "
            "steps, relative to uncompressed runs of the same seeds, with its standard error; these see the same "
            "batches, so it tells schemes apart that the score does not.",
            "",
        ]
    for task in run.TASKS:
        rows = run.table(runs, task)
        if len(rows) > 2:
            lines += [f"## {task}", "", *rows, ""]
            picture = PAGES / f"accuracy-{task}.svg"
            if pictures:
                draw_losses(runs, task, picture)
            if picture.exists():
                lines += [f"![Training loss by step, a line for each scheme]({picture.name})", ""]
    missing = [str(key) for key in run.grid() if str(key) not in runs]
    lines += ["## Where it comes from", ""]
    lines += source("accuracy", "python benchmarks/accuracy/run.py --data DATA", latest, " One thread a run.")
    if len(machines) > 1:
        lines += [
            f"Runs are of {len(machines)} machines and days, each of which is with its run; this is the last.",
            "",
        ]
    if missing:
        lines += [
            f"Of the grid's {len(missing) + len([k for k in run.grid() if str(k) in runs])} runs {len(missing)} are "
            "still to be done: tasks and schemes that are missing above, or have fewer seeds.",
            "",
        ]
    lines += ["One row again, beside the published one, in minutes:", "", "```bash"]
    lines += ["python benchmarks/accuracy/run.py --data DATA --task cifar10-resnet --level L3 --seeds 1 --short", "```"]
    return lines


def draw_losses(runs: dict[str, Any], task: str, path: Path) -> None:
    """Learning curves: means over seeds of the training loss, and the range of the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_actnn"
    import matplotlib.pyplot as plt
    import run

    figure, axes = plt.subplots(figsize=(7, 4))
    for scheme in run.SCHEMES:
        curves = [one["losses"] for key, one in runs.items() if key.startswith(f"{task}/{scheme}/")]
        if not curves:
            continue
        points = list(zip(*curves, strict=False))
        steps = [50 * (i + 1) for i in range(len(points))]
        (line,) = axes.plot(steps, [statistics.mean(one) for one in points], label=scheme, linewidth=1.2)
        if len(curves) > 1:
            lows, highs = [min(one) for one in points], [max(one) for one in points]
            axes.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.12)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, mean of 50 steps")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# -- memory and speed --------------------------------------------------------------------------------------------------


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def cpu_models(memory: dict[str, Any], step: dict[str, Any]) -> list[str]:
    """Bytes and peaks per image, and time, of eager training on a CPU."""
    rows = []
    for name, row in memory["per_image"].items():
        over = step["models"].get(name, {}).get("over_plain", {})
        rows.append(
            [
                name,
                *(megabytes(row[key]) for key in ("plain_bytes", "held_bytes")),
                *(megabytes(row.get(f"rss_slope_pages_{key}")) for key in ("plain", "hf_actnn", "free")),
                *(f"{over[key]:.2f}" if key in over else "" for key in ("hf_actnn", "checkpointing")),
            ]
        )
    head = ["model", "kept, plain", f"kept, {memory['bits']} bits", "peak, plain", f"peak, {memory['bits']} bits"]
    head += ["peak, saves costing nothing", "time / plain", "checkpointing's time / plain"]
    return [
        *table(head, rows),
        *source("memory", "python benchmarks/memory.py", memory["environment"], " MB per image, 224 px, fp32."),
        *source("step", "python benchmarks/step.py", step["environment"]),
    ]


def cpu_compiled(results: dict[str, Any]) -> list[str]:
    """Modes of torch.compile on a CPU."""
    rows = []
    for model in ("vit_s", "resnet18"):
        for mode, row in results.get(model, {}).items():
            if "peak_growth_per_image" not in row:
                continue
            cells = [megabytes(row["saved_per_image"]), megabytes(row["peak_growth_per_image"])]
            rows.append([model, mode, *cells, f"{row['cpu_seconds']:.1f}", str(row["graph_breaks"])])
    head = ["model", "mode", "kept, MB per image", "peak, MB per image", "processor seconds a step", "graph breaks"]
    machine = results["environment"]
    return [*table(head, rows), *source("compiled", "python benchmarks/compiled.py", machine)]


def cpu_checkpointing(results: dict[str, Any]) -> list[str]:
    """Gradient checkpointing with and without compression."""
    rows = []
    for model, row in results["models"].items():
        for way in ("plain", "checkpoint", "level", "both"):
            peak = row.get("peaks", {}).get(way)
            cells = [megabytes(row["bytes"][way]["held"]), megabytes(peak) if isinstance(peak, (int, float)) else ""]
            time = row["time"][way]["wall"] / row["time"]["plain"]["wall"]
            title = {"level": results["level"], "both": f"checkpointing and {results['level']}"}.get(way, way)
            rows.append([model, title, *cells, f"{time:.2f}"])
    head = ["model", "way", "kept, MB per image", "peak, MB per image", "time / plain"]
    machine = results["environment"]
    return [*table(head, rows), *source("checkpointing", "python benchmarks/checkpointing.py", machine)]


def gpu_steps(results: dict[str, Any]) -> list[str]:
    """Time and peaks of steps on a GPU."""
    rows = []
    for model, row in results["models"].items():
        medians = {way: statistics.median(values) for way, values in row["seconds"].items()}
        for way, seconds in medians.items():
            found = row["methods"][way]
            sizes = [f"{found[key] / 2**30:.1f}" for key in ("allocated", "reserved")]
            rows.append([model, str(row["batch"]), way, *sizes, f"{1e3 * seconds:.0f}"])
            rows[-1].append(f"{seconds / medians['plain']:.2f}")
    head = ["model", "batch", "way", "peak allocated, GiB", "peak reserved, GiB", "ms a step", "time / plain"]
    machine = next(iter(results["models"].values()))["environment"]
    more = f" {results['precision']}; driver {machine['driver, clocks'].split(',')[0]}."
    return [*table(head, rows), *source("step_gpu", "python benchmarks/step_gpu.py", machine, more)]


def beaten(steps: dict[str, Any] | None) -> list[str]:
    """Where something else lies at both less memory and less time than each of our levels: said first."""
    if steps is None:
        return []
    found = []
    for model, row in steps["models"].items():
        seconds = {way: statistics.median(values) for way, values in row["seconds"].items()}
        peaks = {way: row["methods"][way]["allocated"] for way in seconds}
        ours = [way for way in seconds if way not in ("plain", "checkpoint")]
        for other in ("plain", "checkpoint"):
            better = [way for way in ours if seconds[other] < seconds[way] and peaks[other] < peaks[way]]
            if ours and len(better) == len(ours):
                found.append(f"{other} on {model}")
            elif better:
                found.append(f"{other} on {model}, against {', '.join(better)}")
        slow = {way: statistics.median(values) for way, values in row.get("slow", {}).items()}
        of = {way: row["slow_methods"][way].get("allocated") for way in slow}
        both = {"L4", "save_on_cpu"} <= slow.keys() and None not in of.values()
        if both and slow["save_on_cpu"] < slow["L4"] and of["save_on_cpu"] < of["L4"]:
            found.append(f"save_on_cpu on {model} at a batch of {row['slow_batch']}, against L4")
    if not found:
        return [
            "On the GPU measured neither plain training nor checkpointing lies at both less memory and less time than "
            "a level of ours.",
            "",
        ]
    return [
        f"**At both less memory and less time than a level of ours, on the GPU measured:** {'; '.join(found)}.",
        "",
    ]


def speed(pictures: bool) -> list[str]:
    """The page of memory and time."""
    memory, step, steps = load("memory"), load("step"), load("step_gpu")
    lines = ["# Memory and speed", "", *beaten(steps)]
    lines += [
        "What each table counts is said in the file that made it. Peaks are of the whole process, or of the device.",
        "",
    ]
    if memory and step:
        lines += ["## On a CPU", "", *cpu_models(memory, step)]
    for title, name, made in (
        ("Gradient checkpointing, on a CPU", "checkpointing", cpu_checkpointing),
        ("torch.compile, on a CPU", "compiled", cpu_compiled),
        ("On a GPU", "step_gpu", gpu_steps),
    ):
        results = load(name)
        if results is not None:
            lines += [f"## {title}", "", *made(results)]
    if pictures and steps is not None:
        draw_front(steps, PAGES / "front.svg")
    if (PAGES / "front.svg").exists():
        lines += ["![Time against peak memory of each way, a panel for each model](front.svg)"]
    return lines


def draw_front(results: dict[str, Any], path: Path) -> None:
    """Time against peak memory, and the ways that nothing beats in both."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_actnn"
    import matplotlib.pyplot as plt

    models = results["models"]
    figure, panels = plt.subplots(1, len(models), figsize=(3.2 * len(models), 3), squeeze=False)
    for axes, (model, row) in zip(panels[0], models.items(), strict=True):
        seconds = {way: statistics.median(values) for way, values in row["seconds"].items()}
        at = {way: (row["methods"][way]["allocated"] / 2**30, seconds[way] / seconds["plain"]) for way in seconds}
        front = sorted(p for p in at.values() if not any(q[0] < p[0] and q[1] < p[1] for q in at.values()))
        axes.plot(*zip(*front, strict=True), color="0.7", linewidth=1)
        for way, (x, y) in at.items():
            axes.plot(
                [x], [y], "o", markersize=4, color="tab:blue" if way not in ("plain", "checkpoint") else "tab:orange"
            )
            axes.annotate(way, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axes.set_title(model.split("_patch")[0], fontsize=9)
        axes.set_xlabel("peak allocated, GiB", fontsize=8)
        axes.margins(0.15)
    panels[0][0].set_ylabel("time of a step, of plain", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


MADE: dict[str, Callable[[bool], list[str] | None]] = {"accuracy.md": accuracy, "speed.md": speed}


def main() -> int:
    check = "--check" in sys.argv[1:]
    wrong = []
    for name, make in MADE.items():
        lines = make(not check)
        text = None if lines is None else "\n".join([*lines, ""]).replace("\n\n\n", "\n\n")
        page = PAGES / name
        if check:
            wrong += [name] if (page.read_text() if page.exists() else None) != text else []
        elif text is not None:
            page.write_text(text)
    if wrong:
        print(f"not what the files say: {', '.join(wrong)}; run tools/results.py")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
