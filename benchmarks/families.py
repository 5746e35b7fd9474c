"""Vision model families of timm, transformers and torchvision: a tiny model of each for checks, and the usual one.

Everything is built from configurations; nothing is fetched. A tiny model is narrow and has few layers, yet every kind
of layer that its family has, with dropout and drop path on wherever the family has them. Attention dropout is on in
some families only: with it PyTorch takes another path than the fused one, and both should be met.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Classes of the tiny models; labels stay below it for the full ones too, so that they are valid whatever those have.
CLASSES = 10
#: Why some families stay below the usual cosine. With a scale of its own in front of a batch normalisation a weight's
#: exact gradient is zero, or nearly: a small difference of large terms, of which noise in either shows. Few images make
#: it worse.
DIFFERENCES = (
    "weights in front of a batch normalisation, whose exact gradient is a small difference of large terms, with random "
    "weights and few images"
)
#: Side of the images of the full models where the family says nothing else.
FULL_SIDE = 224

Inputs = Tensor | dict[str, Any]
Build = Callable[[], nn.Module]


# -- inputs and losses -------------------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    """Inputs are the same each time and draw nothing from the generator that dropout draws from."""
    return torch.Generator().manual_seed(1)


def _images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=_generator())


def _labels(batch: int) -> Tensor:
    return torch.randint(0, CLASSES, (batch,), generator=_generator())


def _bare(batch: int, side: int) -> Inputs:
    return _images(batch, side)


def _pixels(batch: int, side: int) -> Inputs:
    return {"pixel_values": _images(batch, side)}


def _classified(batch: int, side: int) -> Inputs:
    return {"pixel_values": _images(batch, side), "labels": _labels(batch)}


def _segmented(batch: int, side: int) -> Inputs:
    labels = torch.randint(0, CLASSES, (batch, side, side), generator=_generator())
    return {"pixel_values": _images(batch, side), "labels": labels}


def _detected(batch: int, side: int) -> Inputs:
    """Three boxes per image, as (centre, size), relative to the image."""
    generator = _generator()
    labels = []
    for _ in range(batch):
        centres = 0.3 + 0.4 * torch.rand(3, 2, generator=generator)
        sizes = 0.1 + 0.4 * torch.rand(3, 2, generator=generator)
        classes = torch.randint(0, CLASSES, (3,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([centres, sizes], dim=1)})
    return {"pixel_values": _images(batch, side), "labels": labels}


def _masked(batch: int, side: int) -> Inputs:
    """Three segments per image: bands, so that each has pixels at every resolution."""
    classes = torch.randint(0, CLASSES, (batch, 3), generator=_generator())
    band = torch.arange(side) * 3 // side
    masks = torch.stack([(band == index).float().expand(side, side) for index in range(3)])
    return {
        "pixel_values": _images(batch, side),
        "mask_labels": [masks.clone() for _ in range(batch)],
        "class_labels": list(classes),
    }


def _video(frames: int, patch: int, tubelet: int = 2, share: float = 0.75) -> Callable[[int, int], Inputs]:
    """Clips, and the patches to be predicted: as many in each clip."""

    def make(batch: int, side: int) -> Inputs:
        generator = _generator()
        tokens = frames // tubelet * (side // patch) ** 2
        order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
        return {
            "pixel_values": torch.randn(batch, frames, 3, side, side, generator=generator),
            "bool_masked_pos": order < int(share * tokens),
        }

    return make


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def _own_loss(output: Any, inputs: Inputs) -> Tensor:
    return output.loss


def _cross_entropy(output: Any, inputs: Inputs) -> Tensor:
    assert isinstance(inputs, Tensor)
    return F.cross_entropy(output.float(), _labels(inputs.shape[0]))


def _projection(output: Any, inputs: Inputs) -> Tensor:
    """A random linear function of everything returned, for models that have no loss.

    Not a mean of squares: after a normalisation that hardly depends on the input, and its gradient is rounding noise.
    """
    generator = _generator()
    parts = [
        (found.float() * torch.randn(found.shape, generator=generator)).sum() / found.numel() ** 0.5
        for found in tensors(output)
        if found.is_floating_point()
    ]
    return torch.stack(parts).sum()


# -- families ----------------------------------------------------------------------------------------------------------


class UnavailableError(ImportError):
    """A family needs a package that is not installed."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: of the family, as its library spells it.
        library: ``"timm"``, ``"transformers"`` or ``"torchvision"``.
        small: builds the tiny model.
        large: builds the full one.
        batches: (batch size, side) -> inputs, of the tiny model.
        loss: (output, inputs) -> a scalar.
        sides: sides of the images of the tiny and of the full model.
        full_batches: as ``batches`` for the full model, where they differ.
        full_batch: images in a batch of the full model; two where batch norm meets maps of a single pixel.
        needs: packages that the family needs besides its library.
        floor: below the cosine at 8 bits, in fp32 and with random weights; see :data:`DIFFERENCES`.
    """

    name: str
    library: str
    small: Build
    large: Build
    batches: Callable[[int, int], Inputs]
    loss: Callable[[Any, Inputs], Tensor]
    sides: tuple[int, int] = (64, FULL_SIDE)
    full_batches: Callable[[int, int], Inputs] | None = None
    full_batch: int = 1
    needs: tuple[str, ...] = ()
    floor: float = 0.999

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"

    def tiny(self) -> nn.Module:
        """The tiny model in training mode, with the same weights each time."""
        model = self._build(self.small)
        _wake(model)
        return model

    def full(self) -> nn.Module:
        """The full model in training mode, with the same weights each time."""
        return self._build(self.large)

    def inputs(self, batch: int, tiny: bool) -> Inputs:
        """What :func:`forward` gives the model: images, or keyword arguments with labels."""
        if tiny:
            return self.batches(batch, self.sides[0])
        return (self.full_batches or self.batches)(batch, self.sides[1])

    def _build(self, build: Build) -> nn.Module:
        missing = [name for name in (self.library, *self.needs) if importlib.util.find_spec(name) is None]
        if missing:
            raise UnavailableError(f"needs {', '.join(missing)}, not installed")
        torch.manual_seed(0)
        return build().train()


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Give values to what starts at nearly zero: layer scale, last norms of a block, relative positions.

    Behind a factor of 1e-6 or 0 a whole branch would go without a gradient, and comparing gradients would not show it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.numel() == 0 or parameter.abs().max() > 1e-3:
            continue
        if parameter.dim() < 2 and "bias" not in name:
            parameter.fill_(0.5)
        elif parameter.dim() < 2:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)


def _timm_model(architecture: str, **fields: Any) -> Build:
    def build() -> nn.Module:
        import timm

        return timm.create_model(architecture, pretrained=False, **fields)

    return build


def _timm(
    name: str,
    architecture: str,
    full: str,
    *,
    side: int = 64,
    drops: tuple[str, ...] = ("drop_rate", "drop_path_rate"),
    full_fields: Mapping[str, Any] | None = None,
    full_batch: int = 1,
    floor: float = 0.999,
    **fields: Any,
) -> Family:
    """A family of timm.

    Args:
        name: of the family.
        architecture: that the tiny model is cut down from.
        full: the architecture of the full model.
        side: of the tiny model's images.
        drops: fields of the tiny model that are rates of dropping.
        full_fields: of the full model.
        full_batch: images in a batch of the full model.
        floor: of the cosine at 8 bits.
        **fields: of the tiny model.
    """
    fields = {"num_classes": CLASSES, **dict.fromkeys(drops, 0.1), **fields}
    return Family(
        name,
        "timm",
        _timm_model(architecture, **fields),
        _timm_model(full, **(full_fields or {})),
        _bare,
        _cross_entropy,
        sides=(side, FULL_SIDE),
        full_batch=full_batch,
        floor=floor,
    )


# The named models of these three fix depth and width, so the tiny ones are made of timm's classes.


def _timm_vgg() -> nn.Module:
    from timm.models.vgg import VGG

    plan = [8, "M", 16, "M", 24, 24, "M", 32, "M", 32, "M"]
    # The head is a convolution of 7 x 7 over at least as many pixels, 4096 wide; the ratio makes it narrow.
    return VGG(plan, num_classes=CLASSES, norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 64, drop_rate=0.1)


def _timm_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    dropping = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    return MlpMixer(CLASSES, img_size=64, patch_size=16, num_blocks=2, embed_dim=64, **dropping)


def _timm_poolformer() -> nn.Module:
    from timm.models.metaformer import GroupNorm1, MetaFormer

    return MetaFormer(
        num_classes=CLASSES,
        depths=_ONE_EACH,
        dims=_FOUR_STAGES,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        drop_rate=0.1,
        proj_drop_rate=0.1,
        drop_path_rate=0.1,
    )


_PLAIN_VIT = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}
_FOUR_STAGES = (16, 32, 48, 64)
_ONE_EACH = (1, 1, 1, 1)

_TIMM = [
    _timm("resnet", "resnet26t", "resnet50", layers=_ONE_EACH, channels=_FOUR_STAGES),
    # Weight standardisation and group norm.
    _timm("resnetv2", "resnetv2_50x1_bit", "resnetv2_50x1_bit", side=128, channels=(128, 128, 128, 128), stem_chs=32),
    _timm("resnest", "resnest14d", "resnest50d", full_batch=2, floor=0.99, channels=_FOUR_STAGES, stem_width=8),
    _timm("regnet", "regnety_002", "regnety_016"),
    _timm(
        "densenet",
        "densenet121",
        "densenet121",
        drops=("drop_rate", "proj_drop_rate"),
        growth_rate=8,
        block_config=(2, 2, 2, 2),
    ),
    Family("vgg", "timm", _timm_vgg, _timm_model("vgg16_bn"), _bare, _cross_entropy),
    _timm("efficientnet", "test_efficientnet", "efficientnet_b0"),
    _timm("mobilenetv3", "mobilenetv3_small_050", "mobilenetv3_large_100"),
    # The hybrid has attention with one key and value for all heads.
    _timm("mobilenetv4", "mobilenetv4_hybrid_medium", "mobilenetv4_hybrid_medium", full_batch=2, floor=0.98),
    _timm("convnext", "convnext_atto", "convnext_tiny", depths=(1, 1, 2, 1), dims=_FOUR_STAGES),
    # Global response normalisation.
    _timm("convnextv2", "convnextv2_atto", "convnextv2_tiny", depths=(1, 1, 2, 1), dims=_FOUR_STAGES),
    _timm("nfnet", "test_nfnet", "eca_nfnet_l0"),
    _timm("vit", "vit_tiny_patch16_224", "vit_base_patch16_224", attn_drop_rate=0.1, proj_drop_rate=0.1, **_PLAIN_VIT),
    _timm("deit3", "deit3_small_patch16_224", "deit3_base_patch16_224", **_PLAIN_VIT),
    # Two blocks per stage, so that shifted windows and their masks take part.
    _timm(
        "swin",
        "swin_tiny_patch4_window7_224",
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    _timm(
        "swinv2",
        "swinv2_tiny_window8_256",
        "swinv2_tiny_window8_256",
        full_fields={"img_size": FULL_SIDE, "window_size": 7},
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    _timm("beit", "beit_base_patch16_224", "beit_base_patch16_224", **_PLAIN_VIT),
    # Rotary positions and SwiGLU.
    _timm(
        "eva02",
        "eva02_base_patch14_224",
        "eva02_base_patch14_224",
        patch_size=16,
        ref_feat_shape=(4, 4),
        **_PLAIN_VIT,
    ),
    _timm("maxvit", "test_maxvit", "maxvit_tiny_tf_224", side=128, img_size=128),
    _timm("coatnet", "test_coatnet", "coatnet_0_rw_224", img_size=64),
    Family("mixer", "timm", _timm_mixer, _timm_model("mixer_b16_224"), _bare, _cross_entropy),
    _timm("mobilevit", "mobilevit_xxs", "mobilevit_s", side=128),
    _timm(
        "levit",
        "levit_128s",
        "levit_256",
        full_batch=2,
        floor=0.99,
        side=128,
        img_size=128,
        embed_dim=(32, 48, 64),
        key_dim=8,
        num_heads=(2, 3, 4),
        depth=(1, 1, 1),
    ),
    # Talking heads, and layers in which only the class token attends.
    _timm("cait", "cait_xxs24_224", "cait_s24_224", **_PLAIN_VIT),
    # Attention between channels.
    _timm("xcit", "xcit_nano_12_p16_224", "xcit_small_12_p16_224", **_PLAIN_VIT),
    _timm("pvt_v2", "pvt_v2_b0", "pvt_v2_b2", depths=_ONE_EACH, embed_dims=_FOUR_STAGES, num_heads=(1, 2, 3, 4)),
    Family("poolformer", "timm", _timm_poolformer, _timm_model("poolformer_s24"), _bare, _cross_entropy),
    _timm(
        "efficientformerv2",
        "efficientformerv2_s0",
        "efficientformerv2_s1",
        img_size=64,
        depths=(1, 1, 2, 2),
        embed_dims=_FOUR_STAGES,
        mlp_ratios=4,
        num_vit=1,
    ),
    # The variant whose last stage has attention.
    _timm("fastvit", "fastvit_sa12", "fastvit_sa12", floor=0.95, layers=_ONE_EACH, embed_dims=(16, 32, 64, 128)),
    _timm("hiera", "hiera_tiny_224", "hiera_base_224", img_size=64, embed_dim=16, stages=(1, 1, 2, 1)),
    # Registers, rotary positions, layer scale.
    _timm("vit_dinov3", "vit_small_patch16_dinov3", "vit_base_patch16_dinov3", **_PLAIN_VIT),
]


def _config(kind: str, **fields: Any) -> Callable[[], Any]:
    """A configuration of transformers, made when it is needed; fields may be such functions themselves."""

    def make() -> Any:
        import transformers

        values = {name: value() if callable(value) else value for name, value in fields.items()}
        return getattr(transformers, f"{kind}Config")(**values)

    return make


def _hf_model(config: Callable[[], Any], model: str) -> Build:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(config())

    return build


#: Classes of the full models: ImageNet's, ADE20K's and COCO's.
_USUAL_CLASSES = {_classified: 1000, _segmented: 150, _detected: 91, _masked: 150}


def _hf(
    name: str,
    kind: str,
    tiny: Mapping[str, Any],
    full: Mapping[str, Any] | None = None,
    *,
    model: str = "ForImageClassification",
    batches: Callable[[int, int], Inputs] = _classified,
    full_batches: Callable[[int, int], Inputs] | None = None,
    loss: Callable[[Any, Inputs], Tensor] = _own_loss,
    sides: tuple[int, int] = (64, FULL_SIDE),
    full_batch: int = 1,
    needs: tuple[str, ...] = (),
) -> Family:
    """A family of transformers.

    Args:
        name: of the family.
        kind: its prefix; ``<kind>Config`` and ``<kind><model>`` are its classes.
        tiny: fields of the tiny model's configuration.
        full: of the full model's, where the defaults are not the usual model at 224 px.
        model: the rest of the model class's name.
        batches: (batch size, side) -> inputs.
        full_batches: as ``batches``, for the full model.
        loss: (output, inputs) -> a scalar.
        sides: of the images, tiny and full.
        full_batch: images in a batch of the full model.
        needs: packages needed besides transformers.
    """
    with_labels = batches in (_classified, _segmented, _detected, _masked)
    labelled = {"num_labels": CLASSES} if with_labels else {}
    usual = {"num_labels": _USUAL_CLASSES[batches]} if with_labels else {}
    return Family(
        name,
        "transformers",
        _hf_model(_config(kind, **labelled, **tiny), kind + model),
        _hf_model(_config(kind, **{**usual, **(full or {})}), kind + model),
        batches,
        loss,
        sides=sides,
        full_batches=full_batches,
        full_batch=full_batch,
        needs=needs,
    )


_HF_VIT = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
_HF_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_HF_SWIN = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "drop_path_rate": 0.1,
    **_HF_DROPOUT,
}
_HF_CONVNEXT = {"hidden_sizes": list(_FOUR_STAGES), "depths": [1, 1, 2, 1], "drop_path_rate": 0.1}
_HF_RESNET = {"embedding_size": 16, "hidden_sizes": list(_FOUR_STAGES), "depths": list(_ONE_EACH)}
_HF_DINO = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "drop_path_rate": 0.1,
    "hidden_dropout_prob": 0.1,
}
_ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_TINY_DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dropout": 0.1,
    "auxiliary_loss": True,
}
_DETR = {"model": "ForObjectDetection", "batches": _detected, "needs": ("scipy",), "sides": (128, FULL_SIDE)}
_SWIN_BACKBONE = _config(
    "Swin", **{**_HF_SWIN, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4)}, out_features=_ALL_STAGES
)
_SWIN_T_BACKBONE = _config("Swin", out_features=_ALL_STAGES)

_TRANSFORMERS = [
    _hf("ViT", "ViT", {**_HF_VIT, **_HF_DROPOUT}),
    _hf("DeiT", "DeiT", {**_HF_VIT, "hidden_dropout_prob": 0.1}),
    _hf(
        "BEiT",
        "Beit",
        {**_HF_VIT, **_HF_DROPOUT, "use_relative_position_bias": True, "drop_path_rate": 0.1},
        {"use_relative_position_bias": True},
    ),
    _hf(
        "Data2VecVision",
        "Data2VecVision",
        {**_HF_VIT, "use_shared_relative_position_bias": True, "drop_path_rate": 0.1},
        {"use_relative_position_bias": True},
    ),
    _hf("Swin", "Swin", _HF_SWIN),
    _hf("Swinv2", "Swinv2", _HF_SWIN),
    _hf("ConvNext", "ConvNext", _HF_CONVNEXT),
    _hf("ConvNextV2", "ConvNextV2", _HF_CONVNEXT),
    _hf("ResNet", "ResNet", _HF_RESNET),
    _hf("RegNet", "RegNet", {**_HF_RESNET, "groups_width": 8}),
    _hf("MobileNetV2", "MobileNetV2", {"depth_multiplier": 0.35}),
    _hf(
        "MobileViT",
        "MobileViT",
        {
            "image_size": 128,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 64],
            "num_attention_heads": 2,
            "attention_probs_dropout_prob": 0.1,
        },
        {"image_size": FULL_SIDE},
        sides=(128, FULL_SIDE),
    ),
    _hf(
        "EfficientNet",
        "EfficientNet",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        {"image_size": FULL_SIDE, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    _hf(
        "SegFormer",
        "Segformer",
        {
            "depths": list(_ONE_EACH),
            "hidden_sizes": list(_FOUR_STAGES),
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
            **_HF_DROPOUT,
        },
        model="ForSemanticSegmentation",
        batches=_segmented,
    ),
    _hf("Dinov2", "Dinov2", _HF_DINO),
    _hf("Dinov2WithRegisters", "Dinov2WithRegisters", {**_HF_DINO, "use_swiglu_ffn": True}),
    _hf(
        "Hiera",
        "Hiera",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1], "drop_path_rate": 0.1},
    ),
    _hf(
        "PVTv2",
        "PvtV2",
        {
            "image_size": 64,
            "depths": list(_ONE_EACH),
            "hidden_sizes": list(_FOUR_STAGES),
            "num_attention_heads": [1, 2, 3, 4],
            "drop_path_rate": 0.1,
            **_HF_DROPOUT,
        },
    ),
    _hf(
        "LeViT",
        "Levit",
        {
            "image_size": 128,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        sides=(128, FULL_SIDE),
        full_batch=2,
    ),
    _hf(
        "CLIP vision",
        "CLIPVision",
        {**_HF_VIT, "attention_dropout": 0.1},
        {"patch_size": 16},
        model="Model",
        batches=_pixels,
        loss=_projection,
    ),
    # Pools by attention with a learned query, in nn.MultiheadAttention.
    _hf("SigLIP vision", "SiglipVision", _HF_VIT, model="Model", batches=_pixels, loss=_projection),
    _hf(
        "ViTMAE",
        "ViTMAE",
        {
            **_HF_VIT,
            **_HF_DROPOUT,
            "decoder_num_attention_heads": 2,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 64,
            "norm_pix_loss": True,
        },
        model="ForPreTraining",
        batches=_pixels,
    ),
    _hf(
        "VideoMAE",
        "VideoMAE",
        {
            **_HF_VIT,
            **_HF_DROPOUT,
            "num_frames": 4,
            "decoder_num_attention_heads": 2,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 64,
        },
        model="ForPreTraining",
        batches=_video(frames=4, patch=16),
        full_batches=_video(frames=16, patch=16),
    ),
    # One layer of windows and one global, both with relative positions.
    _hf(
        "SAM vision encoder",
        "SamVision",
        {
            "image_size": 64,
            "patch_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 128,
            "output_channels": 32,
            "num_pos_feats": 16,
            "window_size": 3,
            "global_attn_indexes": [1],
            "attention_dropout": 0.1,
            "initializer_range": 0.02,
        },
        {"image_size": FULL_SIDE, "initializer_range": 0.02},
        model="Model",
        batches=_pixels,
        loss=_projection,
    ),
    _hf(
        "DPT",
        "DPT",
        {
            **_HF_VIT,
            **_HF_DROPOUT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
        },
        {"image_size": FULL_SIDE},
        model="ForSemanticSegmentation",
        batches=_segmented,
    ),
    # Batch norm behind pooling to a single pixel, hence two images.
    _hf(
        "UperNet",
        "UperNet",
        {
            "backbone_config": _SWIN_BACKBONE,
            "hidden_size": 32,
            "auxiliary_channels": 16,
            "auxiliary_in_channels": 64,
        },
        {"backbone_config": _SWIN_T_BACKBONE, "auxiliary_in_channels": 384},
        model="ForSemanticSegmentation",
        batches=_segmented,
        full_batch=2,
    ),
    _hf(
        "DETR",
        "Detr",
        {**_TINY_DETR, "num_queries": 8, "backbone_config": _config("ResNet", **_HF_RESNET, out_features=["stage4"])},
        {"backbone_config": _config("ResNet", out_features=["stage4"])},
        **_DETR,
    ),
    _hf(
        "Conditional DETR",
        "ConditionalDetr",
        {**_TINY_DETR, "num_queries": 8, "backbone_config": _config("ResNet", **_HF_RESNET, out_features=["stage4"])},
        {"backbone_config": _config("ResNet", out_features=["stage4"])},
        **_DETR,
    ),
    # Two stages and refined boxes: the variant with every path.
    _hf(
        "Deformable DETR",
        "DeformableDetr",
        {
            **_TINY_DETR,
            "num_queries": 8,
            "two_stage": True,
            "two_stage_num_proposals": 8,
            "with_box_refine": True,
            "backbone_config": _config("ResNet", **_HF_RESNET, out_features=["stage2", "stage3", "stage4"]),
        },
        {"backbone_config": _config("ResNet", out_features=["stage2", "stage3", "stage4"])},
        **_DETR,
    ),
    # Noisy copies of the labels among the queries.
    _hf(
        "RT-DETR",
        "RTDetr",
        {
            **_TINY_DETR,
            "num_queries": 8,
            "num_denoising": 8,
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [32, 48, 64],
            "decoder_in_channels": [32, 32, 32],
            "backbone_config": _config("RTDetrResNet", **_HF_RESNET, out_indices=[2, 3, 4]),
        },
        **_DETR,
    ),
    _hf(
        "YOLOS",
        "Yolos",
        {**_HF_VIT, **_HF_DROPOUT, "image_size": [128, 128], "num_detection_tokens": 8},
        {"image_size": [FULL_SIDE, FULL_SIDE]},
        **_DETR,
    ),
    _hf(
        "Mask2Former",
        "Mask2Former",
        {
            "backbone_config": _SWIN_BACKBONE,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 64,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "num_attention_heads": 2,
            "dropout": 0.1,
            "dim_feedforward": 64,
            "num_queries": 8,
            "train_num_points": 64,
        },
        {"backbone_config": _SWIN_T_BACKBONE},
        model="ForUniversalSegmentation",
        batches=_masked,
        needs=("scipy",),
    ),
    _hf(
        "MaskFormer",
        "MaskFormer",
        {
            "backbone_config": _SWIN_BACKBONE,
            "decoder_config": _config("Detr", **{**_TINY_DETR, "num_queries": 8}),
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        },
        {"backbone_config": _SWIN_T_BACKBONE},
        model="ForInstanceSegmentation",
        batches=_masked,
        needs=("scipy",),
    ),
    _hf(
        "TimmWrapper",
        "TimmWrapper",
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {**_PLAIN_VIT, "drop_rate": 0.1, "drop_path_rate": 0.1},
        },
        {"architecture": "vit_base_patch16_224"},
        needs=("timm",),
    ),
    _hf(
        "TimmBackbone",
        "TimmBackbone",
        {"backbone": "resnet10t", "out_indices": [1, 2, 3, 4]},
        {"backbone": "resnet50", "out_indices": [1, 2, 3, 4]},
        model="",
        batches=_pixels,
        loss=_projection,
        needs=("timm",),
    ),
    _hf(
        "Depth Anything",
        "DepthAnything",
        {
            "backbone_config": _config(
                "Dinov2",
                **{**_HF_DINO, "num_hidden_layers": 4, "image_size": 56, "patch_size": 14},
                out_indices=[1, 2, 3, 4],
                reshape_hidden_states=False,
            ),
            "reassemble_hidden_size": 64,
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
        },
        {
            "backbone_config": _config(
                "Dinov2",
                image_size=FULL_SIDE,
                hidden_size=384,
                num_attention_heads=6,
                out_indices=[9, 10, 11, 12],
                reshape_hidden_states=False,
            )
        },
        model="ForDepthEstimation",
        batches=_pixels,
        loss=_projection,
        sides=(56, FULL_SIDE),
    ),
    # At the side it is trained on: each pixel is a token, and 224 px would take tens of gigabytes.
    _hf(
        "Swin2SR",
        "Swin2SR",
        {
            "image_size": 16,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            "drop_path_rate": 0.1,
            **_HF_DROPOUT,
        },
        model="ForImageSuperResolution",
        batches=_pixels,
        loss=_projection,
        sides=(16, 64),
    ),
]


def _torchvision(name: str, small: Build, full: str) -> Family:
    def large() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, full)(weights=None)

    return Family(name, "torchvision", small, large, _bare, _cross_entropy)


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=16)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 2, 2, 64, 128, dropout=0.1, attention_dropout=0.1, num_classes=CLASSES)


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], dropout=0.1, stochastic_depth_prob=0.1, num_classes=CLASSES
    )


_TORCHVISION = [
    _torchvision("resnet", _torchvision_resnet, "resnet50"),
    # Attention in nn.MultiheadAttention.
    _torchvision("vit", _torchvision_vit, "vit_b_16"),
    _torchvision("swin", _torchvision_swin, "swin_t"),
]

#: library/name -> family
FAMILIES: dict[str, Family] = {family.key: family for family in (*_TIMM, *_TRANSFORMERS, *_TORCHVISION)}
