"""`nso compare` from the file to the table, on a recipe that is a closed form of its options."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from scipy import stats

from nso_hf.running.comparison.records import working_folder
from recipes.compare import main
from tests.running.comparison import toy_recipe
from tests.tiny_models import save_model

ROOT = Path(__file__).parents[2]
TOY = {
    "recipe": toy_recipe.__file__,
    "seeds": [0, 1, 2, 3, 4],
    "options": {"max_steps": 10},
    "methods": {"plain": {"sigma": 0}, "nso": {"sigma": 0.1}},
}
TUNED = TOY | {
    "settings": {"clean": {}, "40 % wrong": {"label_noise": 0.4}},
    "methods": {
        "plain": {"sigma": 0, "tune": {"learning_rate": [0.01, 0.03, 0.1, 0.3]}},
        "plain, equal time": {
            "sigma": 0,
            "time_of": "nso",
            "tune": {"learning_rate": [0.01, 0.03, 0.1, 0.3]},
        },
        "nso": {"tune": {"sigma": [0.1, 0.4]}},
    },
    "tune": {"seeds": [100], "options": {"learning_rate": [0.1, 1]}},
    "metrics": ["test.accuracy", "train_seconds"],
}


def written(folder, text):
    (folder / "toy.yaml").write_text(yaml.dump(text, None, sort_keys=False))
    return [str(folder / "toy.yaml"), "--output_dir", str(folder / "out")]


def compared(folder, text, *flags):
    main([*written(folder, text), *flags])
    return results(folder)


def results(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def runs(folder):
    """File -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "runs").glob("*")}


def test_figures_are_those_of_the_recipe_and_the_interval_is_scipys(tmp_path, capsys):
    found = compared(tmp_path, TOY)
    assert found["missing"] == 0 and found["notes"] == []
    values = {}
    for row, sigma in zip(found["rows"], (0, 0.1), strict=True):
        values[row["method"]] = row["metrics"]["test.accuracy"]["values"]
        for seed, value in values[row["method"]].items():
            options = toy_recipe.ToyOptions("", seed=int(seed), sigma=sigma)
            assert value == toy_recipe.accuracy(options, "test")
    pairs = [[values[name][str(seed)] for seed in range(5)] for name in ("nso", "plain")]
    interval = stats.ttest_rel(*pairs).confidence_interval(0.95)
    difference = found["rows"][1]["difference"]
    # Differences of .01 of values near 1: rounding of 1e-16 is 1e-14 of them.
    assert difference["low"] == pytest.approx(interval.low, rel=1e-12)
    assert difference["high"] == pytest.approx(interval.high, rel=1e-12)
    said = capsys.readouterr().out
    assert "plain, comparison, seed 4: test.accuracy 0.7" in said and "0 left" in said
    record = json.loads(next((tmp_path / "out" / "runs").glob("nso*_3_*")).read_text())
    assert set(record) == {"run_info", "train_info", "meta_info"}
    assert record["run_info"]["options"] == {"max_steps": 10, "sigma": 0.1, "seed": 3}
    assert record["train_info"]["train_time"] == 0.2 == 0.01 * 10 * 2
    assert set(record["train_info"]["metrics"]) == {
        *("validation", "test", "train_seconds", "steps", "peak_memory_bytes")
    }
    assert record["meta_info"]["package_info"] == {"python": "3"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("results.json", "results.md", "runs", "time.png", "work")
    ]
    left = {path.name for path in (tmp_path / "out" / "work").iterdir()}
    assert left == {"lock", ".gitignore"}


def test_only_what_changed_is_run_again(tmp_path, capsys):
    first = compared(tmp_path, TOY)
    before = runs(tmp_path)
    capsys.readouterr()
    assert compared(tmp_path, TOY) == first and runs(tmp_path) == before
    assert "seed" not in capsys.readouterr().out
    changed = TOY | {"seeds": [0, 1, 2, 3, 4, 5]}
    changed["methods"] = {"renamed": {"sigma": 0}, "nso": {"sigma": 0.2}}
    found = compared(tmp_path, changed)
    after = runs(tmp_path)
    assert before.items() < after.items() and len(after) == len(before) + 1 + 6
    assert [row["finished"] for row in found["rows"]] == [6, 6]
    assert found["rows"][0]["metrics"].keys() == {"test.accuracy", "train_seconds"}


