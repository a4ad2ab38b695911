"""What is to be compared: the YAML file, checked."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import yaml

from nso_hf.refusal import Refusal, check_seed, refusal
from nso_hf.running.config_file import Loader

Options = dict[str, Any]
OWN = ("seed", "output_dir", "resume_from_checkpoint", "test")
"""Options of a recipe that are set here for each run."""


@dataclass(frozen=True)
class Method:
    name: str
    options: Options
    candidates: dict[str, list[Any]] = field(default_factory=dict)
    """Option -> the values that tuning tries; all combinations are."""
    time_of: str | None = None
    """The method whose training time this one gets."""

    @property
    def num_trials(self) -> int:
        return prod(len(values) for values in self.candidates.values())


@dataclass(frozen=True)
class Tuning:
    seeds: list[int]
    metric: str
    greater_is_better: bool
    leave_out: list[str] = field(default_factory=list)
    """Options that its runs do without: of what is measured for the comparison alone."""


@dataclass(frozen=True)
class Comparison:
    recipe: Path
    seeds: list[int]
    options: Options
    settings: dict[str, Options]
    methods: dict[str, Method]
    tuning: Tuning | None
    metrics: list[str]
    """Names of figures; the first is what methods are compared by."""
    baseline: str
    output_dir: Path
    launcher: str | None
    written: Options
    """The file as it was read."""


def read_comparison(file: Path, find_recipe: Callable[[str], Path]) -> Comparison:
    """
    Args:
        file: the YAML file.
        find_recipe: the script that `recipe` names.

    Raises:
        ValueError: something in it is unknown, missing, or does not go with the rest.
    """
    written = _read(file)
    known = "recipe seeds options settings methods tune metrics baseline output_dir launcher"
    _check_keys("comparison", written, known.split())
    for key in ("recipe", "seeds", "methods"):
        if not written.get(key):
            raise refusal(key, written.get(key), "must be given", f"Write {key}: in {file}")
    tune = _mapping("tune", written.get("tune"))
    methods = _methods(_mapping("methods", written["methods"]), tune)
    baseline = str(written.get("baseline", next(iter(methods))))
    if baseline not in methods:
        raise refusal("baseline", baseline, "no such method", f"Choose one of {_names(methods)}")
    options = _options("options", written.get("options"))
    settings = _mapping("settings", written.get("settings")) or {"": {}}
    metrics = _list("metrics", written.get("metrics", ["test.accuracy", "train_seconds"]))
    return Comparison(
        recipe=find_recipe(str(written["recipe"])),
        seeds=_seeds("seeds", written["seeds"]),
        options=options,
        settings={name: _options(f"settings.{name}", value) for name, value in settings.items()},
        methods=methods,
        tuning=_tuning(tune, str(metrics[0]), options) if tune else None,
        metrics=[str(metric) for metric in metrics],
        baseline=baseline,
        output_dir=Path(
            _text("output_dir", written.get("output_dir")) or Path("runs") / "compare" / file.stem
        ),
        launcher=_launcher(written),
        written=written,
    )


def _text(where: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise refusal(where, value, "must be a text", "Correct it, or leave it out")
    return value


def _launcher(written: Options) -> str | None:
    launcher = _text("launcher", written.get("launcher"))
    if launcher is not None and shutil.which(shlex.split(launcher)[0]) is None:
        rule = "no such program"
        raise refusal("launcher", launcher, rule, "Install it, or leave it out for one process")
    return launcher


def _methods(written: Options, tune: Options) -> dict[str, Method]:
    shared = _candidates("tune.options", tune.get("options"))
    methods = {}
    for name, value in written.items():
        where = f"methods.{name}"
        of_method = dict(_mapping(where, value))
        own = _candidates(f"{where}.tune", of_method.pop("tune", None))
        time_of = _text(f"{where}.time_of", of_method.pop("time_of", None))
        if own and not tune:
            raise refusal(f"{where}.tune", own, "there is no tune:", "Add tune: with its seeds")
        candidates = shared | own
        options = _options(where, of_method)
        twice = sorted(candidates.keys() & options.keys())
        if twice:
            cure = f"Leave it out of {where}, or give {twice[0]}: [{options[twice[0]]}] in its tune"
            raise refusal(f"{where}.{twice[0]}", options[twice[0]], "is tuned", cure)
        if time_of is not None and "max_steps" in candidates | options:
            rule = "time_of says how many steps there are"
            raise refusal(f"{where}.max_steps", options.get("max_steps"), rule, "Leave one out")
        methods[name] = Method(name, options, candidates, time_of)
    _check_times(methods)
    _check_budget(methods)
    return methods


def _check_times(methods: dict[str, Method]) -> None:
    timed = {name: method.time_of for name, method in methods.items() if method.time_of is not None}
    others = _names(name for name in methods if name not in timed)
    for name, reference in timed.items():
        if reference not in methods or reference in timed:
            rule = "has time_of itself" if reference in timed else "no such method"
            raise refusal(f"methods.{name}.time_of", reference, rule, f"Choose one of {others}")


def _check_budget(methods: dict[str, Method]) -> None:
    trials = {name: method.num_trials for name, method in methods.items()}
    most = max(trials.values())
    fewer = [name for name, number in trials.items() if number < most]
    if fewer:
        option = next(iter(methods[fewer[0]].candidates), "learning_rate")
        cure = f"Give {_names(fewer)} more values to try, as of {option}"
        raise refusal("tune", trials, "every method must have as many trials", cure)


def _tuning(tune: Options, compared: str, options: Options) -> Tuning:
    _check_keys("tune", tune, ["seeds", "metric", "greater_is_better", "options", "leave_out"])
    metric = str(tune.get("metric", "validation.accuracy"))
    if metric == compared or metric.startswith("test."):
        rule = "the test data are read once, for what is compared"
        raise refusal("tune.metric", metric, rule, "Choose by one of validation.*")
    if "seeds" not in tune:
        raise refusal("tune.seeds", None, "must be given", "Write seeds: [100] under tune:")
    greater = tune.get("greater_is_better", "loss" not in metric.rpartition(".")[2])
    if not isinstance(greater, bool):
        raise refusal("tune.greater_is_better", greater, "must be true or false", "Correct it")
    leave_out = _list("tune.leave_out", tune["leave_out"]) if "leave_out" in tune else []
    for name in leave_out:
        if str(name) not in options:
            cure = f"Choose of {_names(options)}" if options else "Leave it out"
            raise refusal("tune.leave_out", name, "not among the options of all runs", cure)
    return Tuning(_seeds("tune.seeds", tune["seeds"]), metric, greater, leave_out)


def _options(where: str, value: Any) -> Options:
    options = _mapping(where, value)
    for name in OWN:
        if name in options:
            cure = "Use seeds:" if name == "seed" else "Leave it out"
            raise refusal(f"{where}.{name}", options[name], "is set here for each run", cure)
    return options


def _candidates(where: str, value: Any) -> dict[str, list[Any]]:
    return {name: _list(f"{where}.{name}", v) for name, v in _options(where, value).items()}


def _seeds(where: str, value: Any) -> list[int]:
    seeds = value if isinstance(value, list) else [value]
    is_seed = [isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds]
    if seeds is not value or not all(is_seed):
        rule = "must be a list of integers, at least 0"
        raise refusal(where, value, rule, "Write it as [0, 1, 2, 3, 4]")
    for seed in seeds:
        check_seed(where, seed)
    return _list(where, seeds)


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        cure = "Name one or more" if value in (None, []) else f"Write [{value}]"
        raise refusal(where, value, "must be a list of at least one", cure)
    if any(one in value[:place] for place, one in enumerate(value)):
        raise refusal(where, value, "has one twice", "Name each once")
    return value


def _mapping(where: str, value: Any) -> Options:
    if value is not None and not isinstance(value, dict):
        raise refusal(where, value, "must be a mapping", "Write 'name: value' lines")
    return value or {}


def _check_keys(where: str, value: Options, known: list[str]) -> None:
    for key in value:
        if key not in known:
            raise refusal(where, key, "unknown", f"Choose one of {', '.join(known)}")


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))


class _Loader(Loader):
    """Of YAML's words only `true` and `false` are truth values, so that `eval_strategy: no` is what
    the option takes."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
        for first, found in Loader.yaml_implicit_resolvers.items()
    }


def _named_once(loader: _Loader, node: yaml.MappingNode) -> Options:
    """A mapping of names, which are texts: its own, and others of `<<: *merged`."""
    written = [str(key.value) for key, _ in node.value]
    for name in written:
        if written.count(name) > 1:
            raise refusal("comparison", name, "stands twice", "Give each a name of its own")
    loader.flatten_mapping(node)
    return {str(key.value): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _named_once)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|false)$", re.IGNORECASE), list("tTfF")
)


def _read(file: Path) -> Options:
    try:
        written = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except Refusal:
        raise
    except OSError as error:
        raise refusal(
            "file", str(file), "cannot be read", "Give the path of a YAML file"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise refusal(
            "file", str(file), f"not YAML ({error})", "Write 'key: value' lines"
        ) from error
    return _mapping("file", written)
