"""Properties that hold across rules: kept once, groups within rows, unknown operations exact, autocast, nan."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.codec import buffers
from hf_actnn.nn.mixin import membership
from hf_actnn.saving import rules
from hf_actnn.saving.rows import row_length
from tests.saving.bench import Bench, kinds, run


def held(model: nn.Module, *inputs: torch.Tensor) -> int:
    with hf_actnn.track_memory(model) as memory:
        run(model, inputs)
    return memory.saved_bytes


# -- each distinct tensor once --------------------------------------------------------------------------


def test_shared_input_is_kept_once():
    weights = {name: torch.randn(32, 64) for name in "qkv"}
    x = torch.randn(4, 9, 64)
    three = hf_actnn.convert(
        Bench(lambda m, x: F.linear(x, m.q) + F.linear(x, m.k) + F.linear(x, m.v), **weights), bits=4, min_numel=0
    )
    assert held(three, x) == hf_actnn.quantize(x, 4, 64).nbytes


def test_views_of_one_storage_are_kept_once():
    """timm's q, k, v are strided views of one projection: one code, in the projection's own rows."""
    x = torch.randn(2, 9, 96)
    model = Bench(
        lambda m, x: F.scaled_dot_product_attention(*(x + 0).view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0))
    )
    hf_actnn.convert(model, bits=4, min_numel=0)
    assert held(model, x) == hf_actnn.quantize(x, 4, 256, row_length=96).nbytes


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, :, 4:36, 3:35],
        lambda x: x[:, :, 4:36, 3:35].flip(-1),
        lambda x: x[2:5],
        lambda x: x.permute(0, 1, 3, 2)[:, :, :-8],
    ],
    ids=["cropped", "and mirrored", "a part of a data set", "transposed"],
)
def test_of_an_input_that_is_a_view_no_more_is_kept_than_it_shows(part):
    """A crop of a padded batch is coded as the crop, and not with the padding around it that nothing reads."""
    torch.manual_seed(0)
    model = Bench(lambda m, x: F.conv2d(x, m.w), w=torch.randn(8, 3, 3, 3))
    view = part(torch.randn(6, 3, 40, 40))
    out = model(view)
    out.backward(out.detach())
    exact = model.w.grad.clone()
    hf_actnn.convert(model, bits=8, min_numel=0)
    kept = {}
    for name, given in {"as it is": view, "copied": view.contiguous()}.items():
        model.zero_grad()
        with hf_actnn.track_memory(model) as memory:
            out = model(given)
        out.backward(out.detach())
        kept[name] = memory.saved_bytes
        assert torch.allclose(model.w.grad, exact, rtol=0, atol=0.01 * exact.abs().max().item())
    assert kept["as it is"] == kept["copied"] <= 1.1 * view.numel()


PARTS = {
    "halves": lambda x: x.chunk(2),
    "the second half first": lambda x: x.chunk(2)[::-1],
    "halves without a base": lambda x: (x[:3].detach(), x[3:].detach()),
    "halves of channels last": lambda x: x.to(memory_format=torch.channels_last).chunk(2),
    "one by one": lambda x: x.unbind(0),
    "a part and all of it": lambda x: (x[1:2], x),
    "all of it and a part": lambda x: (x, x[1:2]),
    "overlapping": lambda x: (x[:4], x[2:]),
    "all but one": lambda x: (x[:-1], x[1:]),
}


@pytest.mark.parametrize("differentiated", [False, True], ids=["data", "differentiated"])
@pytest.mark.parametrize("part", PARTS.values(), ids=list(PARTS))
def test_parts_of_one_input(part, differentiated):
    """Two pictures in one tensor, a clip of frames: each part is a tensor of its own to the model."""
    torch.manual_seed(0)
    w = torch.randn(8, 3, 3, 3) / 5
    x = torch.randn(6 if part is not PARTS["all but one"] else 12, 3, 20, 20)

    def forward(m, x):
        return torch.stack([F.relu(F.conv2d(one.view(-1, 3, *one.shape[-2:]), m.w)).mean() for one in part(x)])

    found = []
    for bits in (None, 8):
        model = Bench(forward, w=w)
        if bits:
            hf_actnn.convert(model, bits=bits, min_numel=0)
        given = x.clone().requires_grad_(differentiated)
        with hf_actnn.track_memory(model) as memory:
            out = model(given)
        out.backward(torch.arange(1.0, 1 + len(out)))
        found.append([model.w.grad, *([given.grad] if given.grad is not None else [])])
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 0.01 * exact.norm()
    if part is PARTS["all but one"]:
        assert memory.saved_bytes <= 1.05 * (x.numel() + 2 * 8 * 11 * 18 * 18 / 8) + 1000  # and the masks


def test_relu_output_is_the_next_convolutions_input():
    """The input of a ReLU that someone keeps, and one bit: its output is a recipe."""
    x = torch.randn(4, 8, 10, 10)
    w = torch.randn(8, 8, 3, 3) / 8
    chain = hf_actnn.convert(
        Bench(lambda m, x: F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), m.w), w=w), bits=4, min_numel=0
    )
    code, mask, statistics = x.numel() // 2, x.numel() // 8, (2 + 2) * 8 * 4  # and where it was folded, by channel
    assert held(chain, x) <= 1.03 * (code + mask + statistics) + 4 * 4 * 4
    # Where nobody kept the ReLU's input, its output is coded once: for the convolution and for no one else.
    alone = hf_actnn.convert(Bench(lambda m, x: F.conv2d(F.relu(x + 1), m.w), w=w), bits=4, min_numel=0)
    assert held(alone, x) <= 1.03 * (code + mask) + 4 * 4 * 4


# -- rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, permutation, rows, expected",
    [
        ((4, 9, 192), (0, 1, 2), "last", 192),  # tokens
        ((4, 9, 192), (0, 2, 1), "last", 192),  # a transposed view: rows as they lie in memory
        ((4, 8, 10, 10), (0, 1, 2, 3), "sample", 800),
        ((4, 10, 10, 8), (0, 3, 1, 2), "sample", 800),  # channels_last
        ((4, 8, 10, 10), (0, 1, 2, 3), None, 800),
        ((7,), (0,), None, 7),
    ],
)
def test_row_length(shape, permutation, rows, expected):
    x = torch.empty(shape).permute(permutation)
    assert row_length(x.shape, x.stride(), rows) == expected


@pytest.mark.parametrize("width", [96, 192, 320])  # below, at no multiple of, and above a group of 256
def test_a_token_has_its_own_range(width):
    """A class token of another scale beside patch tokens must not widen their groups."""
    x = torch.randn(2, 5, width)
    x[:, 0] *= 1000
    model = Bench(lambda m, x: F.linear(x, m.w), w=torch.randn(8, width))
    _, exact = run(model, [x[:, 1:]])
    hf_actnn.convert(model, bits=8, min_numel=0)
    projection = torch.zeros(2, 5, 8)
    projection[:, 1:] = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(9))
    model.zero_grad()
    model(x).backward(projection)
    assert (model.w.grad - exact["w"]).norm() / exact["w"].norm() < 0.02


# -- what no rule knows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, function",
    [
        ("log", torch.log),
        ("div", lambda x: 1 / x),
        ("pow", lambda x: x**-0.5),
        ("sqrt", torch.sqrt),
        ("cumprod", lambda x: x.cumprod(-1)),
        ("cumsum", lambda x: x.logcumsumexp(-1)),
        ("logsumexp", lambda x: torch.logsumexp(x, -1)),
    ],
)
def test_unknown_operations_stay_exact_and_are_listed(name, function):
    x = torch.rand(16, 128) + 0.01
    plain = Bench(lambda m, x: function(F.relu(x)))
    _, expected = run(plain, [x])
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2, min_numel=0)
    _, found = run(model, [x])
    assert torch.equal(found["x0"], expected["x0"])
    left = [row for row in hf_actnn.report(model).left_alone if row.kind != "relu"]
    assert left and sum(row.nbytes for row in left) >= x.numel() * 4
    assert all(row.reason for row in left)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@torch.jit.script
def scripted(x):
    return torch.tanh(x) * torch.sigmoid(x)


@pytest.mark.parametrize("function", [Cube.apply, scripted], ids=["autograd.Function", "scripted"])
def test_foreign_functions_stay_exact_and_are_listed(function):
    x = torch.randn(16, 128)
    plain = Bench(lambda m, x: function(F.linear(x, m.w)), w=torch.randn(128, 128) / 10)
    _, expected = run(plain, [x])
    model = hf_actnn.convert(Bench(plain.function, w=plain.w.detach()), bits=8, min_numel=0)
    _, found = run(model, [x])
    # Through the foreign function and an exact weight; the scripting compiler may fuse one of the two runs.
    assert torch.allclose(found["x0"], expected["x0"], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["w"], expected["w"])
    assert sum(row.nbytes for row in hf_actnn.report(model).left_alone) >= x.numel() * 4


# -- nothing computed from parameters is coded ----------------------------------------------------------


def standardised(m, x):
    w = (m.w - m.w.mean((1, 2, 3), keepdim=True)) * torch.rsqrt(m.w.var((1, 2, 3), keepdim=True) + 1e-5)
    return F.conv2d(x, w * m.gain)


def test_computed_weights_stay_exact():
    x = torch.randn(4, 8, 9, 9)
    model = Bench(standardised, w=torch.randn(8, 8, 3, 3), gain=torch.ones(8, 1, 1, 1))
    _, expected = run(model, [x])
    hf_actnn.convert(model, bits=2, min_numel=0)
    _, found = run(model, [x])
    assert torch.equal(found["x0"], expected["x0"])
    assert not torch.equal(found["w"], expected["w"])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_autocast(frozen):
    x = torch.randn(8, 17, 64)
    plain = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    if frozen:
        plain[2].weight.requires_grad_(False)
    converted = hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=0)
    grads = []
    for model in (plain, converted):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(leaf)
        out.float().square().mean().backward()
        grads.append(
            torch.cat([leaf.grad.flatten()] + [p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert F.cosine_similarity(*grads, dim=0) > 0.99
    rows = hf_actnn.report(converted).rows
    linear = [row for row in rows if row.kind == "linear"]
    inputs = {"quantized", "recipe: gelu", "recipe: layer_norm"}
    weights = {row.kept for row in linear} - inputs
    if not frozen:
        assert weights <= {"recipe: cast", "parameter"}, weights
    # No weight among the codes: there are as many coded or rebuilt saves as layers whose weight is trained.
    assert sum(row.saves for row in linear if row.kept not in ("recipe: cast", "parameter", "exact")) == 3 - frozen


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "shape",
    [
        (64, 64),  # as many values as the weight has: mistaken for each other, they would fit
        (4, 16, 64),  # the same, with the tokens flattened by the operation
        (4, 64, 16),  # transposed on the way in, so that the operation copies it
        (5, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_autocast_tells_weight_from_input(kind, shape, bias, frozen):
    """A linear layer without a bias saves its weight first, one with a bias its input first; a frozen weight's copy
    comes as an anonymous tensor."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    if kind == "convolution":
        x = x.reshape(-1, 64, 1)
        plain = nn.Sequential(nn.Conv1d(64, 64, 1, bias=bias), nn.Conv1d(64, 8, 1))
    else:
        layers = [nn.Flatten(0, -2)] if shape == (4, 64, 16) else []
        plain = nn.Sequential(*layers, nn.Linear(64, 64, bias=bias), nn.Linear(64, 8))
    plain[-2].weight.requires_grad_(not frozen)
    converted = hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=0)
    grads = []
    for model in (plain, converted):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(leaf.transpose(1, 2) if shape == (4, 64, 16) and kind == "linear" else leaf)
        out.float().square().mean().backward()
        grads.append([leaf.grad] + [p.grad for p in model.parameters() if p.grad is not None])
    for found, expected in zip(*reversed(grads), strict=True):
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    assert torch.equal(grads[0][0], grads[1][0]), "a weight was coded: the input's gradient reads weights alone"
    # Every input is a code, or a recipe; but for a first layer that is frozen, whose input nobody needs.
    data = [row for row in hf_actnn.report(converted).rows if row.kept == "exact"]
    assert frozen or not data, data


