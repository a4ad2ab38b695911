"""Suggest a sigma for checkpoints: the one at which noise raises the loss by a share of it.

    nso sigma CHECKPOINT --data train.jsonl --output runs/sigma

Forward passes alone. Prints a table with a column for each checkpoint and what to write into
NSOConfig, and writes results.json and sigma.png: the rise of the loss over sigma, and the parabola
sigma^2/2 Tr H, which it follows while sigma is small.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nso_hf.curvature.data_options import (
    add_data_options,
    as_json,
    check_data_options,
    data_of,
)
from nso_hf.curvature.loading import check_checkpoint, load_checkpoint
from nso_hf.curvature.parameters import add_params_option, params_of
from nso_hf.curvature.sigma import SigmaFound, find_sigma
from nso_hf.curvature.trace import Estimate, check_count, hessian_trace
from nso_hf.refusal import needs
from nso_hf.running.figures import with_error
from nso_hf.running.program import CommandParser, folder, run
from nso_hf.step.sigma import RISE, SCALES, check_rise

_BATCHES = 4  # of a data set, where nobody says how many
_POINTS = (1 / 8, 1 / 4, 1 / 2, 2)  # of the picture, in multiples of the sigma that is found


@dataclass(frozen=True)
class Suggestion:
    found: SigmaFound
    trace: Estimate | None
    """Of H, or of D H D."""

    def rows(self) -> dict[str, str]:
        """Measure -> figure with its error."""
        found = self.found
        rows = {
            "loss f(W)": f"{found.loss:.6g}",
            f"sigma for a rise of {found.rise:.3g} f(W)": with_error(found.sigma, found.stderr),
        }
        if self.trace is not None:
            share = found.sigma**2 / 2 / found.loss
            expected = with_error(share * self.trace.estimate, share * self.trace.stderr)
            rows["  there sigma²/2 · trace, of f(W)"] = expected
        return rows | {
            "weights": f"{found.num_parameters:,}",
            "examples (batches)": f"{found.num_examples} ({found.num_batches})",
            "draws of the noise": str(found.num_samples),
            "seconds": f"{found.seconds:.1f}",
        }

    def as_config(self) -> str:
        """What to write."""
        scale = f', sigma_scale="{self.found.sigma_scale}"'
        is_default = self.found.sigma_scale == SCALES[0]
        return f"NSOConfig(..., sigma={self.found.sigma:.2g}{'' if is_default else scale})"

    def as_json(self) -> dict[str, Any]:
        trace = None if self.trace is None else self.trace._asdict()
        return {**dataclasses.asdict(self.found), "trace": trace}


def parser() -> argparse.ArgumentParser:
    made = CommandParser("sigma", __doc__)
    add_data_options(made, split="train", num_batches=_BATCHES)
    add = made.add_argument
    add("--rise", type=float, default=RISE, help="share of the loss (default: %(default)s)")
    add(
        "--sigma_scale",
        choices=SCALES,
        default=SCALES[0],
        help="relative: in units of each row's root mean square (default: %(default)s)",
    )
    add_params_option(made, default="perturbed")
    many = "draws of the noise (default: as many as tell the rise to 5 %%)"
    add("--num_samples", type=int, help=many)
    add(
        "--trace_samples",
        type=int,
        default=10,
        help="products with the Hessian for the parabola; 0: none (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of examples and random vectors (default: %(default)s)")
    add("--output", type=folder, default=Path("sigma"), help="folder (default: %(default)s)")
    return made


def check(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options that would fail later."""
    check_data_options(options)
    for checkpoint in options.checkpoints:
        check_checkpoint(checkpoint, options.gguf_file)
    check_rise("rise", options.rise)
    if options.num_samples is not None:
        check_count("num_samples", options.num_samples)
    check_count("trace_samples", options.trace_samples, low=0)


def suggestion(checkpoint: str, options: argparse.Namespace) -> Suggestion:
    """For one checkpoint."""
    model = load_checkpoint(checkpoint, options.gguf_file)
    sample = data_of(options, checkpoint, num_batches=_BATCHES).sample(model)
    print(f"{checkpoint}: {sample}", file=sys.stderr, flush=True)
    batches = sample.batches
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    shared = {
        "params": params_of(options),
        "seed": options.seed,
        "sigma_scale": options.sigma_scale,
    }
    samples = {"num_samples": options.num_samples, "points": _POINTS}
    found = find_sigma(model, batches, rise=options.rise, **samples, **shared)
    trace = None
    if options.trace_samples:
        measured = hessian_trace(model, batches, num_samples=options.trace_samples, **shared)
        trace = Estimate(measured.estimate, measured.stderr)
    return Suggestion(found, trace)


def print_suggestions(suggestions: Mapping[str, Suggestion], files: Sequence[Path]) -> None:
    """One column for each checkpoint."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Sigma by its effect")
    table.add_column("measure")
    columns = []
    for name, suggestion in suggestions.items():
        table.add_column(name, justify="right", overflow="fold")
        columns.append(suggestion.rows())
    for measure in columns[0]:
        table.add_row(measure, *(column[measure] for column in columns))
    console = Console(markup=False, emoji=False)
    console.print(table)
    for name, suggestion in suggestions.items():
        console.print(f"{name}: {suggestion.as_config()}", soft_wrap=True)
    for note in sorted({note for each in suggestions.values() for note in each.found.notes}):
        console.print(f"Note: {note}")
    console.print("Written: " + ", ".join(map(str, files)), soft_wrap=True)


def plot(suggestions: Mapping[str, Suggestion], path: Path) -> None:
    """The rise of the loss over sigma, both as logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, suggestion) in enumerate(suggestions.items()):
        found, color = suggestion.found, f"C{number}"
        shown = [point for point in found.curve if 0 < point.rise < float("inf")]
        sigmas = [point.sigma for point in shown]
        axis.errorbar(
            sigmas,
            [point.rise for point in shown],
            yerr=[point.stderr for point in shown],
            fmt="o-",
            capsize=3,
            color=color,
            label=f"{name}: sigma {found.sigma:.2g} ± {found.stderr:.1g}",
        )
        if suggestion.trace is not None and suggestion.trace.estimate > 0:
            per_square = suggestion.trace.estimate / 2 / found.loss
            axis.plot(sigmas, [per_square * sigma**2 for sigma in sigmas], "--", color=color)
        axis.plot(found.sigma, found.rise, "*", markersize=14, color=color)
    axis.axhline(next(iter(suggestions.values())).found.rise, color="0.6", linewidth=0.8)
    axis.set(xscale="log", yscale="log", ylabel="rise of the loss, as a share of it")
    unit = "root mean squares of rows" if found.sigma_scale == "relative" else "units of weights"
    axis.set_xlabel(f"sigma, in {unit}; dashed: sigma²/2 · trace")
    figure.legend(loc="outside upper center")
    figure.savefig(path, dpi=120, bbox_inches="tight")  # of long names too


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    needs("nso sigma", "recipes", "matplotlib", "rich")
    check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    file, picture = options.output / "results.json", options.output / "sigma.png"
    suggestions = {}
    for checkpoint in options.checkpoints:
        suggestions[checkpoint] = suggestion(checkpoint, options)
        results = {
            "options": as_json(options),
            "checkpoints": {name: each.as_json() for name, each in suggestions.items()},
        }
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(suggestions, picture)
    print_suggestions(suggestions, [file, picture])


if __name__ == "__main__":
    run(main)
