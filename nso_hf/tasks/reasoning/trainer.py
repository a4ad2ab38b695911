"""The Trainer of fine-tuning on chains of thought."""

from collections.abc import Sequence
from typing import Any

from nso_hf.tasks.reasoning.evaluation import METRICS, Evaluation, evaluate_answers
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.prompts import PromptFormat
from nso_hf.trainer import NSOTrainer


class ReasoningTrainer(NSOTrainer):
    """`NSOTrainer` whose evaluation also has the validation questions answered.

    Args:
        prompt_format: how the model is asked.
        validation: the questions.
        max_new_tokens: that an answer may take.
    """

    def __init__(
        self,
        *args: Any,
        prompt_format: PromptFormat,
        validation: Sequence[Example],
        max_new_tokens: int,
        **kwargs: Any,
    ) -> None:
        self.prompt_format, self._max_new_tokens = prompt_format, max_new_tokens
        self._validation = validation
        kwargs["processing_class"] = prompt_format.tokenizer
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        answered: dict[str, float] = {}
        if metric_key_prefix == "eval":
            answered = self.answer(self._validation, "Validation").metrics
        for name, value in answered.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value  # type: ignore[index]
        return output

    def answer(
        self, examples: Sequence[Example], description: str, model: Any = None
    ) -> Evaluation:
        """The judged answers of the model as it is now, or of another one."""
        return evaluate_answers(
            self.model if model is None else model,  # type: ignore[arg-type]
            self.prompt_format,
            examples,
            self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self._max_new_tokens,
            description=description,
        )

    def validated(self, *, is_average: bool) -> dict[str, float]:
        """Loss and answers on validation of the model that training has left: what was logged,
        where an evaluation was of these weights. That is not so where they `is_average` of
        others."""
        wanted = [f"eval_{name}" for name in ("loss", *METRICS)]
        found = None if is_average else self._logged(wanted)
        if found is None:
            found = self.evaluation_loop(
                self.get_eval_dataloader(), "Validation", prediction_loss_only=True
            ).metrics
        metrics = {name.removeprefix("eval_"): found[name] for name in wanted}
        return {"questions": len({(e.question, e.answer) for e in self._validation})} | metrics

    def _logged(self, wanted: Sequence[str]) -> dict[str, float] | None:
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        step = int(best.rpartition("-")[2]) if best else self.state.global_step
        of_step = (entry for entry in self.state.log_history if entry["step"] == step)
        return next((entry for entry in of_step if set(wanted) <= entry.keys()), None)