def test_tuning_is_by_validation_and_the_time_is_equal(tmp_path):
    found = compared(tmp_path, TUNED)
    chosen = {(row["setting"], row["method"]): row["chosen"] for row in found["rows"]}
    steps = {"max_steps": 20}  # NSO's 10 steps take twice as long
    assert chosen == {
        ("clean", "plain"): {"learning_rate": 0.1},
        ("clean", "plain, equal time"): {"learning_rate": 0.1} | steps,
        ("clean", "nso"): {"learning_rate": 0.1, "sigma": 0.1},
        ("40 % wrong", "plain"): {"learning_rate": 0.1},
        ("40 % wrong", "plain, equal time"): {"learning_rate": 0.1} | steps,
        ("40 % wrong", "nso"): {"learning_rate": 0.1, "sigma": 0.4},
    }
    times = [row["times_the_baseline"] for row in found["rows"]]
    assert times == pytest.approx([1, 2, 2] * 2, rel=1e-12)
    for path in (tmp_path / "out" / "runs").iterdir():
        record = json.loads(path.read_text())
        is_tuning = record["run_info"]["role"] == "tuning"
        assert ("test" in record["train_info"]["metrics"]) != is_tuning


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "RuntimeError: loss is nan at step 10"),
        ("killed", "killed by signal 9"),
        ("silent", "wrote no results.json"),
        ("diverged", "(diverged: validation loss nan)"),
    ],
)
def test_a_run_that_fails_is_counted_and_the_others_go_on(tmp_path, how, said, capsys):
    methods = {"plain": {"sigma": 0}, "nso": {"sigma": 0.1, "wrong": how}}
    found = compared(tmp_path, TOY | {"methods": methods})
    assert [row["finished"] for row in found["rows"]] == [5, 4]
    assert len(found["rows"][1]["failed"]) == 1 and found["missing"] == 0
    assert found["rows"][1]["difference"]["count"] == 4
    assert "4 of 5, failed 1 of 5" in capsys.readouterr().out
    record = json.loads(next((tmp_path / "out" / "runs").glob("nso*_1_*")).read_text())
    assert said in record["run_info"]["error_msg"]
    assert record["train_info"]["status"] == "failed"
    before = runs(tmp_path)
    compared(tmp_path, TOY | {"methods": methods})
    assert runs(tmp_path) == before
    compared(tmp_path, TOY | {"methods": methods}, "--retry")
    changed = [name for name, when in runs(tmp_path).items() if before[name] != when]
    assert len(changed) == 1 and "nso_comparison_1_" in changed[0]


def test_wrong_options_are_refused_before_anything_is_run(tmp_path):
    methods = {"plain": {"sigma": 0}, "nso": {"sgima": 0.1}}
    message = "methods='nso': refused by toy_recipe.py. option='--sgima': unknown. Did you mean"
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, TOY | {"methods": methods})
    settings = {"small": {}, "large": {"max_steps": "many"}}
    with pytest.raises(ValueError, match="settings='large', methods='plain': refused by toy_rec"):
        compared(tmp_path, TOY | {"settings": settings})
    assert not (tmp_path / "out").exists()


def test_a_figure_that_is_not_there_ends_the_comparison_with_those_that_are(tmp_path):
    there = "Choose one of what is there, as test.accuracy"
    with pytest.raises(ValueError, match=f"metrics='test.f1': .*{there}"):
        compared(tmp_path, TOY | {"metrics": ["test.f1"]})
    assert len(runs(tmp_path)) == 1


