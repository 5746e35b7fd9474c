"""The benchmark of a step on a GPU, up to the device: what is timed, what is noted of failures, what is printed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_actnn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("timm")
import max_batch
import step_gpu

ON_CPU = [name for name in step_gpu.METHODS if name not in step_gpu.ON_A_DEVICE]


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(4, 3, 96, 96)


def options(**others) -> argparse.Namespace:
    chosen = {"device": "cpu", "batch": 4, "image_size": 96, "rounds": 1, "methods": ON_CPU, "until": time.time() + 99}
    return argparse.Namespace(**{**chosen, **others})


def measured(model: str = "test_resnet", **others) -> dict:
    """The row of a model, a tiny one unless it is named."""
    row: dict = {}
    step_gpu.measure(model, options(**others), row, lambda: None)
    return row


def test_ways_share_weights_and_differ_in_what_they_keep(data):
    """Bits are chosen once, before anything is timed."""
    given = max_batch.build("test_resnet", "batch", 4, 96)
    ways = {name: step_gpu.Way(name, given, data, data.device) for name in ON_CPU}
    for way in ways.values():
        way.prepare()
        assert way.works
        assert list(map(id, way.model.parameters())) == list(map(id, given.parameters()))
        assert all(parameter.grad is not None for parameter in given.parameters())
        assert way.step() > 0
        adaptive = way.name not in ("plain", "checkpoint", "L2")
        assert hf_actnn.is_converted(way.model) == (way.name not in ("plain", "checkpoint"))
        assert ("average_bits" in way.found) == adaptive
        if adaptive:
            assert len(hf_actnn.controller(way.model).history) == 1
    kept = {name: way.found.get("kept_bytes") for name, way in ways.items()}
    assert kept["checkpoint"] is None
    assert kept["L3"] == kept["L3 unfused"] < kept["L2"] < 0.3 * kept["plain"]
    assert not hf_actnn.is_converted(given)


def test_gradients_do_not_depend_on_who_shares(data):
    given = max_batch.build("test_resnet", "batch", 4, 96)
    apart = max_batch.build("test_resnet", "batch", 4, 96)
    for name in ("L3", "checkpoint"):
        step_gpu.Way(name, given, data, data.device).prepare()
    for model in (given, apart):
        way = step_gpu.Way("plain", model, data, data.device)
        way.start()
        way.step()
    for one, other in zip(given.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(("fixed", "each", "batch"), [(1e9, 45e6, 416), (2e9, 1e8, 176), (0, 1e9, 16)])
def test_the_batch_is_a_multiple_of_eight_below_the_target(fixed, each, batch):
    found, tries = step_gpu.batch_for(lambda size: fixed + each * size, 2e10)
    assert found == batch
    assert fixed + each * batch <= 2e10 < fixed + each * (batch + 8)
    assert set(tries) == {32, 64}


@pytest.mark.parametrize("each", [0, 1e10])
def test_no_such_batch(each):
    with pytest.raises(ValueError, match="no batch of 8 or more has a peak of 20000000000 bytes"):
        step_gpu.batch_for(lambda size: 1e9 + each * size, 2e10)


def test_a_failure_is_noted_and_the_others_go_on(monkeypatch, capsys):
    """In preparing, or later."""
    steps = {"checkpoint": 0}

    def later():
        steps["checkpoint"] += 1
        if steps["checkpoint"] > 2:
            raise ValueError("what went wrong")

    def apply(method, model, device, **fields):
        if method == "L2":
            raise torch.OutOfMemoryError("no")
        return max_batch.Method(model, after=later if method == "checkpoint" else lambda: None)

    monkeypatch.setattr(step_gpu.max_batch, "apply", apply)
    row = measured(methods=["plain", "checkpoint", "L2"], rounds=2)
    assert row["methods"]["plain"]["status"] == "ok"
    assert row["methods"]["L2"]["status"] == "out of memory"
    assert row["methods"]["checkpoint"]["error"] == "ValueError: what went wrong"
    assert {name: len(one) for name, one in row["seconds"].items()} == {"plain": 2}
    assert "L2: out of memory" in capsys.readouterr().out


PAIR = """
import torch
from torch import nn

given = []


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 4))

    def forward(self, scale, weight, pixel_values, labels):
        given.append((scale, weight.item(), pixel_values.shape[0], labels.shape[0]))
        return {"loss": scale * weight * nn.functional.cross_entropy(self.body(pixel_values), labels)}


def pair():
    samples = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 3])}
    return Model(), {"scale": 2.0, "weight": torch.tensor(0.5), **samples}
