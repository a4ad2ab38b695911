"""What was written is what is read, and what cannot be read is named: file, line and cause."""

import csv
import gzip
import json
from decimal import Decimal

import pandas
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nso_hf.running.tables import rows

# Not those that stand alone for half of a character, nor NUL, which no text file holds.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
LOOKS_TYPED = st.sampled_from(
    ["NA", "null", "None", "nan", "007", "12", "", " ", "True", "1e5", "9" * 20, "0.10", "-0", '"']
)
CELL = TEXT | LOOKS_TYPED
COLUMNS = ("question", "answer", "note")
TABLES = st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6)
reading = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def named(table):
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in table]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@given(table=TABLES, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@reading
def test_cells_of_the_csv_module(tmp_path, encoding, suffix, table, quoting):
    path = tmp_path / f"table.{suffix}"
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, "excel-tab" if suffix == "tsv" else "excel", quoting=quoting)
        writer.writerows([COLUMNS, *table])
    assert list(rows(path)) == named(table)


@pytest.mark.parametrize("index", [True, False])
@given(table=TABLES)
@reading
def test_cells_of_pandas(tmp_path, index, table):
    # A lone carriage return is not quoted by pandas, and ends the row for every reader.
    table = [tuple(cell.replace("\r", "") for cell in cells) for cells in table]
    pandas.DataFrame(table, columns=COLUMNS).to_csv(tmp_path / "table.csv", index=index)
    assert list(rows(tmp_path / "table.csv")) == named(table)


VALUE = st.recursive(
    CELL | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELL, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUE, min_size=1), min_size=1)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz"])
@given(objects=OBJECTS, ascii_alone=st.booleans())
@reading
def test_values_of_json(tmp_path, suffix, objects, ascii_alone):
    path = tmp_path / f"table.{suffix}"
    if suffix == "json":
        text = json.dumps(objects, ensure_ascii=ascii_alone, indent=1)
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_alone) + "\n" for row in objects)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert list(rows(path)) == objects
    assert [list(map(type_of, row.values())) for row in rows(path)] == [
        list(map(type_of, row.values())) for row in objects
    ]


def type_of(value):
    """What JSON calls it: 1, 1.0 and true are equal in Python."""
    return float if isinstance(value, float) else type(value)


@given(number=st.decimals(allow_nan=False, allow_infinity=False))
@reading
def test_a_number_of_json_prints_as_it_was_written(tmp_path, number):
    written = str(number)
    path = tmp_path / "table.jsonl"
    path.write_text(f'{{"a": {written}}}')
    ((found,),) = (row.values() for row in rows(path))
    assert str(found) == (written if set(written) & set(".E") else str(int(written)))
    assert found == (float(number) if isinstance(found, float) else Decimal(number))


@given(table=TABLES, numbers=st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=6))
@reading
def test_values_of_parquet(tmp_path, table, numbers):
    columns = dict(zip(COLUMNS, map(list, zip(*table, strict=True)), strict=True))
    columns["number"] = numbers[: len(table)]
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    assert list(rows(tmp_path / "table.parquet")) == [
        {**row, "number": number} for row, number in zip(named(table), numbers, strict=False)
    ]


TWO_ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize(
    "value",
    [
        TWO_ROWS,
        {"a": [1, 2], "b": ["x", "y"]},
        {"a": {"0": 1, "1": 2}, "b": {"0": "x", "1": "y"}},  # DataFrame.to_json
        {"data": TWO_ROWS},
        {"version": "1.0", "data": TWO_ROWS},
    ],
)
def test_json_of_other_shapes(tmp_path, value):
    (tmp_path / "table.json").write_text(json.dumps(value))
    assert list(rows(tmp_path / "table.json")) == TWO_ROWS


def test_an_object_is_a_row_and_so_are_many(tmp_path):
    (tmp_path / "one.json").write_text('{"a": "x", "b": ["y", "z"]}')
    assert list(rows(tmp_path / "one.json")) == [{"a": "x", "b": ["y", "z"]}]
    (tmp_path / "lines.json").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(rows(tmp_path / "lines.json")) == [{"a": 1}, {"a": 2}]


