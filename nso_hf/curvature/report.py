"""What the command line shows of its measurements: a table, a JSON file and plots."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from nso_hf.curvature.eigenvalues import Eigenvalues
from nso_hf.curvature.slices import LossSlice
from nso_hf.curvature.spectrum import Spectrum
from nso_hf.curvature.stability import NoiseStability
from nso_hf.curvature.trace import Estimate, Trace, mean_of
from nso_hf.running.figures import with_error

_LETTERS = 45
"""Of a line of a title above a panel of 5.5 inches."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of one checkpoint."""

    trace: Trace
    largest: Eigenvalues
    smallest: Eigenvalues
    stability: NoiseStability
    spectrum: Spectrum | None = None
    line: LossSlice | None = None
    plane: LossSlice | None = None

    def rows(self) -> dict[str, str]:
        """Measure -> figure with its error."""
        stability, trace = self.stability, self.trace
        half = stability.sigma**2 / 2
        return {
            "loss f(W)": f"{stability.loss:.6g}",
            "trace of the Hessian": with_error(trace.estimate, trace.stderr),
            **{
                f"eigenvalue {number} (± residual)": with_error(value, residual)
                for number, (value, residual) in enumerate(
                    zip(self.largest.values, self.largest.residuals, strict=True), start=1
                )
            },
            "smallest eigenvalue (± residual)": with_error(
                self.smallest.values[0], self.smallest.residuals[0]
            ),
            f"E f(W+U) - f(W), sigma {stability.sigma:g}": with_error(
                stability.gap, stability.stderr
            ),
            "  sigma²/2 · trace": with_error(half * trace.estimate, half * trace.stderr),
            "weights": f"{trace.num_parameters:,}",
            "examples (batches)": f"{trace.num_examples} ({trace.num_batches})",
            "Hessian products": str(trace.hvp),
            "seconds": f"{sum(m.seconds for m in self.measurements().values()):.1f}",
        }

    def measurements(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    def notes(self) -> list[str]:
        return sorted({note for m in self.measurements().values() for note in m.notes})

    def as_json(self) -> dict[str, Any]:
        per_parameter = {name: value._asdict() for name, value in self.trace.per_parameter.items()}
        measured = {
            name: {
                field.name: _plain(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.name not in ("samples", "names")
            }
            for name, value in self.measurements().items()
        }
        return {**measured, "trace_per_parameter": per_parameter}

    def trace_per_block(self) -> dict[str, Estimate]:
        """The traces of layers: what the first number in a parameter's name counts, or else its
        module."""
        columns: dict[str, list[int]] = {}
        for column, name in enumerate(self.trace.names):
            numbered = re.match(r"(.*?\.\d+)\.", name)
            block = numbered.group(1) if numbered else name.rpartition(".")[0] or name
            columns.setdefault(block, []).append(column)
        samples = self.trace.samples
        return {name: mean_of(samples[:, c].sum(dim=1)) for name, c in columns.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def print_reports(reports: Mapping[str, Report], files: list[Path]) -> None:
    """One column for each checkpoint."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Curvature of the mean loss")
    table.add_column("measure")
    for name in reports:
        table.add_column(name, justify="right", overflow="fold")
    columns = [report.rows() for report in reports.values()]
    for measure in columns[0]:
        table.add_row(measure, *(column.get(measure, "") for column in columns))
    console = Console(markup=False, emoji=False)  # names are shown as they are
    console.print(table)
    for note in sorted({note for report in reports.values() for note in report.notes()}):
        console.print(f"Note: {note}")
    console.print("Written: " + ", ".join(map(str, files)), soft_wrap=True)


def plot_reports(reports: Mapping[str, Report], folder: Path) -> list[Path]:
    """Traces of the layers, the spectrum and the slices, as far as they were measured."""
    from matplotlib.figure import Figure

    written = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")  # of long names too
        written.append(folder / name)

    def one_panel(width: float, height: float) -> tuple[Any, Any]:
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()

    blocks = [report.trace_per_block() for report in reports.values()]
    names = list(dict.fromkeys(name for block in blocks for name in block))
    height = 0.8 / len(blocks)
    figure, axis = one_panel(8, 1.5 + 0.3 * len(names))
    for number, (name, block) in enumerate(zip(reports, blocks, strict=True)):
        places = [names.index(b) + height * (number - (len(blocks) - 1) / 2) for b in block]
        axis.barh(
            places,
            [estimate.estimate for estimate in block.values()],
            height,
            xerr=[estimate.stderr for estimate in block.values()],
            label=name,
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("trace of the Hessian's block, with standard error")
    figure.legend(loc="outside upper center")
    save(figure, "traces.png")

    spectra = {name: r.spectrum for name, r in reports.items() if r.spectrum is not None}
    if spectra:
        low = min(s.nodes.min().item() for s in spectra.values())
        high = max(s.nodes.max().item() for s in spectra.values())
        width = 0.01 * (high - low) or 1e-12
        points = torch.linspace(low - 4 * width, high + 4 * width, 1000, dtype=torch.float64)
        figure, axis = one_panel(8, 4)
        for name, spectrum in spectra.items():
            axis.semilogy(points, spectrum.density(points, width), label=name)
        axis.set(ylim=(1e-10, 10 / width), xlabel="eigenvalue", ylabel="density")
        figure.legend(loc="outside upper center")
        save(figure, "spectrum.png")

    lines = {name: r.line for name, r in reports.items() if r.line is not None}
    if lines:
        figure, axis = one_panel(6, 4)
        for name, line in lines.items():
            axis.plot(line.coordinates, line.losses, ".-", label=name)
        axis.set_xlabel("distance along a random direction, in norms of each filter")
        axis.set_ylabel("loss")
        figure.legend(loc="outside upper center")
        save(figure, "line.png")

    planes = {name: r.plane for name, r in reports.items() if r.plane is not None}
    if planes:
        size = (5.5 * len(planes), 4.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(planes), squeeze=False)
        low = min(plane.losses.min().item() for plane in planes.values())
        high = max(plane.losses.max().item() for plane in planes.values())
        for axis, (name, plane) in zip(axes[0], planes.items(), strict=True):
            levels = torch.linspace(low, high, 21).tolist() if high > low else 2
            filled = axis.contourf(plane.coordinates, plane.coordinates, plane.losses.T, levels)
            axis.plot(0, 0, "w+")
            axis.set_title("\n".join(wrap(name, _LETTERS)), fontsize="medium")
        figure.colorbar(filled, ax=axes, label="loss")
        save(figure, "plane.png")
    return written