def test_a_script_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "script_alone.py").write_text("print(1)")
    with pytest.raises(ValueError, match=r"script_alone.py': no recipe. Give it OPTIONS, a list"):
        compared(tmp_path, TOY | {"recipe": str(tmp_path / "script_alone.py")})
    with pytest.raises(
        ValueError, match=r"recipe='imges': no recipe, and no file\. Use cot, clip,"
    ):
        compared(tmp_path, TOY | {"recipe": "imges"})


def test_two_at_a_time_give_the_same(tmp_path):
    alone = compared(tmp_path, TOY)
    (tmp_path / "two").mkdir()
    assert compared(tmp_path / "two", TOY, "--jobs", "2", "--keep")["rows"] == alone["rows"]
    kept = [path for path in (tmp_path / "two" / "out" / "work").iterdir() if path.is_dir()]
    assert len(kept) == 10 and all((path / "results.json").exists() for path in kept)
    timed = {"plain": {"sigma": 0, "time_of": "nso"}, "nso": {"sigma": 0.1}}
    with pytest.raises(ValueError, match="jobs=2: 'plain' is given the time of another method"):
        compared(tmp_path, TOY | {"methods": timed}, "--jobs", "2")


def test_a_launcher_gives_the_same(tmp_path):
    few = TOY | {"seeds": [1], "methods": {"plain": {"sigma": 0}}}
    alone = compared(tmp_path, few)
    (tmp_path / "launched").mkdir()
    launched = compared(tmp_path / "launched", few | {"launcher": f"{sys.executable} -X utf8"})
    assert launched["rows"] == alone["rows"] and launched["rows"][0]["finished"] == 1


def test_another_process_at_work_is_refused(tmp_path):
    out = tmp_path / "out"
    with working_folder(out), pytest.raises(ValueError, match=f"process {os.getpid()} is at work"):
        compared(tmp_path, TOY)
    assert compared(tmp_path, TOY | {"seeds": [0]})["missing"] == 0


