"""HERO's own claim: what post-training quantisation leaves of models trained by several methods.

    python -m benchmarks.quantisation --data FOLDER [--seeds 3]

A small convolutional network on Fashion-MNIST, 10,000 training images. Every method's option is
chosen on 5,000 validation images at full precision, with seed 0, from as many values; the test is
read once for each seed. FOLDER holds the files of Debian's package dataset-fashion-mnist. A run
that is there is not done again: one JSON each under benchmarks/results/quantisation.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.robustness import round_to_nearest
from nso_hf.tasks.images.fashion_mnist import CLASSES, FOLDER, fashion_mnist

RESULTS = Path("benchmarks/results/quantisation")
TRAIN, VALIDATION, EPOCHS, BATCH = 10_000, 5_000, 8, 64
BITS = [8, 6, 4, 3, 2]
RATE = 2e-3
"""Of the other methods: the best for plain training."""
GRIDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)],
    "plain, twice the steps": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)],
    "SAM": [{"method": "sam", "method_kwargs": {"rho": rho}} for rho in (0.05, 0.1, 0.2)],
    "NSO": [{"sigma": sigma} for sigma in (0.01, 0.02, 0.04)],
    "HERO": [
        {"method": "hero", "method_kwargs": {"h": h, "strength": strength}}
        for h, strength in ((0.1, 1.0), (0.5, 1.0), (0.5, 100.0))
    ],
}
Data = tuple[Tensor, Tensor]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def read(folder: str) -> tuple[Data, Data, Data]:
    """Training, validation and test images with their labels."""

    def tensors(split: str) -> Data:
        images, labels = fashion_mnist(split, folder)
        pixels = torch.from_numpy(images.copy())[:, None].float() / 255
        return (pixels - 0.286) / 0.353, torch.tensor([CLASSES.index(label) for label in labels])

    pixels, labels = tensors("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = [order[:TRAIN], order[TRAIN : TRAIN + VALIDATION]]
    train, validation = ((pixels[part], labels[part]) for part in parts)
    return train, validation, tensors("test")


def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for pixels, labels in zip(data[0].split(1000), data[1].split(1000), strict=True):
            right += int((model(pixels, labels)["logits"].argmax(1) == labels).sum())
    return 100 * right / len(data[1])


def trained(way: str, options: dict[str, Any], seed: int, data: Data) -> tuple[nn.Module, float]:
    """The model, and the seconds that its training took."""
    torch.manual_seed(seed)
    model = Network()
    rows = [{"pixels": x, "labels": y} for x, y in zip(*data, strict=True)]
    plain = {"sigma": 0.0} if way.startswith("plain") else {}
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            num_train_epochs=EPOCHS * (2 if "twice" in way else 1),
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="cosine",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **{"learning_rate": RATE} | plain | options,
        )
        started = time.monotonic()
        NSOTrainer(model=model, args=args, train_dataset=rows).train()
    return model, time.monotonic() - started


def once(name: str, compute: Any) -> dict[str, Any]:
    """What an earlier run of this name found, or what `compute` finds now."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        found = compute()
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.rename(file)
        print(name, json.dumps(found), flush=True)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def chosen(way: str, train: Data, validation: Data) -> dict[str, Any]:
    """The options with the best validation accuracy at full precision."""

    def tried(options: dict[str, Any]) -> dict[str, Any]:
        model, seconds = trained(way, options, 0, train)
        return {"options": options, "validation": accuracy(model, validation), "seconds": seconds}

    runs = [
        once(f"choice-{way}-{number}", lambda options=options: tried(options))
        for number, options in enumerate(GRIDS[way])
    ]
    best: dict[str, Any] = max(runs, key=lambda run: run["validation"])["options"]
    return best


def measured(
    way: str, options: dict[str, Any], seed: int, train: Data, test: Data
) -> dict[str, Any]:
    model, seconds = trained(way, options, seed, train)
    found: dict[str, Any] = {
        "options": options,
        "seconds": seconds,
        "float32": accuracy(model, test),
    }
    for bits in BITS:
        with round_to_nearest(model, bits=bits):
            found[f"{bits} bits"] = accuracy(model, test)
    return found | {"torch": torch.__version__, "transformers": transformers.__version__}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    columns = ["float32", *(f"{bits} bits" for bits in BITS), "seconds"]
    lines = ["| training | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for way, runs in results.items():
        cells = [spread([run[column] for run in runs]) for column in columns]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {stderr:.2f}"


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    columns = ["float32", *(f"{bits} bits" for bits in BITS)]
    for number, (way, runs) in enumerate(results.items()):
        values = [[run[column] for run in runs] for column in columns]
        places = [place + 0.06 * (number - 2) for place in range(len(columns))]
        errors = [statistics.stdev(each) / len(each) ** 0.5 for each in values]
        axis.errorbar(places, list(map(statistics.mean, values)), yerr=errors, fmt="o-", label=way)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel("test accuracy, %")
    axis.set_title("Fashion-MNIST after rounding to nearest: mean and standard error of seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=FOLDER, help="where dataset-fashion-mnist is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--plot", type=Path, default=Path("docs/quantisation.png"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    train, validation, test = read(options.data)
    results = {}
    for way in options.ways:
        best = chosen(way, train, validation)
        results[way] = [
            once(f"{way}-{seed}", lambda seed=seed: measured(way, best, seed, train, test))  # noqa: B023
            for seed in range(options.seeds)
        ]
    print(table(results))
    plot(results, options.plot)


if __name__ == "__main__":
    main()
