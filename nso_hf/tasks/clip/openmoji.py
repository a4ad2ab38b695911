"""Image-caption pairs that pip brings."""

from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.images.openmoji import openmoji_rows


def openmoji_pairs(split: str, size: int = 64, *, labelled: bool = False) -> Table:
    """The emoji of `openmoji_rows` with their names; `labelled`: those alone that have a class.

    Raises:
        ValueError: the packages that carry them are not installed.
    """
    rows = openmoji_rows(split, size)
    if labelled:
        rows = [row for row in rows if row["label"] is not None]
    return Table(f"openmoji:{split}", rows, Fields("image", "caption", "label"), None)
