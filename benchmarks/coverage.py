"""What hf_actnn does to each model family of timm, transformers and torchvision.

    python benchmarks/coverage.py [--families timm/vit transformers/ViT] [--tiny] [--resume] [--output coverage]
    python benchmarks/coverage.py --page          # write docs/coverage.md from the results that are there

From a tiny model of each family, against the same model unconverted under the same seed of torch: whether the forward
pass gives the same bits, in training and in eval mode, whether level L0 gives the same gradients, and the cosine
between the gradients at 8 and 4 bits and the exact ones. From the full model at 224 px: the bytes held for the backward
pass, uncompressed and at 2 bits, in fp32 and under bf16 autocast, and what of the latter is left exact, and why.

One process per family: one that fails costs its own row. Results are written after each; --resume keeps the rows that
the output has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import families
import timing
import torch
from families import FAMILIES, Family, Inputs
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import hf_actnn
from hf_actnn.saving import scope
from hf_actnn.saving.call import Slot
from hf_actnn.saving.kept import Exact

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coverage.md"
LIBRARIES = ("timm", "transformers", "torchvision")
TINY_BATCH = 4
#: Bits of the byte counts: of the full models, and of the tiny ones.
FULL_BITS, TINY_BITS = 2, 4
#: Of the rounding, of which the mean gradient is taken where one is further from the exact gradient than usual.
DRAWS = 64
USUAL_COSINE = 0.999
#: Reasons that a row of the page names.
TOP = 3


# -- one training step -------------------------------------------------------------------------------------------------


class Step:
    """One forward and backward pass of a tiny model, and everything it gave.

    Attributes:
        outputs: every tensor returned, the loss among them.
        state: of torch's generator after the forward pass.
        buffers: by name, after the forward pass.
        gradients: by parameter name; none in eval mode.
    """

    def __init__(self, family: Family, autocast: bool = False, train: bool = True, **conversion: Any) -> None:
        model = family.tiny()
        if conversion:
            hf_actnn.convert(model, min_numel=0, **conversion)
        model.train(train)
        inputs = family.inputs(TINY_BATCH, tiny=True)
        torch.manual_seed(3)
        with _autocast(autocast):
            output = families.forward(model, inputs)
            state = torch.get_rng_state()
            loss = family.loss(output, inputs)
        self.outputs = [tensor.detach().clone() for tensor in (*families.tensors(output), loss)]
        self.state = state
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.gradients: dict[str, Tensor] = {}
        if train:
            loss.backward()
            self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def same_forward(self, other: Step) -> bool:
        """Whether the forward pass gave the same bits and drew as much from torch's generator."""
        return (
            _same(self.outputs, other.outputs)
            and torch.equal(self.state, other.state)
            and self.buffers.keys() == other.buffers.keys()
            and _same(list(self.buffers.values()), list(other.buffers.values()))
        )

    def same_gradients(self, other: Step) -> bool:
        return self.gradients.keys() == other.gradients.keys() and _same(
            list(self.gradients.values()), list(other.gradients.values())
        )

    def cosine(self, other: Step) -> float:
        """Between all gradients as one vector; products and sums in fp64."""
        if self.gradients.keys() != other.gradients.keys():
            raise AssertionError(f"gradients of {sorted(self.gradients.keys() ^ other.gradients.keys())} in one only")
        product = left = right = 0.0
        for name, gradient in self.gradients.items():
            a, b = gradient.double().flatten(), other.gradients[name].double().flatten()
            product += (a @ b).item()
            left += (a @ a).item()
            right += (b @ b).item()
        return product / (left * right) ** 0.5


