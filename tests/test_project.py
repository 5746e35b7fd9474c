"""The project's own files agree with each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_pages_of_results_show_what_was_measured():
    done = subprocess.run([sys.executable, "tools/results.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_beats_a_level_in_memory_and_time_is_said():
    import results  # in tools/, on the path by pyproject.toml

    points = {"plain": (10, 1.0), "checkpoint": (3, 1.05), "L2": (4, 1.1), "L3": (2, 1.2)}
    others = ("plain", "checkpoint", "not measured")
    assert results.over(points, others, "a model") == ["checkpoint on a model, against L2"]
    assert results.over({**points, "checkpoint": (1, 1.0)}, others, "it") == ["checkpoint on it"]
    assert results.over({**points, "checkpoint": (3, 1.15)}, others, "it") == []


def scored(task: str, **schemes: list[float]) -> dict[str, dict]:
    """Runs of a task, a score for each seed of a scheme."""
    return {
        f"{task}/{scheme.replace('_', '-')}/{seed}": {"score": score, "losses": [1.0, 1.0], "machine": {}}
        for scheme, scores in schemes.items()
        for seed, score in enumerate(scores)
    }


def test_verdicts_are_for_us_and_against_us():
    import results

    runs = scored("cifar10-vit", uncompressed=[0.7, 0.72], auto=[0.7, 0.721], L3=[0.6, 0.62], original_2=[0.5, 0.52])
    lines = results.verdicts(runs)
    assert [line for line in lines if "auto" in line and "| +0.1" in line and "| yes" in line]
    assert [line for line in lines if "L3 no worse" in line and "| -10.0 (-10.0 to -10.0) | **no** |" in line]
    assert [line for line in lines if "above" in line and "| +10.0 (+10.0 to +10.0) | yes |" in line]
    runs |= scored("cifar10-vit", original_2=[0.59, 0.64])
    [line] = [line for line in results.verdicts(runs) if "above" in line]
    assert "**no**" in line and "-0.5" in line
    runs |= scored("cifar10-vit", original_2=[0.55, 0.64])
    [line] = [line for line in results.verdicts(runs) if "above" in line]
    assert "within the noise" in line
    assert results.verdicts({}) == []


def test_noise_beside_the_original_s():
    import results

    def noisy(value, error=0.01):
        return {key: {"value": value, "standard_error": error} for key in ("of_sum", "as_adam", "mean_share")}

    ways = {f"L3, {bits:g} bits": noisy(0.5) for bits in (2, 1.5)}
    steps = {
        str(at): {
            **ways,
            "original, 2 bits on average": noisy(1.0 * at),
            "original, 1.5 bits on average": noisy(at, 1.5),
        }
        for at in (2, 4)
    }
    machine = {"cpu": "a processor", "cpus": 2, "torch": "2.13", "date": "2026-01-01"}
    found = {"tasks": {"it": steps}, "batch": {"it": 8}, "batches": 16, "environment": machine}
    text = "\n".join(results.beside_the_original(found))
    assert "At 2 bits on average the original scheme adds 4 to 8 times what L3 does of the sum, 4 to 8 times as" in text
    # Of the two steps at 1.5 bits the first is within its errors.
    assert "adds 8 times, at 1 of 2 steps an unknown number of times, what L3 does" in text
    assert "| 4 | L3, 2 bits | 0.5 ± 0.01 | 0.5 ± 0.01 | 0.5 ± 0.01 |" in text
    assert results.beside_the_original(None) == []


def test_figures_of_another_rounding_say_so():
    import readme
    import results

    new, old = {"roundings": "mirrored"}, {"date": "2026-01-01"}
    assert results.rounded_alone([new, new]) == []
    assert results.rounded_alone([old, old])[0].startswith("The figures are of an hf_actnn that rounded each value")
    assert results.rounded_alone([old, new, new], "runs")[0].startswith("1 of the 3 runs are")
    assert readme.rounded_alone([new]) == ""
    assert readme.rounded_alone([old]).startswith(" These figures of hf_actnn are of values rounded each")
    assert readme.rounded_alone([old, new]).startswith(" 1 of its 2 figures are of")


#: Of three models on a GPU: one that was measured, and two that were stopped before they had times.
ON_A_GPU = {
    "vit_patch16_224": {
        "methods": {
            "plain": {"allocated": 100, "reserved": 120},
            "L3": {"allocated": 20, "reserved": 40},
            "checkpoint": {"allocated": 50, "reserved": 60},
        },
        "ratios": {"L3 / plain": 1.2, "checkpoint / plain": 1.3, "L3 / checkpoint": 0.92, "L4 / plain": 1.5},
    },
    "stopped": {"methods": {"plain": {"allocated": 100, "reserved": 120}}},
    "without times": {"methods": {"plain": {"allocated": 1, "reserved": 1}}, "ratios": {}},
}


def test_times_on_a_gpu_are_of_what_ran():
    import results

    found = {model: results.gpu_times(row) for model, row in ON_A_GPU.items()}
    assert found == {
        "vit_patch16_224": {"plain": 1.0, "L3": 1.2, "checkpoint": 1.3},
        "stopped": {},
        "without times": {},
    }


def test_the_limits_have_times_and_peaks_of_every_file_of_a_gpu(monkeypatch):
    import readme
    import results

    monkeypatch.setattr(results, "GPU", ("one", "two"))
    two = {"vit_patch16_224": {**ON_A_GPU["vit_patch16_224"], "ratios": {"L3 / plain": 1.7}}}
    times, peaks = readme._on_a_gpu({"one": {"models": ON_A_GPU}, "two": {"models": two}})
    assert times == {"vit, L3, one.json": 1.2, "vit, L3, two.json": 1.7}
    assert peaks["vit, L3, one.json, allocated"] == 5 and peaks["vit, L3, one.json, reserved"] == 3 and len(peaks) == 4


def test_the_readme_says_what_further_seeds_give():
    """The row has the seeds that every way has."""
    import readme

    row = scored(
        "cifar10-vit", uncompressed=[0.7, 0.7, 0.7], auto=[0.7, 0.7, 0.7], L3=[0.7, 0.7, 0.7], original_2=[0.6] * 3
    )
    assert not any("Over all of their runs" in line for line in readme.scores({"runs": row}))
    more = row | scored("cifar10-vit", uncompressed=[0.7] * 5, L3=[0.7, 0.7, 0.7, 0.6, 0.6])
    lines = readme.scores({"runs": more})
    assert any("| 3 |" in line and "70.0" in line for line in lines)
    assert any("L3 on small ViT -4.0 points from uncompressed (5 seeds, 5 runs)" in line for line in lines)


def test_the_page_shows_the_largest_batches():
    import results

    def row(method, largest, kept=None):
        tries = [{"size": size, "status": "ok", "peak": 1e9 + 1e7 * size} for size in (10, 50)]
        tries = [{**one, "kept": 1e7 * one["size"]} for one in tries] if kept else tries
        shared = {"model": "a_model", "limit": "2GB", "precision": "fp32", "device_name": "it", "vary": "batch"}
        shared |= {"device": "cpu", "steps": 2, "tolerance": 0.04, "first": 8, "cap": 80 if method == "L3" else 100}
        return {**shared, "method": method, "largest": largest, "tries": tries, "error": None, "capped": False}

    machine = {"cpu": "a processor", "cpus": 2, "torch": "2.13", "date": "2026-01-01"}
    rows = [row("plain", 10), row("L3", 45, kept=True), row("free", 100), {**row("L2", None), "error": "what it was"}]
    text = "\n".join(results.largest({"environment": machine, "rows": rows}))
    assert "| it | fp32 | a_model | 2GB | L3 | 45 | 4.5x | 50 (5.0x) | 0.90 |" in text
    assert "| it | fp32 | a_model | 2GB | saved tensors cost nothing | 100 | 10.0x |  |  |" in text
    assert "L2" not in text
    assert "--methods plain free --device cpu --limit 2GB --steps 2 --tolerance 0.04 --first 8 --cap 100`" in text
    assert "--methods L3 --device cpu --limit 2GB --steps 2 --tolerance 0.04 --first 8 --cap 80`" in text


def test_the_readme_shows_scores_of_tasks_whose_seeds_are_all_there():
    import readme  # in tools/, as above

    results = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())
    task, name = next(iter(readme.TASKS.items()))
    assert any(name in line for line in readme.scores(results))
    results["runs"] = {key: one for key, one in results["runs"].items() if not key.startswith(f"{task}/auto/2")}
    lines = readme.scores(results)
    assert not any(name in line for line in lines) and len(lines) > 3


def test_the_readme_shows_what_was_measured():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run tools/readme.py"


def test_one_version_everywhere():
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "hf_actnn" / "__init__.py").read_text(), re.MULTILINE).group(
        1
    )
    assert (
        'attr = "hf_actnn.__version__"' in (ROOT / "pyproject.toml").read_text()
    )  # the package's own is read from there
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_everything_the_tools_need_is_pinned():
    """`make` must not pick up a new version of what decides a test's outcome by itself."""
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    done = subprocess.run(
        [sys.executable, "tools/requirements.py", "dev", "docs"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    needed = {re.split(r"[\[<>=]", line)[0].lower() for line in done.stdout.split()}
    assert needed <= pinned, needed - pinned


def test_the_oldest_versions_are_those_of_the_table():
    command = [sys.executable, "tools/requirements.py", "--lowest", "timm", "hf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    oldest = dict(line.split("==") for line in done.stdout.split() if "==" in line)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert set(oldest) == {"timm", "transformers", "accelerate"}
    text = (ROOT / "docs" / "versions.md").read_text()
    for name, version in oldest.items():
        assert re.search(rf"^\| {name} \| {re.escape(version)} \| {re.escape(pinned[name])} \|$", text, re.MULTILINE)
    assert re.search(rf"^\| torch \|.*{re.escape(pinned['torch'])}", text, re.MULTILINE)


def test_unknown_extra_is_refused():
    done = subprocess.run([sys.executable, "tools/requirements.py", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nope" in done.stderr


def test_torchvision_is_imported_beside_a_torch_without_cuda():
    """In a new process, and without importing torch at start-up."""
    pytest.importorskip("torchvision")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import torchvision_without_cuda as watch
watch.install()
watch.install()
assert sum(type(finder).__name__ == "_TorchvisionWatch" for finder in sys.meta_path) == 1
assert "torch" not in sys.modules
import torchvision, torch
assert hasattr(torch.ops.torchvision, "nms")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Stands in front of a command as timeout does, and notes for how long that would be let run.
TIMEOUT = """#!/bin/sh
echo "$1 $2" >> "$NOTES"
shift 2
LIMITED=yes exec "$@"
"""
# Finds a device, kernels and every module; does nothing.
PYTHON = """#!/bin/sh
[ -n "$LIMITED" ] || echo "outside any limit: $*" >> "$NOTES"
[ "$1" != - ] || echo 9.0
"""


def test_make_gpu_takes_nine_minutes_at_most(tmp_path):
    """However long each of its steps would like to take, those among them that only ask Python something."""
    for name, script in (("timeout", TIMEOUT), ("python", PYTHON)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"
    done = subprocess.run(
        [ROOT / "tools" / "gpu.sh", tmp_path / "python", tmp_path / "out"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "LIMITED": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs = {path.stem for path in (tmp_path / "out").glob("*.log")}
    assert logs == {"build", "test", "compiled", "sanitizer", "codec_gpu", "step_gpu"}
    limits = [re.fullmatch(r"--kill-after=(\d+) (\d+)", line) for line in notes.read_text().splitlines()]
    assert all(limits), notes.read_text()
    assert sum(int(seconds) for limit in limits for seconds in limit.groups()) <= 9 * 60
