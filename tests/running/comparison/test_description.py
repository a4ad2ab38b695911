"""What a file may say, and what it is refused for."""

import re
from pathlib import Path

import pytest

from nso_hf.running.comparison.description import read_comparison

LEAST = {"recipe": "x", "seeds": "[0, 1]", "methods": "{plain: {sigma: 0}, nso: {sigma: 0.1}}"}
TUNE = "{seeds: [100], options: {learning_rate: [1e-3, 3e-3]}}"


def read(tmp_path, text=None, **lines):
    file = tmp_path / "my.yaml"
    lines = {name: line for name, line in (LEAST | lines).items() if line is not None}
    file.write_text(text or "\n".join(f"{name}: {line}" for name, line in lines.items()))
    return read_comparison(file, Path)


def test_the_least_that_a_file_says(tmp_path):
    found = read(tmp_path)
    assert found.output_dir == Path("runs/compare/my") and found.baseline == "plain"
    assert found.settings == {"": {}} and found.tuning is None and found.launcher is None
    assert found.metrics == ["test.accuracy", "train_seconds"]
    assert found.methods["nso"].options == {"sigma": 0.1} and found.seeds == [0, 1]


def test_values_are_what_the_options_take(tmp_path):
    options = "{learning_rate: 1e-3, eval_strategy: no, flag: true, label: off, n: 3, k: {a: 1e-2}}"
    found = read(tmp_path, options=options, settings="{0.4: {label_noise: 0.4}, none:}")
    assert found.options == {
        "learning_rate": 1e-3,
        "eval_strategy": "no",
        "flag": True,
        "label": "off",
        "n": 3,
        "k": {"a": 1e-2},
    }
    assert found.settings == {"0.4": {"label_noise": 0.4}, "none": {}}


def test_a_setting_may_be_another_one_with_changes(tmp_path):
    settings = "{few: &few {train_size: 8, steps: 3}, more: {<<: *few, train_size: 99}}"
    assert read(tmp_path, settings=settings).settings == {
        "few": {"train_size": 8, "steps": 3},
        "more": {"train_size": 99, "steps": 3},
    }


def test_a_methods_lists_come_beside_those_of_all_or_in_their_place(tmp_path):
    methods = "{plain: {tune: {learning_rate: [1, 2, 3, 4]}}, nso: {tune: {sigma: [5, 6]}}}"
    found = read(tmp_path, methods=methods, tune=TUNE).methods
    assert found["plain"].candidates == {"learning_rate": [1, 2, 3, 4]}
    assert found["nso"].candidates == {"learning_rate": [1e-3, 3e-3], "sigma": [5, 6]}
    assert found["plain"].num_trials == found["nso"].num_trials == 4


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("validation.accuracy", True), ("validation.loss", False), ("eval_loss", False)],
)
def test_a_loss_is_better_where_it_is_lower(tmp_path, metric, greater):
    tune = f"{TUNE[:-1]}, metric: {metric}}}"
    assert read(tmp_path, tune=tune).tuning.greater_is_better == greater
    said = read(tmp_path, tune=f"{tune[:-1]}, greater_is_better: {str(not greater).lower()}}}")
    assert said.tuning.greater_is_better == (not greater)


def test_tuning_may_leave_options_out(tmp_path):
    tune = f"{TUNE[:-1]}, leave_out: [curvature]}}"
    found = read(tmp_path, tune=tune, options="{curvature: true}").tuning
    assert found.leave_out == ["curvature"] and not read(tmp_path, tune=TUNE).tuning.leave_out


