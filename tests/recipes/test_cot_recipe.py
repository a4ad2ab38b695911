"""The chain-of-thought recipe from its command line to its files, on tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from nso_hf import NSOTrainer
from nso_hf.running.figures import with_error
from nso_hf.tasks.reasoning.answers import judge
from nso_hf.tasks.reasoning.evaluation import evaluate_answers
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.prompts import PromptFormat
from recipes.cot_finetuning import main
from tests.distributed.launch import torchrun
from tests.tiny_models import byte_tokenizer, save_model

ROOT = Path(__file__).parents[2]


def flags(model, output, **options):
    base = {
        "model_name_or_path": model,
        "dataset": "reasoning_gym:chain_sum",
        "dataset_kwargs": '{"max_terms": 2, "max_digits": 1}',
        "train_size": 40,
        "validation_size": 6,
        "test_size": 8,
        "max_new_tokens": 12,
        "max_length": 220,
        "output_dir": output,
        "use_cpu": "true",
        "report_to": "none",
        "max_steps": 4,
        "logging_steps": 1,
        "sigma": 0.02,
        "per_device_train_batch_size": 4,
        "disable_tqdm": "true",
    }
    merged = {**base, **options}
    return [str(word) for name, value in merged.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {}),
        ("gpt2", {"lora_r": 4, "lora_target_modules": "c_attn", "lora_dropout": 0.1}),
        ("llama", {"lora_r": 4, "gradient_checkpointing": "true"}),
        ("gpt2", {"lora_r": 4, "deep_lora": "plain", "lora_dropout": 0.1}),
        ("t5", {"lora_r": 4, "deep_lora": "compressed"}),
        ("t5", {"num_perturbations": 2}),
        (
            "llama",
            {
                "format": "answer",
                "template": "plain",
                "dataset": "reasoning_gym:letter_counting",
                "dataset_kwargs": "{}",
            },
        ),
    ],
)
def test_any_model_end_to_end(tmp_path, kind, options):
    model = save_model(kind, tmp_path / "model")
    output = tmp_path / "out"
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": "true",
        "metric_for_best_model": "eval_loss",
    }
    main(flags(model, output, **evaluation, **options))
    results = json.loads((output / "results.json").read_text())
    assert (
        results["steps"] == 4
        and results["before"]["questions"] == results["after"]["questions"] == 8
    )
    assert results["nso_options"]["sigma"] == 0.02 and results["processes"] == 1
    best = min((e for e in results["log"] if "eval_loss" in e), key=lambda e: e["eval_loss"])
    assert results["best_checkpoint"].endswith(f"checkpoint-{best['step']}")
    assert 0 <= best["eval_accuracy"] <= 1
    norms = [e["nso/perturbation_norm"] for e in results["log"] if "loss" in e]
    assert len(norms) == 4 and min(norms) > 0
    predictions = [
        json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(predictions) == 8
    assert results["after"]["correct"] == sum(p["correct"] for p in predictions)
    for p in predictions:
        again = judge(p["completion"], p["answer"])
        assert (again.correct, again.prediction) == (p["correct"], p["prediction"])
    assert (output / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert (output / ("adapter_config.json" if "lora_r" in options else "config.json")).exists()


def test_curvature_is_in_the_table_and_leaves_training_alone(tmp_path, capsys):
    model = save_model("llama", tmp_path / "model")
    measuring = {"curvature": "true", "curvature_samples": 3, "curvature_steps": 3}
    main(flags(model, tmp_path / "watched", lora_r=4, **measuring, curvature_examples=3))
    printed = capsys.readouterr().out
    main(flags(model, tmp_path / "plain", lora_r=4))
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("watched", "plain"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    results = json.loads((tmp_path / "watched" / "results.json").read_text())
    measured = [e for e in results["log"] if "curvature/trace" in e]
    assert [e["step"] for e in measured] == [0, 3, 4]
    figures = {"trace", "trace_stderr", "lambda_max", "lambda_max_residual", "seconds"}
    assert results["curvature"] == {name: measured[-1][f"curvature/{name}"] for name in figures}
    rows = [line for line in printed.splitlines() if "trace of the Hessian" in line]
    (row,) = rows
    for entry in (measured[0], measured[-1]):
        assert with_error(entry["curvature/trace"], entry["curvature/trace_stderr"]) in row
    assert json.loads((tmp_path / "plain" / "results.json").read_text())["curvature"] is None


@pytest.mark.parametrize("deep_lora", ["none", "compressed"])
def test_resume_is_the_uninterrupted_run(tmp_path, interrupt_at, deep_lora):
    model = save_model("gpt2", tmp_path / "model")
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "lora_r": 4, "seed": 5}
    saving["deep_lora"] = deep_lora
    main(flags(model, tmp_path / "whole", **saving))
    # A run that ends at 3 of 6 steps: interrupted just after the checkpoint.
    with (
        interrupt_at(4),
        pytest.raises(SystemExit, match=r"Interrupted at step 4; .*checkpoint-3.*goes on"),
    ):
        main(flags(model, tmp_path / "part", **saving))
    main(flags(model, tmp_path / "part", **saving, resume_from_checkpoint="last"))
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole, part = (
        json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "part")
    )
    assert whole["before"] == part["before"] and whole["after"] == part["after"]


def test_going_on_with_something_else(tmp_path, capsys):
    """Another sigma is printed and kept, other data or another model are refused."""
    model, output, data = (
        save_model("gpt2", tmp_path / "model"),
        tmp_path / "out",
        tmp_path / "data",
    )

    def write(answer):
        rows = [{"question": f"q{i}", "rationale": "r", "answer": answer} for i in range(30)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("a")
    options = {"lora_r": 4, "save_steps": 2, "dataset": f"{data}.jsonl", "dataset_kwargs": "{}"}
    main(flags(model, output, **options, max_steps=2))
    results = (output / "results.json").read_text()
    options |= {"resume_from_checkpoint": "last"}
    refused = {
        "lora_r=8: this run began with 4": {"lora_r": 8},
        "optim='adafactor': this run began with": {"optim": "adafactor"},
        "test_size=7: this run began with 8": {"test_size": 7},
    }
    for message, changed in refused.items():
        with pytest.raises(ValueError, match=message):
            main(flags(model, output, **(options | changed)))
    write("b")
    with pytest.raises(ValueError, match=r"data.jsonl': not the training examples that"):
        main(flags(model, output, **options))
    write("a")
    file = model / "model.safetensors"
    saved = file.read_bytes()
    save_file({n: w + 1 for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model_name_or_path=.*: not the weights that"):
        main(flags(model, output, **options))
    assert (output / "results.json").read_text() == results  # nothing of the earlier run is lost
    file.write_bytes(saved)
    capsys.readouterr()
    main(flags(model, output, **options, sigma=0.5))
    assert "from step 2; changed: max_steps 2 -> 4; sigma 0.02 -> 0.5." in capsys.readouterr().out
    kept = json.loads((output / "results.json").read_text())["options"]
    assert kept[0]["options"]["sigma"] == 0.02 and kept[0]["options"]["lora_r"] == 4
    assert kept[1] == {"from_step": 2, "options": {"max_steps": 4, "sigma": 0.5}}


def test_yaml_and_flags(tmp_path):
    from nso_hf.running.command_line import RecipeParser
    from recipes.cot_finetuning import OPTIONS

    path = tmp_path / "c.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset: gsm8k\noutput_dir: o\nlearning_rate: 1e-4\nsigma: 0.02\n"
        "perturb_include: [lora_A, lora_B]\ntwo_sided: false\nuse_cpu: true\nmax_steps: 7\n"
    )
    parser = RecipeParser(OPTIONS)
    model, data, *_, args = parser.parse(
        ["--config", str(path), "--sigma", "0.03", "--max_steps=9"]
    )
    assert (model.model_name_or_path, data.dataset, data.preset) == ("m", "gsm8k", "gsm8k")
    assert args.learning_rate == 1e-4 and args.sigma == 0.03 and args.max_steps == 9
    assert args.perturb_include == ["lora_A", "lora_B"] and args.two_sided is False


@pytest.mark.parametrize(("name", "sigma"), [("demo", 0.02), ("gsm8k", 0.01)])
def test_shipped_configs_are_valid(name, sigma, tmp_path):
    from nso_hf.running.command_line import RecipeParser
    from recipes.cot_finetuning import OPTIONS

    parser = RecipeParser(OPTIONS)
    required = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    *_, args = parser.parse(["--config", str(config), *required])
    assert args.sigma == sigma


def test_help_and_a_missing_option_fit_a_terminal():
    environment = os.environ | {"COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "recipes" / "cot_finetuning.py")]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    for name in ("--sigma", "--lora_r", "--dataset", "--config", "--learning_rate"):
        assert re.search(rf"^  {name}\b", done.stdout, re.M)
    assert "nso_hf" not in done.stdout.split("options:")[0]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-2]
        .startswith("error: the following arguments are required")
    )
    done = subprocess.run(
        [*command, "--sigmma", "1", "--model_name_or_path", "m", "--dataset", "gsm8k"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        "error: option='--sigmma': unknown. Did you mean --sigma."
    )


class Parrot(torch.nn.Module):
    """Generates given texts, one after the other."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(eos_token_id=[1, 7], do_sample=True)  # 7 ends a turn

    def __init__(self, texts, tokenizer):
        super().__init__()
        self.texts, self.tokenizer = dict(texts), tokenizer

    def generate(self, input_ids, attention_mask, **probing):
        asked = self.generation_config
        assert not self.training and asked.do_sample is False
        assert asked.eos_token_id == [1, 7]
        if probing:  # whether padding is seen
            return SimpleNamespace(logits=[torch.ones(2, 9)])
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            text = self.texts[prompt.removesuffix(" ###")]
            ids = self.tokenizer(text.removesuffix("<turn>"))["input_ids"]
            ids = ids + [7] * text.endswith("<turn>")
            rows.append(torch.tensor(ids[: asked.max_new_tokens]))
        new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        return torch.cat([input_ids, new], dim=1)


