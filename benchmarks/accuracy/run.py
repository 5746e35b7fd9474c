"""Scores after training by bits: hf_actnn's levels, the scheme of the paper as it was, and 8 bits, beside uncompressed.

    python benchmarks/accuracy/run.py --data path/to/data                        what is missing of the published grid
    python benchmarks/accuracy/run.py --task cifar10-resnet --level L3 --seeds 1 [--short]     rows of one's own

`--data` is a folder with the parquet files of `cifar10`, `camvid` and `bccd` in folders of these names. Every run is an
example's own train.py in a process of one thread; a seed fixes weights, order and augmentation, so that runs of one
seed differ in the rounding alone, on a GPU in the order of sums too. The control is "uncompressed, repeated": the same
seed, and sums of floats in another order, which two threads, or the atomic additions of a GPU, bring about. With
`--device cuda` all `--jobs` share a GPU. Each finished run is kept in benchmarks/results/accuracy.json at once, and is
not done again without --again. Rows of one's own are printed beside the published ones and kept only with --keep.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import timing  # noqa: E402
import torch  # noqa: E402

import examples  # noqa: E402
from hf_actnn.commands.progress import Progress  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "accuracy.json"
PLAIN = "uncompressed"
#: The same training again, its sums in another order: how far apart two runs of one seed come to lie without any codes.
REPEATED = "repeated"
#: Steps between two updates of adaptive bits: of some hundred steps, the default of 200 would see two.
INTERVAL = 20
_IMAGES = ["--image_size", "32", "--max_train_samples", "20000", "--max_eval_samples", "5000"]
TASKS = {
    "cifar10-resnet": examples.TASKS["resnet"]._replace(
        arguments=["--model", "resnet20", "--from_scratch", *_IMAGES, *examples.every(64, 2e-3, 4)]
    ),
    "cifar10-vit": examples.TASKS["vit"]._replace(
        arguments=["--model", "vit", *_IMAGES, *examples.every(64, 1e-3, 2), *examples.SMALL_VIT]
    ),
    "camvid-segformer": examples.TASKS["segformer"],
    "camvid-upernet": examples.TASKS["upernet"],
    # Longer than the example, which ends below a mAP50 of one half.
    "bccd-rtdetr": examples.TASKS["rt_detr"]._replace(
        arguments=[*examples.TASKS["rt_detr"].arguments, "--num_train_epochs", "45"]
    ),
}
#: Scripts that train.py is run by, in front of the scheme's own.
LAUNCHERS: dict[str, Path] = {"cifar10-resnet": Path(__file__).parent / "small.py"}
CONVOLUTIONAL = ("cifar10-resnet", "camvid-upernet")
#: No worse than this, or than two standard errors.
POINT = 0.01


#: So many seeds a comparison should have.
SEEDS = 3


class Scheme(NamedTuple):
    """How activations are kept.

    Attributes:
        title: for tables.
        fields: of `ActNNConfig`; None where hf_actnn keeps nothing.
        original: arguments of original.py, which runs train.py; None where Python does.
    """

    title: str
    fields: dict[str, Any] | None = None
    original: tuple[str, ...] | None = None


def _chosen(**fields: Any) -> dict[str, Any]:
    return {**fields, "update_interval": INTERVAL}


SCHEMES = {
    PLAIN: Scheme(PLAIN),
    REPEATED: Scheme("uncompressed, repeated"),
    "L1": Scheme("L1", {"level": "L1"}),
    "L2": Scheme("L2", {"level": "L2"}),
    "L2.5": Scheme("L2.5", _chosen(level="L2.5")),
    "L3": Scheme("L3", _chosen(level="L3")),
    "auto": Scheme('`bits="auto"`', _chosen(bits="auto")),
    **{
        f"average-{bits:g}": Scheme(f"L3, {bits:g} {'bit' if bits == 1 else 'bits'}", _chosen(level="L3", bits=bits))
        for bits in (4, 1.5, 1.25, 1)
    },
    "original-2": Scheme("original scheme, 2 bits", None, ("--bits", "2")),
    **{
        f"original-adaptive-{bits:g}": Scheme(
            f"original scheme, {bits:g} bits on average", None, ("--bits", f"{bits:g}", "--adaptive")
        )
        for bits in (2, 1.5)
    },
    "8-bit": Scheme("original scheme, 8 bits", None, ("--bits", "8")),
}
#: Schemes, tasks and seeds of the published tables.
GRID = (
    ((PLAIN, "L3", "auto", "original-2"), tuple(TASKS), (0, 1, 2)),
    ((REPEATED,), ("bccd-rtdetr",), (0, 1, 2)),
    (
        (
            *("L1", "L2", "L2.5", "average-4", "average-1.5", "average-1.25", "average-1"),
            *("original-adaptive-2", "original-adaptive-1.5", "8-bit"),
        ),
        ("cifar10-resnet", "camvid-segformer"),
        (0, 1),
    ),
)


class Key(NamedTuple):
    """One run. Those of a seed on two devices are not paired: sums have another order, and all that follows differs."""

    task: str
    scheme: str
    seed: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.task}/{self.scheme}/{self.seed}{'' if self.device == 'cpu' else '@' + self.device}"


def grid() -> Iterator[Key]:
    """Runs of the published tables, all of one seed before the next; on which device is free."""
    cells = [Key(*cell) for schemes, tasks, seeds in GRID for cell in itertools.product(tasks, schemes, seeds)]
    yield from sorted(cells, key=lambda key: (key.seed, list(TASKS).index(key.task)))


def trained(key: Key, data: Path, short: bool = False) -> dict[str, Any]:
    """Do one run."""
    task, scheme = TASKS[key.task], SCHEMES[key.scheme]
    words = ["--max_steps", "20", "--logging_steps", "10"] if short else []
    launcher: list[str | Path] = [LAUNCHERS[key.task]] if key.task in LAUNCHERS else []
    if scheme.original is not None:
        launcher += [Path(__file__).parent / "original.py", *scheme.original]
    if scheme.fields is None:
        threads = 2 if key.scheme == REPEATED else 1
        return examples.run(task, key.seed, data, words, launcher, key.device, threads)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(scheme.fields, file)
        file.flush()
        return examples.run(task, key.seed, data, ["--actnn_config", file.name, *words], launcher, key.device)


# -- what came of it ---------------------------------------------------------------------------------------------------


def known() -> dict[str, Any]:
    """Published runs."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def done(runs: dict[str, Any], key: Key) -> bool:
    """Whether a cell of the grid is known, on whichever device."""
    return any(str(key._replace(device=device)) in runs for device in ("cpu", "cuda"))


