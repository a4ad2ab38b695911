"""Texts as the tokens that a classifier reads."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nso_hf.refusal import refusal
from nso_hf.tasks.text.models import positions_of
from nso_hf.tasks.text.reading import Texts

Row = dict[str, Any]


def encode(
    texts: Texts, labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Row], int]:
    """A row of tokens with its label for each text, and how many texts were longer than
    `max_length` tokens and are cut off there (of a pair, the longer one). What is written of a
    special token ("[SEP]") in a text is text.

    Raises:
        ValueError: a text has no tokens.
    """
    if not texts.texts:
        return [], 0
    parts = [texts.texts] if texts.pairs is None else [texts.texts, texts.pairs]
    options: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
    bare = {"return_attention_mask": False, "return_token_type_ids": False}
    whole = tokenizer(*parts, **options, **bare)
    encoded = tokenizer(*parts, truncation=True, max_length=max_length, **options)
    rows: list[Row] = [
        {name: encoded[name][i] for name in encoded} | {"labels": int(label)}
        for i, label in enumerate(labels)
    ]
    empty = next(
        (t for t, row in zip(texts.texts, rows, strict=True) if not row["input_ids"]), None
    )
    if empty is not None:
        raise refusal("text", empty, "the model's tokenizer makes no token of it", "Leave it out")
    return rows, sum(len(ids) > max_length for ids in whole["input_ids"])


def check_length(
    max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, pairs: bool
) -> None:
    """
    Raises:
        ValueError: the model has no places for so many tokens, or nothing of a text would be left.
    """
    positions = positions_of(model)
    if positions is not None and max_length > positions:
        rule = f"the model has places for {positions} tokens"
        raise refusal("max_length", max_length, rule, f"Set --max_length {positions}")
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length < special + 1 + pairs:
        rule = f"{special} special tokens leave no place for a text"
        raise refusal("max_length", max_length, rule, "Raise it; typical: 128")
