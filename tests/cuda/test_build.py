"""What setup.py makes of CUDA kernels, on a machine that need not have a GPU."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.cuda import shim


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=shim.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cuda_without_a_compiler_is_an_error(tmp_path):
    done = setup("--version", HF_ACTNN_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "no nvcc in CUDA_HOME or on the PATH" in done.stderr
    assert setup("--version", HF_ACTNN_BUILD="auto", CUDA_HOME=str(tmp_path)).returncode == 0


def test_cuda_with_a_compiler_that_has_no_runtime_is_an_error(tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    done = setup("--version", HF_ACTNN_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "libcudart_static.a" in done.stderr
    done = setup("--version", HF_ACTNN_BUILD="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "HF_ACTNN_BUILD=cuda makes this an error" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_unknown_architectures_are_an_error():
    done = setup("--version", HF_ACTNN_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0 Hopper")
    assert done.returncode != 0
    assert "'Hopper'" in done.stderr


# Builds the CUDA module alone, as setup.py does, and has the assembler say what each kernel needs.
BUILD = """
import os, runpy, sys
from setuptools import Distribution
parts = runpy.run_path("setup.py", run_name="parts of setup.py")
command = parts["BuildKernels"](Distribution({"ext_modules": [parts["cuda_extension"](parts["find_nvcc"]())]}))
command.build_lib, command.build_temp = sys.argv[1], os.path.join(sys.argv[1], "temp")
command.ensure_finalized()
command.run()
"""
USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)
# Registers at which blocks of 256 threads still fill half of a multiprocessor.
HALF = 64


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The module's path, and what the compiler said."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    folder = tmp_path_factory.mktemp("module")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=shim.ROOT,
        env={
            **os.environ,
            "HF_ACTNN_BUILD": "cuda",
            "TORCH_CUDA_ARCH_LIST": "9.0",
            "NVCC_APPEND_FLAGS": "-Xptxas -v -Werror all-warnings",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (folder / "hf_actnn").glob("_native_cuda*.so")
    return path, done.stderr


def test_the_module_loads_without_a_driver(built):
    """And needs no library of a CUDA toolkit; what it cannot do it says when asked to."""
    path, _ = built
    linked = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in linked
    assert "libcuda" not in linked
    code = f"""
import importlib.util as u
spec = u.spec_from_file_location("hf_actnn._native_cuda", {str(path)!r})
module = u.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.architectures())
try:
    module.probe(0)
    print("a device")
except RuntimeError as error:
    print(error)
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    architectures, probed = loaded.stdout.splitlines()
    assert architectures == "9.0"
    assert probed == "a device" or "on CUDA device 0: " in probed


def test_kernels_need_no_stack_and_few_registers(built):
    usage = {name: [int(number) for number in numbers] for name, *numbers in USAGE.findall(built[1])}
    assert len(usage) > 30, built[1][-4000:]
    assert {name: numbers for name, numbers in usage.items() if any(numbers[:3])} == {}
    full_groups = {name: numbers[3] for name, numbers in usage.items() if re.search(r"quantize_even.*Lb0", name)}
    assert len(full_groups) == 6  # to codes and back, three dtypes
    assert max(full_groups.values()) <= HALF, full_groups
