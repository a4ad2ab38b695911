"""Images that the `datasets` library opens: a file, a folder, or a data set of the hub."""

from pathlib import Path
from typing import Any

from nso_hf.refusal import Refusal, refusal
from nso_hf.running.tables import rows


def open_stored(data: str, split: str, config: str | None = None) -> Any:
    """The data set that `data` names: a `.parquet` file, what `save_to_disk` wrote, a folder of
    parquet files or of images, or an id of the hub.

    Raises:
        ValueError: it does not exist, or cannot be read.
    """
    try:
        return _dataset(Path(data), data, split, config)
    except Refusal:
        raise
    except Exception as error:  # of that library, the hub, the file system: of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        cure = "Check the path or id, the split and the network"
        raise refusal("data", data, reason, cure) from error


def _dataset(path: Path, data: str, split: str, config: str | None) -> Any:
    import datasets

    if path.is_file():
        next(rows(path))  # or it is refused, with its reason
        return datasets.load_dataset("parquet", data_files=data, split="train")
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