def with_partners(todo: list[Key], runs: dict[str, Any]) -> list[Key]:
    """With the uncompressed run of each seed and device in front, where it is neither known nor to be done."""
    found: list[Key] = []
    for key in todo:
        partner = key._replace(scheme=PLAIN)
        if partner not in found and str(partner) not in runs:
            found.append(partner)
        if key not in found:
            found.append(key)
    return found


def scores(runs: dict[str, Any], task: str, scheme: str) -> dict[str, float]:
    """By seed and device, as the runs' keys end."""
    start = f"{task}/{scheme}/"
    return {key.removeprefix(start): run["score"] for key, run in sorted(runs.items()) if key.startswith(start)}


def of_seeds(values: dict[str, float]) -> dict[str, float]:
    """One value for each seed, the mean over its devices: what a seed decides is drawn once on all of them."""
    found: dict[str, list[float]] = {}
    for end, value in values.items():
        found.setdefault(end.partition("@")[0], []).append(value)
    return {seed: statistics.mean(found[seed]) for seed in sorted(found)}


def by_seed(values: dict[str, float]) -> list[float]:
    """The same without the seeds."""
    return list(of_seeds(values).values())


def compared(
    runs: dict[str, Any], task: str, scheme: str, other: str = PLAIN, across: bool = False
) -> dict[str, Any] | None:
    """A scheme's scores minus another's, paired by seed and device: mean over seeds, standard error, 95 % interval.

    Args:
        across: paired by seed alone, a seed's score being the mean over the devices that it ran on. For schemes that
            ran on different ones, and differences larger than what a device makes.
    """
    ours, theirs = scores(runs, task, scheme), scores(runs, task, other)
    if across:
        ours, theirs = of_seeds(ours), of_seeds(theirs)
    ends = sorted(ours.keys() & theirs.keys())
    differences = by_seed({end: ours[end] - theirs[end] for end in ends})
    seeds = len(differences)
    if seeds < 2:
        return None
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(seeds)
    reach = examples.STUDENT[seeds] * error
    return {
        **{"task": task, "scheme": scheme, "other": other, "seeds": seeds, "pairs": len(ends), "difference": mean},
        **{"standard_error": error, "interval": [mean - reach, mean + reach]},
        "as_good": mean >= -max(POINT, 2 * error),
    }


def between(runs: dict[str, Any], task: str, scheme: str, other: str) -> tuple[dict[str, Any] | None, bool]:
    """Two schemes, neither of them uncompressed: paired by seed and device, or by seed alone where that gives more
    seeds and the former fewer than :data:`SEEDS`; and whether the latter."""
    found = compared(runs, task, scheme, other)
    seeds = 0 if found is None else found["seeds"]
    more = compared(runs, task, scheme, other, across=True) if seeds < SEEDS else None
    return (more, True) if more is not None and more["seeds"] > seeds else (found, False)


