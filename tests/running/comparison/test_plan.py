"""Which runs there are, what tuning chooses, and how many steps fit into a time."""

from dataclasses import replace
from pathlib import Path

import pytest

from nso_hf.running.comparison.description import Comparison, Method, Tuning
from nso_hf.running.comparison.plan import (
    cells,
    combinations,
    equal_steps,
    figure,
    first_of_each,
    missing,
    numbers,
)

RATES = {"learning_rate": [0.1, 0.2]}


def comparison(tuning=None, **methods):
    return Comparison(
        recipe=Path("recipe.py"),
        seeds=[0, 1, 2],
        options={"max_steps": 10, "batch": 4},
        settings={"few": {"batch": 1}, "many": {}},
        methods={name: replace(method, name=name) for name, method in methods.items()},
        tuning=tuning,
        metrics=["test.accuracy"],
        baseline="plain",
        output_dir=Path("out"),
        launcher=None,
        written={},
    )


def record(status="success", **figures):
    return {"run_info": {}, "train_info": {"status": status, "metrics": figures}}


def ended(planned, figures_of):
    """Records of the runs that are missing, with these figures."""
    return {run.key: record(**figures_of(run)) for run in missing(planned, {})}


def test_every_setting_method_and_seed_is_run_one_seed_after_the_other():
    what = comparison(plain=Method("", {"sigma": 0}), nso=Method("", {"sigma": 0.1}))
    runs = missing(cells(what, {}), {})
    assert [run.options["seed"] for run in runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert runs[0].options == {"max_steps": 10, "batch": 1, "sigma": 0, "seed": 0}
    assert [(run.setting, run.method) for run in runs[:4]] == [
        ("few", "plain"),
        ("few", "nso"),
        ("many", "plain"),
        ("many", "nso"),
    ]


def test_equal_options_are_one_run_and_null_is_not_written():
    what = comparison(
        plain=Method("", {"sigma": 0}),
        again=Method("", {"sigma": 0}),
        unset=Method("", {"batch": None, "sigma": 0}),
    )
    runs = missing(cells(what, {}), {})
    assert len(runs) == 3 * 3  # batch 1, batch 4, and the recipe's own
    assert [run.options for run in runs if "batch" not in run.options] == [
        {"max_steps": 10, "sigma": 0, "seed": seed} for seed in (0, 1, 2)
    ]


def test_what_a_run_is_does_not_depend_on_names_or_order():
    one = comparison(plain=Method("", {"sigma": 0, "rho": 1}))
    other = comparison(other=Method("", {"rho": 1, "sigma": 0}))
    other = replace(other, settings={"renamed": {"batch": 1}, "many": {}})
    keys = [[run.key for run in missing(cells(what, {}), {})] for what in (one, other)]
    assert keys[0] == keys[1]
    changed = comparison(plain=Method("", {"sigma": 0, "rho": 2}))
    assert not {run.key for run in missing(cells(changed, {}), {})} & set(keys[0])


@pytest.mark.parametrize(
    "name", ["a" * 300, "method " * 60, "40 % w/o labels " * 20, "\u6570" * 300]
)
def test_however_long_a_name_is_it_is_one_of_a_file(name, tmp_path):
    runs = missing(cells(comparison(**{name: Method("", {"sigma": 0})}), {}), {})
    for run in runs:
        (tmp_path / f".{run.name}.json.unfinished").touch()
    assert len({run.name for run in runs}) == len(runs)


TUNING = Tuning([100, 101], "validation.accuracy", True)
ACCURACY = {(0.1, 100): 0.8, (0.1, 101): 0.6, (0.2, 100): 0.7, (0.2, 101): 0.8}


def judged(run):
    where = run.options["learning_rate"], run.options["seed"]
    return {"validation": {"accuracy": ACCURACY.get(where, 0)}, "test": {"accuracy": 0.5}}


def test_tuning_chooses_by_the_mean_over_its_seeds():
    what = comparison(TUNING, plain=Method("", {}, RATES))
    planned = cells(what, {})
    assert [run.role for run in missing(planned, {})] == ["tuning"] * 8
    assert [cell.unknown for cell in planned] == [3, 3]
    records = ended(planned, judged)
    planned = cells(what, records)
    assert [cell.chosen for cell in planned] == [{"learning_rate": 0.2}] * 2  # .75, and .7
    runs = missing(planned, records)
    assert {run.role for run in runs} == {"comparison"} and len(runs) == 6
    assert all(run.options["learning_rate"] == 0.2 for run in runs)
    less = replace(what, tuning=replace(TUNING, greater_is_better=False))
    assert cells(less, records)[0].chosen == {"learning_rate": 0.1}


def test_tuning_does_without_what_it_leaves_out():
    tuning = replace(TUNING, leave_out=["batch", "max_steps"])
    what = comparison(tuning, plain=Method("", {"sigma": 0, "max_steps": 20}, RATES))
    runs = missing(cells(what, {}), {})
    assert all(run.options.keys() == {"sigma", "learning_rate", "seed"} for run in runs)
    records = ended(cells(what, {}), judged)
    compared = missing(cells(what, records), records)
    assert len(compared) == 6 and {run.options["max_steps"] for run in compared} == {20}
    assert {run.options["batch"] for run in compared} == {1, 4}


def test_a_trial_that_failed_is_not_chosen():
    what = comparison(TUNING, plain=Method("", {}, RATES))
    planned = cells(what, {})
    records = ended(planned, judged)
    for run in planned[0].trials[1].runs[:1]:  # one seed of the better one
        records[run.key] = record("failed")
    for run in planned[1].trials[1].runs:
        records[run.key] = record(validation={"accuracy": float("nan")})
    assert [cell.chosen for cell in cells(what, records)] == [{"learning_rate": 0.1}] * 2
    records |= {run.key: record("failed") for run in missing(planned, {})}
    none = cells(what, records)
    assert [cell.why_none for cell in none] == ["all 2 trials of tuning failed"] * 2
    assert not missing(none, records) and not any(cell.unknown for cell in none)


def test_equal_values_choose_the_first():
    what = comparison(TUNING, plain=Method("", {}, RATES))
    records = ended(cells(what, {}), lambda run: {"validation": {"accuracy": 0.5}})
    assert cells(what, records)[0].chosen == {"learning_rate": 0.1}


def test_all_combinations_of_candidates_are_tried():
    method = Method("nso", {}, {"sigma": [1, 2], "rate": [3, 4, 5]})
    assert method.num_trials == len(combinations(method)) == 6
    assert combinations(method)[1] == {"sigma": 1, "rate": 4}
    assert combinations(Method("plain", {})) == [{}] and Method("plain", {}).num_trials == 1


def timed(run):
    """NSO takes .2 s a step, plain training .09."""
    pace = 0.2 if run.options["sigma"] else 0.09
    seconds = pace * run.options["max_steps"]
    return judged(run) | {"train_seconds": seconds, "steps": run.options["max_steps"]}


def test_equal_time_is_as_many_steps_as_fit():
    longer = Method("", {"sigma": 0}, RATES, time_of="nso")
    what = comparison(TUNING, longer=longer, nso=Method("", {"sigma": 0.1}, RATES))
    what = replace(what, baseline="nso", settings={"": {}})
    records = {}
    seen = []
    while runs := missing(planned := cells(what, records), records):
        left = len(runs) + sum(cell.unknown for cell in planned)
        seen.append((len(runs), left))
        records |= ended(planned, timed)
    # 4 runs of pace and 4 of tuning NSO; 3 that are compared; 4 of tuning and then 3 for the other.
    assert seen == [(8, 18), (3, 10), (4, 7), (3, 3)]
    cell = cells(what, records)[0]
    assert cell.method == "longer"
    steps = round(0.2 * 10 / 0.09)
    assert cell.chosen == {"learning_rate": 0.2, "max_steps": steps} and steps == 22
    assert {run.options["max_steps"] for trial in cell.trials for run in trial.runs} == {steps}
    assert equal_steps([1.9, 2.0, 9.0], [0.1, 0.09, 0.5]) == 20  # medians
    assert equal_steps([0.01], [1.0]) == 1


def test_the_pace_is_that_of_runs_that_are_there_anyway():
    methods = {
        "plain": Method("", {"sigma": 0}, RATES),
        "longer": Method("", {"sigma": 0}, RATES, time_of="nso"),
        "nso": Method("", {"sigma": 0.1}, RATES),
    }
    with_plain, runs = comparison(TUNING, **methods), []
    del methods["longer"]
    for what in (with_plain, comparison(TUNING, **methods)):
        runs.append(missing(cells(what, {}), {}))
    assert runs[0] == runs[1]


def test_without_a_time_there_is_none_that_is_equal():
    longer = Method("", {"sigma": 0}, time_of="nso")
    what = comparison(plain=longer, nso=Method("", {"sigma": 0.1}))
    planned = cells(what, {})
    records = ended(planned, lambda run: {"status": "failed"} if run.options["sigma"] else {})
    with pytest.raises(ValueError, match="time_of='train_seconds': not among the figures"):
        cells(what, ended(planned, lambda run: {"test": {"accuracy": 1.0}}))
    found = [cell for cell in cells(what, records) if cell.method == "plain"]
    assert {cell.why_none for cell in found} == {"no run of nso to time it by"}


def test_one_run_of_each_trial_has_all_options():
    longer = Method("", {"sigma": 0}, RATES, time_of="nso")
    what = comparison(TUNING, plain=longer, nso=Method("", {"sigma": 0.1}, RATES))
    runs = first_of_each(what)
    assert len(runs) == 2 * 2 * 2
    assert runs[0].options["max_steps"] == 1 and runs[-1].options["max_steps"] == 10


def test_figures_have_the_names_of_their_places():
    figures = {"test": {"accuracy": 0.9, "n": {"x": 2}}, "ok": True, "rows": [1], "steps": 3}
    figures |= {"curvature": {"curvature/trace": 7.0, "step": 2}, "none": None}
    changes = [("none", None), ("bits", 4), ("noise", 0.005)]
    figures["robustness"] = [
        {"kind": kind, "strength": strength, "loss": place}
        for place, (kind, strength) in enumerate(changes)
    ]
    figures["wise_ft"] = [{"alpha": 0.5, "zero_shot": {"accuracy": 0.8}}]
    assert numbers(figures) == {
        "test.accuracy": 0.9,
        "test.n.x": 2,
        "steps": 3,
        "curvature.trace": 7.0,
        "curvature.step": 2,
        "robustness.none.loss": 0,
        "robustness.bits 4.loss": 1,
        "robustness.bits 4.strength": 4,
        "robustness.noise 0.005.loss": 2,
        "robustness.noise 0.005.strength": 0.005,
        "wise_ft.alpha 0.5.alpha": 0.5,
        "wise_ft.alpha 0.5.zero_shot.accuracy": 0.8,
    }
    assert figure(record(test={"accuracy": float("inf")}), "test.accuracy") is None
    assert figure(None, "test.accuracy") is None
