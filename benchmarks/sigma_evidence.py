"""Does a sigma that is found by its effect do as well as the best of a grid?

    python -m benchmarks.sigma_evidence

Reads what `nso compare` wrote of benchmarks/comparisons/sigma_*.yaml, puts the table into
docs/sigma.md between its markers, and draws docs/sigma_evidence.png: the figure of the task over
sigma, with the sigmas that were found by a rise of the loss.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev

from nso_hf.running.figures import with_error

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "sigma.md"
BEGIN, END = "<!-- sigma_evidence -->", "<!-- end -->"
SCALES = ("absolute", "relative")
TASKS = {
    "sigma_digits": "wrong labels of digits: accuracy, %",
    "sigma_clip": "CLIP: zero-shot, %",
    "sigma_text": "few texts: accuracy, %",
    "sigma_chain_of_thought": "chain of thought: loss",
}
MARKS: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "auto": ("*", lambda method: method.startswith("auto") and "start" not in method),
    "auto, after a start": ("d", lambda method: method.startswith("auto") and "start" in method),
    "held": ("^", lambda method: method.startswith("held")),
}
"""Of the picture."""


class Task:
    """One comparison: a figure of each seed, by method."""

    def __init__(self, name: str) -> None:
        results = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
        self.name, self.title = name, TASKS[name]
        metric = results["comparison"]["metrics"][0]
        self.sign = -1 if metric.endswith("loss") else 1
        self.scale = 100 if self.title.endswith("%") else 1
        self.values: dict[str, dict[str, float]] = {}
        for row in results["rows"]:
            values = row["metrics"].get(metric, {}).get("values", {})
            if len(values) > 1:
                self.values[row["method"]] = {s: self.scale * v for s, v in values.items()}
        self.found = {method: _found(name, method) for method in self.values}

    def mean(self, method: str) -> float:
        return fmean(self.values[method].values())

    def stderr(self, method: str) -> float:
        return _stderr(list(self.values[method].values()))

    def grid(self, scale: str) -> dict[float, str]:
        """Sigma -> the method, in order."""
        names = [name for name in self.values if name.startswith(f"{scale} ")]
        return dict(sorted((float(name.split()[1]), name) for name in names))

    def best(self) -> str:
        """Of both grids."""
        names = [name for scale in SCALES for name in self.grid(scale).values()]
        return max(names, key=lambda name: self.sign * self.mean(name))

    def is_as_good(self, method: str) -> bool:
        """Within one standard error, of the paired difference, of the best of the grid."""
        best, own = self.values[self.best()], self.values[method]
        differences = [self.sign * (own[seed] - best[seed]) for seed in own.keys() & best.keys()]
        return fmean(differences) >= -_stderr(differences)


def _stderr(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values))


def _found(task: str, method: str) -> float | None:
    """The mean of the sigmas that were found."""
    sigmas = []
    for file in (RESULTS / task / "runs").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        logged = record["train_info"]["metrics"].get("sigma")
        if record["run_info"]["method"] == method and logged:
            sigmas.append(logged["first"])
    return fmean(sigmas) if sigmas and method.startswith(("auto", "held")) else None


def table(tasks: list[Task]) -> str:
    """In Markdown: a row for each way of choosing sigma, a column for each task."""
    return "".join(f"{line}\n" for line in _lines(tasks))


def _lines(tasks: list[Task]) -> Iterator[str]:
    yield "| sigma | " + " | ".join(task.title for task in tasks) + " |"
    yield "|---" * (len(tasks) + 1) + "|"
    yield _line("plain", [_cell(task, "plain") for task in tasks])
    for scale in SCALES:
        cells = []
        for task in tasks:
            names = list(task.grid(scale).values())
            name = max(names, key=lambda name: task.sign * task.mean(name))
            cells.append(f"{_cell(task, name)} ({name.split()[1]})")
        yield _line(f"best of the grid, {scale}", cells)
    found = {name for task in tasks for name, sigma in task.found.items() if sigma is not None}
    for name in sorted(found, key=_order):
        yield _line(name, [_cell(task, name, with_sigma=True) for task in tasks])


def _order(method: str) -> tuple[str, float, float]:
    """Of "auto, absolute, rise 0.02, start 0.1": how and in what units, the start, the rise."""
    kind, scale, *options = method.split(", ")
    numbers = dict(option.split() for option in options)
    return f"{kind}, {scale}", float(numbers.get("start", 0)), float(numbers["rise"])


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(task: Task, method: str, with_sigma: bool = False) -> str:
    if method not in task.values:
        return ""
    text = with_error(task.mean(method), task.stderr(method))
    sigma = task.found[method]
    after = f" ({sigma:.2g})" if with_sigma and sigma is not None else ""
    return (f"**{text}**" if task.is_as_good(method) else text) + after


def plot(tasks: list[Task], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(9, 2.8 * len(tasks)), layout="constrained", squeeze=False
    )
    for row, task in zip(axes, tasks, strict=True):
        for axis, scale in zip(row, SCALES, strict=True):
            grid = task.grid(scale)
            means = [task.mean(name) for name in grid.values()]
            errors = [task.stderr(name) for name in grid.values()]
            axis.errorbar(list(grid), means, yerr=errors, fmt="o-", capsize=3, label="grid")
            plain, error = task.mean("plain"), task.stderr("plain")
            axis.axhspan(plain - error, plain + error, color="0.9", label="plain")
            for number, (title, (marker, belongs)) in enumerate(MARKS.items(), 1):
                names = [name for name in task.values if belongs(name) and f", {scale}," in name]
                for name in names:
                    point = (task.found[name], task.mean(name))
                    is_first = name == names[0]
                    axis.plot(*point, marker, color=f"C{number}", markersize=8,
                              label=title if is_first else None)  # fmt: skip
                    rise = name.split("rise ")[1].split(",")[0]
                    beside = (4, -11 if title == "held" else 5)
                    axis.annotate(rise, point, fontsize=7, color=f"C{number}",
                                  textcoords="offset points", xytext=beside)  # fmt: skip
            axis.set(xscale="log", ylabel=task.title, xlabel=f"sigma, {scale}")
            axis.minorticks_off()
            axis.set_xticks(list(grid), [f"{sigma:g}" for sigma in grid])
            axis.yaxis.label.set_fontsize(8)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tasks() -> list[Task]:
    """Those that were run."""
    return [Task(name) for name in TASKS if (RESULTS / name / "results.json").exists()]


def with_table(page: str, table: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def main() -> None:
    found = tasks()
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, table(found)), encoding="utf-8")
    plot(found, ROOT / "docs" / "sigma_evidence.png")


if __name__ == "__main__":
    main()
