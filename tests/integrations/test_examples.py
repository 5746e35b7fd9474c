"""Every example runs, in a shortened form of what its page says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launching import free_port
from tests import forks

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
    """What a command of Python prints, run in a fork. What it starts of ours are forks too."""
    assert command[0] == sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = forks.server().run(command[1:], timeout, ROOT, environment, nested=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Street scenes in small: `parquet` files, and `folder`s of images and masks; class 11 is none."""
    import numpy
    from datasets import Dataset, Features
    from datasets import Image as Images
    from PIL import Image

    root = tmp_path_factory.mktemp("scenes")
    noise = numpy.random.default_rng(0)
    (root / "parquet").mkdir()
    for split, count in (("train", 8), ("test", 4)):
        rows: dict[str, list] = {"image": [], "mask": []}
        for index in range(count):
            pixels = noise.integers(0, 255, (24, 32, 3), dtype=numpy.uint8)
            mask = noise.integers(0, 12, (24, 32), dtype=numpy.uint8)
            for column, values in (("image", pixels), ("mask", mask)):
                place = root / "folder" / split / f"{column}s" / f"{index}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(place)
                rows[column].append(str(place))
        data = Dataset.from_dict(rows, features=Features({"image": Images(), "mask": Images()}))
        data.to_parquet(root / "parquet" / f"{split}.parquet")
    return root


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    """Cells in small: `parquet` files, and `folder`s in COCO's format. One image has no box."""
    import numpy
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as Images
    from PIL import Image

    root = tmp_path_factory.mktemp("cells")
    noise = numpy.random.default_rng(0)
    names = ["red", "white"]
    features = Features(
        {
            "image": Images(),
            "objects": {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=names))},
        }
    )
    (root / "parquet").mkdir()
    for split, count in (("train", 8), ("test", 4)):
        folder = root / "folder" / split
        folder.mkdir(parents=True)
        rows: dict[str, list] = {"image": [], "objects": []}
        coco: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        coco["categories"] = [{"id": 7 + index, "name": name} for index, name in enumerate(names)]
        for index in range(count):
            name = f"{index}.png"
            Image.fromarray(noise.integers(0, 255, (48, 64, 3), dtype=numpy.uint8)).save(folder / name)
            boxes = [[4.0 + 9 * at, 5.0, 12.0, 10.0] for at in range(index % 4)]
            rows["image"].append(str(folder / name))
            rows["objects"].append({"bbox": boxes, "category": [at % 2 for at in range(len(boxes))]})
            coco["images"].append({"id": index, "file_name": name})
            coco["annotations"] += [
                {"image_id": index, "bbox": box, "category_id": 7 + at % 2} for at, box in enumerate(boxes)
            ]
        (folder / "annotations.json").write_text(json.dumps(coco))
        Dataset.from_dict(rows, features=features).to_parquet(root / "parquet" / f"{split}.parquet")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """Small models in folders, in place of those on the hub that the pages name."""
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrResNetConfig,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        ViTConfig,
        ViTForImageClassification,
    )

    root = tmp_path_factory.mktemp("models")
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    models = {
        "google/vit-base-patch16-224-in21k": ViTForImageClassification(
            ViTConfig(image_size=32, **json.loads(SMALL_VIT))
        ),
        "nvidia/mit-b0": SegformerForSemanticSegmentation(
            SegformerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2])
        ),
        "PekingU/rtdetr_r18vd": RTDetrForObjectDetection(
            RTDetrConfig(
                backbone_config=backbone,
                encoder_in_channels=[16, 24, 32],
                encoder_hidden_dim=32,
                encoder_ffn_dim=32,
                d_model=32,
                decoder_in_channels=[32, 32, 32],
                decoder_ffn_dim=32,
                decoder_layers=1,
                num_queries=20,
                num_denoising=10,
            )
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name.replace("/", "_"))
    return {name: str(root / name.replace("/", "_")) for name in models}


