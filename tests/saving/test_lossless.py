"""What comes back to the bit from less: masks of two values, classes of pixels, targets and weights of a loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn import codec
from hf_actnn.saving import call as saving_call
from hf_actnn.saving.kept import Exact, Geometry, Kept, TwoValued
from hf_actnn.saving.scope import observers
from hf_actnn.saving.values import two_values
from tests.saving.bench import Bench, run


class Watcher:
    """What each save of some operation was kept as, and the bits that it gives back beside those it had."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.kept: list[Kept] = []

    def saved(self, slot, tensor, path, function):
        if function == self.function:
            self.kept.append(slot.kept)
            if slot.kept.same_bits:
                back = slot.kept.get()
                assert back.dtype == tensor.dtype and back.shape == tensor.shape and back.stride() == tensor.stride()
                assert same_bits(back, tensor)

    def copied(self, kept, path):
        raise AssertionError("nothing is written to")

    def __enter__(self):
        observers().append(self)
        return self

    def __exit__(self, *_):
        observers().remove(self)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b)))


# -- masks of two values -----------------------------------------------------------------------------------------------


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "values",
    [
        lambda dtype: (0.0, -math.inf),
        lambda dtype: (0.0, lowest(dtype)),  # as transformers makes them
        lambda dtype: (0.0, -0.0),  # equal, and of different bits
        lambda dtype: (-100.0, -100.0),  # one value
        lambda dtype: (1 / 3, torch.finfo(dtype).tiny),
    ],
    ids=["inf", "lowest", "signed zeros", "one", "odd"],
)
def test_two_values_come_back_to_the_bit(dtype, values):
    on, off = (torch.tensor(value, dtype=torch.float64).to(dtype) for value in values(dtype))
    mask = torch.where(torch.rand(7, 33) < 0.3, on, off)
    mask[3] = off  # a row that is shut
    split = two_values(mask.view(-1))
    assert split is not None
    kept = TwoValued(codec.pack_mask(split.upper, "nonzero"), Geometry(mask), split.on, split.off)
    assert same_bits(kept.get(), mask)


@pytest.mark.parametrize(
    "flat",
    [
        torch.tensor([0.0, -1.0, -2.0]),
        torch.tensor([0.0, -math.inf, lowest(torch.float32)]),
        torch.tensor([0.0, math.nan]),  # bits of nan are not a float's
        torch.tensor([0, 1]),
        torch.zeros(8, device="meta"),  # to look would stall a device
    ],
    ids=["three", "two lowest", "nan", "integers", "device"],
)
def test_what_has_not_two_values_is_left(flat):
    assert two_values(flat) is None


HEADS, TOKENS = 4, 48


def _shut_row(mask):
    mask[..., 5, :] = -math.inf  # all that it attends to is shut: nan, in the forward pass already
    return mask


MASKS = {
    "plain": lambda mask: mask,
    "batch of one": lambda mask: mask[None, None],
    "spread over heads": lambda mask: mask[None, None].expand(3, HEADS, -1, -1),
    "spread over queries": lambda mask: mask[:1].expand(TOKENS, -1),
    "transposed": lambda mask: mask.t(),
    "shut row": _shut_row,
}


