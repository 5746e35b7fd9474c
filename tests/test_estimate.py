"""`hf-actnn estimate`: the line through small batches, the advice, what is printed, and one real answer."""

from __future__ import annotations

import bisect
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn import cli
from hf_actnn.commands import estimate, extrapolate, probe, sizes
from hf_actnn.commands.progress import Progress
from hf_actnn.commands.training import CHECKPOINT, PLAIN, way
from hf_actnn.errors import ActNNWarning, ConfigError

ROOT = Path(__file__).resolve().parents[1]
MB = 10**6

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident sets from /proc")


def simulated(passes: Callable[[int], float], update: float = 0.0, limit: float = math.inf, seconds: float = 1e-3):
    """A run that takes so much memory; and the batches that were run."""
    ran = []

    def attempt(size: int) -> dict[str, Any]:
        ran.append(size)
        peak = max(passes(size), update)
        if peak > limit:
            return {"status": "out of memory"}
        return {
            "status": "ok",
            "passes": passes(size),
            "update": update,
            "peak": peak,
            "seconds": seconds * size,
            "parameters": 100,
            "trained": 100,
        }

    return attempt, ran


def true_largest(peak: Callable[[int], float], limit: float) -> int:
    return bisect.bisect_right(range(1, 10**6), limit, key=peak)


PEAKS = {
    "a line": lambda size: 400 * MB + 3 * MB * size,
    "large samples": lambda size: 400 * MB + 119 * MB * size,
    "small samples": lambda size: 400 * MB + 0.08 * MB * size,
    "gradients set the peak of small batches": lambda size: max(900 * MB + 0.5 * MB * size, 500 * MB + 4 * MB * size),
    "small tensors are decoded as a whole": lambda size: 400 * MB + 2 * MB * size + min(60 * MB, 4 * MB * size),
    "a batch in up to eight parts": lambda size: 400 * MB + 2 * MB * size + 40 * MB * size / min(8, size),
}


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("limit", [1500 * MB, 24_000 * MB])
def test_the_answer_is_within_a_twentieth(name, limit):
    peak = PEAKS[name]
    attempt, ran = simulated(peak, limit=limit)
    line = extrapolate.largest(attempt, limit)
    true = true_largest(peak, limit)
    assert 0.95 * true - 1 <= line.largest <= 1.05 * true + 1
    assert len(ran) <= 9 and len(set(ran)) == len(ran)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [700 * MB, 8000 * MB])
def test_noise_of_some_megabytes_does_not_tilt_the_line(seed, limit):
    draw = random.Random(seed)
    slope = draw.uniform(0.2, 4) * MB
    attempt, ran = simulated(lambda size: 450 * MB + slope * size + draw.uniform(-2, 2) * MB, limit=limit)
    line = extrapolate.largest(attempt, limit)
    assert line.largest == pytest.approx((limit - 450 * MB) / slope, rel=0.08)
    assert len(ran) <= 9


def test_most_of_the_memory_is_not_run():
    """What would take long is extrapolated."""
    attempt, ran = simulated(PEAKS["a line"])
    line = extrapolate.largest(attempt, 24_000 * MB)
    assert line.largest == pytest.approx(23_600 / 3, rel=0.01) and line.straight
    assert max(ran) < line.largest / 50


def test_a_bend_at_small_batches_is_passed_before_anything_is_believed():
    peak = PEAKS["gradients set the peak of small batches"]
    attempt, ran = simulated(peak)
    line = extrapolate.largest(attempt, 24_000 * MB)
    assert max(ran) > 400 / 3.5  # where the other moment takes over
    assert line.per_sample == pytest.approx(4 * MB, rel=0.02) and line.fixed == pytest.approx(500 * MB, rel=0.05)


@pytest.mark.parametrize("limit", [560 * MB, 700 * MB, 900 * MB, 1300 * MB])
def test_few_that_fit_are_bracketed(limit):
    def peak(size: int) -> float:
        return 450 * MB + 100 * MB * size

    attempt, ran = simulated(peak, limit=limit)
    line = extrapolate.largest(attempt, limit)
    assert line.largest == true_largest(peak, limit)
    assert len(ran) <= 6


def test_batches_of_small_tensors_are_not_believed():
    """In the heap many small tensors may take more than a larger batch's large ones in pages of their own."""

    def peak(size: int) -> float:
        return (450 + 3 * size) * MB if size >= 38 else (450 + 12 * size) * MB

    attempt, ran = simulated(peak)
    line = extrapolate.largest(attempt, 1000 * MB, first=extrapolate.first_batch(28_000))
    assert min(ran) == 38 and line.largest == pytest.approx(550 / 3, rel=0.01)


