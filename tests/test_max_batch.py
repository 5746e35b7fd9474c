"""The benchmark of largest batches: its search, its limit, what it takes for want of memory, what it remembers."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_actnn
from hf_actnn.commands.sizes import parse
from hf_actnn.commands.watch import watched

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("timm")
import limits
import max_batch
import memory

if not Path("/proc/self/statm").exists():
    pytest.skip("reads resident sets from /proc", allow_module_level=True)

CAP = 2**16


def largest(peak: Callable[[int], float], limit: float, cap: int = CAP, **options: float) -> tuple[int, int, list[int]]:
    """What the search finds, the largest size that fits, and the sizes tried."""
    tried = []

    def attempt(size: int) -> float | None:
        assert 1 <= size <= cap and size not in tried
        tried.append(size)
        return peak(size) if peak(size) <= limit else None

    found = limits.search(attempt, limit, 4, cap, **options)
    return found, max((size for size in range(1, cap + 1) if peak(size) <= limit), default=0), tried


@pytest.mark.parametrize(
    ("peak", "limit"),
    [
        pytest.param(lambda size: 85e6 * size, 16e9, id="linear"),
        pytest.param(lambda size: 7e8 + 20e6 * size, 80e9, id="with an offset"),
        pytest.param(lambda size: 7e8 + 3e8 * size, 2e9, id="few fit"),
        pytest.param(lambda size: 7e8 + 3e8 * size, 1.1e9, id="one fits"),
        pytest.param(lambda size: max(7e8, 4e7 * size), 16e9, id="flat at first"),
        pytest.param(lambda size: 5e8 + 20e6 * size + 1e6 * size**1.3, 16e9, id="curved"),
    ],
)
def test_search_finds_the_largest(peak, limit):
    found, true, tried = largest(peak, limit)
    assert 0.98 * true - 1 < found <= true
    assert len(tried) <= 9


def test_search_by_a_power():
    found, true, tried = largest(lambda side: 5e8 + 1e6 * side**2, 16e9, power=2)
    assert 0.98 * true - 1 < found <= true
    assert len(tried) <= 5


def test_search_with_noise():
    """Memory that scatters by 1 %: no size is the largest then, but what is found is near it."""
    for seed in range(30):
        chance = random.Random(seed)
        offset, slope, limit = 10 ** chance.uniform(8, 9), 10 ** chance.uniform(7, 8.5), 10 ** chance.uniform(9.5, 10.9)
        noise = [chance.uniform(0.99, 1.01) for _ in range(20000)]
        found, _, tried = largest(lambda s, o=offset, k=slope, n=noise: (o + k * s) * n[s % 20000], limit, cap=20000)
        true = (limit - offset) / slope
        assert abs(found - true) < max(2, 0.04 * true + 0.02 * offset / slope), (seed, found, true)
        assert len(tried) <= 9, (seed, tried)


def test_nothing_fits():
    assert largest(lambda size: 2e9, 1e9) == (0, 0, [4, 2, 1])


def test_everything_fits_up_to_the_cap():
    found, true, tried = largest(lambda size: 1e3 * size, 1e9, cap=500)
    assert 490 <= found <= true == 500
    assert len(tried) <= 5


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("1.5GiB", 3 * 2**29), ("500 MB", 5 * 10**8)])
def test_limits_are_read(text, size):
    assert parse(text) == size


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "16gb"])
def test_other_limits_are_refused(text):
    with pytest.raises(ValueError, match="Expected something like 16GB"):
        parse(text)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_above_the_limit_is_ended():
    """Well before it is through, and before it has all that it wants."""
    grow = """
import time
held = []
for _ in range(100):
    held.append(b"x" * 10_000_000)
    time.sleep(0.02)