def test_a_dry_run_says_how_many_and_how_long_and_writes_nothing(tmp_path, capsys):
    main([*written(tmp_path, TUNED), "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    total = 2 * (3 * (4 + 5))  # of each setting and method: tuning and seeds
    assert said[-1] == f"{total} runs are missing: how long is unknown before one has ended."
    assert "clean, nso: 5 runs, known once those before them have ended" in said
    assert said[0] == "all: max_steps 10"
    one = "40 % wrong, nso, tuning, seed 100: label_noise 0.4, learning_rate 1, sigma 0.4"
    assert one in said and sum(", tuning, seed 100: " in line for line in said) == 2 * 2 * 4
    assert not (tmp_path / "out").exists()
    few = TOY | {"seeds": [0], "options": {"pause": 0.5}}
    compared(tmp_path, few)
    capsys.readouterr()
    main([*written(tmp_path, few | {"seeds": list(range(10))}), "--dry_run"])
    line = capsys.readouterr().out.splitlines()[-1]
    seconds = int(line.removeprefix("18 runs are missing: about ").removesuffix(" s."))
    assert 9 <= seconds < 90  # 18 runs of half a second, and what starting a process takes


def test_the_report_is_made_without_running(tmp_path):
    measuring = TOY | {"options": {"max_steps": 10, "measures": True}}
    found = compared(tmp_path, measuring)
    out = tmp_path / "out"
    pictures = ["forgetting.png", "robustness.png", "time.png", "trace.png"]
    assert sorted(path.name for path in out.glob("*.png")) == pictures
    for path in [*out.glob("*.png"), out / "results.md", out / "results.json"]:
        path.unlink()
    assert compared(tmp_path, measuring, "--report") == found
    assert sorted(path.name for path in out.glob("*.png")) == pictures
    (next((out / "runs").iterdir())).write_text('{"run_info": ')
    with pytest.raises(ValueError, match=r"output_dir='.*json': no record of a run\. Remove it"):
        compared(tmp_path, measuring, "--report")


def started(folder, text):
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), *written(folder, text)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def is_alive(process_id):
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [None, sys.executable])
def test_what_a_killed_comparison_had_started_ends(tmp_path, launcher):
    text = TOY | {"options": {"pause": 60.0}, "launcher": launcher}
    process = started(tmp_path, text)
    begun = wait_for(lambda: list(tmp_path.glob("out/work/*/begun")))[0]
    of_run = int(wait_for(begun.read_text))
    assert is_alive(of_run)
    process.kill()  # it alone
    wait_for(lambda: not is_alive(of_run))
    process.communicate()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_an_interrupt_ends_in_the_table_of_what_there_is(tmp_path):
    text = TOY | {"options": {"max_steps": 10, "pause": 1.0}}
    process = started(tmp_path, text)
    for line in process.stdout:
        if "seed 0: test.accuracy" in line:
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in said
    assert "Interrupted; the same command goes on." in said
    assert "Not complete" in said and "runs are missing" in said
    found = results(tmp_path)
    assert 0 < found["missing"] == 10 - len(runs(tmp_path))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_as_uninterrupted(tmp_path):
    """The process group of the comparison; what it had started notices, and ends too."""
    text = TUNED | {"options": {"max_steps": 10, "pause": 0.15}}
    (tmp_path / "whole").mkdir()
    whole = compared(tmp_path / "whole", text)
    chance = random.Random(time.time_ns())
    for _ in range(5):
        process = started(tmp_path, text)
        process.stdout.readline()  # the first run has ended
        time.sleep(chance.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.read()  # until those that it had started have ended
    killed = len(runs(tmp_path))
    assert 5 <= killed < 54
    assert compared(tmp_path, text) == whole
    assert (tmp_path / "out" / "results.md").read_text() == (
        tmp_path / "whole" / "out" / "results.md"
    ).read_text()
    assert {path.name for path in (tmp_path / "out" / "work").iterdir()} == {"lock", ".gitignore"}


@pytest.mark.slow
def test_a_recipe_of_the_library(tmp_path):
    """Figures are those of the recipe alone; plain training gets the time that NSO takes."""
    from recipes import cot_finetuning
    from tests.recipes.test_cot_recipe import flags

    options = {
        "model_name_or_path": str(save_model("gpt2", tmp_path / "model")),
        "dataset": "reasoning_gym:chain_sum",
        "dataset_kwargs": {"max_terms": 2, "max_digits": 1},
        "train_size": 40,
        "validation_size": 6,
        "test_size": 8,
        "max_new_tokens": 12,
        "max_length": 220,
        "use_cpu": True,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "evaluate_before": False,
        "curvature": True,
        "curvature_samples": 2,
        "accuracy_in_bits": [4],
    }
    text = TOY | {
        "recipe": "cot",
        "seeds": [0, 1],
        "options": options,
        "methods": {
            "plain": {"sigma": 0},
            "plain, equal time": {"sigma": 0, "time_of": "nso"},
            "nso": {"sigma": 0.02},
        },
        "metrics": ["curvature.trace", "train_seconds", "steps", "accuracy_in_bits.4.accuracy"],
    }
    found = compared(tmp_path, text)
    plain, longer, nso = found["rows"]
    assert [row["finished"] for row in found["rows"]] == [2, 2, 2]
    steps = [row["metrics"]["steps"]["values"]["1"] for row in found["rows"]]
    assert steps == [12, longer["chosen"]["max_steps"], 12] and steps[1] > 12
    own = {"max_steps": 12, "seed": 1, "learning_rate": 1e-3, "evaluate_before": "false"}
    own |= {"curvature": "true", "curvature_samples": 2}
    cot_finetuning.main(flags(options["model_name_or_path"], tmp_path / "alone", **own))
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())["curvature"]
    trace = alone["trace"]
    # The same program on the same machine: to the last bit.
    assert nso["metrics"]["curvature.trace"]["values"]["1"] == trace
    assert plain["metrics"]["curvature.trace"]["values"]["1"] != trace
    assert len(nso["metrics"]["accuracy_in_bits.4.accuracy"]["values"]) == 2
    assert (tmp_path / "out" / "trace.png").exists()
