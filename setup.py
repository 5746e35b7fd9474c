"""Builds the compiled kernels and ships a start-up line; everything else is in pyproject.toml.

HF_ACTNN_BUILD: auto (the default: the kernels for the CPU, and those for CUDA where nvcc is found; whatever cannot be
    built is left out, with a warning), cpu (only these, and fail if it fails), cuda (both, and fail if one fails),
    none.
TORCH_CUDA_ARCH_LIST: the architectures to build CUDA kernels for, as in "8.0;9.0+PTX"; by default those from 7.5 to
    12.0 that the compiler knows, and PTX of the newest of them.
CUDA_HOME: where the CUDA toolkit is; where nvcc on the PATH lies if it is not set, or has no nvcc.
MAX_JOBS: files compiled at a time, by default one per processor.

A module that was to be built and was not is not there afterwards: one of an earlier build may be of other sources.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

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
    # At -O3 gcc 12 takes four times as long, for code three times as large that quantises more slowly.
    "kernels_portable.cpp": ["-O2", "-funroll-loops"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
CUDA_MODULE = "hf_actnn._native_cuda"
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or else the one on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def find_runtime(nvcc: str) -> str:
    """The folder of the toolkit's static runtime library: nvcc, which may be a link or a script, says where it
    looks itself."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    folders = re.findall(r'"-L([^"]+)"', said)
    if top is not None:
        folders += [os.path.join(top[1], "lib64"), os.path.join(top[1], "lib")]
    for folder in folders:
        if os.path.exists(os.path.join(folder, "libcudart_static.a")):
            return os.path.realpath(folder)
    raise RuntimeError(f"no libcudart_static.a in {', '.join(folders) or 'any folder'} that {nvcc} names")


def known_architectures(nvcc: str) -> str:
    """Those of ARCHITECTURES that a compiler has, and PTX of the last."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    known = [name for name in ARCHITECTURES if "sm_" + name.replace(".", "") in listed]
    if not known:
        raise RuntimeError(f"{nvcc} compiles for none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(known) + "+PTX"


def architectures(wanted: str) -> list[tuple[str, str]]:
    """The pairs (compute_90, sm_90) of a list like "8.0;9.0+PTX", where PTX stands as (compute_90, compute_90)."""
    pairs = []
    for name in re.split(r"[;,\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {name!r}; expected versions like 8.0 or 9.0+PTX")
        number = match[1] + match[2] + match[3]
        pairs.append((f"compute_{number}", f"sm_{number}"))
        if match[4]:
            pairs.append((f"compute_{number}", f"compute_{number}"))
    return pairs


# Python runs such lines of site-packages when it starts. Without the variable it looks at the environment, and no more.
STARTUP = ("hf_actnn.pth", 'import os; os.environ.get("HF_ACTNN") and __import__("hf_actnn_startup").install()\n')


class BuildPackage(build_py):
    """Adds the start-up line to what goes into site-packages."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.mkpath(self.build_lib)
            Path(self.build_lib, STARTUP[0]).write_text(STARTUP[1])

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [os.path.join(self.build_lib, STARTUP[0])]
        return [*super().get_outputs(include_bytecode), *own]


class EditableWheel(editable_wheel):
    """Adds the line to the wheel of an editable install, which takes nothing from the build."""

    def run(self) -> None:
        from wheel.wheelfile import WheelFile

        super().run()
        for path in glob(os.path.join(self.dist_dir, "*.editable-*.whl")):
            plain = path + ".plain"
            os.rename(path, plain)
            with zipfile.ZipFile(plain) as before, WheelFile(path, "w") as wheel:  # which keeps the list of files
                for name in before.namelist():
                    if not name.endswith(".dist-info/RECORD"):
                        wheel.writestr(name, before.read(name))
                wheel.writestr(*STARTUP)
            os.remove(plain)


class BuildKernels(build_ext):
    """Compiles each source with its own flags, and CUDA's with nvcc."""

    def run(self) -> None:
        for ext in self.extensions:
            module = self.get_ext_filename(ext.name)
            for folder in (self.build_lib, *([os.curdir] if self.inplace else [])):
                Path(folder, module).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            if BUILD != "auto":
                raise SystemExit(f"HF_ACTNN_BUILD={BUILD}: {ext.name} could not be built: {error}") from error
            ext.optional = True  # so that nobody misses the file
            warn(ext.name, str(error))

    def _build(self, ext: Extension) -> None:
        if ext.name == CUDA_MODULE:
            use_toolkit(ext)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            ext.extra_objects = list(pool.map(lambda source: self._compile(ext, source), ext.sources))
        ext.sources = []
        super().build_extension(ext)

    def _compile(self, ext: Extension, source: str) -> str:
        if source.endswith(".cu"):
            return self._compile_cuda(ext, source)
        flags = FLAGS + VARIANT_FLAGS.get(os.path.basename(source), [])
        (built,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
        )
        return built

    def _compile_cuda(self, ext: Extension, source: str) -> str:
        built = os.path.join(self.build_temp, os.path.splitext(source)[0] + ".o")
        os.makedirs(os.path.dirname(built), exist_ok=True)
        targets = [f"--generate-code=arch={arch},code={code}" for arch, code in ext.cuda_targets]
        subprocess.run([ext.nvcc, *CUDA_FLAGS, *targets, "-c", source, "-o", built], check=True)
        return built


def warn(name: str, reason: str) -> None:
    """Say what is left out, and what that means."""
    kind = name.rpartition("_")[2]
    bar = "*" * 100
    print(
        f"{bar}\n{name} could not be built: {reason}\n"
        f"Installing without it: hf_actnn will work, many times slower in packing activations where it would serve.\n"
        f"HF_ACTNN_BUILD={kind} makes this an error.\n{bar}",
        file=sys.stderr,
    )


def cpu_extension() -> Extension:
    import pybind11

    sources = ["csrc/bindings.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/kernels_portable.cpp"]
    if X86:
        sources += ["csrc/cpu/kernels_avx2.cpp", "csrc/cpu/kernels_avx512.cpp"]
    return Extension(
        "hf_actnn._native_cpu",
        sources,
        include_dirs=[pybind11.get_include()],
        define_macros=[("HF_ACTNN_X86", "1")] if X86 else [],
        depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*.h"), "setup.py"],
        libraries=["pthread", "dl"] if sys.platform.startswith("linux") else [],
        language="c++",
    )


def cuda_extension() -> Extension:
    """What of a toolkit it needs, :func:`use_toolkit` adds when it is built."""
    import pybind11

    return Extension(
        CUDA_MODULE,
        ["csrc/cuda/bindings.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        include_dirs=[pybind11.get_include()],
        depends=[*glob("csrc/*.h"), *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh"), "setup.py"],
        # The runtime inside: torch may bring another version of it, and there may be no driver.
        libraries=["cudart_static", "pthread", "dl", "rt"],
        language="c++",
    )


def use_toolkit(ext: Extension) -> None:
    """Compiler, runtime and architectures."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            "no nvcc in CUDA_HOME or on the PATH. Install the CUDA toolkit, set CUDA_HOME, or use HF_ACTNN_BUILD=cpu: "
            "CUDA tensors then go through plain torch, slowly."
        )
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures(nvcc)
    ext.nvcc, ext.cuda_targets = nvcc, architectures(wanted)
    ext.define_macros = [("HF_ACTNN_ARCHITECTURES", f'"{wanted}"')]
    ext.library_dirs = [find_runtime(nvcc)]


def extensions() -> list[Extension]:
    """What HF_ACTNN_BUILD asks for. CUDA's comes first: a toolkit that is missing is told before all is compiled."""
    if BUILD == "none":
        return []
    if BUILD not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"HF_ACTNN_BUILD is {BUILD!r}; expected auto, cpu, cuda or none.")
    with_cuda = BUILD == "cuda" or (BUILD == "auto" and find_nvcc() is not None)
    return [*([cuda_extension()] if with_cuda else []), cpu_extension()]


BUILD = os.environ.get("HF_ACTNN_BUILD") or "auto"
if __name__ == "__main__":
    commands = {"build_ext": BuildKernels, "build_py": BuildPackage, "editable_wheel": EditableWheel}
    setup(ext_modules=extensions(), cmdclass=commands)
