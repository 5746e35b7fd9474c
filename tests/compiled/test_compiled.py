"""torch.compile of converted models: exact forwards, unbiased codes, real savings, no graph breaks."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import hf_actnn
from hf_actnn.codec import graphs
from hf_actnn.errors import ConversionError
from hf_actnn.saving import compiled, partition, rows, scope

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def fresh():
    """Each test compiles for itself: a graph from the cache of an earlier run would not be divided, and nothing would
    be said of it. Loops over single values compile faster than those over vectors."""
    torch._dynamo.reset()
    counters.clear()
    compiled._warned.clear()
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.more = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.more(x)).mean((2, 3)))


MODELS = {"tokens": (Tokens, (8, 64, 64)), "images": (Images, (8, 3, 32, 32))}


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def by_block(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile()
    return model


def parts(model: nn.Module) -> nn.Module:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = torch.compile(block)
    return model


def make(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    return kind().train(), torch.randn(shape), torch.randint(0, 10, shape[:1])


def gradient(run, model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor, int]:
    """Loss, gradient and the bytes held."""
    model.zero_grad()
    with hf_actnn.track_memory(model) as memory:
        loss = F.cross_entropy(run(x), labels)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), memory.saved_bytes


@pytest.mark.parametrize(
    "name, route, ratio",
    [
        ("tokens", whole, 6),
        ("tokens", in_place, 6),
        ("tokens", by_block, 5),
        ("tokens", parts, 5),
        ("images", whole, 3),
    ],
)
def test_exact_forward_close_gradient_and_few_bytes(name, route, ratio):
    plain, x, labels = make(name)
    model = copy.deepcopy(plain)
    reference = torch.compile(plain) if route in (whole, in_place) else plain
    loss, exact, plain_bytes = gradient(reference, plain, x, labels)
    breaks = sum(counters["graph_break"].values())
    hf_actnn.convert(model, bits=4)
    found_loss, found, held = gradient(route(model), model, x, labels)
    # The forward pass: of the same graph the same numbers; of an eager one within its rounding.
    assert found_loss == pytest.approx(loss, abs=0 if reference is not plain else 1e-5)
    assert F.cosine_similarity(found.double(), exact.double(), 0) > 0.99
    assert held < plain_bytes / ratio
    assert sum(counters["graph_break"].values()) == breaks


def test_no_branch_is_decided_by_codes():
    """At one bit the mask of a ReLU, read from codes, would be another one; the gradient of what is before it shows."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    x, cotangent = torch.randn(64, 64), torch.randn(64, 64)
    model = hf_actnn.convert(copy.deepcopy(plain), bits=1)
    (plain(x) * cotangent).sum().backward()
    (torch.compile(model)(x) * cotangent).sum().backward()
    assert torch.allclose(model[0].bias.grad, plain[0].bias.grad, atol=1e-5)
    assert not torch.allclose(model[0].weight.grad, plain[0].weight.grad, atol=1e-3)  # of codes, so it was compressed


def draws(bits: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a model that is linear in what is coded, ``[count, values]``, and the exact one."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x, cotangent = torch.randn(64, 32), torch.randn(64, 8)
    (plain(x) * cotangent).sum().backward()
    exact = torch.cat([p.grad.flatten() for p in (plain[0].weight, plain[2].weight)]).double()
    model = hf_actnn.convert(copy.deepcopy(plain), bits=bits, min_numel=0)
    run, found = torch.compile(model), []
    for _ in range(count):
        model.zero_grad()
        (run(x) * cotangent).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in (model[0].weight, model[2].weight)]).double())
    return torch.stack(found), exact


