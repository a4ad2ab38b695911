"""A picture of how a training went."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nso_hf.refusal import needs

needs("nso_hf.plots", "recipes", "matplotlib")


def plot_training(
    log: Sequence[Mapping[str, Any]], path: Path, titles: Mapping[str, str], top: float | None
) -> None:
    """Plot what the Trainer logged over the steps.

    Args:
        log: `trainer.state.log_history`.
        titles: name in the log -> title of a panel; the first is the training loss.
        top: upper end of the axes of shares (those named `eval_*`); None: as the data have it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def series(name: str) -> tuple[list[float], list[float]]:
        entries = [entry for entry in log if math.isfinite(entry.get(name, math.nan))]
        return [entry["step"] for entry in entries], [entry[name] for entry in entries]

    panels = [name for name in titles if series(name)[0]]
    if not panels:  # a run shorter than logging_steps
        panels = ["loss"]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.5), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], panels, strict=True):
        axis.plot(*series(name), "o-", markersize=3, label="training, mean over evaluations")
        axis.set_xlabel("optimizer step")
        highest = 1.1 * max(series(name)[1], default=1)
        axis.set_ylim(bottom=0, top=top if name.startswith("eval_") and top else highest)
        axis.set_title(titles[name])
        if name == "loss" and series("eval_loss")[0]:
            axis.plot(*series("eval_loss"), "s-", label="validation, at W")
            axis.set_ylim(top=max(highest, 1.1 * max(series("eval_loss")[1])))
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