@pytest.fixture
def unpacked(monkeypatch):
    """What masks in bits have come back as, in the order in which they did."""
    found: list[torch.Tensor] = []
    unpack = codec.unpack_mask

    def noted(*arguments):
        found.append(unpack(*arguments))
        return found[-1]

    monkeypatch.setattr(codec, "unpack_mask", noted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", MASKS)
def test_attention_masks(monkeypatch, unpacked, shape, dtype):
    """Kept in bits, and the gradients are those of the mask kept as it is."""
    torch.manual_seed(0)
    additive = torch.zeros(TOKENS, TOKENS, dtype=dtype).masked_fill(torch.rand(TOKENS, TOKENS) < 0.4, -math.inf)
    additive.fill_diagonal_(0.0)
    mask = MASKS[shape](additive)
    inputs = [torch.randn(3, HEADS, TOKENS, 16, dtype=dtype) for _ in range(3)]

    def build():
        bench = Bench(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return hf_actnn.convert(bench, bits=4, min_numel=0)

    with Watcher("scaled_dot_product_attention") as watcher:
        out, found = run(build(), inputs)
    assert any(isinstance(leaf, TwoValued) for kept in watcher.kept for leaf in kept.leaves())
    assert unpacked and all(values.dtype == dtype and set(values.tolist()) == {0.0, -math.inf} for values in unpacked)
    held = {
        leaf.tensor.untyped_storage()._cdata for k in watcher.kept for leaf in k.leaves() if isinstance(leaf, Exact)
    }
    assert additive.untyped_storage()._cdata not in held
    monkeypatch.setattr(saving_call, "two_values", lambda flat: None)
    expected_out, expected = run(build(), inputs)
    assert torch.equal(out.nan_to_num(7.0), expected_out.nan_to_num(7.0))
    for name, gradient in found.items():
        assert torch.equal(gradient.nan_to_num(7.0), expected[name].nan_to_num(7.0)), name


def test_a_mask_of_more_values_stays_exact():
    mask = torch.randint(0, 3, (TOKENS, TOKENS)).float()
    bench = Bench(lambda m, q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    model = hf_actnn.convert(bench, bits=4, min_numel=0)
    with Watcher("scaled_dot_product_attention") as watcher:
        run(model, [torch.randn(3, HEADS, TOKENS, 16)])
    assert any(isinstance(kept, Exact) and kept.tensor is mask for kept in watcher.kept)


def test_a_mask_made_of_booleans_is_made_again():
    """However many values it has, and on any device: nothing has to be looked at."""
    torch.manual_seed(0)
    inside, near = torch.rand(TOKENS, TOKENS) < 0.6, torch.rand(TOKENS, TOKENS) < 0.5
    inside.fill_diagonal_(True)

    def function(m, q):
        mask = torch.where(inside, 0.0, -math.inf).masked_fill(near & inside, -0.5)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    model = hf_actnn.convert(Bench(function), bits=4, min_numel=0)
    with Watcher("scaled_dot_product_attention") as watcher:
        run(model, [torch.randn(3, HEADS, TOKENS, 16)])
    made = [kept for kept in watcher.kept if kept.kind == "recipe: computed again"]
    assert len(made) == 1 and made[0].same_bits
    assert sum(leaf.nbytes for leaf in made[0].leaves()) < TOKENS * TOKENS  # of four bytes each


# -- classes -----------------------------------------------------------------------------------------------------------


class Segments(nn.Module):
    def __init__(self, classes: int, left_out: int, losses: int = 1) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, classes, 1)
        self.left_out, self.losses = left_out, losses

    def forward(self, x, labels):
        loss = F.cross_entropy(self.head(x), labels, ignore_index=self.left_out)
        for _ in range(self.losses - 1):
            loss = loss + F.nll_loss(F.log_softmax(self.head(x), 1), labels, ignore_index=self.left_out)
        return loss


@pytest.mark.parametrize(
    ("classes", "left_out", "bits"),
    [(2, -100, 2), (150, 255, 8), (255, -1, 8), (16, 3, 5), (256, -100, None), (300, -100, None)],
)
def test_classes(classes, left_out, bits):
    torch.manual_seed(0)
    plain = Segments(classes, left_out, losses=2)
    x, labels = torch.randn(2, 4, 24, 20), torch.randint(0, classes, (2, 24, 20))
    labels[:, :5] = left_out
    labels[0, 5, :2] = torch.tensor([0, classes - 1])
    plain(x, labels).backward()
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2, min_numel=0, overrides={"head": "exact"})
    model.zero_grad()
    with Watcher("loss") as watcher:
        model(x, labels).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    coded = [kept for kept in watcher.kept if kept.kind == "offsets"]
    assert len(coded) == (0 if bits is None else 2)
    assert len(set(map(id, coded))) == (0 if bits is None else 1)
    assert bits is None or coded[0].nbytes == labels.numel() * bits / 8
    kept = [kept for kept in watcher.kept if isinstance(kept, Exact) and kept.tensor is labels]
    assert bool(kept) == (bits is None)


def test_labels_with_gaps_stay_exact():
    labels = torch.randint(0, 4, (2, 24, 40))[:, :, ::2]
    model = hf_actnn.convert(Segments(4, -100), bits=2, min_numel=0)
    with Watcher("loss") as watcher:
        model(torch.randn(2, 4, 24, 20), labels).backward()
    assert any(isinstance(kept, Exact) and kept.tensor is labels for kept in watcher.kept)


# -- what has no gradient ----------------------------------------------------------------------------------------------


class Focal(nn.Module):
    """Targets that are one class's or none's, and weights made of the detached logits: as RT-DETR's loss."""

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.head, self.classes = nn.Linear(8, classes), classes

    def loss(self, logits, labels, scores):
        target = F.one_hot(labels, self.classes + 1)[..., :-1]
        wanted = scores.unsqueeze(-1) * target
        weight = 0.75 * F.sigmoid(logits.detach()).pow(2.0) * (1 - target) + wanted
        return F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="none").sum()

    def forward(self, x, labels, scores):
        logits = torch.stack([self.head(x), 2 * self.head(x)])
        return self.loss(logits[0], labels, scores) + self.loss(logits[1], labels, scores)


def focal_inputs():
    torch.manual_seed(0)
    return torch.randn(3, 50, 8), torch.randint(0, 21, (3, 50)), torch.rand(3, 50)


# Under autocast the loss saves a cast of the logits: the logits themselves would be held for the weights alone.
@pytest.mark.parametrize(("autocast", "count"), [(False, 4), (True, 2)])
def test_targets_and_weights_of_a_loss(autocast, count):
    plain, inputs = Focal(), focal_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = plain(*inputs)
    expected.backward()
    model = hf_actnn.convert(copy.deepcopy(plain), bits=2, min_numel=0, overrides={"head": "exact"})
    model.zero_grad()
    with Watcher("loss") as watcher, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*inputs)
    assert torch.equal(loss, expected)
    loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    made = [kept for kept in watcher.kept if kept.kind == "recipe: computed again"]
    assert len(made) == count and all(kept.same_bits for kept in made)


