"""Every python block in the README and the docs runs, and every command, as far as this machine can: `ELSEWHERE`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import docs_site  # in tools/, on the path by pyproject.toml
import pytest

from hf_actnn import cli
from tests import forks

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The commands that a page may name, besides python files of this project and targets of the Makefile.
KNOWN = {"make", "pip", "python", "accelerate", "torchrun", "hf-actnn", "git", "ruff", "clang-format", "tools/gpu.sh"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Blocks of one language, each with the line it starts on."""
    text = page.read_text()
    return [
        (text[: match.start()].count("\n") + 2, match.group(2))
        for match in FENCE.finditer(text)
        if match.group(1) == language
    ]


# Pages whose python and bash blocks are one path, from the first to the last: run together, below.
PATHS = [ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in PATHS], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would type them."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    namespace: dict[str, object] = {"__name__": name(page)}
    for line, code in blocks(page, "python"):
        # Blank lines in front make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_the_first_page_names_all_others_and_makes_the_navigation():
    text = (ROOT / "docs" / "index.md").read_text()
    entries = docs_site.navigation(text)
    sections = {title: pages for entry in entries for title, pages in entry.items() if isinstance(pages, list)}
    assert list(sections) == ["Tutorials", "How to", "Reference", "Results", "Explanation"]
    named = [page for pages in sections.values() for entry in pages for page in entry.values()]
    named += [page for entry in entries for page in entry.values() if isinstance(page, str)]
    there = [path for ending in ("*.md", "*.ipynb") for path in (ROOT / "docs").rglob(ending)]
    assert sorted(named) == sorted(str(path.relative_to(ROOT / "docs")) for path in there)
    assert len(re.findall(r"^\* \[", text, re.MULTILINE)) == len(named) - 1  # and this page itself


def test_troubleshooting_quotes_what_is_said():
    """Each heading in code is a part of a text in the source."""
    source = "\n".join(path.read_text() for path in (ROOT / "hf_actnn").rglob("*.py"))
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 30 and [text for text in quoted if text not in source] == []


def test_steps_of_the_quickstart_are_short():
    """Under two minutes of reading each, at 150 words a minute, code included."""
    steps = (ROOT / "docs" / "quickstart.md").read_text().split("\n## ")[1:]
    assert {step.splitlines()[0]: len(step.split()) for step in steps if len(step.split()) > 300} == {}


@pytest.mark.slow
def test_the_notebook_prints_what_is_stored(tmp_path):
    """Where that does not depend on the machine; and nothing in it names one."""
    notebook = pytest.importorskip(
        "docs_notebook", reason="needs nbclient, nbformat and ipykernel", exc_type=ImportError
    )
    (path,) = notebook.NOTEBOOKS
    stored = notebook.nbformat.read(path, as_version=4)
    assert notebook.differences(stored, notebook.executed(path)) == []
    marked = [cell for cell in stored.cells if cell.metadata.get("same")]
    assert len(marked) >= 3 and all(notebook.printed(cell) for cell in marked)
    assert all(cell.outputs or "def " in cell.source for cell in stored.cells if cell.cell_type == "code")
    assert not re.search(r"/(work|home|root|tmp|usr)/|site-packages|://(?!localhost)", path.read_text())
    marked[0].outputs[0]["text"] += "1"
    assert notebook.differences(stored, notebook.nbformat.read(path, as_version=4))


def test_the_table_of_parts_names_every_module():
    """Of the folders whose modules it lists."""
    table = (ROOT / "docs" / "architecture.md").read_text()
    for folder in ("saving", "precision"):
        (row,) = re.findall(rf"^\| `{folder}/` \|.*$", table, re.MULTILINE)
        modules = {path.stem for path in (ROOT / "hf_actnn" / folder).iterdir() if not path.name.startswith("_")}
        assert modules <= set(re.findall(r"`(\w+)/?`", row)), folder


def words_of(block: str) -> list[list[str]]:
    """Each command of a bash block, as words; continued lines joined, comments dropped."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]  # an environment variable set in front
        if words:
            found.append(words)
    return found


def commands(page: Path) -> list[list[str]]:
    """Each command of the page's bash blocks."""
    return [words for _, block in blocks(page, "bash") for words in words_of(block)]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{name(page)}: {' '.join(w)[:60]}" for page, w in COMMANDS])
def test_commands_exist(page, words):
    assert words[0] in KNOWN, f"{name(page)} runs {words[0]!r}; add it to KNOWN if it is meant"
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    for word in words[1:]:
        if word.endswith((".py", ".sh")):
            assert (ROOT / word).is_file() or word in written(page), f"{name(page)} names {word}"


