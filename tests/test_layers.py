"""Imports go down only, and `import hf_actnn` costs what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_actnn"

# From the top down. A part may import the parts of lower layers; within a layer only itself, or what BESIDE allows.
LAYERS = [
    {"cli"},
    {"commands"},
    {"integrations"},
    {"record"},
    {"convert", "fidelity", "memory"},
    {"nn"},
    {"saving", "precision"},
    {"codec", "pages"},
    {"config", "errors"},
]
BESIDE = {("config", "errors"), ("cli", "__version__")}
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

# Installed only by extras; the package must be importable without them.
EXTRAS = ["transformers", "timm", "accelerate", "torchvision", "datasets", "matplotlib", "sklearn", "PIL", "pandas"]


def part_of(module: str) -> str:
    """`hf_actnn.codec.ops` -> `codec`."""
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> list[tuple[int, str]]:
    """Every module of the package that a file imports, anywhere in it, with the line."""
    package = ["hf_actnn", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "hf_actnn" else [module]
            found += [(node.lineno, name) for name in names]
    return [(line, name) for line, name in found if name == "hf_actnn" or name.startswith("hf_actnn.")]


def wrong_imports(path: Path) -> list[str]:
    """What a file imports from a layer above its own or from beside it."""
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return []  # the public names: may come from anywhere
    if own not in RANK:
        return [f"{relative}: {own} is in no layer; add it to LAYERS"]
    wrong = []
    for line, name in imported(path):
        other = part_of(name)
        if other == own or RANK.get(other, -1) > RANK[own] or (own, other) in BESIDE:
            continue
        wrong.append(f"{relative}:{line} imports {name}")
    return wrong


def test_imports_go_down_only():
    wrong = [line for path in sorted(PACKAGE.rglob("*.py")) for line in wrong_imports(path)]
    assert not wrong, "\n".join(wrong)


def test_the_rule_can_fail(tmp_path, monkeypatch):
    """An upward import, a relative one and an unknown part are each noticed."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "codec").mkdir()
    up = tmp_path / "codec" / "bad.py"
    up.write_text("def f():\n    from hf_actnn.convert import convert\n")
    relative = tmp_path / "codec" / "worse.py"
    relative.write_text("from ..saving import rules\n")
    unknown = tmp_path / "utils.py"
    unknown.write_text("")
    assert wrong_imports(up) == ["codec/bad.py:2 imports hf_actnn.convert"]
    assert wrong_imports(relative) == ["codec/worse.py:1 imports hf_actnn.saving"]
    assert "no layer" in wrong_imports(unknown)[0]


def test_only_integrations_import_the_host_libraries():
    hosts = {"transformers", "timm", "accelerate", "datasets"}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] == "integrations":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            wrong += [f"{path}:{node.lineno} imports {name}" for name in names if name.split(".")[0] in hosts]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def bare_import() -> subprocess.CompletedProcess:
    code = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # any import of it raises ImportError
import hf_actnn
print([name for name in sys.modules if name.startswith("hf_actnn") and "native_" in name.rsplit(".", 1)[-1]])
print([line.split()[-1] for line in open("/proc/self/maps") if "hf_actnn" in line and ".so" in line])
import torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
hf_actnn.convert(model, bits=8)
model(torch.randn(32, 64, requires_grad=True)).sum().backward()
print(model[0].weight.grad.abs().sum().item() > 0)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_package_needs_only_torch(bare_import):
    assert bare_import.returncode == 0, bare_import.stderr
    assert bare_import.stdout.splitlines()[-1] == "True"


def test_importing_loads_no_native_code(bare_import):
    assert bare_import.returncode == 0, bare_import.stderr
    assert bare_import.stdout.splitlines()[:2] == ["[]", "[]"]


def test_names_of_the_trainer_say_what_is_missing_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import hf_actnn; hf_actnn.ActNNCallback"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode != 0
    assert "transformers" in done.stderr
