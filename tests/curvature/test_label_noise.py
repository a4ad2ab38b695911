"""The experiment of docs/curvature.md, shortened."""

import pytest

from benchmarks.label_noise import COLUMNS, WAYS, mean, run, table


def test_one_run_of_it():
    result = run("two-sided, 0.05", seed=0, epochs=2)
    assert set(COLUMNS) <= set(result)
    assert 10 < result["accuracy"] <= 100 and result["trace"] > 0
    assert result["bound"] > 0 and result["distance"] > 0
    rows = table({"two-sided, 0.05": [result, result]}, COLUMNS).splitlines()
    assert len(rows) == 3 and rows[2].startswith("| two-sided, 0.05 | ")


def test_mean_and_standard_error():
    assert mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


def test_all_ways_cost_the_same():
    """Gradients in each step times epochs: two, but for plain training of the same epochs."""
    for way, options in WAYS.items():
        sides = 2 if options.get("two_sided", True) and options["sigma"] else 1
        cost = sides * options.get("num_perturbations", 1) * options.get("epochs", 1)
        assert cost == (1 if way == "plain, same epochs" else 2)
