"""The Trainer of fine-tuning on chains of thought."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from nso_hf.tasks.reasoning.evaluation import Evaluation
from nso_hf.trainer import NSOTrainer


class ReasoningTrainer(NSOTrainer):
    """`NSOTrainer` whose evaluation also has the validation questions answered."""

    answer: Callable[[], Evaluation]
    """Has them answered; set before training."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        answered = self.answer().metrics if metric_key_prefix == "eval" else {}
        for name, value in answered.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value  # type: ignore[index]
        return output


class AtTheBeginning(TrainerCallback):
    """Calls a function when the model has been prepared for training."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.function()
