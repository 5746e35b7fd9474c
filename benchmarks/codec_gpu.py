"""How fast tensors are packed and unpacked on a GPU, beside copying them there.

    python benchmarks/codec_gpu.py [--device cuda] [--out FILE] [--elements N] [--rounds N]

Every row of a table is timed in the same interleaved rounds, by events on the device; medians. A rate counts all bytes
that have to move, read and written: values, codes and metadata; a copy's counts its values twice. Before anything is
timed, the kernels' bytes are compared with the specification's, and gradients that they make of codes with torch's.
Writes benchmarks/results/codec_gpu.json, and a picture
beside it where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from timing import environment

from hf_actnn.codec import mixed, native, ops, pack_mask, reference, unpack_mask
from hf_actnn.codec.ops import _launch as launch

RESULTS = Path(__file__).parent / "results" / "codec_gpu.json"
GROUP = 256
BITS = (2, 4, 8)
SAMPLES = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What the kernels are meant to reach of a copy's rate.
GOALS = {"quantise": 0.85, "dequantise": 0.90, "mixed": 0.80}

# Activations whose gradients a kernel makes of codes: its number for each (csrc/codec.h), and what torch has for them.
ACTIVATIONS: dict[str, tuple[int, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "GELU": (0, torch.ops.aten.gelu_backward),
    "tanh GELU": (1, partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    "SiLU": (2, torch.ops.aten.silu_backward),
}


def device_facts(device: torch.device) -> dict[str, Any]:
    """What figures depend on beyond the host: device, driver, versions."""
    properties = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown: no nvidia-smi"
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver, clocks": driver,
        "cuda": torch.version.cuda,
        "kernels_built_for": native.cuda_status()["architectures"],
        **environment(),
    }


def check_bytes(device: torch.device) -> None:
    """Figures of kernels that are wrong are worth nothing."""
    x = torch.randn(64 * 1024)
    for dtype in DTYPES.values():
        for bits in BITS:
            expected = reference.quantize(x.to(dtype), bits, 1024, GROUP, 1, 1)
            got = ops.quantize(x.to(device, dtype), bits, 1024, GROUP, 1, 1)
            if not all(torch.equal(a.cpu(), b) for a, b in zip(got[:2], expected[:2], strict=True)):
                raise SystemExit(f"The kernels' bytes are wrong at {bits} bits, {dtype}: nothing is measured.")


def activation_backward(codes: torch.Tensor, meta: torch.Tensor, bits: int, number: int, grad: torch.Tensor) -> Any:
    """The gradient of an activation whose input is in codes, a row of at most 2^20 elements at a time."""
    n, out, kernels = grad.numel(), torch.empty_like(grad), native.cuda(grad.device.index)
    cut = (codes.data_ptr(), meta.data_ptr(), n, min(n, 2**20), GROUP, bits)
    launch(kernels.activation_backward, grad, *cut, ops._CODE[grad.dtype], number, grad.data_ptr(), out.data_ptr())
    return out


def select_by_mask(grad: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The gradient of a ReLU whose output is known as a mask."""
    out, kernels = torch.empty_like(grad), native.cuda(grad.device.index)
    dtype = ops._CODE[grad.dtype]
    launch(kernels.select_by_mask, grad, grad.data_ptr(), dtype, mask.data_ptr(), grad.numel(), out.data_ptr())
    return out


