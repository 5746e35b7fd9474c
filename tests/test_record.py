"""The record of a training run: figures for a logger, and bits by layer over time as page, picture and numbers."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn.errors import ConfigError, ConversionError, NotAvailableError
from hf_actnn.record.record import page
from tests.browser import BROWSER, Page, browse

STEPS = 8


def make() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def step(model: nn.Module, at: int = 0, samples: int = 8) -> None:
    generator = torch.Generator().manual_seed(at)
    loss = nn.functional.cross_entropy(
        model(torch.randn(samples, 3, 24, 24, generator=generator)), torch.arange(samples) % 4
    )
    loss.backward()
    hf_actnn.controller(model).step()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.05 * parameter.grad
            parameter.grad = None


def train(config: Any = "L3", steps: int = STEPS, **fields: Any) -> tuple[nn.Module, hf_actnn.Record, list[dict]]:
    model = hf_actnn.convert(make(), config, update_interval=2, **fields)
    record, figures, bits = hf_actnn.record(model), [], []
    for at in range(steps):
        step(model, at)
        figures.append(record.metrics())
        bits.append(hf_actnn.controller(model).bits())
    record.close()
    assert not model._forward_pre_hooks and not model._forward_hooks
    return model, record, [{"figures": one, "bits": other} for one, other in zip(figures, bits, strict=True)]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, hf_actnn.Record, list[dict]]:
    return train()


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_track_memory_and_the_controller(trained):
    model, _record, seen = trained
    history = hf_actnn.controller(model).history
    assert set(seen[-1]["figures"]) == {
        "actnn_ratio",
        "actnn_bytes_per_sample",
        "actnn_bits",
        "actnn_added_variance",
    }
    assert seen[-1]["figures"]["actnn_bits"] == history[-1]["average_bits"]
    assert seen[-1]["figures"]["actnn_added_variance"] == history[-1]["added_variance"]
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(8, 3, 24, 24))
    newest = hf_actnn.record(model)
    newest._controller = hf_actnn.controller(model)
    model(torch.randn(8, 3, 24, 24))
    assert newest.measured[0]["saved_bytes"] == memory.saved_bytes
    assert newest.metrics()["actnn_ratio"] == pytest.approx(memory.ratio)
    newest.close()


def test_each_update_is_measured(trained):
    model, record, _ = trained
    updates = [entry["step"] for entry in hf_actnn.controller(model).history]
    # The first pass, and the one after each update that has one behind it.
    assert [entry["step"] for entry in record.measured] == [0, *[at for at in updates if at < STEPS]]
    assert all(0 < 4 * entry["saved_bytes"] < entry["uncompressed_bytes"] for entry in record.measured)


def test_where_no_bits_are_chosen(tmp_path):
    _model, record, seen = train("L2", 2)
    assert set(seen[-1]["figures"]) == {"actnn_ratio", "actnn_bytes_per_sample"}
    found = record.to_dict()
    assert found["updates"] == found["layers"] == found["tensors"] == [] and found["steps"] == 2
    for ending in ("html", "json"):
        record.save(tmp_path / f"r.{ending}")


def test_before_the_first_forward_pass():
    record = hf_actnn.record(hf_actnn.convert(make(), "L3"))
    assert record.metrics() == {} and record.measured == []


def test_looking_changes_nothing():
    """Neither bits nor rounding, nor whether a forgotten step() is noticed."""
    followed, _, _ = train()
    alone = hf_actnn.convert(make(), "L3", update_interval=2)
    for at in range(STEPS):
        step(alone, at)
    for one, other in zip(followed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    model = hf_actnn.convert(make(), "L3")
    hf_actnn.record(model).metrics()
    for module in model.modules():
        session = module.__dict__.get("_actnn_member")
        assert session is None or not session.session.controller.asked_for


def test_it_outlives_its_model_and_follows_a_new_conversion(tmp_path):
    model, record, _ = train()
    before = record.to_dict()
    del model
    assert record.to_dict() == before and record.metrics()
    model = hf_actnn.convert(make(), "L3")
    record = hf_actnn.record(model)
    hf_actnn.convert(model, "L2")
    assert record.to_dict()["setting"] == "L2"


def test_a_model_that_is_not_converted():
    with pytest.raises(ConversionError, match=r"no controller.*hf_actnn\.convert"):
        hf_actnn.record(make())


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_bits_are_those_the_controller_gave(trained):
    model, record, seen = trained
    found = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    updates = [entry["step"] for entry in found["updates"]]
    assert len(updates) >= 4
    for number, at in enumerate(updates):
        given = seen[at - 1]["bits"]
        assert {one["name"]: one["bits"][number] for one in found["tensors"]} == pytest.approx(given, abs=5e-4)
    for layer in found["layers"]:
        inside = [one for one in found["tensors"] if one["layer"] == layer["layer"]]
        assert layer["values"] == sum(one["values"] for one in inside) > 0
        for number in range(len(updates)):
            mean = sum(one["values"] * one["bits"][number] for one in inside) / layer["values"]
            assert layer["bits"][number] == pytest.approx(mean, abs=1e-3)
    paths = [path for path, _ in model.named_modules()]
    places = [paths.index(layer["layer"]) for layer in found["layers"]]
    assert places == sorted(places) and len(places) >= 3


def test_the_average_of_all_layers_is_the_controllers(trained):
    found = trained[1].to_dict()
    values = sum(one["values"] for one in found["tensors"])
    for number, entry in enumerate(found["updates"]):
        mean = sum(one["values"] * one["bits"][number] for one in found["tensors"]) / values
        assert mean == pytest.approx(entry["average_bits"], abs=1e-3)


def test_it_goes_on_after_a_resume():
    _whole, record, _ = train()
    model = hf_actnn.convert(make(), "L3", update_interval=2)
    for at in range(3):
        step(model, at)
    state = json.loads(json.dumps(hf_actnn.controller(model).state_dict()))
    weights = copy.deepcopy(model.state_dict())
    resumed = hf_actnn.convert(make(), "L3", update_interval=2)
    resumed.load_state_dict(weights)
    hf_actnn.controller(resumed).load_state_dict(state)
    again = hf_actnn.record(resumed)
    for at in range(3, STEPS):
        step(resumed, at)
    assert again.to_dict()["tensors"] == record.to_dict()["tensors"]


def test_a_layer_that_is_frozen_later_is_not_seen():
    model = hf_actnn.convert(make(), "L3", update_interval=1)
    hf_actnn.controller(model)
    record = hf_actnn.record(model)
    step(model)
    for module in list(model)[:3]:
        module.requires_grad_(False)
    nn.functional.cross_entropy(model(torch.randn(8, 3, 24, 24)), torch.arange(8) % 4).backward()
    hf_actnn.controller(model).step()
    columns = {one["name"]: one["bits"] for one in record.to_dict()["tensors"]}
    assert all(len(bits) == 2 for bits in columns.values())
    gone = {name for name, bits in columns.items() if bits[0] is not None and bits[1] is None}
    assert gone and all(int(name.partition(":")[0]) < 3 for name in gone) and len(gone) < len(columns)


# -- page, picture and numbers -----------------------------------------------------------------------------------------


def test_the_files_hold_the_same_numbers(trained, tmp_path):
    _, record, _ = trained
    record.save(tmp_path / "r.json")
    record.save(str(tmp_path / "r.html"))
    found = json.loads((tmp_path / "r.json").read_text())
    read = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert json.loads(read.scripts["data"]) == found == json.loads(json.dumps(record.to_dict()))
    assert read.loaded == []


def test_the_picture(trained, tmp_path):
    pytest.importorskip("matplotlib")
    trained[1].save(tmp_path / "r.png")
    written = (tmp_path / "r.png").read_bytes()
    assert written[:8] == b"\x89PNG\r\n\x1a\n" and len(written) > 10_000


@pytest.mark.parametrize("name", ["r.pdf", "r"])
def test_other_files_are_refused(trained, tmp_path, name):
    with pytest.raises(ConfigError, match=r"\.html, \.json, \.png"):
        trained[1].save(tmp_path / name)


def test_a_picture_without_matplotlib(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotAvailableError, match="plots"):
        trained[1].save(tmp_path / "r.png")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_sound(trained, tmp_path):
    script = tmp_path / "page.js"
    script.write_text(Page(page(trained[1].to_dict())).scripts[""])
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("config", ["L3", "L2"])
def test_in_a_browser_the_page_shows_the_numbers_without_an_error(config, tmp_path):
    _, record, _ = train(config, 6)
    found = record.to_dict()
    record.save(tmp_path / "r.html")
    done = browse(tmp_path / "r.html", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    cells = Page(done.stdout).cells
    shown = {cell["data-name"]: json.loads(cell["data-bits"]) for cell in cells if "data-bits" in cell}
    assert shown == {one["layer"]: one["bits"] for one in found["layers"]}
    values = [float(cell["data-value"]) for cell in cells if cell.get("data-key") == "average_bits"]
    assert values == [entry["average_bits"] for entry in found["updates"]]
    kept = [int(cell["data-value"]) for cell in cells if cell.get("data-key") == "saved_bytes"]
    assert kept == [entry["saved_bytes"] for entry in found["measured"]] != []


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_an_error_in_the_page_would_be_noticed(trained, tmp_path):
    path = tmp_path / "r.html"
    path.write_text(page(trained[1].to_dict()).replace("chart(); drawLayers();", "noSuchFunction();"), encoding="utf-8")
    assert "noSuchFunction" in browse(path, "--dump-dom").stderr


def test_names_cannot_leave_the_json():
    model = nn.Sequential()
    model.add_module("</script><b>", nn.Linear(64, 64))
    model.add_module("last", nn.GELU())
    hf_actnn.convert(model, "L3")
    hf_actnn.controller(model)
    record = hf_actnn.record(model)
    model(torch.randn(16, 64)).square().sum().backward()
    hf_actnn.controller(model).step()
    found = record.to_dict()
    assert any("</script>" in one["layer"] for one in found["layers"])
    assert json.loads(Page(page(found)).scripts["data"]) == json.loads(json.dumps(found))
