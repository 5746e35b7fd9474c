"""Runs the CUDA kernels on a CPU: builds their sources against shim.h, and hands them torch's memory.

The runner is a process of its own, so the address and undefined-behaviour sanitizers can watch it: what they find ends
it, and the test that asked gets their words.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_actnn.codec import ops, reference

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("quantize.cu", "dequantize.cu", "activations.cu", "rebuild.cu", "masks.cu", "samples.cu")
KERNELS = (
    "quantize",
    "dequantize",
    "activation_backward",
    "rebuild_by_channel",
    "rebuild_by_row",
    "rebuild_activation",
    "rounding_variance",
    "spread",
    "affine",
    "normalize",
    "scale_by_mask",
    "pack_mask",
    "unpack_mask",
    "select_by_mask",
    "pack_uint",
    "unpack_uint",
)
FLAGS = ["-std=c++17", "-g0", "-ffp-contract=off", "-fno-math-errno", "-DHF_ACTNN_SHIM"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# In what order the lanes of a block run between two barriers.
ORDERS = {"forwards": 0, "backwards": 1, "odd first": 2}


def build(folder: Path, sources: Path = ROOT, sanitize: bool = True, objects: Path | None = None) -> Path:
    """The runner, compiled from the kernels under ``sources``; ``objects``: where compiled units are kept."""
    flags = ["-O1", *SANITIZE] if sanitize else ["-O0"]
    return compiled(folder, "runner", [sources / "tests" / "cuda" / "runner.cpp"], sources, flags, objects=objects)


def build_module(folder: Path) -> Path:
    """The Python module of the CUDA kernels, with kernels that run on the CPU."""
    import sysconfig

    import pybind11

    flags = ["-O1", "-fPIC", "-fvisibility=hidden", '-DHF_ACTNN_ARCHITECTURES="none"']
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    units = [ROOT / "csrc" / "cuda" / "bindings.cpp"]
    return compiled(folder, "_native_cuda.so", units, ROOT, flags, ["-shared"])


def compiled(
    folder: Path,
    name: str,
    units: list[Path],
    sources: Path,
    flags: list[str],
    link: Iterable[str] = (),
    objects: Path | None = None,
) -> Path:
    """A program or library of these units, the kernels and the shim; a second caller waits for the first one's."""
    folder.mkdir(parents=True, exist_ok=True)
    here = sources / "tests" / "cuda"
    units = [*units, here / "shim.cpp", *(sources / "csrc" / "cuda" / name for name in SOURCES)]
    included = [*(sources / "csrc").glob("**/*.h"), *(sources / "csrc").glob("**/*.cuh"), *here.glob("*.h")]
    headers = b"".join(path.name.encode() + path.read_bytes() for path in sorted(included))

    def make(unit: Path) -> Path:
        digest = hashlib.sha256(repr([*FLAGS, *flags]).encode() + headers + unit.read_bytes()).hexdigest()[:16]
        arguments = [*FLAGS, *flags, f"-I{here}", "-include", "shim.h", "-x", "c++", "-c", str(unit)]
        return _once((objects or folder / "objects") / f"{unit.stem}-{digest}.o", arguments)

    return _once(folder / name, [*flags, *link, *(str(make(unit)) for unit in units)])


