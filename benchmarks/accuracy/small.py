"""A ResNet for images of 32 pixels, under a name that timm builds: `python small.py train.py --model resnet20 ...`

ResNet-20 of He et al., "Deep residual learning for image recognition", 2015, section 4.2: a convolution of 3x3 and no
pooling in front of three stages of 16, 32 and 64 channels. timm's own ResNets halve the resolution twice before the
first block.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """With random weights; ``kwargs`` are timm's, without those of pretrained models."""
    if pretrained:
        raise ValueError("resnet20 has no pretrained weights")
    fields = {key: value for key, value in kwargs.items() if not key.startswith("pretrained") and key != "cache_dir"}
    model = ResNet(BasicBlock, (3, 3, 3), channels=(16, 32, 64), stem_width=8, stem_type="deep", **fields)
    model.conv1 = nn.Conv2d(fields.get("in_chans", 3), 16, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.layer4 = nn.Identity()  # that timm's forward pass calls
    model.pretrained_cfg = model.default_cfg = {"architecture": "resnet20", "input_size": (3, 32, 32)}
    return model


def main() -> None:
    """Run the script that is named, which finds the model at timm."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    # timm looks the function's module up again.
    sys.modules.setdefault("small", sys.modules["__main__"])
    main()
