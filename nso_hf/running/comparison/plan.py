"""Which runs a comparison consists of, as far as finished ones say."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from statistics import fmean, median
from typing import Any

from nso_hf.refusal import refusal
from nso_hf.running.comparison.description import Comparison, Method, Options
from nso_hf.running.recorded_options import fingerprint

_LONGEST = 150  # bytes of a name that people read; file systems take 255 with all
Record = Mapping[str, Any]
"""What is known of a run that has ended: see `records`."""


@dataclass(frozen=True)
class Run:
    """One training. What it is, is its recipe, its options and what it is for."""

    recipe: str
    setting: str
    method: str
    role: str
    """"tuning", which does not read the test data, or "comparison"."""
    options: Options

    @property
    def key(self) -> str:
        """The same for equal runs, whatever their method and setting are called."""
        options = json.dumps(self.options, sort_keys=True, default=str)
        return fingerprint([self.recipe, self.role, options])[:12]

    @property
    def name(self) -> str:
        """Of its files."""
        words = [self.setting, self.method, self.role, str(self.options["seed"])]
        readable = re.sub(r"[^\w.]+", "-", "_".join(word for word in words if word))
        return f"{readable.encode()[:_LONGEST].decode(errors='ignore')}_{self.key}"

    def __str__(self) -> str:
        where = ", ".join(word for word in (self.setting, self.method) if word)
        return f"{where}, {self.role}, seed {self.options['seed']}"


@dataclass(frozen=True)
class Trial:
    """One of the combinations of options that tuning tries."""

    options: Options
    runs: list[Run]

    def value(self, metric: str, records: Mapping[str, Record]) -> float | None:
        """The mean over its seeds; None where one is missing, failed or not finite."""
        values = [figure(records.get(run.key), metric) for run in self.runs]
        found = [value for value in values if value is not None]
        return fmean(found) if len(found) == len(values) else None


@dataclass(frozen=True)
class Cell:
    """One method in one setting."""

    setting: str
    method: str
    pace: list[Run] = field(default_factory=list)
    """By which the time of a step is measured."""
    trials: list[Trial] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    """That are compared: none until it is known what they are."""
    chosen: Options = field(default_factory=dict)
    """What tuning and `time_of` came to."""
    unknown: int = 0
    """How many runs there will be beside those."""
    why_none: str = ""
    """Why there will be none."""

    @property
    def own(self) -> list[Run]:
        return [*(run for trial in self.trials for run in trial.runs), *self.runs]


def cells(comparison: Comparison, records: Mapping[str, Record]) -> list[Cell]:
    """
    Args:
        records: of the runs that have ended, by their keys.

    Raises:
        ValueError: a run has no figure that another one depends on.
    """
    made: dict[tuple[str, str], Cell] = {}
    for setting in comparison.settings:
        methods = comparison.methods.values()
        for method in sorted(methods, key=lambda method: method.time_of is not None):
            reference = made.get((setting, method.time_of or ""))
            made[setting, method.name] = _cell(comparison, setting, method, reference, records)
    return [made[place] for place in itertools.product(comparison.settings, comparison.methods)]


def missing(planned: Sequence[Cell], records: Mapping[str, Record]) -> list[Run]:
    """The runs that are known and have not ended, each once: one seed after the other, so that an
    interrupted comparison has pairs, and a slow hour falls on all methods."""
    runs: dict[str, Run] = {}
    for run in (*(r for cell in planned for r in cell.own), *(r for c in planned for r in c.pace)):
        if run.key not in records:
            runs.setdefault(run.key, run)
    return sorted(runs.values(), key=lambda run: (run.role != "tuning", run.options["seed"]))


def first_of_each(comparison: Comparison) -> list[Run]:
    """A run for each setting, method and trial, with all options that it can have."""
    runs = []
    for setting, method in itertools.product(comparison.settings, comparison.methods.values()):
        for options in combinations(method):
            steps = {"max_steps": 1} if method.time_of is not None else {}
            runs += _runs(comparison, setting, method, options | steps)[:1]
    return runs


def combinations(method: Method) -> list[Options]:
    """Of the candidates of its options."""
    values = itertools.product(*method.candidates.values())
    return [dict(zip(method.candidates, chosen, strict=True)) for chosen in values]


def figure(record: Record | None, metric: str) -> float | None:
    """Of a run that has ended well, where it is finite."""
    value = numbers(record["train_info"]["metrics"]).get(metric) if record is not None else None
    return value if value is not None and math.isfinite(value) else None


def numbers(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"test": {"accuracy": 0.9}} -> {"test.accuracy": 0.9}; of the rows of what survives
    [{"kind": "bits", "strength": 3, "loss": 2}] -> {"robustness.bits 3.loss": 2}, and of those of
    weights between {"wise_ft.alpha 0.5.zero_shot.accuracy": 0.8}."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if name in _ROWS and isinstance(value, list):
            value = {_ROWS[name](row): row for row in value}
        if isinstance(value, Mapping):
            found |= {f"{name}.{rest}": it for rest, it in numbers(value, f"{name}/").items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name.removeprefix(prefix)] = value  # the Trainer's logs say "curvature/trace"
    return found


def _change_of(row: Mapping[str, Any]) -> str:
    kind, strength = row["kind"], row["strength"]
    return str(kind) if strength is None else f"{kind} {strength:g}"


def _alpha_of(row: Mapping[str, Any]) -> str:
    return f"alpha {row['alpha']:g}"


_ROWS = {"robustness": _change_of, "wise_ft": _alpha_of}
"""Figures that are lists -> what a row of them is called."""


def nearest(metric: str, figures: Iterable[str]) -> str:
    """The names of some figures, those first that are most like one that is not there."""
    return ", ".join(get_close_matches(metric, list(figures), n=8, cutoff=0))


def _cell(
    comparison: Comparison,
    setting: str,
    method: Method,
    reference: Cell | None,
    records: Mapping[str, Record],
) -> Cell:
    tuning, place = comparison.tuning, (setting, method.name)
    found: Options = {}
    pace: list[Run] = []
    later = len(comparison.seeds)
    if reference is not None:
        unchanged = _trials(comparison, setting, method, {})
        pace = [run for trial in unchanged for run in trial.runs]
        pace = pace or _runs(comparison, setting, method, {})
        if not _have_ended([*reference.runs, *pace], records) or reference.unknown:
            later += len(tuning.seeds) * method.num_trials if tuning else 0
            return Cell(*place, pace, unknown=later)
        trained, timed = (_that_succeeded(runs, records) for runs in (reference.runs, pace))
        if not trained or not timed:
            why = f"no run of {method.name if trained else reference.method} to time it by"
            return Cell(*place, pace, why_none=why)
        seconds = [_timed(record, "train_seconds") for record in trained]
        found["max_steps"] = equal_steps(seconds, [_seconds_a_step(record) for record in timed])
    trials = _trials(comparison, setting, method, found)
    if tuning is not None:
        if not _have_ended([run for trial in trials for run in trial.runs], records):
            return Cell(*place, pace, trials, unknown=later)
        best = best_of(trials, tuning.metric, tuning.greater_is_better, records)
        if best is None:
            return Cell(*place, pace, trials, why_none=f"all {len(trials)} trials of tuning failed")
        found = best.options | found
    runs = _runs(comparison, setting, method, found)
    return Cell(*place, pace, trials, runs, found)


def best_of(
    trials: Sequence[Trial], metric: str, greater_is_better: bool, records: Mapping[str, Record]
) -> Trial | None:
    """The trial with the best mean, the first of equal ones; None where all failed."""
    values = [(trial, trial.value(metric, records)) for trial in trials]
    found = [(trial, value) for trial, value in values if value is not None]
    sign = 1 if greater_is_better else -1
    return max(found, key=lambda one: sign * one[1])[0] if found else None


def equal_steps(seconds: Sequence[float], seconds_a_step: Sequence[float]) -> int:
    """How many steps fit into the median time of some runs, at the median pace of others."""
    return max(1, round(median(seconds) / median(seconds_a_step)))


def _seconds_a_step(record: Record) -> float:
    return _timed(record, "train_seconds") / _timed(record, "steps")


def _timed(record: Record, name: str) -> float:
    value = figure(record, name)
    if not value:
        cure = "Leave time_of out, and give max_steps"
        raise refusal("time_of", name, "not among the figures that the recipe writes", cure)
    return value


def _that_succeeded(runs: Sequence[Run], records: Mapping[str, Record]) -> list[Record]:
    found = [records[run.key] for run in runs]
    return [record for record in found if record["train_info"]["status"] == "success"]


def _have_ended(runs: Sequence[Run], records: Mapping[str, Record]) -> bool:
    return all(run.key in records for run in runs)


def _trials(comparison: Comparison, setting: str, method: Method, found: Options) -> list[Trial]:
    if comparison.tuning is None:
        return []
    seeds = comparison.tuning.seeds
    without = dict.fromkeys(comparison.tuning.leave_out)
    return [
        Trial(
            options, _runs(comparison, setting, method, without | options | found, "tuning", seeds)
        )
        for options in combinations(method)
    ]


def _runs(
    comparison: Comparison,
    setting: str,
    method: Method,
    found: Options,
    role: str = "comparison",
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    options = comparison.options | comparison.settings[setting] | method.options | found
    given = {name: value for name, value in options.items() if value is not None}
    recipe, place = comparison.recipe.stem, (setting, method.name)
    return [Run(recipe, *place, role, given | {"seed": seed}) for seed in seeds or comparison.seeds]
