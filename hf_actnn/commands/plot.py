"""A profile as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_actnn.pages import COLOURS, OTHERS

#: Modules in the lower half.
MODULES = 12


def save(result: dict[str, Any], path: Path) -> None:
    """Draw bytes by kind of module at each level, and those of the modules that hold most.

    Args:
        result: what `profile` returns.
        path: a PNG, or any format that matplotlib tells by the name.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    levels = [row["level"] for row in result["levels"]]
    shown = result["modules"][:MODULES]
    figure, (above, below) = pyplot.subplots(
        2,
        1,
        figsize=(9, 2.2 + 0.4 * len(levels) + 0.08 * len(shown) * len(levels) + 2.0),
        height_ratios=(1 + len(levels), 2 + 0.5 * len(shown) * len(levels) ** 0.5),
        layout="constrained",
    )
    _totals(above, result, levels)
    _modules(below, shown, levels)
    figure.suptitle(f"{result['model']}, batch {result['batch']}, {result['precision']}: held for the backward pass")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _totals(axes: Any, result: dict[str, Any], levels: list[str]) -> None:
    kinds = result["kinds"][: len(COLOURS)]
    parts = [(one["kind"] or "(model)", one["bytes"]) for one in kinds]
    rest = result["kinds"][len(COLOURS) :]
    if rest:
        parts.append((f"{len(rest)} others", {level: sum(one["bytes"][level] for one in rest) for level in levels}))
    left = [0.0] * len(levels)
    for (name, nbytes), colour in zip(parts, (*COLOURS[: len(kinds)], OTHERS), strict=False):
        widths = [nbytes[level] / 1e6 for level in levels]
        axes.barh(levels, widths, left=left, color=colour, label=name)
        left = [one + width for one, width in zip(left, widths, strict=True)]
    for at, (row, end) in enumerate(zip(result["levels"], left, strict=True)):
        axes.text(end, at, f" {row['saved_bytes'] / 1e6:.1f} MB, {row['ratio']:.1f}x", va="center", fontsize=8)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xlabel("MB, by kind of module")
    axes.legend(fontsize=7, ncols=2, loc="lower right")


def _modules(axes: Any, shown: list[dict[str, Any]], levels: list[str]) -> None:
    height = 0.8 / len(levels)
    for number, level in enumerate(levels):
        places = [at + (number - (len(levels) - 1) / 2) * height for at in range(len(shown))]
        axes.barh(
            places,
            [one["bytes"][level] / 1e6 for one in shown],
            height,
            color=COLOURS[number % len(COLOURS)],
            label=level,
        )
    axes.set_yticks(range(len(shown)), [f"{one['path'] or '(model)'}  {one['kind']}" for one in shown], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.14, y=0.01)  # room for the legend beside the longest bar
    axes.set_xlabel("MB, of the modules that hold most")
    axes.legend(fontsize=7)