def test_autocast_weight_copies_hold_no_bytes():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    hf_actnn.convert(model, bits=8, min_numel=0)
    with hf_actnn.track_memory(model) as memory, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 512)).float().sum().backward()
    assert memory.saved_bytes < 512 * 512


# -- values that are not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_the_gradient(value):
    x = torch.randn(4, 64)
    x[1, 7] = value
    model = hf_actnn.convert(Bench(lambda m, x: F.linear(x, m.w), w=torch.randn(8, 64)), bits=2, min_numel=0)
    _, found = run(model, [x])
    assert not torch.isfinite(found["w"]).all()


CORNERS = torch.tensor([float("nan"), float("inf"), -float("inf"), -3.0, 0.0, -0.0, 6.0, 3.0, 1e-45, -1e-45, 1.0, -1.0])


@pytest.mark.parametrize(
    "function",
    [F.relu, F.relu6, F.leaky_relu, F.hardsigmoid, F.hardtanh, torch.relu_, F.max_pool1d],
    ids=lambda function: function.__name__,
)
def test_corners_and_nan_are_treated_as_torch_does(function):
    x = CORNERS.repeat(1, 4, 8)
    pool = (2,) if "pool" in getattr(function, "__name__", "") else ()
    grads = []
    for convert in (False, True):
        model = Bench(lambda m, x: function(x.clone(), *pool))
        if convert:
            hf_actnn.convert(model, bits=1, min_numel=0)
        grads.append(run(model, [x])[1]["x0"])
    assert torch.equal(grads[0].isnan(), grads[1].isnan())
    assert torch.equal(grads[0].nan_to_num(), grads[1].nan_to_num())


