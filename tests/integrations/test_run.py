"""`hf-actnn run` and HF_ACTNN: scripts that do not know of compression train with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.launching import run_to_end
from hf_actnn.errors import ConfigError
from hf_actnn.integrations.unmodified import parse
from tests import forks

ROOT = Path(__file__).resolve().parents[2]

MODEL = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import transformers

transformers.set_seed(0)
model = transformers.ViTForImageClassification(transformers.ViTConfig(
    image_size=16, patch_size=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    num_labels=4,
))
pixels, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 4
"""
TRAINER = (
    MODEL
    + """
from transformers import HfArgumentParser, Trainer, TrainingArguments

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
data = [{"pixel_values": one, "labels": label} for one, label in zip(pixels, labels)]
TRAINER
trainer = Mine(model, arguments, train_dataset=data)
trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
print("history", [round(one["loss"], 6) for one in trainer.state.log_history if "loss" in one])
"""
)
#: For new processes: accelerate alone is imported in a third of the time that transformers takes.
WITHOUT_TRANSFORMERS = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 64, 4, 4)
        self.blocks = torch.nn.ModuleList(map(self.block, range(2)))
        self.head = torch.nn.Linear(64, 4)

    @staticmethod
    def block(_):
        return torch.nn.Sequential(
            torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
        )

    def forward(self, pixel_values, labels):
        x = self.patches(pixel_values).flatten(2).mT
        for scale, block in zip((1, 0.01), self.blocks):  # so that bits differ
            x = x + scale * block(x)
        return {"loss": torch.nn.functional.cross_entropy(self.head(x.mean(1)), labels)}


model = Mixer()
pixels, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 4
"""
LOOP = (
    MODEL
    + """
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(pixels, labels), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for pixels, labels in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(pixel_values=pixels, labels=labels)["loss"])
        optimizer.step()
        optimizer.zero_grad()
accelerator.print("processes", accelerator.num_processes)
accelerator.end_training()
"""
)
SMALL_LOOP = LOOP.replace(MODEL, WITHOUT_TRANSFORMERS)
SHORT = [
    *("--output_dir", "out", "--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no"),
    *("--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"),
]


class Done(NamedTuple):
    code: int
    printed: str
    said: str


def start(command: list[str], folder: Path, *, forked: bool = False, **environment: str) -> Done:
    """Run to the end."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_ACTNN")}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    if forked:
        assert command[0] == sys.executable
        done = forks.server().run(command[1:], 180, folder, {**inherited, **own})
    else:
        done = run_to_end(command, 180, folder, {**inherited, **own})
    return Done(done.returncode, done.stdout, done.stderr)


def run(script: str, folder: Path, *words: str, before: tuple[str, ...] = (), forked: bool = True) -> Done:
    """`hf-actnn run script.py words` with what was measured in report.json.

    Args:
        forked: from a process that has imported what is changed, which is changed then; else it is as it is imported.
    """
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "hf_actnn", "run", "--report", "report.json", *before, "script.py", *words]
    return start(command, folder, forked=forked)


def measured(folder: Path) -> dict[str, Any]:
    (one,) = json.loads((folder / "report.json").read_text())["models"]
    return one


def assert_compressed(folder: Path, ratio: float, steps: int) -> dict[str, Any]:
    """By bytes, by what the rows of the report say, and by steps that were counted once."""
    found = measured(folder)
    assert found["samples"] > 0
    assert found["uncompressed_bytes"] > ratio * found["saved_bytes"] > 0
    assert any(row["kept"] == "quantized" and row["nbytes"] for row in found["rows"])
    assert found["steps"] == steps
    return found


