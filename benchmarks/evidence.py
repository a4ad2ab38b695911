"""Put the figures of the committed comparisons and benchmarks into docs/evidence.md and
docs/performance.md.

    python -m benchmarks.evidence

There, a line

    <!-- NAME (METHOD; METHOD) | TITLE = METRIC | TITLE = METRIC -->

is followed by the table of benchmarks/results/NAME/results.json, which `nso compare` wrote, with
these columns, of these methods (all without the brackets); a title that ends with "%" is of
hundredths. `<!-- step_cost -->` is followed by what benchmarks.step_cost wrote.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import step_cost
from nso_hf.running.figures import with_error, with_interval

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("evidence.md", "performance.md")]
RESULTS = ROOT / "benchmarks" / "results"


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    made, begun = [], False
    for line in page.splitlines():
        if found := re.fullmatch(r"<!-- (\w+)(?: \((.*)\))? \| (.*) -->", line):
            name, methods, titles = found.groups()
            columns = dict(column.split(" = ") for column in titles.split(" | "))
            only = methods.split("; ") if methods else None
            made += [line, *tables(name, columns, only), "<!-- end -->"]
            begun = True
        elif line == "<!-- step_cost -->":
            file = step_cost.RESULTS / "results.json"
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
            made += [line, *"\n".join(map(step_cost.table, results)).splitlines(), "<!-- end -->"]
            begun = True
        elif line == "<!-- end -->":
            begun = False
        elif not begun:
            made.append(line)
    return "\n".join(made) + "\n"


def tables(
    name: str, columns: Mapping[str, str], only: Sequence[str] | None = None
) -> Iterator[str]:
    """The lines of the tables of a comparison, one for each of its settings, and what they are
    made from."""
    results = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
    first, *_ = columns
    baseline = results["comparison"].get("baseline") or next(iter(results["comparison"]["methods"]))
    titles = ["", *columns, f"{first}: difference to {baseline}", "time"]
    for setting, rows in groupby(results["rows"], lambda row: row["setting"]):
        yield from ([f"#### {setting}", ""] if setting else [])
        yield _line(titles)
        yield "|---" * len(titles) + "|"
        for row in rows:
            if only is not None and row["method"] not in only:
                continue
            scale = 100 if first.endswith("%") else 1
            cells = [_mean(row["metrics"].get(m), t) for t, m in columns.items()]
            times = row["times_the_baseline"]
            time = "" if times is None else f"x {times:.2f}"
            yield _line([row["method"], *cells, _difference(row["difference"], scale), time])
        yield ""
    yield _made_from(name, results)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(metric: Mapping[str, Any] | None, title: str) -> str:
    if metric is None:
        return ""
    scale = 100 if title.endswith("%") else 1
    if metric["stderr"] is None:
        return f"{scale * metric['mean']:.4g}"
    return with_error(scale * metric["mean"], scale * metric["stderr"])


def _difference(found: Mapping[str, Any] | None, scale: int) -> str:
    """Bold where the interval of 95 % is on one side of 0."""
    if found is None or found["low"] is None:
        return ""
    mean, low, high = (scale * found[name] for name in ("mean", "low", "high"))
    text = with_interval(mean, low, high)
    return f"**{text}**" if low > 0 or high < 0 else text


def _made_from(name: str, results: Mapping[str, Any]) -> str:
    records = [json.loads(file.read_text()) for file in (RESULTS / name / "runs").glob("*.json")]
    hours = sum(record["run_info"]["total_time"] for record in records) / 3600
    failed = sum(record["train_info"]["status"] == "failed" for record in records)
    seeds = len(results["comparison"]["seeds"])
    text = f"{len(records)} runs, {failed} of them failed; {seeds} seeds; {hours:.1f} hours; "
    missing = results["missing"]
    still = f" **{missing} runs are missing: to be read as a first look.**" if missing else ""
    return f"{text}`nso compare benchmarks/comparisons/{name}.yaml`{still}"


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
