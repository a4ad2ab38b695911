"""Trains a tiny CLIP in each of several processes, and encodes with weights between."""

import sys
from pathlib import Path

import torch

from nso_hf.running.program import leave_process_group
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.clip.trainer import CLIPTrainer
from nso_hf.tasks.clip.wise_ft import FirstWeights
from tests.distributed.back_ends import BACK_ENDS, allow_fsdp_on_cpu, gathered
from tests.tasks.clip.reference import clip_config, image_rows, pair_data, tiny_clip

ALPHAS = (0.0, 0.3, 1.0, 0.7)


def whole(trainer):
    module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    found = {}
    for name, parameter in module.named_parameters():
        with gathered(parameter) as weight:
            found[name] = weight.clone()
    return found


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    allow_fsdp_on_cpu()
    back_end = dict(BACK_ENDS[name])
    if "fsdp_config" in back_end:
        layers = {"transformer_layer_cls_to_wrap": None}  # those that the model names
        back_end["fsdp_config"] = {**back_end["fsdp_config"], **layers}
    clip = tiny_clip()
    first = FirstWeights(clip.model)
    args = clip_config(folder, sigma=0.02, per_device_train_batch_size=4, **back_end)
    trainer = CLIPTrainer(clip, args, train_dataset=pair_data(24))
    trainer.train()
    rows = Table("rows", image_rows(11), Fields("image", "caption", "label"), None)
    found = {"end": whole(trainer), "backend": trainer.nso_backend.name, "between": {}}
    for alpha in ALPHAS:
        with first.interpolated(trainer, alpha):
            features = trainer.encode(rows, needs="label").images
            found["between"][alpha] = (whole(trainer), features)
    found["afterwards"], found["features"] = whole(trainer), trainer.encode(rows, "label").images
    torch.save(found, folder / f"rank{trainer.args.process_index}.pt")
    leave_process_group()
