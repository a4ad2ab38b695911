"""Training is bit for bit the same with the curvature measured during it."""

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from nso_hf import NSOTrainer
from nso_hf.curvature import CurvatureCallback, hessian_eigenvalues, hessian_trace, training_batches
from tests.reference import config, largest_difference, tiny_llama, token_data

FIGURES = {"trace", "trace_stderr", "lambda_max", "lambda_max_residual", "seconds"}


class Tracker(TrainerCallback):
    """What an experiment tracker is told."""

    def __init__(self):
        self.told = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, dict(logs)))


def trained(folder, trainer_class=NSOTrainer, watch=None, args=None, **options):
    settings = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, **options}
    tracker = Tracker()
    trainer = trainer_class(
        model=tiny_llama(dropout=0.2),
        args=args or config(folder, **settings),
        train_dataset=token_data(16),
        callbacks=[tracker],
    )
    if watch is not None:
        trainer.add_callback(CurvatureCallback(trainer, num_samples=3, num_batches=2, **watch))
    trainer.train()
    return trainer, tracker


def losses(trainer):
    return [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]


def measured(trainer):
    return {e["step"]: e for e in trainer.state.log_history if "curvature/trace" in e}


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_weights_and_losses_are_bit_equal(tmp_path, hvp, settings):
    plain, _ = trained(tmp_path, **settings)
    watched, _ = trained(tmp_path, watch={"every_steps": 2, "hvp": hvp}, **settings)
    assert sorted(measured(watched)) == [0, 2, 4, 6]
    assert largest_difference(plain.model, watched.model) == 0
    assert losses(plain) == losses(watched) and len(losses(plain)) == 6


def test_without_nso_too(tmp_path):
    args = [
        TrainingArguments(
            str(tmp_path), max_steps=4, report_to="none", use_cpu=True, logging_steps=2
        )
        for _ in range(2)
    ]
    plain, _ = trained(tmp_path, Trainer, args=args[0])
    watched, _ = trained(tmp_path, Trainer, {"every_steps": 1, "at_start": False}, args=args[1])
    assert sorted(measured(watched)) == [1, 2, 3, 4]
    assert largest_difference(plain.model, watched.model) == 0
    assert losses(plain) == losses(watched)


def test_epochs_and_ends(tmp_path):
    epochs = {"max_steps": -1, "num_train_epochs": 3}
    watched, _ = trained(tmp_path, watch={"every_epochs": 2, "at_start": False}, **epochs)
    assert sorted(measured(watched)) == [8, 12]  # four steps an epoch
    watched, _ = trained(tmp_path, watch={"at_end": False}, **epochs)
    assert sorted(measured(watched)) == [0]


def test_what_is_logged_is_what_is_measured(tmp_path):
    watched, tracker = trained(tmp_path, watch={"seed": 7, "tolerance": 1e-4})
    (step, told), *_ = [entry for entry in tracker.told[::-1] if "curvature/trace" in entry[1]]
    assert step == 6
    assert {name.removeprefix("curvature/") for name in told if "/" in name} == FIGURES
    batches = training_batches(watched, 2)
    trace = hessian_trace(watched, batches, num_samples=3, seed=7)
    top = hessian_eigenvalues(watched, batches, seed=7)
    assert told["curvature/trace"] == trace.estimate
    assert told["curvature/trace_stderr"] == trace.stderr > 0
    assert told["curvature/lambda_max"] == top.values[0]
    assert told["curvature/seconds"] > 0 and math.isfinite(told["curvature/lambda_max_residual"])


def test_the_trainers_own_loss_is_measured(tmp_path):
    """Label smoothing, which is the Trainer's, and a `compute_loss` that a user wrote."""

    class Doubled(NSOTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    def trace(trainer_class, **options):
        trainer = trainer_class(
            model=tiny_llama(),
            args=config(tmp_path, **options),
            train_dataset=token_data(8),
        )
        return hessian_trace(trainer, num_samples=2)

    plain = trace(NSOTrainer)
    assert plain.num_examples == 8
    # Twice the loss in float32, the same roundings.
    assert torch.allclose(trace(Doubled).samples, 2 * plain.samples, rtol=1e-6)
    smoothed = trace(NSOTrainer, label_smoothing_factor=0.5)
    assert not torch.allclose(smoothed.samples, plain.samples, rtol=0.1)


def test_batches_are_the_collators(tmp_path):
    from transformers import DataCollatorForLanguageModeling

    from tests.tiny_models import byte_tokenizer

    trainer = NSOTrainer(
        model=tiny_llama(),
        args=config(tmp_path, per_device_train_batch_size=3),
        train_dataset=[{"input_ids": row["input_ids"], "note": "x"} for row in token_data(8)],
        data_collator=DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False),
    )
    state = torch.get_rng_state()
    batches = training_batches(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    assert {"input_ids", "labels"} <= set(batches[0]) and "note" not in batches[0]
    assert len(training_batches(trainer, 2)) == 2


def test_a_model_that_is_no_module_of_transformers(tmp_path):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x, y):
            return {"loss": (x @ self.w - y).square().mean()}

    data = [{"x": torch.tensor([1.0, i]), "y": torch.tensor(2.0 * i)} for i in range(8)]
    args = config(tmp_path, max_steps=2, per_device_train_batch_size=8)
    trainer = NSOTrainer(model=Line(), args=args, train_dataset=data)
    trainer.add_callback(CurvatureCallback(trainer, num_samples=50))
    trainer.train()
    x = torch.stack([row["x"] for row in data])
    exact = torch.linalg.eigvalsh(2 * x.T @ x / 8)
    for entry in measured(trainer).values():
        assert entry["curvature/lambda_max"] == pytest.approx(exact[-1].item(), rel=1e-4)
        error = abs(entry["curvature/trace"] - exact.sum().item())
        assert error <= 3 * entry["curvature/trace_stderr"]


def test_a_collator_with_a_generator_of_its_own_is_not_advanced(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

    from tests.tiny_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})

    def run(watched):
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8}
        model = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
        trainer = NSOTrainer(
            model=model,
            args=config(tmp_path, max_steps=3, learning_rate=1e-2),
            train_dataset=[{"input_ids": row["input_ids"]} for row in token_data(12)],
            data_collator=DataCollatorForLanguageModeling(tokenizer, seed=5),
        )
        if watched:
            trainer.add_callback(CurvatureCallback(trainer, every_steps=1, num_samples=2))
        trainer.train()
        return trainer.model

    assert largest_difference(run(watched=False), run(watched=True)) == 0


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    trainer = NSOTrainer(
        model=tiny_llama().bfloat16(), args=config(tmp_path), train_dataset=token_data(8)
    )
    trainer.add_callback(CurvatureCallback(trainer, at_start=False))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 rounds the loss"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="tolerance=2: must be in"):
        CurvatureCallback(trainer, tolerance=2)


def test_the_best_model_is_measured_once(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    args = config(tmp_path, max_steps=4, load_best_model_at_end=True, **options)
    trainer = NSOTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=token_data(16),
        eval_dataset=token_data(4, seed=2),
    )
    trainer.add_callback(CurvatureCallback(trainer, every_steps=2, num_samples=2))
    trainer.train()
    steps = [e["step"] for e in trainer.state.log_history if "curvature/trace" in e]
    is_last = trainer.state.best_model_checkpoint.endswith("-4")
    assert steps == ([0, 2, 4] if is_last else [0, 2, 4, 4])
