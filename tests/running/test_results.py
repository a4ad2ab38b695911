"""What a run does and finds."""

import json

import pytest
import torch
from transformers import TrainerCallback

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.companions.options import CompanionOptions
from nso_hf.curvature import hessian_trace
from nso_hf.curvature.options import CurvatureOptions
from nso_hf.running.recorded_options import RecordedOptions
from nso_hf.running.results import Results, trained
from tests.reference import tiny_llama, token_data


class Weights(TrainerCallback):
    """After each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append([p.detach().clone() for p in model.parameters()])


@pytest.fixture
def run(tmp_path):
    """A trainer of three steps whose weights end as their average, and what its run records."""
    options = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 4, "seed": 1}
    args = NSOConfig(str(tmp_path), report_to=[], save_strategy="no", learning_rate=0.1, **options)
    weights, companions = Weights(), CompanionOptions(swa_start=0.0)
    trainer = NSOTrainer(
        tiny_llama(),
        args,
        train_dataset=token_data(12),
        callbacks=[weights, *companions.callbacks()],
    )
    recorded = RecordedOptions(args, companions, checkpoint=None)
    results = Results(args, recorded, companion_options=companions)
    return trainer, recorded, results, weights


def test_results_are_written_with_each_addition(run, tmp_path):
    trainer, recorded, results, _ = run
    results.add(first=1)
    assert json.loads((tmp_path / "results.json").read_text())["first"] == 1
    results.add(**trained(trainer, recorded, None))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == results
    assert written["steps"] == 3 and written["backend"] == "one process"
    assert written["companion_options"]["swa_start"] == 0.0
    assert written["nso_options"]["sigma"] == 0.01
    assert written["sigma"] is None  # logging_steps is 500
    assert written["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    held = sum(4 * p.numel() for p in trainer.model.parameters())
    assert written["peak_memory_bytes"] > held
    # Both rounded to hundredths.
    assert 0 < written["train_seconds"] <= written["total_seconds"] + 0.01


def test_the_sigmas_in_use(run):
    trainer, recorded, _, _ = run
    trainer.args.logging_steps, trainer.args.sigma_schedule = 1, "linear"
    found = trained(trainer, recorded, None)["sigma"]
    assert found == {"first": pytest.approx(0.01 / 3), "last": pytest.approx(0.01)}


def test_curvature_after_training_is_of_the_average(run):
    trainer, recorded, _, weights = run
    examples = trainer.train_dataset
    options = CurvatureOptions(curvature=True, curvature_examples=6, curvature_samples=3)
    found = trained(trainer, recorded, None, options.callback(trainer, examples))
    mean = [sum(each) / 3 for each in zip(*weights.seen, strict=True)]
    for p, average in zip(trainer.model.parameters(), mean, strict=True):
        # Three float32 additions and a division, in another order.
        torch.testing.assert_close(p.detach(), average, rtol=0, atol=4e-7)
    collate = trainer.data_collator
    batches = [
        dict(collate([examples[i] for i in range(4)])),
        dict(collate([examples[i] for i in (4, 5)])),
    ]
    expected = hessian_trace(trainer, batches, num_samples=3)
    assert found["curvature"]["trace"] == pytest.approx(expected.estimate, rel=1e-5)
    assert sum("curvature/trace" in entry for entry in found["log"]) == 1