def test_the_first_batch_makes_tensors_large():
    assert extrapolate.first_batch(2**20) == extrapolate.FIRST
    assert extrapolate.first_batch(2**15) == 32
    assert extrapolate.first_batch(0) == extrapolate.MOST_FIRST


def test_the_grain_is_what_most_of_the_saved_bytes_are_in():
    model = nn.Sequential(nn.Linear(8, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 4))
    assert probe.grain(model, torch.randn(2, 8), 2) == 4000
    assert probe.grain(model.requires_grad_(False), torch.randn(2, 8), 2) == 0


def test_nothing_fits():
    attempt, ran = simulated(lambda size: 2e9, limit=1e9)
    assert extrapolate.largest(attempt, 10**9).largest == 0
    assert ran == [8, 4, 2, 1]


def test_the_optimizers_step_may_set_the_peak():
    attempt, _ = simulated(PEAKS["a line"], update=2000 * MB)
    assert extrapolate.largest(attempt, 1500 * MB).largest == 0
    attempt, _ = simulated(PEAKS["a line"], update=1200 * MB)
    assert extrapolate.largest(attempt, 1500 * MB).largest == pytest.approx(1100 / 3, rel=0.01)


def test_what_a_small_machine_cannot_run_says_nothing_of_the_limit():
    there = 1000 * MB
    attempt, ran = simulated(PEAKS["large samples"], limit=there)
    line = extrapolate.largest(attempt, 24_000 * MB, there=there)
    assert line.largest == pytest.approx(23_600 / 119, rel=0.02)
    assert max(ran) <= 8
    attempt, _ = simulated(lambda size: 2e9, limit=there)
    with pytest.raises(extrapolate.Failed, match="too little"):
        extrapolate.largest(attempt, 24_000 * MB, there=there)


def answers(peaks: dict[str, tuple[float, float, float]], limit: int, trained: float = 1.0) -> dict[str, Any]:
    """An estimate of ways, each a fixed part and bytes per sample in MB, and milliseconds per sample."""

    def attempt(run: probe.Run, size: int) -> dict[str, Any]:
        if run.way not in peaks:
            return {"status": "refused", "error": "no such switch", "kind": "ConversionError"}
        fixed, slope, milliseconds = peaks[run.way]
        ran, _ = simulated(lambda n: (fixed + slope * n) * MB, limit=limit, seconds=milliseconds / 1e3)
        found = ran(size)
        return (
            found if found["status"] != "ok" else {**found, "parameters": 100 * MB, "trained": int(trained * 100 * MB)}
        )

    return estimate.estimate("any", limit, ways=["plain", "checkpoint", "L3", "auto"], attempt=attempt)


@pytest.fixture
def plenty(monkeypatch):
    monkeypatch.setattr(estimate, "available", lambda: None)


def test_advice_where_a_level_is_best(plenty):
    found = answers(
        {"plain": (400, 40, 10), "checkpoint": (400, 20, 13), "L3": (400, 8, 11), "auto": (400, 12, 11)}, 4000 * MB
    )
    assert found["recommendation"].startswith(
        "Train at L3: a batch of 450 instead of 90 (5.0 times), at 1.10 of the time"
    )
    assert "checkpoint: a batch of 180" in found["recommendation"] and "auto: a batch of 300" in found["recommendation"]
    rows = {row["way"]: row for row in found["ways"]}
    assert rows["L3"]["times_plain"] == pytest.approx(5) and rows["L3"]["time_factor"] == pytest.approx(1.1)


def test_advice_where_checkpointing_is_better(plenty):
    found = answers(
        {"plain": (400, 40, 10), "checkpoint": (400, 4, 13), "L3": (400, 8, 11), "auto": (400, 12, 11)}, 4000 * MB
    )
    assert found["recommendation"].startswith(
        "Gradient checkpointing is the better way here, checkpoint: a batch of 900"
    )


def test_of_batches_about_as_large_the_faster_is_advised(plenty):
    found = answers(
        {"plain": (400, 40, 10), "checkpoint": (400, 8, 13), "L3": (400, 8, 12), "auto": (400, 8.4, 11)}, 4000 * MB
    )
    assert found["recommendation"].startswith("Train at auto")


