"""What a finished run shows: a table in the terminal, and the titles of its plot."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nso_hf.refusal import needs

needs("nso_hf.reasoning.report", "recipes", "rich")

_MEASURES = {
    "accuracy": "accuracy",
    "contains_answer": "contains the answer",
    "correct_format": "correct format",
    "complete": "complete",
}

_CURVATURE: dict[str, Callable[[Mapping[str, float]], str]] = {
    "trace of the Hessian": lambda entry: (
        f"{entry['curvature/trace']:.4g} ± {entry['curvature/trace_stderr']:.2g}"
    ),
    "largest eigenvalue": lambda entry: (
        f"{entry['curvature/lambda_max']:.4g} ± {entry['curvature/lambda_max_residual']:.2g}"
    ),
}

TITLES = {
    "loss": "Loss per token, nats",
    "eval_accuracy": "Validation accuracy",
    "nso/perturbation_norm": "Norm of the perturbation applied",
}


def print_results(
    before: Mapping[str, float] | None,
    after: Mapping[str, float],
    log: Sequence[Mapping[str, float]],
    output: Path,
) -> None:
    """Print the test results with counts and standard errors, the curvature where it was measured,
    and where the files are."""
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
    curvature = [entry for entry in log if "curvature/trace" in entry]
    if curvature:
        untrained = [entry for entry in curvature if entry["step"] == 0]
        ends = ([untrained[:1]] if before else []) + [curvature[-1:]]
        for title, figure in _CURVATURE.items():
            table.add_row(title, *(figure(entries[0]) if entries else "" for entries in ends))
    console = Console()
    console.print(table)
    for name in ("loss", "nso/sigma", "nso/perturbation_norm", "nso/trace_estimate"):
        values = [entry[name] for entry in log if name in entry]
        if values:
            console.print(f"{name}: {values[0]:.4g} in the first log, {values[-1]:.4g} in the last")
    names = ["results.json", "predictions.jsonl", "training.png"]
    console.print("Written: " + ", ".join(str(output / name) for name in names), soft_wrap=True)
