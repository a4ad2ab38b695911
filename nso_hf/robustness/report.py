"""What the command line shows of its measurements: tables, a JSON file and a picture."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nso_hf.robustness.measuring import Row
from nso_hf.running.figures import with_error

Rows = Mapping[str, Sequence[Row]]
"""Checkpoint -> its rows, the same for all."""

_AS_IT_IS = "as it is"
_STYLES = ("-", "--", ":", "-.")
_PANELS = {"bits": "bits of a weight", "noise": "noise", "relative noise": "noise / RMS of a row"}


def print_rows(measured: Rows, samples: Sequence[str], files: Sequence[Path]) -> None:
    """A table of losses and one of accuracies, with a column for each checkpoint, and what they
    were measured on."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names are shown as they are
    tables = {"Loss ± standard error": loss_of}
    if all(row.accuracy is not None for rows in measured.values() for row in rows):
        tables["Accuracy, % ± standard error"] = accuracy_of
    for title, written in tables.items():
        table = Table(title=title)
        table.add_column("weights")
        for name in measured:
            table.add_column(name, justify="right", overflow="fold")
        for same in zip(*measured.values(), strict=True):
            table.add_row(described(same[0]), *map(written, same))
        console.print(table)
    for name, rows in measured.items():
        if rows[0].ece is not None:
            console.print(f"Calibration error (ECE) of {name}, as it is: {rows[0].ece:.4f}")
    console.print("Measured on " + "; or on ".join(samples) + ".", soft_wrap=True)
    console.print("Written: " + ", ".join(map(str, files)), soft_wrap=True)


def described(row: Row) -> str:
    """What was done to the weights."""
    if row.strength is None:
        return _AS_IT_IS
    if row.kind.startswith("bits"):
        return f"{row.strength} {row.kind}"
    if row.kind == "sparsity":
        return f"{100 * row.strength:g} % pruned"
    return f"{row.kind} {row.strength:g}"


def loss_of(row: Row) -> str:
    return with_error(row.loss, row.stderr)


def accuracy_of(row: Row) -> str:
    accuracy, error = row.accuracy or 0.0, row.accuracy_stderr or 0.0
    return f"{100 * accuracy:.1f} ± {100 * error:.1f}"


def survival_rows(
    measured: Sequence[Sequence[Mapping[str, Any]] | None], written: Callable[[Row], str]
) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table that has a column for each of these measurements, as results have them,
    or none."""
    found = [[Row(**row) for row in rows or ()] for rows in measured]
    for place, row in enumerate(next(filter(None, found), [])):
        yield f"  {described(row)}", [written(rows[place]) if rows else "" for rows in found]


def plot_rows(measured: Rows, path: Path) -> Path:
    """All checkpoints on one scale, a panel for each kind of change."""
    from matplotlib.figure import Figure

    every = [row for rows in measured.values() for row in rows]
    by_accuracy = all(row.accuracy is not None for row in every)
    kinds = list(dict.fromkeys(row.kind for row in every if row.strength is not None))
    panels = list(dict.fromkeys(kind.partition(" in groups")[0] for kind in kinds)) or ["none"]
    figure = Figure(figsize=(1 + 3.6 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [kind for kind in kinds if kind.partition(" in groups")[0] == panel]
        for number, (name, rows) in enumerate(measured.items()):
            for style, kind in zip(_STYLES, shown or ["none"], strict=False):
                points = [row for row in rows if row.kind == kind or row.strength is None]
                label = f"{name}{kind.removeprefix(panel)}" if panel == panels[0] else None
                axis.errorbar(
                    [_AS_IT_IS if r.strength is None else f"{r.strength:g}" for r in points],
                    [100 * (r.accuracy or 0.0) if by_accuracy else r.loss for r in points],
                    [100 * (r.accuracy_stderr or 0.0) if by_accuracy else r.stderr for r in points],
                    color=f"C{number}",
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    label=label,
                )
        axis.set_xlabel(_PANELS.get(panel, panel))
    losses = [row.loss for row in every if math.isfinite(row.loss)]
    if not by_accuracy and losses and 0 < 20 * min(losses) < max(losses):
        axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("accuracy, %" if by_accuracy else "loss")
    longest = max(len(label) for label in axes[0][0].get_legend_handles_labels()[1])
    fitting = int(figure.get_figwidth() / (0.6 + 0.08 * longest))  # inches
    ncols = max(1, min(4, len(measured) * 2, fitting))
    figure.legend(loc="outside upper center", ncols=ncols, fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")  # of a name wider than all panels too
    return path
