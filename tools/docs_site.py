"""Hooks of mkdocs: the navigation is what docs/index.md lists, and names in docstrings lose their roles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def navigation(index: str) -> list[Any]:
    """From the text of the first page: its sections, and in each the pages that its list names."""
    nav: list[Any] = [{"Home": "index.md"}]
    place = nav
    for line in index.splitlines():
        if section := re.fullmatch(r"## (.+)", line):
            place = []
            nav.append({section[1]: place})
        elif page := re.match(r"\* \[([^]]+)\]\(([^)]+)\):", line):
            place.append({page[1]: page[2]})
    return nav


def on_config(config: Any) -> Any:
    """Called by mkdocs when it has read its configuration."""
    config.nav = navigation((Path(config.docs_dir) / "index.md").read_text(encoding="utf-8"))
    return config


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called by mkdocs with each page: :func:`name` of a docstring is `name` there."""
    return re.sub(r":(?:func|class|meth|attr|mod):(?=<code)", "", html)
