"""What a collecting step says of the gradient's variance: against the closed forms, and against many draws of the
whole gradient; and that the gradient of a linear network has no bias."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_actnn
from hf_actnn import codec
from hf_actnn.codec import buffers
from hf_actnn.precision import sensitivity, variance
from hf_actnn.precision.sensitivity import Reading, amplification
from hf_actnn.saving import fused
from hf_actnn.saving import tape as tapes

#: Of a prediction for one operation, and for a whole network.
LAYER, NETWORK = 0.05, 0.15
#: Tapes that a prediction for one operation is averaged over.
STEPS = 150


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def gradient(model: nn.Module, run: Callable[[nn.Module], None]) -> Tensor:
    """All gradients in one float64 vector."""
    model.zero_grad()
    run(model)
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def collect(model: nn.Module, run: Callable[[nn.Module], None], bits: int, seed: int = 0, **settings):
    """The tapes of one step of a model that was not converted before; it is converted when this returns."""
    hf_actnn.convert(model, level="L3", bits=bits, per_sample=False, min_numel=64, seed=seed, **settings)
    controller = hf_actnn.controller(model)  # from here on it collects
    model.zero_grad()
    run(model)
    return [controller._tape]


def read(model: nn.Module, run: Callable[[nn.Module], None], bits: int, seed: int = 0, **settings) -> Reading:
    """What one step shows; the model is left as it was."""
    reading = sensitivity.merge([sensitivity.read(tape) for tape in collect(model, run, bits, seed, **settings)])
    hf_actnn.revert(model)
    assert reading is not None
    return reading


def predict(model: nn.Module, run: Callable[[nn.Module], None], bits: int, steps: int) -> dict[str, float]:
    """Variance by kept tensor, the mean over several steps: each looks at one draw of signs."""
    found: dict[str, float] = defaultdict(float)
    for seed in range(steps):
        for key, one in read(model, run, bits, seed).kept.items():
            found[key] += one.variance / steps
    return dict(found)


def draws(model: nn.Module, run: Callable[[nn.Module], None], bits: int, count: int) -> tuple[Tensor, Tensor]:
    """The gradient without quantisation `[P]`, and errors of gradients with it `[count, P]`."""
    exact = gradient(model, run)
    hf_actnn.convert(model, level="L2", bits=bits, min_numel=64, seed=1)
    errors = torch.stack([gradient(model, run) - exact for _ in range(count)])
    hf_actnn.revert(model)
    return exact, errors


def measured(errors: Tensor) -> tuple[float, float]:
    """Mean squared size, and its standard error relative to it."""
    squared = errors.square().sum(1)
    mean = squared.mean().item()
    return mean, squared.std().item() / math.sqrt(len(squared)) / mean


# -- one operation: the tape against the closed forms -----------------------------------------------------------------


class Shift(nn.Module):
    """Adds a parameter to every value: its gradient is that of the activation, which thus counts in the total."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Product(nn.Module):
    """Of the first 16 rows and the transposed other ones."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.left, self.right = Shift(shape[0], 16, shape[2]), Shift(shape[0], shape[1] - 16, shape[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.left(x[:, :16]), self.right(x[:, 16:]).mT)


def weighted(x: Tensor, grad: Tensor) -> Callable[[nn.Module], None]:
    return lambda model: (model(x) * grad).sum().backward()


def compare(model: nn.Module, x: Tensor, bits: int, form: Callable[..., Tensor], kept: Tensor | None = None) -> None:
    """`form(grad, v)` against the mean prediction of the only tensor that is kept, `x` unless given."""
    kept = x if kept is None else kept
    with torch.no_grad():
        grad = normal(*model(x).shape, seed=9)
    run = weighted(x, grad)
    (tape,) = collect(model, run, bits)
    hf_actnn.revert(model)
    ((key, item),) = tape.items.items()
    packed = hf_actnn.quantize(kept, bits, item.group_size, row_length=item.row_length)
    expected = float(form(grad, variance.exact(kept, packed)))
    found = predict(model, run, bits, STEPS)
    assert list(found) == [key]
    assert found[key] == pytest.approx(expected, rel=LAYER)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(32,), (4, 10)], ids=str)
def test_linear(bits, bias, shape):
    compare(seeded(lambda: nn.Sequential(nn.Linear(64, 48, bias))), normal(*shape, 64), bits, variance.linear)


CONVOLUTIONS: dict[str, tuple] = {
    "1d": (nn.Conv1d, (20,), {"kernel_size": 3, "padding": 1}),
    "1d transposed": (nn.ConvTranspose1d, (12,), {"kernel_size": 4, "stride": 2, "padding": 1}),
    "2d": (nn.Conv2d, (9, 8), {"kernel_size": 3, "padding": 1}),
    "2d stride": (nn.Conv2d, (9, 8), {"kernel_size": 3, "stride": 2}),
    "2d dilation": (nn.Conv2d, (9, 9), {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "2d groups": (nn.Conv2d, (8, 8), {"kernel_size": 3, "padding": 1, "groups": 4}),
    "2d depthwise": (nn.Conv2d, (8, 8), {"kernel_size": 5, "padding": 2, "groups": 16}),
    "2d transposed": (nn.ConvTranspose2d, (6, 5), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    "3d": (nn.Conv3d, (4, 5, 4), {"kernel_size": 3, "padding": 1}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    kind, size, settings = CONVOLUTIONS[name]
    model = seeded(lambda: nn.Sequential(kind(16, 16, **settings)))
    transposed = "transposed" in name
    compare(
        model,
        normal(8, 16, *size),
        2,
        lambda grad, v: variance.convolution(grad, v, **settings, transposed=transposed),
    )


def second_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.double().requires_grad_()
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


@pytest.mark.parametrize("name", ["GELU", "SiLU", "Tanh"])
def test_elementwise(name):
    x = normal(32, 128)
    activation = getattr(nn, name)()
    kept, second = x, second_derivative(activation, x)
    if name == "Tanh":  # keeps its result
        kept = x.tanh()
        second = -2 * kept
    model = nn.Sequential(Shift(32, 128), activation)
    compare(model, x, 6, lambda grad, v: variance.elementwise(grad, second, v), kept)


def test_layer_norm():
    x = normal(32, 128) + 0.5
    model = seeded(lambda: nn.Sequential(Shift(32, 128), nn.LayerNorm(128)))
    nn.init.normal_(model[1].weight, 1.0, 0.3)
    _, mean, rstd = torch.native_layer_norm(x, (128,), None, None, 1e-5)
    compare(
        model,
        x,
        4,
        lambda grad, v: variance.total(variance.layer_norm(grad, (x - mean) * rstd, rstd, model[1].weight, v)),
    )


@pytest.mark.parametrize("size", [(), (6, 6)], ids=str)
def test_batch_norm(size):
    channels = 24 if size else 256  # most of the variance is that of as many numbers, the weight's gradient
    x = normal(32, channels, *size) + 0.5
    kind = nn.BatchNorm2d if size else nn.BatchNorm1d
    model = seeded(lambda: nn.Sequential(Shift(*x.shape), kind(channels)))
    nn.init.normal_(model[1].weight, 1.0, 0.3)
    others = [dim for dim in range(x.ndim) if dim != 1]
    rstd = (x.var(others, correction=0) + 1e-5).rsqrt()
    by_channel = rstd.view(-1, *[1] * len(size))
    h = (x - x.mean(others, keepdim=True)) * by_channel  # is what is coded

    def form(grad: Tensor, v: Tensor) -> Tensor:
        return variance.total(variance.batch_norm(grad, h, rstd, model[1].weight, v / by_channel.square()))

    compare(model, x, 4, form, h)


def test_softmax():
    x = normal(32, 64)
    p = x.softmax(-1)
    model = nn.Sequential(Shift(32, 64), nn.Softmax(-1))
    compare(model, x, 6, lambda grad, v: variance.softmax(grad, p, v), p)


def test_matmul():
    x = normal(4, 40, 32)
    grad = normal(4, 16, 24, seed=2)
    left, right = (variance.exact(part, hf_actnn.quantize(part, 3)) for part in (x[:, :16], x[:, 16:]))
    found = predict(Product(4, 40, 32), weighted(x, grad), 3, STEPS)
    assert len(found) == 2
    expected = variance.matmul(grad, left, right.mT)
    assert sorted(found.values()) == pytest.approx(sorted(map(float, expected)), rel=LAYER)


def test_a_shared_tensor_carries_the_sum():
    """Three layers that read one tensor, which is kept once."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, width) for width in (32, 48, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    compare(
        seeded(Branches),
        normal(32, 64),
        2,
        lambda grad, v: variance.total(variance.linear(part, v) for part in grad.split([32, 48, 16], -1)),
    )