def _autocast(on: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit; nan equals nan."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        for a, b in zip(left, right, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


# -- bytes -------------------------------------------------------------------------------------------------------------


class ExactBytes:
    """What a converted forward pass leaves exact, each storage once, by operation and reason.

    `hf_actnn.report` counts a tensor for each operation that saves it, so its figures do not add up to what is held.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_reason: dict[tuple[str, str], int] = defaultdict(int)
        #: Bytes of autocast's copies of the weights, which autograd would hold.
        self.weight_copies = 0
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again

    def saved(self, slot: Slot, tensor: Tensor, path: str, function: str) -> None:
        assert slot.kept is not None
        leaves = [leaf for leaf in slot.kept.leaves() if isinstance(leaf, Exact)]
        if leaves and all(leaf.parameter for leaf in leaves) and slot.kept.kind == "recipe: cast":
            self.weight_copies += self._new(tensor)
        for leaf in leaves:
            if not leaf.parameter:
                self.by_reason[function, slot.reason or "what others are rebuilt from"] += self._new(leaf.tensor)

    def copied(self, kept: Exact, path: str) -> None:
        self.by_reason["a write in place", "what others are rebuilt from"] += self._new(kept.tensor)

    def _new(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._own or storage._cdata in self._seen:
            return 0
        self._seen[storage._cdata] = StorageWeakRef(storage)
        return storage.nbytes()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        watchers = scope.observers()
        watchers.append(self)
        try:
            yield
        finally:
            watchers.remove(self)


def held(build: Callable[[], nn.Module], inputs: Inputs, autocast: bool, **conversion: Any) -> dict[str, Any]:
    """Bytes that a forward pass holds for the backward pass, uncompressed and converted.

    Under autocast, PyTorch also holds a bf16 copy of every weight, however small the batch, where hf_actnn casts anew.
    They are part of what it holds, and said apart.
    """
    model = build()
    with hf_actnn.track_memory(model) as memory, _autocast(autocast):
        output = families.forward(model, inputs)
    plain = memory.saved_bytes
    del output, model
    model = hf_actnn.convert(build(), **conversion)
    exact = ExactBytes(model)
    with hf_actnn.track_memory(model) as memory, exact.watching(), _autocast(autocast):
        output = families.forward(model, inputs)
    kept = memory.saved_bytes
    del output
    reasons = sorted(exact.by_reason.items(), key=lambda item: -item[1])
    return {
        "plain_bytes": plain,
        "weight_copies_bytes": exact.weight_copies,
        "held_bytes": kept,
        "ratio": plain / kept,
        "exact_share": sum(exact.by_reason.values()) / kept,
        "exact": [
            {"function": function, "reason": reason, "bytes": nbytes}
            for (function, reason), nbytes in reasons
            if nbytes
        ],
    }


# -- one family --------------------------------------------------------------------------------------------------------


def measure(family: Family, tiny: bool) -> dict[str, Any]:
    """A family's row. A part that fails leaves its error under ``errors``, by the part's name."""
    row: dict[str, Any] = {"errors": {}}

    def part(name: str, function: Callable[[], dict[str, Any]]) -> bool:
        try:
            row.update(function())
        except Exception as error:
            row["errors"][name] = _described(error)
        return name not in row["errors"]

    try:
        model = family.tiny() if tiny else family.full()
    except Exception as error:
        return {"not_built": _described(error)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["model"] = type(model).__name__
    del model

    exact: dict[bool, Step] = {}

    def unconverted(autocast: bool) -> dict[str, Any]:
        exact[autocast] = Step(family, autocast)
        again = Step(family, autocast)
        name = "repeats_autocast" if autocast else "repeats"
        return {name: exact[autocast].same_forward(again) and exact[autocast].same_gradients(again)}

    def compared(autocast: bool, bits: int, names: tuple[str, str]) -> dict[str, Any]:
        step = Step(family, autocast, bits=bits)
        return {names[0]: step.same_forward(exact[autocast]), names[1]: step.cosine(exact[autocast])}

    def mean_of_draws() -> dict[str, Any]:
        mean = Step(family, bits=8, seed=0)
        for seed in range(1, DRAWS):
            for name, gradient in Step(family, bits=8, seed=seed).gradients.items():
                mean.gradients[name] += gradient
        return {"draws": DRAWS, "cosine_8_mean": mean.cosine(exact[False])}

    if part("unconverted", lambda: unconverted(False)):
        part("8 bits", lambda: compared(False, 8, ("same_forward", "cosine_8")))
        if row.get("cosine_8", 1.0) <= USUAL_COSINE:
            part("mean of draws", mean_of_draws)
        part("4 bits", lambda: compared(False, 4, ("same_forward_4", "cosine_4")))
        part("L0", lambda: {"same_gradients_l0": Step(family, config="L0").same_gradients(exact[False])})
        part(
            "eval",
            lambda: {
                "same_forward_eval": Step(family, train=False, bits=8).same_forward(Step(family, train=False)),
            },
        )
    if part("unconverted, autocast", lambda: unconverted(True)):
        part("8 bits, autocast", lambda: compared(True, 8, ("same_forward_autocast", "cosine_8_autocast")))
    batch = TINY_BATCH if tiny else family.full_batch
    build, inputs = (family.tiny if tiny else family.full), family.inputs(batch, tiny)
    conversion = {"bits": TINY_BITS, "min_numel": 0} if tiny else {"bits": FULL_BITS}
    row |= {"batch": batch, "side": family.sides[not tiny], "bits": conversion["bits"]}
    part("bytes, fp32", lambda: {"fp32": held(build, inputs, False, **conversion)})
    part("bytes, bf16", lambda: {"bf16": held(build, inputs, True, **conversion)})
    return row


def _described(error: BaseException) -> str:
    """The error and the function it came from."""
    said = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {said[0][:300] if said else ''}{where}"


def measured_apart(key: str, tiny: bool, timeout: float) -> dict[str, Any]:
    """A family's row from a process of its own."""
    command = [sys.executable, __file__, "--one", key, *(["--tiny"] if tiny else [])]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}  # a look-up that waits for the network would only be slow
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"errors": {"process": f"took more than {timeout:.0f} s"}}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {
            "errors": {"process": f"ended by signal {-done.returncode}" + ", out of memory?" * (done.returncode == -9)}
        }
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"errors": {"process": said[-1][:300] if said else f"exit status {done.returncode}"}}