def commands(example: str) -> list[str]:
    """The commands that an example's page prints, a line each."""
    text = (ROOT / "examples" / example / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


PRINTED = [
    (example, index)
    for example in ("image_classification", "semantic_segmentation", "object_detection")
    for index in range(len(commands(example)))
]


@pytest.mark.parametrize(("example", "index"), PRINTED, ids=lambda value: str(value))
def test_commands_of_the_pages(example, index, pictures, parquet, scenes, cells, trained, tmp_path):
    """As printed, but for the data, the models on the hub, and two steps instead of many."""
    places = {
        "ethz/food101": pictures,
        "path/to/images": pictures,
        "path/to/parquet": parquet,
        "merve/scene_parse_150": scenes / "parquet",
        "path/to/camvid": scenes / "parquet",
        "cppe-5": cells / "parquet",
        "path/to/bccd": cells / "parquet",
    }
    if example != "image_classification":
        places["path/to/folder"] = (scenes if example == "semantic_segmentation" else cells) / "folder"
    words = shlex.split(commands(example)[index])
    hub = next((word for word in words if word in trained), None)
    words = [str(places.get(word, trained.get(word, word))) for word in words]
    if "annotation" in words:  # the name of a column of the dataset that is not there
        words[words.index("annotation")] = "mask"
    for flag in ("--num_train_epochs", "--epochs", "--per_device_train_batch_size", "--batch_size"):
        if flag in words:
            words[words.index(flag) + 1] = "2"
    if hub:
        words += ["--image_size", "32"] if example == "image_classification" else ["--height", "32", "--width", "64"]
    words += ["--max_steps", "2"]
    if words[0] == "accelerate":
        words[:2] = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        printed = run(words)
        assert "bytes per image" in printed
        assert re.search(r"step 2 of 2: loss \d+\.\d+, (accuracy|mean_iou|map) \d\.\d+", printed), printed
        return
    words[0] = sys.executable
    words[words.index("--output_dir") + 1] = str(tmp_path)
    printed = run(words + ["--report_to", "none", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1"])
    assert "actnn_ratio" in printed
    scores = json.loads((tmp_path / "eval_results.json").read_text())
    score = {"image_classification": "accuracy", "semantic_segmentation": "mean_iou", "object_detection": "map_50"}
    assert -1 <= scores[f"eval_{score[example]}"] <= 1
    assert json.loads((tmp_path / "config.json").read_text())["architectures"]


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


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["one_process", "bf16", "ddp", "fsdp2"])
def test_accelerate_launch(configuration, tmp_path):
    """The same script under each configuration; a second run goes on from the first one's checkpoint."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    launch += ["--config_file", f"examples/accelerate/configs/{configuration}.yaml"]
    script = ["examples/accelerate/train.py", "--cpu", "--epochs", "1", "--samples", "128"]
    script += ["--model", "test_resnet"] if configuration == "bf16" else []  # which a CPU may be slow at
    saved = str(tmp_path / "saved")
    printed = run([*launch, *script, "--checkpoint", saved])
    assert printed.count("test accuracy") == 1  # two separate runs would each print it
    ratio = float(printed.split("bytes per image, ")[1].split(" times")[0])
    assert ratio > (5 if configuration != "bf16" else 2)
    if configuration == "one_process":
        again = run([*launch, *script, "--checkpoint", saved])
        assert float(_loss(again)) < float(_loss(printed))


def _loss(printed: str) -> str:
    return printed.split("loss ")[1].split(",")[0]


@pytest.mark.parametrize("index", range(len(commands("by_feature/checkpointing"))))
def test_checkpointing(index):
    """As printed, but for the number of steps."""
    words = shlex.split(commands("by_feature/checkpointing")[index])
    printed = run([sys.executable, *words[1:], "--steps", "2", "--batch_size", "4"])
    held, of_them = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes|of them)", printed))
    assert held > of_them and (of_them > 0) == ("--checkpointing" in words)
    assert re.search(r"after 2 steps .*: loss \d+\.\d+", printed), printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["by_feature/checkpointing/train.py", "--checkpoint_bits", "6"], "name that too"),
        (["by_feature/checkpointing/train.py", "--reentrant"], "name that too"),
        (
            ["by_feature/checkpointing/train.py", "--checkpointing", "--level", "none", "--checkpoint_bits", "6"],
            "needs a level",
        ),
        (["accelerate/train.py", "--cpu", "--samples", "8"], "make no whole batch"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, said):
    with pytest.raises(AssertionError, match=said):
        run([sys.executable, f"examples/{words[0]}", *words[1:]])


@pytest.fixture
def demo(monkeypatch):
    """Its module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    return importlib.import_module("demo")


@pytest.mark.slow
def test_demo(demo, tmp_path, monkeypatch, capsys):
    """Its runs are forks, here, of a process that has imported what they import."""
    trained = []

    def forked(command: list[str], *, env: dict[str, str], **options: Any) -> None:
        assert options.pop("check") and command[0] == sys.executable
        done = forks.server().run(command[1:], 240, ROOT, {**env, "PYTHONPATH": str(ROOT)}, nested=True)
        assert done.returncode == 0, done.stderr[-4000:]
        trained.append(command)

    monkeypatch.setattr(demo.subprocess, "run", forked)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--epochs", "0.1", "--batch", "32"])
    demo.main()
    assert len(trained) == 4 and all(command[-4:] == ["--epochs", "0.1", "--batch", "32"] for command in trained)
    printed = capsys.readouterr().out
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


@pytest.mark.parametrize("heap", [False, True])
@pytest.mark.parametrize("inherited", [{}, {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "1"}])
def test_malloc_in_the_demo(heap, inherited, demo, tmp_path, monkeypatch):
    """A run has the threshold that the demo is about, or glibc's own, whatever the shell has."""
    for name in [one for one in os.environ if one.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    given = []

    def noted(command: list[str], *, env: dict[str, str], **options: Any) -> None:
        given.append(env)
        keys = ("test_accuracy", "activation_bytes_per_image", "ratio", "peak_rss_growth_bytes", "seconds_per_step")
        result = {"model": "vit", "level": "none", "batch": 256, **dict.fromkeys(keys, 1)}
        Path(command[command.index("--result") + 1]).write_text(json.dumps(result))

    monkeypatch.setattr(demo.subprocess, "run", noted)
    monkeypatch.setattr(demo, "picture", lambda results, path: None)
    words = ["demo.py", "--out", str(tmp_path), "--models", "vit", "--levels", "none"]
    monkeypatch.setattr(sys, "argv", [*words, "--heap"] if heap else words)
    demo.main()
    (found,) = given
    malloc = {name: value for name, value in found.items() if name.startswith("MALLOC_")}
    assert malloc == ({} if heap else {"MALLOC_MMAP_THRESHOLD_": "131072"})
    assert found["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(("batch", "trains"), [(0, False), (1, True), (1297, True), (1298, False)])
def test_a_batch_that_the_demo_has_no_images_for_is_refused(batch, trains, monkeypatch, capsys):
    """Before it trains: what comes last reads a whole batch, and would lose the rest."""
    spec = importlib.util.spec_from_file_location("train_of_the_demo", ROOT / "examples" / "demo" / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)

    class Begun(Exception):
        """There is a trainer."""

    def begin(*args: Any, **options: Any) -> None:
        raise Begun

    monkeypatch.setattr(train, "Trainer", begin)
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch", str(batch)])
    with pytest.raises(Begun if trains else SystemExit):
        train.main()
    if not trains:
        assert f"--batch takes 1 to 1297 images, as many as there are to train on, and got {batch}" in (
            capsys.readouterr().err
        )


DATA = os.environ.get("HF_ACTNN_DATA", "")


@pytest.mark.skipif(not DATA, reason="HF_ACTNN_DATA names no folder with the data of cifar10")
def test_cifar10(tmp_path):
    run(
        [*CLASSIFY, "--dataset", f"{DATA}/cifar10", "--model", "resnet10t", "--from_scratch", "--image_size", "32"]
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
