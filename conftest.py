"""Set-up for every test: how many threads, and a torchvision that can be imported beside a torch without CUDA."""

from __future__ import annotations

import os

import pytest

# Before torch is imported. Two workers share a small machine, and threads that wait for each other at the end of every
# small operation, for cores that the other worker has, take several times as long as one. What starts processes hands
# it on.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Waiting threads sleep instead of spinning: beside another busy process spinning makes a test many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the tests needs the network; a look-up that times out would only be slow.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torchvision_without_cuda  # in tools/, on the path by pyproject.toml

torchvision_without_cuda.install()


@pytest.fixture
def own_threads():
    """How many a test has. Those of the codec have two (tests/codec/conftest.py)."""
    return 1


@pytest.fixture(autouse=True)
def threads(own_threads):
    """So many, whatever an earlier test has set."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(own_threads)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    """Slow tests come first, and tests for the GPU are skipped, with the reason, where there is none."""
    import torch

    _slow_ones_first(items)

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    """What was imported stays: a collection of garbage does not look through it, which takes half a second."""
    import gc

    gc.collect()
    gc.freeze()


def _slow_ones_first(items):
    """In each half of them: two workers begin with a half each, and the last to run are then short. A file's other
    tests are in one half: what they share is made once."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    first = max(0, len(items) // 2 - len(slow[::2]))
    while 0 < first < len(others) and others[first].path == others[first - 1].path:
        first += 1
    items[:] = [*slow[::2], *others[:first], *slow[1::2], *others[first:]]
