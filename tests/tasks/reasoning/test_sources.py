"""The rows of a split, wherever they are: what is found, and what a message says of the rest."""

import json
import shutil

import pytest

from nso_hf.tasks.reasoning.examples import Columns, Example, load_examples


def rows(split, count=2):
    return [{"question": f"{split} {i}?", "rationale": "r", "answer": str(i)} for i in range(count)]


def write(path, split, count=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows(split, count)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(split, count)))


def questions(folder, split, **options):
    found = load_examples(str(folder), split, **options)
    return None if found is None else [example.question for example in found]


@pytest.mark.parametrize(
    "names",
    [
        {"train": ["train.jsonl"], "test": ["test.jsonl"], "validation": ["dev.jsonl"]},
        {"train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]},
        {"train": ["data/train-00000-of-00001.parquet"], "test": ["data/test.jsonl"]},
        {"train": ["train/a.parquet", "train/b.parquet"], "validation": ["valid/0000.parquet"]},
    ],
)
def test_layouts_of_folders(tmp_path, names):
    (tmp_path / "notes.txt").write_text("not a table")
    for split, files in names.items():
        for number, file in enumerate(files):
            write(tmp_path / file, f"{split} {number}")
    for split in ("train", "test", "validation"):
        wanted = [f"{split} {n} {i}?" for n in range(len(names.get(split, []))) for i in range(2)]
        assert questions(tmp_path, split) == (wanted or None)


CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
"""


@pytest.mark.parametrize("has_card", [True, False])
def test_a_copy_of_a_data_set_with_configurations(tmp_path, has_card):
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            write(tmp_path / config / f"{split}-00000-of-00001.parquet", f"{config} {split}")
    if has_card:
        (tmp_path / "README.md").write_text(CARD)
    main, socratic = (
        ["main train 0?", "main train 1?"],
        ["socratic train 0?", "socratic train 1?"],
    )
    assert questions(tmp_path, "train", config="main") == main
    assert questions(tmp_path, "train", config="socratic") == socratic
    assert questions(tmp_path / "main", "train") == main
    # The configuration that a preset means by itself: in copies that have it, and those without.
    with pytest.raises(ValueError, match="row 1: preset gsm8k"):
        load_examples(str(tmp_path), "train", preset="gsm8k")
    with pytest.raises(ValueError, match="row 1: preset gsm8k"):
        load_examples(str(tmp_path / "main"), "train", preset="gsm8k")
    with pytest.raises(ValueError, match="none"):
        load_examples(str(tmp_path), "train", config="none")
    if not has_card:
        with pytest.raises(ValueError, match=r"no split 'train', but 'main', 'socratic'"):
            load_examples(str(tmp_path), "train")


def test_what_the_datasets_library_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    one, other = Dataset.from_list(rows("train")), Dataset.from_list(rows("test"))
    DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "splits")
    one.save_to_disk(tmp_path / "one")
    assert questions(tmp_path / "splits", "test") == ["test 0?", "test 1?"]
    assert questions(tmp_path / "splits", "validation") is None
    assert questions(tmp_path / "one", "train") == ["train 0?", "train 1?"]
    shutil.rmtree(tmp_path / "splits" / "train")
    with pytest.raises(ValueError, match=r"^dataset='.*splits': "):
        load_examples(str(tmp_path / "splits"), "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": "", "train.csv": ""}, "train.csv and train.jsonl are the same split"),
        ({"data/train-00000-of-00003.jsonl": ""}, "has 1 of the 3 files of the split 'train'"),
        ({"test.jsonl": ""}, "has no split 'train', but 'test'"),
        ({"readme.txt": ""}, "the folder has no .csv"),
        ({"README.md": "---\na: [\n---\n", "train.jsonl": ""}, "Mend its header"),
        ({"README.md": CARD}, "Set --dataset_config to one of main, socratic"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as raised:
        load_examples(str(tmp_path), "train")
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_values_are_what_was_written(tmp_path, suffix):
    written = ["NA", "null", "None", "007", "12", "True", "1e5", "0.50", "9" * 20, "  5", "A, B"]
    path = tmp_path / f"train.{suffix}"
    if suffix == "csv":
        lines = [f'q{i},r,"{value}"' for i, value in enumerate([*written, ""])]
        path.write_text("question,rationale,answer\n" + "\n".join(lines))
    else:
        bare = ["5", "0.5", "1e5", "9" * 20, "true", "-0.10"]  # not texts, but for JSON
        values = [*map(json.dumps, written), '""', *bare]
        lines = [
            '{"question": %d, "rationale": "r", "answer": %s}' % (i, v)
            for i, v in enumerate(values)
        ]
        path.write_text("\n".join(lines))
        written = [*written, "", *bare]
    found = load_examples(str(path), "train")
    assert [example.answer for example in found] == [*written, *([""] if suffix == "csv" else [])]


@pytest.mark.parametrize(
    ("row", "preset", "cause"),
    [
        ({"question": "q", "answer": None}, "columns", "row 2: 'answer' is null"),
        ({"question": "q", "answer": ["5"]}, "columns", "row 2: 'answer' is a list"),
        ({"question": "q", "answer": {"a": 5}}, "columns", "row 2: 'answer' is an object"),
        ({"question": "q", "answer": float("nan")}, "columns", "row 2: 'answer' is not a number"),
        ({"question": None, "answer": "5"}, "columns", "row 2: 'question' is null"),
        ({"question": " ", "answer": "5"}, "columns", "row 2: 'question' is blank"),
        ({"question": ["q"], "answer": "5"}, "columns", "row 2: 'question' is a list"),
        (
            {"question": "q", "answer": "5", "rationale": [["r"]]},
            "columns",
            "'rationale' is a list",
        ),
        ({"question": "q", "answers": "5"}, "columns", "column='answer': row 2 of"),
        ({"question": "q", "answer": "5"}, "gsm8k", "row 2: preset gsm8k expects"),
        ({"question": "q", "answer": "s\n####"}, "gsm8k", "row 2: preset gsm8k expects"),
        ({"question": "q", "answer": "A", "choices": "x"}, "commonsense_qa", "row 2: 'choices' is"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path, row, preset, cause):
    good = {"question": "q", "answer": "s #### 5", "choices": {"label": ["A"], "text": ["x"]}}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row))
    with pytest.raises(ValueError) as raised:
        load_examples(str(path), "train", preset=preset)
    message = str(raised.value)
    assert cause in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1,234", "1234"),
        ("$1,234,567.50", "$1234567.50"),
        ("1,234 apples", "1234 apples"),
        ("(3, 4)", "(3, 4)"),
        ("(3,400)", "(3,400)"),
        ("1,2,3", "1,2,3"),
        ("1,234, 5", "1,234, 5"),
        ("12,34", "12,34"),
    ],
)
def test_the_commas_of_thousands_alone_are_stripped(tmp_path, written, read):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": f"steps\n#### {written}"}))
    assert load_examples(str(path), "train", preset="gsm8k") == [Example("q", read, ("steps",))]


def test_strategy_qa_says_yes_and_no(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("question,facts,answer\nq,One.,True\np,,false\n")
    found = load_examples(str(path), "train", preset="strategy_qa", columns=Columns())
    assert found == [Example("q", "yes", ("One.",)), Example("p", "no")]
