"""Opening a collection of pairs by its path or name."""

import csv
import re
from pathlib import Path
from typing import Any

from transformers.utils import logging

from nso_hf.clip.pairs import Fields, Pairs
from nso_hf.clip.shards import Shards
from nso_hf.clip.table import Table
from nso_hf.refusal import Refusal, refusal

logger = logging.get_logger(__name__)


def open_pairs(
    data: str,
    fields: Fields,
    *,
    split: str = "train",
    config: str | None = None,
    csv_separator: str = "\t",
    num_pairs: int | None = None,
) -> Pairs:
    """The pairs that `data` names: shards (`.tar`), a `.csv` or `.tsv` file, a folder of shards or
    of images, or a dataset on the hub.

    Raises:
        ValueError: it does not exist, or has no column of that name.
    """
    path = Path(data)
    if re.search(r"\.tar(\.\w+)?(::|$)", data) or data.startswith("pipe:"):
        return Shards(data, fields, num_pairs)
    if path.is_dir() and (shards := sorted(path.glob("*.tar"))):
        return Shards("::".join(map(str, shards)), fields, num_pairs)
    if num_pairs is not None:
        raise refusal("train_num_pairs", num_pairs, f"{data} is no shard", "Leave it out")
    is_table = path.suffix in (".csv", ".tsv")
    if not path.exists() and (is_table or data.startswith((".", "/"))):
        raise refusal("data", data, "no such file or folder", "Check the path")
    return _open_table(data, fields, split, config, csv_separator)


def _open_table(
    data: str, fields: Fields, split: str, config: str | None, csv_separator: str
) -> Table:
    import datasets

    path, folder = Path(data), None
    defaults = Fields("image", "text", None)
    if path.suffix in (".csv", ".tsv"):
        defaults, folder = Fields("filepath", "title", None), path.parent
    try:
        rows = _rows(path, data, split, config, csv_separator)
    except Refusal:
        raise
    except Exception as error:  # of that library, pandas, the hub, the file system: of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        cure = "Check the path or id, the split and the network"
        raise refusal("data", data, reason, cure) from error
    fields = Fields(
        fields.image or defaults.image, fields.caption or defaults.caption, fields.label
    )
    for option, name in (("image_column", fields.image), ("label_column", fields.label)):
        if name is not None and name not in rows.column_names:
            columns = ", ".join(rows.column_names)
            cure = "Name one of them" if len(rows.column_names) > 1 else "Set --csv_separator"
            raise refusal(option, name, f"not in {data}, which has {columns}", cure)
    if fields.caption not in rows.column_names:
        if fields.label is None:
            columns = ", ".join(rows.column_names)
            rule = f"not in {data}, which has {columns}"
            raise refusal("caption_column", fields.caption, rule, "Name one of them")
        fields = Fields(fields.image, None, fields.label)  # images with classes alone
    if isinstance(rows.features[fields.image], datasets.Image):
        rows = rows.cast_column(fields.image, datasets.Image(decode=False))
    if fields.label and isinstance(rows.features[fields.label], datasets.ClassLabel):
        names = rows.features[fields.label].names
        labels = [names[number] if number >= 0 else None for number in rows[fields.label]]
        rows = rows.remove_columns(fields.label).add_column(fields.label, labels)
    if fields.caption and isinstance(rows.features[fields.caption], (list, datasets.List)):
        cure = "Write one row for each caption, or name another column"
        raise refusal("caption_column", fields.caption, "holds lists", cure)
    return Table(data, rows, fields, folder)


def _rows(path: Path, data: str, split: str, config: str | None, csv_separator: str) -> Any:
    import datasets

    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else csv_separator
        with path.open(newline="") as file:
            names = next(csv.reader(file, delimiter=separator), [])
            lines = sum(bool(line.strip()) for line in file)
        # As they are written: "null" is a caption, 000 a class.
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options = {"delimiter": separator, "features": features, "keep_default_na": False}
        rows = datasets.load_dataset("csv", data_files=data, split="train", **options)
        if len(rows) != lines:
            logger.warning(f"{data}: {lines} lines make {len(rows)} rows; check the quotes in it")
        return rows
    if (path / "dataset_info.json").is_file():
        return datasets.load_from_disk(data)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(data)[split]
    if path.is_dir() and any(path.rglob("*.parquet")):
        return datasets.load_dataset(data, split=split)
    if path.is_dir():
        return _image_folder(path, split)
    return datasets.load_dataset(data, config, split=split)


def _image_folder(path: Path, split: str) -> Any:
    """A folder of images with metadata.csv, or with a folder for each class, or with such folders
    named after splits."""
    import datasets

    found = datasets.load_dataset("imagefolder", data_dir=str(path))
    if split not in found and len(found) > 1:
        raise refusal("split", split, f"not in {path}, which has {', '.join(found)}", "Name one")
    return found[split] if split in found else next(iter(found.values()))
