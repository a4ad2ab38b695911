"""What a model is asked with and trained on: templates, special tokens, the first token."""

import inspect

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nso_hf.tasks.pretrained import check_vocabulary
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.prompts import PromptFormat
from tests.reference import tiny_llama
from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer

SANITIZES = (
    "sanitize_control_tokens"
    in inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
)

OF_PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OF_BOTH = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] | upper }}{% endif %}{% endfor %}"
)
TRIMMED = "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}"


def chat(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return PromptFormat(tokenizer, chat=True, instruction="Think.")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHAT_TEMPLATE, "<user>2 legs?\nThink.</s><assistant>"),
        (OF_PARTS, "<user>2 legs?\nThink.</s><assistant>"),
        (OF_BOTH, "2 legs?\nThink."),
        (TRIMMED, "[2 legs?\nThink.]"),
        ({"default": CHAT_TEMPLATE, "rag": "x"}, "<user>2 legs?\nThink.</s><assistant>"),
    ],
)
def test_templates_that_render_a_question(template, prompt):
    prompt_format = chat(template)
    assert prompt_format.prompt("2 legs?") == prompt
    ids = prompt_format.prompt_ids("2 legs?")
    assert prompt_format.tokenizer.decode(ids) == prompt
    assert ids.count(prompt_format.tokenizer.eos_token_id) == prompt.count("</s>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("hello", "it leaves the question out"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "it leaves the question out"),
        ({"tool_use": CHAT_TEMPLATE, "rag": "x"}, "multiple chat templates"),
        ("{{ raise_exception('needs a system message') }}", "needs a system message"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_templates_that_do_not_are_refused_when_the_format_is_made(template, reason):
    with pytest.raises(ValueError) as raised:
        chat(template)
    message = str(raised.value)
    assert message.startswith("template='chat': the model's chat template does not render")
    assert reason in message and "\n" not in message and message.endswith("--template plain.")


def with_bos_and_eos(is_chat):
    """A tokenizer that puts <s> before and </s> after each text, as Llama's or T5's may."""
    tokenizer = byte_tokenizer(chat=is_chat)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_end|>"]})
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ends
    )
    return tokenizer


def with_eos_among_its_pieces():
    """A Unigram vocabulary as T5's, which has "</s>" as a piece like any other."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


WRITTEN = "What do <s>x</s>, <pad> and <|im_end|> do?"


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bos and eos", "chat", "unigram"])
def test_special_tokens_that_are_written_are_text(kind, is_encoder_decoder):
    tokenizer = {
        "plain": byte_tokenizer,
        "bos and eos": lambda: with_bos_and_eos(False),
        "chat": lambda: with_bos_and_eos(True),
        "unigram": with_eos_among_its_pieces,
    }[kind]()
    prompt_format = PromptFormat(
        tokenizer, chat=kind == "chat", is_encoder_decoder=is_encoder_decoder
    )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if kind == "chat" and not SANITIZES:
        with pytest.raises(ValueError, match=r"takes the <.*> in it for a special token. Install"):
            prompt_format.prompt_ids(WRITTEN)
        return

    def specials(ids):
        return [i for i in ids if i in special]

    # As many of them as in a question of letters alone, in the same order.
    plainly = prompt_format.prompt_ids("What is it?")
    assert specials(prompt_format.prompt_ids(WRITTEN)) == specials(plainly)
    (row,) = prompt_format.training_rows(Example(WRITTEN, "</s> <pad>", ("<|im_end|> ends.",)))
    labels = [label for label in row["labels"] if label != -100]
    assert specials(labels) == [tokenizer.eos_token_id] and labels[-1] == tokenizer.eos_token_id
    asked = row["input_ids"] if is_encoder_decoder else row["input_ids"][: -len(labels)]
    assert specials(asked) == specials(plainly)
    text = tokenizer.decode([i for i in labels if i not in special])
    assert text.strip() == "<|im_end|> ends. --> </s> <pad>"
    prompt = [i for i in prompt_format.prompt_ids(WRITTEN) if i not in special]
    assert WRITTEN in tokenizer.decode(prompt)


def test_the_end_of_text_ends_no_prompt_of_a_decoder():
    for is_encoder_decoder in (False, True):
        tokenizer = with_bos_and_eos(False)
        prompt_format = PromptFormat(tokenizer, is_encoder_decoder=is_encoder_decoder)
        ids = prompt_format.prompt_ids("q")
        assert tokenizer.decode(ids) == "<s>q ###" + ("</s>" if is_encoder_decoder else "")


def test_the_first_token_of_generation_is_the_first_label():
    tokenizer = byte_tokenizer()
    first = tokenizer.convert_tokens_to_ids("!")
    prompt_format = PromptFormat(tokenizer, is_encoder_decoder=True, first_token=first)
    (row,) = prompt_format.training_rows(Example("q", "2", ("r",)))
    assert tokenizer.decode(row["labels"]) == "! r --> 2</s>"


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    check_vocabulary(model, tokenizer, "m")
    tokenizer.add_tokens(["####"])
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"has {size} tokens and its embedding {size - 1} rows"):
        check_vocabulary(model, tokenizer, "m")
