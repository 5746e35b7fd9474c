"""The kernels' sources, compiled for the CPU once for all tests and workers."""

import os

import pytest

from tests.cuda import shim


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """The path of the compiled runner."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, side by side.
    return shim.build((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_shim")


@pytest.fixture
def kernels(runner):
    """A process that runs kernels; see :class:`shim.Shim`."""
    running = shim.Shim(runner)
    yield running
    running.close()