def test_advice_where_weights_take_the_memory(plenty):
    found = answers(
        {"plain": (3600, 4, 10), "checkpoint": (3600, 4, 13), "L3": (3600, 4, 11), "auto": (3600, 4, 11)}, 4000 * MB
    )
    assert found["recommendation"].startswith("Compression will not help much here")
    assert "90% of the memory" in found["recommendation"]


def test_advice_where_little_is_trained(plenty):
    found = answers(
        {"plain": (400, 3, 10), "checkpoint": (400, 3, 13), "L3": (400, 2.8, 11), "auto": (400, 2.9, 11)},
        4000 * MB,
        0.01,
    )
    assert "only 1.0% of the parameters are trained" in found["recommendation"]


def test_advice_where_nothing_fits(plenty):
    found = answers(
        {"plain": (5000, 3, 10), "checkpoint": (5000, 3, 13), "L3": (5000, 2, 11), "auto": (5000, 2, 11)}, 4000 * MB
    )
    assert found["recommendation"].startswith("Not one sample trains in 4,000 MB")


def test_a_way_that_the_model_does_not_have_is_said(plenty):
    found = answers({"plain": (400, 40, 10), "L3": (400, 8, 11), "auto": (400, 12, 11)}, 4000 * MB)
    rows = {row["way"]: row for row in found["ways"]}
    assert rows["checkpoint"]["status"] == "not possible"
    assert "checkpoint: no such switch" in estimate.table(found)
    assert "checkpoint" not in found["recommendation"]


def test_results_are_json_without_nan(plenty):
    found = answers({"plain": (5000, 3, 10)}, 4000 * MB)
    json.dumps(found, allow_nan=False)


def test_answers_are_not_verified_on_a_machine_that_is_too_small(monkeypatch):
    monkeypatch.setattr(estimate, "available", lambda: 2000 * MB)
    attempt, ran = simulated(lambda size: (400 + 40 * size) * MB, limit=1800 * MB)
    found = estimate.estimate("any", 4000 * MB, ways=["plain"], verify=True, attempt=lambda run, size: attempt(size))
    (row,) = found["ways"]
    assert row["largest"] == 90 and max(ran) < 40
    assert row["verified"]["answer"] == {"batch": 90, "status": "not tried"}


def test_answers_are_verified(plenty):
    attempt, _ = simulated(lambda size: (400 + 40 * size) * MB, limit=4000 * MB)
    found = estimate.estimate("any", 4000 * MB, ways=["plain"], verify=True, attempt=lambda run, size: attempt(size))
    assert found["ways"][0]["verified"] == {
        "answer": {"batch": 90, "status": "ok"},
        "larger": {"batch": 104, "status": "out of memory"},
    }
    assert "90 fits, 104 does not fit" in estimate.table(found)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5GiB", 3 * 2**29), ("500 MB", 5 * 10**8)])
def test_amounts_of_memory(text, size):
    assert sizes.parse(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "24 gigabytes", "-1GB"])
