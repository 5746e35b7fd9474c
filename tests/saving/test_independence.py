"""Nothing is global: models, calls, threads and passes do not know of each other; a failure leaves nothing on."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import hf_actnn
from hf_actnn.errors import NotAvailableError
from hf_actnn.saving import scope
from hf_actnn.saving.kept import Kept
from tests.models import assert_same, gradients, relative_error


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 6),
    )


def images(count: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def convert(model: nn.Module, bits: int = 8) -> nn.Module:
    return hf_actnn.convert(model, bits=bits, min_numel=0)


def loss(model: nn.Module, x: torch.Tensor, seed: int = 2) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(x).square().mean()


def grads_of(model: nn.Module, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for one in losses:
        one.backward()
    return gradients(model)


def assert_nothing_is_on() -> None:
    assert scope.current() is None
    assert not _get_current_function_mode_stack()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_a_fresh_copy_repeats_its_gradients():
    """The streams are numbered by model and pass, by nothing else; the tests below rest on it."""
    first, second = convert(net(), 2), convert(net(), 2)
    assert_same(grads_of(first, loss(first, images())), grads_of(second, loss(second, images())))
    again = grads_of(first, loss(first, images()))
    assert not torch.equal(again["0.weight"], gradients(second)["0.weight"]), "two passes drew the same numbers"


@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "after the graph is dropped"])
def test_all_is_let_go_at_once(backward):
    """Nothing waits for the cycle collector: it does not run when memory, host's or device's, is short."""
    model = convert(net(), 2)
    gc.collect()
    gc.disable()
    try:
        one = loss(model, images())
        alive = [weakref.ref(thing) for thing in gc.get_objects() if issubclass(type(thing), (Kept, scope.Scope))]
        assert alive, "the count itself does not work"
        if backward:
            one.backward()
        del one
        left = [type(ref()).__name__ for ref in alive if ref() is not None]
    finally:
        gc.enable()
    assert not left


def test_seed_changes_the_draw():
    one = hf_actnn.convert(net(), bits=2, min_numel=0, seed=1)
    two = hf_actnn.convert(net(), bits=2, min_numel=0, seed=2)
    first, second = (grads_of(model, loss(model, images())) for model in (one, two))
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_two_models_interleaved():
    alone = [convert(net(seed), 2) for seed in (0, 1)]
    expected = [grads_of(model, loss(model, images())) for model in alone]
    a, b = (convert(net(seed), 2) for seed in (0, 1))
    loss_a, loss_b = loss(a, images()), loss(b, images())
    assert_same(grads_of(a, loss_a), expected[0])
    assert_same(grads_of(b, loss_b), expected[1])


def test_a_converted_model_inside_another():
    """Converted on its own, before it became a part of a plain and of a converted model."""
    x = images()
    for convert_outer in (False, True):
        torch.manual_seed(0)
        head = nn.Linear(6, 6)
        plain = nn.Sequential(net(), copy.deepcopy(head))
        model = nn.Sequential(net(), convert(head))
        if convert_outer:
            convert(model[0])
        found, expected = (grads_of(m, loss(m, x)) for m in (model, plain))
        assert relative_error(found, expected) < 0.05
        assert not torch.equal(found["1.weight"], expected["1.weight"])
        assert torch.equal(found["0.0.weight"], expected["0.0.weight"]) != convert_outer


def test_two_forwards_before_one_backward():
    model, plain = convert(net()), net()
    found = grads_of(model, loss(model, images(4, 1)) + loss(model, images(4, 5), 6))
    expected = grads_of(plain, loss(plain, images(4, 1)) + loss(plain, images(4, 5), 6))
    assert relative_error(found, expected) < 0.05


def test_two_forwards_then_backwards_in_either_order():
    results = []
    for order in (slice(None), slice(None, None, -1)):
        model = convert(net(), 2)
        model.zero_grad()
        per_loss = {}
        losses = [("a", loss(model, images(4, 1))), ("b", loss(model, images(4, 5), 6))]
        for name, one in losses[order]:
            model.zero_grad()
            one.backward()
            per_loss[name] = gradients(model)
        results.append(per_loss)
    for name in "ab":
        assert_same(results[0][name], results[1][name])


def test_retain_graph_gives_the_same_gradient_again():
    model = convert(net(), 2)
    one = loss(model, images())
    model.zero_grad()
    one.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    one.backward()
    assert_same(gradients(model), first)


def test_accumulation_is_the_sum():
    model = convert(net(), 2)
    parts = []
    for index in range(2):
        parts.append(grads_of(model, loss(model, images(4, index))))
    model = convert(net(), 2)
    model.zero_grad()
    for index in range(2):
        loss(model, images(4, index)).backward()
    for name, g in gradients(model).items():
        assert torch.allclose(g, parts[0][name] + parts[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("counts", [(4, 7, 2), (2, 9, 1)])
def test_changed_batch_size(counts):
    model, plain = convert(net()), net()
    for count in counts:
        found, expected = (grads_of(m, loss(m, images(count))) for m in (model, plain))
        assert relative_error(found, expected) < 0.05


def test_eval_and_no_grad_in_between():
    alone = convert(net(), 2)
    expected = [grads_of(alone, loss(alone, images(4, seed))) for seed in (1, 2)]
    model = convert(net(), 2)
    found = [grads_of(model, loss(model, images(4, 1)))]
    statistics = copy.deepcopy(model[1].state_dict())
    with torch.no_grad():
        model(images(3))
    model[1].load_state_dict(statistics)
    model.eval()
    model(images(5))
    model.train()
    pending = loss(model, images(4, 2))
    model.eval()
    with torch.no_grad():
        model(images(2))
    model.train()
    found.append(grads_of(model, pending))
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


class Failing(nn.Module):
    def forward(self, x):
        if x.shape[0] == 3:
            raise ZeroDivisionError("in the middle")
        return x * 1


@pytest.mark.parametrize("place", [0, 3, 9])
def test_an_exception_leaves_nothing_on(place):
    layers = list(net())
    layers.insert(place, Failing())
    model = convert(nn.Sequential(*layers), 2)
    with pytest.raises(ZeroDivisionError):
        model(images(3))
    assert_nothing_is_on()
    found = grads_of(model, loss(model, images()))
    assert all(torch.isfinite(g).all() for g in found.values())
    assert_nothing_is_on()


def test_an_exception_in_a_hook_and_in_backward():
    model = convert(net(), 2)
    handle = model[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images())
    handle.remove()
    assert_nothing_is_on()
    handle = model[3].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(model, images()).backward()
    handle.remove()
    loss(model, images()).backward()
    assert_nothing_is_on()


def in_threads(*work) -> None:
    """Run functions at the same time; what one raises is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def guarded(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def no_dropout(seed: int) -> nn.Module:
    """Torch's generator is shared by all threads, so dropout would differ from run to run."""
    model = net(seed)
    model[7] = nn.Identity()
    return model


def test_two_models_in_two_threads():
    def train(model: nn.Module, seed: int) -> list[dict[str, torch.Tensor]]:
        return [grads_of(model, model(images(4, seed + step)).square().mean()) for step in range(8)]

    expected = {seed: train(convert(no_dropout(0), 2), seed) for seed in (0, 100)}
    models = {seed: convert(no_dropout(0), 2) for seed in expected}
    found: dict[int, list] = {}
    in_threads(*(lambda seed=seed: found.__setitem__(seed, train(models[seed], seed)) for seed in expected))
    for seed in expected:
        for a, b in zip(found[seed], expected[seed], strict=True):
            assert_same(a, b)


def test_one_model_in_two_threads():
    plain = no_dropout(0)
    plain[1] = nn.GroupNorm(2, 8)
    model = convert(copy.deepcopy(plain))
    expected = {seed: plain(images(4, seed)) for seed in (1, 2)}
    grads: dict[int, tuple] = {}

    def train(seed: int) -> None:
        for _ in range(6):
            out = model(images(4, seed))
            assert torch.equal(out, expected[seed])
            grads[seed] = torch.autograd.grad(out.square().mean(), list(model.parameters()))

    in_threads(lambda: train(1), lambda: train(2))
    for seed in (1, 2):
        exact = torch.autograd.grad(expected[seed].square().mean(), list(plain.parameters()))
        for g, e in zip(grads[seed], exact, strict=True):
            assert (g - e).norm() < 0.1 * e.norm() + 1e-5


class Reentrant(nn.Module):
    """Its forward pass runs a backward pass: an energy model, or a step of adaptation."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        inner = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(F.gelu(self.energy(inner)).sum(), inner)
        return self.last(torch.tanh(self.energy(x + force)))


def test_backward_inside_a_forward():
    torch.manual_seed(0)
    plain = Reentrant()
    model = convert(copy.deepcopy(plain))
    x = torch.randn(32, 16)
    found, expected = (grads_of(m, m(x).square().mean()) for m in (model, plain))
    assert relative_error(found, expected) < 0.05
    assert_nothing_is_on()


def test_double_backward_works_or_says_that_it_cannot():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    model = convert(copy.deepcopy(plain))
    results = []
    for one in (plain, model):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        try:
            (g,) = torch.autograd.grad(one(x).sum(), x, create_graph=True)
            g.square().sum().backward()
        except NotAvailableError as error:
            assert "create_graph" in str(error) or "double" in str(error)
            return
        results.append(gradients(one))
    assert results[1].keys() == results[0].keys()
    assert relative_error(results[1], results[0]) < 0.1


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap over grad"])
def test_functional_transforms_say_that_they_cannot(transform):
    model = convert(nn.Linear(4, 4))
    params = dict(model.named_parameters())

    images = torch.randn(2, 4)

    def of(values, x=images):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    with pytest.raises(NotAvailableError, match=r"torch\.func.*Expected.*revert"):
        if transform == "grad":
            torch.func.grad(of)(params)
        elif transform == "vjp":
            torch.func.vjp(of, params)
        elif transform == "jacrev":
            torch.func.jacrev(of)(params)
        else:
            torch.func.vmap(torch.func.grad(of), in_dims=(None, 0))(params, torch.randn(3, 2, 4))
    assert_nothing_is_on()
    model(torch.randn(2, 4)).sum().backward()


# -- what is kept by reference --------------------------------------------------------------------------

CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize("level", [{"config": "L0"}, {"bits": 4, "min_numel": 0}], ids=["L0", "4bits"])
def test_an_optimizer_step_before_backward_raises(level):
    model = hf_actnn.convert(net(), **level)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model, images()).backward()
    stale = loss(model, images())
    optimizer.step()
    with pytest.raises(RuntimeError, match=CHANGED):
        stale.backward()
    loss(model, images()).backward()


def test_running_statistics_changed_before_backward_raise():
    model = convert(net(), 4)
    model[1].eval()
    stale = loss(model, images())
    model[1].running_var.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        stale.backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "norm, shape",
    [
        (lambda: nn.LayerNorm(16), (4, 16)),
        (lambda: nn.BatchNorm1d(16), (4, 16)),
        (lambda: nn.GroupNorm(2, 16), (4, 16)),
    ],
    ids=["layer", "batch", "group"],
)
def test_a_parent_of_a_recipe_changed_before_backward_raises(norm, shape, name):
    """The linear layer's input is rebuilt from the norm's weight and bias, which plain torch would not read for it."""
    torch.manual_seed(0)
    model = convert(nn.Sequential(norm(), nn.Linear(16, 3)), 4)
    out = model(torch.randn(shape))
    with torch.no_grad():
        getattr(model[0], name).add_(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return torch.sqrt(self.layer(x).square() + 1)  # saves its result, exactly


def test_an_exact_activation_changed_before_backward_raises():
    model = convert(Root(), 4)
    out = model(torch.randn(4, 8))
    total = out.sum()
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        total.backward()


def test_the_coded_original_may_change():
    """What was coded is a copy: changing the original neither raises nor matters."""
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    model = convert(nn.Linear(16, 4), 4)
    other = copy.deepcopy(model)
    out = model(x)
    expected = grads_of(other, other(x.clone()).sum())
    x.zero_()
    assert_same(grads_of(model, out.sum()), expected)