# -- scripts that train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_a_record(kind, tmp_path):
    script, words = (TRAINER.replace("TRAINER", "Mine = Trainer"), SHORT) if kind == "trainer" else (LOOP, [])
    done = run(script, tmp_path, *words, before=("--level", "L3", "--record", "records/first"))
    assert done.code == 0, done.said
    folder = tmp_path / "records" / "first"
    assert {path.name for path in folder.iterdir()} == {"record.html", "record.json"}
    found = json.loads((folder / "record.json").read_text())
    assert found["steps"] == measured(tmp_path)["steps"] > 0 and len(found["layers"]) >= 3
    assert found["measured"][0]["saved_bytes"] == measured(tmp_path)["saved_bytes"]
    assert found["tensors"][0]["name"] in (folder / "record.html").read_text()


def test_a_record_that_has_no_place_stops_the_run_at_the_start(tmp_path):
    (tmp_path / "taken").write_text("")
    done = run("print('began')", tmp_path, before=("--record", "taken"))
    assert done.code == 2 and "there can be no such folder (at --record)" in done.said and done.printed == ""


@pytest.mark.parametrize("trainer", ["Mine = Trainer", "class Mine(Trainer):\n    pass"], ids=["trainer", "subclass"])
def test_a_trainer(trainer, tmp_path):
    new = trainer == "Mine = Trainer"  # changed as it is imported; in a fork, which has it already, all at once
    done = run(TRAINER.replace("TRAINER", trainer), tmp_path, *SHORT, before=("--level", "L2"), forked=not new)
    assert done.code == 0, done.said
    found = assert_compressed(tmp_path, ratio=9, steps=3)
    assert found["config"]["level"] == "L2"
    assert {row["bits"] for row in found["rows"] if row["kept"] == "quantized"} == {4}
    assert done.said.count("ViTForImageClassification trains at L2") == 1
    assert "nothing was compressed" not in done.said
    assert "'actnn_ratio': '" in done.printed  # the progress printer has the figures too


def test_two_trainers_one_after_the_other(tmp_path):
    """The second finds its model converted, by us: it has the callback too, and the report stays one."""
    second = "second = Mine(model, arguments, train_dataset=data)\nsecond.train()\n"
    second += "print('second', [one['actnn_bits'] for one in second.state.log_history if 'loss' in one])\n"
    done = run(TRAINER.replace("TRAINER", "Mine = Trainer") + second, tmp_path, *SHORT, before=("--level", "L3"))
    assert done.code == 0, done.said
    assert_compressed(tmp_path, ratio=9, steps=6)
    assert len(json.loads(re.search(r"^second (.+)$", done.printed, re.MULTILINE)[1])) == 3
    assert done.said.count("trains at L3") == 1
    assert "itself" not in done.said


def test_the_forward_pass_is_the_plain_one(tmp_path):
    """The first loss is the uncompressed script's; those after a step are near it."""
    compressed = run(TRAINER.replace("TRAINER", "Mine = Trainer"), tmp_path, *SHORT)
    plain = start([sys.executable, "script.py", *SHORT], tmp_path, forked=True)
    losses = [json.loads(re.search(r"^history (.+)$", done.printed, re.MULTILINE)[1]) for done in (compressed, plain)]
    assert losses[0][0] == losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert "actnn" not in plain.printed + plain.said


def test_a_loop_with_accumulation(tmp_path):
    """Eight micro-batches of two steps: the controller counts four."""
    done = run(SMALL_LOOP, tmp_path, before=("--level", "L3"), forked=False)
    assert done.code == 0, done.said
    found = assert_compressed(tmp_path, ratio=9, steps=4)
    chosen = {row["bits"] for row in found["rows"] if row["kept"] == "quantized"}
    assert len(chosen) > 1, "the controller was not stepped: all have the average"
    assert done.said.count("trains at L3") == 1


def test_a_report_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "script.py").write_text(LOOP.replace("import sys", "import sys, hf_actnn_startup", 1).replace(
        "import torch", "hf_actnn_startup.install()\nimport torch", 1
    ))  # fmt: skip
    command = [sys.executable, "script.py"]
    report = str(tmp_path / "none" / "report.json")
    done = start(command, tmp_path, forked=True, HF_ACTNN="L3", HF_ACTNN_REPORT=report)
    assert done.code == 0 and "processes 1" in done.printed, done.said
    assert "the report could not be written" in done.said


