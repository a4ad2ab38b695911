"""Runs training cases in each of several processes and saves what came out: `torchrun ... worker.py
CASES OUTPUT`."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim import SGD
from transformers import TrainerCallback

from nso_hf import NSOTrainer
from tests.reference import config, tiny_llama, token_data


class CountReductions(TrainerCallback):
    """Counts the buckets of gradients that DDP reduces; the model fits into one."""

    def __init__(self):
        self.count = 0

    def on_train_begin(self, *args, model=None, **kwargs):
        def counting(state, bucket):
            self.count += 1
            return allreduce_hook(state, bucket)

        self.trainer.model_wrapped.register_comm_hook(None, counting)


def run(case: dict, directory: str) -> dict:
    resume = case.pop("resume", False)
    dropout = case.pop("dropout", 0.0)
    use_sgd = case.pop("sgd", True)
    model = tiny_llama(dropout=dropout)
    args = config(
        directory, lr_scheduler_type="constant", learning_rate=1.0 if use_sgd else 1e-2, **case
    )
    optimizers = (SGD(model.parameters(), lr=1.0), None) if use_sgd else (None, None)
    counter = CountReductions()
    trainer = NSOTrainer(
        model=model,
        args=args,
        train_dataset=token_data(48),
        optimizers=optimizers,
        callbacks=[counter],
    )
    counter.trainer = trainer
    trainer.train(resume_from_checkpoint=resume or None)
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [e["nso/perturbation_norm"] for e in trainer.state.log_history if "loss" in e],
        "traces": [e.get("nso/trace_estimate") for e in trainer.state.log_history if "loss" in e],
        "reductions": counter.count,
        "world_size": torch.distributed.get_world_size(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "backend": type(trainer.nso_backend).__name__,
        "distributed_type": trainer.accelerator.distributed_type.value,
    }


if __name__ == "__main__":
    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {}
    for name, case in cases.items():
        case.setdefault("output_dir", tempfile.mkdtemp())
        results[name] = run(case, case.pop("output_dir"))
    torch.save(results, output / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