# What the commands that start a script stand for, with the Python that runs the tests.
STARTERS = {
    "hf-actnn": ["-m", "hf_actnn"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    "torchrun": ["-m", "torch.distributed.run"],
}


def written(page: Path) -> list[str]:
    """The scripts that a python block of the page writes for its commands."""
    return re.findall(r'Path\("(\w+\.py)"\)\.write_text', page.read_text())


#: What libstdc++ says where a C++ thread is still running when its process ends: torch's gloo threads at times do.
ABORTED_AT_THE_END = "terminate called without an active exception"


def finished(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A run of Python; a second one where two processes were started and torch aborted at the end of one."""
    done = forks.server().run(words, 180, folder, environment, nested=True)
    if done.returncode and "torch.distributed.run" in words and ABORTED_AT_THE_END in done.stderr:
        done = forks.server().run(words, 180, folder, environment, nested=True)
    return done


#: Blocks of a path that are not run here: they install, or make an environment (tests/test_release.py does).
NOT_RUN = {"pip", "make"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PATHS, ids=name)
def test_a_path_runs_as_it_is_written(page, tmp_path, monkeypatch):
    """Python and bash in the page's order, in one folder: what a block writes is there for the next."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    namespace: dict[str, object] = {"__name__": name(page)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = 0
    for match in FENCE.finditer(page.read_text()):
        language, code = match.groups()
        if language == "python":
            exec(compile(code, str(page), "exec"), namespace)
            continue
        for words in words_of(code):
            if words[0] in NOT_RUN:
                continue
            command = [*STARTERS.get(words[0], []), *words[1:]]
            done = forks.server().run(command, 900, tmp_path, environment, nested=True)
            assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran >= 2


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if written(page)], ids=name)
def test_commands_run_the_scripts_that_a_page_writes(page, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    for _, code in blocks(page, "python"):
        if "write_text" in code:
            exec(code, {})
    ran = 0
    for words in commands(page):
        if set(words) & set(written(page)):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            command = [*STARTERS[words[0]], *words[1:]]
            done = finished(command, tmp_path, environment)
            assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
            assert "hf_actnn" not in " ".join(command) or "times fewer bytes" in done.stderr, done.stderr
            ran += 1
    assert ran


#: Commands that are not run by these tests, each with the reason.
ELSEWHERE = {
    r"make \w+": "the targets are what runs these tests, or do the same",
    r"pip install .*": "tests/test_release.py installs, into an environment of its own",
    r"python benchmarks/step_gpu.py( --models .*)?": "needs a GPU",
    r"python benchmarks/max_batch.py --precision .*": "needs a GPU",
    r"hf-actnn estimate (vit_tiny|mine:).*": "takes minutes; that of the README and the quickstart is run",
    r"accelerate launch --config_file examples/.*": "tests/integrations/test_examples.py runs each, with fewer images",
    r"python benchmarks/max_batch.py --device cpu .*": "takes an hour; tests/test_max_batch.py runs it small",
}
#: The commands of the README and of docs/ that no other test runs.
OTHERS = [
    (page, words)
    for page, words in COMMANDS
    if (page == ROOT / "README.md" or ROOT / "docs" in page.parents)
    and page not in PATHS
    and words not in [one for path in PATHS for one in commands(path)]  # which is run as it is written
    and not set(words) & set(written(page))
    and not any(re.fullmatch(one, " ".join(words)) for one in ELSEWHERE)
]


def test_each_reason_not_to_run_a_command_is_one_of_a_command():
    assert all(any(re.fullmatch(one, " ".join(words)) for _, words in COMMANDS) for one in ELSEWHERE)


def pictures(folder: Path) -> None:
    """CIFAR-10's files, with a few random pictures in them."""
    datasets = pytest.importorskip("datasets")
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    draw = numpy.random.default_rng(0)
    rows = {
        "image": [image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype="uint8")) for _ in range(40)],
        "label": [number % 10 for number in range(40)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), OTHERS, ids=[f"{name(page)}: {' '.join(w)[:60]}" for page, w in OTHERS])
def test_commands_run(page, words, tmp_path):
    """As they are written, in a folder with what the page says is there."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for code, file in re.findall(
        r"```python\n((?:(?!```).)*)```\n\nIn a file `(\w+\.py)`", page.read_text(), re.DOTALL
    ):
        (tmp_path / file).write_text(code)
    if "DATA" in words:
        pictures(tmp_path / "DATA" / "cifar10")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*STARTERS.get(words[0], []), *words[1 if words[0] in {*STARTERS, "python"} else 0 :]]
    done = forks.server().run(command, 900, tmp_path, environment, nested=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "words", [words[1:] for _, words in COMMANDS if words[0] == "hf-actnn"], ids=lambda words: " ".join(words)[:60]
)
def test_the_command_line_takes_what_the_pages_give_it(words):
    cli.parser().parse_args(words)


def script_and_options(words: list[str]) -> tuple[str, list[str]] | None:
    """The example a command runs, whoever launches it, with the options given to it."""
    for index, word in enumerate(words):
        if word.startswith("examples/") and word.endswith(".py"):
            return word, [option.split("=")[0] for option in words[index + 1 :] if option.startswith("--")]
    return None


RUNS = sorted({script: None for _, words in COMMANDS if (found := script_and_options(words)) for script in [found[0]]})


@pytest.mark.parametrize("script", RUNS)
def test_examples_take_the_options_their_pages_name(script):
    done = forks.server().run([script, "--help"], 180, ROOT, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[\w-]+", done.stdout))
    for page, words in COMMANDS:
        found = script_and_options(words)
        if found and found[0] == script:
            assert set(found[1]) <= known, f"{name(page)}: {set(found[1]) - known}"


def test_links_lead_somewhere():
    """Relative links between the pages of the repository."""
    broken = []
    for page in PAGES + [ROOT / "CHANGELOG.md"]:
        text = re.sub(FENCE, "", page.read_text())
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{name(page)}: {target}")
    assert not broken, broken
