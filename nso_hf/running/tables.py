"""Reading the rows of a local table as they were written: nothing is retyped, nothing is guessed.

    for row in rows("train.csv"):
        row["answer"]

`.csv` and `.tsv`: a cell is the text that stands there ("NA", "007", "1e5", "" are what they are).
`.json` and `.jsonl`: a value is what JSON says; `str` of a number is how it was written.
`.parquet`: the values of its columns. Each of the text formats may be compressed (`.csv.gz`).
Text is UTF-8, with or without a byte-order mark, or what another byte-order mark says.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nso_hf.refusal import Refusal, refusal

Row = dict[str, Any]

csv.field_size_limit(2**31 - 1)  # of the process, else 131072 characters: a cell may be longer

_BYTE_ORDER_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def is_table(path: str | Path) -> bool:
    """Whether the name of a file says that `rows` reads it."""
    return _suffix(Path(path)) in SUFFIXES


def rows(path: str | Path, *, separator: str | None = None, option: str = "data") -> Iterator[Row]:
    """The rows of a table, one after the other and not all in memory (but for a `.json` file).

    Args:
        separator: of the cells of a `.csv` or `.tsv` file; by default a comma and a tab.
        option: what the user gave the path as; messages begin with it.

    Raises:
        ValueError: while reading: the file is no table, is broken, or is empty. One line that
            names the file, the line of it and the cause.
    """
    path = Path(path)

    def refuse(rule: str, cure: str) -> Refusal:
        return refusal(option, str(path), rule, cure)

    if not path.is_file():
        raise refuse("no such file", "Check the path")
    if not is_table(path):
        raise refuse(f"not one of {', '.join(SUFFIXES)}", "Convert it")
    is_empty = True
    try:
        for row in _READERS[_suffix(path)](path, separator, refuse):
            is_empty = False
            yield row
    except (OSError, EOFError, zlib.error) as error:  # of the disk, or of the compression
        raise refuse(f"cannot be read ({error})", "Check the file, or copy it again") from error
    if is_empty:
        raise refuse("it has no rows", "Check the path, and what wrote the file")


class WrittenNumber(float):
    """A number of JSON with a point or an exponent. `str` gives it as it was written."""

    def __new__(cls, written: str) -> "WrittenNumber":
        number = super().__new__(cls, written)
        number._written = written
        return number

    _written: str

    def __str__(self) -> str:
        return self._written


def encoding_of(start: bytes) -> str:
    """The encoding of a text, by its first bytes."""
    return next((e for mark, e in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


_Refuse = Callable[[str, str], Refusal]


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _lines(path: Path, refuse: _Refuse) -> Iterator[str]:
    """The lines of a text, with their ends."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        start = file.read(4)
    encoding = encoding_of(start)
    try:
        with opened(path, "rt", encoding=encoding, newline="") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    rule = f"line {number} has NUL characters: it is no text, or in UTF-16"
                    raise refuse(rule, "Save it as UTF-8")
                yield line
    except UnicodeDecodeError:  # its position is that in a block of the file
        with opened(path, "rb") as file:
            content = file.read()
        try:
            content.decode(encoding)
        except UnicodeDecodeError as error:
            number = content[: error.start].decode(encoding).count("\n") + 1
            wrong = content[error.start : error.start + 1].hex()
            rule = f"line {number} is not {encoding} (byte 0x{wrong}: {error.reason})"
            raise refuse(rule, "Save it as UTF-8, or begin it with a byte-order mark") from error


def _separated(path: Path, separator: str | None, refuse: _Refuse) -> Iterator[Row]:
    delimiter = separator or ("\t" if _suffix(path) == ".tsv" else ",")
    reader = csv.reader(_lines(path, refuse), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1  # where the row begins
    try:
        for cells in reader:
            if not cells:  # a blank line
                pass
            elif not names:
                names = cells
                _check_names(names, refuse)
            elif len(cells) != len(names):
                rule = f"line {line} has {len(cells)} cells and the header {len(names)}"
                cure = f'Put cells that hold {delimiter!r} or a line break in quotes ("...")'
                raise refuse(rule, cure)
            else:
                row = dict(zip(names, cells, strict=True))
                # An unnamed first column is pandas' index. Others are of a comma too many.
                if any(cells[i] for i, name in enumerate(names) if i > 0 and not name):
                    rule = f"line {line} has a cell in a column without a name"
                    cure = f"Name the column, or put cells that hold {delimiter!r} in quotes"
                    raise refuse(rule, cure)
                row.pop("", None)
                yield row
            line = reader.line_num + 1
    except csv.Error as error:
        rule = f"line {line} begins a row with a broken quote ({error})"
        cure = 'Close each quote; write a quote within a quoted cell twice ("")'
        raise refuse(rule, cure) from error


def _check_names(names: list[str], refuse: _Refuse) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise refuse(f"two columns are named {twice[0]!r}", "Give each a name of its own")


def _json_lines(path: Path, separator: None, refuse: _Refuse) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, refuse), 1):
        for value in _json_values(line.rstrip(), refuse, number):
            if not isinstance(value, dict):
                rule = f"line {number} is {kind(value)}, not an object"
                raise refuse(rule, 'Write {"column": value, ...} in each line, or name it .json')
            yield value


