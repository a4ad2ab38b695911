"""The recipe of classifying texts from its command line to its files, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from nso_hf.curvature.__main__ import main as measure_checkpoints
from nso_hf.tasks.text.reading import read_texts
from recipes.text_classification import OPTIONS, main
from tests.distributed.launch import torchrun
from tests.tiny_models import save_model

ROOT = Path(__file__).parents[2]
WORDS = {"sun": "weather", "rain": "weather", "cat": "animal", "dog": "animal", "oak": "plant"}


def write_texts(folder, number=60):
    """Texts of which a word tells the class."""
    folder.mkdir(exist_ok=True)
    words = list(WORDS)
    rows = [
        {"text": f"the {words[i % 5]} number {i // 5}", "label": WORDS[words[i % 5]]}
        for i in range(number)
    ]
    for name, part in {"train": rows[:-10], "test": rows[-10:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def flags(data, output, **options):
    base = {
        "dataset": data,
        "output_dir": output,
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
        "max_steps": 4,
        "logging_steps": 1,
        "sigma": 0.01,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "seed": 3,
    }
    named = {**base, **options}.items()
    return [str(word) for name, value in named for word in (f"--{name}", value)]


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "data")


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def accuracy(folder, texts, model=None):
    """As a user has it, of a folder."""
    if model is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    names = AutoConfig.from_pretrained(folder).id2label
    batch = tokenizer(texts.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model(**batch).logits.argmax(dim=1).tolist()
    right = [names[n] == label for n, label in zip(said, texts.labels, strict=True)]
    return sum(right) / len(right)


def test_end_to_end(data, tmp_path, capsys):
    output = tmp_path / "out"
    options = {"max_steps": 60, "learning_rate": 3e-3, "eval_strategy": "steps", "eval_steps": 30}
    main(flags(data, output, **options, validation_size=10, vocabulary_size=100, max_length=6))
    results = results_of(output)
    assert results["steps"] == 60 and results["training_examples"] == 40
    assert results["classes"] == ["animal", "plant", "weather"]
    assert results["validation"]["examples"] == results["test"]["examples"] == 10
    assert "memorised" not in results and results["wrong_labels"] == 0
    assert sum(results["texts_cut_off"].values()) > 0
    assert all(e["nso/perturbation_norm"] > 0 for e in results["log"] if "loss" in e)
    assert len([e for e in results["log"] if "eval_accuracy" in e]) == 2
    assert results["test"]["accuracy"] > 0.8  # chance 1/3
    texts = read_texts(str(data), "test")
    main(flags(data, tmp_path / "short", validation_size=10, max_length=32, **options))
    found = results_of(tmp_path / "short")
    assert sum(found["texts_cut_off"].values()) == 0
    assert accuracy(tmp_path / "short", texts) == pytest.approx(found["test"]["accuracy"])
    shown = capsys.readouterr().out
    for words in ("bert-tiny, 0.", "40 training, 10 validation, 10 test texts", "are cut off"):
        assert words in shown
    for name in ("training.png", "calibration.png", "model.safetensors", "tokenizer.json"):
        assert (output / name).exists()


def test_wrong_labels_and_few_examples(data, tmp_path):
    options = {"label_noise": 0.5, "examples_per_class": 6, "validation_size": 9, "seed": 1}
    main(flags(data, tmp_path / "out", **options, max_steps=150, learning_rate=3e-3, sigma=0))
    results = results_of(tmp_path / "out")
    assert results["training_examples"] == 18 and results["validation"]["examples"] == 9
    wrong = results["memorised"]
    assert wrong["examples"] == results["wrong_labels"] > 4
    assert wrong["memorised"] > 0.7  # 150 steps on 18 texts: what was given
    main(flags(data, tmp_path / "unread", **options, test="false", max_steps=1))
    assert "test" not in results_of(tmp_path / "unread")


@pytest.mark.parametrize("split", ["test", "none"])
def test_test_texts_are_held_out_where_there_are_none(data, tmp_path, split):
    if split == "test":
        (data / "test.jsonl").unlink()
    sizes = {"test_split": split, "test_size": 5, "validation_size": 5}
    main(flags(data, tmp_path / "out", **sizes, max_steps=1))
    results = results_of(tmp_path / "out")
    counts = [results[split]["examples"] for split in ("validation", "test")]
    assert [results["training_examples"], *counts] == [40, 5, 5]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_pretrained_models(data, tmp_path, kind):
    model = save_model(kind, tmp_path / "model")
    if kind == "t5":  # it classifies the token that ends a text
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
        tokenizer.save_pretrained(model)
    main(flags(data, tmp_path / "out", model_name_or_path=model, max_steps=1))
    texts, found = read_texts(str(data), "test"), results_of(tmp_path / "out")
    assert accuracy(tmp_path / "out", texts) == pytest.approx(found["test"]["accuracy"])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_adapters(data, tmp_path, kind):
    from peft import AutoPeftModelForSequenceClassification

    model, output = save_model(kind, tmp_path / "model"), tmp_path / "out"
    options = {"model_name_or_path": model, "lora_r": 4, "learning_rate": 1e-2, "max_steps": 20}
    main(flags(data, output, **options))
    assert not (output / "model.safetensors").exists()
    saved = load_file(output / "adapter_model.safetensors")
    head = "score" if kind == "gpt2" else "classifier"
    assert {name.split(".")[2] for name in saved if "lora" not in name} == {head}
    texts, found = read_texts(str(data), "test"), results_of(output)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(output, num_labels=3)
    if kind == "gpt2":
        loaded.config.pad_token_id = AutoTokenizer.from_pretrained(output).pad_token_id
    assert accuracy(output, texts, loaded) == pytest.approx(found["test"]["accuracy"])


def test_accumulated_micro_batches_are_the_whole_batch(data, tmp_path):
    """Not their sum, as of models that are given num_items_in_batch and do not divide by it."""
    options = {"model_name_or_path": save_model("bert", tmp_path / "model"), "max_steps": 2}
    options |= {"learning_rate": 0.01, "adam_epsilon": 1e-3, "max_grad_norm": 0}
    for steps in (1, 2):
        accumulated = {"gradient_accumulation_steps": steps}
        size = {"per_device_train_batch_size": 8 // steps}
        main(flags(data, tmp_path / f"{steps}", **options, **accumulated, **size))
    a, b = (load_file(tmp_path / f"{steps}" / "model.safetensors") for steps in (1, 2))
    # Two steps of Adam at 0.01 with eps 1e-3: see tests/distributed/test_back_ends.py.
    assert max((a[name] - b[name]).abs().max() for name in a) <= 2e-6
    logs = [results_of(tmp_path / f"{steps}")["log"] for steps in (1, 2)]
    # Of losses near ln 3, each rounded once more.
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-6)


def test_linear_probe(data, tmp_path):
    model = save_model("bert", tmp_path / "model")
    options = {"model_name_or_path": model, "linear_probe": "true", "learning_rate": 1e-2}
    for steps in (1, 3):
        main(flags(data, tmp_path / f"{steps}", **options, max_steps=steps))
    a, b = (load_file(tmp_path / f"{steps}" / "model.safetensors") for steps in (1, 3))
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("adapters", [False, True])
def test_curvature_of_the_saved_folder(data, tmp_path, adapters, capsys):
    """By the command, on texts with the names of their classes."""
    model = save_model("bert", tmp_path / "model")
    options = {"model_name_or_path": model, "curvature": "true", "curvature_samples": 2}
    if adapters:
        options["lora_r"] = 2
    main(flags(data, tmp_path / "out", **options, max_steps=1))
    assert results_of(tmp_path / "out")["curvature"]["lambda_max"] != 0
    output = tmp_path / "curvature"
    measured = ["--num_samples", "2", "--num_batches", "1", "--num_eigenvalues", "1"]
    measured += ["--slice_points", "0", "--spectrum_steps", "0", "--output", str(output)]
    table = str(data / "test.jsonl")
    measure_checkpoints([str(tmp_path / "out"), "--data", table, *measured])
    assert "trace" in capsys.readouterr().out and (output / "results.json").exists()


def test_resume_is_the_uninterrupted_run(data, tmp_path, interrupt_at):
    """In the second pass over the texts, in the middle of which a checkpoint is."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "label_noise": 0.3}
    options |= {"per_device_train_batch_size": 16, "eval_strategy": "steps", "eval_steps": 3}
    main(flags(data, tmp_path / "whole", **options))
    part = flags(data, tmp_path / "part", **options)
    message = r"Interrupted at step 7; .*checkpoint-4.*goes on"
    with interrupt_at(7), pytest.raises(SystemExit, match=message):
        main(part)
    main([*part, "--resume_from_checkpoint", "last"])
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    for name in ("validation", "test", "memorised"):
        assert whole[name] == part[name]


