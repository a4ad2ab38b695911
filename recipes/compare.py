r"""Compare methods over settings and seeds, on any recipe, as a YAML file says.

    nso compare FILE.yaml --dry_run
    nso compare FILE.yaml
    nso compare FILE.yaml --report

Runs what is missing, each run in a process of its own, and keeps one JSON file of each; an
interrupted comparison goes on, and a run that fails is counted. Prints a table with paired
differences to the baseline, and writes it with pictures into the output folder. docs/compare.md
describes the file.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from nso_hf.__main__ import COMMANDS
from nso_hf.refusal import check_integer, needs, refusal
from nso_hf.running.comparison.description import Comparison, Options, read_comparison
from nso_hf.running.comparison.execution import check_options, run_all
from nso_hf.running.comparison.plan import (
    Cell,
    Record,
    Run,
    cells,
    figure,
    first_of_each,
    missing,
    nearest,
    numbers,
)
from nso_hf.running.comparison.records import (
    failure_of,
    forget_failed,
    read_records,
    working_folder,
    write_record,
)
from nso_hf.running.comparison.report import report
from nso_hf.running.program import CommandParser, folder, run
from nso_hf.running.readiness import check_writable


def parser() -> argparse.ArgumentParser:
    made = CommandParser("compare", __doc__)
    add = made.add_argument
    add("file", type=Path, metavar="FILE.yaml", help="what is compared (docs/compare.md)")
    add("--output_dir", type=folder, help="in place of the file's (default: runs/compare/NAME)")
    add("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    either = made.add_mutually_exclusive_group().add_argument
    either(
        "--dry_run", "--dry-run", action="store_true", help="say what would be run, and how long"
    )
    either("--report", action="store_true", help="only make the table and pictures anew")
    add("--retry", action="store_true", help="run those again that failed")
    add("--keep", action="store_true", help="keep what runs wrote, in OUTPUT_DIR/work")
    return made


def recipe_file(name: str) -> Path:
    """The script of a recipe by its command, or by its path.

    Raises:
        ValueError: there is none.
    """
    scripts = {command: module.rpartition(".") for command, (module, _) in COMMANDS.items()}
    known = {
        command: Path(__file__).with_name(f"{script}.py")
        for command, (package, _, script) in scripts.items()
        if package == "nso_hf.recipes" and command != "compare"
    }
    if name not in known and not Path(name).is_file():
        cure = f"Use {', '.join(known)}, or the path of a script"
        raise refusal("recipe", name, "no recipe, and no file", cure)
    return known.get(name, Path(name)).resolve()


def read(options: argparse.Namespace) -> Comparison:
    """What the file says, with what the command line says of it."""
    check_integer("jobs", options.jobs, 1, "Leave it out to run one at a time")
    comparison = read_comparison(options.file, recipe_file)
    timed = [name for name, method in comparison.methods.items() if method.time_of is not None]
    if timed and options.jobs > 1:
        rule = f"{timed[0]!r} is given the time of another method, and runs slow each other down"
        raise refusal("jobs", options.jobs, rule, "Leave it out")
    if options.output_dir is not None:
        comparison = replace(comparison, output_dir=options.output_dir)
    return comparison


def say_what_is_missing(planned: Sequence[Cell], records: Mapping[str, Record]) -> None:
    """How many runs, which, and about how long."""
    waiting = missing(planned, records)
    shared = shared_options(waiting)
    if shared:
        print(f"all: {in_words(shared)}")
    for one in waiting:
        own = {name: value for name, value in one.options.items() if name not in shared}
        print(f"{one}: {in_words(own)}")
    for cell in planned:
        if cell.unknown:
            place = ", ".join(word for word in (cell.setting, cell.method) if word)
            print(f"{place}: {cell.unknown} runs, known once those before them have ended")
    methods = methods_of_missing(planned, records)
    print(f"{len(methods)} runs are missing: {how_long(methods, records)}.")


def shared_options(runs: Sequence[Run]) -> Options:
    """What all of them have, with the same value."""
    first, *others = [run.options for run in runs] or [{}]
    return {
        name: value
        for name, value in first.items()
        if all(name in options and options[name] == value for options in others)
    }


def in_words(options: Options) -> str:
    """All but the seed, which the name of a run says."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if name != "seed")


