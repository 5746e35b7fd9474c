"""`hf-actnn env`, and what is refused. `hf-actnn run` is in tests/integrations/test_run.py."""

from __future__ import annotations

import json

import pytest
import torch

import hf_actnn
from hf_actnn import cli


def test_env_names_versions_machine_and_kernels(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "cpu_kernels" in printed
    assert "cuda_kernels" in printed


def test_env_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu_kernels"]["available"] or found["cpu_kernels"]["reason"]


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hf-actnn {hf_actnn.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "env"),
        (["guess"], "env"),
        (["run"], "required: script"),
        (["run", "--level", "L3", "--bits", "2", "script.py"], "not allowed with argument --level"),
    ],
)
def test_what_is_not_there_is_not_offered(words, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
