"""From a question to the tokens a model is trained on or asked with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from nso_hf.reasoning.answers import MARKER
from nso_hf.reasoning.examples import Example


@dataclass(frozen=True)
class PromptFormat:
    """The text around a question, a rationale and an answer.

    Plain: "{question} ###" -> " {rationale} --> {answer}". Chat: the question and the instruction
    are the user's message in the model's own template, and the completion is its reply. Without
    rationales, " --> {answer}".
    """

    tokenizer: PreTrainedTokenizerBase
    with_rationale: bool = True
    chat: bool = False
    instruction: str = ""
    is_encoder_decoder: bool = False

    def prompt(self, question: str) -> str:
        """What the model is asked with."""
        if not self.chat:
            return f"{question} ###"
        message = {"role": "user", "content": f"{question}\n{self.instruction}".strip()}
        text = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        return str(text)

    def completions(self, example: Example) -> list[str]:
        """What the model is trained to say: one text per rationale."""
        if not self.with_rationale:
            texts = [f"{MARKER} {example.answer}"]
        else:
            texts = [f"{rationale} {MARKER} {example.answer}" for rationale in example.rationales]
        return texts if self.chat else [f" {text}" for text in texts]

    def prompt_ids(self, question: str) -> list[int]:
        """Tokens of the prompt; a chat template has written the special tokens itself."""
        text = self.prompt(question)
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id and not self.is_encoder_decoder:
            ids.pop()
        return ids

    def training_rows(self, example: Example) -> list[dict[str, list[int]]]:
        """One row per rationale, with labels on the completion and its end-of-text token only (-100
        elsewhere)."""
        prompt = self.prompt_ids(example.question)
        rows = []
        for text in self.completions(example):
            completion = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            completion.append(self.tokenizer.eos_token_id)
            if self.is_encoder_decoder:
                ids, labels = prompt, completion
            else:
                ids, labels = prompt + completion, [-100] * len(prompt) + completion
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return rows


def training_rows(
    examples: Sequence[Example], prompt_format: PromptFormat, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """The rows of all examples, and how many were left out as longer than `max_length` tokens.

    Rows are left out whole: cut off, they would end without their answer.
    """
    rows = [row for example in examples for row in prompt_format.training_rows(example)]
    kept = [row for row in rows if max(len(row["input_ids"]), len(row["labels"])) <= max_length]
    return kept, len(rows) - len(kept)
