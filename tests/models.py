"""Small vision models that tests of several folders share, and one training step of any of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class Example(NamedTuple):
    """How a model is built, and the side of the images it takes."""

    build: Callable[[], nn.Module]
    size: int


def _hf(kind: str, attention: str | None = None, **fields: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **fields)
        if attention is not None:
            config._attn_implementation = attention
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    return build


def _timm(name: str, **fields: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **fields)

    return build


def _vit(attention: str, dropout: float) -> Callable[[], nn.Module]:
    return _hf(
        "ViT",
        attention,
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=dropout,
    )


EXAMPLES: dict[str, Example] = {
    # The fused attention; with attention dropout, which on the CPU is the composite one; and the one written out.
    "hf_vit_sdpa": Example(_vit("sdpa", 0.0), 32),
    "hf_vit_sdpa_dropout": Example(_vit("sdpa", 0.1), 32),
    "hf_vit_eager": Example(_vit("eager", 0.1), 32),
    # Two blocks per stage, so that shifted windows and their masks take part.
    "hf_swin": Example(
        _hf(
            "Swin",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            drop_path_rate=0.2,
        ),
        32,
    ),
    "hf_convnext": Example(
        _hf(
            "ConvNext",
            hidden_sizes=[16, 32],
            depths=[2, 2],
            num_stages=2,
            patch_size=2,
            drop_path_rate=0.3,
            layer_scale_init_value=0.5,
        ),
        32,
    ),
    "hf_resnet": Example(
        _hf("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck"), 64
    ),
    "timm_resnet": Example(_timm("resnet10t", channels=(16, 24, 32, 40), drop_rate=0.1, drop_path_rate=0.2), 64),
    "timm_vit": Example(
        _timm(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=64,
            depth=2,
            num_heads=2,
            drop_rate=0.1,
            attn_drop_rate=0.1,
            proj_drop_rate=0.1,
            drop_path_rate=0.2,
        ),
        32,
    ),
    "timm_convnext": Example(
        _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), drop_path_rate=0.3, ls_init_value=0.5), 64
    ),
    # Batch norm with an activation inside (timm's BatchNormAct2d), squeeze and excite, SiLU, drop path.
    "timm_efficientnet": Example(_timm("test_efficientnet", drop_rate=0.1, drop_path_rate=0.2), 64),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The named model in training mode, the same weights each time."""
    torch.manual_seed(seed)
    return EXAMPLES[name].build().train()


def batch(name: str, count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and labels for the named model."""
    size = EXAMPLES[name].size
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, size, size, generator=generator),
        torch.randint(0, CLASSES, (count,), generator=generator),
    )


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a Hugging Face or timm model."""
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def step(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One forward and backward pass.

    Returns:
        The logits, torch's generator state after the forward pass, and the gradients by parameter name.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = logits(model, images)
    state = torch.get_rng_state()
    F.cross_entropy(out, labels).backward()
    return out.detach(), state, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def whole(grads: dict[str, Tensor]) -> Tensor:
    """All gradients in one float64 vector."""
    return torch.cat([g.double().flatten() for g in grads.values()])


def cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return F.cosine_similarity(whole(left), whole(right), dim=0).item()


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return ((whole(found) - whole(expected)).norm() / whole(expected).norm()).item()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model and an independent copy of it."""
    return model, copy.deepcopy(model)
