"""The loss of a causal language model on texts."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nso_hf.tasks.reasoning.dealing import dealt
from nso_hf.tasks.reasoning.prompts import PromptFormat

Piece = tuple[list[int], list[int]]
"""Tokens, and as labels those that are predicted (else -100)."""


def pieces(text: str, prompt_format: PromptFormat, max_length: int) -> list[Piece]:
    """A text cut into pieces of at most `max_length` tokens, one after the other and each read by
    itself. Each begins with the special tokens that the tokenizer puts there; where it puts none,
    its first token is not predicted."""
    before, ids = prompt_format.text_ids(text)
    length = max(1, max_length - len(before))
    cut = (ids[start : start + length] for start in range(0, len(ids), length))
    found = [([*before, *piece], [-100] * len(before) + piece) for piece in cut]
    return [piece for piece in found if num_predicted(piece)]


def num_predicted(piece: Piece) -> int:
    """How many of its tokens have a loss."""
    return sum(label != -100 for label in piece[1][1:])


@torch.no_grad()
def losses(
    model: PreTrainedModel,
    texts: Sequence[Piece],
    accelerator: Accelerator,
    *,
    batch_size: int,
    description: str,
) -> list[float]:
    """Of each piece the sum over its tokens of -log p, in nats, in every process. The model's mode
    is left as it was."""
    batches = dealt(range(len(texts)), lambda i: len(texts[i][0]), batch_size, accelerator)
    forward: Any = model
    was_training = model.training
    model.eval()
    mine: dict[int, float] = {}
    try:
        for batch in tqdm(batches, desc=description, disable=not accelerator.is_local_main_process):
            # The padding stands to the right, where no token that counts sees it.
            ids, mask, labels = (
                pad_sequence(list(map(torch.tensor, rows)), True, filler).to(model.device)
                for rows, filler in [
                    ([texts[i][0] for i in batch], 0),
                    ([[1] * len(texts[i][0]) for i in batch], 0),
                    ([texts[i][1] for i in batch], -100),
                ]
            )
            logits = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            found = cross_entropy(logits.float().mT, labels[:, 1:], reduction="none")
            mine |= zip(batch, found.double().sum(dim=1).tolist(), strict=True)
    finally:
        model.train(was_training)
    every = dict(gather_object(list(mine.items())))
    return [every[i] for i in range(len(texts))]
