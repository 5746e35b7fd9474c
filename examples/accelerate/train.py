"""A training loop of one's own under `accelerate launch`: one process, DDP or FSDP2, as the launcher says.

Compressed activations take one call, in place of `accelerator.prepare`.

accelerate launch --cpu examples/accelerate/train.py --level L3
"""

from __future__ import annotations

import argparse
import os

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sharding import shard_on_cpu
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import hf_actnn
from hf_actnn.integrations.accelerate import prepare


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 handwritten digits that come with scikit-learn, enlarged to 32 x 32, in a fixed split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    pixels = F.interpolate(pixels, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    parts = train_test_split(pixels, torch.tensor(labels), test_size=500, stratify=labels, random_state=0)
    return TensorDataset(parts[0], parts[2]), TensorDataset(parts[1], parts[3])


def hub_or_files(name: str) -> tuple[TensorDataset, TensorDataset]:
    """A dataset of the hub, or a folder of parquet files, with columns `image` and `label`, at 32 x 32."""
    from datasets import load_dataset
    from torchvision.transforms import v2

    data = load_dataset(name)
    to_pixels = v2.Compose([v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])

    def tensors(split: str) -> TensorDataset:
        pixels = torch.stack([to_pixels(image.convert("RGB")) * 2 - 1 for image in data[split]["image"]])
        return TensorDataset(pixels, torch.tensor(data[split]["label"]))

    return tensors("train"), tensors("test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="digits", help="digits, a dataset of the hub, or a folder of parquet files"
    )
    parser.add_argument("--model", default="resnet10t", help="any timm model; it starts from random weights")
    parser.add_argument("--level", default="L2", help="a level such as L2, or none")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--samples", type=int, help="only so many of the training images")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], help="the launcher's")
    parser.add_argument("--cpu", action="store_true", help="for several processes without a GPU")
    parser.add_argument("--checkpoint", help="a folder: it is saved there at the end, and gone on from if it is there")
    options = parser.parse_args()

    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=options.cpu)
    shard_on_cpu(accelerator)
    set_seed(0)
    train, test = digits() if options.dataset == "digits" else hub_or_files(options.dataset)
    classes = int(train.tensors[1].max()) + 1
    model = timm.create_model(options.model, num_classes=classes)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    seen = Subset(train, range(options.samples or len(train)))
    loader = DataLoader(seen, batch_size=options.batch_size, shuffle=True, drop_last=True)
    test_loader = DataLoader(test, batch_size=250)
    if options.level == "none":
        prepared = accelerator.prepare(model, optimizer, loader, test_loader)
    else:
        prepared = prepare(accelerator, model, optimizer, loader, test_loader, config=options.level)
    model, optimizer, loader, test_loader = prepared
    if not len(loader):
        parser.error(f"{len(seen)} training images make no whole batch for each process: lower --batch_size")
    if options.checkpoint and os.path.isdir(options.checkpoint):
        accelerator.load_state(options.checkpoint)

    for epoch in range(options.epochs):
        model.train()
        for step, (pixels, labels) in enumerate(loader):
            if epoch == step == 0:
                with hf_actnn.track_memory(accelerator.unwrap_model(model)) as memory:
                    loss = F.cross_entropy(model(pixels), labels)
                    kept, ratio = memory.saved_bytes / len(pixels), memory.ratio
                accelerator.print(f"activations: {kept:,.0f} bytes per image, {ratio:.1f} times less than uncompressed")
            else:
                loss = F.cross_entropy(model(pixels), labels)
            accelerator.backward(loss)
            optimizer.step()  # where the level chooses bits, it does so here
            optimizer.zero_grad()

        model.eval()
        right = []
        with torch.no_grad():
            for pixels, labels in test_loader:
                right.append(accelerator.gather_for_metrics(model(pixels).argmax(-1) == labels))
        accelerator.print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {torch.cat(right).float().mean():.3f}"
        )
    if options.checkpoint:
        accelerator.save_state(options.checkpoint)
        accelerator.print(f"saved to {options.checkpoint}")
    # The distributed wrapper has to go before the process group does: the other way round, gloo may wait for ever.
    del model, optimizer, loss, prepared
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
