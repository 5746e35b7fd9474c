"""The estimator behind the page of fidelity: right where the variance is known, and told apart from bias."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_actnn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("timm")
import fidelity


class _Linear(nn.Module):
    """Ten classes by one layer, so that the gradient's variance under rounding is a sum over the input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.op = nn.Linear(256, 10, bias=False)

    def forward(self, x):
        return self.op(x)


def _batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 256, generator=generator), torch.randint(0, 10, (32,), generator=generator)


def test_variance_of_a_linear_layer():
    """Var(dW) = sum over rows of |dy|^2 times the variance of the row's codes, step^2 f (1 - f) for each value."""
    torch.manual_seed(0)
    model, (values, labels) = _Linear(), _batch()
    exact = fidelity.gradient(model, values, labels)
    logits = model(values).requires_grad_()
    (dy,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), logits)
    packed = hf_actnn.quantize(values, 3, row_length=256)
    minimum, step = packed.meta.double().unbind(-1)
    place = (values.double() - minimum[:, None]) / step[:, None]
    variance = (step[:, None].square() * (place % 1) * (1 - place % 1)).sum(1)
    expected = (dy.double().square().sum(1) * variance).sum() / exact.double().square().sum()
    with fidelity.independently():
        found = fidelity.relative_variance(model, (values, labels), exact, 3, "once", draws=400)
    assert abs(found["variance"] - expected) < 5 * found["standard_error"]
    assert abs(found["squared_bias"]) < 0.02 * found["variance"]
    assert not hf_actnn.is_converted(model)


def test_bias_is_seen():
    torch.manual_seed(0)
    model, batch = _Linear(), _batch()
    exact = fidelity.gradient(model, *batch)
    found = fidelity.relative_variance(model, batch, 1.1 * exact, 6, "once", draws=50)
    assert abs(found["squared_bias"] - (0.1 / 1.1) ** 2) < 1e-3


def test_other_ways_keep_more():
    torch.manual_seed(0)
    model = fidelity.vit(64, 1)
    batch = (torch.randn(4, 3, 32, 32), torch.arange(4))
    exact = fidelity.gradient(model, *batch)
    held = {
        way: fidelity.relative_variance(model, batch, exact, 4, way, draws=2)["bytes"] for way in ("once", "separately")
    }
    assert held["separately"] > 1.3 * held["once"]
    again = fidelity.relative_variance(model, batch, exact, 4, "once", draws=2)
    assert again["bytes"] == held["once"]  # what was patched is as it was


@pytest.mark.parametrize("row", [256, 4096])
@pytest.mark.parametrize("bits", [2, torch.tensor([1, 2] * 10, dtype=torch.uint8)], ids=["2", "mixed"])
def test_no_two_roundings_are_related_where_a_way_says_so(bits, row):
    x = torch.full((20, row), 0.5)
    x[:, 0::256], x[:, 1::256] = 0.0, 1.0

    def largest() -> float:
        found = torch.stack([hf_actnn.codec.quantize(x, bits, seed=seed).dequantize() for seed in range(200)])
        up = (found.view(200, 5, 4, row)[..., 2:130] > 0.5).double().view(1000, -1) * 2 - 1
        return float((up.T @ up / len(up)).fill_diagonal_(0).abs().max())

    assert largest() > 0.9
    with fidelity.independently():
        assert largest() < 6 / 1000**0.5
    assert largest() > 0.9  # what was patched is as it was


def test_mirrored_roundings_against_independent_ones(tmp_path, monkeypatch):
    """A convolution whose gradient is alike everywhere, and what a file of results says of it."""
    import mirrored

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(5, 10, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    batch = torch.randn(4, 5, 32, 32), torch.arange(4)  # rows as long as an image's
    size = sum(p.numel() for p in model.parameters())
    row = mirrored.measured(model, {"level": "L2", "bits": 2}, None, batch, 40, torch.full((size,), 3.0))
    assert row["weighted_ratio"] == pytest.approx(row["ratio"])
    assert row["ratio"] < 0.75 and 0 < row["ratio_standard_error"] < 0.2
    assert row["ratio"] == row["mirrored"]["variance"] / row["independent"]["variance"]
    assert not hf_actnn.is_converted(model)
    assert mirrored.alike(model, batch) == {"0": pytest.approx([1.0, 1.0])}


@pytest.mark.parametrize(("way", "straddles"), [("once", False), ("straddling", True), ("original", True)])
def test_groups_lie_as_the_way_says(way, straddles, monkeypatch):
    """In rows of a token's values, or over the whole tensor."""
    lengths = []

    def quantize(x, *args, quantize=hf_actnn.codec.quantize, **kwargs):
        lengths.append((kwargs["row_length"], x.numel()))
        return quantize(x, *args, **kwargs)

    monkeypatch.setattr(hf_actnn.codec, "quantize", quantize)
    torch.manual_seed(0)
    model = hf_actnn.convert(fidelity.vit(64, 1), bits=2)
    with fidelity.WAYS[way]():
        model(torch.randn(4, 3, 32, 32))
    assert len(lengths) > 4
    tokens = [(length, numel) for length, numel in lengths if numel % 64 == 0]
    assert all((length == numel) == straddles for length, numel in tokens)


def test_the_page_of_the_codec_says_what_mirrored_roundings_came_to():
    root = Path(__file__).parent.parent
    rows = json.loads((root / "benchmarks" / "results" / "mirrored.json").read_text())["rows"]
    page = " ".join((root / "docs" / "codec.md").read_text().split())
    titles = {"resnet20": "a ResNet-20", "swin": "a Swin", "vit_192": "a ViT", "convnext": "a ConvNeXt"}
    assert {row["model"] for row in rows} == set(titles)
    for model, title in titles.items():
        known = [row for row in rows if row["model"] == model and row["independent"]["variance"] < 20]
        as_adam, plain = ([row[key] for row in known] for key in ("weighted_ratio", "ratio"))
        said = f"{min(as_adam):.2f} to {max(as_adam):.2f} in {title} ({min(plain):.2f} to {max(plain):.2f})"
        assert said in page
