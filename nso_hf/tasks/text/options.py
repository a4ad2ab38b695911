"""Which texts are classified, as options."""

from dataclasses import dataclass, field
from pathlib import Path

from nso_hf.refusal import check_integer, refusal
from nso_hf.running.tables import is_table
from nso_hf.tasks.text.reading import CARRIED, Columns, Texts, has_split, read_texts


@dataclass
class DataOptions:
    _argument_group_name = "data"

    dataset: str = field(
        default="emoji_languages",
        metadata={
            "help": "emoji_languages (names of emoji in eight languages: which?) or newsgroups, "
            "which pip brings; a hub id; or a local .csv, .tsv, .json, .jsonl or .parquet file, a "
            "folder of such files named train and test, or a copy of a data set of the hub."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration on the hub, or in a copy of it."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of a second text, where pairs are classified."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the class."})
    test_split: str = field(
        default="test",
        metadata={
            "help": "Split tested on. Where there is no such split, or with none, --test_size of "
            "the training texts are held out."
        },
    )
    max_length: int = field(
        default=128, metadata={"help": "Cut off texts that have more tokens than this."}
    )

    def __post_init__(self) -> None:
        check_integer("max_length", self.max_length, 1, "Typical: 64 to 512")
        if not self.dataset:
            raise refusal("dataset", "", "names no data", "Give a path or a hub id")
        if self.test_split == "train":
            cure = "Name another, or leave it out to hold test texts out"
            raise refusal("test_split", "train", "is what is trained on", cure)
        columns = [self.text_column, self.text_pair_column, self.label_column]
        for option, column in (("text_pair_column", columns[1]), ("label_column", columns[2])):
            if column is not None and columns.count(column) > 1:
                raise refusal(option, column, "is another column too", "Name one column for each")
        if self.dataset in CARRIED and self.columns != Columns():
            option = next(n for n, v in vars(Columns()).items() if getattr(self, n) != v)
            rule = f"{self.dataset} has no columns to choose"
            raise refusal(option, getattr(self, option), rule, "Leave it out")
        if self.dataset_config is not None and self._is_alone():
            rule = f"{self.dataset} has no configurations"
            raise refusal("dataset_config", self.dataset_config, rule, "Leave it out")
        looks_local = is_table(self.dataset) or self.dataset.startswith((".", "/"))
        if looks_local and not Path(self.dataset).exists():
            raise refusal("dataset", self.dataset, "no such file or folder", "Check the path")

    def _is_alone(self) -> bool:
        return self.dataset in CARRIED or Path(self.dataset).is_file()

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.text_pair_column, self.label_column)

    def train(self) -> Texts:
        """
        Raises:
            ValueError: there are none, or they cannot be read.
        """
        return self._read("train")

    def has_test(self) -> bool:
        """Whether there is a split to test on; asked for by name, it must be there."""
        if self.test_split.lower() == "none":
            return False
        there = has_split(self.dataset, self.test_split, self.dataset_config)
        if not there and self.test_split != "test":
            rule = f"{self.dataset} has no such split"
            raise refusal("test_split", self.test_split, rule, "Name one that it has")
        return there

    def test(self) -> Texts:
        """Of the split that there is to test on."""
        return self._read(self.test_split)

    def _read(self, split: str) -> Texts:
        config, columns = self.dataset_config, self.columns
        found = read_texts(self.dataset, split, config=config, columns=columns)
        if found is None:
            cure = "Name a file so, or give its path"
            raise refusal("dataset", self.dataset, f"has no split {split!r}", cure)
        return found
