"""Steps of the CLIP recipe against those of open_clip's own training loop.

    python -m benchmarks.clip_throughput --data 'SHARDS' [--model vit-tiny-64]
        [--batch 128] [--steps 30] [--rounds 3]

The same model, shards, batch, optimizer and augmentation; open_clip's loop is its own
`train_one_epoch` on its own webdataset loader. Every way runs in a process of its own, in turns,
within one run; what counts is the time from one optimizer step to the next, data included (the
median, without the first three). Ratios are to open_clip.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from nso_hf.tasks.clip.arguments import CLIPConfig
from nso_hf.tasks.clip.models import ClipModel, load_clip
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.clip.stream import PairStream
from nso_hf.tasks.clip.trainer import CLIPTrainer

WAYS: dict[str, dict[str, Any]] = {
    "open_clip": {},
    "nso_hf, plain": {"sigma": 0.0},
    "nso_hf, NSO": {"sigma": 0.01},
    "open_clip, 2 micro-batches": {"accumulation": 2},
    "nso_hf, plain, 2 micro-batches": {"sigma": 0.0, "accumulation": 2},
}


def with_open_clip(clip: ClipModel, options: argparse.Namespace, accumulation: int) -> None:
    """Its training loop, as `open_clip_train.main` sets it up."""
    import open_clip_train.data
    from open_clip import ClipLoss
    from open_clip_train.data import get_data
    from open_clip_train.train import train_one_epoch

    # open_clip 3.3 does not know the marks that webdataset 1.0 puts at the end of a shard.
    expander = open_clip_train.data.tar_file_expander
    open_clip_train.data.tar_file_expander = partial(expander, eof_value=None)
    batch = options.batch // accumulation
    args = SimpleNamespace(
        train_data=options.data,
        train_num_samples=options.steps * options.batch,
        train_data_upsampling_factors=None,
        val_data=None,
        imagenet_val=None,
        imagenet_v2=None,
        dataset_type="webdataset",
        dataset_resampled=False,
        batch_size=batch,
        workers=0,
        seed=0,
        world_size=1,
        rank=0,
        local_rank=0,
        distributed=False,
        horovod=False,
        device="cpu",
        precision="fp32",
        accum_freq=accumulation,
        distill=False,
        skip_scheduler=True,
        grad_clip_norm=1.0,
        log_every_n_steps=10**6,
        wandb=False,
    )
    data = get_data(args, (clip.train_transform, clip.eval_transform), tokenizer=clip.tokenizer)
    named = list(clip.model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    train_one_epoch(clip.model, data, ClipLoss(), 0, optimizer, None, None, None, args)


def with_nso_hf(
    clip: ClipModel, options: argparse.Namespace, accumulation: int, sigma: float
) -> None:
    batch = options.batch // accumulation
    pairs = open_pairs(options.data, Fields())
    stream = PairStream(pairs, clip.train_transform, clip.tokenizer, batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        args = CLIPConfig(
            folder,
            sigma=sigma,
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        CLIPTrainer(clip, args, train_dataset=stream).train()


def run(way: str, options: argparse.Namespace) -> None:
    """Print the seconds between optimizer steps of one way."""
    times: list[float] = []
    register_optimizer_step_post_hook(lambda *args: times.append(time.perf_counter()))
    torch.manual_seed(0)
    clip = load_clip(options.model)
    settings = WAYS[way]
    accumulation = settings.get("accumulation", 1)
    if "sigma" in settings:
        with_nso_hf(clip, options, accumulation, settings["sigma"])
    else:
        with_open_clip(clip, options, accumulation)
    steps = [b - a for a, b in pairwise(times[3:])]
    print(json.dumps(statistics.median(steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="shards, as open_clip names them")
    parser.add_argument("--model", default="vit-tiny-64")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=list(WAYS), help="one alone, in this process")
    options = parser.parse_args()
    if options.way:
        run(options.way, options)
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.clip_throughput", "--way", way]
            for name in ("data", "model", "batch", "steps"):
                command += [f"--{name}", str(getattr(options, name))]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds[way].append(float(output.strip().splitlines()[-1]))
    print(f"{Path(options.model).stem}, batch {options.batch}, {options.rounds} rounds")
    print("| way | seconds a step | pairs a second | ratio of each round |\n|---|---|---|---|")
    for way, values in seconds.items():
        base = seconds["open_clip, 2 micro-batches" if "2 micro" in way else "open_clip"]
        ratios = ", ".join(f"{v / b:.2f}" for v, b in zip(values, base, strict=True))
        median = statistics.median(values)
        print(f"| {way} | {median:.3f} | {options.batch / median:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
