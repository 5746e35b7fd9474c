"""What is released: a source distribution from which a wheel can be built, and a wheel that works where it is alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: A model is trained one step, and what was asked for has to be there.
SMOKE = """
import importlib.metadata, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, hf_actnn
from hf_actnn.codec import native
assert Path(hf_actnn.__file__).is_relative_to(sys.argv[1]), hf_actnn.__file__
assert importlib.metadata.version("hf-actnn") == hf_actnn.__version__
assert native.module() is not None
assert not {"timm", "transformers", "accelerate"} & set(sys.modules)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
hf_actnn.convert(model, "L2")
with hf_actnn.track_memory(model) as memory:
    loss = model(torch.randn(256, 64)).sum()
loss.backward()
assert memory.ratio > 4, memory.ratio
print("works")
"""


def build(kind: str, source: Path, out: Path) -> Path:
    """With the tools that are installed: an isolated build would fetch them."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    environment = {**os.environ, "HF_ACTNN_BUILD": "cpu", "MAX_JOBS": "2"}
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.split()[-1]


@pytest.mark.slow
def test_a_release_installs_and_works(tmp_path):
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "tests", "results", "out", "site")
    shutil.copytree(ROOT, source, ignore=left_out)
    archive = build("sdist", source, tmp_path / "out")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(tmp_path / "unpacked", filter="data")
    assert {"csrc/codec.h", "csrc/cuda/quantize.cu", "csrc/cpu/masks.h", "hf_actnn/py.typed", "LICENSE"} <= names
    wheel = build("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path / "out")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    templates = {
        f"hf_actnn/pages/{name}" for name in ("frame.html", "profile.html", "record.html", "style.css", "common.js")
    }
    assert {"hf_actnn/py.typed", "hf_actnn_startup.py", "hf_actnn.pth"} | templates <= names
    assert any(re.match(r"hf_actnn/_native_cpu.*\.so", name) for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)
    where = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(where), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    # -I: neither this folder nor the variables of these tests are to be had.
    done = subprocess.run([sys.executable, "-I", "-c", SMOKE, str(where)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "works" in done.stdout, done.stderr[-2000:]
