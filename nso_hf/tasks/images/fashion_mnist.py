"""Fashion-MNIST (MIT) as Debian's package dataset-fashion-mnist has it."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nso_hf.refusal import refusal

FOLDER = "/usr/share/datasets/fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_FILES = {"train": "train", "test": "t10k"}
_HEADER = {"images": (16, 2051), "labels": (8, 2049)}  # bytes, and the number in the first four


def fashion_mnist(split: str, folder: str) -> tuple[NDArray[np.uint8], list[str]]:
    """60,000 images of split "train" or 10,000 of "test", (n, 28, 28), and the class of each.

    Raises:
        ValueError: they are not in this folder, or cannot be read.
    """
    prefix = _FILES[split]
    images = _read(folder, f"{prefix}-images-idx3-ubyte.gz", "images").reshape(-1, 28, 28)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte.gz", "labels")
    if len(images) != len(labels):
        rule = f"it has {len(images)} images and {len(labels)} labels of split {split!r}"
        raise refusal("fashion_mnist_folder", folder, rule, "Install the package again")
    return images, [CLASSES[number] for number in labels]


def _read(folder: str, name: str, kind: str) -> NDArray[np.uint8]:
    path = Path(folder) / name
    if not path.is_file():
        cure = "Run apt install dataset-fashion-mnist, or name the folder where it is"
        raise refusal("fashion_mnist_folder", folder, f"there is no {name}", cure)
    header, magic = _HEADER[kind]
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        rule = f"{name} cannot be read ({error})"
        raise refusal("fashion_mnist_folder", folder, rule, "Install the package again") from error
    size = int(np.prod([int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]))
    if int.from_bytes(data[:4], "big") != magic or len(data) != header + size:
        rule = f"{name} is no file of {kind} in the IDX format, or a part of one"
        raise refusal("fashion_mnist_folder", folder, rule, "Install the package again")
    return np.frombuffer(data, np.uint8, offset=header)
