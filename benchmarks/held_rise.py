"""What `sigma_hold` holds: the rise of the loss under noise over a whole training, with a sigma
that was found at its start and stays, and with one that is held.

    python -m benchmarks.held_rise [--steps 800]

A small vision transformer on scikit-learn's digits, a fifth of whose labels are wrong. The rise is
measured apart from training, on all of its examples, by `noise_stability` with the sigma in use.
Writes results.json and held_rise.png under benchmarks/results/held_rise.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.curvature import noise_stability

RESULTS = Path("benchmarks/results/held_rise")
RISE, EVERY, BATCH = 0.05, 40, 64
AT_A_TIME = 600  # when it is measured
WAYS = {"found at the start": False, "held": True}


class RiseOverTraining(TrainerCallback):
    """Measures it on the same examples after every few steps."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches
        self.rows: list[dict[str, float]] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "nso/sigma" not in logs or state.global_step % EVERY:
            return
        sigma = logs["nso/sigma"]
        found = noise_stability(model, self.batches, sigma=sigma, num_samples=16)
        row = {"step": state.global_step, "sigma": sigma, "rise": found.gap / found.loss}
        self.rows.append(row | {"stderr": found.stderr / found.loss, "loss": found.loss})


def digits() -> list[dict[str, Any]]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    numbers = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(numbers), generator=generator)[: len(numbers) // 5]
    shifts = torch.randint(1, 10, (len(wrong),), generator=generator)
    numbers[wrong] = (numbers[wrong] + shifts) % 10
    order = torch.randperm(len(numbers), generator=generator)
    return [{"pixel_values": pixels[i], "labels": numbers[i]} for i in order]


def measured(is_held: bool, steps: int, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The rise over a training."""
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=10, **settings))
    batches = [
        {name: torch.stack([row[name] for row in rows[i : i + AT_A_TIME]]) for name in rows[0]}
        for i in range(0, len(rows), AT_A_TIME)
    ]
    watched = RiseOverTraining(batches)
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            sigma="auto",
            sigma_rise=RISE,
            sigma_hold=is_held,
            start=0.3,  # untrained weights have nothing to lose
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            logging_steps=5,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        NSOTrainer(model=model, args=args, train_dataset=rows, callbacks=[watched]).train()
    return watched.rows


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    for number, (way, rows) in enumerate(results.items()):
        steps, color = [row["step"] for row in rows], f"C{number}"
        rises, errors = ([row[name] for row in rows] for name in ("rise", "stderr"))
        above.errorbar(steps, rises, yerr=errors, fmt="o-", capsize=2, color=color, label=way)
        below.plot(steps, [row["sigma"] for row in rows], "o-", color=color, label=way)
    above.axhspan(0.75 * RISE, 1.25 * RISE, color="0.9", label="target ± 25 %")
    above.set(ylabel="rise of the loss, as a share of it", yscale="log")
    below.set(xlabel="step", ylabel="sigma", yscale="log")
    above.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = digits()
    results = {way: measured(held, options.steps, rows) for way, held in WAYS.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    plot(results, options.output / "held_rise.png")
    summary = {
        way: {
            "mean_rise": fmean(row["rise"] for row in found),
            "within_25_percent": fmean(abs(row["rise"] / RISE - 1) < 0.25 for row in found),
            "rows": found,
        }
        for way, found in results.items()
    }
    text = json.dumps({"target": RISE, "ways": summary}, indent=1)
    (options.output / "results.json").write_text(text + "\n", encoding="utf-8")
    for way, figures in summary.items():
        share = f"{figures['within_25_percent']:.0%} of them within 25 % of the target"
        print(f"{way}: mean rise {figures['mean_rise']:.3f} (target {RISE}), {share}")


if __name__ == "__main__":
    main()
