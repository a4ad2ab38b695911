"""Classifiers of texts: their tokens, their heads, and which weights are trained."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DataCollatorWithPadding,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
)

from nso_hf.tasks.text.encoding import encode
from nso_hf.tasks.text.models import ModelOptions, head_of, positions_of, word_pieces
from nso_hf.tasks.text.reading import Texts
from tests.tiny_models import save_model

SENTENCES = ["The cat sat on the mat.", "A dog sat on a log!", "Über die Brücke"] * 4

SMALL = {"vocab_size": 60, "num_labels": 3}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **SMALL}
BERT |= {"intermediate_size": 16, "max_position_embeddings": 40}
CONFIGS = {
    "bert": (BertConfig(**BERT), ["classifier"], 40),
    "roberta": (RobertaConfig(**BERT, pad_token_id=1), ["classifier"], 38),
    "distilbert": (
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, **SMALL),
        ["pre_classifier", "classifier"],
        512,
    ),
    "gpt2": (
        GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=30, pad_token_id=0, **SMALL),
        ["score"],
        30,
    ),
    "llama": (
        LlamaConfig(**BERT, pad_token_id=0),
        ["score"],
        40,
    ),
    "t5": (
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **SMALL),
        ["classification_head"],
        None,
    ),
    "bart": (
        BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=40,
            **SMALL,
        ),
        ["classification_head"],
        40,
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_trained(kind):
    config, head, positions = CONFIGS[kind]

    def model():
        return AutoModelForSequenceClassification.from_config(config)

    def trained(made):
        return {name for name, p in made.named_parameters() if p.requires_grad}

    assert head_of(model()) == head and positions_of(model()) == positions
    of_head = {n for n, _ in model().named_parameters() if n.split(".")[0] in head}
    assert of_head
    assert trained(ModelOptions("m").trainable(model())) == dict(model().named_parameters()).keys()
    assert trained(ModelOptions("m", linear_probe=True).trainable(model())) == of_head
    adapted = ModelOptions("m", lora_r=2).trainable(model())
    names = trained(adapted)
    whole = {n for n in names if ".lora_" not in n}
    assert {
        n.replace("base_model.model.", "").replace("modules_to_save.default.", "") for n in whole
    } == of_head
    assert len(names) > len(whole) and not any(n.split(".")[2] in head for n in names - whole)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_as_many_tokens_as_there_are_places_for(kind):
    config, _, positions = CONFIGS[kind]
    model = AutoModelForSequenceClassification.from_config(config)
    model(torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, positions + 1), 5))


def test_word_pieces(tmp_path):
    tokenizer = word_pieces(iter(SENTENCES), 100)
    assert len(tokenizer) <= 100 and tokenizer.pad_token_id == 0
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the CAT")["input_ids"])
    assert tokens == ["[CLS]", "▁the", "▁cat", "[SEP]"]
    pair = tokenizer("the cat", "brücke")
    first = len(tokenizer("the cat")["input_ids"])
    assert pair["token_type_ids"] == [0] * first + [1] * (len(pair["input_ids"]) - first)
    assert tokenizer.decode(tokenizer("über die brücke")["input_ids"][1:-1]) == "über die brücke"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        loaded("Über die Brücke, 北京")["input_ids"]
        == tokenizer("Über die Brücke, 北京")["input_ids"]
    )


def test_the_vocabulary_is_the_same_in_every_process():
    """Else processes, and a run that goes on, would read other tokens."""
    code = (
        "from nso_hf.tasks.text.emoji_names import emoji_names\n"
        "from nso_hf.tasks.text.models import word_pieces\n"
        "print(sorted(word_pieces(iter(emoji_names('train')[0]), 2000).get_vocab().items()))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(2)]
    assert len(runs[0].stdout) > 20000 and runs[0].stdout == runs[1].stdout


def test_tokens(tmp_path):
    tokenizer = word_pieces(iter(SENTENCES), 100)
    texts = Texts(["the cat", "the cat sat on the mat.", "a [SEP] b"], None, ["x", "y", "x"])
    rows, cut = encode(texts, [0, 1, 0], tokenizer, 6)
    assert cut == 2 and [row["labels"] for row in rows] == [0, 1, 0]
    assert rows[0]["input_ids"] == tokenizer("the cat")["input_ids"]
    whole = tokenizer(texts.texts[1])["input_ids"]
    assert rows[1]["input_ids"] == [*whole[:5], tokenizer.sep_token_id]
    assert rows[2]["input_ids"].count(tokenizer.sep_token_id) == 1  # written, it is text
    pairs = Texts(["the cat"], ["a dog sat on a log"], ["x"])
    rows, cut = encode(pairs, [0], tokenizer, 7)
    assert cut == 1 and rows[0]["input_ids"][:4] == tokenizer("the cat")["input_ids"]
    assert encode(Texts([], None, []), [], tokenizer, 6) == ([], 0)
    silent = save_model("gpt2", tmp_path / "m")
    with pytest.raises(ValueError, match="text='': the model's tokenizer makes no token of it"):
        encode(Texts([""], None, ["x"]), [0], AutoTokenizer.from_pretrained(silent), 6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_that_only_decodes_reads_the_last_token_before_the_padding(tmp_path, kind):
    options = ModelOptions(str(save_model(kind, tmp_path / "m")))
    model, tokenizer = options.load(["a", "b", "c"], iter(()))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    rows, _ = encode(Texts(["short", "a longer text"], None, ["a", "b"]), [0, 1], tokenizer, 64)
    batch = dict(DataCollatorWithPadding(tokenizer)(rows))
    model.eval()
    together = model(**batch).logits
    for row, logits in zip(rows, together, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        # float32, values below 1, 32 wide: the sums are taken in another order.
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)


def test_the_head_of_a_classifier_is_kept_where_it_fits(tmp_path):
    options = ModelOptions(str(save_model("bert", tmp_path / "m")))
    model, tokenizer = options.load(["a", "b"], iter(()))
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    again = ModelOptions(str(tmp_path / "two"))
    kept, _ = again.load(["x", "y"], iter(()))
    assert torch.equal(kept.classifier.weight, model.classifier.weight)
    assert kept.config.id2label == {0: "x", 1: "y"}
    other, _ = again.load(["x", "y", "z"], iter(()))
    assert other.classifier.weight.shape == (3, 32)
    assert torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_a_folder_in_a_package(tmp_path, monkeypatch):
    save_model("bert", tmp_path / "a_package" / "inner")
    (tmp_path / "a_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = ModelOptions("package:a_package/inner").load(["a", "b"], iter(()))
    assert type(model).__name__ == "BertForSequenceClassification"
