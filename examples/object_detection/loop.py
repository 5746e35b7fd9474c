"""Trains an object detector in a loop of its own, alone or under `accelerate launch`; see README.md.

Compressed activations take a line before `prepare`, and one per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from data import AveragePrecision, DataArguments, class_names, collate, read_data, set_transforms
from model import ModelArguments, make_model, scores_by_sigmoid
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

import hf_actnn


@dataclass
class LoopArguments:
    level: str = field(default="L2", metadata={"help": "A level such as L2, or none."})
    epochs: int = 10
    max_steps: int | None = field(default=None, metadata={"help": "Stop after so many steps."})
    batch_size: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "bf16", "fp16"]})
    cpu: bool = field(default=False, metadata={"help": "For several processes without a GPU, under torchrun."})
    seed: int = 42


def main() -> None:
    parser = HfArgumentParser((DataArguments, ModelArguments, LoopArguments))
    data_arguments, model_arguments, options = parser.parse_args_into_dataclasses()
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=options.cpu)
    set_seed(options.seed)

    data = read_data(data_arguments)
    labels = class_names(data)
    set_transforms(data, data_arguments)
    size = (data_arguments.height, data_arguments.width)
    model = make_model(model_arguments, labels, *size)
    sigmoid = scores_by_sigmoid(model)

    controller = None
    if options.level != "none":
        hf_actnn.convert(model, options.level)  # before prepare
        controller = hf_actnn.controller(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    loader = DataLoader(data["train"], options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    test_loader = DataLoader(data["test"], options.batch_size, collate_fn=collate)
    steps = min(options.epochs * len(loader), options.max_steps or 2**62)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1))
    model, optimizer, loader, test_loader, schedule = accelerator.prepare(
        model, optimizer, loader, test_loader, schedule
    )

    done = 0
    while done < steps:
        model.train()
        for batch in loader:
            if done == 0:
                with hf_actnn.track_memory(accelerator.unwrap_model(model)) as memory:
                    loss = model(**batch).loss
                    kept, ratio = memory.saved_bytes / len(batch["labels"]), memory.ratio
                accelerator.print(f"activations: {kept:,.0f} bytes per image, {ratio:.1f} times less than uncompressed")
            else:
                loss = model(**batch).loss
            accelerator.backward(loss)
            if controller is not None:
                controller.step()  # where the level chooses bits, it does so here
            accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break

        model.eval()
        precision = AveragePrecision(*size, sigmoid)
        with torch.no_grad():
            for batch in test_loader:
                out = model(pixel_values=batch["pixel_values"])
                found = (out.logits, out.pred_boxes, batch["labels"])
                # As objects: images differ in their number of boxes.
                for logits, boxes, wanted in accelerator.gather_for_metrics([found], use_gather_object=True):
                    precision.add(logits, boxes, wanted)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in precision.scores().items())
        accelerator.print(f"step {done} of {steps}: loss {loss.item():.3f}, {scores}")
    # The distributed wrapper has to go before the process group does: the other way round, gloo may wait for ever.
    del model, optimizer, loss
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
