"""Two threads, which show what one would hide: how a kernel's work is divided."""

from __future__ import annotations

import pytest


@pytest.fixture
def own_threads():
    return 2
