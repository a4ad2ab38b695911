"""Answers are greedy, the same in any batch and among any number of processes, and each judged."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from nso_hf.tasks.reasoning.answering import answer_questions
from nso_hf.tasks.reasoning.evaluation import evaluate_answers
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.prompts import PromptFormat
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()
IDS = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
GPT2 = GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=2, **IDS)
BART = BartConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=128,
    forced_eos_token_id=None,
    decoder_start_token_id=5,
    dropout=0.0,
    **IDS,
)


class Maskless(GPT2LMHeadModel):
    """Takes what it is given, and no attention mask."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


KINDS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "maskless": lambda: Maskless(GPT2),
    "bart": lambda: BartForConditionalGeneration(BART),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=1,
            num_heads=2,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            **IDS,
        )
    ),
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, **IDS)
    ),
    "xlnet": lambda: XLNetLMHeadModel(
        XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=48, **IDS)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **IDS)
    ),
}
QUESTIONS = ["1 + 1?", "What is the sum of 12 and 30?", "abc", "2 + 3?", "How many legs has a cat?"]


def build(kind):
    """A random model whose answers depend on the question."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if kind == "xlnet" else 3)
    return model, PromptFormat(TOKENIZER, is_encoder_decoder=kind in ("bart", "t5"))


def answers(model, prompt_format, questions=QUESTIONS, batch_size=4, process=None):
    found = answer_questions(
        model,
        prompt_format,
        questions,
        process or Accelerator(cpu=True),
        batch_size=batch_size,
        max_new_tokens=8,
        description="",
    )
    return {question: answered.completion for question, answered in found.items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bart"])
def test_an_answer_is_the_same_alone_and_in_a_batch(kind):
    model, prompt_format = build(kind)
    alone = {q: answers(model, prompt_format, [q])[q] for q in QUESTIONS}
    assert len(set(alone.values())) > 1
    assert answers(model, prompt_format) == alone


@pytest.mark.parametrize("kind", ["gpt2", "rwkv"])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_answer_as_many_batches_each(kind, processes):
    model, prompt_format = build(kind)
    whole, calls, found = answers(model, prompt_format), [], {}
    generate = model.generate
    model.generate = lambda **inputs: calls.append(len(inputs["input_ids"])) or generate(**inputs)
    counts = []
    for index in range(processes):
        process = SimpleNamespace(
            num_processes=processes, process_index=index, is_local_main_process=False
        )
        calls.clear()
        mine = answers(model, prompt_format, process=process)
        found |= mine
        counts.append(len(calls))
        assert mine.items() <= whole.items()
    assert found == whole and len(set(counts)) == 1


CONFIGS = [
    {"do_sample": True, "temperature": 9.0},
    {"num_beams": 4},
    {"num_beams": 2, "num_return_sequences": 2},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 10},
    {"min_length": 40},
    {"max_length": 3},
    {"max_time": 0.0},
    {"stop_strings": ["e"]},
    {"suppress_tokens": list(range(40, 140))},
    {"begin_suppress_tokens": list(range(40, 250))},
    {"bad_words_ids": [[i] for i in range(40, 140)]},
    {"sequence_bias": [[[i], -50.0] for i in range(40, 140)]},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 1},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"guidance_scale": 3.0},
    {"prompt_lookup_num_tokens": 2},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
]


@pytest.mark.parametrize("kind", ["gpt2", "bart", "lora"])
def test_answers_are_greedy_whatever_the_checkpoint_asks_for(kind):
    model, prompt_format = build("gpt2" if kind == "lora" else kind)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
        owner, model = model, get_peft_model(model, adapters)
    else:
        owner = model
    ids = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 5}
    owner.generation_config = GenerationConfig(**ids)
    greedy = answers(model, prompt_format)
    for config in CONFIGS if kind == "gpt2" else CONFIGS[:3] + CONFIGS[13:16]:
        own = owner.generation_config = GenerationConfig(**ids, **config)
        assert answers(model, prompt_format) == greedy, config
        assert model.generation_config is own and own.max_new_tokens is None


def test_the_greedy_answer_is_the_likeliest_token_each_time():
    model, prompt_format = build("gpt2")
    model.generation_config = GenerationConfig(do_sample=True, pad_token_id=0)
    for question, answer in answers(model, prompt_format).items():
        ids = prompt_format.prompt_ids(question)
        start = len(ids)
        while len(ids) < start + 8 and 1 not in ids:
            with torch.no_grad():
                ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def test_a_forced_first_token_is_the_trained_one():
    """BART's answers begin with <s>: with that in the labels, six answers are learnt by heart."""
    forced = TOKENIZER.convert_tokens_to_ids("!")
    prompt_format = PromptFormat(
        TOKENIZER, with_rationale=False, is_encoder_decoder=True, first_token=forced
    )
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BART)
    model.generation_config.forced_bos_token_id = forced
    examples = [Example(f"{i}?", str((7 * i + 3) % 10) * 2) for i in range(6)]
    rows = [prompt_format.training_rows(example)[0] for example in examples]
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    found = evaluate_answers(
        model, prompt_format, examples, Accelerator(cpu=True), max_new_tokens=12
    )
    assert found.metrics["accuracy"] == 1
    assert {p["completion"][0] for p in found.predictions} == {"!"}


def test_a_question_with_several_answers_is_judged_by_each(tmp_path):
    model, prompt_format = build("gpt2")
    same = [Example("left?", "3", ("a",)), Example("left?", "3", ("b",)), Example("left?", "3")]
    examples = [
        *same,
        Example("left?", "5"),
        Example("caf\N{LATIN SMALL LETTER E WITH ACUTE}?", "2"),
    ]
    found = evaluate_answers(
        model, prompt_format, examples, Accelerator(cpu=True), max_new_tokens=2
    )
    asked = [(p["question"], p["answer"]) for p in found.predictions]
    assert asked == [("left?", "3"), ("left?", "5"), (examples[-1].question, "2")]
    found.write(tmp_path / "predictions.jsonl")
    assert len((tmp_path / "predictions.jsonl").read_text(encoding="ascii").splitlines()) == 3
