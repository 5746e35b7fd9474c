"""What gradient checkpoints keep of their arguments: coded finely, used once, and exact where it is no activation."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_actnn
from hf_actnn.errors import ConfigError, SavedTensorError
from hf_actnn.memory.track import MemoryReport
from tests.models import batch, cosine, gradients, logits, make

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
ONLY_BOUNDARIES = {"level": "L0", "checkpoint_bits": 8, "min_numel": 0}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *others):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """A stem, and blocks that are checkpointed; what else the first block is given is set from outside."""

    def __init__(self, reentrant: bool, block=Block, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.reentrant, self.others = reentrant, ()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, *self.others, use_reentrant=self.reentrant)
        return x


def pair(reentrant: bool, block=Block, **fields) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Stack(reentrant, block)
    return plain, hf_actnn.convert(copy.deepcopy(plain), **(fields or ONLY_BOUNDARIES))


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict, MemoryReport]:
    model.zero_grad()
    torch.manual_seed(5)
    with hf_actnn.track_memory(model) as memory:
        out = model(x)
        out.square().mean().backward()
    return out.detach(), gradients(model), memory


def images() -> torch.Tensor:
    return torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(1))


def rows(model: nn.Module) -> list:
    return [row for row in hf_actnn.report(model).rows if row.kind == "checkpoint"]


@KINDS
def test_arguments_are_coded(reentrant):
    """Dropout is drawn again as in the forward pass, whose output stays exact."""
    plain, model = pair(reentrant)
    expected, found = run(plain, images()), run(model, images())
    assert torch.equal(expected[0], found[0])
    assert 0.9995 < cosine(found[1], expected[1]) < 1
    values = 3 * images().numel()
    assert expected[2].checkpoint_bytes == 4 * values
    assert values < found[2].checkpoint_bytes < 1.15 * values  # rows of 32: metadata is an eighth
    assert f"of checkpoints{found[2].checkpoint_bytes / 1e6:12.3f}".split() == str(found[2]).splitlines()[-1].split()


@KINDS
def test_bits_are_the_configurations(reentrant):
    held, cosines = [], []
    for bits in (2, 4, 8, "exact"):
        plain, model = pair(reentrant, level="L0", checkpoint_bits=bits, min_numel=0)
        _, expected, _ = run(plain, images())
        _, found, memory = run(model, images())
        held.append(memory.checkpoint_bytes)
        cosines.append(cosine(found, expected))
    assert held == sorted(held) and len(set(held)) == 4
    assert cosines[0] < cosines[1] < cosines[2] < cosines[3]
    assert all(torch.equal(found[name], expected[name]) for name in expected), "kept exactly, yet not the same"


def test_defaults_and_errors():
    assert hf_actnn.ActNNConfig(level="L0").effective_checkpoint_bits is None
    assert hf_actnn.ActNNConfig(level="L3").effective_checkpoint_bits == 8
    assert hf_actnn.ActNNConfig(level="L3", checkpoint_bits="exact").effective_checkpoint_bits is None
    config = hf_actnn.ActNNConfig(checkpoint_bits=5)
    assert hf_actnn.ActNNConfig.from_dict(config.to_dict()).effective_checkpoint_bits == 5
    assert hf_actnn.ActNNConfig().effective_recompute_bits is None
    assert hf_actnn.ActNNConfig(recompute_bits=8).effective_recompute_bits == 8
    for field in ("checkpoint_bits", "recompute_bits"):
        for wrong in (0, 9, 2.5, True, "no"):
            with pytest.raises(ConfigError, match=field):
                hf_actnn.ActNNConfig(**{field: wrong})


class Root(nn.Module):
    """Checkpoints `inner`, which knows its own path, within the forward pass of the whole."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(32, 32), Stack(reentrant), Stack(reentrant)

    def forward(self, x):
        return self.right(self.left(self.stem(x)))


@KINDS
@pytest.mark.parametrize("fields", [{"skip": ("left",)}, {"overrides": {"left": "exact"}}], ids=["skip", "override"])
def test_what_is_left_out_stays_exact(reentrant, fields):
    torch.manual_seed(0)
    model = hf_actnn.convert(Root(reentrant), bits=4, min_numel=0, **fields)
    run(model, images())
    assert {(row.module, row.kept) for row in rows(model)} == {("left", "exact"), ("right", "quantized")}