def test_several_models_each_with_its_optimizer(tmp_path):
    script = """
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
one, two = (torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)) for _ in "ab")
frozen = torch.nn.Linear(256, 8).requires_grad_(False)
first, second = (torch.optim.SGD(model.parameters(), lr=0.01) for model in (one, two))
one, two, frozen, first, second = accelerator.prepare(one, two, frozen, first, second)
x = torch.randn(32, 256)
for step in range(4):
    accelerator.backward((one(x) - frozen(x)).square().mean())
    first.step()
    first.zero_grad()
    if step % 2:
        accelerator.backward(two(x).square().mean())
        second.step()
        second.zero_grad()
"""
    done = run(script, tmp_path, before=("--bits", "2"))
    assert done.code == 0, done.said
    found = json.loads((tmp_path / "report.json").read_text())["models"]
    assert [model["steps"] for model in found] == [4, 2]
    assert all(model["uncompressed_bytes"] > 3 * model["saved_bytes"] > 0 for model in found)


def test_the_flag_wins_over_the_environment(tmp_path):
    script = TRAINER.replace("TRAINER", "Mine = Trainer")
    done = run(script, tmp_path, *SHORT, "--actnn", "L1", before=("--level", "L3"))
    assert done.code == 0, done.said
    assert_compressed(tmp_path, ratio=2, steps=3)
    assert measured(tmp_path)["config"]["level"] == "L1"
    refused = run(script, tmp_path, *SHORT, "--actnn", "L9")
    assert refused.code == 2
    assert "invalid choice: 'L9'" in refused.said


def test_the_flag_in_a_json_file_of_arguments(tmp_path):
    script = TRAINER.replace("TRAINER", "Mine = Trainer").replace(
        "parse_args_into_dataclasses()", "parse_json_file(sys.argv[1])"
    )
    fields = {"output_dir": "out", "max_steps": 1, "report_to": "none", "use_cpu": True, "actnn": "L1"}
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    done = run(script, tmp_path, "fields.json")
    assert done.code == 0, done.said
    assert measured(tmp_path)["config"]["level"] == "L1"


@pytest.mark.parametrize("own", ["callback", "convert"])
def test_a_script_that_compresses_itself_wins_and_is_told(own, tmp_path):
    if own == "callback":
        trainer = "from hf_actnn import ActNNCallback\nfrom functools import partial\n"
        script = TRAINER.replace("TRAINER", trainer + "Mine = partial(Trainer, callbacks=[ActNNCallback('L1')])")
    else:
        script = LOOP.replace("optimizer =", "import hf_actnn\nhf_actnn.convert(model, 'L1')\noptimizer =", 1)
    script += "\nimport hf_actnn\nprint(hf_actnn.report(model).config.level)\n"
    done = run(script, tmp_path, *(SHORT if own == "callback" else []), before=("--level", "L3"))
    assert done.code == 0, done.said
    assert done.printed.splitlines()[-1] == "L1"
    assert done.said.count("itself") == 1
    assert "nothing was compressed" not in done.said
    assert not (tmp_path / "report.json").exists()


def test_checkpoints_are_saved_and_resumed(tmp_path):
    """A run that stops and goes on has the losses of one that does not, the controller's bits included."""
    script = TRAINER.replace("TRAINER", "Mine = Trainer").replace(
        "ViTForImageClassification(transformers.ViTConfig(", "ResNetForImageClassification(transformers.ResNetConfig("
    )
    script = re.sub(
        r"image_size=16.+?num_labels", "embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels",
        script, flags=re.DOTALL,
    )  # fmt: skip
    words = ["4" if word == "3" else "steps" if word == "no" else word for word in SHORT] + ["--save_steps", "2"]
    whole = run(script, tmp_path, *words, before=("--level", "L3"))
    assert whole.code == 0, whole.said
    # In a new process: with another seed of hashes, say. It has the flag too, of a parser that was changed as imported.
    words += ["--resume_from_checkpoint", "out/checkpoint-2", "--actnn", "L3"]
    resumed = run(script, tmp_path, *words, forked=False)
    assert resumed.code == 0, resumed.said
    assert assert_compressed(tmp_path, ratio=3, steps=2)["config"]["level"] == "L3"
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ActNNCallback"]["attributes"]["saved"]["steps"] == 2
    histories = [re.search(r"^history (.+)$", done.printed, re.MULTILINE)[1] for done in (whole, resumed)]
    assert histories[0] == histories[1]