# -- whole networks: the sum of predictions against many draws --------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, stride in ((8, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (32, 32), 2000),
    "convolutional": (convolutional, (8, 8, 10, 10), 400),
    "transformer": (Transformer, (8, 16, 32), 500),
}


def classify(x: Tensor) -> Callable[[nn.Module], None]:
    labels = torch.randint(0, 10, (len(x),), generator=torch.Generator().manual_seed(5))
    return lambda model: F.cross_entropy(model(x), labels).backward()


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU])
def test_an_activation_that_is_read_in_parts(monkeypatch, act):
    """Says what it says as a whole, without a third tensor of its size."""
    model = seeded(lambda: nn.Sequential(nn.Linear(24, 64), act(), nn.Linear(64, 8)))
    run = weighted(normal(96, 24), normal(96, 8, seed=9))
    followed: list[str] = []
    harm = tapes.Tape._harm

    def noted(self, key, *rest):
        followed.append(key)
        return harm(self, key, *rest)

    results: list[int] = []
    again = tapes.Tape._run

    def stored(self, node, *rest):
        undisturbed, given = tapes.probe.undisturbed, again(self, node, *rest)
        if undisturbed is not None:
            results.append(given[0].untyped_storage().nbytes())
        return given

    monkeypatch.setattr(tapes.Tape, "_harm", noted)
    monkeypatch.setattr(tapes.Tape, "_run", stored)
    monkeypatch.setattr(fused, "RUN", 512)
    found = {}
    for smallest in (math.inf, 1):
        followed.clear(), results.clear()
        monkeypatch.setattr(fused, "SMALLEST", {"cpu": smallest})
        found[smallest] = read(model, run, 2)
        # Also the layer behind reads it, with which nothing goes on.
        assert sum(key.startswith("1:") for key in followed) == (2 if smallest > 1 else 1), followed
        assert results == [4 * 96 * 64 if smallest > 1 else 4]
    whole, parts = found.values()
    assert parts.kept.keys() == whole.kept.keys() and len(whole.kept) >= 2
    for key, one in whole.kept.items():
        assert parts.kept[key].variance == pytest.approx(one.variance, rel=1e-4) and one.variance > 0, key


