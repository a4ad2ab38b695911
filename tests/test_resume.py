"""A run that stops and goes on ends where the uninterrupted run does, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from nso_hf import NSOTrainer
from nso_hf.running.checkpoints import last_complete_checkpoint
from tests.older import IS_VERSION_4
from tests.reference import config, tiny_llama, token_data

OPTIONS = {
    "sigma": 0.05,
    "num_perturbations": 2,
    "sigma_schedule": "cosine",
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
}


def trainer_of(directory, **options):
    args = config(directory, **(OPTIONS | options))
    return NSOTrainer(model=tiny_llama(dropout=0.1), args=args, train_dataset=token_data(40))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_sharpness": True, "logging_steps": 2},
        {"sign": "alternate", "num_perturbations": 1},
    ],
)
def test_three_steps_and_three_more_are_six(tmp_path, options):
    whole = trainer_of(tmp_path, max_steps=6, save_steps=3, **options)
    whole.train()
    resumed = trainer_of(tmp_path, max_steps=6, save_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    a, b = (t.optimizer.state_dict()["state"] for t in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


def vision_trainer(directory, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(
        ViTConfig(num_channels=1, num_hidden_layers=2, num_attention_heads=2, num_labels=2, **sizes)
    )
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": i % 2}
        for i in range(16)
    ]
    args = config(directory, save_strategy="steps", save_steps=2, max_steps=4, **options)
    return NSOTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


def test_a_checkpoint_with_the_names_of_an_earlier_version_is_loaded_whole(tmp_path):
    """Transformers 5 writes them for some models, ViT among these, and its Trainer, which does not
    translate them, goes on from random weights with a warning."""
    whole = vision_trainer(tmp_path, learning_rate=1e-2)
    whole.train()
    resumed = vision_trainer(tmp_path, learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = list(zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    best = vision_trainer(tmp_path / "best", learning_rate=3.0, **options)
    best.train()
    folder = best.state.best_model_checkpoint
    saved = ViTForImageClassification.from_pretrained(folder).parameters()
    assert all(torch.equal(a, b) for a, b in zip(saved, best.model.parameters(), strict=True))


def test_weights_of_another_model_are_not_gone_on_from(tmp_path):
    vision_trainer(tmp_path).train()
    other = NSOTrainer(
        model=nn.Linear(2, 2), args=config(tmp_path), train_dataset=[{"input": torch.zeros(2)}]
    )
    with pytest.raises(ValueError, match="other weights than the model, and no weight"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_training_that_is_done_takes_no_further_step(tmp_path):
    """The Trainer takes one, where the last step is not the last of an epoch."""
    done = trainer_of(tmp_path, max_steps=3, save_steps=3)
    done.train()
    assert done.state.epoch != int(done.state.epoch)
    resumed = trainer_of(tmp_path, max_steps=3, save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 3
    pairs = zip(done.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    longer = trainer_of(tmp_path, max_steps=5, save_steps=3)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert longer.state.global_step == 5


def test_measuring_does_not_change_training(tmp_path):
    weights = []
    for options in ({}, {"log_sharpness": True}, {"log_sharpness": True, "logging_steps": 3}):
        trainer = trainer_of(tmp_path, max_steps=4, save_strategy="no", **options)
        trainer.train()
        assert ("nso/trace_estimate" in trainer.state.log_history[0]) is (
            "log_sharpness" in options
        )
        weights.append(list(trainer.model.parameters()))
    for measured in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], measured, strict=True))


RUN = """
import sys, time, torch
from pathlib import Path
from nso_hf.running.checkpoints import last_complete_checkpoint
from nso_hf import NSOTrainer
from tests.test_resume import trainer_of
directory = sys.argv[1]
trainer = trainer_of(directory, max_steps=30, save_steps=2, save_total_limit=3)
last = last_complete_checkpoint(Path(directory))
trainer.train(resume_from_checkpoint=last and str(last))
trainer.save_model(directory + "/final")
print("finished", last, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(IS_VERSION_4, reason="its Trainer resumes with other data in later epochs")
def test_a_killed_run_resumes_to_the_weights_of_the_uninterrupted_one(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(directory):
        command = [sys.executable, "-c", RUN, str(directory)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert "finished None" in whole.communicate(timeout=120)[0]
    # Kill once some checkpoint is there, at a moment that differs from run to run.
    killed = start(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    time.sleep((time.time_ns() % 1000) / 1000 * 0.5)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "final").exists()
    output = start(tmp_path / "killed").communicate(timeout=120)[0]
    assert "finished" in output and "checkpoint-" in output
    a = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    b = load_file(tmp_path / "killed" / "final" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "none") is None
    for step, state in [(9, "{}"), (10, "{}"), (11, '{"epo'), (12, None)]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    # Of two processes, one was killed before it wrote its random state in 10.
    for name in ("9/rng_state_0", "9/rng_state_1", "10/rng_state_0"):
        (tmp_path / f"checkpoint-{name}.pth").touch()
    assert last_complete_checkpoint(tmp_path, processes=2) == tmp_path / "checkpoint-9"
