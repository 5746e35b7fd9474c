"""What setup.py makes of CUDA kernels, on a machine that need not have a GPU."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

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


# What the host does before a launch, of every kernel: on a machine without a device the launch is refused, and says so.
# A function of the device that it called would end the program instead.
HOST = """
import ctypes, importlib.util as u, sys
spec = u.spec_from_file_location("hf_actnn._native_cuda", sys.argv[1])
module = u.module_from_spec(spec)
spec.loader.exec_module(module)
memory = ctypes.create_string_buffer(1 << 16)
at = (ctypes.addressof(memory) + 255) // 256 * 256
ctypes.memset(at, 2, 256)
cut, one, mixed = (at, at, 2560, 256, 256), (2, 0, 0, 0), (0, at, 5, at)
calls = [
    (name, (at, code, *cut[2:], 2, 1, 2, 0, at, at, 0)) for name in ("quantize",) for code in range(4)
] + [
    ("quantize_mixed", (at, 0, *cut[2:], at, 5, at, 1, 2, 0, at, at, 0)),
    ("dequantize_mixed", (*cut, at, 5, at, 0, at)),
    ("activation_backward_mixed", (*cut, at, 5, at, 0, 0, at, at)),
    ("sample_spread", (at, 0, *cut[2:], 5, at, at)),
    *(("affine", (at, 0, 2560, 5, 4, at, at, mask, 1.0, -1.0, at)) for mask in (0, at)),
    ("normalize", (at, 2560, 256, at, at, at, 0)),
    ("scale_by_mask", (at, 2, at, 2560, 1.5, 0.0)),
    ("rounding_variance", (at, 0, at, *cut[2:], at)),
    ("pack_mask", (at, 0, 2560, 0, 0.0, 0.0, at)),
    ("unpack_mask", (at, 2560, 0, 1.0, 0.0, at)),
    ("select_by_mask", (at, 0, at, 2560, at)),
    ("pack_uint", (at, 2560, 2, at)),
    ("unpack_uint", (at, 2, 2560, 5, at)),
]
for code in range(4):
    calls += [("dequantize", (*cut, 2, code, at))]
    calls += [("activation_backward", (*cut, 2, code, number, at, at)) for number in range(3)]
for code in range(3):
    for bits in (one, mixed):
        calls += [
            ("rebuild_by_channel", (*cut, *bits, code, at, at, 5, 4, mask, 1.5, signs, at))
            for mask in (0, at)
            for signs in (False, True)
        ]
        calls += [("rebuild_by_row", (*cut, *bits, code, code, at, at, at, at, 256, at))]
        calls += [("rebuild_by_row", (*cut, *bits, 0, code, at, at, 0, at, 256, at))]
        calls += [("rebuild_activation", (*cut, *bits, code, number, at)) for number in range(3)]
missing = {name for name in dir(module) if not name.startswith("_")} - {name for name, _ in calls}
assert missing == {"architectures", "probe"}, missing
for name, arguments in calls:
    try:
        getattr(module, name)(*arguments, 0, 0)
    except RuntimeError as error:
        assert "on CUDA device 0: " in str(error), (name, error)
    else:
        raise SystemExit(f"{name} found a device")
print("all refused")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here, and these addresses are not its own")
def test_what_the_host_does_before_a_launch(built):
    done = subprocess.run([sys.executable, "-c", HOST, str(built[0])], capture_output=True, text=True, check=False)
    assert done.stdout == "all refused\n", (done.returncode, done.stdout, done.stderr)


def test_kernels_need_no_stack_and_few_registers(built):
    usage = {name: [int(number) for number in numbers] for name, *numbers in USAGE.findall(built[1])}
    assert len(usage) > 30, built[1][-4000:]
    assert {name: numbers for name, numbers in usage.items() if any(numbers[:3])} == {}
    full = re.compile(r"dequantize_even.*Lb0|[0-9]quantize_even.*Lb0ELb")
    full_groups = {name: numbers[3] for name, numbers in usage.items() if full.search(name)}
    # To codes, of images and of tokens, and back; on to the gradients of three activations, to these themselves, by
    # channel and by row; three dtypes, and two more of rows that are stored in another one.
    assert len(full_groups) == 3 * (3 + 3 + 3 + 2) + 2
    assert max(full_groups.values()) <= HALF, full_groups
    backward = [name for name in usage if re.search(r"dequantize_(even|any).*Derived|choose_kernel.*Kept", name)]
    assert len(backward) == 3 * (2 * 3 + 4) + 4  # functions, kinds of groups and dtypes; widths of a masked element
