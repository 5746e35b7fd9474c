"""Writes docs/results from the JSON files in benchmarks/results: tables, plots, and where they come from.

python tools/results.py            # rewrite the pages and their pictures
python tools/results.py --check    # exit 1 if a page is not what the files say
"""

from __future__ import annotations

import collections
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
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


def rounded_alone(machines: Iterable[dict[str, Any]], what: str = "figures") -> list[str]:
    """A sentence on those that are of a codec whose roundings did not mirror each other yet."""
    machines = list(machines)
    count = sum("roundings" not in machine for machine in machines)
    if not count:
        return []
    those = f"The {what}" if count == len(machines) else f"{count} of the {len(machines)} {what}"
    return [
        f"{those} are of an hf_actnn that rounded each value for itself, not in pairs that mirror each other as now "
        "([The codec](../codec.md#dither) says what that changes).",
        "",
    ]


# -- accuracy ----------------------------------------------------------------------------------------------------------


def verdicts(runs: dict[str, Any]) -> list[str]:
    """What the pairs say of the claims, whether it is for us or not."""
    import run

    rows = []
    for task in run.TASKS:
        for scheme, other, claim in (
            (run.REPEATED, run.PLAIN, "the control: uncompressed, repeated"),
            ("auto", run.PLAIN, '`bits="auto"` no worse than uncompressed'),
            ("L3", run.PLAIN, "L3 no worse than uncompressed"),
            ("L3", "original-2", "L3 above the original scheme at 2 bits"),
            ("average-1.5", "original-adaptive-1.5", "L3 above the original scheme at 1.5 bits"),
        ):
            across = False
            if other == run.PLAIN:  # a difference that a device alone may make
                found = run.compared(runs, task, scheme, other)
            else:
                found, across = run.between(runs, task, scheme, other)
            if found is None:
                continue
            if across:
                claim += ", some seeds of the one on a CPU and of the other on a GPU"
            mean, low, high = (100 * value for value in (found["difference"], *found["interval"]))
            if scheme == run.REPEATED:
                said = "pairs scatter so much without any codes"
            elif other == run.PLAIN:
                shown = low >= -100 * run.POINT
                said = ("yes" if shown else "yes; more than a point is not excluded") if found["as_good"] else "**no**"
            else:
                said = "yes" if low > 0 else "**no**" if mean <= 0 else "yes, within the noise"
            rows.append([task, claim, str(found["seeds"]), f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", said])
    return table(["task", "claim", "seeds", "difference, 95 % interval", "held"], rows) if rows else []


def accuracy(pictures: bool) -> list[str] | None:
    """The page of scores."""
    results = load("accuracy")
    if results is None:
        return None
    import run

    runs = results["runs"]
    latest = max((one["machine"] for one in runs.values()), key=lambda machine: machine["date"])
    machines = collections.Counter(
        f"{one['machine'].get('gpu', one['machine']['cpu'])} and torch {one['machine']['torch']}"
        for one in runs.values()
    )
    lines = [
        "# Accuracy against bits",
        "",
        "Small models trained from random weights on real images, by the examples' own scripts. A seed fixes weights, "
        "order and augmentation, so runs of one seed on a CPU differ in the rounding alone, on a GPU in the order of "
        "sums too, and differences are paired by seed and device, unless a row says otherwise. "
        "The original scheme is that of the paper: every save for itself, groups of 256 values along a sample, bits "
        "uniform or by its rule (`benchmarks/accuracy/original.py` says what is the same and what is not).",
        "",
    ]
    found = verdicts(runs)
    if found:
        lines += ["## What the pairs say", "", *found, ""]
        lines += [
            "No worse: the mean difference is no lower than minus the larger of one point and two standard errors. "
            "Runs of a seed on two devices count as one. With two or three seeds intervals are wide (Student's t). "
            "*Training loss*: of the last quarter of the steps, relative to uncompressed runs of the same seeds, with "
            "its standard error; these see the same batches, so it tells schemes apart that the score does not. "
            "So does the noise that each adds to one gradient ([Variance](variance.md#beside-the-original-scheme)). "
            "In the runs of RT-DETR L3 chose its bits with earlier weights of parameters "
            "([Theory](../theory.md#choosing-bits)).",
            "",
        ]
    for task in run.TASKS:
        rows = run.table(runs, task)
        if len(rows) > 2:
            lines += [f"## {task}", "", *rows, ""]
            lines += [*without_pairs(runs, task), *by_chance(runs, task)]
            picture = PAGES / f"accuracy-{task}.svg"
            if pictures:
                draw_losses(runs, task, picture)
            if picture.exists():
                lines += [f"![Training loss by step, a line for each scheme]({picture.name})", ""]
    missing = [key for key in run.grid() if not run.done(runs, key)]
    ours = [one["machine"] for key, one in runs.items() if run.SCHEMES[key.split("/")[1]].fields]
    lines += rounded_alone(ours, "runs at levels")
    lines += ["## Where it comes from", ""]
    lines += source("accuracy", "python benchmarks/accuracy/run.py --data DATA", latest, " One thread a run.")
    said = ", ".join(f"{count} with {name}" for name, count in machines.most_common())
    lines += [
        f"Of the {len(runs)} runs {said}; several at a time shared the GPU. Each has its machine, versions and date "
        "beside it in the file.",
        "",
    ]
    if missing:
        lines += [
            f"Of the grid's {len(list(run.grid()))} runs {len(missing)} {'is' if len(missing) == 1 else 'are'} "
            "still to be done: tasks and schemes that are missing above, or have fewer seeds.",
            "",
        ]
    lines += ["One row again, beside the published one, in minutes:", "", "```bash"]
    lines += ["python benchmarks/accuracy/run.py --data DATA --task cifar10-resnet --level L3 --seeds 1 --short", "```"]
    return lines


def without_pairs(runs: dict[str, Any], task: str) -> list[str]:
    """A sentence on a task with a control."""
    import run

    apart = run.distances(runs, task)
    found = {scheme: run.unpaired(runs, task, scheme) for scheme in ("auto", "L3")}
    said = [
        f"{run.SCHEMES[scheme].title} {100 * one['difference']:+.1f} ± {100 * one['standard_error']:.1f} "
        f"({one['runs']} runs and {one['others']})"
        for scheme, one in found.items()
        if one
    ]
    if apart is None or not said:
        return []
    near, far, count = apart
    return [
        f"How far any two runs are apart: uncompressed ones of one seed, whose sums alone have another order, "
        f"{100 * near:.1f} points (root mean square of {count} pairs), of two seeds on one device {100 * far:.1f}. "
        "Without pairs, all runs of a seed as one and the repeated ones with the uncompressed, the mean difference and "
        f"its standard error are: {', '.join(said)}.",
        "",
    ]


def by_chance(runs: dict[str, Any], task: str) -> list[str]:
    """A sentence on a task that was trained on two devices."""
    import run

    found = run.between_devices(runs, task)
    if found is None:
        return []
    scored, lost, count = found
    return [
        "What chance does: uncompressed trainings of one seed on a CPU and on a GPU, whose sums alone have another "
        f"order, end {100 * scored:.1f} points apart, and {100 * lost:.1f} % in training loss (root mean square of "
        f"{count} pairs).",
        "",
    ]


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
    rounds = next(iter(step["models"].values()))["rounds"]
    return [
        *table(head, rows),
        *source("memory", "python benchmarks/memory.py", memory["environment"], " MB per image, 224 px, fp32."),
        *source("step", f"python benchmarks/step.py --rounds {rounds}", step["environment"]),
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


#: Of benchmarks/max_batch.py, that decide what a row says.
_OPTIONS = ("device", "limit", "steps", "tolerance", "first", "cap")


def largest(results: dict[str, Any]) -> list[str]:
    """The largest batches under a limit of memory, and how near to what the codes alone would allow."""
    import max_batch

    found = [row for row in results["rows"] if row["vary"] == "batch" and row["error"] is None]
    settings = ("device_name", "precision", "model", "limit", "image_size", "optimizer", "steps", "threads", "torch")
    by_point = {(*(row.get(name) for name in settings), row["method"]): row for row in found}
    rows = []
    for (*point, method), row in by_point.items():
        plain, free = (by_point.get((*point, way)) for way in ("plain", "free"))
        if plain is None or not plain["largest"]:
            continue
        most = max_batch.ceiling(row, free)
        title = "saved tensors cost nothing" if method == "free" else method
        cells = [
            row["device_name"],
            row["precision"],
            row["model"],
            row["limit"],
            title,
            f"{'at least ' if row['capped'] else ''}{row['largest']}",
        ]
        cells += ["" if method == "plain" else f"{row['largest'] / plain['largest']:.1f}x"]
        cells += [f"{most:.0f} ({most / plain['largest']:.1f}x)", f"{row['largest'] / most:.2f}"] if most else ["", ""]
        rows.append(cells)
    head = [
        "device",
        "precision",
        "model",
        "limit",
        "way",
        "largest batch",
        "plain training's",
        "ceiling",
        "share of it",
    ]
    said = (
        "The limit is that of a process's resident set, Python and weights included, on a CPU, and of the allocator on "
        "a GPU. *Ceiling*: the batch that would fit if the codes came on top of the peak of training whose saved "
        "tensors cost nothing. A level may lie above it: where it reads codes in parts its transients are smaller than "
        "those of whole tensors."
    )
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in by_point.values():
        groups.setdefault(tuple(row[name] for name in _OPTIONS), []).append(row)
    commands = []
    for values, group in groups.items():
        words = " ".join(f"--{name} {value}" for name, value in zip(_OPTIONS, values, strict=True))
        of = (" ".join(dict.fromkeys(row[key] for row in group)) for key in ("model", "method"))
        commands.append("python benchmarks/max_batch.py --models {} --methods {} {}".format(*of, words))
    command = "`, `".join(commands)
    return [*table(head, rows), "", said, *source("max_batch", command, results["environment"])]


#: Files of steps on a GPU -> the section's title, today's state first.
GPU = {
    "step_gpu": "On a GPU",
    "step_gpu_l4": "On a GPU, swapping (L4)",
    "step_gpu_shared": "On a GPU, an earlier state on a slower host",
    "step_gpu_swap": "On a GPU, an earlier state still",
}


def gpu_times(row: dict[str, Any]) -> dict[str, float]:
    """Way -> time of a step over plain training's, of a model on a GPU."""
    ratios = row.get("ratios", {})  # of a model that was stopped before it had any there are none
    found = {name.removesuffix(" / plain"): ratio for name, ratio in ratios.items() if name.endswith(" / plain")}
    found = {way: ratio for way, ratio in found.items() if way in row["methods"]}
    return {"plain": 1.0, **found} if found else {}


def host_slower() -> str:
    """How much slower the host was than the one of today's state, by its part of calls of the codec."""
    beside = " Trainings lay stopped on the same GPU"
    now, then = (load(name) for name in ("codec_gpu", "codec_gpu_shared"))
    if now is None or then is None:
        return f"{beside}."
    ratios = [then["host_us"][name] / now["host_us"][name] for name in now["host_us"] if name != "copy"]
    return (
        f"{beside}, and calls of the codec took the host {min(ratios):.1f} to {max(ratios):.1f} times as long "
        "(`codec_gpu_shared.json`)."
    )


def gpu_steps(results: dict[str, Any], name: str) -> list[str]:
    """Time and peaks of steps on a GPU."""
    rows, notes = [], []
    for model, row in results["models"].items():
        for way, ratio in gpu_times(row).items():
            found = row["methods"][way]
            sizes = [f"{found[key] / 2**30:.1f}" for key in ("allocated", "reserved")]
            seconds = row.get("seconds", {}).get(way)
            time = f"{1e3 * statistics.median(seconds):.0f}" if seconds else ""
            rows.append([model, str(row["batch"]), way, *sizes, time, f"{ratio:.2f}"])
        if "note" in row:
            notes.append(f"{model} is {row['note']}.")
        elif "error" in row:
            notes.append(f"{model} was {row['error']}: its share of the time allowed.")
    head = ["model", "batch", "way", "peak allocated, GiB", "peak reserved, GiB", "ms a step", "time / plain"]
    machine = next(iter(results["models"].values()))["environment"]
    more = " ".join([f" {results['precision']}; driver {machine['driver, clocks'].split(',')[0]}.", *notes])
    if "printed" in results:
        more += f" These are {results['printed']}."
    if name == "step_gpu_shared":
        more += host_slower()
    if "command" not in results:
        more += " The options of this run, its shorter time above all, were not written down."
    return [*table(head, rows), *source(name, results.get("command", "python benchmarks/step_gpu.py"), machine, more)]


def over(points: dict[str, tuple[float, float]], others: Iterable[str], model: str) -> list[str]:
    """Which of other people's ways lie at both less memory and less time than a level of ours, in words.

    Args:
        points: way -> memory and time.
    """
    theirs = [way for way in others if way in points]
    ours = [way for way in points if way not in theirs]
    found = []
    for other in theirs:
        better = [
            way for way in ours if all(mine > their for mine, their in zip(points[way], points[other], strict=True))
        ]
        if better:
            all_of_them = len(better) == len(ours)
            found.append(f"{other} on {model}" + ("" if all_of_them else f", against {', '.join(better)}"))
    return found


def beaten(steps: list[dict[str, Any]], cpu: dict[str, Any] | None) -> list[str]:
    """Where something else lies at both less memory and less time than levels of ours: said first."""
    lines = []
    if steps:
        found: list[str] = []
        for model, row in (pair for one in steps for pair in one["models"].items()):
            points = {way: (row["methods"][way]["allocated"], ratio) for way, ratio in gpu_times(row).items()}
            found += over(points, ("plain", "checkpoint"), model)
            slow = {way: statistics.median(values) for way, values in row.get("slow", {}).items()}
            slow_points = {way: (row["slow_methods"][way].get("allocated"), slow[way]) for way in slow}
            if {"L4", "save_on_cpu"} <= slow.keys() and all(memory for memory, _ in slow_points.values()):
                worse = over(slow_points, ("save_on_cpu",), f"{model} at a batch of {row['slow_batch']}")
                found += [f"{one}, against L4" for one in worse]  # the only level that took turns with it
        lines += sentence("GPU", "neither plain training nor checkpointing", list(dict.fromkeys(found)))
    if cpu is not None:
        import front

        found = [text for model, row in cpu["models"].items() for text in over(cpu_points(row), front.OTHERS, model)]
        ways = sorted({way for row in cpu["models"].values() for way in cpu_points(row)} & set(front.OTHERS))
        lines += sentence(
            "CPU", f"nothing ({', '.join(ways)}; {len(cpu['models'])} of {len(front.MODELS)} models)", found
        )
        for way in ways:
            missing = [model for model in front.MODELS if way not in cpu["models"].get(model, {"ways": {}})["ways"]]
            if missing:
                lines += [f"Not measured on a CPU: {way} on {', '.join(missing)}.", ""]
    return lines


def sentence(where: str, nothing: str, found: list[str]) -> list[str]:
    """A paragraph of what was found."""
    if not found:
        return [f"On the {where} measured {nothing} lies at both less memory and less time than a level of ours.", ""]
    said = "; ".join(found)
    return [f"**At both less memory and less time than a level of ours, on the {where} measured:** {said}.", ""]


def cpu_points(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Way -> bytes of the peak per image, and seconds, of those that could be."""
    found = {way: one for way, one in row["ways"].items() if one["status"] == "ok"}
    return {way: (one["peak_per_image"], one["seconds_per_image"]) for way, one in found.items()}


#: A peak per image below this share of what is kept was not measured right. Plain training's is up to half a percent
#: below, since a few of the tensors that are kept do not grow with the batch.
SHORT_OF_KEPT = 0.97


def cpu_front(results: dict[str, Any], pictures: bool) -> list[str]:
    """Every way to train a model on a CPU."""
    lines = []
    for model, row in results["models"].items():
        rows, points = [], cpu_points(row)
        if "plain" not in points:
            continue  # there is nothing to compare with
        for way, one in row["ways"].items():
            if way not in points:
                reason = " ".join(one.get("error", "").split())[:90]
                rows.append([way, f"{one['status']}: {reason}", "", ""])
                continue
            memory, seconds = points[way]
            time = f"{seconds / points['plain'][1]:.2f}"
            kept = one.get("kept_per_image") or 0.0
            # A peak that does not grow with the smallest batches hides a part of what an image adds.
            low = " (too low: what is kept alone is more)" if memory < SHORT_OF_KEPT * kept else ""
            rows.append([way, megabytes(one.get("kept_per_image")), f"{megabytes(memory)}{low}", time])
        lines += [f"### {model}, batches to {row['batch']}", ""]
        lines += [*table(["way", "kept, MB per image", "peak, MB per image", "time / plain"], rows), ""]
        if "note" in row:
            lines += [row["note"], ""]
    found = [
        (way, len(one.get("seconds", ()))) for row in results["models"].values() for way, one in row["ways"].items()
    ]
    ways, rounds = dict.fromkeys(way for way, _ in found), max(count for _, count in found)
    command = f"python benchmarks/front.py --ways {' '.join(ways)} --rounds {rounds} --again"
    lines += source("front", command, next(iter(results["models"].values()))["environment"])
    if pictures:
        import front

        points_of = {model: cpu_points(row) for model, row in results["models"].items()}
        models = {model: points for model, points in points_of.items() if "plain" in points}
        draw(models, front.OTHERS, "MB", "front-cpu.svg")
    if (PAGES / "front-cpu.svg").exists():
        lines += ["![Time against peak memory of each way, a panel for each model](front-cpu.svg)", ""]
    return lines


def speed(pictures: bool) -> list[str]:
    """The page of memory and time."""
    memory, step, steps, cpu = load("memory"), load("step"), load("step_gpu"), load("front")
    lines = ["# Memory and speed", "", *beaten([one for one in map(load, GPU) if one is not None], cpu)]
    lines += [
        "What each table counts is said in the file that made it. Peaks are of the whole process, or of the device. "
        "A date is that of a file's last measurement: other models may be from before, and from another processor.",
        "",
    ]
    if memory and step:
        lines += ["## On a CPU", "", *cpu_models(memory, step)]
    if cpu:
        lines += ["## Every way to train, on a CPU", "", *cpu_front(cpu, pictures)]
    for title, name, made in (
        ("Gradient checkpointing, on a CPU", "checkpointing", cpu_checkpointing),
        ("torch.compile, on a CPU", "compiled", cpu_compiled),
        ("The largest batch under a limit", "max_batch", largest),
        *((title, name, functools.partial(gpu_steps, name=name)) for name, title in GPU.items()),
    ):
        results = load(name)
        if results is not None:
            lines += [f"## {title}", "", *made(results)]
    if pictures and steps is not None:
        points = {
            model: {way: (row["methods"][way]["allocated"], ratio) for way, ratio in gpu_times(row).items()}
            for model, row in steps["models"].items()
        }
        draw(points, ("plain", "checkpoint"), "GiB", "front.svg")
    if (PAGES / "front.svg").exists():
        lines += ["![Time against peak memory of each way, a panel for each model](front.svg)"]
    return lines


def draw(models: dict[str, dict[str, tuple[float, float]]], others: Iterable[str], unit: str, name: str) -> None:
    """Time against peak memory, a panel for each model, and the ways that nothing beats in both.

    Args:
        models: model -> way -> bytes and seconds.
        unit: MB or GiB.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_actnn"
    import matplotlib.pyplot as plt

    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.2 * columns, 3 * rows), squeeze=False)
    size = {"MB": 1e6, "GiB": 2**30}[unit]
    for axes in panels.flat[len(models) :]:
        axes.set_visible(False)
    for axes, (model, points) in zip(panels.flat, models.items(), strict=False):
        at = {way: (memory / size, seconds / points["plain"][1]) for way, (memory, seconds) in points.items()}
        front = sorted(p for p in at.values() if not any(q[0] < p[0] and q[1] < p[1] for q in at.values()))
        axes.plot(*zip(*front, strict=True), color="0.7", linewidth=1)
        for way, (x, y) in at.items():
            axes.plot([x], [y], "o", markersize=4, color="tab:orange" if way in others else "tab:blue")
            axes.annotate(way, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axes.set_title(model.split("_patch")[0], fontsize=9)
        axes.set_xlabel(f"peak, {unit}" + (" per image" if unit == "MB" else ""), fontsize=8)
        axes.margins(0.15)
    for row in panels:
        row[0].set_ylabel("time of a step, of plain", fontsize=8)
    figure.tight_layout()
    figure.savefig(PAGES / name, metadata={"Date": None})
    plt.close(figure)


# -- variance ----------------------------------------------------------------------------------------------------------


def variance(pictures: bool) -> list[str] | None:
    """The page of the gradient's variance over a training."""
    results = load("variance")
    if results is None:
        return None
    lines = [
        "# Variance over a training",
        "",
        "What drawing the batch gives the gradient, and what quantisation adds, at some steps of an uncompressed "
        'training: with 2 bits everywhere, with L3, which chooses 2 bits on average, and with `bits="auto"`, which '
        f"bounds the mean share. Batches of {results['batch']}. *Added* is the variance of the whole gradient over the "
        "squared gradient of one batch, as one backward pass predicts it, and by Monte Carlo with its standard error. "
        "*Mini-batch* is what drawing the batch gives it, measured between batches, and *from one* what a backward "
        "pass tells of that, in the same units. "
        "*Shares* are by parameter: the variance added over the mini-batch's own, mean and largest over parameters; "
        "*of the sum* is all variance added over all of the mini-batch's.",
        "",
    ]
    for model, steps in results["models"].items():
        rows = []
        for step, found in steps.items():
            for way, one in ((way, one) for way, one in found.items() if isinstance(one, dict)):
                share = one["shares"]
                measured = f"{one['measured']:.4f} ± {one['standard_error']:.4f}"
                cells = [f"{one['average_bits']:.2f}", f"{one['predicted']:.4f}", measured, f"{share['of_sum']:.1%}"]
                cells += [f"{share['mean']:.3f}", f"{share['largest']:.2f} (`{share['parameter']}`)"]
                drawn = [f"{found['minibatch']:.2f}", f"{one['minibatch_predicted']:.2f}"]
                rows.append([step, *drawn, way, *cells])
        head = ["step", "mini-batch", "from one", "way", "bits", "added, predicted", "added, measured", "of the sum"]
        lines += [f"## {model}", "", *table([*head, "mean share", "largest share"], rows), ""]
    if pictures:
        draw_variance(results, PAGES / "variance.svg")
    if (PAGES / "variance.svg").exists():
        lines += ["![Variance of each kept tensor, predicted and by Monte Carlo, at each step](variance.svg)", ""]
    lines += rounded_alone([results["environment"]])
    command = f"python benchmarks/accuracy/variance.py --data DATA/cifar10 --draws {results['draws']}"
    lines += source("variance", command, results["environment"])
    return lines + beside_the_original(load("noise"))


def beside_the_original(results: dict[str, Any] | None) -> list[str]:
    """What the paper's scheme adds, and hf_actnn at the same bits."""
    if results is None:
        return []
    lines = [
        "## Beside the original scheme",
        "",
        "Where scores of two schemes lie closer together than two trainings of one seed ([Accuracy](accuracy.md)), the "
        "gradient still tells which rounds better. At the same weights, of uncompressed trainings, and for the same "
        "batches, in parts of the mini-batch's own variance: *of the sum*, of all variance, as it counts for SGD; *as "
        "Adam steps*, each parameter's variance by the deviation of its gradient's values "
        "([Theory](../theory.md#choosing-bits)); *mean share*, all parameters alike. Bits are average bits of kept "
        "values; bytes are in [Accuracy](accuracy.md). *Independent*: with a dither for each value, as the original.",
        "",
    ]
    for task, steps in results["tasks"].items():
        rows = []
        for step, found in steps.items():
            for way, figures in found.items():
                cells = [f"{one['value']:.2g} ± {one['standard_error']:.1g}" for one in figures.values()]
                rows.append([step, way, *cells])
        lines += [f"**{task}**, batches of {results['batch'][task]}:", ""]
        for bits in (2, 1.5):
            pairs = [
                (found[f"original, {bits:g} bits on average"], found[f"L3, {bits:g} bits"]) for found in steps.values()
            ]
            told = {key: _times([(one[key], other[key]) for one, other in pairs]) for key in pairs[0][0]}
            lines.append(
                f"* At {bits:g} bits on average the original scheme adds {told['of_sum']} what L3 does of the sum, "
                f"{told['as_adam']} as Adam steps, {told['mean_share']} of the mean share."
            )
        lines += ["", *table(["step", "way", "of the sum", "as Adam steps", "mean share"], rows), ""]
    command = f"python benchmarks/accuracy/noise.py --data DATA --batches {results['batches']}"
    return lines + source("noise", command, results["environment"])


def _times(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    """How many times the second the first is, at steps of a training; not known where its standard error is over half
    of it, as single batches make most of it there."""
    steady = [one["value"] / other["value"] for one, other in pairs if one["standard_error"] <= one["value"] / 2]
    if not steady:
        return "an unknown number of times"
    low, high = f"{min(steady):.2g}", f"{max(steady):.2g}"
    rest = len(pairs) - len(steady)
    more = f", at {rest} of {len(pairs)} steps an unknown number of times," if rest else ""
    return f"{low if low == high else f'{low} to {high}'} times{more}"


def draw_variance(results: dict[str, Any], path: Path) -> None:
    """What each kept tensor adds at 2 bits: predicted against Monte Carlo, a colour for each step."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_actnn"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results["models"]), figsize=(4 * len(results["models"]), 4), squeeze=False)
    for axes, (model, steps) in zip(panels[0], results["models"].items(), strict=True):
        for step, found in steps.items():
            tensors = [one for one in found["2 bits"]["tensors"] if one["measured"]]
            x, y = ([one[key] for one in tensors] for key in ("measured", "predicted"))
            axes.loglog(x, y, "o", markersize=3, label=f"step {step}")
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="0.7", linewidth=1)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("added by a tensor, Monte Carlo", fontsize=8)
        axes.set_ylabel("predicted", fontsize=8)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


MADE: dict[str, Callable[[bool], list[str] | None]] = {
    "accuracy.md": accuracy,
    "speed.md": speed,
    "variance.md": variance,
}


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
