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
    done = run("import sys, hf_actnn.codec; print([n for n in sys.modules if n.startswith('hf_actnn._native')])")
    assert done.stdout.strip() == "[]", done.stderr


def test_missing_cuda_module_warns_once_with_the_cost():
    hide = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'hf_actnn._native_cuda' else find(n, *a); "
    )
    done = run(
        hide + "from hf_actnn.codec import native; native.cuda_status(); print(native.cuda(0), native.cuda(1)); "
        "print(native.cuda_status()['reason'])"
    )
    assert done.stdout.split("\n")[:2] == ["None None", "hf_actnn._native_cuda is not built"], done.stderr
    assert done.stderr.count("ActNNWarning") == 1
    assert "some 400 kernel launches" in done.stderr
    assert "HF_ACTNN_BUILD=cuda" in done.stderr


def test_the_cost_of_the_reference_is_what_the_warning_says():
    """Operations that launch a kernel on a device; views launch none."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from hf_actnn.codec import reference

    class Count(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.launches += not func.is_view
            return out

    with Count() as count:
        reference.quantize(torch.randn(1024), 2, 256, 256, 0, 0)
    assert 300 < count.launches < 500


def test_cuda_module_that_no_device_runs_is_an_error():
    """As on a machine without a driver: said when a tensor arrives, with the runtime's own words."""
    fake = (
        "import sys, types; m = types.ModuleType('hf_actnn._native_cuda'); "
        "m.__spec__ = __import__('importlib.machinery', fromlist=['x']).ModuleSpec(m.__name__, None)\n"
        "def probe(device): raise RuntimeError('loading the kernels on CUDA device 0: no kernel image')\n"
        "m.probe = probe; m.architectures = lambda: '8.0;9.0'; sys.modules[m.__name__] = m\n"
        "from hf_actnn.codec import native\n"
        "print(native.cuda_status()['architectures'])\n"
        "native.cuda(0)"
    )
    done = run(fake)
    assert done.stdout.strip() == "8.0;9.0"
    for words in ("NativeError", "cuda:0", "8.0;9.0", "no kernel image", "TORCH_CUDA_ARCH_LIST"):
        assert words in done.stderr


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
