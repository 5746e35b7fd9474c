"""A record as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_actnn import pages

#: Layers with a name beside them; with more, names are left out in equal steps.
NAMES = 48


def save(found: dict[str, Any], path: Path) -> None:
    """Draw average bits and added variance, and the bits of each layer, over the optimizer's steps.

    Args:
        found: what `Record.to_dict` returns.
        path: a PNG.

    Raises:
        NotAvailableError: matplotlib is not installed.
    """
    pages.need_matplotlib(str(path))
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = max(len(found["layers"]), 1)
    tall = min(max(0.16 * rows, 1.5), 9.0)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 2.6 + tall), height_ratios=(2.0, tall + 0.6), layout="constrained", sharex=True
    )
    _averages(above, found["updates"])
    _layers(figure, below, found)
    figure.suptitle(f"{found['model']}, {found['setting']}: bits by layer over {found['steps']} steps")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _averages(axes: Any, updates: list[dict[str, Any]]) -> None:
    steps = [entry["step"] for entry in updates]
    axes.step(steps, [entry["average_bits"] for entry in updates], where="post", color=pages.COLOURS[0], marker=".")
    axes.set_ylabel("average bits", color=pages.COLOURS[0])
    axes.set_ylim(0, 1.15 * max((entry["average_bits"] for entry in updates), default=8))
    known = [entry for entry in updates if entry["added_variance"] is not None]
    if known:
        right = axes.twinx()
        right.step(
            [entry["step"] for entry in known],
            [entry["added_variance"] for entry in known],
            where="post",
            color=pages.COLOURS[5],
            marker=".",
        )
        right.set_ylabel("added variance", color=pages.COLOURS[5])
        right.set_ylim(0, 1.15 * max(entry["added_variance"] for entry in known) or 1)


def _layers(figure: Any, axes: Any, found: dict[str, Any]) -> None:
    layers, updates = found["layers"], found["updates"]
    axes.set_xlabel("optimizer steps")
    if not layers:
        axes.text(0.5, 0.5, "no bits were chosen", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    steps = [entry["step"] for entry in updates]
    edges = [*steps, max(found["steps"], steps[-1] + 1)]
    bits = [[float("nan") if one is None else one for one in layer["bits"]] for layer in layers]
    mesh = axes.pcolormesh(edges, range(len(layers) + 1), bits, vmin=1, vmax=8, cmap="viridis")
    every = -(-len(layers) // NAMES)
    shown = range(0, len(layers), every)
    axes.set_yticks([at + 0.5 for at in shown], [layers[at]["layer"] or "(model)" for at in shown], fontsize=6)
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label="bits", fraction=0.03, pad=0.01)
