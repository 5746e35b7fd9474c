"""What compression costs in Python: per saved tensor, and for converting a model.

    python benchmarks/overhead.py [--rounds 25]

On images so small that arithmetic is next to nothing, processor time of forward and backward pass, of one thread:
of the plain model, of the model under empty hooks and an empty torch function mode (what any such design starts from),
of the model at L0 (everything is followed, nothing coded), and at 2 bits. The compiled kernels' own time is taken off
the last: each code of the step is made and read once more by itself. What recipes compute again stays in.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import timing
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hf_actnn
from hf_actnn import codec
from hf_actnn.codec import native
from hf_actnn.saving import call as saving_call

#: timm's name -> its options; all see two images of 32 pixels a side.
MODELS: dict[str, dict[str, Any]] = {"convnext_tiny": {}, "vit_small_patch16_224": {"img_size": 32}, "resnet50": {}}


class _Empty(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


def kernels(model: nn.Module, pixels: Tensor) -> float:
    """Seconds that the compiled functions which make and read the codes of one step take by themselves, as the median
    of several runs of each."""
    codes: list[tuple[Tensor, tuple, dict[str, Any]]] = []
    quantize = codec.quantize

    def record(tensor: Tensor, *args: Any, **options: Any) -> codec.PackedTensor:
        codes.append((tensor.detach().clone(), args, options))
        return quantize(tensor, *args, **options)

    saving_call.codec.quantize = record
    try:
        model(pixels).sum().backward()
    finally:
        saving_call.codec.quantize = quantize
    compiled = native.module()
    calls: list[tuple[Callable[..., Any], tuple]] = []

    class Recording:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            function = getattr(compiled, name)
            return lambda *args: calls.append((function, args)) or function(*args)

    held = []  # the calls have addresses: what lies there stays
    with mock.patch.object(native, "module", Recording):
        for tensor, args, options in codes:
            packed = quantize(tensor, *args, **options)
            held.append((packed, packed.dequantize()))
    runs = []
    for _ in range(7):
        start = time.process_time()
        for function, args in calls:
            function(*args)
        runs.append(time.process_time() - start)
    return statistics.median(runs)


def pair() -> float:
    """Microseconds that packing and unpacking take in Python: of 32 values, for which the kernels take next to none."""
    tensor = torch.randn(1, 32)
    runs = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(5000):
            codec.quantize(tensor, 2, 256, seed=1, stream=2, row_length=32).dequantize()
        runs.append((time.process_time() - start) / 5000)
    return 1e6 * statistics.median(runs)


def measure(name: str, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    import timm

    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10, **options).train()
    pixels = torch.randn(2, 3, 32, 32)
    start = time.perf_counter()
    coded = hf_actnn.convert(copy.deepcopy(plain), bits=2, min_numel=0)
    converting = time.perf_counter() - start
    followed = hf_actnn.convert(copy.deepcopy(plain), "L0")
    saves = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saves
        saves += 1
        return tensor

    def same(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, same):
        plain(pixels)

    def empty() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(same, same))
        stack.enter_context(_Empty())
        return stack

    contenders = {"plain": plain, "empty": plain, "L0": followed, "2 bits": coded}
    seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, model in contenders.items():
            begin = time.process_time()
            with empty() if key == "empty" else contextlib.nullcontext():
                loss = model(pixels).sum()
            middle = time.process_time()
            loss.backward()
            seconds[key].append((middle - begin, time.process_time() - middle))
    row: dict[str, Any] = {
        "modules": sum(1 for _ in plain.modules()),
        "convert_seconds": converting,
        "saves": saves,
        "kernels_us": 1e6 * kernels(coded, pixels) / saves,
    }
    for key, runs in seconds.items():
        if key != "plain":
            for at, part in enumerate(("forward", "backward")):
                # The least disturbed run of each: what is added is small beside what the machine does to either.
                added = min(run[at] for run in runs) - min(run[at] for run in seconds["plain"])
                row[f"{key} {part}, us per save"] = 1e6 * added / saves
    row["python_us_per_save"] = (
        row["2 bits forward, us per save"] + row["2 bits backward, us per save"] - row["kernels_us"]
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    together = pair()
    print(f"packing and unpacking a small tensor: {together:.1f} us", flush=True)
    results = {}
    for name, architecture in MODELS.items():
        results[name] = measure(name, architecture, options.rounds)
        print(name, {key: round(value, 5) for key, value in results[name].items()}, flush=True)
    print(timing.write("overhead", {"pack_and_unpack_us": together, "models": results}).name)


if __name__ == "__main__":
    main()