def squared_deviation(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean of z^2 over the values: 1 where the mean of the draws is off by chance alone."""
    z = (found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)
    return float(z[found.std(0) > 0].square().mean())


def test_unbiased_with_fresh_noise_in_every_step():
    found, exact = draws(2, 400)
    assert (found[0] != found[1]).any() and (found.std(0) > 0).double().mean() > 0.9
    # 1280 values, correlated in groups: the standard error of the mean of z^2 is below 0.1.
    assert 0.7 < squared_deviation(found, exact) < 1.4
    # Draws are independent: neighbours do not resemble each other.
    off = found - found.mean(0)
    assert abs(float(F.cosine_similarity(off[1:].flatten(), off[:-1].flatten(), 0))) < 0.02


def test_a_planted_bias_is_noticed(monkeypatch):
    right = graphs.ops.quantize
    monkeypatch.setattr(graphs.ops, "quantize", lambda x, *more: right(x + 0.1 * x.abs().mean(), *more))
    assert squared_deviation(*draws(2, 400)) > 1.6


class Spread(nn.Module):
    """Channels of very different deviation, normalised in maps of 16 values."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        exponents = torch.linspace(-2, 2, 16)[torch.randperm(16)]
        self.register_buffer("scale", 10 ** exponents.repeat_interleave(4).view(1, 64, 1, 1))
        self.convolution, self.norm, self.head = nn.Conv2d(64, 64, 1, groups=64), norm, nn.Conv2d(64, 10, 4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.norm(self.convolution(x) * self.scale))).flatten(1)


NORMS = {"batch": lambda: nn.BatchNorm2d(64), "group": lambda: nn.GroupNorm(16, 64), "all": lambda: nn.GroupNorm(1, 64)}


@pytest.mark.parametrize(
    ("kind", "form"), [("batch", "fp32"), ("batch", "channels_last"), ("batch", "bfloat16"), ("group", "bfloat16")]
)
def test_narrow_channels_are_not_drowned(kind, form, monkeypatch):
    """What is normalised is coded, as in eager mode, where groups hold channels of different deviations."""
    x, labels = torch.randn(16, 64, 4, 4), torch.randint(0, 10, (16,))
    x = x.contiguous(memory_format=torch.channels_last) if form == "channels_last" else x

    def found(model: nn.Module, run) -> tuple[float, torch.Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "bfloat16"):
            return gradient(run, model, x, labels)

    def deviation() -> tuple[float, int]:
        model = hf_actnn.convert(Spread(NORMS[kind]()), bits=4, min_numel=64)
        run, squares = torch.compile(model), []
        for _ in range(8):
            loss, g, nbytes = found(model, run)
            assert loss == pytest.approx(exact_loss, rel=1e-5)
            squares.append(float((g - exact).square().sum() / exact.square().sum()))
        return sum(squares) / 8, nbytes

    plain = Spread(NORMS[kind]())
    # Compiled, bfloat16 is rounded less often; float32 is the same to what is asked for here, and needs no C++.
    exact_loss, exact, _ = found(plain, torch.compile(plain) if form == "bfloat16" else plain)
    ours, nbytes = deviation()
    torch._dynamo.reset()
    monkeypatch.setattr(rows, "GROUPS_OF_ONE_SPREAD", 0)
    before, as_many = deviation()
    assert ours < before / 10 and ours < 0.05
    assert nbytes == as_many


def test_one_group_of_all_channels_is_coded_as_it_is(monkeypatch):
    """Seen where inductor divides the graph; its parts then run as they are, without C++ for them."""
    inductor = partial(compile_fx.compile_fx, inner_compile=lambda graph, inputs, **settings: graph.forward)
    found: list[object] = []
    look = partition.spread_of
    monkeypatch.setattr(rows, "GROUPS_OF_ONE_SPREAD", 2)  # 1024 values are four groups
    monkeypatch.setattr(partition, "spread_of", lambda *args: found.append(look(*args)) or found[-1])
    x, labels = torch.randn(16, 64, 4, 4), torch.randint(0, 10, (16,))
    for kind, normalised in (("all", 0), ("group", 1)):
        found.clear()
        torch._dynamo.reset()
        model = hf_actnn.convert(Spread(NORMS[kind]()), bits=8, min_numel=64)
        gradient(torch.compile(model, backend=inductor), model, x, labels)
        assert len(found) > 1 and sum(one is not None for one in found) == normalised


