"""Opening a collection of images by its name or path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nso_hf.refusal import refusal
from nso_hf.tasks.images.dataset import Images, Pixels
from nso_hf.tasks.images.fashion_mnist import CLASSES, FOLDER, fashion_mnist
from nso_hf.tasks.images.named import NAMED, SPLITS
from nso_hf.tasks.images.openmoji import openmoji_rows
from nso_hf.tasks.images.stored import open_stored

_EVERY = 5  # image of the digits is a test image


def open_images(
    data: str,
    split: str,
    pixels: Pixels,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    fashion_mnist_folder: str = FOLDER,
) -> Images:
    """The images of a split: of scikit-learn's "digits" (1,797 of 8 x 8 pixels), "fashion_mnist",
    "openmoji", or of a folder or a data set that the `datasets` library opens.

    Args:
        label_column: what says the class, in the latter; None: they are not labelled.

    Raises:
        ValueError: they do not exist, cannot be read, or have no such split or column.
    """
    if data in NAMED:
        if split not in SPLITS:
            raise refusal("split", split, f"{data} has train and test", "Name one of them")
        stored, labels = _named(data, split, pixels, fashion_mnist_folder)
        classes = CLASSES if data == "fashion_mnist" else None
        return Images(f"{data}:{split}", stored, labels, pixels, classes)
    path = Path(data)
    if not path.exists() and data.startswith((".", "/")):
        raise refusal("data", data, "no such file or folder", "Check the path")
    found = open_stored(data, split)
    if found.split is not None and str(found.split) != split:
        rule = f"{data} has {found.split} alone"
        raise refusal("split", split, rule, f"Put images into {data}/{split}, or name another")
    for option, name in (("image_column", image_column), ("label_column", label_column)):
        if name is not None and name not in found.column_names:
            rule = f"not in {data}, which has {', '.join(found.column_names)}"
            cure = "Name one of them, or use a folder for each of two classes or more"
            raise refusal(option, name, rule, cure)
    none: list[str | None] = [None] * len(found)
    given = (none, None) if label_column is None else _classes(found, label_column)
    return Images(f"{data}:{split}", _Stored(found, image_column), given[0], pixels, given[1])


def _named(
    data: str, split: str, pixels: Pixels, folder: str
) -> tuple[Sequence[Any], Sequence[str | None]]:
    if data == "openmoji":
        rows: Any = openmoji_rows(split, pixels.image_size)
        return [row["image"] for row in rows], [row["label"] for row in rows]
    if data == "fashion_mnist":
        arrays, labels = fashion_mnist(split, folder)
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = np.arange(len(digits.target)) % _EVERY == 0
        rows = np.flatnonzero(is_test == (split == "test"))
        arrays = (digits.images[rows] * 255 / 16).round().astype(np.uint8)
        labels = [str(label) for label in digits.target[rows]]
    return [Image.fromarray(array) for array in arrays], labels


def _classes(found: Any, column: str) -> tuple[list[str | None], list[str] | None]:
    """The class of each, and all that the data set names, in its order."""
    import datasets

    feature, values = found.features[column], list(found[column])
    if isinstance(feature, datasets.ClassLabel):
        labels = [None if v is None or v < 0 else feature.names[v] for v in values]
        return labels, list(feature.names)
    if any(isinstance(value, (list, Mapping)) for value in values):
        cure = "Name a column with one class for each image"
        raise refusal("label_column", column, "it holds several values for an image", cure)
    return [None if value is None else str(value) for value in values], None


class _Stored(Sequence[Any]):
    """The images of a data set, encoded as they are stored."""

    def __init__(self, found: Any, column: str) -> None:
        import datasets

        if isinstance(found.features[column], datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
        self._found, self._column = found, column

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        image = self._found[index][self._column]
        if isinstance(image, Mapping):
            return image["bytes"] if image.get("bytes") is not None else image["path"]
        return image
