"""Trains a tiny masked autoencoder in each of several processes, and saves what came out."""

import sys
from pathlib import Path

import torch

from nso_hf.running.program import leave_process_group
from tests.tasks.images.reference import data, mae_config, tiny_mae, trained

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = tiny_mae()
    trainer = trained(
        model, data(96), mae_config(folder, sigma=0.02, gradient_accumulation_steps=2)
    )
    found = {
        "weights": model.state_dict(),
        "states": trainer.states,
        "backend": trainer.nso_backend.name,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    torch.save(found, folder / f"rank{trainer.args.process_index}.pt")
    leave_process_group()
