"""The table of a comparison: a row for each method in each setting."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from nso_hf.running.comparison.description import Comparison, Options
from nso_hf.running.comparison.intervals import Difference, mean_and_error, paired_difference
from nso_hf.running.comparison.plan import Cell, Record, Run, figure, nearest, numbers
from nso_hf.running.comparison.records import failure_of
from nso_hf.running.figures import with_error, with_interval


@dataclass(frozen=True)
class Row:
    """What is known of one method in one setting."""

    setting: str
    method: str
    planned: int
    """How many runs are compared."""
    failed: list[Run]
    failed_trials: list[Run]
    """Of tuning."""
    values: dict[str, dict[int, float]]
    """Metric -> seed -> value, of the runs that did not fail."""
    difference: Difference | None
    """Of the first metric to the baseline; None for the baseline itself, or without a pair."""
    times: float | None
    """Its training time, in that of the baseline."""
    chosen: Options
    at_the_end: list[str]
    """Which of the chosen options lie at an end of at least three values that were tried."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    why_none: str = ""

    @property
    def count(self) -> int:
        """How many runs there are figures of."""
        return len(next(iter(self.values.values())))

    def runs_in_words(self) -> str:
        words = [f"{self.count} of {self.planned}"]
        if self.failed:
            words.append(f"failed {len(self.failed)} of {self.planned}")
        return ", ".join([*words, *([self.why_none] if self.why_none else [])])

    def difference_in_words(self) -> str:
        found = self.difference
        if found is None:
            return ""
        if found.count == 1:
            return f"{found.mean:+.4g} (one pair: no interval)"
        text = with_interval(found.mean, found.low, found.high)
        return text if found.is_shown else f"{text}: no difference shown"

    def chosen_in_words(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.chosen.items())

    def as_json(self) -> dict[str, Any]:
        metrics = {}
        for metric, values in self.values.items():
            if values:
                mean, error = mean_and_error(list(values.values()))
                stderr = error if len(values) > 1 else None
                metrics[metric] = {"mean": mean, "stderr": stderr, "values": values}
        difference = asdict(self.difference) if self.difference is not None else None
        if difference is not None and difference["count"] == 1:
            difference |= {"low": None, "high": None}  # JSON has no nan
        return {
            "setting": self.setting,
            "method": self.method,
            "planned": self.planned,
            "finished": self.count,
            "failed": [run.name for run in self.failed],
            "why_none": self.why_none,
            "metrics": metrics,
            "difference": difference,
            "times_the_baseline": self.times,
            "chosen": self.chosen,
            "trials": self.trials,
        }


def rows(
    comparison: Comparison, planned: Sequence[Cell], records: Mapping[str, Record]
) -> list[Row]:
    """Of all settings and methods, in their order in the file."""
    made = []
    values = [_values(cell, [*comparison.metrics, "train_seconds"], records) for cell in planned]
    bases = {
        cell.setting: found
        for cell, found in zip(planned, values, strict=True)
        if cell.method == comparison.baseline
    }
    compared = comparison.metrics[0]
    for cell, found in zip(planned, values, strict=True):
        base = bases[cell.setting]
        is_baseline = cell.method == comparison.baseline
        seconds, base_seconds = found["train_seconds"].values(), base["train_seconds"].values()
        difference = paired_difference(found[compared], base[compared])
        made.append(
            Row(
                cell.setting,
                cell.method,
                planned=len(comparison.seeds),
                failed=[
                    run
                    for run in cell.runs
                    if run.key in records and figure(records[run.key], compared) is None
                ],
                failed_trials=_failed_trials(comparison, cell, records),
                values={metric: found[metric] for metric in comparison.metrics},
                difference=None if is_baseline else difference,
                times=fmean(seconds) / fmean(base_seconds) if seconds and base_seconds else None,
                chosen=cell.chosen,
                at_the_end=_at_the_end(cell),
                trials=_trials(comparison, cell, records),
                why_none=cell.why_none,
            )
        )
    return made


