"""Evaluation by generation: every question is answered, every answer judged."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nso_hf.reasoning.answers import judge
from nso_hf.reasoning.examples import Example
from nso_hf.reasoning.prompts import PromptFormat

METRICS = ("accuracy", "accuracy_stderr", "contains_answer", "correct_format", "complete")
"""The names of what an evaluation measures."""


@dataclass(frozen=True)
class Evaluation:
    """The judged answers to a set of questions."""

    predictions: list[dict[str, Any]]
    """One per question: question, answer, completion, prediction, correct, contains_answer,
    correct_format, complete."""

    def count(self, measure: str) -> int:
        """How many answers are "correct", "contains_answer", "correct_format" or "complete"."""
        return sum(prediction[measure] for prediction in self.predictions)

    def write(self, path: Path) -> None:
        """Write the predictions as JSON lines."""
        path.write_text("".join(json.dumps(prediction) + "\n" for prediction in self.predictions))

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


@torch.no_grad()
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
    answers.

    `complete` says that the model ended its answer itself within `max_new_tokens`. The model's mode
    is left as it was.
    """
    tokenizer = prompt_format.tokenizer
    questions = list(dict.fromkeys(example.question for example in examples))
    answers = {example.question: example.answer for example in examples}
    prompts = {question: prompt_format.prompt_ids(question) for question in questions}
    # The same number for each process: where weights are sharded, all take part in every pass.
    share = math.ceil(len(questions) / accelerator.num_processes)
    mine = questions[accelerator.process_index :: accelerator.num_processes]
    mine += questions[: share - len(mine)]
    mine.sort(key=lambda question: len(prompts[question]))  # little padding in a batch
    starts = range(0, len(mine), batch_size)
    stop_tokens = _stop_tokens(model, tokenizer.eos_token_id)
    was_training = model.training
    model.eval()
    predictions = []
    try:
        for start in tqdm(starts, desc=description, disable=not accelerator.is_local_main_process):
            batch = mine[start : start + batch_size]
            inputs = tokenizer.pad(
                {"input_ids": [prompts[question] for question in batch]},
                padding_side="right" if prompt_format.is_encoder_decoder else "left",
                return_tensors="pt",
            ).to(model.device)
            outputs = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(stop_tokens),
                repetition_penalty=1.0,
            )
            skipped = 1 if prompt_format.is_encoder_decoder else inputs["input_ids"].shape[1]
            for question, tokens in zip(batch, outputs[:, skipped:], strict=True):
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                predictions.append(
                    {
                        "question": question,
                        "answer": answers[question],
                        "completion": text,
                        **asdict(judge(text, answers[question])),
                        "complete": not stop_tokens.isdisjoint(tokens.tolist()),
                    }
                )
    finally:
        model.train(was_training)
    gathered = {p["question"]: p for p in gather_object(predictions)}
    return Evaluation([gathered[question] for question in questions])


def _stop_tokens(model: PreTrainedModel, eos_token_id: int) -> set[int]:
    """The end-of-text token that is trained, and those that the model came with (end of turn)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
