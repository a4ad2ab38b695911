"""What a trained model still answers in few bits, from the recipe's command line to results.json,
against a copy that is rounded, asked and judged by hand."""

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from nso_hf.running.sampling import places
from nso_hf.tasks.reasoning.robustness import AnswerRobustnessOptions
from nso_hf.tasks.reasoning.trainer import ReasoningTrainer
from recipes import cot_finetuning
from recipes.cot_finetuning import main
from tests.distributed.launch import torchrun
from tests.tiny_models import save_model

MAX_NEW_TOKENS = 12


def write_questions(folder):
    """Whose letters tell the answer."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": f"{3 * 'abc'[i % 3]}{i}", "rationale": "so", "answer": "xyz"[i % 3]}
        for i in range(90)
    ]
    for name, part in {"train": rows[:-24], "test": rows[-24:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)


def flags(model, output, *more, **options):
    base = {
        "model_name_or_path": model,
        "dataset": output.parent / "data",
        "output_dir": output,
        "template": "plain",
        "validation_size": 6,
        "max_new_tokens": MAX_NEW_TOKENS,
        "evaluate_before": "false",
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "sigma": 0,
    }
    named = (base | options).items()
    return [str(word) for name, value in named for word in (f"--{name}", value)] + [*more]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions, and a model that has learned to answer some of them: `half_trained`."""
    path = tmp_path_factory.mktemp("answers")
    write_questions(path / "data")
    model = save_model("llama", path / "llama")
    main(flags(model, path / "half_trained", test="false", max_steps=30))
    assert "accuracy_in_bits" not in results_of(path / "half_trained")
    return path


def questions(folder):
    return [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()]