@KINDS
def test_no_activation_no_code(reentrant):
    """Masks, indices, constants, parameters, what is computed of these, and numbers come back as they were."""
    seen = []

    class Watching(Block):
        def forward(self, x, *others):
            seen.append(others)
            return super().forward(x)

    _, model = pair(reentrant, Watching)
    bias = model.stem.weight * 2  # a position bias, say; outside, so that its graph is no part of the checkpoint's
    others = (torch.rand(64, 64) > 0.5, torch.arange(4096), torch.randn(64, 64), model.stem.weight, bias.detach(), 3)
    model.others = others
    run(model, images())
    assert len(seen) == 6  # three blocks, twice each
    for given in seen:
        for value, other in zip(given, others, strict=True):
            assert torch.equal(value, other) if isinstance(other, torch.Tensor) else value == other
    assert {row.kept for row in rows(model)} >= {"quantized", "exact", "parameter"}


@KINDS
def test_a_tensor_is_kept_once(reentrant):
    """Two checkpoints of one tensor, and a layer that saves it too: one code, the finer one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.three = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            x = self.stem(x) * 2
            one = checkpoint(self.one, x, use_reentrant=reentrant)
            return one + checkpoint(self.two, x, use_reentrant=reentrant) + self.three(x)

    torch.manual_seed(0)
    model = hf_actnn.convert(Twice(), bits=2, min_numel=0)
    x = torch.randn(128, 64)
    with hf_actnn.track_memory(model) as memory:
        out = model(x)
    codes = 128 * 64 + 4 * 128  # 8 bits a value, and the metadata of a group in each row
    assert memory.checkpoint_bytes == codes
    assert memory.saved_bytes == codes + 128 * 64 // 4 + 4 * 128  # the stem's input, at 2 bits
    expected = torch.autograd.grad(out.square().sum(), [model.three.weight])[0]
    hf_actnn.revert(model)
    exact = torch.autograd.grad(model(x).square().sum(), [model.three.weight])[0]
    assert F.cosine_similarity(expected.flatten(), exact.flatten(), dim=0) > 0.9999


@KINDS
def test_a_coarse_code_is_no_source(reentrant):
    """What a layer keeps in 2 bits, or a recipe gives back from 2 bits, a checkpoint keeps in 8 of its own; what is
    held exactly it uses."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.early, self.late = (
                nn.Linear(64, 64),
                nn.LayerNorm(64),
                nn.Linear(64, 64),
                nn.Linear(64, 64),
            )

        def forward(self, x):
            x = self.norm(self.stem(x))
            return self.early(x) + checkpoint(self.late, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    plain = Mixed()
    x = torch.randn(256, 64)
    plain(x).square().mean().backward()
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2, min_numel=0)
    model.zero_grad()
    with hf_actnn.track_memory(model) as memory:
        model(x).square().mean().backward()
    exact, near, coarse = (gradients(m) for m in (plain, model, model))
    assert F.cosine_similarity(near["late.weight"].flatten(), exact["late.weight"].flatten(), dim=0) > 0.9999
    assert F.cosine_similarity(coarse["early.weight"].flatten(), exact["early.weight"].flatten(), dim=0) < 0.999
    assert memory.checkpoint_bytes == 256 * 64 + 4 * 256
    hf_actnn.convert(model, level="L0", checkpoint_bits=8, min_numel=0)
    model.zero_grad()
    with hf_actnn.track_memory(model) as memory:
        model(x).square().mean().backward()
    assert (
        F.cosine_similarity(gradients(model)["late.weight"].flatten(), exact["late.weight"].flatten(), dim=0) > 0.9999
    )
    assert memory.checkpoint_bytes == 4 * 256 * 64  # the tensor that `early` holds exactly