# -- a new rule -----------------------------------------------------------------------------------------


@pytest.fixture
def table():
    """The table of rules, as it was before the test when the test is over."""
    from hf_actnn.saving.rules import rule

    before = dict(rule._RULES)
    yield
    rule._RULES.clear()
    rule._RULES.update(before)


def test_a_new_rule_is_one_function_and_one_row(table):
    """The worked example of docs/architecture.md: ``sin`` saves its input, and its derivative lies in [-1, 1]."""

    def keep(call):
        for slot, _ in call.open_slots():
            kept = call.data_argument(slot, call.argument(0, "input"))
            call.output_recipe("sin", torch.sin, [kept])

    model = Bench(lambda m, x: F.linear(torch.sin(x), m.w), w=torch.randn(8, 64))
    x = torch.randn(4, 9, 64)
    out, exact = run(model, [x])
    hf_actnn.convert(model, bits=8, min_numel=0)
    run(model, [x])
    assert kinds(model)["sin"] == {"exact"}, "it has a rule already: choose another example"

    rules.register(rules.Rule("sin", keep, bounded="the derivative is cos(x), in [-1, 1]"), rules.functions("sin"))
    found_out, found = run(model, [x])
    assert torch.equal(found_out, out)
    assert kinds(model)["sin"] == {"quantized"}
    assert kinds(model)["linear"] <= {"recipe: sin", "recipe: view", "parameter"}
    for name in ("x0", "w"):
        assert (found[name] - exact[name]).norm() / exact[name].norm() < 0.04


