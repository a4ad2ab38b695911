"""Questions answered by a model, greedily, dealt over the processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from nso_hf.tasks.reasoning.dealing import dealt
from nso_hf.tasks.reasoning.prompts import PromptFormat

_PADDING = 4  # tokens before a prompt that tell whether padding is seen


@dataclass(frozen=True)
class Answered:
    """What a model wrote."""

    completion: str
    complete: bool
    """It ended its answer itself."""


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    questions: Sequence[str],
    accelerator: Accelerator,
    *,
    batch_size: int,
    max_new_tokens: int,
    description: str,
) -> dict[str, Answered]:
    """The answer to each question, in every process. The model's mode is left as it was."""
    prompts = {question: prompt_format.prompt_ids(question) for question in questions}
    generate: Any = model.generate
    was_training = model.training
    model.eval()
    mine: dict[str, Answered] = {}
    try:
        with _greedy(model, prompt_format, max_new_tokens) as stop_tokens:
            if not _heeds_padding(model, prompt_format, list(prompts.values())):
                batch_size = 1  # at one length RWKV mixes the questions up (transformers 5.24)
            batches = dealt(
                list(prompts), lambda question: len(prompts[question]), batch_size, accelerator
            )
            is_silent = not accelerator.is_local_main_process
            for batch in tqdm(batches, desc=description, disable=is_silent):
                inputs = prompt_format.tokenizer.pad(
                    {"input_ids": [prompts[question] for question in batch]},
                    padding_side="right" if prompt_format.is_encoder_decoder else "left",
                    return_tensors="pt",
                ).to(model.device)
                outputs = generate(**inputs)
                skipped = 1 if prompt_format.is_encoder_decoder else inputs["input_ids"].shape[1]
                for question, tokens in zip(batch, outputs[:, skipped:].tolist(), strict=True):
                    text = prompt_format.tokenizer.decode(tokens, skip_special_tokens=True)
                    mine[question] = Answered(str(text), not stop_tokens.isdisjoint(tokens))
    finally:
        model.train(was_training)
    return dict(gather_object(list(mine.items())))


@contextmanager
def _greedy(
    model: PreTrainedModel, prompt_format: PromptFormat, max_new_tokens: int
) -> Iterator[set[int]]:
    """Within it the model generates greedily, whatever else its generation_config asks for, of
    which the ids of tokens alone are kept. Yields the tokens that end an answer: the one that is
    trained, and those that the model came with (end of turn)."""
    owner: Any = model
    if hasattr(model, "get_base_model"):  # of peft: that of the model within is read
        owner = owner.get_base_model()
    own, tokenizer = owner.generation_config, prompt_format.tokenizer
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stop_tokens = {tokenizer.eos_token_id, *(end for end in ends if end is not None)}
    start = own.decoder_start_token_id if prompt_format.is_encoder_decoder else None
    owner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(stop_tokens),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=start,
        forced_bos_token_id=prompt_format.first_token,
    )
    try:
        yield stop_tokens
    finally:
        owner.generation_config = own


def _heeds_padding(
    model: PreTrainedModel, prompt_format: PromptFormat, prompts: Sequence[list[int]]
) -> bool:
    """Whether it is without effect which tokens stand under a prompt's padding. RWKV and XLNet, as
    an example, take an attention mask and generate without it."""
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) == 1:
        return True  # there is no padding
    prompt = min(prompts, key=len)
    pad = prompt_format.tokenizer.pad_token_id
    fillers, unmasked = [[pad] * _PADDING, [int(pad == 0)] * _PADDING], [1] * len(prompt)
    if prompt_format.is_encoder_decoder:
        rows, mask = [prompt + filler for filler in fillers], unmasked + [0] * _PADDING
    else:
        rows, mask = [filler + prompt for filler in fillers], [0] * _PADDING + unmasked
    generate: Any = model.generate
    output = generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor([mask, mask], device=model.device),
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first, second = output.logits[0].float().softmax(-1)
    return torch.allclose(first, second, rtol=1e-3, atol=1e-7)