def test_a_loop_saves_and_resumes_the_controller(tmp_path):
    """A loop that stops and goes on has the losses of one that does not; a checkpoint without the state serves too."""
    script = LOOP.replace("for pixels, labels in loader:", """batches = list(loader)
if len(sys.argv) > 1:
    accelerator.load_state(sys.argv[1])
    batches = batches[4:]
for index, (pixels, labels) in enumerate(batches):
    if len(sys.argv) == 1 and index == 4:
        accelerator.save_state("saved")
""").replace(
        'accelerator.backward(model(pixel_values=pixels, labels=labels)["loss"])',
        'loss = model(pixel_values=pixels, labels=labels)["loss"]\n'
        "        print('loss', loss.item())\n"
        "        accelerator.backward(loss)",
    )  # fmt: skip
    whole = run(script, tmp_path, before=("--level", "L3"))
    assert whole.code == 0, whole.said
    resumed = run(script, tmp_path, "saved", before=("--level", "L3"))
    assert resumed.code == 0, resumed.said
    losses = [[line for line in one.printed.splitlines() if line.startswith("loss")] for one in (whole, resumed)]
    assert len(losses[1]) == 4
    assert losses[0][4:] == losses[1]
    (tmp_path / "saved" / "hf_actnn.json").unlink()
    without = run(script, tmp_path, "saved", before=("--level", "L3"))
    assert without.code == 0, without.said
    assert "ActNNWarning" in without.said


# -- scripts that do not ----------------------------------------------------------------------------------------------


def test_a_script_that_trains_nothing(tmp_path):
    done = run("import torch, sys\nprint('ran')\nsys.exit(3)", tmp_path)
    assert (done.code, done.printed) == (3, "ran\n")
    assert "nothing was compressed in this process: the script gave no trainable model" in done.said


@pytest.mark.parametrize("words", [["run", "-m", "torch.distributed.run", "--help"], ["env"]])
def test_what_trains_nothing_by_its_nature_is_not_told(words, tmp_path):
    """A launcher that `hf-actnn run` runs, and the project's other commands where the variable is set."""
    (tmp_path / "sitecustomize.py").write_text("import hf_actnn_startup; hf_actnn_startup.install()")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = start([sys.executable, "-m", "hf_actnn", *words], tmp_path, HF_ACTNN="L3", PYTHONPATH=path)
    assert done.code == 0 and done.printed
    assert "nothing was compressed" not in done.said


def test_a_model_that_was_converted_and_not_trained(tmp_path):
    done = run(TRAINER.replace("TRAINER", "Mine = Trainer").partition("trainer.train")[0], tmp_path, *SHORT)
    assert done.code == 0, done.said
    assert "ViTForImageClassification was converted, but no training forward pass came" in done.said


def test_a_model_that_cannot_be_converted(tmp_path):
    """It stays as it is, which is said when it happens and at the end; training goes on."""
    script = LOOP.replace("optimizer =", "model = torch.compile(model, backend='eager')\noptimizer =", 1)
    done = run(script, tmp_path)
    assert done.code == 0, done.said
    assert "processes 1" in done.printed
    assert "nothing was compressed in this process: OptimizedModule was left as it is: a compiled model" in done.said


def test_a_dynamo_backend_is_refused(tmp_path):
    done = run(LOOP.replace("cpu=True", "cpu=True, dynamo_backend='eager'"), tmp_path)
    assert done.code == 1
    assert "NotAvailableError: What a compiled model keeps cannot be watched from outside its script" in done.said


