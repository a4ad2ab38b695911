"""Opening a collection of pairs by its path or name."""

import re
import tempfile
import weakref
from itertools import islice
from pathlib import Path
from typing import Any

from nso_hf.refusal import Refusal, refusal
from nso_hf.running.tables import is_table, rows
from nso_hf.tasks.clip.pairs import Fields, Pairs
from nso_hf.tasks.clip.shards import Shards
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.clip.texts import NotText, text_of
from nso_hf.tasks.images.stored import open_stored

_ROWS_AT_A_TIME = 10_000
_ONE_TEXT = "Write one row for each caption, or name another column"


def open_pairs(
    data: str,
    fields: Fields,
    *,
    split: str = "train",
    config: str | None = None,
    csv_separator: str = "\t",
    num_pairs: int | None = None,
) -> Pairs:
    """The pairs that `data` names: shards (`.tar`), a `.csv`, `.tsv`, `.json`, `.jsonl` or
    `.parquet` file, a folder of shards or of images, or a dataset on the hub.

    Raises:
        ValueError: it does not exist, cannot be read, or has no column of that name.
    """
    path = Path(data)
    if re.search(r"\.tar(\.\w+)?(::|$)", data) or data.startswith("pipe:"):
        return Shards(data, fields, num_pairs)
    if path.is_dir() and (shards := sorted(path.glob("*.tar"))):
        return Shards("::".join(map(str, shards)), fields, num_pairs)
    if num_pairs is not None:
        raise refusal("train_num_pairs", num_pairs, f"{data} is no shard", "Leave it out")
    if not path.exists() and (is_table(path) or data.startswith((".", "/"))):
        raise refusal("data", data, "no such file or folder", "Check the path")
    if path.is_file() and not is_table(path):
        cure = "Use .tar, .csv, .tsv, .json, .jsonl or .parquet files, or a folder of images"
        raise refusal("data", data, "a file of no known kind", cure)
    return _open_table(data, fields, split, config, csv_separator)


def _open_table(
    data: str, fields: Fields, split: str, config: str | None, csv_separator: str
) -> Table:
    import datasets

    path = Path(data)
    is_csv = re.search(r"\.[ct]sv(\.gz)?$", data, re.IGNORECASE) is not None
    defaults = Fields("filepath", "title") if is_csv else Fields("image", "text")
    fields = Fields(
        fields.image or defaults.image, fields.caption or defaults.caption, fields.label
    )
    if is_table(path) and ".parquet" not in path.suffixes:
        separator = csv_separator if ".csv" in data.lower() else None
        found, fields = _text_rows(path, separator, fields)
        return Table(data, found, fields, path.parent)
    found = open_stored(data, split, config)
    fields = _checked(data, fields, found.column_names)
    if isinstance(found.features[fields.image], datasets.Image):
        found = found.cast_column(fields.image, datasets.Image(decode=False))
    for option, name in (("caption_column", fields.caption), ("label_column", fields.label)):
        feature = found.features[name] if name else None
        if feature and not isinstance(feature, datasets.Value | datasets.ClassLabel):
            holds = "lists" if isinstance(feature, datasets.List) else "no texts"
            raise refusal(option, name, f"holds {holds}", _ONE_TEXT)
    classes: list[str] = []
    if fields.label and isinstance(found.features[fields.label], datasets.ClassLabel):
        classes = found.features[fields.label].names
        numbers = found[fields.label]
        labels = [None if n is None or n < 0 else classes[n] for n in numbers]
        found = found.remove_columns(fields.label).add_column(fields.label, labels)
    return Table(data, found, fields, path.parent if path.is_file() else None, classes)


def _checked(data: str, fields: Fields, columns: list[str]) -> Fields:
    """The fields that there are: images with classes need no captions.

    Raises:
        ValueError: one is missing.
    """

    def refuse(option: str, name: str) -> Refusal:
        rule = f"not in {data}, which has {', '.join(columns)}"
        cure = "Name one of them" if len(columns) > 1 else "Set --csv_separator"
        return refusal(option, name, rule, cure)

    for option, name in (("image_column", fields.image), ("label_column", fields.label)):
        if name is not None and name not in columns:
            raise refuse(option, name)
    if fields.caption is not None and fields.caption not in columns:
        if fields.label is None:
            raise refuse("caption_column", fields.caption)
        return Fields(fields.image, None, fields.label)
    return fields


def _text_rows(path: Path, separator: str | None, fields: Fields) -> tuple[Any, Fields]:
    """The columns of `fields` of a text file, in a file of Arrow's that is mapped into memory and
    removed with them."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    first = next(rows(path, separator=separator))
    fields = _checked(str(path), fields, list(first))
    options = {
        "image_column": fields.image,
        "caption_column": fields.caption,
        "label_column": fields.label,
    }
    named = {name: option for option, name in options.items() if name is not None}
    features = datasets.Features({name: datasets.Value("string") for name in named})
    folder = tempfile.TemporaryDirectory(prefix="nso_hf-pairs-")
    file = f"{folder.name}/rows.arrow"
    numbered = enumerate(rows(path, separator=separator), 1)
    with ArrowWriter(path=file, features=features) as writer:
        while block := list(islice(numbered, _ROWS_AT_A_TIME)):
            columns: dict[str, list[str | None]] = {name: [] for name in named}
            for number, row in block:
                for name, texts in columns.items():
                    try:
                        texts.append(text_of(row.get(name)))
                    except NotText as error:
                        rule = f"row {number} of {path}: {error}, no text"
                        raise refusal(named[name], name, rule, _ONE_TEXT) from error
            writer.write_batch(columns)
        writer.finalize()
    found = datasets.Dataset.from_file(file)
    weakref.finalize(found, folder.cleanup)
    return found, fields
