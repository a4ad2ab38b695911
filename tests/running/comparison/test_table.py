"""What the table says of runs that ended well, failed, or are missing."""

import json
import math
import re

from scipy import stats

from nso_hf.running.comparison.description import Method, Tuning
from nso_hf.running.comparison.plan import cells, missing
from nso_hf.running.comparison.records import failure_of
from nso_hf.running.comparison.report import as_text
from nso_hf.running.comparison.table import notes, rows
from tests.running.comparison.test_plan import comparison, ended, record

ACCURACY = {"plain": [0.8, 0.7, 0.9], "nso": [0.85, 0.75, 0.94], "sam": [0.81, 0.71, 0.87]}


def judged(run):
    value = ACCURACY[run.method][run.options["seed"]]
    return {"test": {"accuracy": value}, "train_seconds": 1 + (run.method != "plain")}


def made(records=None, without=()):
    what = comparison(**{name: Method("", {"sigma": n}) for n, name in enumerate(ACCURACY)})
    what = type(what)(**vars(what) | {"settings": {"": {}}})
    planned = cells(what, {})
    found = ended(planned, judged)
    for run in missing(planned, {}):
        if (run.method, run.options["seed"]) in (records or {}):
            found[run.key] = records[run.method, run.options["seed"]]
        if (run.method, run.options["seed"]) in without:
            del found[run.key]
    return what, cells(what, found), found


def test_differences_are_paired_and_null_results_are_said():
    plain, nso, sam = rows(*made())
    interval = stats.ttest_rel(ACCURACY["nso"], ACCURACY["plain"]).confidence_interval(0.95)
    assert math.isclose(nso.difference.low, interval.low, rel_tol=1e-9)
    assert plain.difference is None and plain.difference_in_words() == ""
    assert nso.difference_in_words() == "+0.047 [+0.032, +0.061]"
    assert sam.difference_in_words() == "-0.003 [-0.061, +0.054]: no difference shown"
    assert (plain.times, nso.times) == (1, 2)
    assert [row.runs_in_words() for row in (plain, nso)] == ["3 of 3"] * 2


def test_failed_runs_are_counted_and_their_seeds_left_out():
    failed = record("failed")
    failed["run_info"]["error_msg"] = "first\nloss is nan"
    infinite = record(test={"accuracy": math.nan})
    infinite["run_info"]["error_msg"] = ""
    what, planned, records = made({("nso", 1): failed, ("sam", 0): infinite})
    plain, nso, sam = found = rows(what, planned, records)
    assert nso.runs_in_words() == "2 of 3, failed 1 of 3" == sam.runs_in_words()
    assert nso.difference.count == 2 and nso.values["test.accuracy"] == {0: 0.85, 2: 0.94}
    said = notes(what, found, records, 0)
    assert [line for line in said if re.match("Failed: nso_comparison_1_.*: loss is nan$", line)]
    assert [x for x in said if re.match("Failed: sam_.*_0_.*: its figures are not finite$", x)]
    json.dumps([row.as_json() for row in found], allow_nan=False)
    text = as_text(what, found, said)
    assert "| sam | 2 of 3, failed 1 of 3 | 0.79" in text and "loss is nan" in text
    del plain


def test_what_is_missing_is_said():
    what, planned, records = made(without=[("nso", 1), ("nso", 2)])
    _, nso, _ = found = rows(what, planned, records)
    assert nso.runs_in_words() == "1 of 3"
    assert nso.difference_in_words() == "+0.05 (one pair: no interval)"
    said = notes(what, found, records, len(missing(planned, records)))
    assert said[0] == "Not complete: 2 runs are missing. The same command goes on."
    assert said[-1] == "3 seeds: an interval of few pairs is wide. Use 5."
    json.dumps([row.as_json() for row in found], allow_nan=False)


def test_with_nothing_there_is_still_a_table():
    what, planned, _ = made()
    found = rows(what, planned, {})
    assert [row.runs_in_words() for row in found] == ["0 of 3"] * 3
    assert "| nso | 0 of 3 |  |  |  |  |" in as_text(what, found, [])


def test_a_figure_that_no_run_has_is_said():
    what, _, records = made()
    what = type(what)(**vars(what) | {"metrics": ["test.accuracy", "curvature.trace"]})
    found = rows(what, cells(what, records), records)
    expected = "No run has curvature.trace. There are: test.accuracy, train_seconds."
    assert expected in notes(what, found, records, 0)


def test_what_tuning_chose_is_said_and_where_it_is_at_the_end():
    rates = {"rate": [1, 2, 3], "kind": ["a", "b", "c"], "few": [1, 2]}
    tuning = Tuning([100], "validation.accuracy", True)
    what = comparison(tuning, plain=Method("", {}, rates))
    records = {}
    for _ in range(2):
        new = ended(
            [c for c in cells(what, records)],
            lambda run: {"validation": {"accuracy": run.options["rate"]}, "test": {"accuracy": 1}},
        )
        records |= {key: of for key, of in new.items() if key not in records}
    row = rows(what, cells(what, records), records)[0]
    assert row.chosen_in_words() == "rate 3, kind a, few 1" and row.at_the_end == ["rate"]
    assert len(row.trials) == 18 and row.trials[0]["validation.accuracy"] == 1
    said = notes(what, [row], records, 0)
    assert "few, plain: rate 3 is at the end of what was tried; the best may be beyond." in said


def test_times_that_are_not_equal_are_said():
    what, planned, records = made()
    for time_of, said in (("plain", "it took 2.00 times as long as plain. Was"), ("sam", "")):
        methods = what.methods | {"nso": Method("nso", {"sigma": 1}, time_of=time_of)}
        timed = type(what)(**vars(what) | {"methods": methods})
        found = notes(timed, rows(what, planned, records), records, 0)
        assert [line for line in found if said and said in line] == (
            [line for line in found if "times as long" in line]
        )
        assert bool(said) == any("times as long" in line for line in found)


def test_a_failure_is_told_in_a_line():
    said = [
        "Loading",
        "ValueError: old",
        "error: sigma=-1: too low. Raise it.",
        "50%|###",
        "(ended)",
    ]
    run = {"run_info": {"error_msg": "\n".join(said)}}
    assert failure_of(run) == "error: sigma=-1: too low. Raise it. (ended)"
    run["run_info"]["error_msg"] = "75%|###\n(killed by signal 9)"
    assert failure_of(run) == "(killed by signal 9)"
    run["run_info"]["error_msg"] = ""
    assert failure_of(run) == ""