def test_every_rule_says_why_it_is_bounded():
    assert all(rule.bounded for rule in rules.all_rules())


def test_a_misspelt_function_is_an_error():
    with pytest.raises(AttributeError, match="geluu"):
        rules.functions("geluu")


# -- memory that changes behind the registry's back --------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [lambda y: y.data[:, :32].zero_(), lambda y: y.data.mul_(0.1), lambda y: y.detach()[:, :32].zero_()],
    ids=["part", "all", "detached"],
)
@pytest.mark.parametrize(
    "before", [lambda x: F.gelu(x + 0), lambda x: F.relu_(F.layer_norm(x, (64,)))], ids=["gelu", "relu_"]
)
def test_a_recipe_is_not_trusted_after_a_write_that_no_version_counts(before, edit):
    def function(m, x):
        y = before(x)
        with torch.no_grad():
            edit(y)
        return F.linear(y, m.w)

    model, x = Bench(function, w=torch.randn(16, 64)), torch.randn(32, 64)
    y = before(x)
    with torch.no_grad():
        edit(y)
    projection = torch.randn(32, 16, generator=torch.Generator().manual_seed(9))
    expected = projection.T @ y
    hf_actnn.convert(model, bits=8, min_numel=0)
    out = model(x)
    out.backward(projection)
    assert (model.w.grad - expected).norm() < 0.02 * expected.norm()