def test_a_trainer_that_compiles_is_refused(tmp_path):
    """Before it trains: it would be compressed, and said not to be."""
    done = run(
        TRAINER.replace("TRAINER", "Mine = Trainer"),
        tmp_path,
        *SHORT,
        "--torch_compile",
        "--torch_compile_backend",
        "eager",
    )
    assert done.code == 1
    assert "NotAvailableError: What a compiled model keeps cannot be watched from outside its script" in done.said
    assert 'callbacks=[ActNNCallback("L2")]' in done.said and not (tmp_path / "report.json").exists()


def test_nothing_is_imported_that_the_script_does_not(tmp_path):
    names = ["transformers", "accelerate", "timm", "datasets"]
    done = run(f"import sys\nprint([name for name in {names} if name in sys.modules])", tmp_path, forked=False)
    assert done.printed == "[]\n", done.said


def test_a_script_that_raises_has_its_own_traceback(tmp_path):
    script = "def inner():\n    raise ValueError('mine')\n\ninner()\n"
    done = run(script, tmp_path, forked=False)
    plain = start([sys.executable, "script.py"], tmp_path)
    assert done.code == plain.code == 1
    assert re.sub(r'".*script.py"', "script.py", done.said) == re.sub(r'".*script.py"', "script.py", plain.said)


def test_a_missing_package_is_named(tmp_path):
    done = run("import no_such_package.inside", tmp_path)
    assert done.code == 1
    assert "ModuleNotFoundError" in done.said
    assert "needs a package that is not there (at no_such_package)" in done.said


# -- as python would ---------------------------------------------------------------------------------------------------

MIRROR = """
import beside
import json, sys
print(json.dumps([__name__, sys.argv, sys.path[0], __file__, sys.modules["__main__"].__name__, beside.VALUE]))
"""


@pytest.mark.parametrize("form", ["script", "other folder", "link", "package"])
def test_the_script_sees_what_python_shows_it(form, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "beside.py").write_text("VALUE = 5")
    (place / "script.py").write_text(MIRROR)
    (tmp_path / "link.py").symlink_to(place / "script.py")
    (place / "package").mkdir()
    (place / "package" / "__main__.py").write_text(MIRROR.replace("import beside", "from . import beside"))
    (place / "package" / "beside.py").write_text("VALUE = 5")
    folder, words = {
        "script": (place, ["script.py"]),
        "other folder": (tmp_path, ["place/script.py"]),
        "link": (tmp_path, ["link.py"]),
        "package": (place, ["-m", "package"]),
    }[form]
    words += ["--", "-x", "--level", "L1", "--", "last"]
    plain = start([sys.executable, *words], folder)
    command = [sys.executable, "-m", "hf_actnn", "run", "--level", "L2", *words]
    ours = start(command, folder, forked=form not in ("script", "package"))  # a new process, and forks of one
    assert plain.code == ours.code == 0, plain.said + ours.said
    assert ours.printed == plain.printed


