"""The benchmark for a GPU, up to the device: what it times, how it counts bytes, what it prints and draws."""

import importlib.util
import time

import pytest
import torch

from tests.cuda import shim


class Event:
    """Host time in place of the device's."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def benchmark(monkeypatch, module):
    """Its own calls of kernels go to those that run on the CPU."""
    spec = importlib.util.spec_from_file_location("codec_gpu", shim.ROOT / "benchmarks" / "codec_gpu.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(loaded, "SAMPLES", 4)
    monkeypatch.setattr(loaded.native, "cuda", lambda device: module)
    monkeypatch.setattr(loaded, "launch", lambda kernel, x, *arguments: kernel(*arguments, 0, 0))
    return loaded


def test_rows(benchmark, capsys, tmp_path):
    n = 4 * 2**20
    x = torch.randn(n).bfloat16()
    calls, moved = benchmark.contenders(x, "bf16")
    rows = benchmark.table(benchmark.interleaved(calls, rounds=1, calls=1), moved, n)
    printed = capsys.readouterr().out
    assert "bf16 quantise mixed 1, 2, 2, 4 bits" in printed
    assert "0.80" in printed
    assert rows["bf16 copy"]["of_copy"] == 1.0
    assert moved["bf16 copy"] == 4 * n
    assert moved["bf16 quantise 4 bits"] == 2 * n + n // 2 + 4 * n // 256
    assert moved["bf16 SiLU backward"] == moved["bf16 SiLU backward, two calls"] == 4 * n + n // 4 + 4 * n // 256
    assert moved["bf16 ReLU backward"] == moved["bf16 ReLU backward, two calls"] == 4 * n + n // 8
    for name, row in rows.items():
        assert row["gb_per_s"] == pytest.approx(moved[name] / row["us"] / 1e3, rel=0.02, abs=0.1)
    pytest.importorskip("matplotlib")
    assert benchmark.picture(rows, "a device", tmp_path / "rows.svg")
    assert (tmp_path / "rows.svg").stat().st_size > 0


def test_bytes_are_compared_first(benchmark, monkeypatch):
    benchmark.check_bytes(torch.device("cpu"))
    monkeypatch.setattr(benchmark.ops, "quantize", lambda x, *_: (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(SystemExit, match="bytes are wrong at 2 bits"):
        benchmark.check_bytes(torch.device("cpu"))


def test_gradients_are_compared_first(benchmark, monkeypatch):
    benchmark.check_gradients(torch.device("cpu"))
    monkeypatch.setitem(benchmark.ACTIVATIONS, "GELU", (2, torch.ops.aten.gelu_backward))
    with pytest.raises(SystemExit, match="gradients are wrong for fp32 GELU backward"):
        benchmark.check_gradients(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_nothing_is_measured(benchmark, monkeypatch):
    monkeypatch.setattr("sys.argv", ["codec_gpu.py"])
    with pytest.raises(SystemExit, match="none that torch sees"):
        benchmark.main()