"""


def test_a_model_of_ones_own_with_its_batch(tmp_path, monkeypatch):
    """All of the batch is given to it, and its own loss is what is trained. Where the batch is cut, samples are: what
    there is one of for all of them stays."""
    (tmp_path / "own_pair.py").write_text(PAIR)
    monkeypatch.syspath_prepend(tmp_path)
    apply = max_batch.apply

    def on_a_cpu(method, model, device, **fields):
        """What needs a device is plain training here."""
        return max_batch.Method(model) if method in step_gpu.ON_A_DEVICE else apply(method, model, device, **fields)

    monkeypatch.setattr(step_gpu.max_batch, "apply", on_a_cpu)
    row = measured("own_pair:pair", methods=["plain", "L2", "save_on_cpu"], batch=8, image_size=None)
    assert {name: found["status"] for name, found in row["methods"].items()} == {"plain": "ok", "L2": "ok"}
    assert {name: found["status"] for name, found in row["slow_methods"].items()} == {"save_on_cpu": "ok"}
    assert row["methods"]["L2"]["kept_bytes"] < row["methods"]["plain"]["kept_bytes"] / 4
    assert set(sys.modules["own_pair"].given) == {(2.0, 0.5, *sizes) for sizes in ((8, 8), (1, 1))}
    assert row["fixed_bytes"]["batch"] == 4 + 8 * (3 * 16 * 16 * 4 + 8)
    assert row["image_shape"] is None


@pytest.mark.parametrize("size", [None, 64])
def test_the_images_that_were_trained_on_are_noted(size, monkeypatch):
    """The model's own, too."""
    shapes, loss = set(), step_gpu.named.loss
    monkeypatch.setattr(step_gpu.named, "loss", lambda model, batch: shapes.add(batch.shape) or loss(model, batch))
    row = measured(methods=["plain"], batch=2, image_size=size)
    assert shapes == {(2, *row["image_shape"])}
    assert row["fixed_bytes"]["batch"] == 4 * next(iter(shapes)).numel()
    assert size is None or row["image_shape"] == (3, size, size)


def test_a_segmenter():
    """Of transformers, by the name that front.py has for it: its output is no classifier's."""
    pytest.importorskip("transformers")
    row = measured("front:segformer", methods=["plain", "L3"], batch=1, image_size=64)
    assert {name: found["status"] for name, found in row["methods"].items()} == {"plain": "ok", "L3": "ok"}
    assert set(row["seconds"]) == {"plain", "L3"}


def test_where_time_is_short(monkeypatch):
    """What no aim asks for is left out, and there are few rounds."""
    row = measured(until=time.time(), rounds=7)
    assert {name: found["status"] for name, found in row["methods"].items()} == {
        **dict.fromkeys(("plain", "checkpoint", "L3"), "ok"),
        **dict.fromkeys(("L2", "auto", "L3 unfused"), "no time"),
    }
    assert {name: len(one) for name, one in row["seconds"].items()} == dict.fromkeys(("plain", "checkpoint", "L3"), 3)


def test_the_slow_one_takes_turns_with_l4_alone(monkeypatch):
    """Here both are plain training."""
    monkeypatch.setattr(step_gpu.max_batch, "apply", lambda method, model, device, **fields: max_batch.Method(model))
    monkeypatch.setattr(step_gpu.Way, "step", lambda way: {"L4": 1.0, "save_on_cpu": 6.0}.get(way.name, 2.0))
    monkeypatch.setattr(step_gpu.Way, "prepare", step_gpu.Way.start)
    row = measured(methods=list(step_gpu.ASKED_FOR), rounds=5)
    assert {name: len(one) for name, one in row["seconds"].items()} == dict.fromkeys(
        ("plain", "checkpoint", "L3", "L4"), 5
    )
    assert row["slow"] == {"L4": [1.0, 1.0], "save_on_cpu": [6.0, 6.0]}
    assert step_gpu.ratios(row)["save_on_cpu / L4"] == 6.0
    assert set(row["slow_methods"]) == {"L4", "save_on_cpu"} and row["slow_batch"] == 1
    assert "save_on_cpu" not in row["methods"]


def test_peaks_are_those_of_a_step_by_itself(monkeypatch):
    events = []
    for name, value in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1,
        "max_memory_allocated": 2,
        "max_memory_reserved": 3,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: events.append(name) or value)
    way = step_gpu.Way("plain", None, None, torch.device("cuda"))
    way.model = SimpleNamespace(zero_grad=lambda set_to_none: events.append("zero_grad"))
    way.step = lambda: events.append("step")
    assert way.peaks() == {"allocated": 2, "reserved": 3, "before": 1}
    assert events == [
        *("zero_grad", "synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated", "step"),
        *("max_memory_allocated", "max_memory_reserved"),
    ]