time.sleep(60)
"""
    assert watched(python(grow), 200_000_000, seconds=30) == {"status": "out of memory"}


def test_a_peak_between_two_looks_counts():
    said = {"status": "ok", "peak": 10**9, "seconds": 1.0}
    found = watched(python(f"print('''{json.dumps(said)}''')"), 5 * 10**8)
    assert found == {**said, "status": "out of memory"}
    assert watched(python(f"print('''{json.dumps(said)}''')"), 2 * 10**9) == said


def test_errors_are_not_for_want_of_memory():
    found = watched(python("raise ValueError('what went wrong')"), 10**9)
    assert found["status"] == "error" and "what went wrong" in found["error"]
    found = watched(python("import time; time.sleep(60)"), 10**9, seconds=0.2)
    assert found == {"status": "error", "error": "no result after 0 s"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("no"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "error"),
        (ValueError("shapes"), "error"),
    ],
)
def test_what_a_try_says_of_an_error(error, status, monkeypatch, capsys):
    def fail(point, size):
        raise error

    monkeypatch.setattr(max_batch, "train", fail)
    max_batch.child({}, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == status
    assert ("error" in found) == (status == "error")


def run(monkeypatch, output: Path, *options: str) -> list[dict]:
    """The rows after a call with these options."""
    monkeypatch.setattr(sys, "argv", ["max_batch.py", "--device", "cpu", "--output", str(output), *options])
    max_batch.main()
    return json.loads(output.with_suffix(".json").read_text())["rows"]


def test_what_is_known_is_not_tried_again(tmp_path, monkeypatch, capsys):
    """Unless asked for, or unless it ended in an error, which is no size."""
    tried: list[str] = []
    broken = True

    def attempt(point, size):
        tried.append(point["method"])
        if point["method"] == "L2" and broken:
            return {"status": "error", "error": "what went wrong"}
        factor = {"plain": 1e8, "L2": 2.5e7, "free": 2e7}[point["method"]]
        peak = 5e8 + factor * size
        return {"status": "ok", "peak": peak, "seconds": 1.0} if peak <= 2e9 else {"status": "out of memory"}

    monkeypatch.setattr(max_batch, "attempt", attempt)
    options = ("--models", "resnet50", "--limit", "2GB", "--methods", "plain", "L2", "free", "L4")
    rows = run(monkeypatch, tmp_path / "rows", *options)
    assert "L4: left out: on a CPU there is nothing to move to" in capsys.readouterr().out
    assert [(row["method"], row["largest"], row["error"]) for row in rows] == [
        ("plain", 15, None),
        ("L2", None, "what went wrong"),
        ("free", 75, None),
    ]
    assert [found["size"] for found in rows[0]["tries"]][:2] == [8, 16]

    broken = False
    tried.clear()
    rows = run(monkeypatch, tmp_path / "rows", *options)
    assert set(tried) == {"L2"}
    assert {row["method"]: row["largest"] for row in rows} == {"plain": 15, "L2": 60, "free": 75}
    assert "60  4.00 / 5.00" in capsys.readouterr().out

    tried.clear()
    run(monkeypatch, tmp_path / "rows", *options)
    assert not tried
    rows = run(monkeypatch, tmp_path / "rows", *options, "--precision", "bf16")
    assert set(tried) == {"plain", "L2", "free"} and len(rows) == 6
    tried.clear()
    rows = run(monkeypatch, tmp_path / "rows", *options, "--again")
    assert set(tried) == {"plain", "L2", "free"} and len(rows) == 6


def test_the_ceiling_of_a_level_is_what_its_codes_alone_would_allow():
    """400 MB and 10 a sample that nothing can save, 6 a sample in codes and 1 MB of them whatever the batch."""

    def tries(slope, kept=None):
        found = [{"size": size, "status": "ok", "peak": 4e8 + slope * size} for size in (8, 40)]
        return [*({**one, "kept": kept(one["size"])} if kept else one for one in found), {"size": 999, "status": "out"}]

    shared = {"vary": "batch", "limit": "2GB"}
    free = {**shared, "largest": 40, "tries": tries(1e7)}
    row = {**shared, "largest": 40, "tries": tries(2e7, lambda size: 1e6 + 6e6 * size)}
    assert max_batch.ceiling(row, free) == pytest.approx(1.6e9 / (1e7 + 6e6 + 1e6 / 40))
    assert max_batch.ceiling(free, free) is None  # which keeps nothing
    assert max_batch.ceiling(row, None) is None
    assert max_batch.ceiling(row, {**free, "tries": tries(1e7)[:1]}) is None
    assert max_batch.ceiling({**row, "vary": "width"}, free) is None


@pytest.mark.parametrize(
    "options", [("--limit", "all"), ("--limit", "much"), ("--methods", "L9"), ("--methods", "checkpoint+x")]
)
def test_options_that_mean_nothing_are_refused(options, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "rows", *options)


@pytest.mark.parametrize(("vary", "size"), [("depth", 2), ("width", 32)])
def test_depth_and_width(vary, size):
    model = max_batch.build("resnet50", vary, size, 224)
    assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 4, 2 if vary == "depth" else 6, 3]
    assert model.layer1[0].conv1.out_channels == (32 if vary == "width" else 64)


def test_methods_train_as_they_say():
    """Kept bytes of each, and that the ceiling keeps nearly nothing."""
    images = torch.randn(4, 3, 96, 96)
    held = {}
    for name in ("plain", "checkpoint", "L2", "checkpoint+L2", "free"):
        model = max_batch.build("resnet26t", "batch", 4, 96)
        method = max_batch.apply(name, model, torch.device("cpu"))
        alive = memory.StoragesMade({p.untyped_storage()._cdata for p in model.parameters()})
        with alive, method.around():
            loss = method.forward(images).square().mean()
        held[name] = alive.alive()
        loss.backward()
        method.after()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert hf_actnn.is_converted(model) == name.endswith("L2")
    assert all(held[name] < 0.7 * held["plain"] for name in held if name != "plain"), held
    assert held["free"] < 0.2 * held["plain"], held
    assert held["checkpoint+L2"] < min(held["checkpoint"], held["L2"]), held


@torch._functorch.config.patch(activation_memory_budget=1.0)  # restores it; monkeypatch would delete it
def test_compiling_keeps_to_a_budget():
    images = torch.randn(4, 3, 96, 96)
    held = []
    for budget in ("1", "0.1"):
        torch.compiler.reset()  # another model of the same layers would be given what was compiled before
        method = max_batch.apply(
            f"compile:{budget}", max_batch.build("test_resnet", "batch", 4, 96), torch.device("cpu")
        )
        output = method.forward(images)
        held.append(sum(saved.nbytes for saved in output.grad_fn.saved_tensors if not saved.requires_grad))
        output.sum().backward()
    assert held[1] < 0.5 * held[0] > 0, held


@pytest.mark.slow
def test_more_fits_at_l2(tmp_path, monkeypatch):
    """In real processes: what is above the limit for plain training trains at L2."""
    options = ["--models", "test_resnet", "--image-size", "160", "--steps", "1", "--tolerance", "1"]
    (row,) = run(
        monkeypatch, tmp_path / "base", *options, "--methods", "plain", "--first", "1", "--cap", "1", "--limit", "8GB"
    )
    assert row["capped"] and row["largest"] == 1
    limit = f"{row['peak'] // 10**6 + 160}MB"
    options += ["--methods", "plain", "L2", "--first", "32", "--cap", "32", "--limit", limit]
    rows = {row["method"]: row for row in run(monkeypatch, tmp_path / "rows", *options)}
    assert not any(row["error"] for row in rows.values())
    assert rows["L2"]["largest"] > rows["plain"]["largest"] > 0
    kept = {found["size"]: found["kept"] for found in rows["L2"]["tries"] if found["status"] == "ok"}
    model = max_batch.build("test_resnet", "batch", 1, 160)
    with hf_actnn.track_memory(hf_actnn.convert(model, "L2")) as counted:
        loss = model(torch.randn(2, 3, 160, 160)).square().mean()
    size = max(kept)
    assert kept[size] == pytest.approx(counted.saved_bytes * size / 2, rel=0.05)
    del loss
    assert not any("kept" in found for found in rows["plain"]["tries"])
