"""What a finished run shows: a table in the terminal, and the titles of its plot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nso_hf.running.figures import curvature_rows, with_error
from nso_hf.running.plots import measured_before, plot_training
from nso_hf.running.results import method_of

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("matplotlib", "rich")  # of the extra "recipes", needed at a run's end

_MEASURES = {
    "accuracy": "accuracy",
    "contains_answer": "contains the answer",
    "correct_format": "correct format",
    "complete": "complete",
}

_UNITS = {"text": ("loss", 1, "nats"), "task": ("accuracy", 100, "%")}
"""Of further data: the measure, what it is multiplied by, and what that is."""

TITLES = {
    "loss": "Loss per token, nats",
    "eval_accuracy": "Validation accuracy",
    "nso/perturbation_norm": "Norm of the perturbation applied",
}


def report(results: Mapping[str, Any], output: Path) -> None:
    """Write results.json and training.png to `output` and print a table: of the test questions and
    of the curvature, before and after training, and of the "plain" training where there was one."""
    from rich.console import Console

    text = json.dumps(results, indent=2) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    plot_training(results, output / "training.png", TITLES, top=1.0)
    console = Console(markup=False, emoji=False)
    console.print(_table(results))
    for name in ("loss", "nso/sigma", "nso/perturbation_norm", "nso/trace_estimate"):
        values = [entry[name] for entry in results["log"] if name in entry]
        if values:
            console.print(f"{name}: {values[0]:.4g} in the first log, {values[-1]:.4g} in the last")
    console.print("Written:")
    predictions = ["predictions.jsonl"] if results["after"] else []
    for name in ("results.json", *predictions, "training.png"):
        console.print(f"  {output / name}", soft_wrap=True)


def _table(results: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    plain, asked = results.get("plain"), "after" if results["after"] else "validation"
    runs = {"before": {}, method_of(results) if plain else "after": results, "plain": plain or {}}
    columns = {name: (run.get(asked), run.get("curvature")) for name, run in runs.items()}
    columns["before"] = (results["before"], measured_before(results["log"]))
    further = _further(results, plain)
    columns = {
        name: column
        for name, column in columns.items()
        if any(column) or (name == "before" and further)
    }
    kind = "Test" if asked == "after" else "Validation"
    table = Table(title=f"{kind}, {results[asked]['questions']:.0f} held-out questions")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for measure, title in _MEASURES.items():
        table.add_row(title, *(_share(answered, measure) for answered, _ in columns.values()))
    for bits in results.get("accuracy_in_bits", {}):
        found = [runs[name].get("accuracy_in_bits", {}).get(bits) for name in columns]
        table.add_row(f"accuracy in {bits} bits", *(_share(f, "accuracy") for f in found))
    if any("robustness" in run for run in runs.values()):
        from nso_hf.robustness.report import loss_of, survival_rows

        table.add_row("loss per token, of weights", *[""] * len(columns))
        measured = [runs[name].get("robustness") for name in columns]
        for title, cells in survival_rows(measured, loss_of):
            table.add_row(title, *cells)
    for title, cells in further:
        table.add_row(title, *cells)
    for title, cells in curvature_rows([measured for _, measured in columns.values()]):
        table.add_row(title, *cells)
    return table


def _further(
    results: Mapping[str, Any], plain: Mapping[str, Any] | None
) -> list[tuple[str, list[str]]]:
    """Rows of the further data: what was measured, and how it changed."""
    runs = [results, plain] if plain else [results]
    rows = []
    for group in ("forgetting", "also_test"):
        for name, first in results[group].items():
            found = [run[group][name] for run in runs]
            measure, scale, unit = _UNITS[first["kind"]]
            values = [first["before"], *(each["after"] for each in found)]
            cells = [
                with_error(scale * v[measure], scale * v["stderr"]) if v else "" for v in values
            ]
            rows.append((f"{name}: {measure}, {unit}", cells))
            changes = [(each["change"], each["change_stderr"]) for each in found]
            cells = [with_error(scale * c, scale * e) if c is not None else "" for c, e in changes]
            rows.append(("  change", ["", *cells]))
    return rows


def _share(answered: Mapping[str, float] | None, measure: str) -> str:
    if answered is None:
        return ""
    count = round(answered[measure] * answered["questions"])
    error = f" ± {answered['accuracy_stderr']:.1%}" if measure == "accuracy" else ""
    return f"{answered[measure]:.1%}{error} ({count})"
