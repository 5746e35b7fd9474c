"""A converted module is the original with one mixin: parameters, names, hooks, copies and pickles are as before."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import hf_actnn
from hf_actnn.nn.registry import KINDS
from tests.models import assert_same, batch, cosine, gradients, make, relative_error, step, twins

MODELS = ["hf_vit_sdpa", "hf_resnet", "timm_convnext", "timm_efficientnet"]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def grads_of(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images() if x is None else x).square().mean().backward()
    return gradients(model)


def convert(model: nn.Module, bits: int = 2) -> nn.Module:
    return hf_actnn.convert(model, bits=bits, min_numel=0)


# -- what conversion leaves as it was -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_only_classes_change(name):
    model = make(name)
    classes = {path: type(module) for path, module in model.named_modules()}
    parameters = {key: (id(p), p.data_ptr(), p._version, p.requires_grad) for key, p in model.named_parameters()}
    buffers = {key: id(b) for key, b in model.named_buffers()}
    values = {key: value.clone() for key, value in model.state_dict().items()}
    assert convert(model) is model
    for path, module in model.named_modules():
        old, new = classes[path], type(module)
        assert isinstance(module, old)
        assert (new.__name__, new.__qualname__, new.__module__) == (old.__name__, old.__qualname__, old.__module__)
        assert new.__doc__ == old.__doc__
        assert inspect.signature(module.forward) == inspect.signature(old.forward.__get__(module))
    after = {key: (id(p), p.data_ptr(), p._version, p.requires_grad) for key, p in model.named_parameters()}
    assert after == parameters
    assert {key: id(b) for key, b in model.named_buffers()} == buffers
    assert list(model.state_dict()) == list(values)
    assert_same(model.state_dict(), values)
    hf_actnn.revert(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any("_actnn" in key for module in model.modules() for key in module.__dict__)


@pytest.mark.parametrize("name", MODELS)
def test_pickle_after_revert_is_byte_for_byte_as_before(name):
    model = make(name)
    before = pickle.dumps(model)
    convert(model)
    assert pickle.dumps(hf_actnn.revert(model)) == before


def test_revert_restores_behaviour_after_training():
    plain, model = twins(small())
    convert(model)
    grads_of(model)
    model.load_state_dict(plain.state_dict())
    hf_actnn.revert(model)
    assert not hf_actnn.is_converted(model)
    assert_same(grads_of(model), grads_of(plain))
    assert hf_actnn.revert(model) is model  # again, and of a model never converted: nothing happens


def test_converting_again_reconfigures():
    model = convert(small(), 2)
    classes = [type(module) for module in model.modules()]
    convert(model, 8)
    assert [type(module) for module in model.modules()] == classes
    grads_of(model)
    assert {row.bits for row in hf_actnn.report(model).rows if row.kept == "quantized"} == {8}
    exact = grads_of(small())
    assert relative_error(gradients(model), exact) < 0.05
    hf_actnn.revert(model)
    assert type(model) is nn.Sequential


# -- copies ---------------------------------------------------------------------------------------------


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_copies_train_on_and_are_independent(name, duplicate):
    model = convert(make(name), 8)
    images, labels = batch(name)
    other = duplicate(model)
    assert hf_actnn.is_converted(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    first = step(model, images, labels)[2]
    assert_same(step(other, images, labels)[2], first)  # weights, configuration and random streams came along
    assert hf_actnn.report(other).config == hf_actnn.report(model).config
    assert any(row.kept == "quantized" for row in hf_actnn.report(other).rows)
    # Independent: reconfiguring or reverting one leaves the other.
    hf_actnn.revert(other)
    assert hf_actnn.is_converted(model)
    assert cosine(step(other, images, labels)[2], first) > 0.999
    step(model, images, labels)


def test_a_copy_is_made_between_forward_and_backward():
    model = convert(small(), 8)
    pending = model(images()).square().mean()
    other = copy.deepcopy(model)
    pending.backward()
    grads_of(other)


def test_a_converted_model_can_be_collected():
    model = convert(small())
    grads_of(model)
    gone = weakref.ref(model)
    del model
    import gc

    gc.collect()
    assert gone() is None


# -- parameters that are shared, frozen, or computed ----------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


@pytest.mark.parametrize("duplicate", [lambda m: m, by_deepcopy, by_pickle], ids=["itself", "deepcopy", "pickle"])
def test_tied_weights_stay_tied(duplicate):
    torch.manual_seed(0)
    plain, model = twins(Tied())
    model = duplicate(convert(model, 8))
    assert model.a.weight is model.b.weight
    x = torch.randn(32, 16)
    assert relative_error(grads_of(model, x), grads_of(plain, x)) < 0.05


def test_an_optimizer_made_before_or_after():
    for before in (True, False):
        plain, model = twins(small())
        if before:
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
            convert(model, 8)
        else:
            convert(model, 8)
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        reference = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9)
        start = copy.deepcopy(plain.state_dict())
        for _ in range(3):
            for one, opt in ((model, optimizer), (plain, reference)):
                grads_of(one)
                opt.step()
        moved = {k: p.detach() - start[k] for k, p in model.named_parameters()}
        expected = {k: p.detach() - start[k] for k, p in plain.named_parameters()}
        assert cosine(moved, expected) > 0.99


@pytest.mark.parametrize("frozen", [["0."], ["1.", "4."], ["0.", "1."]], ids=str)
def test_frozen_parts(frozen):
    plain, model = twins(small())
    for one in (plain, model):
        for name, p in one.named_parameters():
            p.requires_grad_(not name.startswith(tuple(frozen)))
    convert(model, 8)
    found, expected = grads_of(model), grads_of(plain)
    assert found.keys() == expected.keys()
    assert relative_error(found, expected) < 0.05
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(tuple(frozen)))


NORMS = {
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    # The older form: hooks in place of a class.
    "old weight_norm": (torch.nn.utils.weight_norm, torch.nn.utils.remove_weight_norm),
    "old spectral_norm": (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ["normed first", "converted first"])
@pytest.mark.parametrize("layer", [0, 4], ids=["convolution", "linear"])
def test_computed_weights(norm, order, layer):
    apply, remove = NORMS[norm]
    plain, model = twins(small())
    for one in (plain, model):
        torch.manual_seed(7)
        if one is model and order == "converted first":
            convert(model, 8)
        apply(one[layer])
        if one is model and order == "normed first":
            convert(model, 8)
    cls = type(plain[layer])
    assert isinstance(
        model[layer], plain[layer].__class__.__bases__[0] if parametrize.is_parametrized(plain[layer]) else cls
    )
    torch.manual_seed(3)
    expected = grads_of(plain)
    torch.manual_seed(3)
    found = grads_of(model)
    assert relative_error(found, expected) < 0.05
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(
        row.kept == "quantized" and row.kind not in ("convolution", "batch_norm", "linear")
        for row in hf_actnn.report(model).rows
    ), "a norm of a weight was coded"
    # Taken off while converted; then reverted: a plain layer again.
    remove(model[layer])
    remove(plain[layer])
    assert relative_error(grads_of(model), grads_of(plain)) < 0.05
    hf_actnn.revert(model)
    assert type(model[layer]) is type(plain[layer])
    assert_same(grads_of(model), grads_of(plain))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("order", ["normed first", "converted first"])
def test_revert_of_a_parametrised_layer(norm, order):
    model = small()
    if order == "normed first":
        NORMS[norm][0](model[0])
        before = type(model[0])
        convert(model)
    else:
        convert(model)
        NORMS[norm][0](model[0])
        before = None
    hf_actnn.revert(model)
    assert parametrize.is_parametrized(model[0])
    grads_of(model)
    assert not any(hasattr(cls, "_actnn_original") for cls in type(model[0]).__mro__)
    if before is not None:
        assert type(model[0]) is before
    assert not hf_actnn.is_converted(model)
    NORMS[norm][1](model[0])
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("order", ["normed first", "converted first"])
def test_deepcopy_of_a_parametrised_layer(order):
    model = small()
    if order == "normed first":
        parametrizations.weight_norm(model[0])
    convert(model, 8)
    if order == "converted first":
        parametrizations.weight_norm(model[0])
    other = copy.deepcopy(model)
    assert_same(grads_of(other), grads_of(model))
    assert other[0].parametrizations.weight.original0 is not model[0].parametrizations.weight.original0
    hf_actnn.revert(other)
    grads_of(model)


# -- hooks ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_as_before(when):
    seen: list[tuple] = []

    def register(model):
        for index, module in enumerate(model):
            module.register_forward_pre_hook(lambda m, a, i=index: seen.append(("pre", i, a[0].shape)))
            module.register_forward_hook(lambda m, a, out, i=index: seen.append(("forward", i, out.shape)))
            module.register_full_backward_hook(lambda m, g, out, i=index: seen.append(("backward", i, out[0].shape)))
        model[4].register_forward_hook(lambda m, a, out: out * 2)
        model[0].weight.register_hook(lambda g: seen.append(("gradient", g.shape)))

    plain, model = twins(small())
    register(plain)
    expected = grads_of(plain)
    expected_seen, seen[:] = list(seen), []
    if when == "before":
        register(model)
    convert(model, 8)
    if when == "after":
        register(model)
    found = grads_of(model)
    assert seen == expected_seen
    assert relative_error(found, expected) < 0.05
    hf_actnn.revert(model)
    seen.clear()
    assert_same(grads_of(model), expected)
    assert seen == expected_seen


def test_activations_handed_out_by_hooks_are_the_real_ones():
    """A forward hook's output is the tensor itself, usable in a loss (feature distillation)."""
    plain, model = twins(small())
    convert(model, 8)
    results = []
    for one in (plain, model):
        features = []
        handle = one[2].register_forward_hook(lambda m, a, out, features=features: features.append(out))
        one.zero_grad()
        out = one(images())
        (out.square().mean() + features[0].square().mean()).backward()
        handle.remove()
        results.append((features[0].detach(), gradients(one)))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[1][1], results[0][1]) < 0.05