def test_attention_is_differentiated_at_its_codes():
    """With logits as sharp as trained ones a logsumexp that was kept exactly would make the gradients explode."""
    plain, x, labels = make("tokens")
    with torch.no_grad():
        for block in plain.blocks:
            block.qkv.weight[:128] *= 4
    _, exact, _ = gradient(plain, plain, x, labels)
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2)
    _, eager, _ = gradient(model, model, x, labels)
    _, found, _ = gradient(torch.compile(model), model, x, labels)
    limit = 3 * (eager - exact).norm() + 0.05 * exact.norm()
    assert (found - exact).norm() < limit


def test_statistics_stay_exact():
    """Of many rows they are as large as other tensors; coded, they would scale whole rows wrongly."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8))
    x = torch.randn(4096, 64) * torch.rand(4096, 1).exp2() * 4
    plain(x).square().sum().backward()
    errors = []
    for how in (lambda model: model, torch.compile):
        model = hf_actnn.convert(copy.deepcopy(plain), bits=2)
        model.zero_grad()
        how(model)(x).square().sum().backward()
        errors.append((model[1].weight.grad - plain[1].weight.grad).norm())
    assert errors[1] < 1.5 * errors[0]


def test_what_is_left_out_stays_exact():
    plain, x, labels = make("images")
    _, exact, plain_bytes = gradient(torch.compile(plain), plain, x, labels)
    model = hf_actnn.convert(make("images")[0], bits=2, overrides={"stem": "exact", "more": "exact"})
    _, found, held = gradient(torch.compile(model), model, x, labels)
    assert held >= 0.9 * plain_bytes
    assert torch.allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize(
    "backend, arguments, said",
    [
        ("aot_eager", {"bits": 2}, "keeps its activations uncompressed"),
        ("inductor", {"bits": "auto"}, "bits are not chosen in compiled graphs: every tensor gets 4"),
        ("inductor", {"level": "L4", "bits": 2}, "nothing is swapped"),
    ],
)
def test_what_is_not_done_is_said(backend, arguments, said):
    level = arguments.pop("level", None)
    model = hf_actnn.convert(nn.Linear(64, 64), *([level] if level else []), **arguments)
    with pytest.warns(hf_actnn.ActNNWarning, match=said):
        torch.compile(model, backend=backend)(torch.randn(64, 64)).sum().backward()


def test_varying_sizes_are_said():
    model = hf_actnn.convert(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)), bits=2)
    run = torch.compile(model, dynamic=True)
    with pytest.warns(hf_actnn.ActNNWarning, match="sizes that vary"):
        run(torch.randn(48, 64)).sum().backward()


def test_evaluation_and_plain_models_have_no_marks():
    model = hf_actnn.convert(nn.Linear(64, 64), bits=2).eval()
    x = torch.randn(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_actnn.ActNNWarning)
        run = torch.compile(model, backend="aot_eager")
        assert torch.equal(run(x), model(x))
        plain = nn.Linear(64, 64)
        torch.compile(plain)(x).sum().backward()
    assert plain.weight.grad is not None


def test_sample_ids_never_reach_the_model():
    model = hf_actnn.convert(Tokens(), "L3")
    x = torch.randn(8, 64, 64)
    with pytest.warns(hf_actnn.ActNNWarning, match="bits are not chosen in compiled graphs"):
        torch.compile(model, fullgraph=True)(x, sample_id=torch.arange(8)).sum().backward()


class Checkpointed(Tokens):
    def __init__(self) -> None:
        super().__init__()
        del self.blocks[1]

    def forward(self, x):
        return self.head(torch.utils.checkpoint.checkpoint(self.blocks[0], x, use_reentrant=False).mean(1))


def test_checkpoints_in_a_graph_are_said_not_to_be_followed_and_gradients_stay_right():
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(8, 64, 64)
    model(x).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    hf_actnn.convert(model, bits=8)
    with pytest.warns(hf_actnn.ActNNWarning, match="a gradient checkpoint inside a compiled graph is not followed"):
        torch.compile(model)(x).square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - exact).norm() < 0.02 * exact.norm()


class Masked(nn.Module):
    """Attention with something added to its scores, or left out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x, mask):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(n, tokens, 64))


