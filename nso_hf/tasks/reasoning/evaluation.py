"""Evaluation by generation: every question is answered, every answer judged."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from nso_hf.tasks.reasoning.answering import answer_questions
from nso_hf.tasks.reasoning.answers import judge
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.prompts import PromptFormat

METRICS = ("accuracy", "accuracy_stderr", "contains_answer", "correct_format", "complete")
"""The names of what an evaluation measures."""


@dataclass(frozen=True)
class Evaluation:
    """The judged answers to a set of questions."""

    predictions: list[dict[str, Any]]
    """One per question and right answer: question, answer, completion, prediction, correct,
    contains_answer, correct_format, complete."""

    def count(self, measure: str) -> int:
        """How many answers are "correct", "contains_answer", "correct_format" or "complete"."""
        return sum(prediction[measure] for prediction in self.predictions)

    def write(self, path: Path) -> None:
        """Write the predictions as JSON lines."""
        lines = [json.dumps(prediction) + "\n" for prediction in self.predictions]
        path.write_text("".join(lines), encoding="utf-8")

    def summary(self) -> dict[str, float]:
        """The metrics and the counts they stand for."""
        counts = {"correct": self.count("correct"), "questions": len(self.predictions)}
        return counts | self.metrics

    @property
    def metrics(self) -> dict[str, float]:
        """Shares of the questions in [0, 1]; `accuracy_stderr` is the binomial standard error."""
        n = len(self.predictions)
        accuracy = self.count("correct") / n
        return {
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / n),
            "contains_answer": self.count("contains_answer") / n,
            "correct_format": self.count("correct_format") / n,
            "complete": self.count("complete") / n,
        }


def evaluate_answers(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    accelerator: Accelerator,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    description: str = "Answering",
) -> Evaluation:
    """Answer each question greedily, the questions being dealt over the processes, and judge the
    answers. A question that stands there with several answers is judged by each.

    `complete` says that the model ended its answer itself within `max_new_tokens`. The model's mode
    is left as it was.
    """
    pairs = list(dict.fromkeys((example.question, example.answer) for example in examples))
    answered = answer_questions(
        model,
        prompt_format,
        list(dict.fromkeys(question for question, _ in pairs)),
        accelerator,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        description=description,
    )
    return Evaluation(
        [
            {
                "question": question,
                "answer": answer,
                "completion": answered[question].completion,
                **asdict(judge(answered[question].completion, answer)),
                "complete": answered[question].complete,
            }
            for question, answer in pairs
        ]
    )
