"""Two processes under `accelerate launch`: do DDP and FSDP2 train as one process does, and what does each process keep?

    python benchmarks/distributed.py

Each way trains the same small vision transformer on the same batches, which processes share between them: uncompressed,
and at several settings of compression. Noted are the losses, the bytes held for the backward pass in each process, how
far the gradient of the first step is from the uncompressed one of one process, and whether a run that was stopped and
resumed in its middle goes on to the bit. Nothing here depends on time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launching
import pages
import timing
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import hf_actnn
from hf_actnn.integrations.accelerate import prepare

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "accelerate"
BATCH, STEPS = 16, 8
#: Configuration of the launcher, and what is changed in it.
WAYS = {
    "one process": ("one_process", []),
    "DDP": ("ddp", []),
    "FSDP2, resharding": ("fsdp2", []),
    "FSDP2, not resharding": ("fsdp2", ["--fsdp_reshard_after_forward", "false"]),
    "one process, bf16": ("one_process", ["--mixed_precision", "bf16"]),
    "DDP, bf16": ("ddp", ["--mixed_precision", "bf16"]),
    "FSDP2, bf16": ("fsdp2", ["--mixed_precision", "bf16"]),
}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "uncompressed": None,
    "L0": {"level": "L0"},
    "8 bits": {"bits": 8},
    "L2": {"level": "L2"},
    "L3": {"level": "L3", "update_interval": 4},
    "auto": {"bits": "auto", "update_interval": 4},
}


def network() -> nn.Module:
    """Without batch normalisation, whose statistics would be those of a process's share of the batch."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=3, num_classes=10)


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """One process's share of the batch of a step: ``[N / parts, 3, 32, 32]`` and ``[N / parts]``."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    pixels = torch.randn(BATCH, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) / 5
    share = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    return pixels[share], labels[share]


def train(
    accelerator: Accelerator, setting: dict[str, Any] | None, steps: int, folder: Path, resume: bool
) -> dict[str, Any]:
    """Train for some steps. In the middle the state is saved, or with ``resume`` the training begins there from it."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if setting is None:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer = prepare(accelerator, model, optimizer, **setting)
    plain = accelerator.unwrap_model(model)
    found: dict[str, Any] = {"losses": []}
    if resume:
        accelerator.load_state(str(folder))
    for step in range(steps // 2 if resume else 0, steps):
        if step == steps // 2 and not resume:
            accelerator.save_state(str(folder))
        pixels, labels = batch(step, accelerator.process_index, accelerator.num_processes)
        with hf_actnn.track_memory(plain) as memory:
            loss = F.cross_entropy(model(pixels).float(), labels)
        gathered = _gathered_bytes(plain) if step == 0 else 0  # every object there is is looked at
        accelerator.backward(loss)
        if step == 0:
            found |= {"saved_bytes": memory.saved_bytes, "uncompressed_bytes": memory.uncompressed_bytes}
            found |= {"gathered_bytes": gathered, "gradient": _gradient(plain)}
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
    if setting is not None:
        history = hf_actnn.controller(plain).history
        found["average_bits"] = [entry["average_bits"] for entry in history]
    accelerator.free_memory()
    return found


def _gradient(model: nn.Module) -> Tensor:
    """The whole gradient, ``[P]``, of all processes."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([(grad.full_tensor() if isinstance(grad, DTensor) else grad).flatten() for grad in grads])


def _gathered_bytes(model: nn.Module) -> int:
    """Memory of parameters that have been gathered from shards, beside the model's own."""
    own = {id(parameter) for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if not own:
        return 0
    parameters = [one for one in gc.get_objects() if isinstance(one, nn.Parameter) and not isinstance(one, DTensor)]
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in parameters}.values())


