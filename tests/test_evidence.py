"""The tables of docs are what the committed runs say."""

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from benchmarks import sigma_evidence
from benchmarks.evidence import PAGES, RESULTS, ROOT, with_tables
from nso_hf.running.comparison.description import read_comparison
from nso_hf.running.comparison.plan import cells, missing
from nso_hf.running.comparison.records import read_records
from nso_hf.running.comparison.table import rows
from recipes.compare import recipe_file

FILES = sorted((ROOT / "benchmarks" / "comparisons").glob("*.yaml"))


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_the_tables_are_those_of_the_results(file):
    page = file.read_text(encoding="utf-8")
    assert "<!-- end -->" in page and with_tables(page) == page, "python -m benchmarks.evidence"


def test_the_table_of_sigmas_is_that_of_the_results():
    page = sigma_evidence.PAGE.read_text(encoding="utf-8")
    table = sigma_evidence.table(sigma_evidence.tasks())
    assert sigma_evidence.with_table(page, table) == page, "python -m benchmarks.sigma_evidence"


def test_bold_is_within_one_standard_error_of_the_paired_difference():
    for task in sigma_evidence.tasks():
        best = task.values[task.best()]
        assert all(
            task.sign * (task.mean(task.best()) - task.mean(n)) >= 0
            for s in ("absolute", "relative")
            for n in task.grid(s).values()
        )
        for method, values in task.values.items():
            if method != task.best():
                seeds = sorted(values.keys() & best.keys())
                t = ttest_rel([values[s] for s in seeds], [best[s] for s in seeds]).statistic
                is_worse = task.sign * t < -1  # t is NaN where all are equal
                assert task.is_as_good(method) != is_worse, (task.name, method)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_results_are_those_of_the_runs(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = read_comparison(file, recipe_file)
    assert comparison.output_dir == Path("benchmarks", "results", file.stem)
    written = RESULTS / file.stem / "results.json"
    if not written.exists():
        pytest.skip("not run yet")
    records = read_records(comparison.output_dir)
    planned = cells(comparison, records)
    results = json.loads(written.read_text(encoding="utf-8"))
    found = [row.as_json() for row in rows(comparison, planned, records)]
    assert json.loads(json.dumps(found)) == results["rows"], f"nso compare {file} --report"
    waiting = len(missing(planned, records)) + sum(cell.unknown for cell in planned)
    assert waiting == results["missing"]
