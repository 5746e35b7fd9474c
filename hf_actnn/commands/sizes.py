"""Bytes in words: what a command is told, and what it prints."""

from __future__ import annotations

import re

from hf_actnn.errors import ConfigError, message

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def parse(text: str) -> int:
    """Bytes of `16GB`, `1.5GiB`, `500MB`.

    Raises:
        ConfigError: it is none of that kind, or none at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text.strip())
    size = int(float(found.group(1)) * UNITS[found.group(2)]) if found else 0
    if not size:
        raise ConfigError(
            message(
                "this is no amount of memory",
                expected="something like 16GB, 1.5GiB or 500MB",
                received=repr(text),
                next_step="Give a number and a unit",
            )
        )
    return size


def megabytes(nbytes: float) -> str:
    """As MB, with digits where there are few of them."""
    size = nbytes / 1e6
    return f"{size:,.0f}" if size >= 1000 else f"{size:.1f}" if size >= 10 else f"{size:.3f}"
