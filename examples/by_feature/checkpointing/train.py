"""Gradient checkpointing and compression, alone and together, in a loop of one's own.

python examples/by_feature/checkpointing/train.py --checkpointing --level L2
"""

from __future__ import annotations

import argparse
import time

import timm
import torch
from sklearn.datasets import load_digits
from timm.layers import set_reentrant_ckpt
from torch.nn import functional as F

import hf_actnn


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 handwritten digits that come with scikit-learn, enlarged to 64 x 64."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(pixels, size=64, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm model that takes images of 64 pixels")
    parser.add_argument("--level", default="L2", help="a level such as L2, or none")
    parser.add_argument("--checkpointing", action="store_true", help="the model's own gradient checkpointing")
    parser.add_argument("--reentrant", action="store_true", help="the older kind of it")
    parser.add_argument("--checkpoint_bits", type=int, help="bits of what it keeps, in place of 8")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    options = parser.parse_args()
    if not options.checkpointing and (options.reentrant or options.checkpoint_bits is not None):
        parser.error("--reentrant and --checkpoint_bits say how --checkpointing is done: name that too")
    if options.level == "none" and options.checkpoint_bits is not None:
        parser.error("--checkpoint_bits needs a level; with --level L0 it codes what checkpoints keep and nothing else")

    torch.manual_seed(0)
    images, labels = digits()
    size = {"img_size": 64} if "vit" in options.model else {}
    model = timm.create_model(options.model, num_classes=10, **size)
    if options.checkpointing:
        set_reentrant_ckpt(options.reentrant)
        model.set_grad_checkpointing()

    controller = None
    if options.level != "none":
        hf_actnn.convert(model, options.level, checkpoint_bits=options.checkpoint_bits)
        controller = hf_actnn.controller(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    begun = time.perf_counter()
    for step in range(options.steps):
        chosen = torch.randint(len(images), (options.batch_size,))
        with hf_actnn.track_memory(model) as memory:
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            held, of_them = memory.saved_bytes, memory.checkpoint_bytes
        optimizer.zero_grad()
        loss.backward()
        if controller is not None:
            controller.step()  # where the level chooses bits, it does so here
        optimizer.step()
        if step == 0:
            each = options.batch_size
            print(
                f"between the passes: {held / each:,.0f} bytes per image, {of_them / each:,.0f} of them at checkpoints"
            )
    seconds = (time.perf_counter() - begun) / max(options.steps, 1)
    print(f"after {options.steps} steps of {seconds:.2f} s: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