class Standardised(nn.Conv2d):
    """Its weight is computed."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


@pytest.mark.parametrize("kind", [nn.Conv2d, Standardised])
def test_a_convolution_that_is_read_in_parts(monkeypatch, kind):
    """Says what it says as a whole; of the gradient of its input there is only the one that goes on."""
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(kind(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(kind(8, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(800, 8)),
        )
    )
    run = weighted(normal(16, 8, 10, 10), normal(16, 8, seed=9))
    rooms: list[int] = []
    room_for = fused._room_for

    def counted(part: Tensor, samples: int) -> Tensor:
        rooms.append(samples)
        return room_for(part, samples)

    monkeypatch.setattr(fused, "_room_for", counted)
    monkeypatch.setattr(fused, "RUN", 512)
    found = {}
    for smallest in (math.inf, 1):
        monkeypatch.setattr(fused, "SMALLEST", {"cpu": smallest})
        found[smallest] = read(model, run, 2)
        # A weight that is computed may itself be disturbed, so that the gradient of the input moves.
        assert len(rooms) == (0 if smallest > 1 else 2 if kind is nn.Conv2d else 4)
    assert len(found[1].kept) >= 4 and all(one.variance > 0 for one in found[1].kept.values())
    same_readings(*found.values())


class Gathered(nn.Module):
    """The gradient of a convolution's input is a parameter's: a table's."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        for module in (self.first, self.last):
            module.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).permute(0, 3, 1, 2).contiguous()
        return self.last(F.gelu(self.first(x))).tanh().mean((2, 3))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_convolution_behind_a_table_that_is_read_in_parts(monkeypatch, frozen):
    places = torch.randint(0, 32, (16, 10, 10), generator=torch.Generator().manual_seed(1))
    run = weighted(places, normal(16, 8, seed=9))
    monkeypatch.setattr(fused, "RUN", 512)
    found = {}
    for smallest in (math.inf, 1):
        monkeypatch.setattr(fused, "SMALLEST", {"cpu": smallest})
        found[smallest] = read(seeded(lambda: Gathered(frozen)), run, 2)
    same_readings(*found.values())


