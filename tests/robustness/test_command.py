"""`nso robustness` from its command line to its files."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nso_hf.robustness import average, robustness, task_arithmetic
from nso_hf.robustness.__main__ import main
from nso_hf.robustness.report import described
from tests.tiny_models import save_model

FEW = ["--bits", "4", "--noise", "--relative_noise", "0.1", "--sparsity", "0.5"]
NOTHING = ["--bits", "--noise", "--relative_noise", "--sparsity"]


@pytest.fixture
def folder(tmp_path):
    """Two llamas that differ, what they began with, and texts."""
    for number, name in enumerate(["base", "one", "two"]):
        save_model("llama", tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.manual_seed(number)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * number * torch.randn_like(p)
        model.save_pretrained(tmp_path / name)
    texts = [f"the number {i} comes after {i - 1}" + " and so on" * (i % 3) for i in range(10)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    return tmp_path


def measured(folder, *words):
    main([*words, "--data", str(folder / "texts.jsonl"), "--output", str(folder / "out")])
    return json.loads((folder / "out" / "results.json").read_text())["checkpoints"]


def loss_of(model, folder):
    """By the texts one at a time, which need no padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lines = (folder / "texts.jsonl").read_text().splitlines()
    batches = []
    for line in lines:
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        batches.append({"input_ids": ids, "labels": ids})
    options = dict.fromkeys(("bits", "noise", "relative_noise", "sparsity"), ())
    return robustness(model, batches, **options)[0].loss


def test_table_file_and_picture(folder, capsys):
    one, two = str(folder / "one"), str(folder / "two")
    found = measured(folder, one, two, *FEW, "--num_samples", "2", "--group_sizes", "none", "8")
    assert list(found) == [one, two]
    kinds = ["none", "bits", "bits in groups of 8", "relative noise", "sparsity"]
    assert [row["kind"] for row in found[one]] == kinds
    for name in (one, two):
        model = AutoModelForCausalLM.from_pretrained(name)
        # Padded texts in batches, against one after another.
        assert found[name][0]["loss"] == pytest.approx(loss_of(model, folder), rel=1e-5)
    out = capsys.readouterr().out
    for words in ("Loss ± standard error", "Accuracy, %", "4 bits", "50 % pruned", "as it is"):
        assert words in out
    assert (folder / "out" / "robustness.png").stat().st_size > 10_000


def test_merging(folder):
    names = [str(folder / name) for name in ("one", "two")]
    base = str(folder / "base")
    found = measured(folder, *names, *NOTHING, "--merge", "--base", base, "--scales", "0.4")
    models = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    merged = {
        "average": average(models),
        "base + 0.4 sum of changes": task_arithmetic(
            AutoModelForCausalLM.from_pretrained(base), models, scale=0.4
        ),
    }
    assert list(found) == [*names, *merged]
    for name, model in merged.items():
        assert found[name][0]["loss"] == pytest.approx(loss_of(model, folder), rel=1e-5)


def test_adapters_are_merged_first(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    adapted.save_pretrained(folder / "adapter")
    where = ["--tokenizer", str(folder / "base")]
    found = measured(folder, str(folder / "adapter"), *FEW, *where, "--num_samples", "1")
    rows = next(iter(found.values()))
    merged = adapted.merge_and_unload()
    assert rows[0]["loss"] == pytest.approx(loss_of(merged, folder), rel=1e-5)
    assert rows[1]["loss"] != rows[0]["loss"]


def test_what_was_done_is_said():
    from nso_hf.robustness import Row

    rest = {"loss": 1.0, "stderr": 0.1, "accuracy": None, "accuracy_stderr": None, "ece": None}
    rows = [
        Row(kind="none", strength=None, **rest),
        Row(kind="bits in groups of 64", strength=3, **rest),
        Row(kind="relative noise", strength=0.1, **rest),
        Row(kind="sparsity", strength=0.7, **rest),
    ]
    said = ["as it is", "3 bits in groups of 64", "relative noise 0.1", "70 % pruned"]
    assert [described(row) for row in rows] == said
