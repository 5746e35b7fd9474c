"""Two threads, which show what one would hide: how a kernel's work is divided."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