def same_readings(one: Reading, other: Reading) -> None:
    """Of what is kept, and of the mini-batch."""
    assert other.kept.keys() == one.kept.keys()
    assert any(item.variance > 0 for item in one.kept.values())
    for key, item in one.kept.items():
        assert other.kept[key].variance == pytest.approx(item.variance, rel=1e-4), key
    for name in ("scale", "minibatch", "squared"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-4) and getattr(one, name) > 0, name


class Residual(nn.Module):
    """Noise that comes to nodes which only move it, or add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.qkv, self.last = nn.Linear(32, 96), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.last(self.norm(x + attended))


def test_noise_that_is_only_moved_on_is_not_run_again(monkeypatch):
    model, run = seeded(Residual), weighted(normal(6, 10, 32), normal(6, 10, 8, seed=9))
    runs: list[int] = []
    again = tapes.Tape._run

    def counted(self, node, *rest):
        runs.append(1)
        return again(self, node, *rest)

    monkeypatch.setattr(tapes.Tape, "_run", counted)
    found = read(model, run, 2)
    fewer = len(runs)
    runs.clear()
    monkeypatch.setattr(tapes, "_PASSED", ())
    monkeypatch.setattr(tapes, "_KEEPS", ())
    expected = read(model, run, 2)
    assert fewer + 4 <= len(runs)  # of queries, keys and values, and of a normalisation
    for key, one in expected.kept.items():
        assert found.kept[key].variance == pytest.approx(one.variance, rel=1e-4), key


class Sum(nn.Module):
    """A normalisation's noise comes to a sum, whose second part may be scaled."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.last = (
            nn.Linear(8, 32),
            nn.Linear(32, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 4),
        )
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(torch.add(x, self.second(x), alpha=self.alpha)))


@pytest.mark.parametrize("alpha", [1, 0.1, 10])
def test_noise_behind_a_sum(monkeypatch, alpha):
    model, run = seeded(lambda: Sum(alpha)), weighted(normal(64, 8), normal(64, 4, seed=9))
    found = read(model, run, 2)
    monkeypatch.setattr(tapes, "_KEEPS", ())
    for key, one in read(model, run, 2).kept.items():
        assert found.kept[key].variance == pytest.approx(one.variance, rel=1e-4), key


class Condition(nn.Module):
    """One value for each channel of a sample is added to what an activation gets, or multiplied with it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.condition, self.join = nn.Linear(6, 16), join

    def forward(self, x: Tensor) -> Tensor:
        values, condition = x[:, 6:].unflatten(1, (16, 25)), self.condition(x[:, :6])[:, :, None]
        return F.silu(self.join(values, condition)).sum(2)


@pytest.mark.parametrize("join", [torch.add, torch.mul])
def test_an_activation_behind_a_broadcast(join):
    """Its noise does not add up as a gradient does that is alike everywhere: some hundred times too much without."""
    model, run = seeded(lambda: Condition(join)), weighted(normal(12, 406), torch.ones(12, 16))
    expected = sum(predict(model, run, 2, 40).values())
    _, errors = draws(model, run, 2, 200)
    measured = float(errors.square().sum(1).mean())
    assert measured / 2 < expected < 2 * measured


def test_a_gradient_without_values_stops_no_training():
    """Of an image without boxes, say."""
    linear, norm, last = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 4)
    model = nn.ModuleList([linear, norm, last]).train()
    model.forward = lambda x, none: last(norm(torch.cat([linear(x), none * 2])))  # type: ignore[method-assign]
    none = torch.zeros(0, 64, requires_grad=True)
    reading = read(model, lambda net: net(normal(48, 16), none).square().sum().backward(), 2)
    assert reading.is_finite and any(one.variance > 0 for one in reading.kept.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    build, shape, count = NETWORKS[name]
    model, run = seeded(build), classify(normal(*shape))
    mean, error = measured(draws(model, run, 4, count)[1])
    assert error < 0.03, "too few draws to tell"
    assert sum(predict(model, run, 4, steps=6).values()) == pytest.approx(mean, rel=NETWORK)


class Places(nn.Sequential):
    """A convolution whose gradient is alike in all places, which a mean makes it."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(16, 10, 3, padding=1), nn.AvgPool2d(16), nn.Flatten())


