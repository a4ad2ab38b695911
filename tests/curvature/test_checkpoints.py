"""What the command loads and reads: the model that was trained, on the data as they are written."""

import csv
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from nso_hf.curvature import hessian_trace
from nso_hf.curvature.__main__ import main
from nso_hf.curvature.checkpoint import Data
from nso_hf.curvature.loading import load_checkpoint
from tests.tiny_models import byte_tokenizer, save_model

QUICK = ["--num_samples", "2", "--spectrum_steps", "0", "--slice_points", "0", "--num_batches", "1"]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def data(path, tokenizer, **options):
    defaults = {"split": "train", "gguf_file": None, "batch_size": 8, "max_length": 64, "seed": 0}
    return Data(
        path=str(path), tokenizer=str(tokenizer), **{"num_batches": 1, **defaults, **options}
    )


def logits(model):
    tokens = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def adapters(**options):
    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)


def resized(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    return model


def classifier(folder):
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=3)


def randomised(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model


CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPT = {"num_virtual_tokens": 3, **CAUSAL}
ADAPTED = {
    "classifier by its task": (classifier, adapters(task_type="SEQ_CLS")),
    "classifier by its class": (classifier, adapters(modules_to_save=["score"])),
    "resized": (resized, adapters(**CAUSAL)),
    "resized and trained": (resized, adapters(modules_to_save=["embed_tokens", "lm_head"])),
    "prefix": (
        LlamaForCausalLM.from_pretrained,
        PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    ),
    "prompt": (
        LlamaForCausalLM.from_pretrained,
        PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    ),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_loaded_on_what_they_were_trained_on(kind, tmp_path):
    base, adapter = ADAPTED[kind]
    folder = save_model("llama", tmp_path / "base")
    trained = randomised(get_peft_model(base(folder), adapter))
    trained.save_pretrained(tmp_path / "adapter")
    loaded = load_checkpoint(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(trained))

    def sizes(model):
        return sorted(p.numel() for p in model.parameters() if p.requires_grad)

    assert sizes(loaded) == sizes(trained)
    tokens = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([1]) if "classifier" in kind else tokens
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    trace, expected = (hessian_trace(m, [batch], num_samples=2) for m in (loaded, trained))
    assert trace.estimate == pytest.approx(expected.estimate, rel=1e-4)


def test_an_adapter_with_a_layer_the_base_lacks_is_refused(tmp_path):
    folder = save_model("llama", tmp_path / "base")
    get_peft_model(classifier(folder), adapters(modules_to_save=["score"])).save_pretrained(
        tmp_path / "adapter"
    )
    file = tmp_path / "adapter/adapter_config.json"
    options = json.loads(file.read_text())
    file.write_text(json.dumps({**options, "auto_mapping": None}))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no place for its .*score"):
        load_checkpoint(str(tmp_path / "adapter"))


def test_prompts_have_the_tokens_of_training(tmp_path):
    """Begin and end of text where the tokenizer puts them, once."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    tokenizer.save_pretrained(tmp_path)
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in "ab")
    prompts = [{"prompt": text, "completion": "b"} for text in ("a", "<s>a")]
    model = save_model("gpt2", tmp_path / "model")
    model = load_checkpoint(str(model))
    model.resize_token_embeddings(len(tokenizer))
    (batch,) = data(write(tmp_path / "p.jsonl", prompts), tmp_path).sample(model).batches
    assert batch["input_ids"].tolist() == [[begin, *a, *b, end]] * 2
    assert batch["labels"].tolist() == [[-100, -100, *b, end]] * 2
    (batch,) = data(write(tmp_path / "t.jsonl", [{"text": "ab"}]), tmp_path).sample(model).batches
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[begin, *a, *b, end]]


def bert(folder, **options):
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), intermediate_size=8, **sizes, **options)
    )
    tokenizer.save_pretrained(folder)
    return model


NAMES = {"id2label": {0: "no", 1: "yes", 2: "2nd"}, "label2id": {"no": 0, "yes": 1, "2nd": 2}}


@pytest.mark.parametrize("file", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("labels", [["yes", "no", "2nd"], [1, 0, 2], ["1", "0", "2"]])
def test_labels_are_names_or_numbers(file, labels, tmp_path):
    path = write(tmp_path / file, [{"text": "NA", "label": label} for label in labels])
    (batch,) = data(path, tmp_path).sample(bert(tmp_path, **NAMES)).batches
    assert batch["labels"].tolist() == [1, 0, 2] and batch["labels"].dtype == torch.long
    assert batch["input_ids"].shape == (3, 2)  # "NA" is a text


def test_a_regression_has_values(tmp_path):
    path = write(tmp_path / "rows.csv", [{"text": "a", "label": "0.5"}])
    (batch,) = data(path, tmp_path).sample(bert(tmp_path, num_labels=1)).batches
    assert batch["labels"].tolist() == [0.5]


CLASSES = {"id2label": {0: "1", 1: "2"}, "label2id": {"1": 0, "2": 1}}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a", "label": 3}, NAMES, r"the label is none of the model's 0 \(no\), 1 \(yes\)"),
        ({"text": "a", "label": None}, NAMES, "the label is none of the model's"),
        ({"text": "a", "label": True}, NAMES, "the label is none of the model's"),
        ({"text": "a", "label": 1}, CLASSES, "the label is several of the model's"),
        ({"text": "", "label": 1}, NAMES, "there is no text as text in the row {'text': ''"),
        ({"text": None, "label": 1}, NAMES, "there is no text as text"),
    ],
)
def test_rows_that_cannot_be_read_are_named(row, options, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=rf"data='.*rows.jsonl': {message}"):
        data(path, tmp_path).sample(bert(tmp_path, **options))


def test_a_prompt_that_leaves_no_room_is_named(tmp_path):
    folder = save_model("gpt2", tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a" * 9, "completion": "b"}])
    with pytest.raises(ValueError, match=r"of 8 tokens none is predicted in the row .* Raise"):
        data(path, folder, max_length=8).sample(load_checkpoint(str(folder)))


def vit(folder, **options):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, intermediate_size=8, **sizes, **options)
    )


def test_images_are_paths_from_here_or_from_the_table(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9), (200, 90, 40)).save(tmp_path / "a.png")
    rows = [{"image": path, "label": 1} for path in ("a.png", str(tmp_path / "a.png"))]
    (batch,) = data(write(tmp_path / "rows.csv", rows), tmp_path).sample(vit(tmp_path)).batches
    assert torch.equal(*batch["pixel_values"]) and batch["labels"].tolist() == [1, 1]
    (tmp_path / "b.png").write_text("no image")
    for name in ("b.png", "none.png"):
        path = write(tmp_path / "rows.csv", [{"image": name, "label": 1}])
        with pytest.raises(ValueError, match=f"no image can be read .* in the row .*{name}"):
            data(path, tmp_path).sample(vit(tmp_path))


def test_a_classifier_without_a_pad_token(tmp_path):
    tokenizer = byte_tokenizer(pad=False)
    tokenizer.save_pretrained(tmp_path)
    settings = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    model = GPT2ForSequenceClassification(GPT2Config(**settings, pad_token_id=None)).eval()
    rows = [{"text": text, "label": 1} for text in ("a", "abc")]
    path = write(tmp_path / "rows.jsonl", rows)
    (batch,) = (
        data(path, tmp_path).sample(model).batches
    )  # padded by the end of text, as in training
    singles = data(path, tmp_path, batch_size=1, num_batches=2).sample(model).batches
    with torch.no_grad():
        losses = [model(**single).loss.item() for single in singles]
        assert model(**batch).loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"it has no token to pad with. Pass --batch_size 1"):
        data(path, tmp_path).sample(model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_checkpoint_without_its_tokenizer_is_told(kind, tmp_path):
    folder = save_model(kind, tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    path = write(tmp_path / "rows.jsonl", [{"text": "abc"}])
    with pytest.raises(ValueError, match=r"there is no tokenizer in it. Pass --tokenizer"):
        main([str(folder), "--data", str(path), "--output", str(tmp_path / "out"), *QUICK])


def test_a_tokenizer_larger_than_the_embedding_is_told(tmp_path):
    folder = save_model("gpt2", tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["many"])
    tokenizer.save_pretrained(tmp_path)
    path = write(tmp_path / "rows.jsonl", [{"text": "so many"}])
    message = f"it has a token {len(tokenizer) - 1}, and the model an embedding of"
    with pytest.raises(ValueError, match=message):
        data(path, tmp_path).sample(load_checkpoint(str(folder)))


def test_what_is_done_is_kept_where_a_later_checkpoint_fails(tmp_path):
    first = save_model("gpt2", tmp_path / "first")
    second = tmp_path / "second"
    second.mkdir()
    (second / "config.json").write_text("{}")
    path = write(tmp_path / "rows.jsonl", [{"text": "abc"}])
    words = ["--data", str(path), "--tokenizer", str(first), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="checkpoint="):
        main([str(first), str(second), *words, *QUICK])
    assert list(json.loads((tmp_path / "out/results.json").read_text())["checkpoints"]) == [
        str(first)
    ]
    (second / "config.json").unlink()
    words[-1] = str(tmp_path / "never")
    with pytest.raises(ValueError, match=r"the folder has no config.json or adapter_config.json"):
        main([str(first), str(second), *words, *QUICK])
    assert not (tmp_path / "never").exists()


def test_the_table_has_one_format_of_numbers(tmp_path, capsys):
    folder = save_model("gpt2", tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", [{"text": "abc"}])
    main([str(folder), "--data", str(path), "--output", str(tmp_path / "out"), *QUICK])
    figures = json.loads((tmp_path / "out/results.json").read_text())["checkpoints"][str(folder)]
    from nso_hf.running.figures import with_error

    shown = with_error(figures["trace"]["estimate"], figures["trace"]["stderr"])
    assert shown in capsys.readouterr().out


def folders(path, names, each):
    """Of so many images of each class."""
    for name in names:
        (path / "train" / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (8, 8)).save(path / "train" / name / f"{number}.png")
    return path


def test_folders_are_the_classes_of_their_names(tmp_path):
    known = {"id2label": {0: "cat", 1: "Dog", 2: "fox"}, "label2id": {"cat": 0, "Dog": 1, "fox": 2}}
    model = vit(tmp_path, **known)
    sample = data(folders(tmp_path / "some", ["dog", "fox"], 2), tmp_path).sample(model)
    assert sample.batches[0]["labels"].tolist() == [1, 1, 2, 2]
    assert str(sample) == "4 examples; 2 of 3 classes"
    with pytest.raises(ValueError, match="the model has no class 'circle', but cat, dog, fox"):
        data(folders(tmp_path / "others", ["circle", "dog"], 1), tmp_path).sample(model)


def test_a_label_that_stands_for_none_is_no_class(tmp_path):
    """-1, in the test splits of benchmarks whose labels are kept back."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a"])})
    kept_back = Dataset.from_dict({"text": ["x", "y"], "label": [0, -1]}, features=features)
    kept_back.to_parquet(tmp_path / "set" / "train.parquet")
    model = bert(tmp_path, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ValueError, match=r"the label is none of the model's .* in the row .*-1"):
        data(tmp_path / "set", tmp_path).sample(model)
    kept_back.select([0]).to_parquet(tmp_path / "set" / "train.parquet")
    sample = data(tmp_path / "set", tmp_path, split="train").sample(model)
    assert sample.batches[0]["labels"].tolist() == [1]