def unpaired(runs: dict[str, Any], task: str, scheme: str) -> dict[str, Any] | None:
    """The same without pairs, for a task with a control: the repeated runs count as uncompressed ones, and all runs of
    a seed as one. The squares of both means' standard errors add up (Welch)."""
    ours, plain, repeated = (scores(runs, task, one) for one in (scheme, PLAIN, REPEATED))
    theirs = {**plain, **{f"{end}@repeated": score for end, score in repeated.items()}}
    means = [by_seed(values) for values in (ours, theirs)]
    if not repeated or min(map(len, means)) < 2:
        return None
    return {
        "runs": len(ours),
        "others": len(theirs),
        "difference": statistics.mean(means[0]) - statistics.mean(means[1]),
        "standard_error": math.sqrt(sum(statistics.variance(values) / len(values) for values in means)),
    }


def distances(runs: dict[str, Any], task: str) -> tuple[float, float, int] | None:
    """How far two uncompressed trainings of one seed and device lie apart, and two of different seeds on one device:
    root mean squares, and the number of the former."""
    plain, repeated = scores(runs, task, PLAIN), scores(runs, task, REPEATED)
    same = [plain[end] - repeated[end] for end in plain.keys() & repeated.keys()]
    others = [
        plain[a] - plain[b] for a, b in itertools.combinations(plain, 2) if a.partition("@")[2] == b.partition("@")[2]
    ]
    if not same or not others:
        return None
    near, far = (math.sqrt(statistics.mean(value**2 for value in values)) for values in (same, others))
    return near, far, len(same)


def between_devices(runs: dict[str, Any], task: str) -> tuple[float, float, int] | None:
    """How far uncompressed trainings of one seed on a CPU and on a GPU lie apart, whose sums alone have another order:
    root mean squares of the scores' differences and of the training losses', relative; and the number of pairs."""
    found = {key: run for key, run in runs.items() if key.startswith(f"{task}/{PLAIN}/")}
    pairs = [(run, found[f"{key}@cuda"]) for key, run in found.items() if f"{key}@cuda" in found]
    if not pairs:
        return None
    scored = statistics.mean((one["score"] - other["score"]) ** 2 for one, other in pairs)
    lost = statistics.mean((_last(one["losses"]) / _last(other["losses"]) - 1) ** 2 for one, other in pairs)
    return math.sqrt(scored), math.sqrt(lost), len(pairs)


