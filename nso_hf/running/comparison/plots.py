"""Pictures of a comparison: each only where runs have its figures."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nso_hf.running.comparison.description import Comparison
from nso_hf.running.comparison.intervals import mean_and_error
from nso_hf.running.comparison.plan import Cell, Record, figure, numbers

Points = list[tuple[float, float]]
_MARKERS = "osD^v<>pPX*h"


def _style(number: int) -> dict[str, Any]:
    """Of the method with this number: ten strong colours, then their ten light ones."""
    from matplotlib import colormaps

    color = colormaps["tab20"](2 * (number % 10) + number // 10 % 2)
    return {"color": color, "marker": _MARKERS[number % len(_MARKERS)]}


def plot(
    comparison: Comparison, planned: Sequence[Cell], records: Mapping[str, Record]
) -> list[Path]:
    """Write the pictures into the output folder: a row of panels for each setting."""
    finished = {
        (cell.setting, cell.method): [
            records[run.key]["train_info"]["metrics"]
            for run in cell.runs
            if figure(records.get(run.key), comparison.metrics[0]) is not None
        ]
        for cell in planned
    }
    compared = comparison.metrics[0]
    clouds: dict[str, tuple[str, str, Callable[[Any], tuple[Any, Any]]]] = {
        "time": ("seconds of training", compared, lambda n: (n.get("train_seconds"), n[compared])),
        "trace": (
            "trace of the Hessian",
            compared,
            lambda n: (n.get("curvature.trace"), n[compared]),
        ),
        "forgetting": (
            compared,
            "loss on other data, after - before",
            lambda n: (n[compared], _forgotten(n)),
        ),
    }
    written = []
    for name, (x, y, point) in clouds.items():
        points = {place: _points(found, point) for place, found in finished.items()}
        written += _clouds(comparison.output_dir / f"{name}.png", points, x, y)
    return written + _what_survives(comparison.output_dir / "robustness.png", finished)


def _points(found: Sequence[Mapping[str, Any]], point: Callable[[Any], tuple[Any, Any]]) -> Points:
    made = [point(numbers(figures)) for figures in found]
    return [(x, y) for x, y in made if x is not None and y is not None]


def _forgotten(figures: Mapping[str, float]) -> float | None:
    before, after = (figures.get(f"forgetting.{when}.loss") for when in ("before", "after"))
    return after - before if before is not None and after is not None else None


def _by_setting(found: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    groups = groupby(found.items(), key=lambda one: one[0][0])
    return {setting: {place[1]: of for place, of in group} for setting, group in groups}


def _clouds(path: Path, points: Mapping[tuple[str, str], Points], x: str, y: str) -> list[Path]:
    """A point for each run, and the mean of each method with its standard errors."""
    if sum(bool(of) for of in points.values()) < 1:
        return []
    settings = _by_setting(points)
    figure, axes = _panels(len(settings), 1)
    for axis, (setting, methods) in zip(axes[:, 0], settings.items(), strict=True):
        for number, (method, of) in enumerate(methods.items()):
            if of:
                style = _style(number)
                axis.scatter(*zip(*of, strict=True), s=12, alpha=0.35, linewidths=0, **style)
                (mean_x, error_x), (mean_y, error_y) = map(mean_and_error, zip(*of, strict=True))
                bars = {"xerr": error_x, "yerr": error_y} if len(of) > 1 else {}
                axis.errorbar(mean_x, mean_y, **bars, **style, ls="", capsize=3, ms=7, label=method)
        axis.set(xlabel=x, ylabel=y, title=setting)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _saved(figure, path)


def _what_survives(path: Path, finished: Mapping[tuple[str, str], Any]) -> list[Path]:
    """Accuracy, or else loss, as the weights are and over the strength of each kind of change to
    them: mean and standard error over seeds."""
    table: dict[tuple[str, str], dict[str, dict[float | None, list[Any]]]] = {}
    measure = "accuracy"
    for place, of_method in finished.items():
        changed = [row for figures in of_method for row in figures.get("robustness") or []]
        if any(row.get("accuracy") is None for row in changed):
            measure = "loss"
        table[place] = {}
        for row in changed:
            rows = table[place].setdefault(row["kind"], {})
            rows.setdefault(row["strength"], []).append(row)
    kinds = list(dict.fromkeys(kind for of in table.values() for kind in of if kind != "none"))
    if not kinds:
        return []
    settings = _by_setting(table)
    figure, axes = _panels(len(settings), len(kinds))
    for row_of_axes, (setting, methods) in zip(axes, settings.items(), strict=True):
        for axis, kind in zip(row_of_axes, kinds, strict=True):
            every = {strength for of in methods.values() for strength in of.get(kind, {})}
            strengths = [None, *sorted(filter(None, every), reverse=kind.startswith("bits"))]
            for number, (method, of) in enumerate(methods.items()):
                rows = of.get("none", {}) | of.get(kind, {})
                _line(axis, [rows.get(each) for each in strengths], measure, number, method)
            labels = ["as it is" if each is None else f"{each:g}" for each in strengths]
            axis.set(xlabel=kind, ylabel=measure, title=setting)
            axis.set_xticks(range(len(labels)), labels)
        row_of_axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _saved(figure, path)


def _line(axis: Any, of: Sequence[list[Any] | None], measure: str, number: int, label: str) -> None:
    """Of the rows at each place, where there are any."""
    places = [place for place, rows in enumerate(of) if rows]
    if places:
        found = [mean_and_error([row[measure] for row in rows]) for rows in of if rows]
        means, errors = zip(*found, strict=True)
        axis.errorbar(places, means, yerr=errors, **_style(number), ms=4, capsize=3, label=label)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    size = (4.2 * columns + 2, 3.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def _saved(figure: Any, path: Path) -> list[Path]:
    figure.savefig(path, dpi=120)
    return [path]
