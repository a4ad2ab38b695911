"""A picture of how a training went."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nso_hf.running.results import curvature_of, method_of

Log = Sequence[Mapping[str, Any]]
"""`trainer.state.log_history`."""

_CURVATURE = {
    "Trace of the Hessian": ("trace", "trace_stderr"),
    "Largest eigenvalue": ("lambda_max", "lambda_max_residual"),
}


def plot_training(
    results: Mapping[str, Any], path: Path, titles: Mapping[str, str], top: float | None
) -> None:
    """Plot what the Trainer logged over the steps, and the curvature where it was measured twice.

    Args:
        results: of a training, and under "plain" of another to be compared with, if there is one.
        titles: name in the log -> title of a panel; the first is the training loss.
        top: upper end of the axes of shares (those named `eval_*`); None: as the data have it.
    """
    logs = {method_of(results): results["log"]}
    if results.get("plain"):
        logs["plain"] = results["plain"]["log"]
    log = results["log"]
    from matplotlib.figure import Figure

    panels = [name for name in titles if _series(log, name)[0]]
    if not panels:  # a run shorter than logging_steps
        panels = ["loss"]
    measured = _measured(logs)
    bars = _CURVATURE if len(measured) > 1 else {}
    count = len(panels) + len(bars)
    figure = Figure(figsize=(4.2 * count, 3.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    for axis, name in zip(axes[0], panels, strict=False):
        _draw_series(axis, name, logs)
        axis.set_title(titles[name])
        if name.startswith("eval_") and top:
            axis.set_ylim(top=top)
    for axis, (title, (value, error)) in zip(axes[0][len(panels) :], bars.items(), strict=True):
        heights = [entry[value] for entry in measured.values()]
        errors = [entry[error] for entry in measured.values()]
        colors = [{"before": "0.7", "plain": "C1"}.get(name, "C0") for name in measured]
        axis.bar(list(measured), heights, yerr=errors, capsize=6, color=colors)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"{title} ± its error")
    figure.savefig(path, dpi=120)


def measured_before(log: Log) -> dict[str, float] | None:
    """The curvature of the model that training began with, if it was measured."""
    return next((curvature_of(e) for e in log if "curvature/trace" in e and e["step"] == 0), None)


def _measured(logs: Mapping[str, Log]) -> dict[str, Mapping[str, float]]:
    """The curvature before training and after each."""
    first, *_ = logs
    last = {
        "after" if len(logs) == 1 else name: next(
            (curvature_of(e) for e in reversed(entries) if "curvature/trace" in e), None
        )
        for name, entries in logs.items()
    }
    return {name: e for name, e in {"before": measured_before(logs[first]), **last}.items() if e}


def _draw_series(axis: Any, name: str, logs: Mapping[str, Log]) -> None:
    """One quantity of each training; with the loss in training that in evaluations."""
    highest = 0.0
    for number, (method, log) in enumerate(logs.items()):
        who = f"{method} " if len(logs) > 1 else ""
        lines = {method: name}
        if name == "loss":
            where = "at W" if method == "plain" else "mean over evaluations"
            lines = {f"{who}training, {where}": "loss", f"{who}validation, at W": "eval_loss"}
        for label, key in lines.items():
            steps, values = _series(log, key)
            if steps:
                style = "s--" if key != name else "o-"
                axis.plot(steps, values, style, markersize=3, color=f"C{number}", label=label)
                highest = max(highest, *values)
    axis.set_xlabel("optimizer step")
    axis.set_ylim(bottom=0, top=1.1 * highest or 1)
    if not axis.lines:
        text = "nothing finite was logged:\nlower --logging_steps?"
        axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    elif len(logs) > 1 or name == "loss":
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _series(log: Log, name: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log if math.isfinite(entry.get(name, math.nan))]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]
