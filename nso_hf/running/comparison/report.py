"""The table on the terminal, as text and as JSON, and the pictures."""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from nso_hf.running.comparison.description import Comparison
from nso_hf.running.comparison.plan import Cell, Record, missing
from nso_hf.running.comparison.plots import plot
from nso_hf.running.comparison.records import write
from nso_hf.running.comparison.table import Row, header, notes, rows, texts_of


def report(comparison: Comparison, planned: Sequence[Cell], records: Mapping[str, Record]) -> None:
    """Print the table; write results.md, results.json and the pictures there are figures for."""
    found, output = rows(comparison, planned, records), comparison.output_dir
    waiting = len(missing(planned, records)) + sum(cell.unknown for cell in planned)
    remarks = notes(comparison, found, records, waiting)
    results = {
        "comparison": comparison.written,
        "missing": waiting,
        "rows": [row.as_json() for row in found],
        "notes": remarks,
    }
    write(output / "results.json", json.dumps(results, indent=2) + "\n")
    write(output / "results.md", as_text(comparison, found, remarks))
    pictures = plot(comparison, planned, records)
    files = [output / "results.md", output / "results.json", *pictures]
    _print(comparison, found, remarks, files)


def as_text(comparison: Comparison, found: Sequence[Row], remarks: Sequence[str]) -> str:
    """In Markdown: a table for each setting."""
    lines = []
    for setting, group in groupby(found, lambda row: row.setting):
        lines += [f"## {setting}", ""] if setting else []
        lines += _line(header(comparison)), "|---" * len(header(comparison)) + "|"
        lines += [_line(texts_of(row)) for row in group]
        lines.append("")
    return "\n".join([*lines, *(f"* {remark}" for remark in remarks)]).rstrip() + "\n"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _print(
    comparison: Comparison, found: Sequence[Row], remarks: Sequence[str], files: Sequence[Path]
) -> None:
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 160
    console = Console(markup=False, emoji=False, width=width)  # names are shown as they are
    *titles, _ = header(comparison)
    for setting, group in groupby(found, lambda row: row.setting):
        table = Table(title=setting or comparison.recipe.stem)
        for number, title in enumerate(titles):
            folded = title.replace(".", ".\n").replace(": ", ":\n")
            table.add_column(folded, justify="left" if number == 0 else "right", overflow="fold")
        chosen = []
        for row in group:
            *texts, last = texts_of(row)
            table.add_row(*texts)
            chosen += [f"{row.method}: {last}"] if last else []
        console.print(table)
        console.print(f"Chosen: {'; '.join(chosen)}." if chosen else "", soft_wrap=True)
    for remark in remarks:
        console.print(remark, soft_wrap=True)
    console.print("Written: " + ", ".join(map(str, files)), soft_wrap=True)
