"""Finding the compiled kernels: missing, broken, forced. Each in a process of its own, since loading happens once."""

import os
import subprocess
import sys

import pytest

from hf_actnn.codec import native

kernels = pytest.importorskip("hf_actnn._native_cpu")

PACK = "import torch; from hf_actnn.codec import quantize, native; p = quantize(torch.ones(500), 2); "


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("variant", kernels.supported())
def test_forced_variant(variant):
    done = run(PACK + "print(native.status()['variant'])", HF_ACTNN_CPU_VARIANT=variant)
    assert done.stdout.strip() == variant, done.stderr


def test_unknown_variant_is_an_error():
    done = run(PACK, HF_ACTNN_CPU_VARIANT="sse9")
    assert "NativeError" in done.stderr
    assert 'HF_ACTNN_CPU_VARIANT is "sse9"' in done.stderr
    assert "expected avx512, avx2 or portable" in done.stderr
    done = run("from hf_actnn.codec import native; print(native.status())", HF_ACTNN_CPU_VARIANT="sse9")
    assert "sse9" in done.stdout


def test_missing_module_warns_once_and_works():
    hide = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'hf_actnn._native_cpu' else find(n, *a); "
    )
    done = run(
        hide + "from hf_actnn.codec import native; native.status(); " + PACK + "p = quantize(torch.ones(9), 2); "
        "print(p.dequantize()[0].item(), native.status()['reason'])"
    )
    assert done.stdout.strip() == "1.0 hf_actnn._native_cpu is not built"
    assert done.stderr.count("ActNNWarning") == 1
    assert "10 to 100 times slower" in done.stderr
    assert "HF_ACTNN_BUILD=cpu" in done.stderr


def test_broken_module_is_an_error():
    broken = (
        "import importlib as i; load = i.import_module\n"
        "def fail(n, *a):\n"
        "    if n == 'hf_actnn._native_cpu': raise ImportError('undefined symbol: xyz')\n"
        "    return load(n, *a)\n"
        "i.import_module = fail\n"
    )
    done = run(broken + PACK)
    assert "NativeError" in done.stderr
    assert "ImportError: undefined symbol: xyz" in done.stderr
    assert "delete the file" in done.stderr


def test_import_is_lazy():
    done = run("import sys, hf_actnn.codec; print('hf_actnn._native_cpu' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_status():
    status = native.status()
    assert status["available"]
    assert status["variant"] in ("avx512", "avx2", "portable")
    assert status["reason"] is None


def test_no_second_openmp():
    """Two OpenMP runtimes in a process mean two pools of spinning threads."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = PACK + "quantize(torch.ones(300000), 2); print(open('/proc/self/maps').read())"
    maps = run(code).stdout.split()
    runtimes = {
        os.path.realpath(p) for p in maps if any(n in os.path.basename(p) for n in ("libgomp", "libomp", "libiomp"))
    }
    assert len(runtimes) <= 1