def _json(path: Path, separator: None, refuse: _Refuse) -> Iterator[Row]:
    """A list of rows; an object of columns; an object with a list of rows in it; JSON lines."""
    values = list(_json_values("".join(_lines(path, refuse)), refuse))
    found = values[0] if len(values) == 1 else values
    if isinstance(found, dict):
        found = _rows_of_object(found, refuse)
    if not isinstance(found, list):
        raise refuse(f"it holds {kind(found)}, no rows", "Write a list of objects")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            rule = f"row {number} is {kind(row)}, not an object"
            raise refuse(rule, 'Write each row as {"column": value, ...}')
        yield row


def _rows_of_object(value: Row, refuse: _Refuse) -> list[Row]:
    lists = [name for name in value if isinstance(value[name], list)]
    tables = [name for name in lists if value[name] and isinstance(value[name][0], dict)]
    if len(tables) > 1 and len(tables) == len(value):
        rule = f"it holds several tables: {', '.join(tables)}"
        raise refuse(rule, "Write each to a file of its own")
    if len(tables) == 1 and (len(value) == 1 or len(lists) < len(value)):
        found: list[Row] = value[tables[0]]
        return found
    columns: dict[str, list[Any]] = {name: value[name] for name in lists}
    if all(isinstance(column, dict) and "".join(column).isdigit() for column in value.values()):
        columns = {name: list(column.values()) for name, column in value.items()}  # of pandas
    if not columns or len(columns) < len(value):
        return [value]  # one row
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise refuse(f"its columns are of unequal lengths {lengths}", "Write a list of objects")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _named_once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return row


_DECODER = json.JSONDecoder(
    parse_float=WrittenNumber, parse_constant=WrittenNumber, object_pairs_hook=_named_once
)
_SPACE = re.compile(r"\s*")
_HALF = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


def _json_values(text: str, refuse: _Refuse, line: int = 1) -> Iterator[Any]:
    """The values that stand one after the other in a text, which begins at a line of the file."""
    position = 0
    try:
        while (position := _SPACE.match(text, position).end()) < len(text):  # type: ignore[union-attr]
            value, end = _DECODER.raw_decode(text, position)
            if _HALF.search(text, position, end):
                json.dumps(value, ensure_ascii=False).encode()
            yield value
            position = end
    except json.JSONDecodeError as error:
        number, cause = line + error.lineno - 1, error.msg.removesuffix(" at")
        rule = f"line {number} is not JSON ({cause} at column {error.colno})"
        cure = "Check that it is whole; write .jsonl as one object in each line"
        raise refuse(rule, cure) from error
    except UnicodeEncodeError as error:
        number = line + text.count("\n", 0, position)
        rule = f"line {number} has half of a character ({error.object[error.start]!a})"
        raise refuse(rule, "Write the character whole, or leave it out") from error
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
        number = line + text.count("\n", 0, position)
        raise refuse(f"line {number} cannot be read ({error})", "Check that value") from error


def kind(value: object) -> str:
    """What a message calls a value that is no text."""
    names: dict[type, str] = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        WrittenNumber: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _parquet(path: Path, separator: None, refuse: _Refuse) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, refuse)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    row.pop("__index_level_0__", None)  # pandas' index
                    yield row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise refuse(f"not a whole parquet file ({reason})", "Write or copy it again") from error


_READERS: dict[str, Callable[[Path, Any, _Refuse], Iterator[Row]]] = {
    ".csv": _separated,
    ".tsv": _separated,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
