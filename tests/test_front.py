"""The benchmark of all ways to train on a CPU, tried on a tiny model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("timm")
import front
import timing

from tests import forks

if not Path("/proc/self/statm").exists():
    pytest.skip("reads resident sets from /proc", allow_module_level=True)


@pytest.fixture
def points_are_forks(monkeypatch):
    """Of a process that has imported what they import, in the environment that a point has."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in front.PAGES.items():
            patch.setenv(name, value)
        server = forks.Forks(("torch", "timm"))

    def watched(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        done = server.run(command[1:], 300, forks.ROOT, {**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    monkeypatch.setattr(front, "watched", watched)
    yield
    server.end()


@pytest.mark.slow
@pytest.mark.usefixtures("points_are_forks")
def test_points_are_measured_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(front, "MODELS", {"tiny": front.Model("test_resnet", 12)})
    monkeypatch.setattr(front, "RESULTS", tmp_path / "results" / "front.json")
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    monkeypatch.setattr(sys, "argv", ["front.py", "--models", "tiny", "--ways", "plain", "L2", "--rounds", "1"])
    front.main()
    found = json.loads(front.RESULTS.read_text())["models"]["tiny"]["ways"]
    assert {row["status"] for row in found.values()} == {"ok"}
    assert found["L2"]["peak_per_image"] < found["plain"]["peak_per_image"]
    assert 5 * found["L2"]["kept_per_image"] < found["plain"]["kept_per_image"]
    assert found["L2"]["seconds_per_image"] > 0
    before = front.RESULTS.read_text()
    front.main()  # nothing is missing
    assert front.RESULTS.read_text() == before
    # A way more, on a machine that is half as fast by now.
    slow = 2 * found["plain"]["seconds_per_image"]
    later = {
        way: {"status": "ok", "seconds_per_image": slow * times} for way, times in {"plain": 1.0, "L3": 1.5}.items()
    }
    monkeypatch.setattr(front, "measure", lambda key, ways, rounds, told: {way: dict(later[way]) for way in ways})
    monkeypatch.setattr(sys, "argv", ["front.py", "--models", "tiny", "--ways", "L3", "--rounds", "1"])
    front.main()
    ways = json.loads(front.RESULTS.read_text())["models"]["tiny"]["ways"]
    assert {name: ways[name] for name in found} == found
    assert ways["L3"]["seconds_per_image"] == pytest.approx(1.5 * found["plain"]["seconds_per_image"])


def test_a_note_stays_with_what_is_not_measured_again(monkeypatch, tmp_path):
    path = tmp_path / "front.json"
    monkeypatch.setattr(front, "RESULTS", path)
    monkeypatch.setattr(timing, "write", lambda name, results: path.write_text(json.dumps(results)))
    one = {"status": "ok", "seconds_per_image": 1.0}
    monkeypatch.setattr(front, "measure", lambda key, ways, *_: {way: dict(one) for way in ways})
    monkeypatch.setattr(front, "known", lambda: json.loads(path.read_text())["models"])
    path.write_text(json.dumps({"models": {"resnet50": {"note": "of then", "ways": {"plain": one}}}}))
    ways = ("--models", "resnet50", "--ways", "plain", "L2")
    monkeypatch.setattr(sys, "argv", ["front.py", *ways])
    front.main()
    assert front.known()["resnet50"]["note"] == "of then" and "L2" in front.known()["resnet50"]["ways"]
    monkeypatch.setattr(sys, "argv", ["front.py", *ways, "--again"])
    front.main()
    assert "note" not in front.known()["resnet50"]


def test_a_way_that_cannot_be_is_written_down():
    found = front.child("test_resnet", "no level", 2, True)
    assert found["status"] in ("refused", "error") and "no level" in found["error"]


@pytest.mark.parametrize(("name", "millions"), [("segformer", 3.8), ("detr", 41.5)])
def test_models_of_hugging_face_are_the_published_ones(name, millions):
    pytest.importorskip("transformers")
    count = sum(parameter.numel() for parameter in getattr(front, name)().parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.02)