def test_saved_batches_may_hold_what_is_no_tensor(tmp_path):
    model = load_checkpoint(str(save_model("gpt2", tmp_path / "gpt2")))
    tokens = torch.zeros(3, 4, dtype=torch.long)
    batch = {"use_cache": False, "input_ids": tokens, "labels": tokens}
    torch.save([batch, batch], tmp_path / "batches.pt")
    assert (
        str(data(tmp_path / "batches.pt", tmp_path, num_batches=None).sample(model)) == "6 examples"
    )


def test_examples_are_drawn_from_all_classes(tmp_path):
    names = [f"c{number}" for number in range(8)]
    ids = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    path, model = folders(tmp_path / "sorted", names, 20), vit(tmp_path, **ids)
    sample = data(path, tmp_path, batch_size=16, num_batches=4).sample(model)
    # That one of 8 is missed among 64 of 160 has a chance of 8 (96/160)^20 = 3e-4.
    assert sample.classes == 8 and sample.total == 160
    assert str(sample) == "64 examples of 160, drawn at random; 8 of 8 classes"
    again = data(path, tmp_path, batch_size=16, num_batches=4).sample(model)
    assert again.batches[0]["labels"].tolist() == sample.batches[0]["labels"].tolist()
    other = data(path, tmp_path, batch_size=16, num_batches=4, seed=1).sample(model)
    assert other.batches[0]["labels"].tolist() != sample.batches[0]["labels"].tolist()
