"""Does it help to pretrain for the task to come? A masked autoencoder, then few labelled images.

    python -m benchmarks.radreg --fashion_mnist_folder FOLDER [--seeds 0 1 2] [--steps 600]

A small ViT learns to reconstruct Fashion-MNIST (--train openmoji: emoji) plainly, with NSO, with
the Rademacher complexity of the representations of Fashion-MNIST's unlabelled training images as a
term of the loss, and with both. Then its test images are told apart with 10 labelled images of each
class: by a linear probe (mean over five draws of these images) and by plain fine-tuning (on the
first draw). All trainings of one seed share their initial weights, batches and labelled images;
plain pretraining with twice the steps is beside them, since the others cost more than it for a
step. The images of Debian's package dataset-fashion-mnist.

Writes one JSON file a run into benchmarks/results/radreg, and makes what is missing: the same
command goes on after an interrupt. Then prints the table and draws radreg.png there.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed

from benchmarks.label_noise import mean
from nso_hf.running.figures import with_error
from nso_hf.tasks.images.arguments import MAEConfig
from nso_hf.tasks.images.classification import linear_probe
from nso_hf.tasks.images.dataset import WithTargetImages
from nso_hf.tasks.images.evaluation import encoded, fine_tuned, labelled_sets
from nso_hf.tasks.images.options import DataOptions, ModelOptions
from nso_hf.tasks.images.trainer import MAETrainer

MODEL = ModelOptions(
    image_size=28,
    patch_size=7,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
)
STRENGTHS, SIGMA = (0.003, 0.01, 0.03), 0.003
WAYS = {
    "no pretraining": {"steps": 0},
    "plain": {},
    "plain, twice the steps": {"steps": 2},
    "NSO": {"sigma": SIGMA},
    **{f"RadReg {s}": {"rademacher_strength": s} for s in STRENGTHS},
    **{f"NSO, RadReg {s}": {"rademacher_strength": s, "sigma": SIGMA} for s in STRENGTHS},
}
PER_CLASS, DRAWS, BATCH = 10, 5, 32
COLUMNS = {
    "probe": "linear probe, %",
    "fine_tuned": "fine-tuned, %",
    "loss": "training loss, last",
    "complexity": "complexity, last",
    "norm": "norm of h",
}


def run(way: str, seed: int, steps: int, data: DataOptions) -> dict[str, Any]:
    """One pretraining and its measures."""
    options = dict(WAYS[way])
    factor = options.pop("steps", 1)
    set_seed(seed)
    model, pixels = MODEL.load()
    train = data.open("train_data", pixels, labelled=False)
    target = data.open("target_data", pixels, labelled=True)
    test = data.open("target_data", pixels, split="test_split", labelled=True)
    with tempfile.TemporaryDirectory() as folder:
        args = MAEConfig(
            folder,
            **({"sigma": 0.0} | options),
            max_steps=max(1, factor * steps),
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            warmup_steps=50,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        images = train
        if args.rademacher_strength:
            images = WithTargetImages(train, target, seed)
        started = time.perf_counter()
        log = []
        if factor:
            trainer = MAETrainer(model=model, args=args, train_dataset=images)
            trainer.train()
            log = trainer.state.log_history
        seconds = time.perf_counter() - started
        plain = dataclasses.replace(args, sigma=0.0, rademacher_strength=0.0)
        accuracies, device = [], torch.device("cpu")
        for draw in range(DRAWS):
            labelled, tested, classes = labelled_sets(target, test, PER_CLASS, 100 * seed + draw)
            if draw == 0:
                on_test = encoded(model.vit, tested, batch_size=256, device=device)
                tuned = fine_tuned(
                    model, labelled, tested, classes, plain, epochs=30, learning_rate=1e-3
                )
            h = encoded(model.vit, labelled, batch_size=256, device=device)
            found = linear_probe(h, labelled.targets, on_test, tested.targets, classes)
            accuracies.append(100 * found.top1)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    complexities = [e["rademacher/complexity"] for e in log if "rademacher/complexity" in e]
    return {
        "probe": sum(accuracies) / DRAWS,
        "probes": accuracies,
        "fine_tuned": 100 * tuned.top1,
        "loss": losses[-1] if losses else None,
        "complexity": complexities[-1] if complexities else None,
        "norm": on_test.norm(dim=1).mean().item(),
        "seconds": seconds,
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means and standard errors over seeds; in brackets, of the differences to plain pretraining of
    the same seeds."""
    lines = ["| pretraining | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---|" + "---|" * len(COLUMNS))
    for way, runs in results.items():
        cells = []
        for name in COLUMNS:
            if runs[0][name] is None:
                cells.append("")
                continue
            cell = with_error(*mean([run[name] for run in runs]))
            if name in ("probe", "fine_tuned") and way != "plain" and "plain" in results:
                pairs = zip(runs, results["plain"], strict=True)
                value, stderr = mean([run[name] - plain[name] for run, plain in pairs])
                cell += f" ({'+' if value > 0 else ''}{with_error(value, stderr)})"
            cells.append(cell)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("probe", "fine_tuned"), strict=True):
        for row, (way, runs) in enumerate(reversed(results.items())):
            values = [run[name] for run in runs]
            value, stderr = mean(values)
            colour = "C0" if way.startswith("NSO") else "C1" if "RadReg" in way else "C7"
            axis.errorbar(value, row, xerr=stderr, fmt="o", color=colour)
            axis.plot(values, [row] * len(values), "k.", markersize=3)
        axis.set_yticks(range(len(results)), list(reversed(results)))
        axis.set_title(f"{COLUMNS[name]} of the test images")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Fashion-MNIST, {PER_CLASS} labelled images of each class; dots are seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fashion_mnist_folder", default=DataOptions.fashion_mnist_folder)
    parser.add_argument("--train", default="fashion_mnist", help="what is pretrained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/radreg"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = DataOptions(
        train_data=options.train,
        target_data="fashion_mnist",
        fashion_mnist_folder=options.fashion_mnist_folder,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    setting = f"{options.train}-{options.steps}"
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for way in options.ways:
            name = way.replace(", ", "-").replace(" ", "_")
            file = options.output / f"{setting}-{name}-{seed}.json"
            if not file.exists():
                found = run(way, seed, options.steps, data)
                about = {"way": way, "seed": seed, "train": options.train, "steps": options.steps}
                about |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
                about |= {"transformers": transformers.__version__}
                file.write_text(json.dumps(about | found, indent=1) + "\n")
                shown = {key: round(found[key], 3) for key in COLUMNS if found[key] is not None}
                print(f"seed {seed}, {way}: {shown}", flush=True)
            results.setdefault(way, []).append(json.loads(file.read_text()))
    print(table(results))
    plot(results, options.output / f"{setting}.png")


if __name__ == "__main__":
    main()
