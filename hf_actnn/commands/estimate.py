"""`hf-actnn estimate`: the largest batch that trains in a given memory, and its time, in each way to train."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_actnn import errors
from hf_actnn.commands import extrapolate, probe
from hf_actnn.commands.progress import Progress
from hf_actnn.commands.sizes import megabytes, parse
from hf_actnn.commands.training import (
    AUTO,
    CHECKPOINT,
    OPTIMIZERS,
    OTHER_INPUT,
    PLAIN,
    PRECISIONS,
    WITH,
    device_of,
    way,
)
from hf_actnn.commands.watch import PAGES, available
from hf_actnn.errors import ActNNError, ActNNWarning, ConfigError, message

_ON_ALL = (PLAIN, CHECKPOINT, "L2", "L3", AUTO, f"{WITH}L2")
WAYS = {"cpu": _ON_ALL, "cuda": (*_ON_ALL, "L4")}
#: A way that multiplies the largest batch by less is no help.
WORTH = 1.2
#: What a level leaves of a sample's bytes, as a share, from which on most of them were not activations.
MOSTLY = 0.5
#: Batches within this share of each other count as equal: then the faster way is the better.
ALIKE = 0.1
#: How many times the answer must not fit for the answer to be tight.
LARGER = 1.15

Attempt = Callable[[probe.Run, int], dict[str, Any]]


def estimate(
    model: str,
    memory: int,
    *,
    ways: Sequence[str] | None = None,
    image_size: int | None = None,
    optimizer: str = "adamw",
    precision: str = "fp32",
    device: str = "cpu",
    verify: bool = False,
    attempt: Attempt = probe.attempt,
) -> dict[str, Any]:
    """Find the largest batch in each way to train, by running small ones in processes of their own.

    Args:
        model: a name that `hf_actnn.integrations.named.load` takes.
        memory: bytes: on the CPU of the whole process, on a CUDA device of torch's allocator.
        ways: plain, checkpoint, auto, levels, checkpoint+level; those of the device if None. Plain is always one.
        verify: try the answers, and a batch 15 % larger, for real.
        attempt: runs one batch.

    Returns:
        What was asked, and ``ways``: one entry each with ``largest`` and how it was found; ``recommendation``.

    Raises:
        ActNNError: the model cannot be had.
    """
    kind = device_of(device).type
    ways = list(dict.fromkeys((PLAIN, *(ways or WAYS[kind]))))
    run = probe.Run(model, image_size, PLAIN, optimizer, precision, device, _allowed(memory, kind))
    rows = []
    with Progress(len(ways) * (2 if verify else 1)) as progress:

        def told(one: probe.Run, size: int) -> dict[str, Any]:
            progress.say(f"{one.way}: a batch of {size}")
            return attempt(one, size)

        first = extrapolate.first_batch(told(run, probe.FEW).get("grain", extrapolate.LARGE))
        for name in ways:
            of_way = run._replace(way=name)
            row = _row(of_way, memory, kind, first, told)
            progress.advance()
            if verify and row["status"] == "ok":
                row["verified"] = _verified(of_way, row["largest"], memory, told)
            if verify:
                progress.advance()
            rows.append(row)
    plain = rows[0]
    for row in rows:
        row["times_plain"] = _ratio(row.get("largest"), plain.get("largest"))
        row["time_factor"] = _ratio(row.get("seconds_per_sample"), plain.get("seconds_per_sample"))
    result = {
        "model": model,
        "memory": memory,
        "image_size": image_size,
        "optimizer": optimizer,
        "precision": precision,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if kind == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ways": rows,
    }
    return {**result, "recommendation": recommend(result)}


def _allowed(memory: int, kind: str) -> int:
    """What a run may take: no more than the machine has left, for it is others' too."""
    there = available() if kind == "cpu" else None
    return memory if there is None else min(memory, int(0.9 * there))


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _row(run: probe.Run, memory: int, kind: str, first: int, attempt: Attempt) -> dict[str, Any]:
    """One way to train."""
    try:
        line = extrapolate.largest(lambda size: attempt(run, size), memory, kind, run.limit, first)
    except extrapolate.Failed as failure:
        found = failure.args[0]
        if run.way == PLAIN:  # what does not train at all
            raise _failed(run, found) from None
        return {"way": run.way, "status": "not possible", "reason": found["error"], "largest": None}
    measured = line.runs[max(line.runs)] if line.runs else {}
    seen = list(dict.fromkeys(text for found in line.runs.values() for text in found.get("warnings", ())))
    return {
        "way": run.way,
        "status": "ok",
        "largest": line.largest,
        "fixed_bytes": _number(line.fixed),
        "bytes_per_sample": _number(line.per_sample),
        "update_bytes": _number(line.update),
        "parameter_bytes": measured.get("parameters"),
        "trained_bytes": measured.get("trained"),
        "straight": line.straight,
        "timed_batch": max(line.runs) if line.runs else None,
        "seconds_per_sample": measured["seconds"] / max(line.runs) if line.runs else None,
        "runs": [
            {"batch": size, **{k: v for k, v in found.items() if k != "warnings"}}
            for size, found in sorted(line.runs.items())
        ],
        "failed": line.failed,
        "warnings": seen,
    }


