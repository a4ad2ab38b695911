"""Measure and compare the curvature of checkpoints.

    python -m nso_hf.curvature runs/plain runs/nso --data train.jsonl --output runs/curvature

Prints a table with a column for each checkpoint, and writes results.json and plots: the traces of
the layers, the spectrum, and the loss along random directions. results.json is written after each
checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nso_hf.curvature.data_options import (
    add_data_options,
    as_json,
    check_data_options,
    data_of,
)
from nso_hf.curvature.eigenvalues import hessian_eigenvalues
from nso_hf.curvature.hessian import HVPS
from nso_hf.curvature.loading import check_checkpoint, load_checkpoint
from nso_hf.curvature.parameters import add_params_option, params_of
from nso_hf.curvature.report import Report, plot_reports, print_reports
from nso_hf.curvature.slices import loss_slice
from nso_hf.curvature.spectrum import hessian_spectrum
from nso_hf.curvature.stability import check_sigma, noise_stability
from nso_hf.curvature.trace import check_count, hessian_trace
from nso_hf.refusal import check_positive, needs, refusal
from nso_hf.running.program import CommandParser, folder, run

_BATCHES = 4  # of a data set, where nobody says how many


def parser() -> argparse.ArgumentParser:
    made = CommandParser("curvature", __doc__)
    add_data_options(made, split="train", num_batches=_BATCHES)
    add = made.add_argument
    add_params_option(made)
    add("--num_samples", type=int, default=50, help="probes of the trace (default: %(default)s)")
    add("--num_eigenvalues", type=int, default=3, help="largest ones (default: %(default)s)")
    add("--sigma", type=float, default=0.01, help="noise for the stability (default: %(default)s)")
    add(
        "--spectrum_steps",
        type=int,
        default=20,
        help="Lanczos steps of the spectrum, so many vectors of the weights' size in memory; 0: no "
        "spectrum (default: %(default)s)",
    )
    add(
        "--slice_points",
        type=int,
        default=21,
        help="points of the line, odd; 0: no line (default: %(default)s)",
    )
    add(
        "--plane_points",
        type=int,
        default=0,
        help="points on each axis of the plane, odd; 0: no plane (default: %(default)s)",
    )
    add("--slice_extent", type=float, default=0.5, help="in filter norms (default: %(default)s)")
    add("--hvp", choices=HVPS, default="auto", help="how products are had (default: %(default)s)")
    add("--seed", type=int, default=0, help="of examples and random vectors (default: %(default)s)")
    add("--output", type=folder, default=Path("curvature"), help="folder (default: %(default)s)")
    return made


def check(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options that would fail later."""
    check_data_options(options)
    for checkpoint in options.checkpoints:
        check_checkpoint(checkpoint, options.gguf_file)
    for name in ("num_samples", "num_eigenvalues"):
        check_count(name, getattr(options, name))
    for name in ("slice_points", "plane_points", "spectrum_steps"):
        check_count(name, getattr(options, name), low=0)
    for name in ("slice_points", "plane_points"):
        value = getattr(options, name)
        if value and (value < 3 or value % 2 == 0):
            rule = "must be odd and at least 3, for W to be among the points"
            raise refusal(name, value, rule, "Use 21, or 0 for none")
    check_sigma(options.sigma)
    check_positive("slice_extent", options.slice_extent, "Typical: 0.5")


def measure(checkpoint: str, options: argparse.Namespace) -> Report:
    """All measurements of one checkpoint."""
    model = load_checkpoint(checkpoint, options.gguf_file)
    sample = data_of(options, checkpoint, num_batches=_BATCHES).sample(model)
    print(f"{checkpoint}: {sample}", file=sys.stderr, flush=True)
    batches = sample.batches
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    shared = {"params": params_of(options), "seed": options.seed}
    products = {**shared, "hvp": options.hvp}
    count, steps = options.num_eigenvalues, options.spectrum_steps
    line, plane = (
        loss_slice(
            model,
            batches,
            num_axes=axes,
            num_points=points,
            extent=options.slice_extent,
            **shared,
        )
        if points
        else None
        for axes, points in [(1, options.slice_points), (2, options.plane_points)]
    )
    return Report(
        trace=hessian_trace(model, batches, num_samples=options.num_samples, **products),
        largest=hessian_eigenvalues(model, batches, k=count, **products),
        smallest=hessian_eigenvalues(model, batches, which="smallest", **products),
        stability=noise_stability(
            model, batches, sigma=options.sigma, num_samples=options.num_samples, **shared
        ),
        spectrum=hessian_spectrum(model, batches, num_steps=steps, **products) if steps else None,
        line=line,
        plane=plane,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    needs("nso curvature", "recipes", "matplotlib", "rich")
    check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    reports = {}
    for checkpoint in options.checkpoints:
        reports[checkpoint] = measure(checkpoint, options)
        results = {
            "options": as_json(options),
            "checkpoints": {name: report.as_json() for name, report in reports.items()},
        }
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_reports(reports, [file, *plot_reports(reports, options.output)])


if __name__ == "__main__":
    run(main)