def test_a_constant_that_was_filled_with_data_is_data():
    def function(m, x):
        buffer = torch.zeros(32, 64)
        buffer[:] = x
        return F.linear(F.gelu(F.linear(buffer, m.v)), m.w)

    model = hf_actnn.convert(Bench(function, v=torch.randn(64, 64), w=torch.randn(16, 64)), bits=4, min_numel=0)
    run(model, [torch.randn(32, 64)])
    assert not any(row.reason.startswith("computed from") for row in hf_actnn.report(model).left_alone)


def test_a_weight_changed_in_place_before_use_is_still_a_weight():
    def function(m, x):
        return F.linear(x, (m.w * 1).mul_(2).add_(1))

    model, x = Bench(function, w=torch.randn(16, 64)), torch.randn(32, 64)
    _, exact = run(model, [x])
    _, found = run(hf_actnn.convert(model, bits=2, min_numel=0), [x])
    assert torch.equal(found["x0"], exact["x0"])


# -- weights that are no parameters of the module ------------------------------------------------------------


def _gathered(m, x):
    return F.linear(x, m.w[torch.tensor([3, 1, 2, 5])])


def _replica(m, x):
    return F.linear(x, m.copied)


@pytest.mark.parametrize("function", [_gathered, _replica], ids=["gathered", "a plain attribute"])
def test_weights_of_other_kinds_are_exact(function):
    model, x = Bench(function, w=torch.randn(16, 64)), torch.randn(32, 64)
    model.__dict__["copied"] = torch.randn(4, 64, requires_grad=True) * 1  # as nn.DataParallel's replicas have it
    _, exact = run(model, [x])
    hf_actnn.convert(model, bits=2, min_numel=0)
    model.copied = model.__dict__["copied"].detach().requires_grad_() * 1
    _, found = run(model, [x])
    assert torch.equal(found["x0"], exact["x0"])


# -- awkward arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(0.0, torch.inf), (-torch.inf, 0.0), (-torch.inf, torch.inf), (-1.0, 1.0)])
def test_hardtanh_with_open_ends(limits):
    model, x = Bench(lambda m, x: F.hardtanh(x, *limits)), torch.randn(4, 100)
    _, exact = run(model, [x])
    _, found = run(hf_actnn.convert(model, bits=2, min_numel=0), [x])
    assert torch.equal(found["x0"], exact["x0"])


@pytest.mark.parametrize(
    "function",
    [F.gelu, F.silu, lambda x: F.layer_norm(x, (64,)), F.relu],
    ids=["gelu", "silu", "layer_norm", "relu"],
)
def test_expanded_inputs_are_rebuilt_apart(function):
    """A rebuilt tensor is changed in place; where its elements share memory, a copy of it is."""

    def forward(m, x):
        return F.linear(function((x + 0).mean(1, keepdim=True).expand(-1, 9, -1)), m.w)

    model, x = Bench(forward, w=torch.randn(16, 64)), torch.randn(8, 9, 64)
    _, exact = run(model, [x])
    _, found = run(hf_actnn.convert(model, bits=8, min_numel=0), [x])
    assert (found["w"] - exact["w"]).norm() < 0.02 * exact["w"].norm()


