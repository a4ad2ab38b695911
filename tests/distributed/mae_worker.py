"""Trains a tiny masked autoencoder in each of several processes, and saves what came out."""

import sys
from pathlib import Path

import torch

from nso_hf.running.program import leave_process_group
from tests.distributed.back_ends import BACK_ENDS, allow_fsdp_on_cpu, gathered
from tests.tasks.images.reference import data, mae_config, tiny_mae, trained

if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    allow_fsdp_on_cpu()
    back_end = BACK_ENDS[name]
    if name.startswith("fsdp2"):
        settings = back_end["fsdp_config"] | {"transformer_layer_cls_to_wrap": ["ViTMAELayer"]}
        back_end = back_end | {"fsdp_config": settings}
    model = tiny_mae()
    args = mae_config(folder, sigma=0.02, gradient_accumulation_steps=2, **back_end)
    trainer = trained(model, data(96), args)
    weights = {}
    for weight, parameter in trainer.accelerator.unwrap_model(model).named_parameters():
        with gathered(parameter) as whole:
            weights[weight] = whole.clone()
    found = {
        "weights": weights,
        "states": trainer.states,
        "backend": trainer.nso_backend.name,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    torch.save(found, folder / f"rank{trainer.args.process_index}.pt")
    leave_process_group()