def test_going_on_with_something_else(data, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    main(flags(data, tmp_path / "out", **options))
    options |= {"resume_from_checkpoint": "last", "max_steps": 3}
    for message, changed in {
        "label_noise=0.2: this run began with 0.0": {"label_noise": 0.2},
        "max_length=64: this run began with 128": {"max_length": 64},
        "vocabulary_size=200: this run began with 4096": {"vocabulary_size": 200},
    }.items():
        with pytest.raises(ValueError, match=message):
            main(flags(data, tmp_path / "out", **(options | changed)))
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace("sun", "Sun"))
    with pytest.raises(ValueError, match="not the training texts that this run began with"):
        main(flags(data, tmp_path / "out", **options))
    (data / "train.jsonl").write_text(rows)
    main(flags(data, tmp_path / "out", **(options | {"test": "false", "sigma": 0.02})))
    assert results_of(tmp_path / "out")["steps"] == 3


def test_plain_training_beside_nso(data, tmp_path, capsys):
    options = {"compare_plain": "true", "label_noise": 0.3, "sigma": 0.05}
    main(flags(data, tmp_path / "both", **options))
    main(flags(data, tmp_path / "alone", **(options | {"compare_plain": "false", "sigma": 0})))
    both, alone = results_of(tmp_path / "both"), results_of(tmp_path / "alone")
    for name in ("validation", "test", "memorised"):
        assert both["plain"][name] == alone[name]
    table = next(x for x in capsys.readouterr().out.splitlines() if "plain" in x and "NSO" in x)
    assert table.index("NSO") < table.index("plain")