# -- the page ----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", *LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the page of the documentation from what a run has written."""
    page.write_text("\n".join(_page(results)) + "\n")


def _page(results: dict[str, Any]) -> Iterator[str]:
    rows = {key: row for key, row in results["families"].items() if "not_built" not in row}
    machine = results["environment"]
    yield "# Model families"
    yield ""
    yield "<!-- Written by benchmarks/coverage.py from benchmarks/results/coverage.json; edit those, not this. -->"
    yield ""
    ran = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"What conversion does to {len(rows)} model families, with random weights, on {ran}; {machine['cpu']}."
    yield ""
    yield (
        "* *Same bits*: a tiny model of the family, converted, gives in training mode, in eval mode and as gradients "
        "at level L0 exactly what it gives unconverted under the same seed."
    )
    yield (
        "* *Cosine*: between the gradients of all parameters of the tiny model, dropout and drop path on, and the "
        "uncompressed ones, at 8 and 4 bits in fp32 and at 8 bits under bf16 autocast."
    )
    yield (
        f"* *MB per image*: what the full model holds for the backward pass, uncompressed and at {FULL_BITS} bits, "
        "without parameters. Under autocast PyTorch also holds a bf16 copy of each weight, which hf_actnn makes again: "
        "with the one or two images measured here they are a large part of it, with a full batch a small one."
    )
    yield "* *Exact*: the share of what hf_actnn holds in fp32 that is not compressed, and the most of it by operation."
    for library in LIBRARIES:
        chosen = {key: row for key, row in rows.items() if key.startswith(library + "/")}
        if chosen:
            yield from ("", f"## {library}", "", *_table(chosen))
    below = [key for key, row in rows.items() if row.get("cosine_8", 1.0) <= USUAL_COSINE]
    if below:
        yield from ("", "## Below a cosine of 0.999 at 8 bits", "")
        yield (
            "Noise or a mistake? Noise is averaged away: with independent draws of the rounding the mean gradient "
            "comes as close to the exact one as one likes, its distance (one minus the cosine) falling with their "
            "number; a mistake stays."
        )
        yield ""
        yield from ("| family | one draw | mean of several | draws |", "|---|---|---|---|")
        for key in below:
            row = rows[key]
            mean = _cosine(row.get("cosine_8_mean"))
            yield f"| {key} | {_cosine(row['cosine_8'])} | {mean} | {row.get('draws', '')} |"
        yield from ("", f"What they have in common: {families.DIFFERENCES}.")
    failed = {key: row["errors"] for key, row in rows.items() if row.get("errors")}
    if failed:
        yield from ("", "## What failed", "")
        for key, errors in failed.items():
            yield from (f"* {key}, {part}: `{_plain(text)}`" for part, text in errors.items())
    missing = {key: row["not_built"] for key, row in results["families"].items() if "not_built" in row}
    if missing:
        yield from ("", "## What could not be built", "")
        yield from (f"* {key}: `{_plain(text)}`" for key, text in missing.items())