def test_what_a_recipe_reads_may_be_written_to():
    """Autograd did not save the labels: whoever fills them anew is in the right."""

    class Overwriting(Focal):
        def forward(self, x, labels, scores):
            loss = super().forward(x, labels, scores)
            labels.fill_(0)
            scores.zero_()
            return loss

    plain, inputs = Focal(), focal_inputs()
    plain(*inputs).backward()
    overwriting = Overwriting()
    overwriting.load_state_dict(plain.state_dict())
    model = hf_actnn.convert(overwriting, bits=2, min_numel=0, overrides={"head": "exact"})
    model(*[value.clone() for value in inputs]).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_nothing_is_held_for_a_recipe_alone():
    """Here nobody saves the logits: a weight made of them is kept itself, not made again of them."""

    def function(m, x):
        hidden = torch.stack([m.op(x)] * 4)
        weight = hidden.detach()[0].sigmoid()
        return (F.l1_loss(hidden[0], torch.zeros_like(weight), reduction="none") * weight).sum()

    torch.manual_seed(0)
    plain = Bench(function, op=nn.Linear(8, 64))
    x = torch.randn(40, 8, requires_grad=True)
    with hf_actnn.track_memory(plain) as before:
        plain(x)
    with hf_actnn.track_memory(hf_actnn.convert(plain, bits=2, min_numel=0)) as after:
        plain(x)
    assert after.saved_bytes <= before.saved_bytes


def test_frozen_layers_are_not_run_again():
    """What comes out of them has no gradient either, and is data all the same: it is coded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 8))
    for parameter in model[:3].parameters():
        parameter.requires_grad_(False)
    hf_actnn.convert(model, bits=2, min_numel=0)
    with Watcher("linear") as watcher:
        model(torch.randn(32, 64)).sum().backward()
    assert [kept.kind for kept in watcher.kept] == ["quantized"]


# -- enlarged maps -----------------------------------------------------------------------------------------------------


class Enlarged(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.last, self.times = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 16, 1), times

    def enlarged(self, x):
        return F.interpolate(self.first(x), scale_factor=float(self.times), mode="bilinear", align_corners=True)

    def forward(self, x):
        return self.last(self.enlarged(x))


def smooth(shape):
    return torch.ones(shape)


def rough(shape):
    return torch.randint(0, 2, shape).float() * 2 - 1


@pytest.mark.parametrize("bits", [2, 4])
# One gradient for all values that come from one is the worst there is: their errors, one error, add up. A code of the
# large map, whose groups have narrower ranges than those of the small one, errs half as much there at best.
@pytest.mark.parametrize(("gradient", "bound"), [(smooth, 2.5), (rough, 0.7)])
def test_an_enlarged_map_is_coded_before_it_is_enlarged(bits, gradient, bound):
    """In fewer bytes than a code of the large map, and about as well."""
    torch.manual_seed(0)
    plain, x = Enlarged(2), torch.randn(2, 8, 24, 24)
    large = plain.enlarged(x).detach()
    cotangent = gradient((2, 16, 48, 48))

    def weight_gradient(model):
        return torch.autograd.grad(model(x), model.last.weight, cotangent)[0].flatten(1)

    expected = weight_gradient(plain)
    model = hf_actnn.convert(copy.deepcopy(plain), bits=bits, min_numel=0, overrides={"first": "exact"})
    with hf_actnn.track_memory(model) as memory:
        model(x)
    small = 2 * 32 * 24 * 24
    held = memory.saved_bytes - x.nbytes
    assert held == small * (bits + 1) // 8 + 4 * small // 256
    assert held < 4 * small * bits // 8
    ours = torch.stack([weight_gradient(model) for _ in range(60)]) - expected
    codes = [hf_actnn.quantize(large, bits, seed=seed).dequantize() - large for seed in range(60)]
    theirs = torch.stack([torch.einsum("nohw,nchw->oc", cotangent, error) for error in codes])
    assert ours.square().mean() < bound * theirs.square().mean()
    z = ours.mean(0) / (ours.std(0) / 60**0.5)
    assert z.abs().max() < 5  # right on average


def test_who_saves_the_small_map_shares_its_code():
    class Both(Enlarged):
        def forward(self, x):
            small = self.first(x)
            large = F.interpolate(small, scale_factor=2.0)
            return self.last(large).mean() + self.last(small).mean()

    model = hf_actnn.convert(Both(2), bits=2, min_numel=0, overrides={"first": "exact"})
    x = torch.randn(2, 8, 24, 24)
    with hf_actnn.track_memory(model) as memory:
        model(x)
    small = 2 * 32 * 24 * 24
    assert memory.saved_bytes - x.nbytes == small * 3 // 8 + 4 * small // 256