def comparisons(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """All that can be made."""
    return [
        found for task in TASKS for scheme in SCHEMES if scheme != PLAIN and (found := compared(runs, task, scheme))
    ]


def keep(key: Key, found: dict[str, Any]) -> None:
    """Write a finished run down, beside those that others may be writing."""
    machine = timing.environment()
    names = ("date", "cpu", "torch", *(("roundings",) if SCHEMES[key.scheme].fields else ()))
    found = {**found, "machine": {name: machine[name] for name in names}}
    if key.device == "cuda":
        found["machine"]["gpu"] = torch.cuda.get_device_name()
    with open(RESULTS.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = {**known(), str(key): found}
        timing.write("accuracy", {"compared": comparisons(runs), "runs": dict(sorted(runs.items()))})


def ratio(runs: dict[str, Any], task: str, scheme: str) -> float | None:
    """How many times fewer bytes a scheme keeps than plain training, on average over its runs that say."""
    of_task = {key: run for key, run in runs.items() if key.startswith(f"{task}/")}
    plain = [run["actnn_ratio"] * run["actnn_bytes_per_sample"] for run in of_task.values() if "actnn_ratio" in run]
    kept = [
        run["actnn_bytes_per_sample"]
        for key, run in of_task.items()
        if key.startswith(f"{task}/{scheme}/") and "actnn_bytes_per_sample" in run
    ]
    return statistics.median(plain) / statistics.mean(kept) if plain and kept else None


class Loss(NamedTuple):
    """A training loss relative to the uncompressed one: mean over seeds, standard error (nan of one seed), and how many
    seeds."""

    mean: float
    error: float
    seeds: int


def loss(runs: dict[str, Any], task: str, scheme: str) -> Loss | None:
    """The training loss of the last quarter over that of uncompressed runs of the same seed and device, less one. Both
    see the same batches, so it scatters far less than the score."""
    pairs = {
        end: (run, runs[other])
        for key, run in runs.items()
        if key.startswith(f"{task}/{scheme}/")
        and (other := f"{task}/{PLAIN}/{(end := key.rpartition('/')[2])}") in runs
    }
    over = by_seed({end: _last(run["losses"]) / _last(other["losses"]) - 1 for end, (run, other) in pairs.items()})
    if not over:
        return None
    error = statistics.stdev(over) / math.sqrt(len(over)) if len(over) > 1 else math.nan
    return Loss(statistics.mean(over), error, len(over))


def _last(losses: list[float]) -> float:
    return statistics.mean(losses[-max(1, len(losses) // 4) :])


def of_paired(paired: int, seeds: int) -> str:
    """Said where not every seed has an uncompressed run on its device."""
    return f", {paired} {'seed' if paired == 1 else 'seeds'}" if paired < seeds else ""


def line(runs: dict[str, Any], task: str, scheme: str) -> str:
    """A row of a table in Markdown, per cent."""
    values = scores(runs, task, scheme)
    spread = f" ± {100 * statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    found = compared(runs, task, scheme) if scheme != PLAIN else None
    less, more = ratio(runs, task, scheme), loss(runs, task, scheme) if scheme != PLAIN else None
    seeds = len(of_seeds(values))

    cells = [
        SCHEMES[scheme].title,
        str(len(values)),
        f"{100 * statistics.mean(values.values()):.1f}{spread}",
        ""
        if found is None
        else "{:+.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * value for value in (found["difference"], *found["interval"]))
        )
        + of_paired(found["seeds"], seeds),
        ""
        if more is None
        else f"{100 * more.mean:+.1f} %"
        + (f" ± {100 * more.error:.1f}" if more.seeds > 1 else "")
        + of_paired(more.seeds, seeds),
        f"{less:.1f}x" if less else "",
    ]
    return f"| {' | '.join(cells)} |"


def table(runs: dict[str, Any], task: str, schemes: Iterable[str] = SCHEMES) -> list[str]:
    """Of one task."""
    rows = [line(runs, task, scheme) for scheme in schemes if scores(runs, task, scheme)]
    score = TASKS[task].score
    head = (
        f"| {task} | runs | {score}, mean ± deviation | to uncompressed, 95 % interval | training loss | fewer bytes |"
    )
    return [head, "|---|---|---|---|---|---|", *rows]


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_ACTNN_DATA"), help="default: $HF_ACTNN_DATA")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), help="of these tasks alone")
    parser.add_argument("--level", nargs="+", choices=list(SCHEMES), metavar="SCHEME", help=", ".join(SCHEMES))
    parser.add_argument("--seeds", type=int, help="so many seeds, from 0 on; those of the grid if not given")
    parser.add_argument("--short", action="store_true", help="20 steps: whether it runs, not how well")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; seconds are then no measurement")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--keep", action="store_true", help="keep rows of one's own")
    parser.add_argument("--again", action="store_true", help="do what is known already")
    options = parser.parse_args()
    if options.data is None or not Path(options.data).is_dir():
        raise SystemExit("--data names no folder: give one with cifar10, camvid and bccd")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; leave the option out to train on the CPU")
    options.data = Path(options.data).resolve()  # train.py runs in a folder of its own
    own = bool(options.level)
    published = known()
    if own:
        seeds = range(options.seeds or 1)
        cells = itertools.product(seeds, options.task or TASKS, options.level)
        todo = [Key(task, scheme, seed, options.device) for seed, task, scheme in cells]
    else:
        todo = [key for key in grid() if not options.task or key.task in options.task]
        todo = [key for key in todo if options.seeds is None or key.seed < options.seeds]
        if not options.again:
            todo = [key for key in todo if not done(published, key)]
        todo = with_partners([key._replace(device=options.device) for key in todo], published)
    kept = not options.short and (options.keep or not own)
    if kept and not options.again:
        todo = [key for key in todo if str(key) not in published]
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with Progress(len(todo)) as progress, ThreadPoolExecutor(options.jobs) as pool:

        def one(key: Key) -> None:
            progress.say(str(key))
            try:
                found[str(key)] = run = trained(key, Path(options.data), options.short)
            except RuntimeError as error:
                failed[str(key)] = str(error)
            else:
                if kept:
                    keep(key, run)
            progress.advance()

        list(pool.map(one, todo))
    for task in options.task or TASKS:
        of_task = {key: run for key, run in found.items() if key.startswith(f"{task}/")}
        if of_task:
            print("\n".join(["", "now:", *table(of_task, task)]))
        if any(key.startswith(f"{task}/") for key in published):
            print("\n".join(["", "published:", *table(published, task, options.level or SCHEMES)]))
    for name, error in failed.items():
        print(f"\n{name} failed:\n{error}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