WRONG = {
    "leaving out what is no name": (
        {"tune": f"{TUNE[:-1]}, leave_out: [{{a: 1}}]}}", "options": "{curvature: true}"},
        "tune.leave_out={'a': 1}: not among the options of all runs. Choose of 'curvature'.",
    ),
    "leaving out what nobody asked for": (
        {"tune": f"{TUNE[:-1]}, leave_out: [curvatur]}}", "options": "{curvature: true}"},
        "tune.leave_out='curvatur': not among the options of all runs. Choose of 'curvature'.",
    ),
    "unknown key": (
        {"seed": "1"},
        "comparison='seed': unknown. Choose one of recipe, seeds, options, settings, methods, tune,"
        " metrics, baseline, output_dir, launcher.",
    ),
    "nothing to run": ({"methods": "{}"}, "methods={}: must be given. Write methods: in "),
    "unknown baseline": (
        {"baseline": "sgd"},
        "baseline='sgd': no such method. Choose one of 'plain', 'nso'.",
    ),
    "seeds twice": ({"seeds": "[0, 1, 0]"}, "seeds=[0, 1, 0]: has one twice. Name each once."),
    "a number of seeds": (
        {"seeds": "5"},
        "seeds=5: must be a list of integers, at least 0. Write it as [0, 1, 2, 3, 4].",
    ),
    "seeds in words": ({"seeds": "[one]"}, "seeds=['one']: must be a list of integers, at least 0"),
    "seed beyond NumPy's": ({"seeds": "[4294967296]"}, "seeds=4294967296: must be an integer from"),
    "no metrics": ({"metrics": "[]"}, "metrics=[]: must be a list of at least one. Name one or"),
    "folder that is a list": ({"output_dir": "[a]"}, "output_dir=['a']: must be a text. Correct"),
    "folder that is a number": ({"output_dir": "5"}, "output_dir=5: must be a text. Correct it"),
    "launcher that is a list": ({"launcher": "[a]"}, "launcher=['a']: must be a text. Correct it"),
    "blank launcher": ({"launcher": "' '"}, "launcher=' ': must be a text. Correct it, or leave"),
    "launcher that is not there": (
        {"launcher": "no_such_launcher --now"},
        "launcher='no_such_launcher --now': no such program. Install it, or leave it out for one",
    ),
    "time of several": (
        {"methods": "{plain: {time_of: [nso]}, nso: {}}"},
        "methods.plain.time_of=['nso']: must be a text. Correct it, or leave it out.",
    ),
    "seed as an option": (
        {"options": "{seed: 3}"},
        "options.seed=3: is set here for each run. Use seeds:.",
    ),
    "test as an option": (
        {"methods": "{plain: {test: false}}"},
        "methods.plain.test=False: is set here for each run. Leave it out.",
    ),
    "method that is no mapping": (
        {"methods": "{plain: 0}"},
        "methods.plain=0: must be a mapping. Write 'name: value' lines.",
    ),
    "method of the same name": (
        {"methods": "{plain: {sigma: 0}, plain: {sigma: 1}}"},
        "comparison='plain': stands twice. Give each a name of its own.",
    ),
    "option of the same name beside merged ones": (
        {"settings": "{a: &a {x: 1}, b: {<<: *a, x: 2, x: 3}}"},
        "comparison='x': stands twice. Give each a name of its own.",
    ),
    "time of an unknown method": (
        {"methods": "{plain: {time_of: sam}, nso: {}}"},
        "methods.plain.time_of='sam': no such method. Choose one of 'nso'.",
    ),
    "time of each other": (
        {"methods": "{a: {time_of: b}, b: {time_of: a}, nso: {}}"},
        "methods.a.time_of='b': has time_of itself. Choose one of 'nso'.",
    ),
    "time and steps": (
        {"methods": "{plain: {time_of: nso, max_steps: 9}, nso: {}}"},
        "methods.plain.max_steps=9: time_of says how many steps there are. Leave one out.",
    ),
    "unequal trials": (
        {"methods": "{plain: {}, nso: {tune: {sigma: [1, 2]}}}", "tune": TUNE},
        "tune={'plain': 2, 'nso': 4}: every method must have as many trials. Give 'plain' more "
        "values to try, as of learning_rate.",
    ),
    "fixed and tuned": (
        {"methods": "{plain: {learning_rate: 1e-2}}", "tune": TUNE},
        "methods.plain.learning_rate=0.01: is tuned. Leave it out of methods.plain, or give "
        "learning_rate: [0.01] in its tune.",
    ),
    "tuned without tune": (
        {"methods": "{plain: {tune: {sigma: [1]}}}"},
        "methods.plain.tune={'sigma': [1]}: there is no tune:. Add tune: with its seeds.",
    ),
    "tuned without seeds": (
        {"tune": "{options: {learning_rate: [1]}}"},
        "tune.seeds=None: must be given. Write seeds: [100] under tune:.",
    ),
    "tuned on the test data": (
        {"tune": f"{TUNE[:-1]}, metric: test.loss}}"},
        "tune.metric='test.loss': the test data are read once, for what is compared. Choose by "
        "one of validation.*.",
    ),
    "tuned on what is compared": (
        {"tune": f"{TUNE[:-1]}, metric: after.accuracy}}", "metrics": "[after.accuracy]"},
        "tune.metric='after.accuracy': the test data are read once",
    ),
    "one value to try": (
        {"tune": "{seeds: [1], options: {learning_rate: 1e-3}}"},
        "tune.options.learning_rate=0.001: must be a list of at least one. Write [0.001].",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(tmp_path, name):
    lines, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, **lines)


@pytest.mark.parametrize("text", ["methods: [", "- a", "\xff"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"^(file|recipe)="):
        read(tmp_path, text)
    with pytest.raises(ValueError, match=r"file='none\.yaml': cannot be read"):
        read_comparison(Path("none.yaml"), Path)