def _number(value: float) -> float | None:
    """None for what was not found out: JSON has no word for it."""
    return None if math.isnan(value) else value


def _failed(run: probe.Run, found: dict[str, Any]) -> ActNNError:
    if found["status"] == "refused":
        return getattr(errors, found["kind"])(found["error"])
    return ConfigError(
        message(
            "the model does not train",
            where=run.model,
            expected="a forward and a backward pass on random images",
            received=found["error"].strip().splitlines()[-1],
            next_step=OTHER_INPUT,
        )
    )


def _verified(run: probe.Run, size: int, memory: int, attempt: Attempt) -> dict[str, Any]:
    """The answer and a larger batch, tried; not where this machine has less memory than was asked about."""

    def status(one: int) -> str:
        return attempt(run, one)["status"] if one and run.limit >= memory else "not tried"

    sizes = {"answer": size, "larger": max(size + 1, math.ceil(size * LARGER))}
    return {name: {"batch": one, "status": status(one)} for name, one in sizes.items()}


# -- the advice --------------------------------------------------------------------------------------------------------


def recommend(result: dict[str, Any]) -> str:
    """What to do, in a sentence or two."""
    rows = {row["way"]: row for row in result["ways"] if row["status"] == "ok"}
    plain = rows[PLAIN]
    others = [row for name, row in rows.items() if name not in (PLAIN, CHECKPOINT, "L0", f"{WITH}L0")]
    if not any(row["largest"] for row in rows.values()):
        return _nothing_fits(result)
    best = _better(others)
    if best is None or not _is_worth(best, plain):
        return _no_help(result, rows)
    words = {name: f"{name}: {_batch(row, plain)}." for name, row in rows.items() if _is_worth(row, plain)}
    if CHECKPOINT in words and _better([best, rows[CHECKPOINT]]) is rows[CHECKPOINT]:
        text = [f"Gradient checkpointing is the better way here, {words[CHECKPOINT]}", words[best["way"]]]
    else:
        text = [f"Train at {words[best['way']]}", words.get(CHECKPOINT, "")]
    if AUTO in words and best["way"] != AUTO:
        text.append(f"{words[AUTO]} It bounds what compression adds to the gradient's variance.")
    if plain["largest"]:
        text.append(f"If {plain['largest']} samples are enough, plain training does.")
    return " ".join(filter(None, text))