class InPlace(nn.Module):
    """Writes to its own argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x.mul_(2).sin())


class OutOfPlace(InPlace):
    def forward(self, x):
        return self.linear((x * 2).sin())


def test_an_argument_that_is_written_to():
    """A code holds what there was, so the gradient is right; a reference raises what autograd raises."""
    right, _ = pair(False, OutOfPlace)
    _, expected, _ = run(right, images())
    plain, model = pair(False, InPlace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(plain, images())
    for _ in range(2):  # what was recomputed in place must not be what the next pass begins with
        assert cosine(run(model, images())[1], expected) > 0.9999
    hf_actnn.convert(model, bits=8, checkpoint_bits="exact", min_numel=0)
    with pytest.raises(SavedTensorError, match="modified by an inplace operation"):
        run(model, images())


def test_a_block_that_writes_beside_a_layer_that_reads():
    """They share a code; what the block makes of its own values when it runs again, the layer must not get. (A block of
    the reentrant kind cannot write to its argument, which is a leaf when it runs again.)"""

    class Shared(nn.Module):
        def __init__(self, block: type[nn.Module]) -> None:
            super().__init__()
            self.stem, self.block, self.other = nn.Linear(32, 32), block(32), nn.Linear(32, 32)

        def forward(self, x):
            x = self.stem(x) * 2
            return self.other(x) + checkpoint(self.block, x, use_reentrant=False)

    torch.manual_seed(0)
    right = Shared(OutOfPlace)
    model = Shared(InPlace)
    model.load_state_dict(right.state_dict())
    hf_actnn.convert(model, bits=8, min_numel=0)
    results = []
    for one in (right, model):
        out = one(images()).square().mean()
        out.backward(retain_graph=True)
        out.backward()
        results.append(gradients(one))
    assert cosine(results[1], results[0]) > 0.9999


def test_unbiased_where_the_block_is_linear():
    """Of a linear block the gradient is right on average; of others only nearly so, for what is run again is not linear
    in its argument."""
    torch.manual_seed(0)
    stem, block, x = nn.Linear(16, 16), nn.Linear(16, 16), torch.randn(64, 16)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = stem, block

        def forward(self, x):
            return checkpoint(self.block, self.stem(x), use_reentrant=False)

    model = Linear()
    weights = torch.randn(64, 16)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad((model(x) * weights).sum(), block.weight)[0]

    exact = gradient()
    draws = []
    for seed in range(400):
        hf_actnn.convert(model, "L0", checkpoint_bits=2, seed=seed, min_numel=0)
        draws.append(gradient())
    found = torch.stack(draws)
    error = (found.mean(0) - exact) / (found.std(0) / 20)
    assert found.std(0).min() > 0
    assert error.abs().max() < 4.5  # of 256 values
    assert error.mean().abs() < 0.5


@KINDS
def test_eval_and_no_grad_keep_nothing(reentrant):
    plain, model = pair(reentrant)
    with torch.no_grad(), hf_actnn.track_memory(model) as memory:
        model(images())
    assert memory.saved_bytes == 0
    model.eval(), plain.eval()
    out, found, memory = run(model, images())
    expected, gradient, held = run(plain, images())
    assert torch.equal(out, expected) and cosine(found, gradient) > 0.999999
    assert memory.checkpoint_bytes == held.checkpoint_bytes


@KINDS
def test_plain_models_beside_a_converted_one(reentrant):
    """Nothing is patched: a plain model keeps its tensors, in another thread too, while a converted one runs."""
    plain, model = pair(reentrant)
    expected = run(plain, images())
    other, _ = pair(reentrant)
    results = []

    class Within(Block):
        def forward(self, x, *others):
            if not results:
                results.append(None)
                thread = threading.Thread(target=lambda: results.append(run(other, images())))
                state = torch.get_rng_state()
                thread.start()
                thread.join()
                torch.set_rng_state(state)
            return super().forward(x)

    model.blocks[1].__class__ = Within
    run(model, images())
    assert results[1][2].checkpoint_bytes == expected[2].checkpoint_bytes
    assert all(torch.equal(results[1][1][name], expected[1][name]) for name in expected[1])


@KINDS
def test_two_converted_models(reentrant):
    """One at 8 bits, one at 2, both forward before both backward."""
    torch.manual_seed(0)
    plain, fine = pair(reentrant)
    _, coarse = pair(reentrant, level="L0", checkpoint_bits=2, min_numel=0)
    _, expected, _ = run(plain, images())
    fine.zero_grad(), coarse.zero_grad()
    torch.manual_seed(5)
    first = fine(images()).square().mean()
    torch.manual_seed(5)
    second = coarse(images()).square().mean()
    first.backward(), second.backward()
    assert cosine(gradients(fine), expected) > 0.9995 > 0.999 > cosine(gradients(coarse), expected)


class Nested(Block):
    """Checkpoints a part of itself."""

    def forward(self, x, *others):
        return x + checkpoint(lambda y: self.down(F.gelu(self.up(y))), self.norm(x), use_reentrant=False)


@KINDS
def test_nested_checkpoints(reentrant):
    plain, model = pair(reentrant, Nested)
    expected, found = run(plain, images()), run(model, images())
    assert cosine(found[1], expected[1]) > 0.9995
    assert found[2].checkpoint_bytes < expected[2].checkpoint_bytes / 2


@KINDS
def test_autocast(reentrant):
    """Under bf16 the arguments are half as large, and so is what is saved; they come back in their dtype."""
    plain, model = pair(reentrant)
    results = []
    for one in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(5)
            with hf_actnn.track_memory(one) as memory:
                out = one(images())
        one.zero_grad()
        out.float().square().mean().backward()
        results.append((out.detach(), gradients(one), memory.checkpoint_bytes))
    assert torch.equal(results[0][0], results[1][0])
    assert cosine(results[1][1], results[0][1]) > 0.999
    assert results[1][2] < 0.6 * results[0][2]


@KINDS
def test_accumulation_and_many_steps(reentrant):
    plain, model = pair(reentrant)
    for one in (plain, model):
        one.zero_grad()
        torch.manual_seed(5)
        losses = [one(images() + index).square().mean() for index in range(3)]
        for value in losses:
            value.backward()
    assert cosine(gradients(model), gradients(plain)) > 0.9995


@KINDS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["hf_vit_sdpa_dropout", "hf_swin", "timm_vit", "timm_resnet", "timm_convnext"])
def test_switches_of_the_libraries(name, reentrant):
    """Hugging Face's and timm's: dropout, drop path, windows and their masks, channels first and last."""
    plain = make(name)
    values, labels = batch(name, 32)  # of a few samples, batch normalisation makes much of a small error
    if name.startswith("hf"):
        plain.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        import timm.layers

        before = timm.layers.use_reentrant_ckpt()
        timm.layers.set_reentrant_ckpt(reentrant)
        plain.set_grad_checkpointing()
    try:
        model = hf_actnn.convert(copy.deepcopy(plain), **ONLY_BOUNDARIES)
        results = []
        for one in (plain, model):
            torch.manual_seed(3)
            with hf_actnn.track_memory(one) as memory:
                out = logits(one, values + 0)
            F.cross_entropy(out, labels).backward()
            results.append((out.detach(), gradients(one), memory.checkpoint_bytes))
    finally:
        if not name.startswith("hf"):
            timm.layers.set_reentrant_ckpt(before)
    assert torch.equal(results[0][0], results[1][0])
    # Of random weights: what flips the sign under a ReLU counts for more than in a trained model.
    assert cosine(results[1][1], results[0][1]) > (0.99 if "resnet" in name else 0.999)
    assert results[1][2] < 0.4 * results[0][2]


@pytest.mark.parametrize("recompute_bits", ["exact", 8])
def test_selective_checkpoints_are_left_alone(recompute_bits):
    """They count the operations of both runs: a codec's would be in one of them alone."""
    policy = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]

    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(
                lambda value: self.outer(nn.functional.gelu(self.inner(value))),
                1.5 * x,
                use_reentrant=False,
                context_fn=functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy),
            )

    torch.manual_seed(0)
    plain, x = Selective(), torch.randn(64, 64)
    model = hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=1, recompute_bits=recompute_bits)
    for one in (plain, model):
        one(x).square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < 0.02