def saved_model(start, output):
    """As training left it: adapters are multiplied out and added by hand."""
    if (output / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(output).eval()
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    adapters = load_file(output / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [name for name in adapters if "lora_A" in name]:
            A, B = adapters[name], adapters[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(layer).weight += 2 * B @ A  # lora_alpha is 2 x lora_r
    return model


def quantised(model, bits, group_size=None):
    """The model, its weights rounded in place: each output's, one after the other."""
    levels = np.float32(2 ** (bits - 1) - 1)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            weight = module.weight.data.numpy()
            for row in weight.T if isinstance(module, Conv1D) else weight:
                size = group_size or len(row)
                for group in (row[i : i + size] for i in range(0, len(row), size)):
                    scale = np.abs(group).max() / levels
                    group[:] = np.rint(group / scale) * scale
    return model


@torch.no_grad()
def greedy(model, tokenizer, question):
    """One token after the other: the text, and whether the model ended it."""
    ids = tokenizer(f"{question} ###")["input_ids"]
    start = len(ids)
    for _ in range(MAX_NEW_TOKENS):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(ids[start:-1]), True
    return tokenizer.decode(ids[start:]), False


@torch.no_grad()
def loss_per_token(model, tokenizer, rows):
    """Of the completions."""
    losses = []
    for row in rows:
        prompt = tokenizer(f"{row['question']} ###")["input_ids"]
        completion = tokenizer(f" {row['rationale']} --> {row['answer']}</s>")["input_ids"]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        losses += cross_entropy(logits, torch.tensor(completion), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("kind", "options", "group_size"),
    [
        ("gpt2", {"max_steps": 90}, None),
        ("half_trained", {"max_steps": 1, "learning_rate": 1e-3}, 16),
        ("half_trained", {"max_steps": 2, "learning_rate": 1e-3, "lora_r": 4}, None),
    ],
    ids=["all weights", "in groups", "adapters"],
)
def test_accuracy_is_that_of_a_copy_that_is_rounded_by_hand(
    folder, capsys, kind, options, group_size
):
    start, output = folder / kind, folder / f"{kind}_{len(options)}"
    if not start.exists():
        save_model(kind, start)
    asked = ["--accuracy_in_bits", "4", "3", "2"]
    asked += ["--accuracy_group_size", str(group_size)] if group_size else []
    main(flags(start, output, *asked, **options))
    found, printed = results_of(output), capsys.readouterr().out
    assert list(found["accuracy_in_bits"]) == ["4", "3", "2"]
    test, tokenizer = questions(folder), AutoTokenizer.from_pretrained(output)
    for bits, figures in found["accuracy_in_bits"].items():
        model = quantised(saved_model(start, output), int(bits), group_size)
        said = [greedy(model, tokenizer, row["question"]) for row in test]
        right = [
            "-->" in text and text.rpartition("-->")[2].strip() == row["answer"]
            for (text, _), row in zip(said, test, strict=True)
        ]
        share = sum(right) / len(test)
        assert (figures["correct"], figures["questions"]) == (sum(right), len(test))
        assert figures["accuracy"] == share
        assert figures["accuracy_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 24))
        assert figures["complete"] == sum(ended for _, ended in said) / len(test)
        (row,) = [line for line in printed.splitlines() if f"accuracy in {bits} bits" in line]
        assert f"{share:.1%} ± {figures['accuracy_stderr']:.1%} ({sum(right)})" in row
    shares = {figures["accuracy"] for figures in found["accuracy_in_bits"].values()}
    assert len(shares) > 1 and max(shares) > 1 / 3  # else nothing was compared


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 4}], ids=["all weights", "adapters"])
def test_loss_is_that_per_token_of_the_test_answers(folder, adapters):
    start, output = folder / "half_trained", folder / f"loss{len(adapters)}"
    options = {"max_steps": 2, "learning_rate": 1e-3, "robustness_examples": 20, **adapters}
    main(flags(start, output, robustness="true", **options))
    rows = {(row["kind"], row["strength"]): row for row in results_of(output)["robustness"]}
    tokenizer = AutoTokenizer.from_pretrained(output)
    model, asked = saved_model(start, output), questions(folder)
    for place in (("none", None), ("bits", 4), ("bits", 2)):
        if place[1]:
            model = quantised(saved_model(start, output), place[1])
        expected = loss_per_token(model, tokenizer, [asked[i] for i in places(20, len(asked))])
        # Float32 losses of up to 10 in another order; adapters are multiplied out by other code.
        assert rows[place]["loss"] == pytest.approx(expected, rel=1e-4), place
    assert rows["bits", 2]["loss"] > 1.1 * rows["none", None]["loss"]


@contextmanager
def interrupted(monkeypatch, when):
    """Inside, answering the questions that are called so is interrupted."""
    original = ReasoningTrainer.answer

    def answer(self, examples, description, *args):
        if description == when:
            raise KeyboardInterrupt
        return original(self, examples, description, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ReasoningTrainer, "answer", answer)
        yield


def test_what_was_found_before_an_interrupt_is_kept_and_gone_on_from(folder, monkeypatch):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    options |= {"lora_r": 4, "sigma": 0.01, "logging_steps": 1, "robustness": "true"}
    options["robustness_examples"] = 4
    model, asked = folder / "half_trained", ["--accuracy_in_bits", "3", "2"]
    main(flags(model, folder / "whole", *asked, **options))
    part = flags(model, folder / "part", *asked, **options)
    last = ["--resume_from_checkpoint", "last"]
    on = r"Interrupted at step 2; last checkpoint: .*checkpoint-2; .*goes on"
    with interrupted(monkeypatch, "Test, after training"), pytest.raises(SystemExit, match=on):
        main(part)
    kept, whole = results_of(folder / "part"), results_of(folder / "whole")
    losses = [[e["loss"] for e in found["log"] if "loss" in e] for found in (kept, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == kept["steps"] == 2
    assert kept["train_seconds"] > 0 and kept["validation"] == whole["validation"]
    assert kept["total_seconds"] >= kept["train_seconds"] and kept["versions"] == whole["versions"]
    assert "after" not in kept and "robustness" not in kept
    with interrupted(monkeypatch, "Test, in 2 bits"), pytest.raises(SystemExit, match=on):
        main([*part, *last])
    kept = results_of(folder / "part")
    assert kept["after"] == whole["after"] and kept["robustness"] == whole["robustness"]
    assert kept["accuracy_in_bits"] == {"3": whole["accuracy_in_bits"]["3"]}
    main([*part, *last])
    resumed = results_of(folder / "part")
    for name in ("validation", "after", "robustness", "accuracy_in_bits"):
        assert resumed[name] == whole[name], name
    assert resumed["after"]["accuracy"] > 0  # else nothing was compared


def test_an_interrupt_without_a_checkpoint(folder, monkeypatch):
    command = flags(folder / "half_trained", folder / "lost", max_steps=1, save_strategy="no")
    anew = "the same command with another --output_dir begins anew"
    with interrupted(monkeypatch, "Test, after training"), pytest.raises(SystemExit, match=anew):
        main(command)
    assert results_of(folder / "lost")["steps"] == 1
    with pytest.raises(ValueError, match="or another --output_dir"):
        main(command)


@pytest.mark.distributed
def test_two_processes_measure_as_one(folder):
    """A learning rate of 0 leaves the weights as they are, bit for bit."""
    options = {"max_steps": 1, "learning_rate": 0, "sigma": 0.01, "save_strategy": "no"}
    options |= {"robustness": "true", "robustness_examples": 4, "accuracy_in_bits": 2}
    model = folder / "half_trained"
    torchrun([cot_finetuning.__file__, *flags(model, folder / "two", **options)], timeout=180)
    main(flags(model, folder / "one", **options))
    two, one = (results_of(folder / name) for name in ("two", "one"))
    assert (two["processes"], two["backend"]) == (2, "DistributedDataParallel")
    assert two["accuracy_in_bits"] == one["accuracy_in_bits"]
    assert 0 < one["accuracy_in_bits"]["2"]["accuracy"] < 1
    assert two["robustness"] == one["robustness"]


@pytest.mark.parametrize("option", ["robustness", "accuracy_in_bits"])
def test_sharded_weights_are_refused(option):
    options = AnswerRobustnessOptions(**{option: [4] if option == "accuracy_in_bits" else True})
    copies = {"name": "FSDP2", "num_processes": 2}
    options.check(SimpleNamespace(num_copies=2, **copies))
    with pytest.raises(ValueError, match=f"{option}=.*: FSDP2 shards the weights. Leave it out"):
        options.check(SimpleNamespace(num_copies=1, **copies))


def test_wrong_bits_are_refused_before_anything_is_loaded(folder):
    for bits in ("1", "17"):
        refused = flags("no_such_model", folder / "none", "--accuracy_in_bits", "4", bits)
        with pytest.raises(ValueError, match=f"accuracy_in_bits={bits}: not a whole number from 2"):
            main(refused)
    assert not (folder / "none").exists()
