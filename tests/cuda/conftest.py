"""The kernels' sources, compiled for the CPU once for all tests and workers."""

import importlib.util
import os

import pytest

from tests.cuda import shim


def folder(tmp_path_factory):
    """Where what is compiled lies: workers of pytest-xdist have a folder each, side by side."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_shim"


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Where compiled units lie, by what they were made of: a source that differs in one unit takes the others over."""
    return folder(tmp_path_factory) / "objects"


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """The path of the compiled runner."""
    return shim.build(folder(tmp_path_factory))


@pytest.fixture
def kernels(runner):
    """A process that runs kernels; see :class:`shim.Shim`."""
    running = shim.Shim(runner)
    yield running
    running.close()


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    """The Python module of the CUDA kernels, running on the CPU."""
    path = shim.build_module(folder(tmp_path_factory))
    spec = importlib.util.spec_from_file_location("hf_actnn._native_cuda", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
