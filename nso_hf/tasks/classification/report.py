"""What a finished run of a classifier shows: a table, how training went, and whether the classifier
is as sure as it should be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nso_hf.running.figures import curvature_rows, with_error
from nso_hf.running.plots import plot_training
from nso_hf.running.results import method_of

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("matplotlib", "rich")  # of the extra "recipes", needed at a run's end

TITLES = {
    "loss": "Loss",
    "eval_accuracy": "Validation accuracy",
    "nso/perturbation_norm": "Norm of the perturbation applied",
}
_LOGGED = ("loss", "eval_loss", "eval_accuracy", "nso/perturbation_norm")


def report(results: Mapping[str, Any], output: Path) -> None:
    """Write results.json, training.png and calibration.png to `output`; print a table, what was
    logged, and where the files are. The "plain" training, where there was one, is beside it."""
    from rich.console import Console

    text = json.dumps(results, indent=2) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    plot_training(results, output / "training.png", TITLES, top=1.0)
    files = ["results.json", "training.png"]
    if _judged_by(results):
        plot_calibration(results, output / "calibration.png")
        files.append("calibration.png")
    console = Console(markup=False, emoji=False)
    console.print(_table(results))
    for name in _LOGGED:
        values = [entry[name] for entry in results["log"] if name in entry]
        if values:
            console.print(f"{name}: {values[0]:.4g} in the first log, {values[-1]:.4g} in the last")
    console.print("Written:")
    for name in files:
        console.print(f"  {output / name}", soft_wrap=True)


def _columns(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    plain = results.get("plain")
    return {method_of(results): results} | ({"plain": plain} if plain else {})


def _judged_by(results: Mapping[str, Any]) -> list[str]:
    """The splits that there are figures on."""
    return [split for split in ("validation", "test") if split in results]


def _table(results: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    columns = _columns(results)
    runs = columns.values()
    table = Table(title=f"{results['training_examples']} training examples")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for split in _judged_by(results):
        found = [run[split] for run in runs]
        table.add_section()
        table.add_row(f"{split}, {found[0]['examples']} examples", *[""] * len(found))
        table.add_row("  accuracy, %", *(_percent(f, "accuracy") for f in found))
        if split == "validation":
            peaks = (f"{100 * f['peak_accuracy']:.1f} (step {f['peak_step']})" for f in found)
            table.add_row("  best during training, %", *peaks)
        table.add_row("  loss, nats", *(with_error(f["loss"], f["loss_stderr"]) for f in found))
        table.add_row("  calibration error (ECE), %", *(f"{100 * f['ece']:.1f}" for f in found))
    found = [run["memorised"] for run in runs if "memorised" in run]
    if found:
        table.add_section()
        counted = f"training, {found[0]['examples']} wrong labels"
        table.add_row(counted, *[""] * len(found))
        table.add_row("  memorised, %", *(_percent(f, "memorised") for f in found))
        table.add_row("  told right in spite of them, %", *(_percent(f, "accuracy") for f in found))
    if any("robustness" in run for run in runs):
        from nso_hf.robustness.report import accuracy_of, survival_rows

        table.add_section()
        table.add_row("test accuracy, %, of weights", *[""] * len(columns))
        for title, cells in survival_rows([run.get("robustness") for run in runs], accuracy_of):
            table.add_row(title, *cells)
    table.add_section()
    for title, cells in curvature_rows([run["curvature"] for run in runs]):
        table.add_row(title, *cells)
    table.add_row("seconds of training", *(f"{run['train_seconds']:.1f}" for run in runs))
    return table


def _percent(found: Mapping[str, float], name: str) -> str:
    return with_error(100 * found[name], 100 * found[f"{name}_stderr"])


def plot_calibration(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against confidence, on the test examples or else those of validation, and how
    many examples are of which confidence."""
    from matplotlib.figure import Figure

    split = _judged_by(results)[-1]
    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, run in _columns(results).items():
        bins, ece = run[split]["calibration"], run[split]["ece"]
        confidence = [b["confidence"] for b in bins]
        label = f"{name}: ECE {100 * ece:.1f} %"
        above.plot(confidence, [b["accuracy"] for b in bins], "o-", markersize=4, label=label)
        below.plot(confidence, [b["examples"] for b in bins], "o-", markersize=4)
    above.set(ylim=(0, 1.02), ylabel="accuracy", title=f"Calibration, {split} examples")
    above.legend()
    below.set(xlim=(0, 1.02), xlabel="probability of the predicted class", ylabel="examples")
    below.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