def _once(made: Path, arguments: list[str]) -> Path:
    """What the compiler makes of these, unless it is there."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the kernels for the CPU with")
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            done = subprocess.run(
                [compiler, *arguments, "-o", f"{made}.unfinished"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
            Path(f"{made}.unfinished").rename(made)
    return made


class Buffer(NamedTuple):
    """Memory of a job: how large it is, how far from an address divisible by 16, and the part that has contents."""

    size: int
    contents: bytes | None = None  #: None for an output
    offset: int = 0
    window: int = 0
    length: int | None = None  #: of an output's window, where it is not all of it
    zero: bool = False  #: an output that the kernel adds to
    changed: bool = False  #: what a kernel changes in place: contents that come back

    def describe(self) -> bytes:
        length = self.size if self.length is None else self.length
        if self.contents is not None:
            length = len(self.contents)
        output = 2 if self.changed else self.contents is None
        return struct.pack("<6q", self.size, self.offset, self.window, length, output, self.zero)


def bytes_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


class Shim:
    """One runner; the calls have the arguments of the operators they stand for."""

    def __init__(self, runner: Path) -> None:
        self.process = subprocess.Popen(
            [str(runner)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.order = "forwards"
        #: How far, in elements, tensors lie from an address divisible by 16.
        self.offset = 0

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def run(self, kernel: str, buffers: list[Buffer], blocks: tuple[int, int] = (0, -1), **fields) -> list[bytes]:
        """Run a kernel; the contents of its outputs come back."""
        names = (
            "dtype",
            "numel",
            "row_length",
            "group_size",
            "bits",
            "samples",
            "seed",
            "stream",
            "predicate",
            "function",
            "channels",
            "inner",
            "out_dtype",
        )
        numbers = [KERNELS.index(kernel), *(fields.get(name, 0) for name in names)]
        numbers += [*blocks, ORDERS[self.order], len(buffers)]
        job = struct.pack("<18q2d", *numbers, fields.get("lo", 0.0), fields.get("hi", 0.0))
        results = []
        try:
            self.process.stdin.write(job)
            for buffer in buffers:
                self.process.stdin.write(buffer.describe() + (buffer.contents or b""))
            self.process.stdin.flush()
            for buffer in buffers:
                if buffer.contents is None or buffer.changed:
                    n = buffer.size if buffer.length is None else buffer.length
                    data = self.process.stdout.read(n)
                    if len(data) != n:
                        raise BrokenPipeError
                    results.append(data)
        except BrokenPipeError:
            raise RuntimeError(self.process.stderr.read().decode()[-4000:]) from None
        return results

    def _of(self, x: Tensor) -> Buffer:
        return Buffer(x.nbytes, bytes_of(x), self.offset * x.element_size() % 16)

    def _out(self, numel: int, dtype: torch.dtype) -> Buffer:
        return Buffer(numel * dtype.itemsize, None, self.offset * dtype.itemsize % 16)

    def quantize(
        self,
        x: Tensor,
        bits: int | Tensor,
        row_length: int,
        group_size: int,
        seed: int,
        stream: int,
        advance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        places, fields, nbytes = cut(x.numel(), bits, row_length, group_size)
        at = reference.layout(x.numel(), row_length, 1, group_size)
        counter = b"" if advance is None else bytes_of(advance)
        codes, meta, exact = self.run(
            "quantize",
            [
                places,
                Buffer(len(counter), counter),
                self._of(x),
                Buffer(nbytes, None, self.offset % 16),
                Buffer(4 * at.n_groups),
                Buffer(4, zero=True),
            ],
            dtype=ops._CODE[x.dtype],
            seed=ops._signed(seed),
            stream=ops._signed(stream),
            **fields,
        )
        return tensor(codes, torch.uint8), tensor(meta, torch.bfloat16).view(-1, 2), tensor(exact, torch.int32)

    def dequantize(
        self,
        codes: Tensor,
        meta: Tensor,
        bits: int | Tensor,
        row_length: int,
        group_size: int,
        numel: int,
        dtype: torch.dtype,
    ) -> Tensor:
        places, fields, _ = cut(numel, bits, row_length, group_size)
        buffers = [*self._coded(codes, meta, places), self._out(numel, dtype)]
        return tensor(self.run("dequantize", buffers, dtype=ops._CODE[dtype], **fields)[0], dtype)

    def activation_backward(
        self,
        codes: Tensor,
        meta: Tensor,
        bits: int | Tensor,
        row_length: int,
        group_size: int,
        function: int,
        grad: Tensor,
    ) -> Tensor:
        places, fields, _ = cut(grad.numel(), bits, row_length, group_size)
        buffers = [*self._coded(codes, meta, places), self._of(grad), self._out(grad.numel(), grad.dtype)]
        out = self.run("activation_backward", buffers, dtype=ops._CODE[grad.dtype], function=function, **fields)
        return tensor(out[0], grad.dtype)

    def _coded(self, codes: Tensor, meta: Tensor, places: Buffer) -> list[Buffer]:
        return [places, Buffer(codes.nbytes, bytes_of(codes), self.offset % 16), Buffer(meta.nbytes, bytes_of(meta))]

    def rebuild_by_channel(
        self,
        codes: Tensor,
        meta: Tensor,
        bits: int | Tensor,
        row_length: int,
        group_size: int,
        numel: int,
        dtype: torch.dtype,
        scale: Tensor,
        shift: Tensor,
        inner: int,
        mask: Tensor | None = None,
        on: float = 1.0,
        signs: bool = False,
    ) -> Tensor:
        places, fields, _ = cut(numel, bits, row_length, group_size)
        mask = torch.empty(0, dtype=torch.uint8) if mask is None else mask
        buffers = [
            *self._coded(codes, meta, places),
            self._of(scale),
            self._of(shift),
            Buffer(mask.nbytes, bytes_of(mask), self.offset % 16),
            self._out(numel, dtype),
        ]
        fields |= {"channels": scale.numel(), "inner": inner, "predicate": int(signs)}
        return tensor(self.run("rebuild_by_channel", buffers, dtype=ops._CODE[dtype], hi=on, **fields)[0], dtype)

    def rebuild_by_row(
        self,
        codes: Tensor,
        meta: Tensor,
        bits: int | Tensor,
        row_length: int,
        group_size: int,
        numel: int,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        mean: Tensor,
        factor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        width: int,
    ) -> Tensor:
        places, fields, _ = cut(numel, bits, row_length, group_size)
        parameters = [Buffer(0, b"") if one is None else self._of(one) for one in (weight, bias)]
        statistics = [Buffer(one.nbytes, bytes_of(one)) for one in (mean, factor)]
        buffers = [*self._coded(codes, meta, places), *statistics, *parameters, self._out(numel, out_dtype)]
        numbers = {"dtype": ops._CODE[dtype], "out_dtype": ops._CODE[out_dtype], "inner": width}
        return tensor(self.run("rebuild_by_row", buffers, **numbers, **fields)[0], out_dtype)

    def rebuild_activation(
        self,
        codes: Tensor,
        meta: Tensor,
        bits: int | Tensor,
        row_length: int,
        group_size: int,
        numel: int,
        dtype: torch.dtype,
        function: int,
    ) -> Tensor:
        places, fields, _ = cut(numel, bits, row_length, group_size)
        buffers = [*self._coded(codes, meta, places), self._out(numel, dtype)]
        out = self.run("rebuild_activation", buffers, dtype=ops._CODE[dtype], function=function, **fields)
        return tensor(out[0], dtype)

    def _changed(self, kernel: str, buffers: list[Buffer], values: Tensor, **fields) -> Tensor:
        buffers = [*buffers, self._of(values)._replace(changed=True)]
        return tensor(
            self.run(kernel, buffers, dtype=ops._CODE[values.dtype], numel=values.numel(), **fields)[0], values.dtype
        )

    def affine(
        self, values: Tensor, scale: Tensor, shift: Tensor, inner: int, mask: Tensor | None = None, off: float = 0.0
    ) -> Tensor:
        """In place; with a mask, whose bits stand for 1 and ``off``, out of place."""
        fields = {"channels": scale.numel(), "inner": inner, "hi": 1.0, "lo": off}
        buffers = [self._of(scale), self._of(shift)]
        if mask is None:
            return self._changed("affine", [*buffers, Buffer(0, b""), Buffer(0, b"")], values, **fields)
        bits = Buffer(mask.nbytes, bytes_of(mask), self.offset % 16)
        buffers += [bits, self._of(values), self._out(values.numel(), values.dtype)]
        found = self.run("affine", buffers, dtype=ops._CODE[values.dtype], numel=values.numel(), **fields)
        return tensor(found[0], values.dtype)

    def normalize(
        self, values: Tensor, mean: Tensor, factor: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        parameters = [Buffer(0, b"") if one is None else self._of(one) for one in (weight, bias)]
        statistics = [Buffer(one.nbytes, bytes_of(one)) for one in (mean, factor)]
        return self._changed("normalize", [*statistics, *parameters], values, inner=values.numel() // mean.numel())

    def scale_by_mask(self, values: Tensor, codes: Tensor, on: float, off: float = 0.0) -> Tensor:
        mask = Buffer(codes.nbytes, bytes_of(codes), self.offset % 16)
        return self._changed("scale_by_mask", [mask], values, hi=on, lo=off)

    def rounding_variance(self, x: Tensor, meta: Tensor, row_length: int, group_size: int) -> Tensor:
        fields = {"numel": x.numel(), "row_length": row_length, "group_size": group_size, "bits": 1}
        buffers = [Buffer(0, b""), self._of(x), Buffer(meta.nbytes, bytes_of(meta)), Buffer(8 * len(meta))]
        return tensor(self.run("rounding_variance", buffers, dtype=ops._CODE[x.dtype], **fields)[0], torch.float64)

    def sample_spread(self, x: Tensor, samples: int, row_length: int, group_size: int) -> Tensor:
        at = reference.layout(x.numel(), row_length, 1, group_size)
        out = self.run(
            "spread",
            [Buffer(0, b""), self._of(x), Buffer(4 * at.n_groups), Buffer(8 * samples)],
            dtype=ops._CODE[x.dtype],
            numel=x.numel(),
            row_length=row_length,
            group_size=group_size,
            bits=1,
            samples=samples,
        )
        return tensor(out[1], torch.float64)

    def pack_mask(self, x: Tensor, predicate: str, lo: float, hi: float) -> Tensor:
        codes = Buffer(reference.uint_nbytes(x.numel(), 1), None, self.offset % 16)
        fields = {"dtype": ops._CODE[x.dtype], "numel": x.numel(), "lo": lo, "hi": hi}
        number = reference.PREDICATES.index(predicate)
        return tensor(self.run("pack_mask", [self._of(x), codes], predicate=number, **fields)[0], torch.uint8)

    def unpack_mask(self, codes: Tensor, numel: int, on: float, off: float, dtype: torch.dtype) -> Tensor:
        buffers = [Buffer(codes.nbytes, bytes_of(codes), self.offset % 16), self._out(numel, dtype)]
        out = self.run("unpack_mask", buffers, dtype=ops._CODE[dtype], numel=numel, lo=off, hi=on)
        return tensor(out[0], dtype)

    def select_by_mask(self, x: Tensor, codes: Tensor) -> Tensor:
        buffers = [self._of(x), Buffer(codes.nbytes, bytes_of(codes), self.offset % 16), self._out(x.numel(), x.dtype)]
        out = self.run("select_by_mask", buffers, dtype=ops._CODE[x.dtype], numel=x.numel())
        return tensor(out[0], x.dtype)

    def pack_uint(self, values: Tensor, bits: int) -> Tensor:
        codes = Buffer(reference.uint_nbytes(values.numel(), bits), None, self.offset % 16)
        return tensor(self.run("pack_uint", [self._of(values), codes], numel=values.numel(), bits=bits)[0], torch.uint8)

    def unpack_uint(self, codes: Tensor, bits: int, numel: int, dtype: torch.dtype) -> Tensor:
        buffers = [Buffer(codes.nbytes, bytes_of(codes), self.offset % 16), self._out(numel, dtype)]
        return tensor(self.run("unpack_uint", buffers, dtype=ops._CODE[dtype], numel=numel, bits=bits)[0], dtype)


def cut(numel: int, bits: int | Tensor, row_length: int, group_size: int) -> tuple[Buffer, dict[str, int], int]:
    """The places of mixed widths, what a job says of the cut, and the bytes of all codes."""
    fields = {"numel": numel, "row_length": row_length, "group_size": group_size, "bits": 0, "samples": 0}
    if isinstance(bits, int):
        fields["bits"] = bits
        return Buffer(0, b""), fields, reference.layout(numel, row_length, bits, group_size).nbytes
    sizes = reference.sample_nbytes(numel // bits.numel(), row_length, group_size)
    size = torch.tensor(sizes)[bits.long()]
    fields["samples"] = bits.numel()
    places = ((size.cumsum(0) - size) << 4) + bits.long()
    return Buffer(places.nbytes, bytes_of(places)), fields, int(size.sum())