def test_other_words_are_refused(text, capsys):
    with pytest.raises(ConfigError, match="Expected something like 16GB"):
        sizes.parse(text)
    assert cli.main(["estimate", "test_vit", f"--memory={text}"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and repr(text) in said.err


def test_a_level_that_is_none_is_refused(capsys):
    assert cli.main(["estimate", "test_vit", "--memory", "1GB", "--levels", "L9"]) == 1
    assert "Expected some of plain, checkpoint, auto, L0" in capsys.readouterr().err


def test_without_tqdm_a_line_says_what_takes_long(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    now = iter([0.0, 1.0, 5.0])
    with Progress(3, clock=lambda: next(now)) as progress:
        progress.say("soon")
        progress.advance()
        progress.say("late")
    said = capsys.readouterr()
    assert said.err == "[2/3] late\n" and said.out == ""


# -- runs --------------------------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, torch.Tensor]:
    """Named in the runs below."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)), torch.randn(3, 256)


def frozen() -> tuple[nn.Module, torch.Tensor]:
    model, batch = small()
    return model.requires_grad_(False), batch


def spoken() -> tuple[nn.Module, torch.Tensor]:
    print("this is no result")
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 10)), torch.randn(3, 512, 256)


NAME = "tests.test_estimate:"
RUN = probe.Run(NAME + "small", None, PLAIN, "sgd", "fp32", "cpu", 10**10)


@pytest.fixture(scope="module", autouse=True)
def from_the_root():
    """Functions of this file are found by their name."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@needs_proc
def test_a_run_says_what_it_took():
    found = probe.child(RUN, 64)
    assert found["status"] == "ok" and found["seconds"] > 0
    assert found["peak"] == max(found["passes"], found["update"]) > 10**7
    assert found["parameters"] == found["trained"] == 4 * (257 * 512 + 513 * 10)


@needs_proc
def test_nothing_to_train_is_refused():
    found = probe.child(RUN._replace(model=NAME + "frozen"), 4)
    assert found["status"] == "refused" and "no parameter to train" in found["error"]


@needs_proc
def test_no_switch_for_checkpointing():
    found = probe.child(RUN._replace(way=CHECKPOINT), 4)
    assert found["status"] == "refused" and "no gradient checkpointing" in found["error"]


@needs_proc
def test_checkpointing_with_a_level(monkeypatch):
    """Both are on; a name that is neither is refused."""
    seen = []
    monkeypatch.setattr(probe.named, "checkpoint", lambda model: seen.append(type(model).__name__))
    monkeypatch.setattr(probe, "compress", lambda model, level, interval: lambda: seen.append(level))
    assert probe.child(RUN._replace(way="checkpoint+L2", steps=1), 4)["status"] == "ok"
    assert seen[1:] == ["L2"] and len(seen) == 2
    assert way("checkpoint+auto") == "checkpoint+auto"
    for wrong in ("checkpoint+plain", "checkpoint+", "checkpoint+checkpoint", "L2+checkpoint"):
        with pytest.raises(ConfigError, match="no such level"):
            way(wrong)


@needs_proc
@pytest.mark.parametrize(("way", "chosen"), [("L2", [False] * 3), ("L3", [True] * 2 + [False] * 2)])
def test_time_is_that_of_steps_that_choose_no_bits(monkeypatch, way, chosen):
    """Others take several times as long, and are one in some hundred."""
    seen: list[bool] = []
    now = [0.0]
    loss = probe.named.loss

    def slow(model, batch):
        found = loss(model, batch)
        seen.append(hf_actnn.controller(model)._tape is not None)
        now[0] += 10 if seen[-1] else 1
        return found

    monkeypatch.setattr(probe.named, "loss", slow)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    found = probe.child(RUN._replace(way=way), 4)
    assert found["status"] == "ok" and seen == chosen
    assert found["seconds"] == 1


@needs_proc
def test_a_run_too_large_is_out_of_memory():
    assert probe.child(RUN, 2**48)["status"] == "out of memory"


@needs_proc
def test_the_peak_begins_anew_with_each_phase():
    gauge = probe.Gauge(torch.device("cpu"))
    gauge.reset()
    before = gauge.peak()
    torch.ones(50 * 2**20)
    assert gauge.peak() - before > 150 * 2**20
    gauge.reset()
    if gauge.peak() - before > 100 * 2**20:
        pytest.skip("this system does not let a process reset its own peak")


@pytest.mark.slow
@needs_proc
def test_nothing_but_the_result_is_on_stdout(monkeypatch, capfd):
    """What the model prints in processes of its own, progress and warnings stay out of it."""

    def one_run(attempt, *arguments):
        found = attempt(4)
        assert found["status"] == "ok", found
        return extrapolate.Line(1e8, 1e6, 1e8, 10, True, {4: found | {"warnings": ["a warning"]}})

    monkeypatch.setattr(extrapolate, "largest", one_run)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.warns(ActNNWarning, match="a warning"):
        assert cli.main(["estimate", NAME + "spoken", "--memory", "1GB", "--levels", "plain", "--json"]) == 0
    said = capfd.readouterr()
    (plain,) = json.loads(said.out)["ways"]
    assert plain["way"] == "plain" and plain["largest"] == 10
    assert "this is no result" not in said.out + said.err and "a batch of" in said.err


@needs_proc
def test_an_unknown_model_is_an_error_not_a_traceback(capsys):
    pytest.importorskip("timm")
    assert cli.main(["estimate", "resnet5O", "--memory", "1GB", "--levels", "plain"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "Did you mean resnet50" in said.err and "Traceback" not in said.err


# -- the benchmark of predictions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0, 1, 5, 37, 400, 2999])
@pytest.mark.parametrize("share", [0.6, 0.95, 1.0, 1.05, 1.7])
def test_trying_around_a_guess_finds_the_largest(true, share):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    pytest.importorskip("timm")
    import estimate as benchmark

    found = benchmark.around(lambda size: size <= true, int(share * true))
    assert true - max(1, 0.05 * true) <= found <= true
