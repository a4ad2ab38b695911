"""Where the rows of a split are: in a table, a folder of them, a saved data set, or on the hub."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nso_hf.refusal import Refusal, refusal
from nso_hf.running.tables import SUFFIXES, is_table, kind, rows

Row = Mapping[str, Any]
Source = tuple[str, Iterable[Row]]
"""What a message calls it, and its rows."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})$")
_SPLITS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation"}
"""Other names of the splits."""


class RowError(ValueError):
    """What is wrong with a row, and what to do about it."""

    def __init__(
        self, cause: str, cure: str = "Write one text there, or leave the row out"
    ) -> None:
        super().__init__(cause)
        self.cure = cure


def text_of(row: Row, name: str) -> str:
    """The text, number or truth value in a column, as it was written.

    Raises:
        KeyError: there is no such column.
        RowError: something else is in it.
    """
    value = row[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if value != value:
        raise RowError(f"{name!r} is not a number (NaN)")
    if not isinstance(value, str | int | float):
        raise RowError(f"{name!r} is {kind(value)}")
    return str(value)


def open_split(
    dataset: str, split: str, config: str | None = None, usual_config: str | None = None
) -> list[Source] | None:
    """The rows of a split of `dataset`; None where there is no such split.

    Args:
        config: the configuration that was asked for.
        usual_config: what it is otherwise, in copies that have it.

    Raises:
        ValueError: there are no data, in one line.
    """
    path = Path(dataset)
    if path.is_file():
        return [(dataset, rows(path, option="dataset"))] if split == "train" else None
    if not path.exists():
        return _on_the_hub(dataset, split, config or usual_config)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    files = _files(path, config, usual_config)
    if split in files:
        return [(str(file), rows(file, option="dataset")) for file in files[split]]
    if split == "train":
        rule = f"has no split 'train', but {', '.join(map(repr, files))}"
        cure = "Name the file train.jsonl, or set --dataset_config to a folder in it"
        raise refusal("dataset", dataset, rule, cure)
    return None


def _on_the_hub(dataset: str, split: str, config: str | None) -> list[Source] | None:
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if split not in get_dataset_split_names(dataset, config):
            return None
        return [(dataset, load_dataset(dataset, config, split=split))]
    except (OSError, ValueError, DatasetGenerationError) as error:
        cure = "Check the id, --dataset_config and the network, or give a local path"
        raise _unreadable(dataset, error, cure) from error


def _saved(path: Path, split: str) -> list[Source] | None:
    """What `save_to_disk` of the `datasets` library wrote: splits, or one alone."""
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "Save it again, or give a file of it") from error
    if isinstance(found, Dataset):
        return [(str(path), found)] if split == "train" else None
    return [(str(path), found[split])] if split in found else None


def _unreadable(dataset: str | Path, error: Exception, cure: str) -> Refusal:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return refusal("dataset", str(dataset), reason, cure)


def _files(path: Path, config: str | None, usual_config: str | None) -> dict[str, list[Path]]:
    """Split -> its tables, in a folder as on the hub or as one writes it by hand."""
    if "configs" in _card(path):
        return _files_of_card(path, config, usual_config)
    wanted = config or usual_config
    if wanted is not None and (path / wanted).is_dir():
        path = path / wanted
    elif config is not None:
        rule, cure = f"{path} has no such folder", "Name a folder in it, or leave it out"
        raise refusal("dataset_config", config, rule, cure)
    for folder in (path, path / "data"):
        tables = [file for file in _listed(folder) if file.is_file() and is_table(file)]
        if tables:
            return _by_split(tables)
    parts = {
        _split(part.name): [file for file in _listed(part) if is_table(file)]
        for part in _listed(path)
        if part.is_dir()
    }
    found = {split: tables for split, tables in parts.items() if tables}
    if not found:
        rule = f"the folder has no {', '.join(SUFFIXES)} file"
        raise refusal("dataset", str(path), rule, "Put train.jsonl (and test.jsonl) into it")
    return found


def _listed(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir()) if folder.is_dir() else ())


def _split(name: str) -> str:
    return _SPLITS.get(name.lower(), name)


def _by_split(tables: list[Path]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in tables:
        name = file.name.split(".")[0]
        shard = _SHARD.match(name)
        there = files.setdefault(_split(shard.group(1) if shard else name), [])
        there.append(file)
        if len(there) > 1 and not shard:
            rule = f"{there[0].name} and {file.name} are the same split"
            raise refusal("dataset", str(file.parent), rule, "Keep one of them, or give its path")
    for split, there in files.items():
        shard = _SHARD.match(there[0].name.split(".")[0])
        if shard and len(there) != int(shard.group(3)):
            rule = f"has {len(there)} of the {int(shard.group(3))} files of the split {split!r}"
            raise refusal("dataset", str(there[0].parent), rule, "Copy the others too")
    return files


def _card(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = path / "README.md"
    try:
        return (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError) as error:
        raise _unreadable(card, error, "Mend its header, or remove the file") from error


def _files_of_card(
    path: Path, config: str | None, usual_config: str | None
) -> dict[str, list[Path]]:
    """The files that `configs` in README.md names, found by the `datasets` library."""
    from datasets import load_dataset_builder

    names = [entry.get("config_name", "default") for entry in _card(path)["configs"]]
    wanted = config or (usual_config if usual_config in names else None)
    try:
        builder = load_dataset_builder(str(path), wanted)
    except (OSError, ValueError) as error:  # a file that is not there, a name that is not
        cure = f"Set --dataset_config to one of {', '.join(names)}, and check README.md"
        raise _unreadable(path, error, cure) from error
    found = builder.config.data_files
    return {str(split): [Path(file) for file in files] for split, files in found.items()}
