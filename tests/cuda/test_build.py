"""What setup.py makes of CUDA kernels, on a machine that need not have a GPU."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.cuda import shim

FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--dryrun*) echo "#$ TOP={toolkit}" >&2 ;;
  *--list-gpu-code*) echo sm_90 ;;
  *) echo "this compiler compiles nothing" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """What setup.py reads, without a compiled module, where nothing is spoiled."""
    folder = tmp_path / "project"
    (folder / "hf_actnn").mkdir(parents=True)
    (folder / "hf_actnn" / "__init__.py").write_text('__version__ = "0"\n')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(shim.ROOT / name, folder)
    (folder / "csrc").symlink_to(shim.ROOT / "csrc")
    return folder


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit whose compiler compiles nothing."""
    folder = tmp_path / "toolkit"
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC.format(toolkit=folder))
    nvcc.chmod(0o755)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    return folder


def build(project, **environment: str) -> subprocess.CompletedProcess:
    """In place, with a C++ compiler that fails, as no test needs what one makes."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=project,
        env={**os.environ, "CC": "false", "CXX": "false", "CUDA_PATH": "", "TORCH_CUDA_ARCH_LIST": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def parts(**environment: str) -> str:
    """The kernels that setup.py sets out to build, and its compiler for CUDA."""
    code = (
        "import runpy; parts = runpy.run_path('setup.py', run_name='parts of setup.py');"
        "print(*[ext.name.rpartition('_')[2] for ext in parts['extensions']()], parts['find_nvcc']())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=shim.ROOT,
        env={**os.environ, "CUDA_PATH": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_compiler_is_that_of_cuda_home_or_else_on_the_path(toolkit, tmp_path):
    nvcc, empty = str(toolkit / "bin" / "nvcc"), str(tmp_path)
    assert parts(HF_ACTNN_BUILD="auto", CUDA_HOME=str(toolkit), PATH=empty) == f"cuda cpu {nvcc}"
    assert parts(HF_ACTNN_BUILD="auto", CUDA_HOME=empty, PATH=str(toolkit / "bin")) == f"cuda cpu {nvcc}"
    assert parts(HF_ACTNN_BUILD="auto", CUDA_HOME="", PATH=str(toolkit / "bin")) == f"cuda cpu {nvcc}"
    assert parts(HF_ACTNN_BUILD="auto", CUDA_HOME=empty, PATH=empty) == "cpu None"
    assert parts(HF_ACTNN_BUILD="cuda", CUDA_HOME=empty, PATH=empty) == "cuda cpu None"
    assert parts(HF_ACTNN_BUILD="cpu", CUDA_HOME=str(toolkit)) == f"cpu {nvcc}"


def test_cuda_without_a_compiler_is_an_error(project, tmp_path):
    done = build(project, HF_ACTNN_BUILD="cuda", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert done.returncode != 0
    assert "no nvcc in CUDA_HOME or on the PATH" in done.stderr


@pytest.mark.parametrize("wanted", ["cuda", "auto"])
def test_cuda_with_a_compiler_that_has_no_runtime_is_an_error(project, toolkit, wanted):
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    done = build(project, HF_ACTNN_BUILD=wanted, CUDA_HOME=str(toolkit))
    assert "libcudart_static.a" in done.stderr
    assert (done.returncode == 0) == (wanted == "auto")
    assert ("HF_ACTNN_BUILD=cuda makes this an error" in done.stderr) == (wanted == "auto")


def test_unknown_architectures_are_an_error(project, toolkit):
    done = build(project, HF_ACTNN_BUILD="cuda", CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST="8.0 Hopper")
    assert done.returncode != 0
    assert "'Hopper'" in done.stderr


@pytest.mark.parametrize("wanted", ["cuda", "auto", "cpu"])
def test_a_failed_build_leaves_no_older_module(project, toolkit, wanted):
    """Of other sources it may be, and would be loaded."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folders = [project / "hf_actnn", project / "build" / platform / "hf_actnn"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("cpu", "cuda"):
            (folder / f"_native_{kind}{suffix}").touch()
    done = build(project, HF_ACTNN_BUILD=wanted, CUDA_HOME=str(toolkit))
    assert (done.returncode == 0) == (wanted == "auto")
    left = sorted({path.name.partition(".")[0] for path in project.rglob("*.so")})
    assert left == (["_native_cuda"] if wanted == "cpu" else [])  # which nobody asked to build


# Builds the CUDA module alone, as setup.py does, and has the assembler say what each kernel needs.
BUILD = """
import os, runpy, sys
from setuptools import Distribution
parts = runpy.run_path("setup.py", run_name="parts of setup.py")
command = parts["BuildKernels"](Distribution({"ext_modules": [parts["cuda_extension"]()]}))
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
    assert len(full_groups) == 15  # to codes; back, and on to the gradients of three activations; three dtypes
    assert max(full_groups.values()) <= HALF, full_groups
    backward = [name for name in usage if re.search(r"dequantize_(even|any).*Derived|choose_kernel.*Kept", name)]
    assert len(backward) == 3 * (2 * 3 + 4) + 4  # functions, kinds of groups and dtypes; widths of a masked element