def test_table(capsys):
    seconds = {"plain": [1.0, 9.0, 1.0], "checkpoint": [1.3] * 3, "L3": [1.09] * 3, "L4": [1.2] * 3, "auto": [1.1]}
    peaks = {"status": "ok", "allocated": 20 * 2**30, "reserved": 21 * 2**30}
    row = {"batch": 448, "memory_bytes": 2**36, "seconds": seconds, "slow": {"L4": [1.2], "save_on_cpu": [7.2]}}
    row["methods"] = {"plain": peaks, "L2": {"status": "out of memory"}}
    row["ratios"] = step_gpu.ratios(row)
    assert list(row["ratios"])[:4] == list(step_gpu.AIMS)
    step_gpu.table({"a": row, "b": {"error": "stopped after 3 s"}})
    lines = {line[:38].strip(): line[38:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["images in a batch"] == ["448", "-"]
    assert lines["L3 / plain"] == ["<=", "1.12", "1.090", "-"]
    assert lines["(L3 - plain) / (checkpoint - plain)"] == ["<=", "0.33", "0.300", "-"]
    assert lines["L4 / L3"] == ["<=", "1.03", "1.101", "missed", "-"]
    assert lines["save_on_cpu / L4"] == [">=", "5.00", "6.000", "-"]
    assert lines["auto / plain"] == ["1.100", "-"]
    assert lines["plain"] == ["20.00", "(21.00)", "-"]
    assert lines["L2"] == ["out", "of", "memory", "-"]
    assert step_gpu.cell(4.9, 5.0, at_least=True) == "4.900 missed"


def run(monkeypatch, out: Path, *others: str) -> tuple[int, dict]:
    """How a call with these options ends, and what it writes."""
    monkeypatch.setattr(sys, "argv", ["step_gpu.py", "--device", "cpu", "--out", str(out), *others])
    with pytest.raises(SystemExit) as ended:
        step_gpu.main()
    results = json.loads(out.read_text())
    assert shlex.split(results["command"]) == ["python", "benchmarks/step_gpu.py", "--device", "cpu", *others]
    return int(ended.value.code), results["models"]


@pytest.mark.parametrize("joined", [False, True])
def test_the_command_that_is_noted_measures_the_same(joined, tmp_path, monkeypatch):
    """Without where it writes to, however that is said; in a shell, names with a space in them are one word."""
    measured = []

    def noted(*words: str) -> str:
        """The command that a call with these words writes down."""
        out = tmp_path / "with a space.json"
        at = ["--out", str(out)] if not joined else [f"--out={out}"]
        monkeypatch.setattr(sys, "argv", ["step_gpu.py", *words[:2], *at, *words[2:]])
        with pytest.raises(SystemExit):
            step_gpu.main()
        return json.loads(out.read_text())["command"]

    monkeypatch.setattr(
        step_gpu, "run", lambda model, options, seconds: measured.append((model, options)) or {"status": "ok"}
    )
    command = noted("--device", "cpu", "--models", "a_model", "--methods", "plain", "L3 unfused", "--rounds", "2")
    assert command == (
        "python benchmarks/step_gpu.py --device cpu --models a_model --methods plain 'L3 unfused' --rounds 2"
    )
    assert noted(*shlex.split(command)[2:]) == command
    first, second = measured
    assert first == second
    assert first[1].methods == ["plain", "L3 unfused"]


def test_options_are_not_abbreviated(tmp_path, monkeypatch, capsys):
    """Or the file would be part of the command that is noted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_gpu, "run", lambda model, options, seconds: {"status": "ok"})
    monkeypatch.setattr(sys, "argv", ["step_gpu.py", "--device", "cpu", "--ou", "rows.json"])
    with pytest.raises(SystemExit):
        step_gpu.main()
    assert "unrecognized arguments: --ou rows.json" in capsys.readouterr().err


def test_in_real_processes(tmp_path, monkeypatch, capfd):
    """A model that fails loses nothing of the other; the table comes last."""
    small = ("--batch", "2", "--image-size", "64", "--rounds", "1", "--budget", "200")
    code, rows = run(monkeypatch, tmp_path / "rows.json", "--models", "no_such_model", "test_resnet", *small)
    assert code == 1
    assert rows["no_such_model"]["status"] == "error" and "no_such_model" in rows["no_such_model"]["error"]
    assert rows["test_resnet"]["status"] == "ok" and set(rows["test_resnet"]["seconds"]) == set(ON_CPU)
    assert rows["test_resnet"]["environment"]["torch"] == torch.__version__
    assert rows["test_resnet"]["image_shape"] == [3, 64, 64]
    printed = capfd.readouterr().out
    assert "none of L4, save_on_cpu: left out" in printed
    assert "missed" not in printed
    assert printed.splitlines()[-1].split() == ["L3", "unfused", "-", "-"]


def test_a_process_has_a_limit(tmp_path, monkeypatch):
    code, rows = run(monkeypatch, tmp_path / "rows.json", "--models", "test_resnet", "--budget", "0.2")
    assert code == 1
    assert rows == {"test_resnet": {"status": "error", "error": "stopped after 0 s"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step_gpu.py"])
    with pytest.raises(SystemExit, match="none that torch sees"):
        step_gpu.main()


def test_a_batch_is_cut_where_it_has_samples():
    batch = {"x": torch.ones(4, 3, 2), "labels": torch.arange(4), "weights": torch.ones(7), "scale": torch.tensor(2.0)}
    found = step_gpu.cut({**batch, "kind": "a"}, 2)
    assert found["x"].shape == (2, 3, 2) and found["labels"].tolist() == [0, 1]
    assert len(found["weights"]) == 7 and found["scale"] == 2 and found["kind"] == "a"
    assert step_gpu.cut(torch.arange(4), 3).tolist() == [0, 1, 2]
    assert step_gpu.cut({"scale": 2.0}, 3) == {"scale": 2.0}
