"""`hf-actnn profile`: its numbers, the page made of them, and what it says where it cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn import cli, pages
from hf_actnn.commands import profile
from hf_actnn.errors import ConfigError
from hf_actnn.integrations import named
from tests.browser import BROWSER, Page, browse

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("timm")


def mine() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Named below: a model of one's own, with a batch; `</script>` in a name must not end the page's."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("</script><b>", nn.Linear(64, 256))
            self.last = nn.Linear(256, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self._modules["</script><b>"](x)))

    return Mine(), {"x": torch.randn(3, 64)}


def alone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def frozen() -> nn.Module:
    return alone().requires_grad_(False)


def nothing() -> int:
    return 3


def fails() -> nn.Module:
    raise ZeroDivisionError("on purpose")


NAME = "tests.test_profile:"


@pytest.fixture(scope="module", autouse=True)
def from_the_root():
    """Functions of this file are found by their name."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return profile.profile("test_vit", 4, levels=["plain", "L2", "auto"], image_size=96)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["plain", "L2"])
def test_totals_are_those_of_track_memory(found, level):
    subject = named.load("test_vit", 96)
    model, batch = subject.model, subject.batch(4)
    if level != "plain":
        hf_actnn.convert(model, level)
    with hf_actnn.track_memory(model) as memory:
        named.loss(model, batch)
    row = next(row for row in found["levels"] if row["level"] == level)
    assert row["saved_bytes"] == memory.saved_bytes > 0
    assert row["uncompressed_bytes"] == memory.uncompressed_bytes
    by_module = {one["path"]: one["bytes"][level] for one in found["modules"] if one["bytes"][level]}
    assert by_module == {path: held for path, (held, _) in memory.by_module.items() if held}


def test_levels_hold_less_and_plain_is_always_there():
    only = profile.profile("test_vit", 4, levels=["L2"], image_size=96)
    assert [row["level"] for row in only["levels"]] == ["plain", "L2"]
    plain, level = only["levels"]
    assert plain["ratio"] == 1 and level["ratio"] > 6
    assert plain["kept"] == [] and {"quantized", "recipe: rerun"} <= {one["kept"] for one in level["kept"]}


def test_bits_are_chosen_before_auto_is_counted(found):
    """auto begins with 4 bits, as L2; what one step chose is something else."""
    by_level = {row["level"]: row["saved_bytes"] for row in found["levels"]}
    assert by_level["auto"] != by_level["L2"]


def test_kinds_add_up_and_know_their_modules(found):
    for level in ("plain", "L2", "auto"):
        of_kinds = sum(kind["bytes"][level] for kind in found["kinds"])
        assert of_kinds == sum(module["bytes"][level] for module in found["modules"])
    kinds = {kind["kind"]: kind["modules"] for kind in found["kinds"]}
    assert kinds["LayerNorm"] == sum(module["kind"] == "LayerNorm" for module in found["modules"]) > 0
    assert found["classes"]["blocks.0"] == "Block" and found["classes"][""] == "VisionTransformer"