def test_evaluation_counts_what_the_model_says():
    from accelerate import Accelerator

    tokenizer = byte_tokenizer()
    said = {
        "short": " 1 + 1 --> 2</s>",
        "a longer question": " --> 3</s>",
        "q": " the answer is 2<turn>",
        "unfinished": " on and on and on and on",
    }
    examples = [Example(question, "2") for question in said]
    model = Parrot(said, tokenizer).train()
    evaluation = evaluate_answers(
        model,
        PromptFormat(tokenizer),
        examples,
        Accelerator(cpu=True),
        batch_size=3,
        max_new_tokens=20,
    )
    assert [p["question"] for p in evaluation.predictions] == list(said)
    metrics = evaluation.metrics
    assert metrics["accuracy"] == 0.5 and metrics["contains_answer"] == 0.5
    assert metrics["correct_format"] == 0.5 and metrics["complete"] == 0.75
    assert metrics["accuracy_stderr"] == pytest.approx((0.25 / 4) ** 0.5)
    assert evaluation.count("correct") == 2 and model.training


@pytest.mark.distributed
def test_torchrun_with_two_processes(tmp_path):
    model = save_model("llama", tmp_path / "model")
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    torchrun(
        [
            str(ROOT / "recipes" / "cot_finetuning.py"),
            *flags(model, tmp_path / "out", **evaluation),
        ],
        timeout=180,
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["processes"] == 2 and results["backend"] == "DistributedDataParallel"
    assert results["after"]["questions"] == 8
    # The same run in one process, with the same global batch: the same losses.
    main(flags(model, tmp_path / "one", **evaluation, per_device_train_batch_size=8, seed=42))
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    losses, expected = ([e["loss"] for e in r["log"] if "loss" in e] for r in (results, one))
    assert losses == pytest.approx(expected, abs=1e-4)  # of ~5.5, in float32, over four steps
    assert results["before"] == one["before"]


@pytest.mark.parametrize("with_validation_file", [True, False])
def test_no_question_is_in_two_splits(tmp_path, with_validation_file):
    """Whatever the files share, test and validation questions are in no other split."""
    from recipes.cot_finetuning import DataOptions

    def write(split, numbers):
        rows = [{"question": f"q{i}", "rationale": "r", "answer": str(i)} for i in numbers]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write("train", range(40))
    write("test", range(30, 50))
    if with_validation_file:
        write("validation", range(25, 35))
    train, validation, test = (
        {e.question for e in split}
        for split in DataOptions(str(tmp_path), validation_size=8).load(seed=0)
    )
    assert len(test) == 20 and len(validation) == (5 if with_validation_file else 8)
    assert not train & test and not validation & test and not train & validation
    assert len(train) == (25 if with_validation_file else 22)


def test_a_loss_that_is_not_a_number_still_gets_its_report(tmp_path):
    from nso_hf.running.plots import plot_training
    from nso_hf.tasks.reasoning.report import TITLES

    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2.0, "eval_loss": float("inf")}]
    options = {"method": "nso", "sigma": 0.1}
    for name, entries in (("plot", log), ("empty", [])):
        results = {"log": entries, "nso_options": options}
        plot_training(results, tmp_path / f"{name}.png", TITLES, top=1.0)
    assert (tmp_path / "plot.png").exists() and (tmp_path / "empty.png").exists()


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": float("nan")}], [{"step": 9}]])
def test_a_plot_of_nothing_says_why(tmp_path, monkeypatch, log):
    from matplotlib.axes import Axes

    from nso_hf.running.plots import plot_training

    said = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: said.append(text))
    results = {"log": log, "nso_options": {"method": "nso", "sigma": 0.1}}
    plot_training(results, tmp_path / "plot.png", {"loss": "Loss"}, top=None)
    assert said == ["nothing finite was logged:\nlower --logging_steps?"]


