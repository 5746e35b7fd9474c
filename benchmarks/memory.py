"""Bytes held for the backward pass, and what they come to as a process's peak.

    python benchmarks/memory.py [--models resnet50 vit_b16 convnext_t] [--bits 2] [--skip-rss]

For each model at 224 px, fp32: the bytes PyTorch holds (each storage once, parameters excluded), the bytes hf_actnn
holds, and an independent count of the latter, by weak references to every storage made in the forward pass and still
alive before the backward pass. Then the slope of the peak resident set over the batch, each point a process of its
own, for plain training, for saved tensors that cost nothing (given back as zeros: what no way of storing can remove),
and for hf_actnn. That under two settings of glibc's malloc: with large tensors in pages of their own
(MALLOC_MMAP_THRESHOLD_=131072), where the resident set is what is in use, and with its default, a heap whose freed
parts often stay; there hf_actnn also as it behaves where memory is scarce, which is to switch to the first setting
while running. Slopes are medians over --repeats: how malloc lays out its heap differs from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import timing
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import hf_actnn
from hf_actnn.codec import buffers
from hf_actnn.commands.watch import PAGES, high_water


class StoragesMade(TorchDispatchMode):
    """Weak references to every storage that any operation made, below autograd and knowing nothing of hf_actnn."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(nbytes for weak, nbytes in self.made.values() if not weak.expired())


def accounted(name: str, bits: int, size: int) -> dict[str, float]:
    """Bytes per image, three ways."""
    data = models.batch(size)
    plain = models.make(name)
    with hf_actnn.track_memory(plain) as memory:
        loss = plain(**data).loss
    raw = memory.saved_bytes
    del loss, plain
    model = hf_actnn.convert(models.make(name), bits=bits)
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *data.values()]}
    with hf_actnn.track_memory(model) as memory:
        loss = model(**data).loss
    held = memory.saved_bytes
    del loss
    with StoragesMade(known) as storages:
        loss = model(**data).loss
    independent = storages.alive()
    del loss
    return {
        "plain_bytes": raw / size,
        "held_bytes": held / size,
        "independent_bytes": independent / size,
        "ratio": raw / held,
        "independent_over_held": independent / held,
    }


def peak_rss(name: str, mode: str, size: int, bits: int) -> None:
    """One training step in this process; prints its peak resident set in bytes."""
    model, data = models.make(name), models.batch(size)
    if mode.startswith("hf_actnn"):
        if mode == "hf_actnn_scarce":
            buffers.SCARCE = 2.0  # as if memory were short
        hf_actnn.convert(model, bits=bits)
        model(**data).loss.backward()
    elif mode == "free":
        with torch.autograd.graph.saved_tensors_hooks(forget, zeros):
            loss = model(**data).loss
        loss.backward()
    else:
        model(**data).loss.backward()
    print(high_water())


def forget(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device]:
    """Of a saved tensor: its layout and device, and nothing of what it holds. Parameters and small ones stay."""
    if tensor.is_leaf and tensor.requires_grad or tensor.numel() * tensor.itemsize < 65536:
        return tensor.detach(), tensor.device
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"), tensor.device


def zeros(kept: tuple[torch.Tensor, torch.device]) -> torch.Tensor:
    """What `forget` left, as zeros that take the memory of the tensor without gaps."""
    layout, device = kept
    return torch.empty_like(layout, device=device).zero_() if layout.is_meta else layout


#: Settings of malloc, and what is measured under each.
SETTINGS = {
    "pages": (PAGES, ("plain", "free", "hf_actnn")),
    "default": ({}, ("plain", "free", "hf_actnn", "hf_actnn_scarce")),
}


def slope(name: str, mode: str, malloc: dict[str, str], sizes: tuple[int, int], bits: int, repeats: int) -> float:
    """Bytes of peak resident set per image."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | malloc
    peaks = []
    for size in sizes:
        command = [sys.executable, __file__, "--peak", name, mode, str(size), str(bits)]
        runs = [
            subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(repeats)
        ]
        peaks.append(statistics.median(int(run.stdout.split()[-1]) for run in runs))
    return (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument(
        "--sizes", type=int, nargs=2, default=(4, 12), help="batch sizes between which slopes are taken"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes behind each peak")
    parser.add_argument("--skip-rss", action="store_true")
    parser.add_argument("--output", default="memory")
    parser.add_argument("--peak", nargs=4, metavar=("MODEL", "MODE", "SIZE", "BITS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, mode, size, bits = arguments.peak
        return peak_rss(name, mode, int(size), int(bits))
    rows = {}
    for name in arguments.models:
        row = accounted(name, arguments.bits, size=2)
        if not arguments.skip_rss:
            sizes = tuple(arguments.sizes)
            for setting, (malloc, modes) in SETTINGS.items():
                slopes = {mode: slope(name, mode, malloc, sizes, arguments.bits, arguments.repeats) for mode in modes}
                floor = slopes["free"] + row["held_bytes"]
                row |= {f"rss_slope_{setting}_{mode}": value for mode, value in slopes.items()}
                row[f"rss_over_floor_{setting}"] = slopes["hf_actnn"] / floor
        rows[name] = row
        print(
            f"{name}: "
            + ", ".join(
                f"{key} {value / 1e6:.2f} MB" if "bytes" in key or "slope" in key else f"{key} {value:.3f}"
                for key, value in row.items()
            ),
            flush=True,
        )
    path: Path = timing.write(arguments.output, {"bits": arguments.bits, "per_image": rows})
    print(json.dumps(str(path.name)))


if __name__ == "__main__":
    main()
