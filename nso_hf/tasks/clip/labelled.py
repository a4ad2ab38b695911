"""Images with classes."""

from dataclasses import dataclass

from nso_hf.tasks.clip.classification import class_names
from nso_hf.tasks.clip.options import DataOptions, EvaluationOptions
from nso_hf.tasks.clip.pairs import Pairs
from nso_hf.tasks.clip.stream import check_usable


@dataclass(frozen=True)
class Labelled:
    """Images with classes."""

    pairs: Pairs
    classes: list[str]
    """Those that occur, sorted."""
    names: dict[str, str]
    """Class -> its name in prompts, of all that images are told apart from."""

    @classmethod
    def open(cls, data: DataOptions, evaluation: EvaluationOptions, source: str) -> "Labelled":
        """Those of `source`, of the split and the column that the options name.

        Raises:
            ValueError: they cannot be read, have fewer than two classes, or one without a name.
        """
        pairs = data.open(source, data.zero_shot_split, labels=True)
        labels = pairs.labels()
        names = evaluation.names([*pairs.classes, *filter(None, labels)])
        classes = class_names(labels, source, names)
        check_usable(pairs, "label")
        return cls(pairs, classes, names)
