"""nvcc compiles the kernels, and the hot ones keep everything in registers."""

import re
import shutil
import subprocess

import pytest

from tests.cuda import shim

# Registers at which blocks of 256 threads still fill half of a multiprocessor.
HALF = 64


@pytest.fixture(scope="module", params=shim.SOURCES)
def usage(request, tmp_path_factory):
    """What the assembler says of each kernel of a file: stack, spills and registers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    out = tmp_path_factory.mktemp("nvcc") / "object.o"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "--generate-code=arch=compute_90,code=sm_90"]
    source = shim.ROOT / "csrc" / "cuda" / request.param
    done = subprocess.run(
        [nvcc, *flags, "-Werror=all-warnings", "-c", str(source), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    found = {name: tuple(map(int, numbers)) for name, *numbers in pattern.findall(done.stderr)}
    assert found, done.stderr[-4000:]
    return found


def test_no_stack_and_no_spills(usage):
    assert {name: numbers[:3] for name, numbers in usage.items() if any(numbers[:3])} == {}


def test_enough_threads_fit(usage):
    full_groups = {name: numbers[3] for name, numbers in usage.items() if re.search(r"quantize_even.*Lb0", name)}
    assert all(registers <= HALF for registers in full_groups.values()), full_groups
