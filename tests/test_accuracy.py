"""The comparison with the scheme of the paper: the baseline is what it says, and the grid what is asked of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_actnn import codec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "accuracy"), str(ROOT / "benchmarks")]
pytest.importorskip("transformers")
import original  # noqa: E402
import run  # noqa: E402


class Net(nn.Module):
    """Two layers that save the same tensor, and a loss outside of the submodules."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 8, 3)
        self.right = nn.Conv2d(16, 8, 3)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x, labels):
        x = self.stem(x)
        x = self.share * self.relu(self.left(x)) + self.right(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(), torch.randn(16, 3, 12, 12), torch.randint(4, (16,))


def gradient(model, x, labels, scheme=None):
    model.zero_grad()
    if scheme is None:
        loss = model(x, labels)
    else:
        with scheme.forward():
            loss = model(x, labels)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_loss_is_exact_and_eight_bits_are_close(net):
    loss, exact = gradient(*net)
    coded_loss, coded = gradient(*net, original.Original(net[0], 8))
    assert coded_loss == loss
    assert 0 < (coded - exact).norm() < 0.02 * exact.norm()


def errors(net, bits, seeds=200, shift=0.0):
    """Mean error of the gradient in units of its standard error, as a root mean square over parameters."""
    _, exact = gradient(*net)
    found = torch.stack([gradient(*net, original.Original(net[0], bits, seed=seed))[1] for seed in range(seeds)])
    found = found + shift * exact
    varies = found.std(0) > 1e-6 * exact.abs().max()
    z = (found.mean(0) - exact)[varies] / (found.std(0)[varies] / seeds**0.5)
    return z.square().mean().sqrt().item()


def test_two_bits_are_unbiased_and_a_bias_shows(net):
    """Under no bias the mean square of z is near 1; parameters are correlated, so its spread is wider than theirs were
    they independent."""
    assert errors(net, 2) < 1.25
    assert errors(net, 2, shift=0.2) > 1.25


@pytest.mark.parametrize(("row", "bits"), [(4, 1), (256, 2), (300, 1), (5000, 3)])
def test_no_two_roundings_of_the_original_scheme_are_related(row, bits):
    """Halfway between two codes, where a mirror image is rounded the other way; a plain draw is."""
    x = torch.full((row,), 0.5)
    group = math.ceil(row / math.ceil(row / 256))
    x[0::group], x[1::group] = 0.0, 1.0
    place = torch.arange(4 * row) % row  # mirror images are in one group, or two rows apart
    free = ((place < 100) & (place % group >= 2)).nonzero().flatten()
    rows = x.repeat(2400 if row > 4000 else 80_000, 1)

    def largest(packed) -> float:
        up = (packed.dequantize() > 0.5).double().view(-1, 4 * row)[:, free] * 2 - 1
        return float((up.T @ up / len(up)).fill_diagonal_(0).abs().max())

    plain, independent = codec.quantize(rows, bits, 256, 1, 2, row), original.Independent.of(rows, bits, 1, 2, row)
    assert largest(plain) > 0.9
    assert largest(independent) < 6 / (len(rows) / 4) ** 0.5
    assert independent.nbytes == plain.nbytes


def test_every_save_is_coded_for_itself(net):
    """The stem's input and, twice, its output, at two bits and 1/8 for the groups; the head's input; and a bit for
    each value of the ReLU."""
    model, x, labels = net
    scheme = original.Original(model, 2)
    gradient(model, x, labels, scheme)
    groups = [-(-n // 256) for n in (3 * 144, 16 * 144, 16 * 144, 8)]
    codes = 16 * (3 * 144 + 2 * 16 * 144 + 8) * 2 // 8
    assert scheme.nbytes == codes + 4 * 16 * sum(groups) + 16 * 8 * 100 // 8
    assert scheme.bytes_per_sample == scheme.nbytes / 16


def test_bits_are_chosen_within_the_average_and_lower_the_error(net):
    net = Net(share=0.01), *net[1:]  # what one of the layers saves hardly matters
    _, exact = gradient(*net)
    uniform, chosen = [], []
    for seed in range(60):
        scheme = original.Original(net[0], 2, adaptive=True, seed=seed)
        first = gradient(*net, scheme)[1]  # no gradients are known yet
        second = gradient(*net, scheme)[1]
        uniform.append((first - exact).square().sum().item())
        chosen.append((second - exact).square().sum().item())
    assert len(set(scheme._averages)) > 1
    gain = torch.tensor(uniform) - torch.tensor(chosen)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_fractions_of_a_bit_are_for_chosen_ones(net):
    with pytest.raises(SystemExit, match="a whole number, or --adaptive"):
        original.Original(net[0], 1.5)


def test_the_grid_has_every_cell_once():
    cells = list(run.grid())
    assert len(cells) == len(set(cells)) == 4 * 5 * 3 + 3 + 10 * 2 * 2
    assert {key.scheme for key in cells} == set(run.SCHEMES)


def test_pairs_are_compared_by_seed():
    """Differences of 1, 2 and 3 points: mean 2, standard error 1/sqrt(3); Student's 4.303 of them on either side."""
    runs = {
        f"cifar10-vit/{scheme}/{seed}": {"score": score, "losses": [9.0] * 3 + [1 + 10 * (0.7 - score)]}
        for scheme, values in {run.PLAIN: (0.5, 0.6, 0.7), "L3": (0.49, 0.58, 0.67)}.items()
        for seed, score in enumerate(values)
    }
    (found,) = run.comparisons(runs)
    assert found["difference"] == pytest.approx(-0.02)
    assert found["interval"] == pytest.approx([-0.02 - 0.04303 / 3**0.5, -0.02 + 0.04303 / 3**0.5])
    assert not found["as_good"]
    assert run.line(runs, "cifar10-vit", "L3").startswith("| L3 | 3 | 58.0 ± 9.0 | -2.0 (-4.5 to +0.5) | +")


def test_devices_are_not_paired_with_each_other():
    runs = {
        f"cifar10-vit/{scheme}/{end}": {"score": score, "losses": [score]}
        for scheme, end, score in (
            *((run.PLAIN, "0", 0.5), (run.PLAIN, "0@cuda", 0.9), (run.PLAIN, "1", 0.6)),
            *(("L3", "0", 0.4), ("L3", "0@cuda", 0.7), ("L3", "1", 0.7), ("L3", "2", 0.1)),
        )
    }
    (found,) = run.comparisons(runs)
    assert found["pairs"] == 3 and found["seeds"] == 2  # a seed's two devices as one: -0.15, and 0.1
    assert found["difference"] == pytest.approx(-0.025)
    assert run.loss(runs, "cifar10-vit", "L3")[0] == pytest.approx(((0.4 / 0.5 + 0.7 / 0.9) / 2 + 0.7 / 0.6) / 2 - 1)
    assert str(run.Key("cifar10-vit", "L3", 0, "cuda")) in runs
    assert run.done(runs, run.Key("cifar10-vit", "L3", 0)) and not run.done(runs, run.Key("cifar10-vit", "L3", 3))
    assert run.done({"cifar10-vit/L3/1@cuda": {}}, run.Key("cifar10-vit", "L3", 1))


def test_across_devices_seeds_are_paired_only_where_that_is_asked_for():
    runs = {
        f"bccd-rtdetr/{scheme}/{end}": {"score": score, "losses": [1.0]}
        for scheme, end, score in (("L3", "0@cuda", 0.5), ("L3", "1@cuda", 0.6), ("original-2", "0", 0.1))
    } | {"bccd-rtdetr/original-2/1": {"score": 0.4, "losses": [1.0]}}
    assert run.compared(runs, "bccd-rtdetr", "L3", "original-2") is None
    found = run.compared(runs, "bccd-rtdetr", "L3", "original-2", across=True)
    assert found["seeds"] == 2 and found["difference"] == pytest.approx(0.3)


def test_pairs_across_devices_are_for_who_has_too_few_on_one():
    def made(*ends):
        schemes = {"L3": ends, "original-2": ("0", "1", "2")}
        return {f"cifar10-vit/{name}/{end}": {"score": 0.5} for name, found in schemes.items() for end in found}

    def seeds(runs):
        found, across = run.between(runs, "cifar10-vit", "L3", "original-2")
        return found["seeds"], across

    assert seeds(made("0", "1", "2", "2@cuda")) == (3, False)
    assert seeds(made("0", "1", "2@cuda")) == (3, True)
    assert seeds(made("0", "1")) == (2, False)  # no more seeds across


def test_without_pairs_the_repeated_runs_are_uncompressed_ones():
    """By seed: 0.5 and 0.6 uncompressed, the first of two runs; 0.3 and 0.5 at L3."""
    runs = {
        f"bccd-rtdetr/{key}": {"score": score}
        for key, score in (
            *((f"{run.PLAIN}/0@cuda", 0.4), (f"{run.REPEATED}/0@cuda", 0.6), (f"{run.PLAIN}/1@cuda", 0.6)),
            *(("L3/0", 0.3), ("L3/1", 0.5), ("auto/0", 0.3), ("auto/0@cuda", 0.5)),
        )
    }
    found = run.unpaired(runs, "bccd-rtdetr", "L3")
    assert found["runs"] == 2 and found["others"] == 3
    assert found["difference"] == pytest.approx(0.4 - 0.55)
    assert found["standard_error"] == pytest.approx((0.005 / 2 + 0.02 / 2) ** 0.5)
    assert run.unpaired(runs, "bccd-rtdetr", "auto") is None  # of one seed
    assert run.unpaired(runs, "cifar10-vit", "L3") is None
    assert run.distances(runs, "bccd-rtdetr") == (pytest.approx(0.2), pytest.approx(0.2), 1)
    runs["bccd-rtdetr/uncompressed/1"] = {"score": 0.0}  # another device: neither distance
    assert run.distances(runs, "bccd-rtdetr") == (pytest.approx(0.2), pytest.approx(0.2), 1)


def test_what_chance_does_is_between_two_devices():
    runs = {
        f"cifar10-vit/{key}": {"score": score, "losses": [9.0, 9.0, 9.0, last]}
        for key, score, last in (
            *((f"{run.PLAIN}/0", 0.5, 1.1), (f"{run.PLAIN}/0@cuda", 0.9, 1.0)),
            *((f"{run.PLAIN}/1", 0.6, 0.7), (f"{run.PLAIN}/1@cuda", 0.3, 1.0)),
            *((f"{run.PLAIN}/2", 0.0, 5.0), ("L3/0", 0.0, 5.0), ("L3/0@cuda", 1.0, 1.0)),
        )
    }
    expected = (pytest.approx(0.125**0.5), pytest.approx(0.05**0.5), 2)
    assert run.between_devices(runs, "cifar10-vit") == expected
    assert run.between_devices(runs, "cifar10-resnet") is None


def test_a_grid_that_goes_on_elsewhere_has_partners_there():
    todo = [run.Key("cifar10-vit", scheme, seed, "cuda") for seed in (0, 1) for scheme in ("L3", "auto")]
    found = run.with_partners(todo, {"cifar10-vit/uncompressed/0@cuda": {}, "cifar10-vit/uncompressed/1": {}})
    assert found == [*todo[:2], run.Key("cifar10-vit", run.PLAIN, 1, "cuda"), *todo[2:]]


def test_losses_and_bytes_are_those_of_the_same_task():
    """A tenth more at the end of one seed, three tenths at that of the other: a fifth, and a tenth of error."""

    def one(last, **more):
        return {"score": 0.5, "losses": [9.0] * 6 + [last - 0.1, last + 0.1], **more}

    runs = {
        **{f"cifar10-vit/{run.PLAIN}/{seed}": one(1.0) for seed in range(3)},
        "cifar10-vit/L3/0": one(1.1, actnn_ratio=10.0, actnn_bytes_per_sample=50.0),
        "cifar10-vit/L3/1": one(1.3, actnn_ratio=10.0, actnn_bytes_per_sample=50.0),
        "cifar10-vit/original-2/1": one(2.0, actnn_bytes_per_sample=125.0),
        "cifar10-resnet/original-2/0": one(2.0, actnn_bytes_per_sample=125.0),
    }
    assert run.loss(runs, "cifar10-vit", "L3") == pytest.approx((0.2, 0.1, 2))
    assert run.loss(runs, "cifar10-resnet", "original-2") is None
    assert run.ratio(runs, "cifar10-vit", "original-2") == 4.0
    assert run.ratio(runs, "cifar10-resnet", "original-2") is None
    assert run.line(runs, "cifar10-vit", "L3").endswith("| +20.0 % ± 10.0 | 10.0x |")


def test_a_task_has_its_launcher_under_every_scheme(monkeypatch):
    """Whatever else runs train.py: the model of the ResNet's task is known to timm by that alone."""
    calls, of_threads, given = [], [], []

    def run_one(task, seed, data, words=(), launcher=(), device="cpu", threads=1):
        assert device == "cuda"
        given.append([*words])
        calls.append([*map(str, launcher)])
        of_threads.append(threads)
        return {"score": 0.0, "losses": []}

    monkeypatch.setattr(run.examples, "run", run_one)
    for scheme in run.SCHEMES:
        run.trained(run.Key("cifar10-resnet", scheme, 0, "cuda"), Path("data"))
        run.trained(run.Key("camvid-segformer", scheme, 0, "cuda"), Path("data"))
    assert all(one[0].endswith("small.py") for one in calls[::2])
    assert not any("small.py" in part for one in calls[1::2] for part in one)
    assert sum(any("original.py" in part for part in one) for one in calls[::2]) == 4
    assert sorted(of_threads) == [1] * (2 * len(run.SCHEMES) - 2) + [2, 2]  # the control alone
    for scheme in (run.PLAIN, "L3", "original-2"):  # a short run logs its losses all the same
        given.clear()
        run.trained(run.Key("cifar10-resnet", scheme, 0, "cuda"), Path("data"), short=True)
        assert given[0][-4:] == ["--max_steps", "20", "--logging_steps", "10"]


def test_variance_over_a_training(monkeypatch):
    """All ways are looked at on the same weights, and what is chosen adds no more than what is not."""
    import fidelity
    import variance

    monkeypatch.setattr(variance, "COUNT", 2)
    monkeypatch.setattr(variance, "BATCH", 8)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    found = variance.look(model, fidelity.Batches(images, torch.randint(0, 10, (32,)), 1), draws=4)
    assert found["minibatch"] > 0
    for way in variance.WAYS:
        row = found[way]
        assert row["average_bits"] <= (8 if way == "auto" else 2.01)  # small tensors: whole bytes a group
        assert 0 < row["shares"]["mean"] < row["shares"]["largest"]
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.5)
        assert sum(one["predicted"] for one in row["tensors"]) == pytest.approx(row["predicted"])
    assert found["L3"]["shares"]["of_sum"] <= 1.1 * found["2 bits"]["shares"]["of_sum"]
    assert found["auto"]["shares"]["mean"] < 0.3


def test_curvature_of_a_layer_that_is_known(monkeypatch):
    """The mean of the Hessian's diagonal, for the mean square of a linear layer: that of its inputs."""
    import curvature

    monkeypatch.setattr(curvature, "COUNT", 2000)
    monkeypatch.setattr(F, "cross_entropy", lambda output, wanted: (output - wanted).square().mean() / 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 1))
    values = torch.randn(64, 12)
    wanted = torch.randn(64, 1)
    found = curvature.look(model, lambda size: (values, wanted))
    hidden = model[0](values)
    squares = hidden.square().mean().item(), model[1].weight.square().mean().item()
    expected = {"1.weight": squares[0], "1.bias": 1.0, "0.bias": squares[1]}
    for name, value in expected.items():
        row = found["parameters"][name]
        assert row["curvature"] == pytest.approx(value, rel=0.15), name
    (gradient,) = torch.autograd.grad((model(values) - wanted).square().mean() / 2, [model[1].weight])
    assert found["parameters"]["1.weight"]["square"] == pytest.approx(gradient.square().mean().item(), rel=1e-4)
    assert found["used"] == 4


def test_noise_counts_as_said():
    import noise

    sizes, own = torch.tensor([100, 4, 50]), torch.tensor([400.0, 1.0, 1e-9], dtype=torch.float64)
    added = torch.tensor([[40.0, 0.0, 7.0], [40.0, 0.5, 7.0]], dtype=torch.float64)
    found = {key: (one["value"], one["standard_error"]) for key, one in noise.noise(added, own, sizes).items()}
    assert found["of_sum"] == pytest.approx((47.25 / 401, 0.25 / 401))
    # sqrt(100 / 400) = 0.5, sqrt(4 / 1) = 2; sqrt(100 * 400) = 200, sqrt(4 * 1) = 2. What is left has no gradient.
    assert found["as_adam"] == pytest.approx(((0.5 * 40 + 2 * 0.25) / 202, 2 * 0.25 / 202))
    assert found["mean_share"] == pytest.approx(((0.1 + 0.25) / 2, 0.125))


def test_noise_of_schemes_is_that_of_their_bits(net, monkeypatch):
    import noise

    task = noise.Task(lambda: net[0], lambda model, *batch: model(*batch), 1e-3, 8, (0, 2))
    at_bits = {f"L2 {b}": noise.Way({"level": "L2", "bits": b}) for b in (2, 8)}
    at_bits |= {f"original {b}": noise.Way(original=(b, False)) for b in (2, 8)}
    at_bits |= {f"L3 {b}": noise._chosen(b, True) for b in (1.5, 4)}
    monkeypatch.setattr(noise, "WAYS", at_bits)
    generator = torch.Generator().manual_seed(0)

    def batches():
        return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(4, (8,), generator=generator)

    for _, model in noise.moments(task, batches):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = {name: one["of_sum"]["value"] for name, one in noise.look(model, task, batches, 4).items()}
        # Steps are 85 times as long at 2 bits as at 8.
        for way in ("L2", "original"):
            assert 85**2 / 2 < found[f"{way} 2"] / found[f"{way} 8"] < 85**2 * 2
        assert 0 < found["L3 4"] < found["L3 1.5"] / 10
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_is_kept_with_what_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "accuracy.json")
    monkeypatch.setattr(
        run.timing, "write", lambda name, found: (tmp_path / f"{name}.json").write_text(json.dumps(found))
    )
    for scheme in ("L3", "original-2", run.PLAIN):
        run.keep(run.Key("cifar10-resnet", scheme, 0), {"score": 0.5, "losses": [1.0] * 8})
    kept = {key.split("/")[1]: one["machine"] for key, one in run.known().items()}
    assert kept["L3"]["roundings"] == run.timing.ROUNDINGS
    assert all("roundings" not in kept[scheme] for scheme in ("original-2", run.PLAIN))
    assert all(set(one) >= {"date", "cpu", "torch"} for one in kept.values())