def methods_of_missing(planned: Sequence[Cell], records: Mapping[str, Record]) -> list[str]:
    """The method of each run that is missing, also of those not known yet."""
    known = [run.method for run in missing(planned, records)]
    return known + [cell.method for cell in planned for _ in range(cell.unknown)]


def how_long(methods: Sequence[str], records: Mapping[str, Record]) -> str:
    """Of runs of these methods, one after the other, by those that have ended."""
    seconds: dict[str, list[float]] = {}
    for record in records.values():
        if record["train_info"]["status"] == "success":
            info = record["run_info"]
            seconds.setdefault(info["method"], []).append(info["total_time"])
    if not seconds:
        return "how long is unknown before one has ended"
    mean = fmean(fmean(of) for of in seconds.values())
    total = sum(fmean(seconds[method]) if method in seconds else mean for method in methods)
    return f"about {total / 60:.0f} min" if total > 90 else f"about {total:.0f} s"


def check_figures(comparison: Comparison, one: Run, record: Record) -> None:
    """
    Raises:
        ValueError: a run has not what it is judged by.
    """
    tuning = comparison.tuning
    is_tuned = one.role == "tuning" and tuning is not None
    option = "tune.metric" if is_tuned else "metrics"
    metric = tuning.metric if is_tuned and tuning is not None else comparison.metrics[0]
    there = numbers(record["train_info"]["metrics"])
    if record["train_info"]["status"] == "success" and metric not in there:
        cure = f"Choose one of what is there, as {nearest(metric, there)}; what has run is kept"
        raise refusal(option, metric, f"results.json of {one.name} does not have it", cure)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    comparison = read(options)
    needs("nso compare", "recipes", "matplotlib", "rich", "scipy")
    output = comparison.output_dir
    if not options.dry_run:
        check_writable("output_dir", output)
    if options.report:
        records = read_records(output)
        report(comparison, cells(comparison, records), records)
        return
    check_options(comparison.recipe, first_of_each(comparison), output / "work" / "run")
    if options.dry_run:
        records = read_records(output)
        say_what_is_missing(cells(comparison, records), records)
        return
    with working_folder(output) as folder:
        if options.retry:
            forget_failed(output)
        records = read_records(output)
        try:
            run_missing(comparison, records, folder, options)
        except KeyboardInterrupt:
            report(comparison, cells(comparison, records), records)
            raise SystemExit("\nInterrupted; the same command goes on.") from None
    report(comparison, cells(comparison, records), records)


def run_missing(
    comparison: Comparison, records: dict[str, Record], folder: Path, options: argparse.Namespace
) -> None:
    """Run what there is to run; add to the records, and write them."""

    def next_runs() -> list[Run]:
        return missing(cells(comparison, records), records)

    how = {"jobs": options.jobs, "launcher": comparison.launcher, "keep": options.keep}
    with closing(run_all(comparison.recipe, next_runs, folder, **how)) as ended:
        for one, record in ended:
            write_record(comparison.output_dir, one, record)
            records[one.key] = record
            check_figures(comparison, one, record)
            print(f"{one}: {outcome(comparison, record)}", end="; ")
            planned = cells(comparison, records)
            methods = methods_of_missing(planned, records)
            print(f"{len(methods)} left, {how_long(methods, records)}", flush=True)


def outcome(comparison: Comparison, record: Record) -> str:
    info = record["run_info"]
    if info["error_msg"]:
        return f"failed, {failure_of(record)}"
    value = figure(record, comparison.metrics[0])
    said = f"{comparison.metrics[0]} {value:.4g}, " if value is not None else ""
    return f"{said}{info['total_time']:.1f} s"


if __name__ == "__main__":
    run(main)