# -- the variable ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel and an editable wheel, without compiled kernels."""
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("built")
    project = folder / "project"
    shutil.copytree(ROOT / "hf_actnn", project / "hf_actnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hf_actnn_startup.py"):
        shutil.copy(ROOT / name, project)
    for hook in ("build_wheel", "build_editable"):
        code = f"from setuptools import build_meta; build_meta.{hook}({str(folder)!r})"
        environment = {**os.environ, "HF_ACTNN_BUILD": "none"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return folder


def environment(folder: Path, built: Path, kind: str) -> str:
    """The Python of an environment with this project installed, beside the packages of the one that runs the tests."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    parent = Path(sysconfig.get_paths()["purelib"])
    site = folder / Path(sysconfig.get_paths()["purelib"]).relative_to(sys.prefix)
    (site / "0_parent.pth").write_text(f"{parent}\n")
    for line in parent.glob("*.pth"):
        if "hf_actnn" not in line.name:  # what starts compression is to come from the wheel
            shutil.copy(line, site)
    (wheel,) = (one for one in built.glob("*.whl") if (".editable-" in one.name) == (kind == "editable"))
    with zipfile.ZipFile(wheel) as archive:
        assert "hf_actnn.pth" in archive.read(next(n for n in archive.namelist() if n.endswith("/RECORD"))).decode()
        archive.extractall(site)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> str:
    return environment(tmp_path_factory.mktemp("wheel"), built, "wheel")


@pytest.fixture(scope="module", params=["wheel", "editable"])
def either(request, built, tmp_path_factory) -> str:
    return environment(tmp_path_factory.mktemp(request.param), built, request.param)


def installed(python: str, words: list[str], folder: Path, **environment: str) -> Done:
    """Without the checkout on the path, so that only what was installed counts."""
    return start([python, *words], folder, PYTHONPATH="", HF_ACTNN_REPORT="report.json", **environment)


TOUCHED = """
import sys
loaded = [name for name in sys.modules if "actnn" in name and "__editable__" not in name]
import transformers.trainer, accelerate
methods = [
    transformers.Trainer.__init__, transformers.HfArgumentParser.__init__, accelerate.Accelerator.prepare,
    accelerate.Accelerator.prepare_model, accelerate.optimizer.AcceleratedOptimizer.step,
]
patched = [one.__qualname__ for one in methods if one.__code__.co_filename.endswith("patches.py")]
print(loaded, [one for one in sys.meta_path if type(one).__name__ == "Watch"], patched)
"""


def test_the_variable_in_a_plain_python(either, tmp_path):
    """It trains compressed; what is touched where the variable is set it prints first."""
    (tmp_path / "script.py").write_text(TOUCHED + TRAINER.replace("TRAINER", "Mine = Trainer"))
    done = installed(either, ["script.py", *SHORT], tmp_path, HF_ACTNN="L2")
    assert done.code == 0, done.said
    assert_compressed(tmp_path, ratio=9, steps=3)
    touched = done.printed.splitlines()[0]
    for name in ("hf_actnn_startup", "Watch", "Trainer.__init__", "HfArgumentParser.__init__", "AcceleratedOptimizer"):
        assert name in touched


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)
@pytest.mark.parametrize(("kind", "launcher"), [("trainer", "accelerate"), ("loop", "torchrun")])
def test_the_variable_under_a_launcher_with_two_processes(kind, launcher, python, tmp_path):
    """Each launcher finds its own way to two processes without a GPU."""
    script = TRAINER.replace("TRAINER", "Mine = Trainer") if kind == "trainer" else SMALL_LOOP
    (tmp_path / "script.py").write_text(script)
    words = {
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    options = [*SHORT, "--ddp_backend", "gloo"] if kind == "trainer" else []
    done = installed(python, ["-m", *words, "script.py", *options], tmp_path, HF_ACTNN="L3", ACCELERATE_USE_CPU="true")
    assert done.code == 0, done.said
    # Two processes share four batches of eight, or eight of four with two to a step.
    assert_compressed(tmp_path, ratio=5, steps=3 if kind == "trainer" else 2)
    assert done.said.count("trains at L3") == 1
    assert "nothing was compressed" not in done.said
    assert kind == "trainer" or "processes 2" in done.printed


def test_the_variable_under_accelerate_with_one_process(python, tmp_path):
    (tmp_path / "script.py").write_text(SMALL_LOOP)
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "script.py"]
    done = installed(python, words, tmp_path, HF_ACTNN='{"bits": 2}')
    assert done.code == 0, done.said
    assert_compressed(tmp_path, ratio=9, steps=4)


def test_without_the_variable_nothing_is_touched(either, request, tmp_path):
    """The same lines see all of it where the variable is set, above."""
    (tmp_path / "script.py").write_text(TOUCHED)
    # Not set where the sources are used as they lie; where a wheel is installed, empty.
    empty = {"HF_ACTNN": ""} if request.node.callspec.params["either"] == "wheel" else {}
    done = installed(either, ["script.py"], tmp_path, **empty)
    assert done.printed == "[] [] []\n", done.said
    assert "hf-actnn" not in done.said


def test_the_variable_costs_a_process_without_torch_no_import_of_it(either, tmp_path):
    code = "import sys; print([name for name in sys.modules if name in ('torch', 'hf_actnn', 'hf_actnn_startup')])"
    assert installed(either, ["-c", code], tmp_path, HF_ACTNN="L3").printed == "['hf_actnn_startup']\n"


def test_a_wrong_variable_stops_the_script_when_it_imports_what_trains(python, tmp_path):
    (tmp_path / "script.py").write_text("import accelerate\nprint('too late')")
    done = installed(python, ["script.py"], tmp_path, HF_ACTNN="L9")
    assert done.code == 1
    assert "too late" not in done.printed
    assert "(at the environment variable HF_ACTNN). Expected a level (L0" in done.said
    assert "Received 'L9'" in done.said


BESIDE_OTHERS = """
import sys, zipfile
import hf_actnn_startup

hf_actnn_startup._patch = lambda module: patched.append(module.__name__)
patched = []


class Old:
    pass


class Asking:
    def find_spec(self, name, path=None, target=None):
        others = [one for one in sys.meta_path if one is not self and hasattr(one, "find_spec")]
        return next(filter(None, (one.find_spec(name, path, target) for one in others)), None)


with zipfile.ZipFile("all.zip", "w") as archive:
    for name, source in (("__init__", ""), ("trainer", "from . import other"), ("other", ""), ("hf_argparser", "")):
        archive.writestr(f"transformers/{name}.py", source)
sys.path.insert(0, "all.zip")
hf_actnn_startup.install()
sys.meta_path.insert(0, Asking())
sys.meta_path.insert(2, Old())
import transformers.trainer, transformers.hf_argparser
print(patched)
"""


def test_the_watch_goes_with_other_finders_and_shared_loaders(tmp_path):
    """One that asks all others, one of the old protocol, and the one loader that all modules in a zip file have."""
    (tmp_path / "script.py").write_text(BESIDE_OTHERS)
    done = start([sys.executable, "script.py"], tmp_path)
    assert done.printed == "['transformers.trainer', 'transformers.hf_argparser']\n", done.said


# -- what is wrong before a script runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--level", "L9", "script.py"], "unknown level"),
        (["--bits", "many", "script.py"], "this does not say what to compress (at --bits)"),
        (["--config", "none.json", "script.py"], "none.json"),
        (["--report", "no/such/report.json", "script.py"], "there is no such folder (at --report)"),
        (["--report", ".", "script.py"], "this is a folder (at --report)"),
        (["nowhere.py"], "there is no such script (at nowhere.py)"),
        (["-m", "no_such_module.inside"], "there is no such module (at no_such_module.inside)"),
    ],
)
def test_what_means_nothing_is_refused(words, says, tmp_path):
    (tmp_path / "script.py").write_text("print('ran')")
    new = words == ["nowhere.py"]  # a new process ends as the forks do
    done = start([sys.executable, "-m", "hf_actnn", "run", *words], tmp_path, forked=not new)
    assert (done.code, done.printed) == (2, "")
    assert says in done.said
    assert "Traceback" not in done.said


def test_configurations_in_one_word(tmp_path):
    file = tmp_path / "fields.json"
    file.write_text('{"bits": 3, "group_size": 128}')
    assert parse("L2.5", "here").level == "L2.5"
    assert parse("auto", "here").bits == "auto"
    assert parse(" 2 ", "here").bits == 2
    assert parse("3.5", "here").bits == 3.5
    assert parse('{"level": "L1", "seed": 4}', "here").seed == 4
    assert parse(str(file), "here").group_size == 128
    for wrong in ("", "true", "[2]", "L9", "{"):
        with pytest.raises(ConfigError, match=r"\(at here\)"):
            parse(wrong, "here")