def test_label_smoothing_with_an_encoder_decoder(tmp_path):
    model = save_model("t5", tmp_path / "model")
    main(flags(model, tmp_path / "out", label_smoothing_factor=0.1, max_steps=2))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == 2


def test_plain_training_beside_nso(tmp_path, capsys, monkeypatch):
    """The plain column is what a run of its own at sigma 0 gives, also after an interrupt of it."""
    model = save_model("llama", tmp_path / "model")
    options = {"lora_r": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    measuring = {"curvature": "true", "curvature_examples": 4, "curvature_samples": 3}
    measuring |= {"accuracy_in_bits": 3}
    compared = {**options, **measuring, "curvature_steps": 4, "compare_plain": "true"}
    original = NSOTrainer.training_step

    def interrupted(self, *args, **kwargs):  # in the fourth step of the plain training
        if self.args.sigma == 0 and self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NSOTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit, match=r"at step 3; .*resume_from_checkpoint last goes on"):
            main(flags(model, tmp_path / "both", **compared))
    main(flags(model, tmp_path / "both", **compared, resume_from_checkpoint="last"))
    printed = capsys.readouterr().out
    main(flags(model, tmp_path / "alone", **{**options, **measuring, "sigma": 0}))
    both, alone = (
        json.loads((tmp_path / run / "results.json").read_text()) for run in ("both", "alone")
    )
    plain = both["plain"]
    for key in ("loss", "curvature/trace", "curvature/lambda_max"):
        expected = [entry[key] for entry in alone["log"] if key in entry]
        assert expected and [entry[key] for entry in plain["log"] if key in entry] == expected
    assert plain["after"] == alone["after"] and plain["nso_options"]["sigma"] == 0
    assert plain["accuracy_in_bits"] == alone["accuracy_in_bits"]
    row = next(line for line in printed.splitlines() if "accuracy in 3 bits" in line)
    assert row.count("%") == 4  # of both trainings, with errors; not of the start
    assert both["curvature"]["trace"] != plain["curvature"]["trace"]
    header = next(line for line in printed.splitlines() if "before" in line)
    assert header.index("before") < header.index("NSO") < header.index("plain")
    assert "'train_loss': '0'" not in printed  # where the NSO training had been finished