def test_what_attention_adds_to_its_scores_is_exact():
    """It is exponentiated: coded, minus infinity makes a gradient nan, and -10,000 a finite and wrong one."""
    torch.manual_seed(0)
    plain, x = Masked(), torch.randn(8, 32, 64)
    on = (torch.rand(8, 1, 32, 32) < 0.7) | torch.eye(32, dtype=torch.bool)
    masks = [on, *(torch.zeros(on.shape).masked_fill(~on, low) for low in (-torch.inf, -1e4))]
    masks.append(3 * torch.randn(on.shape))
    model = hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=1)
    run = torch.compile(model)
    for mask in masks:
        found = []
        for call, one in ((plain, plain), (run, model)):
            one.zero_grad()
            call(x, mask).square().mean().backward()
            found.append(torch.cat([parameter.grad.flatten() for parameter in one.parameters()]))
        exact, coded = found
        assert 0 < float((coded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("activation", [nn.ELU, nn.SELU, nn.CELU, nn.Hardswish])
def test_no_formula_is_read_on_the_wrong_side(activation):
    """An exponential of a code on the other side of zero is bounded by nothing."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), activation(), nn.Linear(128, 8))
    x = 20 * torch.randn(128, 64)
    plain(x).mean().backward()
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2, min_numel=1)
    model.zero_grad()
    torch.compile(model)(x).mean().backward()
    exact, coded = (torch.cat([one.grad.flatten() for one in each.parameters()]) for each in (plain, model))
    assert 0 < float((coded - exact).norm() / exact.norm()) < 1


def test_another_seed_is_another_graph():
    """Compiled code is kept on disk, and the seed is a constant in it."""
    labels = set()
    for seed in (0, 1):
        model = hf_actnn.convert(nn.Sequential(nn.Linear(4, 4)), bits=2, seed=seed)
        labels.add(model._actnn.label)
        assert compiled.of(model._actnn.label).bits == 2
    assert len(labels) == 2


def test_every_class_has_code_of_its_own():
    """Torch compiles a code object some times and no more: blocks of other classes must not use them up."""
    calls = []
    for kind in (nn.Linear, nn.Conv2d, Block, Tokens):
        made = hf_actnn.convert(
            nn.Sequential(kind(4, 4, 1) if kind is nn.Conv2d else kind(*[8] * (kind is nn.Linear) * 2))
        )
        calls.append(type(made[0]).__call__.__code__)
        made[0].compile()
        calls.append(made[0]._compiled_call_impl._torchdynamo_orig_callable.__func__.__code__)
    assert len({id(code) for code in calls}) == len(set(calls)) == 8


def test_a_forward_that_is_compiled_by_itself_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ConversionError, match="compiled by itself"):
        hf_actnn.convert(model)
    model = hf_actnn.convert(nn.Sequential(nn.Linear(8, 8)), bits=2)
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ConversionError, match="compiled by itself"):
        model(torch.randn(4, 8, requires_grad=True))


def test_a_compiled_part_that_is_interrupted_leaves_nothing_behind():
    class Interrupted(nn.Module):
        stop = True

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt
            return 2 * x

    part = Interrupted()
    model = hf_actnn.convert(nn.Sequential(nn.Linear(64, 64), part, nn.GELU()), bits=4, min_numel=1)
    model[1] = torch.compile(part, backend="eager")
    x = torch.randn(64, 64)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert scope._thread.scope is None and not scope._thread.pauses
    part.stop = False
    torch._dynamo.reset()
    with hf_actnn.track_memory(model) as memory:
        model(x).sum().backward()
    assert 0 < memory.saved_bytes < x.nbytes
