"""Does NSO help contrastive pretraining? Emoji of two styles, tested on a third.

    python -m benchmarks.clip_emoji --data FOLDER [--seeds 0 1 2] [--epochs 12] [--output PATH]

A small CLIP learns the emoji of Google and Twitter with their names and tags (FOLDER/google.tar,
FOLDER/twitter.tar, 3.8k pairs) and is tested on the same concepts drawn in the style of OpenMoji
(FOLDER/openmoji.tar): retrieval among its 1.9k pairs, and zero-shot classification into the nine
groups of Unicode. Plain AdamW, NSO, and AdamW with twice the epochs, which costs what NSO does. All
trainings of one seed share their initial weights and the order of the pairs. Trace and largest
eigenvalue are of the training loss, without augmentation. Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.label_noise import mean, table
from nso_hf.curvature import hessian_eigenvalues, hessian_trace
from nso_hf.tasks.clip.arguments import CLIPConfig
from nso_hf.tasks.clip.classification import zero_shot
from nso_hf.tasks.clip.encoding import encode
from nso_hf.tasks.clip.models import load_clip
from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.clip.stream import PairStream
from nso_hf.tasks.clip.trainer import CLIPTrainer

MODEL = "vit-tiny-64"
BATCH = 128
WAYS = {
    "AdamW, same epochs": {"sigma": 0.0},
    "AdamW, same cost": {"sigma": 0.0, "epochs": 2},
    **{f"NSO, {sigma}": {"sigma": sigma} for sigma in (0.008, 0.010, 0.015)},  # the paper's
}
GROUPS = {
    "activities": "sport or game",
    "animals & nature": "animal or plant",
    "flags": "flag of a country",
    "food & drink": "food or drink",
    "objects": "tool or clothes",
    "people & body": "person or hand",
    "smileys & emotion": "face or heart",
    "symbols": "sign or button or arrow",
    "travel & places": "vehicle or building",
}
COLUMNS = {
    "text_to_image_recall@1": "text → image R@1, %",
    "text_to_image_recall@10": "R@10, %",
    "image_to_text_recall@1": "image → text R@1, %",
    "image_to_text_recall@10": "R@10, %",
    "zero_shot": "zero-shot, %",
    "loss": "test loss",
    "trace": "trace",
    "lambda_max": "lambda_max",
}


def run(way: str, seed: int, epochs: int, data: Path) -> dict[str, float]:
    """One training and its measures."""
    options = dict(WAYS[way])
    torch.manual_seed(seed)
    clip = load_clip(MODEL)
    shards = f"{data}/google.tar::{data}/twitter.tar"
    train = open_pairs(shards, Fields())
    test = open_pairs(f"{data}/openmoji.tar", Fields(label="group"))
    stream = PairStream(train, clip.train_transform, clip.tokenizer, batch_size=BATCH, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        args = CLIPConfig(
            folder,
            num_train_epochs=epochs * options.pop("epochs", 1),
            per_device_train_batch_size=BATCH,
            warmup_steps=50,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **options,
        )
        trainer = CLIPTrainer(clip, args, train_dataset=stream, eval_dataset=test)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        images = encode(
            trainer.module, clip, test, trainer.accelerator, batch_size=256, needs="label"
        )
        known = [number for number, label in enumerate(images.labels) if label in GROUPS]
        images = images.rows(known)
        accuracy, _ = zero_shot(
            trainer.module, clip, images, list(GROUPS), ["{}"], list(GROUPS.values()), device="cpu"
        )
        still = PairStream(train, clip.eval_transform, clip.tokenizer, batch_size=BATCH)
        loader = iter(torch.utils.data.DataLoader(still, batch_size=BATCH))
        batches = [next(loader) for _ in range(2)]
        trace = hessian_trace(trainer, batches, num_samples=20)
        top = hessian_eigenvalues(trainer, batches, tolerance=1e-2)
    percent = {name: 100 * value for name, value in metrics.items() if "recall" in name}
    return {
        **percent,
        "zero_shot": 100 * accuracy.top1,
        "zero_shot_per_class": 100 * accuracy.mean_per_class,
        "majority": 100 * accuracy.majority,
        "loss": metrics["loss"],
        "trace": trace.estimate,
        "trace_stderr": trace.stderr,
        "lambda_max": top.values[0],
        "train_loss": trainer.state.log_history[-2].get("train_loss", float("nan")),
        "seconds": seconds,
        "steps": trainer.state.global_step,
    }


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "text_to_image_recall@10": "Text → image recall@10, %",
        "zero_shot": "Zero-shot accuracy, %",
        "trace": "Trace of the Hessian",
        "lambda_max": "Largest eigenvalue",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.8), layout="constrained")
    names = list(results)
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        values = [[run[name] for run in results[way]] for way in names]
        means = [mean(v) for v in values]
        colours = ["0.6" if way.startswith("AdamW") else "C0" for way in names]
        axis.bar(range(len(names)), [m for m, _ in means], color=colours)
        for x, runs in enumerate(values):
            axis.plot([x] * len(runs), runs, "k.", markersize=5)
        axis.set_xticks(range(len(names)), [n.replace(", ", "\n") for n in names], fontsize=7)
        axis.set_title(title)
    figure.suptitle("Trained on two styles of emoji, tested on a third; dots are seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the three shards")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output", type=Path, default=Path("docs/clip_emoji"))
    options = parser.parse_args()
    path = options.output.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {way: [] for way in WAYS}
    for seed in options.seeds:
        for way in options.ways:
            figures = run(way, seed, options.epochs, options.data)
            results[way].append({"seed": seed, **figures})
            shown = {name: round(figures[name], 2) for name in COLUMNS}
            print(f"seed {seed}, {way}: {shown}, {figures['seconds']:.0f} s", flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    results = {way: runs for way, runs in results.items() if runs}
    print(table(results, COLUMNS))
    plot(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
