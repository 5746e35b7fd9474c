"""Prints what an extra of pyproject.toml asks for, one requirement per line, without building the package.

python tools/requirements.py timm hf     # the package's own dependencies and those of the named extras
python tools/requirements.py --build     # what building it needs
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


if __name__ == "__main__":
    table = tomllib.loads(PYPROJECT.read_text())
    if sys.argv[1:] == ["--build"]:
        print("\n".join(table["build-system"]["requires"]))
    else:
        print("\n".join(requirements(table["project"], sys.argv[1:])))
