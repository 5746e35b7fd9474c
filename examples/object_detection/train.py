"""Trains an object detector on your images with the Hugging Face Trainer; `--actnn L2` keeps activations in 4 bits.

Every argument of TrainingArguments works too, from the command line or a JSON file; see README.md beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
from data import AveragePrecision, DataArguments, class_names, collate, read_data, set_transforms
from model import ModelArguments, make_model, scores_by_sigmoid
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_actnn import ActNNTrainer, ActNNTrainingArguments


class DetectionTrainer(ActNNTrainer):
    """Returns what the metric needs, of all that detectors return."""

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs)
        if prediction_loss_only:
            return out.loss.detach(), None, None
        return out.loss.detach(), (out.logits.detach(), out.pred_boxes.detach()), inputs["labels"]


def main() -> None:
    parser = HfArgumentParser((DataArguments, ModelArguments, ActNNTrainingArguments))
    data_arguments, model_arguments, training_arguments = parser.parse_args_into_dataclasses()
    training_arguments.remove_unused_columns = False  # the images are decoded on the fly
    training_arguments.eval_do_concat_batches = False  # images differ in their number of boxes
    set_seed(training_arguments.seed)

    data = read_data(data_arguments)
    labels = class_names(data)
    set_transforms(data, data_arguments)
    size = (data_arguments.height, data_arguments.width)
    model = make_model(model_arguments, labels, *size)

    def scores(out: EvalPrediction) -> dict[str, float]:
        precision = AveragePrecision(*size, scores_by_sigmoid(model))
        for (logits, boxes), wanted in zip(out.predictions, out.label_ids, strict=True):
            tensors = [{key: torch.as_tensor(value) for key, value in one.items()} for one in wanted]
            precision.add(torch.as_tensor(logits), torch.as_tensor(boxes), tensors)
        return precision.scores()

    trainer = DetectionTrainer(
        model=model,
        args=training_arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=collate,
        compute_metrics=scores,
    )
    result = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