def _failed_trials(comparison: Comparison, cell: Cell, records: Mapping[str, Record]) -> list[Run]:
    metric = comparison.tuning.metric if comparison.tuning is not None else ""
    ended = [run for trial in cell.trials for run in trial.runs if run.key in records]
    return [run for run in ended if figure(records[run.key], metric) is None]


def _values(
    cell: Cell, metrics: Sequence[str], records: Mapping[str, Record]
) -> dict[str, dict[int, float]]:
    """Metric -> seed -> value. A run without the first metric has failed, whatever else it has."""
    found: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    for run in cell.runs:
        record = records.get(run.key)
        if figure(record, metrics[0]) is not None:
            for metric in metrics:
                value = figure(record, metric)
                if value is not None:
                    found[metric][run.options["seed"]] = value
    return found


def _at_the_end(cell: Cell) -> list[str]:
    found = []
    for name, value in cell.chosen.items():
        tried = {
            trial.options[name] for trial in cell.trials if _is_number(trial.options.get(name))
        }
        if len(tried) > 2 and value in (min(tried), max(tried)):
            found.append(name)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _trials(
    comparison: Comparison, cell: Cell, records: Mapping[str, Record]
) -> list[dict[str, Any]]:
    tuning = comparison.tuning
    if tuning is None:
        return []
    return [
        {"options": trial.options, tuning.metric: trial.value(tuning.metric, records)}
        for trial in cell.trials
    ]


def header(comparison: Comparison) -> list[str]:
    difference = f"{comparison.metrics[0]}: difference to {comparison.baseline}, 95 %"
    return ["method", "runs", *comparison.metrics, difference, "time", "chosen"]


def texts_of(row: Row) -> list[str]:
    """What stands under that header."""
    return [
        row.method,
        row.runs_in_words(),
        *(_mean_in_words(list(values.values())) for values in row.values.values()),
        row.difference_in_words(),
        f"x {row.times:.2f}" if row.times is not None else "",
        row.chosen_in_words(),
    ]


def _mean_in_words(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    return with_error(*mean_and_error(values))


def notes(
    comparison: Comparison,
    found: Sequence[Row],
    records: Mapping[str, Record],
    waiting: int,
) -> list[str]:
    """What is to be read with the table."""
    made = []
    if waiting:
        made.append(f"Not complete: {waiting} runs are missing. The same command goes on.")
    for row in found:
        place = ", ".join(word for word in (row.setting, row.method) if word)
        for run in [*row.failed_trials, *row.failed]:
            why = failure_of(records[run.key]) or "its figures are not finite"
            made.append(f"Failed: {run.name}: {why}")
        for name in row.at_the_end:
            value = f"{name} {row.chosen[name]}"
            made.append(
                f"{place}: {value} is at the end of what was tried; the best may be beyond."
            )
    made += _unequal_times(comparison, found)
    finished = [numbers(record["train_info"]["metrics"]) for record in records.values()]
    has_figures = any(row.count for row in found)
    for metric in comparison.metrics[1:]:
        if has_figures and not any(row.values[metric] for row in found):
            there = nearest(metric, sorted({name for of in finished for name in of}))
            made.append(f"No run has {metric}. There are: {there}.")
    if len(comparison.seeds) < 5:
        made.append(f"{len(comparison.seeds)} seeds: an interval of few pairs is wide. Use 5.")
    return made


def _unequal_times(comparison: Comparison, found: Sequence[Row]) -> list[str]:
    times = {(row.setting, row.method): row.times for row in found if row.times}
    made = []
    for (setting, name), time in times.items():
        time_of = comparison.methods[name].time_of or ""
        reference = times.get((setting, time_of))
        if reference and not 0.9 < time / reference < 1.1:
            place = ", ".join(word for word in (setting, name) if word)
            took = f"{place}: it took {time / reference:.2f} times as long as {time_of}."
            made.append(f"{took} Was the machine as busy all the time?")
    return made
