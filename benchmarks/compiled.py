"""Compiled training, with and without compression: bytes, peaks, losses, time and graph breaks.

    python benchmarks/compiled.py [--models vit_s resnet18] [--modes plain compile ...] [--fidelity]

Every point is a process of its own, whose C library gives large tensors pages of their own, so that the resident set
is what is in use. It trains some steps at a batch size; the peak is that of the steps after the first, which compiles.
Peak growth is the slope of the peak between the two batch sizes. Modes:

    plain, actnn            eager
    compile                 torch.compile(model)
    budgetX                 the same with torch's activation_memory_budget = X
    actnn_compile           torch.compile(hf_actnn.convert(model, bits=...))
    blocks, actnn_blocks    accelerate's compile_regions for the ViT; block by block, with .compile(), for the ResNet
    overhead, actnn_overhead  torch.compile(..., mode="reduce-overhead"), which on a CPU is plain compilation

Results are merged into results/compiled.json, so modes may be run one by one. ``--fidelity`` trains a small vision
transformer on CIFAR-10 for some hundred steps and compares the gradients on its weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch import nn
from torch.nn import functional

import hf_actnn
from hf_actnn.commands.watch import PAGES, high_water, watched

MODELS = {"vit_s": "vit_small_patch16_224", "resnet18": "resnet18"}
EAGER, COMPILED = ("plain", "actnn"), ("compile", "actnn_compile")
MODES = (
    *EAGER,
    *COMPILED,
    "blocks",
    "actnn_blocks",
    "overhead",
    "actnn_overhead",
    "budget0.75",
    "budget0.5",
    "budget0.25",
)
ENVIRONMENT = {**PAGES, "OMP_NUM_THREADS": "1"}


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The model as a mode runs it."""
    if "blocks" in mode:
        if hasattr(model, "blocks"):
            from accelerate.utils import compile_regions

            return compile_regions(model)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for block in getattr(model, name):
                block.compile()
        return model
    if "overhead" in mode:
        return torch.compile(model, mode="reduce-overhead")
    return torch.compile(model) if "compile" in mode or "budget" in mode else model


def breaks() -> int:
    """Graph breaks so far."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def point(name: str, mode: str, size: int, bits: int, steps: int) -> dict[str, Any]:
    """Some training steps in this process."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(MODELS[name]).train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 1000, (size,), generator=generator)
    if "actnn" in mode:
        hf_actnn.convert(model, bits=bits)
    if "budget" in mode:
        torch._functorch.config.activation_memory_budget = float(mode.removeprefix("budget"))
    run, losses, seconds = compiled(model, mode), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        start = time.process_time()
        loss = functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.process_time() - start)

    start = time.perf_counter()
    step()
    compiling = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark begins again here
    for _ in range(steps):
        step()
    peak = high_water()
    with hf_actnn.track_memory(model) as memory:
        functional.cross_entropy(run(images), labels).backward()
    return {
        "status": "ok",
        "peak": peak,
        "saved_bytes": memory.saved_bytes,
        "losses": losses,
        "cpu_seconds": statistics.median(seconds[1:]),
        "first_step_seconds": compiling,
        "graph_breaks": breaks() if mode not in EAGER else 0,
    }


def measure(name: str, mode: str, sizes: tuple[int, int], bits: int, steps: int) -> dict[str, Any]:
    """A mode at both batch sizes, and what its peak grows by."""
    found = {}
    for size in sizes:
        command = [sys.executable, __file__, "--point", name, mode, str(size), str(bits), str(steps)]
        found[size] = watched(command, environment=ENVIRONMENT)
        if found[size]["status"] != "ok":
            return found[size]
    small, large = found[sizes[0]], found[sizes[1]]
    more = sizes[1] - sizes[0]
    return {
        "peak_growth_per_image": (large["peak"] - small["peak"]) / more,
        "saved_per_image": (large["saved_bytes"] - small["saved_bytes"]) / more,
        **{key: large[key] for key in ("losses", "cpu_seconds", "first_step_seconds", "graph_breaks")},
    }


# -- fidelity on trained weights ---------------------------------------------------------------------------------------


def gradient(run: Callable, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The whole gradient, flat."""
    model.zero_grad()
    functional.cross_entropy(run(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def fidelity(data: Path, steps: int, draws: int) -> dict[str, Any]:
    """Cosine and relative variance of gradients, eager and compiled, on weights trained for some hundred steps."""
    from fidelity import pixels, read
    from timm.models.vision_transformer import VisionTransformer

    images, labels = read(data, "train", 6400)
    images = pixels(images)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for at in range(steps):
        pick = slice(at * 64 % len(images), at * 64 % len(images) + 64)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[pick]), labels[pick])
        loss.backward()
        optimizer.step()
    found: dict[str, Any] = {"steps": steps, "last_loss": loss.item()}
    batch, truth = images[:64], labels[:64]
    exact = gradient(model, model, batch, truth)
    for bits in (2, 3, 4, 8):
        for how in ("eager", "compiled"):
            torch._dynamo.reset()
            hf_actnn.convert(model, bits=bits)
            run = torch.compile(model) if how == "compiled" else model
            found_now = [gradient(run, model, batch, truth) for _ in range(draws)]
            hf_actnn.revert(model)
            off = [float((one - exact).square().sum() / exact.square().sum()) for one in found_now]
            cosine = [float(functional.cosine_similarity(one, exact, 0)) for one in found_now]
            mean = torch.stack(found_now).mean(0)
            found[f"{how}_{bits}"] = {
                "relative_variance": statistics.mean(off),
                "cosine": statistics.mean(cosine),
                "relative_square_of_mean_error": float((mean - exact).square().sum() / exact.square().sum()),
                "draws": draws,
            }
            print(how, bits, found[f"{how}_{bits}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--sizes", type=int, nargs=2, default=(4, 12))
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fidelity", metavar="CIFAR10", type=Path, help="folder of CIFAR-10; only this is measured")
    parser.add_argument("--point", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.point:
        name, mode, size, bits, steps = arguments.point
        print(json.dumps(point(name, mode, int(size), int(bits), int(steps))))
        return
    path = Path(__file__).parent / "results" / "compiled.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results.pop("environment", None)
    if arguments.fidelity:
        results["fidelity"] = fidelity(arguments.fidelity, steps=300, draws=8)
        timing.write("compiled", results)
        return
    results |= {"bits": arguments.bits, "sizes": list(arguments.sizes), "steps": arguments.steps}
    for name in arguments.models:
        for mode in arguments.modes:
            row = measure(name, mode, tuple(arguments.sizes), arguments.bits, arguments.steps)
            results.setdefault(name, {})[mode] = row
            timing.write("compiled", results)
            print(name, mode, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
