"""Does NSO find flatter minima, and do they generalise? Digits with a fifth of the labels wrong.

    python -m benchmarks.label_noise [--seeds 5] [--epochs 100] [--output docs/label_noise]

A multilayer perceptron learns the handwritten digits of scikit-learn (1,000 images of 8 x 8 for
training) with 20 % of the labels replaced by random other ones. Plain training, one-sided NSO with
two draws and two-sided NSO with one: of equal cost, plain training having twice the epochs (and
once as many, for comparison). All trainings of one seed share its split, its wrong labels and its
initial weights. Measured on the training data, the loss of an example clipped at 2 log 10; the gap
is to held-out images with as many wrong labels, the accuracy that on right ones. Writes
OUTPUT.json and OUTPUT.png.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.companions import with_label_noise
from nso_hf.curvature import hessian_eigenvalues, hessian_trace, pac_bayes_bound

CLASSES, NOISE, TRAIN, BATCH = 10, 0.2, 1000, 50
BOUND_OF_LOSS = 2 * math.log(CLASSES)  # where the cross-entropy of an example is clipped
SIGMAS = (0.02, 0.05, 0.08)
WAYS = {
    "plain, same epochs": {"sigma": 0.0},
    "plain, same cost": {"sigma": 0.0, "epochs": 2},
    **{f"one-sided, {s}": {"sigma": s, "two_sided": False, "num_perturbations": 2} for s in SIGMAS},
    **{f"two-sided, {s}": {"sigma": s} for s in SIGMAS},
}
COLUMNS = {
    "accuracy": "test accuracy, %",
    "train_accuracy": "accuracy on training labels, %",
    "gap": "generalisation gap, nats",
    "trace": "trace",
    "lambda_max": "lambda_max",
    "bound": "bound, nats",
}


class Perceptron(nn.Module):
    """A classifier that returns its loss as models of transformers do."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [64, width, width, CLASSES]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.clip = math.inf
        """What the loss of one example cannot exceed."""

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixels)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses.clamp(max=self.clip).mean(), "logits": logits}


def run(way: str, seed: int, epochs: int) -> dict[str, float]:
    """One training and its measures."""
    options = dict(WAYS[way])
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    wrong = with_label_noise(labels, rate=NOISE, num_labels=CLASSES, seed=generator).labels
    torch.manual_seed(seed)
    model = Perceptron()
    start = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            num_train_epochs=epochs * options.pop("epochs", 1),
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **options,
        )
        data = [
            {"pixels": x, "labels": y} for x, y in zip(pixels[:TRAIN], wrong[:TRAIN], strict=True)
        ]
        NSOTrainer(model=model, args=args, train_dataset=data).train()
    model.eval()
    model.clip = BOUND_OF_LOSS
    train = {"pixels": pixels[:TRAIN], "labels": wrong[:TRAIN]}
    test = {"pixels": pixels[TRAIN:], "labels": wrong[TRAIN:]}
    with torch.no_grad():
        on_train, on_test = model(**train), model(**test)
    batches = [
        {name: values[i : i + 100] for name, values in train.items()} for i in range(0, TRAIN, 100)
    ]
    trace = hessian_trace(model, batches, num_samples=100)
    bound = pac_bayes_bound(
        model,
        batches,
        reference=start,
        sigma=options["sigma"] or SIGMAS[1],
        loss_bound=BOUND_OF_LOSS,
    )
    return {
        "accuracy": 100 * (on_test["logits"].argmax(1) == labels[TRAIN:]).float().mean().item(),
        "train_accuracy": 100
        * (on_train["logits"].argmax(1) == train["labels"]).float().mean().item(),
        "gap": (on_test["loss"] - on_train["loss"]).item(),
        "trace": trace.estimate,
        "trace_stderr": trace.stderr,
        "lambda_max": hessian_eigenvalues(model, batches).values[0],
        "bound": bound.closed_form,
        "bound_at_sigma": bound.bound,
        "distance": bound.distance,
        "trace_max": bound.trace_max,
    }


def mean(values: list[float]) -> tuple[float, float]:
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), stderr


def table(results: dict[str, list[dict[str, float]]], columns: dict[str, str]) -> str:
    """Means and standard errors over seeds, a row for each training."""
    lines = [
        "| training, sigma | " + " | ".join(columns.values()) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for way, runs in results.items():
        cells = []
        for name in columns:
            value, stderr = mean([run[name] for run in runs])
            digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
            cells.append(f"{value:.{digits}f} ± {stderr:.{digits}f}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharey=True)
    colours = {"plain": "C7", "one-sided": "C1", "two-sided": "C0"}
    for axis, (name, title) in zip(axes.flat, COLUMNS.items(), strict=True):
        for row, (way, runs) in enumerate(reversed(results.items())):
            value, stderr = mean([run[name] for run in runs])
            axis.errorbar(value, row, xerr=stderr, fmt="o", color=colours[way.split(",")[0]])
        axis.set_title(title)
        axis.set_yticks(range(len(results)), list(reversed(results)))
        axis.grid(axis="x", alpha=0.3)
        if "accuracy" not in name:
            axis.set_xlim(left=0)
    seeds = len(next(iter(results.values())))
    figure.suptitle(f"Digits, 20 % wrong labels: mean and standard error of {seeds} seeds")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100, help="of NSO")
    parser.add_argument("--output", type=Path, default=Path("docs/label_noise"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: dict[str, list[dict[str, float]]] = {}
    for way in WAYS:
        for seed in range(options.seeds):
            results.setdefault(way, []).append(run(way, seed, options.epochs))
            print(way, seed, {k: round(v, 3) for k, v in results[way][-1].items()}, flush=True)
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.output.with_suffix(".png"))
    print(table(results, COLUMNS))


if __name__ == "__main__":
    main()
