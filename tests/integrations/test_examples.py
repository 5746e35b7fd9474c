"""Every example runs, in a shortened form of what its page says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("timm")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
datasets_of_sklearn = pytest.importorskip("sklearn.datasets")

CLASSIFY = [sys.executable, "examples/image_classification/train.py"]
SMALL_VIT = (
    '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "patch_size": 8}'
)
SHORT = [
    *("--per_device_train_batch_size", "16", "--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no"),
    *("--report_to", "none", "--use_cpu", "--disable_tqdm", "True"),
]


def run(command: list[str], timeout: int = 240) -> str:
    """What a command prints. Everything it started is ended if it takes too long: a launcher's workers outlive it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, f"{' '.join(command)}\n{printed[-2000:]}\n{errors[-4000:]}"
    return printed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Digits as PNG files, one folder per class, in a train and a test split."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    images, labels = datasets_of_sklearn.load_digits(return_X_y=True)
    for index in range(120):
        split = "train" if index < 90 else "test"
        place = folder / split / str(labels[index] % 3)
        place.mkdir(parents=True, exist_ok=True)
        pixels = (images[index].reshape(8, 8) * 15).astype("uint8")
        Image.fromarray(pixels).resize((16, 16)).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def parquet(pictures, tmp_path_factory) -> Path:
    """The same as parquet files, with other column names than `image` and `label`."""
    from datasets import load_dataset

    folder = tmp_path_factory.mktemp("parquet")
    data = load_dataset("imagefolder", data_dir=str(pictures)).rename_columns({"image": "picture", "label": "class"})
    for split, part in data.items():
        part.to_parquet(folder / f"{split}.parquet")
    return folder


def check_classifier(output: Path, architecture: str) -> None:
    metrics = json.loads((output / "eval_results.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert json.loads((output / "config.json").read_text())["architectures"] == [architecture]


def test_image_folder_with_a_timm_network(pictures, tmp_path):
    printed = run(
        [*CLASSIFY, "--dataset", str(pictures), "--model", "resnet10t", "--from_scratch", "--image_size", "32"]
        + ["--random_flip", "False", "--actnn", "L2", "--output_dir", str(tmp_path), *SHORT]
    )
    assert "actnn_ratio" in printed
    check_classifier(tmp_path, "TimmWrapperForImageClassification")


def test_parquet_files_with_a_transformer(parquet, tmp_path):
    printed = run(
        [*CLASSIFY, "--dataset", str(parquet), "--model", "vit", "--from_scratch", "--config_overrides", SMALL_VIT]
        + ["--image_size", "32", "--actnn_config", '{"bits": 2}', "--output_dir", str(tmp_path), *SHORT]
    )
    assert "actnn_ratio" in printed
    check_classifier(tmp_path, "ViTForImageClassification")


def test_saved_model_is_trained_on_without_compression(pictures, tmp_path):
    """What one run saves is what the next starts from, and without the flag nothing is compressed."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(
        [*CLASSIFY, "--dataset", str(pictures), "--model", "vit", "--from_scratch", "--config_overrides", SMALL_VIT]
        + ["--image_size", "32", "--actnn", "L2", "--output_dir", str(first), *SHORT]
    )
    printed = run(
        [*CLASSIFY, "--dataset", str(pictures), "--model", str(first), "--image_size", "32"]
        + ["--output_dir", str(second), *SHORT]
    )
    assert "actnn_ratio" not in printed
    check_classifier(second, "ViTForImageClassification")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_launch(precision):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    printed = run([*launch, "examples/accelerate/train.py", "--epochs", "1", "--mixed_precision", precision])
    assert "test accuracy" in printed
    ratio = float(printed.split("bytes per image, ")[1].split(" times")[0])
    assert ratio > (5 if precision == "no" else 2)


def test_two_processes():
    """Distributed data parallel around a converted model: both processes train, and stay in step."""
    printed = run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + ["examples/accelerate/train.py", "--epochs", "1", "--cpu"]
    )
    assert printed.count("test accuracy") == 1  # two separate runs would each print it


def test_demo(tmp_path):
    printed = run([sys.executable, "examples/demo/demo.py", "--out", str(tmp_path), "--epochs", "0.1"])
    assert "test accuracy" in printed
    assert printed.count("uncompressed") >= 2
    runs = json.loads((tmp_path / "demo.json").read_text())["runs"]
    assert [(one["model"], one["level"]) for one in runs] == [
        ("vit", "none"),
        ("vit", "L2"),
        ("resnet", "none"),
        ("resnet", "L2"),
    ]
    for plain, ours in zip(runs[::2], runs[1::2], strict=True):
        assert plain["ratio"] == 1
        assert ours["ratio"] >= 7
        assert ours["activation_bytes_per_image"] < plain["activation_bytes_per_image"] / 7
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


CIFAR = os.environ.get("HF_ACTNN_CIFAR10", "")


@pytest.mark.skipif(not CIFAR, reason="HF_ACTNN_CIFAR10 names no folder with train.parquet and test.parquet")
def test_cifar10(tmp_path):
    run(
        [*CLASSIFY, "--dataset", CIFAR, "--model", "resnet10t", "--from_scratch", "--image_size", "32"]
        + ["--max_train_samples", "2000", "--max_eval_samples", "500", "--actnn", "L2", "--learning_rate", "2e-3"]
        + ["--output_dir", str(tmp_path), *SHORT, "--max_steps", "100"]
    )
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_accuracy"] > 0.25


def test_convert_before_prepare_keeps_the_model_converted():
    """In one process and in one breath: autocast is put around a model that is converted already."""
    import timm
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    import hf_actnn

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        torch.manual_seed(0)
        model = hf_actnn.convert(timm.create_model("resnet10t", num_classes=4), "L2")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        with hf_actnn.track_memory(model) as memory:
            loss = prepared(torch.randn(8, 3, 32, 32)).square().mean()
        before = model.fc.weight.detach().clone()
        accelerator.backward(loss)
        optimizer.step()
        assert hf_actnn.is_converted(accelerator.unwrap_model(prepared))
        assert memory.ratio > 2
        assert not torch.equal(before, model.fc.weight)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
