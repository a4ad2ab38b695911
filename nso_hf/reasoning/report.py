"""What a finished run shows: a table in the terminal and a plot of the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MEASURES = {
    "accuracy": "accuracy",
    "contains_answer": "contains the answer",
    "correct_format": "correct format",
    "complete": "complete",
}


def print_results(
    before: Mapping[str, float] | None,
    after: Mapping[str, float],
    log: Sequence[Mapping[str, float]],
    output: Path,
) -> None:
    """Print the test results, with counts and standard errors, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Test, {after['questions']:.0f} held-out questions")
    table.add_column("measure")
    columns = ([("before", before)] if before else []) + [("after", after)]
    for name, _ in columns:
        table.add_column(name, justify="right")
    for measure, title in _MEASURES.items():
        cells = []
        for _, results in columns:
            count = round(results[measure] * results["questions"])
            error = f" ± {results['accuracy_stderr']:.1%}" if measure == "accuracy" else ""
            cells.append(f"{results[measure]:.1%}{error} ({count})")
        table.add_row(title, *cells)
    console = Console()
    console.print(table)
    for name in ("loss", "nso/sigma", "nso/perturbation_norm", "nso/trace_estimate"):
        values = [entry[name] for entry in log if name in entry]
        if values:
            console.print(f"{name}: {values[0]:.4g} in the first log, {values[-1]:.4g} in the last")
    names = ["results.json", "predictions.jsonl", "training.png"]
    console.print("Written: " + ", ".join(str(output / name) for name in names), soft_wrap=True)


def plot_training(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the losses, the validation accuracy and the norm of the perturbation over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def series(name: str) -> tuple[list[float], list[float]]:
        entries = [entry for entry in log if name in entry]
        return [entry["step"] for entry in entries], [entry[name] for entry in entries]

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    axes[0].plot(*series("loss"), label="training, mean over W ± U")
    axes[0].plot(*series("eval_loss"), "o-", label="validation, at W")
    axes[0].set(title="Loss per token", xlabel="optimizer step", ylabel="nats")
    axes[0].legend()
    axes[1].plot(*series("eval_accuracy"), "o-", color="tab:green")
    axes[1].set(title="Validation accuracy", xlabel="optimizer step", ylim=(0, 1))
    axes[2].plot(*series("nso/perturbation_norm"), color="tab:red")
    axes[2].set(title="Perturbation applied, ‖U‖", xlabel="optimizer step")
    axes[2].set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)