class Tokens(nn.Module):
    """A linear layer whose gradient is alike for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2).contiguous()).mean(1)


#: What is read: values, or what is left of them behind a ReLU and behind dropout.
READ = {
    "values": lambda x: x,
    "a half of zeros": lambda x: x.relu(),
    "three quarters of zeros": lambda x: (
        x.relu() * (torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    ),
}


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("read_", READ)
@pytest.mark.parametrize("build", [Places, Tokens])
def test_mirrored_roundings_are_foreseen(monkeypatch, build, read_, bits):
    """Where errors of neighbours cancel; with noise that is independent from value to value more is predicted."""
    model, run = seeded(build), classify(READ[read_](normal(8, 16, 16, 16)))
    mean, error = measured(draws(model, run, bits, 300)[1])
    assert error < 0.03, "too few draws to tell"
    found = sum(predict(model, run, bits, steps=30).values())
    monkeypatch.setattr(codec, "rounding_correlation", lambda x, packed: torch.zeros(()))
    independent = sum(predict(model, run, bits, steps=30).values())
    assert found / mean == pytest.approx(1, abs=NETWORK)
    # Beside a value that is exact nothing cancels.
    assert independent / found > {"values": 1.7, "a half of zeros": 1.2, "three quarters of zeros": 1.05}[read_]


# -- no bias ----------------------------------------------------------------------------------------------------------


def whitened(errors: Tensor) -> tuple[float, float]:
    """Whether errors `[D, P]` have the mean zero: the pooled statistic and the largest of single entries, both in
    standard deviations of what they are if so.

    The pooled one is `D |mean|^2 / tr(S)`, `S` the covariance, with the mean one and, for many independent directions,
    the variance `2 tr(S^2) / tr(S)^2`. Entries are correlated: `tr(S^2)` takes account of it. It is read off the Gram
    matrix of the draws, less what their finite number adds to it.
    """
    count = len(errors)
    mean = errors.mean(0)
    centred = errors - mean
    trace = float(centred.square().sum()) / (count - 1)
    gram = centred @ centred.T / (count - 1)
    squares = float(gram.square().sum()) - trace**2 / count
    pooled = count * float(mean.square().sum()) / trace
    spread = centred.square().sum(0).div(count - 1).sqrt()
    seen = spread > 1e-6 * spread.max()
    single = mean[seen].abs() / (spread[seen] / math.sqrt(count))
    return (pooled - 1) / math.sqrt(2 * squares / trace**2), float(single.max())


def linear_network() -> tuple[nn.Module, Callable[[nn.Module], None]]:
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 16)))
    target = normal(32, 16, seed=3)
    # The gradient is that of an exact output: linear in every tensor that is kept.
    return model, lambda model: F.mse_loss(model(normal(32, 32)), target).backward()


def no_bias(errors: Tensor) -> bool:
    """Pooled within 4 standard deviations; no entry beyond what one in ten thousand such vectors has."""
    pooled, single = whitened(errors)
    limit = float(torch.special.ndtri(torch.tensor(1 - 1e-4 / (2 * errors.shape[1]), dtype=torch.float64)))
    return abs(pooled) < 4 and single < limit


@pytest.mark.parametrize("bits", [1, 2])
def test_the_gradient_of_a_linear_network_has_no_bias(bits):
    model, run = linear_network()
    exact, errors = draws(model, run, bits, 2000)
    assert no_bias(errors)
    assert errors.square().sum(1).mean() > 1e-3 * exact.square().sum()  # there is something to be without bias


def test_a_planted_bias_is_noticed(monkeypatch):
    true = codec.quantize

    def biased(x: Tensor, *args, **kwargs):
        step = variance.bound(true(x, *args, **kwargs)).mul(4).sqrt()
        return true(x + 0.05 * step.to(x.dtype), *args, **kwargs)

    monkeypatch.setattr(codec, "quantize", biased)
    model, run = linear_network()
    _, errors = draws(model, run, 2, 2000)
    assert not no_bias(errors)
    assert whitened(errors)[0] > 10


# -- the recursion ----------------------------------------------------------------------------------------------------


def test_amplification_by_hand():
    """A parameter's node, two that go on to it, and one that goes to both of them; plus one the pass never reached."""
    following = [[-1, -2], [0, -1], [0], [1, 2], [3]]
    out = [4.0, 2.0, 5.0, 10.0, 0.0]
    ins = [[0.0, 0.0], [6.0, 0.0], [1.0], [3.0, 20.0], [7.0]]
    parameters = [8.0, 1.0, 0.0, 0.0, 0.0]
    first = 8 / 4
    left, right = (first * 6 + 1) / 2, first * 1 / 5
    top = (left * 3 + right * 20) / 10
    assert amplification(following, out, ins, parameters) == pytest.approx([first, left, right, top, 0.0])