def test_other_separators_and_index_columns(tmp_path):
    (tmp_path / "a.csv").write_text("q;a\n1,5;2\n")
    assert list(rows(tmp_path / "a.csv", separator=";")) == [{"q": "1,5", "a": "2"}]
    (tmp_path / "b.csv").write_text(",q,a,,\n0,x,y,,\n")
    assert list(rows(tmp_path / "b.csv")) == [{"q": "x", "a": "y"}]
    frame = pandas.DataFrame({"q": ["x"], "a": ["y"]}, index=[7])
    frame.to_parquet(tmp_path / "c.parquet")
    assert list(rows(tmp_path / "c.parquet")) == [{"q": "x", "a": "y"}]


BROKEN = [
    ("a.csv", "q,a\n1,2\n1,2,3\n", "line 3 has 3 cells and the header 2"),
    ("a.csv", 'q,a\n"1\n1",2\n1\n', "line 4 has 1 cells and the header 2"),
    ("a.csv", 'q,a\n1,2\nx,"y\nz,1\n', "line 3 begins a row with a broken quote"),
    ("a.csv", 'q,a\n1,"2"3\n', "line 2 begins a row with a broken quote"),
    ("a.csv", "q,a,\nx,y,z\n", "line 2 has a cell in a column without a name"),
    ("a.csv", "q,a,q\nx,y,z\n", "two columns are named 'q'"),
    ("a.csv", "q,a\nx,\0\n", "line 2 has NUL characters"),
    ("a.csv", "q,a\nx,y\n".encode("utf-16-le"), "line 1 has NUL characters"),
    ("a.csv", b"q,a\nx,y\ncaf\xe9,z\n", "line 3 is not utf-8 (byte 0xe9"),
    ("a.csv", "q,a\nx,y\n".encode("utf-16") + b"z", "line 3 is not utf-16"),
    ("a.csv", "", "it has no rows"),
    ("a.csv", "q,a\n", "it has no rows"),
    ("a.csv.gz", "q,a\n1,2\n", "cannot be read (Not a gzipped file"),
    ("a.csv.gz", gzip.compress(b"q,a\n1,2\n")[:-9], "cannot be read (Compressed file ended"),
    ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list, not an object"),
    ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', r"line 2 has half of a character ('\ud83d')"),
    ("a.jsonl", f'{{"a": {"9" * 5000}}}', "line 1 cannot be read (Exceeds the limit"),
    ("a.jsonl", "[" * 100_000, "line 1 cannot be read (maximum recursion"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "line 2 is not utf-8"),
    ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "line 2 cannot be read (an object has the name 'a'"),
    ("a.json", '[{"a": {"b": 1, "b": 2}}]', "line 1 cannot be read (an object has the name 'b'"),
    ("a.json", '[{"a": 1},\n {"a"', "line 2 is not JSON"),
    ("a.json", "[1]", "row 1 is a number, not an object"),
    ("a.json", "true", "it holds a truth value, no rows"),
    ("a.json", "[]", "it has no rows"),
    ("a.json", '{"a": [1], "b": []}', "its columns are of unequal lengths"),
    ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "several tables: train, test"),
    ("a.parquet", "", "not a whole parquet file"),
    ("a.parquet", "PAR1 cut off", "not a whole parquet file"),
    ("a.txt", "q", "not one of .csv, .tsv, .json, .jsonl, .parquet"),
]


@pytest.mark.parametrize(
    ("name", "content", "cause"), BROKEN, ids=[cause for _, _, cause in BROKEN]
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, cause):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        list(rows(path, option="dataset"))
    message = str(raised.value)
    assert message.startswith(f"dataset={str(path)!r}: ") and cause in message
    assert "\n" not in message and message.endswith(".")


def test_rows_before_a_broken_one_are_read(tmp_path):
    """Nothing is held in memory but the row."""
    (tmp_path / "a.csv").write_text("q,a\n1,2\n3\n")
    reader = rows(tmp_path / "a.csv")
    assert next(reader) == {"q": "1", "a": "2"}
    with pytest.raises(ValueError, match="line 3"):
        next(reader)