def _is_worth(row: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether a way multiplies the largest batch by enough."""
    return bool(row["largest"]) and row["largest"] >= WORTH * plain["largest"]


def _better(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The one with the largest batch; of those about as large, the fastest. None where nothing fits."""
    most = max((row["largest"] for row in rows), default=0)
    alike = [row for row in rows if row["largest"] and row["largest"] >= (1 - ALIKE) * most]
    return min(alike, key=lambda row: row["seconds_per_sample"] or math.inf, default=None)


def _batch(row: dict[str, Any], plain: dict[str, Any]) -> str:
    if not plain["largest"]:
        return f"a batch of {row['largest']}, where plain training does not fit at all"
    factor = row["time_factor"]
    time = f", at {factor:.2f} of the time per sample" if factor else ""
    times = row["largest"] / plain["largest"]
    return f"a batch of {row['largest']} instead of {plain['largest']} ({times:.1f} times){time}"


def _nothing_fits(result: dict[str, Any]) -> str:
    return (
        f"Not one sample trains in {megabytes(result['memory'])} MB in any of these ways: weights, gradients, the "
        "optimizer and the program itself take it. More memory is what it takes, or an optimizer with less state, such "
        "as --optimizer sgd."
    )


def _no_help(result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    plain, memory = rows[PLAIN], result["memory"]
    text = "Compression will not help much here: "
    found = [row for name, row in rows.items() if name not in (PLAIN, CHECKPOINT)]
    best = max(found, key=lambda row: row["largest"], default=None)
    if best is None:
        text = "No level was tried"
    else:
        text += f"at {best['way']} the largest batch is {best['largest']}, plainly it is {plain['largest']}"
    held = max(plain["fixed_bytes"] or 0, plain["update_bytes"] or 0)
    if held > memory / 2:
        text += f"; weights, gradients, the optimizer and the program take {held / memory:.0%} of the memory"
    if plain.get("trained_bytes", 0) and plain["trained_bytes"] < plain["parameter_bytes"] / 2:
        share = plain["trained_bytes"] / plain["parameter_bytes"]
        text += f"; only {share:.1%} of the parameters are trained, so that little is held for the backward pass"
    elif best and best["bytes_per_sample"] and plain["bytes_per_sample"]:
        share = best["bytes_per_sample"] / plain["bytes_per_sample"]
        if share > MOSTLY:
            text += f"; {share:.0%} of what a sample adds to the peak is not what is held for the backward pass"
    rival = rows.get(CHECKPOINT)
    if rival and _is_worth(rival, plain):
        text += f". Gradient checkpointing: {_batch(rival, plain)}"
    return text + "."


# -- what is printed ---------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    head = ("", "largest batch", "x plain", "MB / sample", "MB fixed", "time / sample", "verified")
    lines: list[tuple[str, ...]] = [head]
    for row in result["ways"]:
        if row["status"] != "ok":
            lines.append((row["way"], "not possible", "", "", "", "", ""))
            continue
        lines.append(
            (
                row["way"],
                str(row["largest"]) + ("" if row["straight"] else " (about)"),
                "" if row["times_plain"] is None else f"{row['times_plain']:.2f}",
                _mb(row["bytes_per_sample"]),
                _mb(None if row["fixed_bytes"] is None else max(row["fixed_bytes"], row["update_bytes"])),
                "" if row["time_factor"] is None else f"{row['time_factor']:.2f}",
                _verdict(row.get("verified")),
            )
        )
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    what = f"{result['model']}, {result['precision']}, {result['optimizer']}: "
    what += f"training in {megabytes(result['memory'])} MB of {result['device_name']}"
    reasons = [f"{row['way']}: {row['reason']}" for row in result["ways"] if row["status"] != "ok"]
    return "\n".join([what, *text, *reasons, _footnote(result), "", result["recommendation"]])


def _mb(nbytes: float | None) -> str:
    return "" if nbytes is None else megabytes(nbytes)


def _verdict(verified: dict[str, Any] | None) -> str:
    if verified is None:
        return ""
    words = {"ok": "fits", "out of memory": "does not fit"}
    return ", ".join(f"{one['batch']} {words.get(one['status'], one['status'])}" for one in verified.values())


def _footnote(result: dict[str, Any]) -> str:
    if result["device"] == "cpu":
        setting = " ".join(f"{name}={value}" for name, value in PAGES.items())
        what = (
            f"The memory is the resident set of the whole process, with {setting} in the environment:\n"
            "set it for your training as well."
        )
    else:
        what = "The memory is that of torch's allocator; the CUDA context, some hundred MB, comes on top."
    batches = ", ".join(f"{row['way']} {row['timed_batch']}" for row in result["ways"] if row.get("timed_batch"))
    return (
        f"{what}\nTimes are those of this machine as it is now, {result['threads']} threads, in batches of: {batches}."
    )


# -- the command -------------------------------------------------------------------------------------------------------


def add(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "estimate", help="the largest batch that trains in a given memory", description=__doc__.replace("`", "")
    )
    parser.add_argument("model", metavar="MODEL", help="of timm, a Hugging Face directory, or package.module:function")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="24GB, 16GiB, 500MB")
    parser.add_argument(
        "--levels", nargs="+", metavar="LEVEL", help="plain, checkpoint, auto, L0 ... L5, checkpoint+L2"
    )
    parser.add_argument("--image-size", type=int, metavar="S", help="side of the images; the model's own if not given")
    parser.add_argument("--optimizer", default="adamw", choices=list(OPTIMIZERS))
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="bf16 is autocast, weights in fp32")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--verify", action="store_true", help="try the answers, and 15 %% more")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    memory = parse(arguments.memory)
    result = estimate(
        arguments.model,
        memory,
        ways=[way(one) for one in arguments.levels] if arguments.levels else None,
        image_size=arguments.image_size,
        optimizer=arguments.optimizer,
        precision=arguments.precision,
        device=arguments.device,
        verify=arguments.verify,
    )
    for text in dict.fromkeys(text for row in result["ways"] for text in row.get("warnings", ())):
        warnings.warn(text, ActNNWarning, stacklevel=1)
    print(json.dumps(result, indent=2, allow_nan=False) if arguments.json else table(result))
    return 0
