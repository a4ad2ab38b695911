"""The tables of docs/evidence.md and docs/performance.md are what the committed runs say."""

import json
from pathlib import Path

import pytest

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
