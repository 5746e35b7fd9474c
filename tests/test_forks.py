"""What a fork does is what a new process would do, as far as its callers can tell."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests import forks

if not os.path.exists("/proc/self/stat"):
    pytest.skip("looks for processes in /proc", allow_module_level=True)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ACTNN", "L2")
        made = forks.Forks(("numpy", "torch"))
    yield made
    made.end()


def run(server, tmp_path, script: str, *words: str, timeout: float = 60, **environment: str):
    (tmp_path / "script.py").write_text(script)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_ACTNN")}
    environment = {**inherited, "PYTHONPATH": str(forks.ROOT), **environment}
    return server.run(["script.py", *words], timeout, tmp_path, environment)


def test_what_is_printed_and_how_it_ends(server, tmp_path):
    script = "import atexit, os, sys\natexit.register(print, 'at the end')\nprint(sys.argv, os.getcwd(), __name__)\n"
    done = run(server, tmp_path, script + "sys.exit(3)", "a", "b")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"['script.py', 'a', 'b'] {tmp_path} __main__\nat the end\n"
    done = run(server, tmp_path, "raise ValueError('mine')")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.endswith("ValueError: mine\n")
    assert run(server, tmp_path, "import os; os.kill(os.getpid(), 9)").returncode == -9
    assert run(server, tmp_path, "").returncode == 0


def test_it_has_the_environment_that_it_is_given(server, tmp_path):
    script = "import os, sys, torch\nprint(os.environ.get('MINE'), os.environ.get('HF_ACTNN'), torch.get_num_threads())"
    script += "\nprint([name for name in sys.modules if 'actnn' in name and '__editable__' not in name])"
    assert run(server, tmp_path, script, MINE="yes", OMP_NUM_THREADS="2").stdout == "yes None 2\n[]\n"
    assert run(server, tmp_path, script, HF_ACTNN="L3", OMP_NUM_THREADS="1").stdout == "None L3 1\n[]\n"


def test_each_draws_numbers_of_its_own(server, tmp_path):
    script = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    one, other = (run(server, tmp_path, script).stdout.split() for _ in range(2))
    assert len(one) == 2 and not set(one) & set(other)


def test_what_takes_too_long_is_ended_with_all_it_started(server, tmp_path):
    script = "import pathlib, subprocess, time\nstarted = subprocess.Popen(['sleep', '60'])\n"
    script += "pathlib.Path('pid').write_text(str(started.pid))\ntime.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        run(server, tmp_path, script, timeout=5)
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while time.monotonic() < until and _is_alive(pid):
        time.sleep(0.1)
    assert not _is_alive(pid)
    assert run(server, tmp_path, "print('next')").stdout == "next\n"


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


NESTED = """
import os, subprocess, sys
if sys.argv[1:]:
    print(os.getppid(), os.environ.get("MINE"), "torch" in sys.modules, sys.argv[1:], flush=True)
    sys.exit(5)
mine = {**os.environ, "MINE": "yes"}
for more in ({}, {"HF_ACTNN": "L2"}):
    done = subprocess.run([sys.executable, "-u", "script.py", "a"], env=mine | more, capture_output=True, text=True)
    print(done.returncode, done.stdout.replace(str(os.getpid()), "parent"), done.stderr, sep="|", end="")
print(subprocess.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], stdout=-1).stdout)
"""


def test_what_it_starts_is_a_fork_where_that_is_asked_for(server, tmp_path):
    """But not what reads HF_ACTNN as it starts, and not other commands."""
    (tmp_path / "script.py").write_text(NESTED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_ACTNN")}
    done = server.run(["script.py"], 60, tmp_path, environment, nested=True)
    assert (done.returncode, done.stderr) == (0, "")
    forked, started, other = done.stdout.splitlines()[0], done.stdout.splitlines()[1], done.stdout.splitlines()[2]
    assert (
        forked == "5|parent yes True ['a']" and started == "|5|parent yes False ['a']" and other.endswith("b'False\\n'")
    )
    done = server.run(["script.py"], 60, tmp_path, environment)
    assert done.stdout.splitlines()[0] == "5|parent yes False ['a']"


READING = """
import os, subprocess, sys
if sys.argv[1:]:
    print(sys.stdin.read(), "torch" in sys.modules)
    sys.exit(0)
told = {"text": True, "stdout": subprocess.PIPE, "input": "abc", "timeout": 20}
print(subprocess.run([sys.executable, "script.py", "read"], **told).stdout, end="")
print(subprocess.run([sys.executable, "script.py", "read"], umask=0o77, **told).stdout, end="")
"""


def test_what_it_starts_reads_to_the_end_of_what_it_is_given(server, tmp_path):
    """And what asks for more than a fork can do is a new process."""
    (tmp_path / "script.py").write_text(READING)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_ACTNN")}
    done = server.run(["script.py"], 60, tmp_path, environment, nested=True)
    assert (done.returncode, done.stdout) == (0, "abc True\nabc False\n"), done.stderr
