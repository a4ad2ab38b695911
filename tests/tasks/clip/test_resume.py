"""A run that stops in the middle of an epoch of streamed shards and goes on: bit-equal."""

import pytest
import torch

from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.clip.stream import PairStream
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.clip.trainer import CLIPTrainer
from tests.older import IS_VERSION_4
from tests.tasks.clip.reference import TINY, clip_config, image_rows, tiny_clip
from tests.tasks.clip.test_pairs import BROKEN, shards, write_shard

OPTIONS = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "sigma": 0.02,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "logging_steps": 1,
}


def trainer_of(folder, urls, augment, **options):
    vision = {**TINY["vision_cfg"], "patch_size": 4, "patch_dropout": 0.5}
    clip = tiny_clip(vision_cfg=vision)
    pairs = open_pairs(urls, Fields())
    stream = PairStream(pairs, augment(clip), clip.tokenizer, batch_size=4, seed=3)
    rows = Table("rows", image_rows(6), Fields("image", "caption"), None)
    args = clip_config(folder, **(OPTIONS | options))
    return CLIPTrainer(clip, args, train_dataset=stream, eval_dataset=rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"dataloader_num_workers": 1, "gradient_accumulation_steps": 2, "eval_strategy": "steps"},
    ],
    ids=["no workers", "two persistent workers", "accumulation and evaluation"],
)
def test_resuming_in_the_middle_of_an_epoch_is_bit_equal(tmp_path, options):
    """10 batches an epoch; the checkpoints are in the middle of the second, between two passes of
    augmentation and patch dropout, with pairs that are skipped on the way."""
    urls = shards(tmp_path, [12, 10, 14])
    write_shard(tmp_path / "s-003.tar", BROKEN)
    urls = urls.replace("002}", "003}")
    accumulation = options.get("gradient_accumulation_steps", 1)
    steps, saved = 25 // accumulation, 15 // accumulation
    if "eval_strategy" in options:
        options = {**options, "eval_steps": 3}

    def augment(clip):
        return clip.train_transform

    def run(**more):
        trainer = trainer_of(
            tmp_path / "run", urls, augment, max_steps=steps, save_steps=saved, **options
        )
        trainer.train(**more)
        return trainer

    whole = run()
    assert whole.state.epoch > 2
    resumed = run(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{saved}"))
    losses = [
        [entry["loss"] for entry in t.state.log_history if "loss" in entry]
        for t in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert IS_VERSION_4 or len(set(losses[0])) == steps  # with four decimals, some are alike
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.train_dataset.pairs.skipped.counts["unreadable images"] >= 1


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    seen = []

    class Watching(CLIPTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["image"].sum().item())
            return super().compute_loss(model, inputs, *args, **kwargs)

    clip = tiny_clip()
    rows = Table("rows", image_rows(12), Fields("image", "caption"), None)
    stream = PairStream(rows, clip.eval_transform, clip.tokenizer, batch_size=4, seed=3)
    args = clip_config(
        tmp_path, sigma=0.0, num_train_epochs=2, max_steps=-1, per_device_train_batch_size=4
    )
    trainer = Watching(clip, args, train_dataset=stream)
    assert trainer.num_examples(trainer.get_train_dataloader()) == 12
    trainer.train()
    assert trainer.state.global_step == 6
    assert sum(seen[:3]) == pytest.approx(sum(seen[3:]), rel=1e-5)
    assert sorted(seen[:3]) != sorted(seen[3:])


def test_sigma_is_found_without_moving_the_stream(tmp_path):
    """Training goes on as with the number: augmentation, order and dropped patches too."""
    urls = shards(tmp_path, [12, 12])
    runs = {}
    for name, sigma in {"found": "auto", "given": None}.items():
        options = {"start": 0.8, "sigma_rise": 0.02, "sigma": "auto"}
        if sigma is None:
            options = {"start": 0.8, "sigma": runs["found"][0]}
        trainer = trainer_of(
            tmp_path / name,
            urls,
            lambda clip: clip.train_transform,
            max_steps=50,
            save_strategy="no",
            **options,
        )
        batches = trainer.nso_first_batches(2)
        again = trainer.nso_first_batches(2)
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, again, strict=True))
        assert len(trainer.nso_first_batches(99)) == 24 // 4
        trainer.train()
        sigmas = [e["nso/sigma"] for e in trainer.state.log_history if "nso/sigma" in e]
        runs[name] = (sigmas[-1], [p.detach().clone() for p in trainer.model.parameters()])
    assert 0 < runs["found"][0] == runs["given"][0]
    for p, q in zip(runs["found"][1], runs["given"][1], strict=True):
        assert torch.equal(p, q)
