"""Trains a semantic segmentation model on your images with the Hugging Face Trainer; `--actnn L2` keeps activations in
4 bits.

Every argument of TrainingArguments works too, from the command line or a JSON file; see README.md beside this file.
"""

from __future__ import annotations

import torch
from data import Confusion, DataArguments, class_names, predicted_classes, read_data, set_transforms
from model import ModelArguments, make_model
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_actnn import ActNNTrainer, ActNNTrainingArguments


def main() -> None:
    parser = HfArgumentParser((DataArguments, ModelArguments, ActNNTrainingArguments))
    data_arguments, model_arguments, training_arguments = parser.parse_args_into_dataclasses()
    training_arguments.remove_unused_columns = False  # the images are decoded on the fly
    set_seed(training_arguments.seed)

    data = read_data(data_arguments)
    labels = class_names(data, data_arguments)
    set_transforms(data, data_arguments)

    def scores(out: EvalPrediction) -> dict[str, float]:
        confusion = Confusion(len(labels))
        confusion.add(torch.from_numpy(out.predictions), torch.from_numpy(out.label_ids))
        return confusion.scores()

    def classes(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits  # some models return hidden states behind them
        return predicted_classes(logits, *labels.shape[-2:]).to(torch.uint8)

    trainer = ActNNTrainer(
        model=make_model(model_arguments, labels),
        args=training_arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=scores,
        preprocess_logits_for_metrics=classes,  # a class per pixel is kept, not a float per class and pixel
    )
    result = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
