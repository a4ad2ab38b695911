"""`python -m nso_hf.curvature` on checkpoints of tiny models."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from nso_hf.curvature import hessian_eigenvalues, hessian_trace
from nso_hf.curvature.__main__ import main
from nso_hf.running.sampling import drawn
from tests.reference import DEVICE
from tests.tiny_models import byte_tokenizer, save_model

QUICK = ["--num_samples", "4", "--spectrum_steps", "4", "--slice_points", "3", "--num_batches", "2"]


@pytest.fixture
def checkpoints(tmp_path):
    """Two GPT-2, one of twice the weights, and a data set."""
    first = save_model("gpt2", tmp_path / "first")
    model = GPT2LMHeadModel.from_pretrained(first)
    for parameter in model.parameters():
        parameter.data *= 2
    model.bfloat16().save_pretrained(tmp_path / "second")
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "second")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(first), str(tmp_path / "second")], str(tmp_path / "rows.jsonl")


def test_two_checkpoints_side_by_side(checkpoints, tmp_path, capsys):
    paths, data = checkpoints
    out = tmp_path / "out"
    main([*paths, "--data", data, "--output", str(out), "--plane_points", "3", *QUICK])
    printed = capsys.readouterr().out
    for words in ("trace of the Hessian", "eigenvalue 1", "smallest", "autograd"):
        assert words in printed
    results = json.loads((out / "results.json").read_text())
    assert list(results["checkpoints"]) == paths
    for name in ("traces", "spectrum", "line", "plane"):
        assert Image.open(out / f"{name}.png").size > (300, 200)
    tokenizer = AutoTokenizer.from_pretrained(paths[0])
    numbers, _ = drawn(range(24), 16)  # of two batches
    batches = [
        {name: t.to(DEVICE) for name, t in expected_batch(tokenizer, numbers[i : i + 8]).items()}
        for i in (0, 8)
    ]
    for path, figures in results["checkpoints"].items():
        model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).to(DEVICE)
        trace = hessian_trace(model, batches, num_samples=4)
        assert figures["trace"]["estimate"] == pytest.approx(trace.estimate, rel=1e-5)
        top = hessian_eigenvalues(model, batches, k=3)
        assert figures["largest"]["values"] == pytest.approx(top.values, rel=1e-4)
        with torch.no_grad():
            loss = sum(model.eval()(**batch).loss.item() for batch in batches) / 2
        assert figures["stability"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert figures["line"]["losses"][1] == pytest.approx(loss, rel=1e-5)
        assert figures["plane"]["losses"][1][1] == pytest.approx(loss, rel=1e-5)
        parts = [part["estimate"] for part in figures["trace_per_parameter"].values()]
        assert sum(parts) == pytest.approx(trace.estimate, rel=1e-4)
    with pytest.raises(ValueError, match=r"output=.*holds the results of another run"):
        main([*paths, "--data", data, "--output", str(out)])


def expected_batch(tokenizer, numbers):
    """Made by hand: the loss of the completion and its end, padded on the right."""
    end = [tokenizer.eos_token_id]
    rows = [
        (tokenizer(f"{i} + 1 =").input_ids, tokenizer(f" {i + 1}").input_ids + end) for i in numbers
    ]
    length = max(len(p) + len(c) for p, c in rows)
    ids, mask, labels = [], [], []
    for prompt, completion in rows:
        padding = length - len(prompt) - len(completion)
        ids.append(prompt + completion + [tokenizer.eos_token_id] * padding)
        mask.append([1] * (length - padding) + [0] * padding)
        labels.append([-100] * len(prompt) + completion + [-100] * padding)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(values) for name, values in named.items()}


def test_adapters(checkpoints, tmp_path):
    from peft import LoraConfig, get_peft_model

    paths, data = checkpoints
    model = GPT2LMHeadModel.from_pretrained(paths[0])
    adapters = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    get_peft_model(model, adapters).save_pretrained(tmp_path / "adapted")
    out = tmp_path / "out"
    words = ["--data", data, "--tokenizer", paths[0], "--output", str(out), *QUICK]
    main([str(tmp_path / "adapted"), *words])
    (figures,) = json.loads((out / "results.json").read_text())["checkpoints"].values()
    assert figures["trace"]["num_parameters"] == 2 * 2 * (32 + 96)
    assert all("lora_" in name for name in figures["trace_per_parameter"])
    main([str(tmp_path / "adapted"), *words, "--output", f"{out}2", "--params", "merged"])
    (figures,) = json.loads((tmp_path / "out2/results.json").read_text())["checkpoints"].values()
    assert figures["trace"]["num_parameters"] == 2 * 32 * 96


def save_bert(folder):
    tokenizer = byte_tokenizer()
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 8, "num_labels": 3}
    BertForSequenceClassification(BertConfig(**settings, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"text": f"text {i}", "label": i % 3} for i in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def save_vit(folder):
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 8, "patch_size": 4, "intermediate_size": 8, "num_labels": 2}
    ViTForImageClassification(ViTConfig(**settings, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (9, 9), (20 * i, 90, 40)).save(folder / "images" / label / f"{i}.png")
    return folder / "images"


def save_t5(folder):
    save_model("t5", folder)
    rows = [{"prompt": f"{i} + 1", "completion": f"{i + 1}"} for i in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def save_batches(folder):
    save_model("gpt2", folder)
    tokens = torch.randint(99, (2, 4, 8))
    torch.save([{"input_ids": t, "labels": t} for t in tokens], folder / "batches.pt")
    return folder / "batches.pt"


KINDS = {
    "text classes": (save_bert, BertForSequenceClassification),
    "image classes": (save_vit, ViTForImageClassification),
    "sequence to sequence": (save_t5, T5ForConditionalGeneration),
    "batches": (save_batches, GPT2LMHeadModel),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models_and_data(kind, tmp_path):
    save, model_class = KINDS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    data, out = save(folder), tmp_path / "out"
    main([str(folder), "--data", str(data), "--output", str(out), *QUICK])
    (figures,) = json.loads((out / "results.json").read_text())["checkpoints"].values()
    parameters = sum(p.numel() for p in model_class.from_pretrained(folder).parameters())
    assert figures["trace"]["num_parameters"] == parameters
    assert figures["trace"]["num_examples"] in (8, 10)
    assert figures["stability"]["loss"] > 0


def test_help_and_wrong_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert re.search(r"--num_samples .*\n?.*probes of the trace", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="2"):
        main(["model", "--data", "x", "--sampels", "3"])
    assert "unrecognized arguments: --sampels" in capsys.readouterr().err