def gradients(x: torch.Tensor, name: str) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Backward passes of one kernel, each beside the two calls that it stands for: unpack, then torch's own. Both are
    rated by the bytes that the one has to move, so their rates are to each other as their times are. The incoming
    gradient is ``x``."""
    n, bits = x.numel(), 2
    mask = pack_mask(x, "gt")
    codes, meta, _ = ops.quantize(x, bits, min(n, 2**20), GROUP, 1, 1)
    calls: dict[str, Callable[[], Any]] = {
        f"{name} ReLU backward": lambda: select_by_mask(x, mask),
        f"{name} ReLU backward, two calls": lambda: torch.ops.aten.threshold_backward(
            x, unpack_mask(mask, n, 1.0, 0.0, x.dtype), 0.0
        ),
    }
    moved = dict.fromkeys(calls, 2 * x.nbytes + mask.nbytes)
    back = (codes, meta, bits, min(n, 2**20), GROUP, n, x.dtype)
    for activation, (number, aten) in ACTIVATIONS.items():
        label = f"{name} {activation} backward"
        calls[label] = lambda number=number: activation_backward(codes, meta, bits, number, x)
        calls[f"{label}, two calls"] = lambda aten=aten: aten(x, ops.dequantize(*back))
        moved[label] = moved[f"{label}, two calls"] = 2 * x.nbytes + codes.nbytes + meta.nbytes
    return calls, moved


def check_gradients(device: torch.device) -> None:
    """A kernel's gradient is that of the two calls, as far as the dtype tells them apart."""
    for name, dtype in DTYPES.items():
        calls, _ = gradients(torch.randn(64 * 1024, device=device).to(dtype), name)
        tolerance = 4 * torch.finfo(dtype).eps
        for label in [label for label in calls if "two calls" not in label]:
            if not torch.allclose(calls[label](), calls[f"{label}, two calls"](), rtol=tolerance, atol=tolerance):
                raise SystemExit(f"The kernels' gradients are wrong for {label}: nothing is measured.")


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of a call of each contender, on the device; each is called several times in a row, so that the
    host's part of a call hides behind the call before."""
    for call in contenders.values():
        for _ in range(3):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            seconds[name].append(first.elapsed_time(last) / 1e3 / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def contenders(x: torch.Tensor, name: str) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """The calls for one tensor, and the bytes that each has to move."""
    n, row, item = x.numel(), min(x.numel(), 2**20), x.element_size()
    target = torch.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {f"{name} copy": lambda: target.copy_(x)}
    moved = {f"{name} copy": 2 * n * item}
    widths = torch.tensor([1, 2, 2, 4] * (SAMPLES // 4), dtype=torch.uint8)
    for bits in (*BITS, widths):
        module = ops if isinstance(bits, int) else mixed
        label = f"{bits} bits" if isinstance(bits, int) else "mixed 1, 2, 2, 4 bits"
        codes, meta, _ = module.quantize(x, bits, row, GROUP, 1, 1)
        back = (codes, meta, bits, row, GROUP, n, x.dtype)
        calls[f"{name} quantise {label}"] = lambda module=module, bits=bits: module.quantize(x, bits, row, GROUP, 1, 1)
        calls[f"{name} dequantise {label}"] = lambda module=module, back=back: module.dequantize(*back)
        for direction in ("quantise", "dequantise"):
            moved[f"{name} {direction} {label}"] = n * item + codes.nbytes + meta.nbytes
    mask = pack_mask(x, "gt")
    calls[f"{name} pack a mask"] = lambda: pack_mask(x, "gt")
    calls[f"{name} unpack a mask"] = lambda: unpack_mask(mask, n, 1.0, 0.0, x.dtype)
    moved[f"{name} pack a mask"] = moved[f"{name} unpack a mask"] = n * item + mask.nbytes
    more_calls, more_moved = gradients(x, name)
    return calls | more_calls, moved | more_moved


def host_microseconds(call: Callable[[], Any], calls: int = 300) -> float:
    """What a call costs the host, which goes on while the device works."""
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def table(seconds: dict[str, float], moved: dict[str, int], numel: int) -> dict[str, dict[str, float]]:
    """Print one table; return its rows for the JSON."""
    print(f"\n{numel} elements, groups of {GROUP}\n{'':38s}{'us':>9s}{'GB/s':>9s}{'of copy':>9s}{'goal':>7s}")
    rows = {}
    for name, s in seconds.items():
        copy = name.split()[0] + " copy"
        rate = moved[name] / s
        goal = next((GOALS[word] for word in ("mixed", "dequantise", "quantise") if word in name.split()), None)
        rows[name] = {
            "us": round(s * 1e6, 2),
            "gb_per_s": round(rate / 1e9, 1),
            "of_copy": round(rate / (moved[copy] / seconds[copy]), 3),
        }
        r = rows[name]
        aim = "" if goal is None else f"{goal:7.2f}{'' if r['of_copy'] >= goal else '  missed'}"
        print(f"{name:38s}{r['us']:9.1f}{r['gb_per_s']:9.1f}{r['of_copy']:9.3f}{aim}", flush=True)
    return rows


def picture(rows: dict[str, dict[str, float]], title: str, path: Path) -> bool:
    """A bar for each row, as a share of the copy's rate; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.25 * len(rows) + 1))
    names = list(rows)[::-1]
    axes.barh(names, [rows[name]["of_copy"] for name in names])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("rate, of a device copy's")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def main() -> None:
    """Time everything, write the JSON and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--elements", type=int, default=2**27, help="of a tensor: many times what a cache holds")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"This measures CUDA devices; {device} is none that torch sees here.")
    if arguments.elements < SAMPLES * 2**20 or arguments.elements % (SAMPLES * 2**20) != 0:
        raise SystemExit(f"--elements is {arguments.elements}; expected a multiple of {SAMPLES * 2**20}.")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    if native.cuda(device.index) is None:
        raise SystemExit("The CUDA kernels are not built; there is nothing to measure.")
    check_bytes(device)
    check_gradients(device)
    facts = device_facts(device)
    print(facts)

    calls: dict[str, Callable[[], Any]] = {}
    moved: dict[str, int] = {}
    for name, dtype in DTYPES.items():
        more_calls, more_moved = contenders(torch.randn(arguments.elements, device=device).to(dtype), name)
        calls.update(more_calls)
        moved.update(more_moved)
    seconds = interleaved(calls, arguments.rounds, calls=5)

    small = torch.randn(2**16, device=device)
    codes, meta, _ = ops.quantize(small, 2, 2**16, GROUP, 1, 1)
    target = torch.empty_like(small)
    host = {
        "copy": host_microseconds(lambda: target.copy_(small)),
        "quantise 2 bits": host_microseconds(lambda: ops.quantize(small, 2, 2**16, GROUP, 1, 1)),
        "dequantise 2 bits": host_microseconds(
            lambda: ops.dequantize(codes, meta, 2, 2**16, GROUP, 2**16, torch.float32)
        ),
    }
    print("\nhost's part of a call, us: " + ", ".join(f"{name} {us:.1f}" for name, us in host.items()))
    rows = table(seconds, moved, arguments.elements)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": facts, "elements": arguments.elements, "rows": rows, "host_us": host, "goals": GOALS}
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    drawn = arguments.out.with_suffix(".svg")
    print(f"\nwrote {arguments.out}" + (f" and {drawn}" if picture(rows, facts["device"], drawn) else ""))


if __name__ == "__main__":
    main()