def work(names: Sequence[str], steps: int, folder: Path) -> None:
    """What each process does: every setting, and once more from its middle."""
    sys.path.insert(0, str(EXAMPLE))
    from sharding import shard_on_cpu

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    shard_on_cpu(accelerator)
    found = {}
    for name in names:
        state = folder / name.replace(" ", "_")
        whole = train(accelerator, SETTINGS[name], steps, state, resume=False)
        half = train(accelerator, SETTINGS[name], steps, state, resume=True)
        whole["resumed_exactly"] = whole["losses"][steps // 2 :] == half["losses"]
        torch.save(whole.pop("gradient"), folder / f"{name}-{accelerator.process_index}.pt")
        found[name] = {"way": str(accelerator.distributed_type), **whole}
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


def measure(ways: Sequence[str], settings: Sequence[str], steps: int = STEPS, timeout: float = 1800) -> dict[str, Any]:
    """Start the launcher for each way.

    Returns:
        For each way and setting: ``losses``, the mean over processes; ``saved_bytes`` and ``gathered_bytes``, of each
        process; ``uncompressed_bytes``, of the first; ``gradient_error``, the relative distance of the first step's
        gradient from that of the first way without compression; ``average_bits`` of each update;
        ``resumed_exactly``.
    """
    results: dict[str, Any] = {}
    reference: Tensor | None = None
    for way in ways:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            _launch(way, ["--worker", place, "--steps", str(steps), "--settings", *settings], timeout)
            ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]
            gradients = {name: torch.load(folder / f"{name}-0.pt") for name in settings}
        reference = gradients[settings[0]] if reference is None else reference
        results[way] = {"processes": len(ranks)}
        for name in settings:
            first = ranks[0][name]
            error = float((gradients[name] - reference).norm() / reference.norm())
            each = {key: [rank[name][key] for rank in ranks] for key in ("saved_bytes", "gathered_bytes")}
            resumed = all(rank[name]["resumed_exactly"] for rank in ranks)
            results[way][name] = {**first, **each, "gradient_error": error, "resumed_exactly": resumed}
    return results


def _launch(way: str, arguments: list[str], timeout: float) -> None:
    configuration, changes = WAYS[way]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(launching.free_port())]
    launcher += ["--config_file", str(EXAMPLE / "configs" / f"{configuration}.yaml"), *changes]
    done = launching.run_to_end([*launcher, __file__, *arguments], timeout)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stdout[-1000:]}{done.stderr[-6000:]}")


def write_page(results: dict[str, Any]) -> None:
    """Put what was measured into the page on several processes."""
    lines = [
        "| way | setting | kept by each process | first and last loss | gradient off by |",
        "|---|---|---|---|---|",
    ]
    for way, found in results["ways"].items():
        for name in SETTINGS:
            one = found[name]
            kept = f"{max(one['saved_bytes']) / 1e3:,.0f} kB"
            losses = f"{one['losses'][0]:.6f}, {one['losses'][-1]:.6f}"
            lines.append(f"| {way} | {name} | {kept} | {losses} | {one['gradient_error']:.1e} |")
    exactly = all(found[name]["resumed_exactly"] for found in results["ways"].values() for name in SETTINGS)
    lines += [
        "",
        f"A vision transformer with 3 blocks of width 192 on 32 px images, {results['batch']} of them in a batch that",
        f"two processes share, {results['steps']} steps on a CPU with gloo. Bytes and gradient are those of the first",
        "step, in which `auto` has 4 bits; the gradient is compared with one process's without compression. Parameters",
        "are not counted.",
        "Each run was saved in its middle and resumed"
        + (", and went on to the same losses, bit for bit." if exactly else "; not all went on to the same losses."),
        "`benchmarks/distributed.py` measures it and writes this and `benchmarks/results/distributed.json`.",
    ]
    pages.write_section(ROOT / "docs" / "distributed.md", "measured", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.worker:
        work(options.settings, options.steps, options.worker)
        return
    results = measure(options.ways, options.settings, options.steps)
    for way, found in results.items():
        for name in options.settings:
            one = found[name]
            print(
                f"{way:24} {name:14} {max(one['saved_bytes']):>10,} of {one['uncompressed_bytes']:>10,} bytes, losses "
                f"{one['losses'][0]:.6f} ... {one['losses'][-1]:.6f}, gradient off by {one['gradient_error']:.1e}, "
                f"resumed exactly: {one['resumed_exactly']}"
            )
    noted = {"batch": BATCH, "steps": options.steps, "ways": results}
    print(timing.write("distributed", noted))
    if set(options.ways) == set(WAYS) and set(options.settings) == set(SETTINGS):
        write_page(noted)


if __name__ == "__main__":
    main()
