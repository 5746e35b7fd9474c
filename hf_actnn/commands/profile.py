"""`hf-actnn profile`: where the bytes held for the backward pass are, by module, plain and at each level."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_actnn import pages
from hf_actnn.commands import files, plot
from hf_actnn.commands.progress import Progress
from hf_actnn.commands.sizes import megabytes
from hf_actnn.commands.training import (
    AUTO,
    OTHER_INPUT,
    PLAIN,
    PRECISIONS,
    autocast,
    checkpoints,
    compress,
    device_of,
    is_for_memory,
    to,
    trained,
    way,
)
from hf_actnn.commands.watch import available
from hf_actnn.convert import controller, is_converted, report
from hf_actnn.errors import ActNNError, ConfigError, message
from hf_actnn.integrations import named
from hf_actnn.memory import track_memory

LEVELS = (PLAIN, "L2", "L3", AUTO)
#: Samples of the pass that tells whether the whole batch has room.
FEW = 2


def profile(
    model: str,
    batch_size: int,
    *,
    levels: Sequence[str] = LEVELS,
    image_size: int | None = None,
    precision: str = "fp32",
    device: str = "cpu",
) -> dict[str, Any]:
    """Count the bytes held for the backward pass, plain and at each level.

    At levels that choose bits, those are counted that one step of random images chose.

    Args:
        model: a name that `hf_actnn.integrations.named.load` takes.
        batch_size: samples.
        levels: plain, auto, L0 to L5. Plain is always among them.

    Returns:
        What was asked; ``levels``, one entry each with ``saved_bytes`` and ``uncompressed_bytes`` (the most at one
        time), ``ratio``, and ``kept``, how what was saved is kept; ``modules``, one entry each with its ``path``, its
        ``kind`` and ``bytes`` held by level, each storage at the module that saved it first; ``kinds``, the same by
        kind of module;
        ``classes``, the kinds of modules and of those that they are in, by path.

    Raises:
        ActNNError: the model cannot be had or run.
    """
    levels = list(dict.fromkeys((PLAIN, *levels)))
    where = device_of(device)
    _check_room(model, batch_size, image_size, precision, where)
    held: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(levels, 0))
    kinds: dict[str, str] = {}
    rows, image = [], None
    with Progress(len(levels)) as progress:
        for level in levels:
            progress.say(level)
            found, row, by_module = _measured(model, level, batch_size, image_size, precision, where)
            kinds |= {path: type(module).__name__ for path, module in found.model.named_modules()}
            image = found.image
            for path, nbytes in by_module.items():
                held[path][level] = nbytes
            rows.append(row)
            progress.advance()
    modules = [
        {"path": path, "kind": kinds.get(path, ""), "bytes": nbytes}
        for path, nbytes in sorted(held.items(), key=lambda item: -item[1][PLAIN])
        if any(nbytes.values())
    ]
    return {
        "model": model,
        "batch": batch_size,
        "image": list(image) if image else None,
        "precision": precision,
        "device": device,
        "torch": torch.__version__,
        "levels": rows,
        "modules": modules,
        "classes": {path: kind for path, kind in kinds.items() if path in _with_parents(modules)},
        "kinds": _by_kind(modules, levels),
    }


def _with_parents(modules: list[dict[str, Any]]) -> set[str]:
    """The paths of modules and of those that they are in."""
    parts = [module["path"].split(".") for module in modules]
    return {""} | {".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}


def _measured(
    model: str, level: str, batch_size: int, image_size: int | None, precision: str, device: torch.device
) -> tuple[named.Named, dict[str, Any], dict[str, int]]:
    """The model, what one level comes to, and the bytes held by module."""
    found = named.load(model, image_size)
    network = found.model.to(device)
    trained(network, model)  # autograd holds nothing for a model without any
    try:
        after = compress(network, level)
        batch = to(found.batch(batch_size), device)
        if is_converted(network) and controller(network).adaptive:  # one step, in which the bits are chosen
            with autocast(device, precision):
                loss = named.loss(network, batch)
            loss.backward()
            after()
            network.zero_grad(set_to_none=True)
            del loss
        with track_memory(network) as memory, autocast(device, precision):
            loss = named.loss(network, batch)
        del loss
    except ActNNError:
        raise
    except Exception as error:
        raise _of(error, model, batch_size) from error
    row = {
        "level": level,
        "saved_bytes": memory.saved_bytes,
        "uncompressed_bytes": memory.uncompressed_bytes,
        "ratio": memory.ratio,
        "kept": _by_way_of_keeping(network) if is_converted(network) else [],
    }
    return found, row, {path: kept for path, (kept, _) in memory.by_module.items()}


def _of(error: Exception, model: str, batch_size: int) -> ActNNError:
    """What a failed pass means to who asked for it."""
    if is_for_memory(error):
        return _too_large(batch_size, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return ConfigError(
        message(
            "the model does not run",
            where=model,
            expected="a forward pass on random images",
            received=f"{type(error).__name__}: {str(error).strip()}",
            next_step=OTHER_INPUT,
        )
    )


def _too_large(batch_size: int, received: str) -> ConfigError:
    return ConfigError(
        message(
            "the batch does not fit into memory",
            where=f"--batch {batch_size}",
            expected="a batch whose plain training pass fits",
            received=received,
            next_step="Name a smaller batch: bytes by module grow in proportion to it",
        )
    )


def _check_room(model: str, batch_size: int, image_size: int | None, precision: str, device: torch.device) -> None:
    """Refuse a batch that would have the system end this process, as a small one says."""
    there = available() if device.type == "cpu" else None
    if there is None or batch_size <= FEW:
        return
    _, row, _ = _measured(model, PLAIN, FEW, image_size, precision, device)
    wanted = row["saved_bytes"] * batch_size / FEW
    if wanted > there:
        raise _too_large(
            batch_size, f"about {megabytes(wanted)} MB held for the backward pass, and {megabytes(there)} MB available"
        )


def _by_way_of_keeping(model: torch.nn.Module) -> list[dict[str, Any]]:
    """How a converted model keeps what its operations save: bytes before compression, by way, from its report."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in report(model).rows:
        found[row.kept][0] += row.saves
        found[row.kept][1] += row.nbytes
    return [
        {"kept": kept, "saves": saves, "uncompressed_bytes": nbytes}
        for kept, (saves, nbytes) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


def _by_kind(modules: list[dict[str, Any]], levels: Sequence[str]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(levels, 0))
    count: dict[str, int] = defaultdict(int)
    for module in modules:
        count[module["kind"]] += 1
        for level in levels:
            found[module["kind"]][level] += module["bytes"][level]
    ordered = sorted(found.items(), key=lambda item: -item[1][PLAIN])
    return [{"kind": kind, "modules": count[kind], "bytes": nbytes} for kind, nbytes in ordered]


# -- what is printed ---------------------------------------------------------------------------------------------------


def table(result: dict[str, Any], top: int = 15) -> str:
    """For the terminal: MB by level of the modules that hold most, of the kinds of modules, and in all."""
    levels = [row["level"] for row in result["levels"]]
    head = ("module", "kind", *levels)
    shown, rest = result["modules"][:top], result["modules"][top:]
    lines: list[tuple[str, ...]] = [head]
    lines += [(one["path"] or "(model)", one["kind"], *_cells(one["bytes"], levels)) for one in shown]
    if rest:
        total = {level: sum(one["bytes"][level] for one in rest) for level in levels}
        lines.append((f"and {len(rest)} more", "", *_cells(total, levels)))
    rule = len(lines)
    lines += [(f"{one['modules']} x", one["kind"], *_cells(one["bytes"], levels)) for one in result["kinds"]]
    last = len(lines)
    lines.append(("held at one time", "", *(megabytes(row["saved_bytes"]) for row in result["levels"])))
    lines.append(("times fewer", "", *(f"{row['ratio']:.1f}x" for row in result["levels"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    for at in (last, rule, 1):
        text.insert(at, "-" * len(text[0]))
    image = " x ".join(map(str, result["image"])) if result["image"] else "a batch of the function's"
    what = f"{result['model']}: MB held for the backward pass, batch {result['batch']}, {image}, {result['precision']}"
    return "\n".join([what, *text])


def _cells(nbytes: dict[str, int], levels: Sequence[str]) -> list[str]:
    return [megabytes(nbytes[level]) for level in levels]


def page(result: dict[str, Any]) -> str:
    """What `profile` returns, as an HTML page."""
    return pages.fill("profile", f"{result['model']}: bytes held for the backward pass", result)


# -- the command -------------------------------------------------------------------------------------------------------


def add(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "profile", help="where the bytes held for the backward pass are", description=__doc__.replace("`", "")
    )
    parser.add_argument("model", metavar="MODEL", help="of timm, a Hugging Face directory, or package.module:function")
    parser.add_argument("--batch", type=int, required=True, metavar="N", help="samples")
    parser.add_argument("--levels", nargs="+", metavar="LEVEL", default=list(LEVELS), help="plain, auto, L0 ... L5")
    parser.add_argument("--image-size", type=int, metavar="S", help="side of the images; the model's own if not given")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="bf16 is autocast, weights in fp32")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--top", type=int, default=15, metavar="N", help="modules in the table; 15 if not given")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of it, which needs nothing else")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture of it; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before anything is measured."""
    if arguments.batch < 1:
        raise ConfigError(
            message("there is nothing to run", where="--batch", expected="1 or more", received=str(arguments.batch))
        )
    for level in arguments.levels:
        if checkpoints(way(level)):
            raise ConfigError(
                message(
                    "what a gradient checkpoint holds is not seen by profile",
                    where="--levels",
                    expected="plain, auto, or a level",
                    received=level,
                    next_step="`hf-actnn estimate` measures what checkpointing comes to",
                )
            )
    for option in ("html", "png"):
        path = getattr(arguments, option)
        if path is not None:
            files.check(path, f"--{option}")
    if arguments.png:
        pages.need_matplotlib("--png")


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # what a model prints is no result
        result = profile(
            arguments.model,
            arguments.batch,
            levels=arguments.levels,
            image_size=arguments.image_size,
            precision=arguments.precision,
            device=arguments.device,
        )
    if arguments.html:
        arguments.html.write_text(page(result), encoding="utf-8")
    if arguments.png:
        plot.save(result, arguments.png)
    print(json.dumps(result, indent=2) if arguments.json else table(result, arguments.top))
    for path in filter(None, (arguments.html, arguments.png)):
        print(f"wrote {path}", file=sys.stderr)
    return 0