def test_amplification_of_linear_maps_is_the_squared_derivative():
    """Two linear layers: the noise of a gradient ends in both weights, `|x|^2` and `|W|^2 |x'|^2` times on average."""
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 96, False), nn.Linear(96, 32, False)))
    x, grad = normal(16, 64), normal(16, 32, seed=1)
    factors = []
    for seed in range(48):
        (tape,) = collect(model, weighted(x, grad), 8, seed)
        values = sensitivity._Values(tape)
        columns = [node.following for node in tape.nodes], [values(node.out) for node in tape.nodes]
        ins = [[values(one) for one in node.ins] for node in tape.nodes]
        factors.append(
            amplification(*columns, ins, [sum(map(values, node.parameters.values())) for node in tape.nodes])[-1]
        )
        hf_actnn.revert(model)
    noise = normal(200, 16, 32, seed=2) * grad.abs()  # of the sizes of the gradient
    with torch.no_grad():
        hidden = model[0](x)
        first = torch.einsum("dno,oh,ni->dhi", noise, model[1].weight, x)
        second = torch.einsum("dno,nh->doh", noise, hidden)
        expected = (first.square().sum() + second.square().sum()) / noise.square().sum()
    assert sum(factors) / len(factors) == pytest.approx(float(expected), rel=LAYER)


# -- the mini-batch ---------------------------------------------------------------------------------------------------


def test_the_variance_of_the_mini_batch():
    """Batches drawn with replacement from 64 samples."""
    data, labels = normal(64, 32), torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(1))
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 10)))
    generator = torch.Generator().manual_seed(2)

    def run(model: nn.Module) -> None:
        chosen = torch.randint(0, 64, (16,), generator=generator)
        F.cross_entropy(model(data[chosen]), labels[chosen]).backward()

    gradients = torch.stack([gradient(model, run) for _ in range(2000)])
    mean, error = measured(gradients - gradients.mean(0))
    assert error < 0.03
    readings = [read(model, run, 8, seed) for seed in range(200)]
    assert sum(one.minibatch for one in readings) / 200 == pytest.approx(mean, rel=NETWORK)


# -- ways to train ----------------------------------------------------------------------------------------------------


def agrees(
    model: nn.Module, run: Callable[[nn.Module], None], bits: int = 4, count: int = 400, steps: int = 12
) -> None:
    mean, error = measured(draws(model, run, bits, count)[1])
    assert error < 0.03
    assert sum(predict(model, run, bits, steps).values()) == pytest.approx(mean, rel=NETWORK)


def test_a_frozen_layer():
    model = seeded(mlp)
    model[0].requires_grad_(False)
    run = classify(normal(32, 32))
    agrees(model, run)
    reading = read(model, run, 4)
    assert reading.is_finite
    assert "0:linear" not in reading.kept
    model.requires_grad_(False)[4].requires_grad_(True)
    agrees(model, run)