@pytest.mark.slow
def test_the_names_of_emoji(tmp_path):
    main(flags("emoji_languages", tmp_path, max_steps=1, train_size=100, vocabulary_size=200))
    results = results_of(tmp_path)
    assert results["training_examples"] == 100 and len(results["classes"]) == 8
    assert results["test"]["examples"] > 2000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam", "zo"])
def test_another_method(data, tmp_path, method):
    kwargs = {"sam": '{"rho": 0.05}', "zo": "{}"}[method]
    main(flags(data, tmp_path / "out", method=method, method_kwargs=kwargs, max_steps=1))
    assert results_of(tmp_path / "out")["nso_options"]["method"] == method


@pytest.mark.distributed
def test_torchrun_with_two_processes(data, tmp_path):
    """Each makes the vocabulary of a new model for itself."""
    recipe = str(ROOT / "recipes" / "text_classification.py")
    torchrun([recipe, *flags(data, tmp_path / "out", label_noise=0.3)], timeout=180)
    results = results_of(tmp_path / "out")
    assert results["processes"] == 2 and results["backend"] == "DistributedDataParallel"
    assert results["test"]["examples"] == 10


def test_the_shipped_config_is_valid(monkeypatch):
    from nso_hf.running.command_line import RecipeParser

    monkeypatch.chdir(ROOT)
    config = str(ROOT / "recipes" / "configs" / "demo_text.yaml")
    parser = RecipeParser(OPTIONS, configs=ROOT / "recipes" / "configs")
    _, data, protocol, *_, args = parser.parse(["--config", config, "--use_cpu", "true"])
    assert data.dataset == "emoji_languages" and protocol.label_noise == 0.4
    assert args.sigma == 0.02 and "demo_text" in parser._named_configs()
