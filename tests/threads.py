"""Several threads that do the same, each with its number; what one of them raises is raised here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def in_threads(work: Callable[[int], object], count: int) -> list[object]:
    """What ``work(0)`` to ``work(count - 1)`` return."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))