def test_a_model_of_ones_own_with_its_batch(capsys):
    assert cli.main(["profile", NAME + "mine", "--batch", "7", "--levels", "plain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image"] is None
    # The input and the hidden values that relu and the last layer share, of 7 samples; and log_softmax's, in the loss.
    assert found["levels"][0]["saved_bytes"] == 4 * 7 * (64 + 256 + 8) + 8 * 7 + 4


def test_a_model_of_ones_own_on_images(capsys):
    assert cli.main(["profile", NAME + "alone", "--batch", "2", "--image-size", "32", "--levels", "L2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == [3, 32, 32]


def test_a_directory_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    subject = named.load(str(tmp_path))
    assert type(subject.model).__name__ == "ViTForImageClassification" and subject.image == (3, 32, 32)
    assert set(subject.batch(2)) == {"pixel_values", "labels"}
    assert profile.profile(str(tmp_path), 2, levels=["L2"], image_size=64)["image"] == [3, 64, 64]


def test_a_folder_with_the_name_of_a_model_does_not_hide_it(tmp_path, monkeypatch):
    """Such as an earlier training's results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_vit").mkdir()
    assert named.load("test_vit").source == "timm"
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"no configuration of a model \(at mine\)"):
        named.load("mine")


def test_the_table_names_what_holds_most_and_the_totals(found):
    text = profile.table(found, top=3)
    lines = text.splitlines()
    assert found["modules"][0]["path"] in lines[3] and f"and {len(found['modules']) - 3} more" in text
    assert f"{found['levels'][1]['ratio']:.1f}x" in lines[-1]
    assert len({len(line) for line in lines[1:]}) == 1


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vit_tiny_patch16_225", "--batch", "1"], "Did you mean vit_tiny_patch16_224"),
        (["hf-hub:timm/any", "--batch", "1"], "nothing is downloaded here"),
        (["someone/something", "--batch", "1"], "repository in the local Hugging Face cache"),
        (["no.such.module:model", "--batch", "1"], "No module named 'no'"),
        (["torch.nn:NoSuchThing", "--batch", "1"], "NoSuchThing"),
        ([".relative:model", "--batch", "1"], "the function that makes the model was not found"),
        ([NAME + "frozen", "--batch", "1", "--levels", "auto"], "no parameter to train"),
        ([NAME + "nothing", "--batch", "1"], "the function returned no model"),
        ([NAME + "fails", "--batch", "1"], "ZeroDivisionError"),
        ([NAME + "mine", "--batch", "1", "--image-size", "32"], "the size of the images is given twice"),
        (["test_vit", "--batch", "0"], "there is nothing to run"),
        (["test_vit", "--batch", "1", "--levels", "L9"], "there is no such level"),
        (["test_vit", "--batch", "1", "--levels", "checkpoint"], "hf-actnn estimate"),
        (["test_vit", "--batch", "1", "--html", "/no/such/folder/page.html"], "no such folder"),
        (["test_vit", "--batch", "1", "--html", "."], "this is a folder (at --html)"),
        (["test_vit", "--batch", "1000000000"], "the batch does not fit into memory"),
        (["mvitv2_tiny", "--batch", "2", "--image-size", "7"], "the model could not be made"),
        (["test_vit", "--batch", "2", "--image-size", "7"], "the model does not run"),
        (["test_vit", "--batch", "2", "--image-size", "0"], "images have no such size"),
        (["test_vit", "--batch", "2", "--device", "tpu9"], "no such device"),
    ],
)
def test_what_cannot_be_done_is_said(words, said, capsys):
    assert cli.main(["profile", *words]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == "" and "Traceback" not in printed.err
    assert printed.err.splitlines()[-1].startswith("hf-actnn profile: ")


def test_a_text_model_is_sent_to_a_function(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    assert cli.main(["profile", str(tmp_path), "--batch", "1"]) == 1
    assert "package.module:function" in capsys.readouterr().err


def test_without_matplotlib_a_picture_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(profile, "profile", lambda *args, **options: pytest.fail("it was measured"))
    assert cli.main(["profile", "test_vit", "--batch", "1", "--png", str(tmp_path / "p.png")]) == 1
    assert 'pip install "hf-actnn[plots]"' in capsys.readouterr().err


def test_without_timm_its_models_are_not_known(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["profile", "resnet18", "--batch", "1"]) == 1
    assert 'pip install "hf-actnn[timm]"' in capsys.readouterr().err


# -- the page and the picture ------------------------------------------------------------------------------------------


def test_the_page_holds_the_numbers_and_loads_nothing(found, tmp_path, capsys):
    path = tmp_path / "page.html"
    command = ["profile", "test_vit", "--batch", "4", "--levels", "L2", "--image-size", "96", "--json"]
    assert cli.main([*command, "--html", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    text = path.read_text(encoding="utf-8")
    read = Page(text)
    assert json.loads(read.scripts["data"]) == printed
    assert read.loaded == [] and not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert {"data", ""} == set(read.scripts)


def test_names_cannot_leave_the_json(tmp_path):
    result = profile.profile(NAME + "mine", 2, levels=["plain"])
    read = Page(profile.page(result))
    assert json.loads(read.scripts["data"]) == result
    assert any("</script><b>" in module["path"] for module in result["modules"])


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_sound(found, tmp_path):
    script = tmp_path / "page.js"
    script.write_text(Page(profile.page(found)).scripts[""])
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("name", ["test_vit", NAME + "mine"])
def test_in_a_browser_the_page_shows_the_numbers_without_an_error(found, name, tmp_path):
    result = found if name == "test_vit" else profile.profile(name, 2, levels=["plain", "L2"])
    path = tmp_path / "page.html"
    path.write_text(profile.page(result), encoding="utf-8")
    done = browse(path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = Page(done.stdout)
    totals = {cell["data-level"]: int(cell["data-bytes"]) for cell in shown.cells if cell.get("class") == "total"}
    assert totals == {row["level"]: row["saved_bytes"] for row in result["levels"]}
    cells = [int(cell["data-bytes"]) for cell in shown.cells if cell.get("class") == "bytes"]
    levels = list(totals)
    root = [sum(module["bytes"][level] for module in result["modules"]) for level in levels]
    assert cells[: len(levels)] == root  # the first row of the tree is the whole model
    assert cells[-len(levels) :] == list(result["kinds"][-1]["bytes"].values())


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_an_error_in_the_page_would_be_noticed(found, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        profile.page(found).replace("bars(); drawModules();", "bars(); noSuchFunction();"), encoding="utf-8"
    )
    assert "noSuchFunction" in browse(path, "--dump-dom").stderr


def test_the_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    from hf_actnn.commands import plot

    plot.save(found, tmp_path / "picture.png")
    written = (tmp_path / "picture.png").read_bytes()
    assert written[:8] == b"\x89PNG\r\n\x1a\n" and len(written) > 10_000