class Twice(nn.Module):
    """Calls a layer twice, and another one only if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.extra, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 10)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.layer(x))
        x = F.gelu(self.layer(x))
        return self.head(x if self.skip else x + F.gelu(self.extra(x)))


def test_a_layer_called_twice():
    """Both calls end in one gradient, where their covariance counts too."""
    model, run = seeded(Twice), classify(normal(32, 48))
    agrees(model, run)
    assert {key for key in read(model, run, 4).kept if key.startswith("layer")} == {"layer:linear"}


def test_a_layer_skipped():
    model, run = seeded(Twice), classify(normal(32, 48))
    used = read(model, run, 4)
    model.skip = True
    skipped = read(model, run, 4)
    assert skipped.is_finite
    assert skipped.scale > 0
    assert len(skipped.kept) < len(used.kept)
    agrees(model, run)


def test_accumulated_gradients_add_up():
    """Two micro-batches of one step: what they add up to is the variance of the sum."""
    model, halves = seeded(mlp), [classify(normal(16, 32, seed=seed)) for seed in (1, 2)]

    def both(model: nn.Module) -> None:
        for half in halves:
            half(model)

    (tape,) = collect(model, both, 4)
    hf_actnn.revert(model)
    together = sensitivity.read(tape)
    for half in halves:
        alone = read(model, half, 4)
        assert alone.scale < together.scale and alone.minibatch < together.minibatch
        assert all(together.kept[key].variance > one.variance for key, one in alone.kept.items())
    agrees(model, both)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_weights_single_out_a_parameter(name):
    """With the weight of one parameter alone, what a tape says is the variance of that one's gradient, and that is what
    the choice of weights is told beforehand."""
    run = classify(normal(64, 32))
    model = seeded(mlp)
    (tape,) = collect(model, run, 3)
    hf_actnn.controller(model).active = False
    chosen = dict(model.named_parameters())[name]
    owner = id(chosen)
    told = []

    def weigh(responses, squares, added):
        told.append(added[owner])
        return {owner: 2.0}

    reading = sensitivity.read(tape, weigh)
    errors = []
    for _ in range(200):
        model.zero_grad()
        run(model)
        errors.append(chosen.grad.double().flatten())
    found = sum(one.variance for one in reading.kept.values())
    assert found == pytest.approx(2 * float(torch.stack(errors).var(0).sum()), rel=0.2)
    assert told == [pytest.approx(found / 2, rel=1e-6)]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_added_to_parameters_is_what_kept_tensors_cause(name):
    build, shape, _ = NETWORKS[name]
    (tape,) = collect(seeded(build), classify(normal(*shape)), 2)
    told: dict[int, float] = {}
    reading = sensitivity.read(tape, lambda responses, squares, added: told.update(added) or dict.fromkeys(added, 1.0))
    assert len(told) > 3
    assert sum(told.values()) == pytest.approx(sum(one.variance for one in reading.kept.values()), rel=1e-6)


def test_two_backward_passes_of_one_graph():
    """`retain_graph`: what the second pass shows is added to what the first one did. Both read the same codes, so that
    the truth is up to twice that."""
    model, x = seeded(mlp), normal(32, 32)

    def run(model: nn.Module, passes: int) -> None:
        loss = model(x).square().mean()
        for at in range(passes):
            loss.backward(retain_graph=at + 1 < passes)

    once, twice = (read(model, lambda model, n=n: run(model, n), 4) for n in (1, 2))
    assert twice.is_finite
    assert twice.kept.keys() == once.kept.keys()
    assert twice.scale == pytest.approx(2 * once.scale, rel=0.5)
    for key, one in once.kept.items():
        assert one.variance < twice.kept[key].variance < 4.5 * one.variance


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(48, 48), Twice(), nn.Linear(10, 10)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(F.gelu(x))


@pytest.mark.parametrize(
    "reentrant",
    [
        False,
        True,
    ],
    ids=["non-reentrant", "reentrant"],
)
def test_checkpointed_blocks(reentrant):
    x = normal(32, 48).requires_grad_()
    model, run = seeded(lambda: Checkpointed(reentrant)), classify(x)
    without = gradient(model, run)
    reading = read(model, run, 4)
    assert reading.is_finite
    assert reading.scale > 0
    assert any(key.startswith(("stem", "head", ":gelu")) for key in reading.kept)
    assert all(one.variance >= 0 for one in reading.kept.values())
    tapes = collect(model, run, 4)
    found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert tapes
    assert (found - without).norm() < 0.2 * without.norm()


def test_what_a_measurement_decoded_does_not_lie_beside_the_next_node():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))
    hf_actnn.convert(model, level="L3", min_numel=0)
    idle = []
    for part in model:
        part.register_forward_hook(
            lambda part, args, out: out.register_hook(lambda grad: idle.append(buffers.nbytes()[1])) and None
        )
    for measured in (True, False):
        hf_actnn.controller(model).active = measured
        idle.clear()
        model(torch.randn(512, 64)).sum().backward()
        hf_actnn.controller(model).step()
        assert len(idle) == 5 and any(idle) == (not measured)
