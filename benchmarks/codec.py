"""How fast tensors are packed and unpacked on a CPU, beside copying them and beside what else there is.

    python benchmarks/codec.py [--quick]

Every row of a table is timed in the same interleaved rounds. Speeds are in GB/s of fp32, that is 4 bytes per element
whatever the dtype, so rows compare elements per second. Writes benchmarks/results/codec.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from timing import environment, interleaved, write

from hf_actnn.codec import native, ops, reference

SIZE = 64 * 2**20  # bytes of fp32
GROUP = 256
REPEATS = 20


def quantizer(x, bits, variant=None):
    """A call that packs ``x``, as one row per 2^20 elements, into memory touched before, as a copy's target is."""
    row, module = min(x.numel(), 2**20), native.module()
    codes, meta, _ = ops.quantize(x, bits, row, GROUP, 1, 1)
    code, threads = ops._CODE[x.dtype], torch.get_num_threads()

    def call():
        if variant:
            module.use_variant(variant)
        args = (x.numel(), row, GROUP, bits, 1, 1, codes.data_ptr(), meta.data_ptr(), threads)
        module.quantize(x.data_ptr(), code, *args)

    return call


def dequantizer(x, bits, variant=None):
    """A call that unpacks what :func:`quantizer` packed, into recycled memory."""
    row = min(x.numel(), 2**20)
    codes, meta, _ = ops.quantize(x, bits, row, GROUP, 1, 1)

    def call():
        if variant:
            native.module().use_variant(variant)
        return ops.dequantize(codes, meta, bits, row, GROUP, x.numel(), x.dtype)

    return call


def repeat(call):
    """Calls long enough to time together; each result dies before the next, so that its memory is used again."""
    for _ in range(REPEATS):
        call()


def kernels(x, variants):
    """Rows for every variant, width and dtype."""
    rows = {}
    half = {torch.bfloat16: x.bfloat16(), torch.float16: x.half()}
    for variant in variants:
        for bits in (1, 2, 3, 4, 8):
            rows[f"quantise {bits} bits, {variant}"] = quantizer(x, bits, variant)
            rows[f"dequantise {bits} bits, {variant}"] = dequantizer(x, bits, variant)
        for dtype, y in half.items():
            name = str(dtype).removeprefix("torch.")
            rows[f"quantise 2 bits, {name}, {variant}"] = quantizer(y, 2, variant)
            rows[f"dequantise 2 bits, {name}, {variant}"] = dequantizer(y, 2, variant)
    return rows


def others(x):
    """The specification in eager torch and under inductor, and bitsandbytes' blockwise 4 bits."""
    n, row = x.numel(), min(x.numel(), 2**20)
    codes, meta, _ = reference.quantize(x, 2, row, GROUP, 1, 1)
    rows = {
        "quantise 2 bits, eager torch": lambda: reference.quantize(x, 2, row, GROUP, 1, 1),
        "dequantise 2 bits, eager torch": lambda: reference.dequantize(codes, meta, 2, row, GROUP, n, x.dtype),
    }
    # Without the generator: inductor copies every round of Philox into both of its uses, 2^10 times in all.
    u = reference.dither(n // GROUP, GROUP, 1, 1)
    compiled = torch.compile(lambda t, u: reference.quantize_with(t, u, 2, row, GROUP)[:2])
    back = torch.compile(lambda c, m: reference.dequantize(c, m, 2, row, GROUP, n, torch.float32))
    try:
        compiled(x, u)
        back(codes, meta)
        rows["quantise 2 bits, inductor, dither given"] = lambda: compiled(x, u)
        rows["dequantise 2 bits, inductor"] = lambda: back(codes, meta)
    except Exception as error:  # no compiler on the machine
        print(f"inductor left out: {type(error).__name__}")
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(x, blocksize=GROUP, quant_type="nf4")
        rows["quantise 4 bits, bitsandbytes"] = lambda: quantize_4bit(x, blocksize=GROUP, quant_type="nf4")
        rows["dequantise 4 bits, bitsandbytes"] = lambda: dequantize_4bit(packed, state)
    except ImportError:
        print("bitsandbytes is not installed: left out")
    return rows


def table(title, seconds, numel, baseline):
    """Print one table; return its rows for the JSON."""
    print(f"\n{title}\n{'':44s}{'ms':>9s}{'GB/s':>8s}{'of ' + baseline:>12s}")
    rows = {}
    for name, s in seconds.items():
        rows[name] = {
            "ms": round(s * 1e3, 4),
            "gb_per_s": round(4 * numel / s / 1e9, 2),
            "of_baseline": round(s / seconds[baseline], 3),
        }
        r = rows[name]
        print(f"{name:44s}{r['ms']:9.3f}{r['gb_per_s']:8.1f}{r['of_baseline']:12.2f}", flush=True)
    return rows


def main():
    """Time everything, print the tables and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer rounds, kernels only, no JSON")
    quick = parser.parse_args().quick
    module = native.module()
    if module is None:
        raise SystemExit("The compiled kernels are missing; there is nothing to measure.")
    variants = [v for v in module.supported() if v != "portable"] or ["portable"]
    best = module.variant()
    print(environment())

    x = torch.randn(SIZE // 4)
    target = torch.zeros_like(x)  # touched: page faults are no part of a copy
    # What no kernel can be faster than: reading all of it, or writing all of it.
    bounds = {"read only (sum)": lambda: x.sum(), "write only (fill)": lambda: target.fill_(1.0)}
    baseline = {"memcpy": lambda: target.copy_(x), **bounds}
    seconds = interleaved({**baseline, **kernels(x, variants)}, rounds=7 if quick else 31)
    results = {"64 MiB, all threads": table("64 MiB of fp32, all threads", seconds, x.numel(), "memcpy")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = x[: 2**16].clone()  # 256 KiB: within a second-level cache, and long against the cost of a call
    copy = torch.zeros_like(small)
    rows = {}
    for name, call in {"memcpy": lambda: copy.copy_(small), **kernels(small, variants)}.items():
        rows[name] = lambda call=call: repeat(call)
    seconds = {name: s / REPEATS for name, s in interleaved(rows, rounds=7 if quick else 31).items()}
    results["256 KiB, 1 thread"] = table("256 KiB of fp32, one thread", seconds, small.numel(), "memcpy")
    torch.set_num_threads(threads)
    if not quick:
        y = x[: 2**20].clone()  # 4 MiB: what the others take for 64 is minutes
        copied = torch.zeros_like(y)
        mine = {
            "quantise 2 bits": quantizer(y, 2, best),
            "quantise 2 bits, fresh memory": lambda: ops.quantize(y, 2, 2**20, GROUP, 1, 1),
            "dequantise 2 bits": dequantizer(y, 2, best),
        }
        seconds = interleaved({"memcpy": lambda: copied.copy_(y), **mine, **others(y)}, rounds=5, warmup=1)
        results["beside others"] = table("4 MiB of fp32, beside others, all threads", seconds, y.numel(), "memcpy")
    module.use_variant(best)
    if not quick:
        print(f"\nwrote {write('codec', results)}")


if __name__ == "__main__":
    main()
