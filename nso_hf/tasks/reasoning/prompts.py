"""From a question to the tokens a model is trained on or asked with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from nso_hf.refusal import refusal
from nso_hf.tasks.reasoning.answers import MARKER
from nso_hf.tasks.reasoning.examples import Example

_PROBE = "What is 1 + 1?"


@dataclass(frozen=True)
class PromptFormat:
    """The text around a question, a rationale and an answer.

    Plain: "{question} ###" -> " {rationale} --> {answer}". Chat: the question and the instruction
    are the user's message in the model's own template, and the completion is its reply. Without
    rationales, " --> {answer}". What is written of a special token ("</s>") in them is text.

    Raises:
        ValueError: the chat template does not render a question.
    """

    tokenizer: PreTrainedTokenizerBase
    with_rationale: bool = True
    chat: bool = False
    instruction: str = ""
    is_encoder_decoder: bool = False
    first_token: int | None = None
    """What generation makes every answer of an encoder-decoder begin with (as BART's does)."""

    def __post_init__(self) -> None:
        if self.chat:
            _ = self._in_parts

    def prompt(self, question: str) -> str:
        """What the model is asked with."""
        if not self.chat:
            return f"{question} ###"
        return str(self._templated(self._message(question), self._in_parts, tokenize=False))

    def completions(self, example: Example) -> list[str]:
        """What the model is trained to say: one text per rationale."""
        if not self.with_rationale:
            texts = [f"{MARKER} {example.answer}"]
        else:
            texts = [f"{rationale} {MARKER} {example.answer}" for rationale in example.rationales]
        return texts if self.chat else [f" {text}" for text in texts]

    def prompt_ids(self, question: str) -> list[int]:
        """Tokens of the prompt; a chat template has written the special tokens itself."""
        if self.chat:
            ids: list[int] = self._templated(
                text := self._message(question),
                self._in_parts,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,  # from transformers 5.20 on
            )
            self._check_sanitized(text, ids)
            return ids
        before, after = self._around
        return [*before, *self._ids(self.prompt(question)), *after]

    def text_ids(self, text: str) -> tuple[list[int], list[int]]:
        """The special tokens that begin a text, and its own, in which nothing is special."""
        return self._around[0], self._ids(text)

    def training_rows(self, example: Example) -> list[dict[str, list[int]]]:
        """One row per rationale, with labels on the completion and its end-of-text token only (-100
        elsewhere)."""
        prompt = self.prompt_ids(example.question)
        rows = []
        for text in self.completions(example):
            completion = [*self._ids(text), self.tokenizer.eos_token_id]
            if self.is_encoder_decoder:
                first = [] if self.first_token is None else [self.first_token]
                ids, labels = prompt, first + completion
            else:
                ids, labels = prompt + completion, [-100] * len(prompt) + completion
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return rows

    def _message(self, question: str) -> str:
        return f"{question}\n{self.instruction}".strip()

    def _templated(self, text: str, in_parts: bool, **options: Any) -> Any:
        content: Any = [{"type": "text", "text": text}] if in_parts else text
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, **options
        )

    def _check_sanitized(self, text: str, ids: list[int]) -> None:
        for token, written in self._special.items():
            if written in text and ids.count(token) != self._in_template.count(token):
                rule = f"this version of transformers takes the {written} in it for a special token"
                cure = "Install transformers>=5.20, or use --template plain"
                raise refusal("question", text, rule, cure)

    @cached_property
    def _in_template(self) -> list[int]:
        """Tokens of a prompt whose question has no special token."""
        ids: list[int] = self._templated(_PROBE, self._in_parts, tokenize=True, return_dict=False)
        return ids

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template wants a message as a list of parts, as those of multimodal models
        do, since it does not render a text."""
        reasons = []
        for in_parts in (False, True):
            try:
                if _PROBE in self._templated(_PROBE, in_parts, tokenize=False):
                    return in_parts
                reasons.append("it leaves the question out")
            except Exception as error:  # a template is a program, and raises what it likes
                reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
        rule = f"the model's chat template does not render a question ({reasons[0].rstrip('.')})"
        raise refusal("template", "chat", rule, "Use --template plain")

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text. One that ends it
        would end the completion before it began."""
        text = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("x", add_special_tokens=True)["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
        before, after = whole[:start], whole[start + len(text) :]
        if after and after[-1] == self.tokenizer.eos_token_id and not self.is_encoder_decoder:
            after.pop()
        return before, after

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is a special token."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        if self._special.keys().isdisjoint(ids):
            return ids
        spelt: list[int] = []  # some vocabularies have "</s>" among the pieces of words too
        for token in ids:
            written = self._special.get(token)
            letters: Any = self.tokenizer.convert_tokens_to_ids(list(written or ""))
            spelt += letters if written else [token]
        return spelt

    @cached_property
    def _special(self) -> dict[int, str]:
        """The special tokens, but for that of unknown words."""
        added = self.tokenizer.added_tokens_decoder.items()
        unknown = self.tokenizer.unk_token_id
        return {i: token.content for i, token in added if token.special and i != unknown}


def training_rows(
    examples: Sequence[Example], prompt_format: PromptFormat, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """The rows of all examples, and how many were left out as longer than `max_length` tokens.

    Rows are left out whole: cut off, they would end without their answer.
    """
    rows = [row for example in examples for row in prompt_format.training_rows(example)]
    kept = [row for row in rows if max(len(row["input_ids"]), len(row["labels"])) <= max_length]
    return kept, len(rows) - len(kept)