# -- the public counterparts ----------------------------------------------------------------------------

SPECIAL = {
    "Linear": (8, 8),
    "MultiheadAttention": (8, 2),
    "TransformerEncoderLayer": (8, 2),
    "TransformerDecoderLayer": (8, 2),
    "GroupNorm": (2, 8),
    "LayerNorm": (8,),
    "RMSNorm": (8,),
    "Threshold": (0.1, 0.0),
}


def arguments(name: str) -> tuple:
    if name in SPECIAL:
        return SPECIAL[name]
    if "Conv" in name:
        return (4, 8, 3)
    if "Norm" in name:
        return (8,)
    if "Pool" in name:
        return (2,)
    return ()


@pytest.mark.parametrize("name", hf_actnn.nn.__all__)
def test_counterparts_are_constructible_like_torch_nns(name):
    original, cls = getattr(nn, name), getattr(hf_actnn.nn, name)
    assert issubclass(cls, original) and cls is not original and cls.__name__ == name
    torch.manual_seed(0)
    expected = original(*arguments(name))
    torch.manual_seed(0)
    found = cls(*arguments(name))
    assert isinstance(found, original) and hf_actnn.is_converted(found)
    assert_same(found.state_dict(), expected.state_dict())
    assert repr(found) == repr(expected)
    assert by_pickle(found).state_dict().keys() == expected.state_dict().keys()
    assert original in KINDS
    hf_actnn.revert(found)
    assert type(found) is original


def test_counterparts_take_a_configuration():
    torch.manual_seed(0)
    layer = hf_actnn.nn.Linear(64, 8, actnn=hf_actnn.ActNNConfig(bits=3, min_numel=0))
    layer(torch.randn(16, 64)).sum().backward()
    assert [row.bits for row in hf_actnn.report(layer).rows if row.kept == "quantized"] == [3]
    with pytest.raises(TypeError):
        hf_actnn.nn.Linear(64, 8, no_such_argument=1)
    with pytest.raises(hf_actnn.errors.ConfigError):
        hf_actnn.nn.Linear(64, 8, actnn="L9")


class Residual(nn.Conv2d):
    """A subclass of a known class with a forward of its own."""

    def forward(self, x):
        return x + super().forward(F.pad(x, (1, 1, 1, 1)))


def test_a_subclass_keeps_its_own_forward():
    torch.manual_seed(0)
    plain, model = twins(nn.Sequential(Residual(3, 3, 3), nn.Flatten(), nn.Linear(192, 4)))
    convert(model, 8)
    assert torch.equal(model(images()), plain(images()))
    assert relative_error(grads_of(model), grads_of(plain)) < 0.05
