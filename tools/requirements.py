"""Prints what an extra of pyproject.toml asks for, one requirement per line, without building the package.

python tools/requirements.py timm hf     # the package's own dependencies and those of the named extras
python tools/requirements.py --build     # what building it needs
python tools/requirements.py --lowest hf # as the first, each host library at the lowest version it may have
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip carries the same parser
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Resolve extras, following those that name other extras of the same project.

    Args:
        project: the `[project]` table.
        extras: names of extras.

    Raises:
        SystemExit: an extra that the project does not have.
    """
    found: dict[str, None] = dict.fromkeys(project["dependencies"])
    for extra in extras:
        table = project["optional-dependencies"]
        if extra not in table:
            raise SystemExit(f"pyproject.toml has no extra named {extra!r}; it has {', '.join(sorted(table))}")
        for requirement in table[extra]:
            own = re.fullmatch(re.escape(project["name"]) + r"\[(.+)\]", requirement)
            inner = requirements(project, own.group(1).split(",")) if own else [requirement]
            found.update(dict.fromkeys(inner))
    return list(found)


#: Libraries that are run at both ends of the range that pyproject.toml allows.
HOSTS = ("timm", "transformers", "accelerate")


def lowest(requirement: str) -> str:
    """`timm>=1.0` -> `timm==1.0`, for host libraries alone."""
    name, found, version = requirement.partition(">=")
    return f"{name}=={version}" if found and name in HOSTS else requirement


if __name__ == "__main__":
    table = tomllib.loads(PYPROJECT.read_text())
    if sys.argv[1:] == ["--build"]:
        print("\n".join(table["build-system"]["requires"]))
    elif sys.argv[1:2] == ["--lowest"]:
        print("\n".join(map(lowest, requirements(table["project"], sys.argv[2:]))))
    else:
        print("\n".join(requirements(table["project"], sys.argv[1:])))