def _table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield (
        "| family | parameters | same bits: train | eval | L0 | cosine, 8 bits | 4 bits | 8 bits, bf16 "
        "| fp32, MB per image | ratio | bf16, MB per image | ratio | exact | most of it |"
    )
    yield "|---|---" + "|---" * 12 + "|"
    for key, row in rows.items():
        cells = [
            key.partition("/")[2],
            f"{row['parameters'] / 1e6:,.1f} M" if "parameters" in row else "",
            *(_yes(row.get(name)) for name in ("same_forward", "same_forward_eval", "same_gradients_l0")),
            *(_cosine(row.get(name)) for name in ("cosine_8", "cosine_4", "cosine_8_autocast")),
            *_bytes(row, "fp32"),
            *_bytes(row, "bf16"),
            *_exact(row),
        ]
        yield "| " + " | ".join(cells) + " |"


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "**no**"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _bytes(row: dict[str, Any], kind: str) -> tuple[str, str]:
    if kind not in row:
        return "", ""
    plain, kept = (row[kind][name] / row["batch"] / 1e6 for name in ("plain_bytes", "held_bytes"))
    digits = 1 if plain >= 10 else 3
    side = f" ({row['side']} px)" if row["side"] != families.FULL_SIDE else ""
    return f"{plain:,.{digits}f} to {kept:,.{max(digits, 2)}f}{side}", f"{row[kind]['ratio']:.1f}x"


def _exact(row: dict[str, Any]) -> tuple[str, str]:
    if "fp32" not in row:
        return "", ""
    measured = row["fp32"]
    most = [
        f"{entry['function']}: {entry['reason']} ({100 * entry['bytes'] / measured['held_bytes']:.0f} %)"
        for entry in measured["exact"][:TOP]
    ]
    return f"{100 * measured['exact_share']:.0f} %", _plain("; ".join(most))


def _plain(text: str) -> str:
    """Nothing that would end a cell of a table or a piece of code."""
    return text.replace("|", "/").replace("`", "'").replace("\n", " ")


# -- the program -------------------------------------------------------------------------------------------------------


def _line(key: str, row: dict[str, Any]) -> str:
    if "not_built" in row:
        return f"{key}: not built, {row['not_built']}"
    said = [
        f"{name} {row[name]:.5f}" if isinstance(row[name], float) else f"{name} {row[name]}"
        for name in (
            "repeats",
            "same_forward",
            "same_forward_eval",
            "same_gradients_l0",
            "cosine_8",
            "cosine_4",
            "same_forward_autocast",
            "cosine_8_autocast",
        )
        if name in row
    ]
    said += [
        f"{kind} {row[kind]['ratio']:.1f}x, exact {row[kind]['exact_share']:.0%}"
        for kind in ("fp32", "bf16")
        if kind in row
    ]
    said += [f"{part}: {text}" for part, text in row["errors"].items()]
    return f"{key}: " + ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--tiny", action="store_true", help="count the bytes of the tiny models, build no full one")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output has already")
    parser.add_argument("--page", action="store_true", help="only write the page, from the output that is there")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one family")
    parser.add_argument("--output", help="default: coverage, or coverage_tiny")
    parser.add_argument("--one", choices=list(FAMILIES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(FAMILIES[arguments.one], arguments.tiny)))
        return
    output = arguments.output or ("coverage_tiny" if arguments.tiny else "coverage")
    path = Path(timing.__file__).parent / "results" / f"{output}.json"
    if arguments.page:
        return write_page(json.loads(path.read_text()))
    rows: dict[str, Any] = {}
    if arguments.resume and path.exists():
        rows = json.loads(path.read_text())["families"]
    for key in arguments.families:
        if key in rows:
            continue
        rows[key] = measured_apart(key, arguments.tiny, arguments.timeout)
        print(_line(key, rows[key]), flush=True)
        ordered = {known: rows[known] for known in FAMILIES if known in rows}
        timing.write(output, {"versions": versions(), "tiny": arguments.tiny, "families": ordered})
    if not arguments.tiny and path.stem == "coverage":
        write_page(json.loads(path.read_text()))
    print(path.name)


if __name__ == "__main__":
    main()
