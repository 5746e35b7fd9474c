"""Builds the compiled CPU kernels; everything else is in pyproject.toml.

HF_ACTNN_BUILD: auto (the default: compile, and install without kernels if that fails), cpu (fail if it fails), cuda,
    none.
MAX_JOBS: files compiled at a time, by default one per processor.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Contraction off: a fused multiply-add would round once where the codec's definition rounds twice.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-g0",
]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-psabi"]  # what gcc 12 says of its own AVX-512 header
VARIANT_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


class BuildKernels(build_ext):
    """Compiles each variant of the kernels with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            ext.extra_objects = list(pool.map(lambda source: self._compile(ext, source), ext.sources))
        ext.sources = []
        super().build_extension(ext)

    def _compile(self, ext: Extension, source: str) -> str:
        flags = FLAGS + VARIANT_FLAGS.get(os.path.basename(source), [])
        (built,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
        )
        return built

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if BUILD == "cpu":
                raise
            bar = "*" * 100
            print(
                f"{bar}\nThe compiled kernels could not be built: {error}\n"
                "Installing without them: hf_actnn will work, 10 to 100 times slower in packing activations.\n"
                f"HF_ACTNN_BUILD=cpu makes this an error.\n{bar}",
                file=sys.stderr,
            )


def extensions() -> list[Extension]:
    """What HF_ACTNN_BUILD asks for."""
    if BUILD == "none":
        return []
    if BUILD == "cuda":
        raise SystemExit(
            "HF_ACTNN_BUILD=cuda: CUDA kernels are not available yet. "
            "Use HF_ACTNN_BUILD=cpu; CUDA tensors run on plain torch."
        )
    if BUILD not in ("auto", "cpu"):
        raise SystemExit(f"HF_ACTNN_BUILD is {BUILD!r}; expected auto, cpu, cuda or none.")
    import pybind11

    sources = ["csrc/bindings.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/kernels_portable.cpp"]
    if X86:
        sources += ["csrc/cpu/kernels_avx2.cpp", "csrc/cpu/kernels_avx512.cpp"]
    return [
        Extension(
            "hf_actnn._native_cpu",
            sources,
            include_dirs=[pybind11.get_include()],
            define_macros=[("HF_ACTNN_X86", "1")] if X86 else [],
            depends=[*glob("csrc/**/*.h", recursive=True), "setup.py"],
            libraries=["pthread", "dl"] if sys.platform.startswith("linux") else [],
            language="c++",
        )
    ]


BUILD = os.environ.get("HF_ACTNN_BUILD") or "auto"
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