def test_compared_with_itself(tmp_path):
    with pytest.raises(ValueError, match=r"compare_plain=True: at sigma 0 both would be plain"):
        main(flags("m", tmp_path, sigma=0, compare_plain="true"))


def test_a_finished_run_says_that_nothing_was_left(tmp_path):
    model = save_model("gpt2", tmp_path / "model")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    main(flags(model, tmp_path / "out", **saving))
    main(flags(model, tmp_path / "out", **saving, resume_from_checkpoint="last"))
    log = json.loads((tmp_path / "out" / "results.json").read_text())["log"]
    assert [entry for entry in log if entry.get("train_loss") == 0] == []


def test_counts_are_of_texts_and_of_questions(tmp_path, capsys):
    questions = [f"q{i}" for i in range(12)]
    rows = [
        {"question": q, "rationale": ["one way", "or another"], "answer": "1"} for q in questions
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = save_model("gpt2", tmp_path / "model")
    main(
        flags(
            model,
            tmp_path / "out",
            dataset=tmp_path,
            dataset_kwargs="{}",
            validation_size=2,
            test_size=3,
            train_size=9,
            max_steps=1,
        )
    )
    printed = capsys.readouterr().out
    # 12 questions, of which 3 and 2 are held out; each of the 7 left has two rationales.
    assert "14 training texts of 7 questions, 2 validation and 3 test questions" in printed
    assert "7 of 9 training questions" in printed


def further(folder):
    (folder / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    longer = 'longer=reasoning_gym:chain_sum{"min_terms": 3, "max_terms": 3}'
    words = ["--forgetting_data", f"{folder}/prose.txt", "--further_size", "4"]
    return [*words, "--also_test", longer]


def test_forgetting_beside_plain_training(tmp_path, capsys):
    """Its column is that of a run of its own; both began with the same model."""
    model = save_model("gpt2", tmp_path / "model")
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    both = [*flags(model, tmp_path / "both", compare_plain="true", **options), *further(tmp_path)]
    main(both)
    printed = capsys.readouterr().out
    main([*flags(model, tmp_path / "alone", sigma=0, **options), *further(tmp_path)])
    results, alone = (
        json.loads((tmp_path / run / "results.json").read_text()) for run in ("both", "alone")
    )
    for group in ("forgetting", "also_test"):
        assert results["plain"][group] == alone[group]
    prose = results["forgetting"]["prose"]
    assert prose["kind"] == "text" and prose["before"] == alone["forgetting"]["prose"]["before"]
    assert prose["change"] == pytest.approx(prose["after"]["loss"] - prose["before"]["loss"])
    assert prose["change"] != alone["forgetting"]["prose"]["change"]
    assert results["also_test"]["longer"]["kind"] == "task"
    (row,) = [line for line in printed.splitlines() if "prose: loss, nats" in line]
    for measured in (prose["before"], prose["after"], alone["forgetting"]["prose"]["after"]):
        assert with_error(measured["loss"], measured["stderr"]) in row
    assert "longer: accuracy, %" in printed


def test_forgetting_of_a_resumed_run_is_since_its_beginning(tmp_path, interrupt_at):
    model = save_model("gpt2", tmp_path / "model")
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    main([*flags(model, tmp_path / "whole", **saving), *further(tmp_path)])
    part = [*flags(model, tmp_path / "part", **saving), *further(tmp_path)]
    with interrupt_at(3), pytest.raises(SystemExit, match="Interrupted at step 3"):
        main(part)
    main([*part, "--resume_from_checkpoint", "last"])
    whole, resumed = (
        json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "part")
    )
    for key in ("forgetting", "also_test", "validation"):
        assert whole[key] == resumed[key]
    (tmp_path / "prose.txt").write_text("Something else. " * 50)
    with pytest.raises(ValueError, match=r"forgetting_data=.*: not the data of 'prose' that this"):
        main(
            [*part[: -len(further(tmp_path))], *other(tmp_path), "--resume_from_checkpoint", "last"]
        )


def other(folder):
    words = further(folder)
    (folder / "prose.txt").write_text("Something else. " * 50)
    return words


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"},
        {"eval_strategy": "no", "save_strategy": "no"},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "ema_decay": 0.5},
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "metric_for_best_model": "loss",
        },
    ],
    ids=["evaluated last", "not evaluated", "average", "best"],
)
def test_validation_of_the_model_that_is_left(tmp_path, options, monkeypatch):
    """It is that of the saved model evaluated anew; and nothing is answered twice."""
    from nso_hf.tasks.reasoning import trainer as module

    asked = []

    def counting(*args, description, **kwargs):
        asked.append(description)
        return evaluate_answers(*args, description=description, **kwargs)

    monkeypatch.setattr(module, "evaluate_answers", counting)
    model = save_model("gpt2", tmp_path / "model")
    best = "metric_for_best_model" in options
    # At such a rate the first step is the best.
    rate = {"learning_rate": 0.3, "load_best_model_at_end": "true", "max_steps": 3} if best else {}
    rate = rate or {"learning_rate": 1e-2}
    main(flags(model, tmp_path / "out", test="false", **rate, **options))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    evaluations = [entry for entry in results["log"] if "eval_loss" in entry]
    reused = options["eval_strategy"] != "no" and "ema_decay" not in options
    assert asked == ["Validation"] * (len(evaluations) + (not reused))
    assert results["after"] is None and results["before"] is None
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    if best:
        assert results["best_checkpoint"].endswith("-1")
    again = flags(tmp_path / "out", tmp_path / "again", max_steps=1, learning_rate=0)
    main(again)
    expected = json.loads((tmp_path / "again" / "results.json").read_text())["validation"]
    assert results["validation"] == pytest.approx(expected, rel=1e-6)
