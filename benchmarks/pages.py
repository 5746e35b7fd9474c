"""Sections of pages that benchmarks write, between two comments of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_section(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands between ``<!-- name: begin. ... -->`` and ``<!-- name: end -->``."""
    head, rest = page.read_text().split(f"<!-- {name}: begin.", 1)
    first, rest = rest.split("\n", 1)
    tail = rest.split(f"<!-- {name}: end -->", 1)[1]
    section = "\n".join(["", *lines, ""])
    page.write_text(f"{head}<!-- {name}: begin.{first}\n{section}\n<!-- {name}: end -->{tail}")