def test_pooling_holds_only_what_is_counted():
    model, x = Bench(lambda m, x: F.max_pool1d(x, 2)), torch.randn(1, 1, 40_000)
    hf_actnn.convert(model, bits=2, min_numel=0)
    gc.collect()
    before = {id(value) for value in gc.get_objects() if isinstance(value, torch.Tensor)}
    out = model(x.requires_grad_())
    gc.collect()
    alive = [v for v in gc.get_objects() if isinstance(v, torch.Tensor) and id(v) not in before and v is not out]
    assert sum(value.untyped_storage().nbytes() for value in alive) < 20_000 * 4


def test_what_a_backward_pass_decoded_into_is_gone_in_the_next_forward_pass():
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append(buffers.nbytes()[1])
            return super().forward(x)

    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), Looks(256, 8))
    hf_actnn.convert(model, bits=2, min_numel=0)
    buffers.release()
    for _ in range(2):
        model(torch.randn(512, 64)).sum().backward()
        assert buffers.nbytes()[1] >= 512 * 256 * 4
    assert seen == [0, 0]


def test_what_is_in_use_outlives_forward_passes():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)), torch.randn(512, 64)
    hf_actnn.convert(model, bits=2, min_numel=0)
    view = hf_actnn.quantize(x, 8).dequantize()[1:]  # lives in the same memory
    expected = view.clone()
    waiting = model(x).sum()
    for _ in range(2):
        model(x).sum().backward()
    waiting.backward()
    assert torch.equal(view, expected)


def test_layers_made_one_by_one_draw_apart_and_a_seed_repeats_a_run():
    codes = []
    for layer in (hf_actnn.nn.Linear(64, 8), hf_actnn.nn.Linear(64, 8)):
        codes.append(membership(layer).session.key())
    assert codes[0] != codes[1]
    x, w = torch.randn(32, 64), torch.randn(8, 64)
    gradients = []
    for _ in range(2):
        model = hf_actnn.convert(Bench(lambda m, x: F.linear(x, m.w), w=w), bits=2, min_numel=0, seed=3)
        gradients.append(run(model, [x])[1]["w"])
    assert torch.equal(*gradients)


class Reserve(torch.autograd.Function):
    """Gives back what it is given, and saves a tensor that it must find unchanged."""

    @staticmethod
    def forward(ctx, x, reserve):
        ctx.save_for_backward(reserve)
        ctx.expected = reserve.tolist()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (reserve,) = ctx.saved_tensors
        assert reserve.tolist() == ctx.expected
        return grad, None


@pytest.mark.parametrize(
    "reserve",
    [torch.arange(40, dtype=torch.uint8), torch.arange(8, dtype=torch.uint8), torch.arange(40.0)],
    ids=["bytes", "as many bytes as channels", "floats"],
)
@pytest.mark.parametrize("statistics", [True, False], ids=["running statistics", "none"])
def test_what_a_normalisation_saves_behind_its_statistics_is_none(monkeypatch, reserve, statistics):
    """As cuDNN's batch normalisation does: bytes for its backward pass, after mean and scale."""
    batch_norm = torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *arguments: Reserve.apply(batch_norm(*arguments), reserve))
    norm = nn.BatchNorm2d(8, track_running_stats=statistics)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    model, x = (
        Bench(lambda m, x: F.conv2d(m.norm(x), m.w), norm=norm, w=torch.randn(4, 8, 1, 1)),
        torch.randn(6, 8, 9, 9),
    )
    _, exact = run(model, [3 * x + 1])
    _, found = run(hf_actnn.convert(model, bits=8, min_numel=0), [3 * x + 1])
    assert "recipe: batch_norm" in {row.kept for row in hf_actnn.report(model).rows}
    for name, gradient in found.items():
        assert (gradient - exact[name]).norm() <= 0.02 * exact[name].norm(), name
