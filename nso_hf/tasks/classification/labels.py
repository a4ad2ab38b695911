"""Classes and their numbers."""

from collections.abc import Sequence

from nso_hf.refusal import refusal


def classes_of(
    labels: Sequence[str], option: str, name: str, names: Sequence[str] | None = None
) -> list[str]:
    """The classes in the order of their numbers: `names`, where the data set has such, else those
    that occur, numbers by size and texts by the alphabet.

    Args:
        labels: of the training examples.
        option: that says which data these are, with the value `name`.

    Raises:
        ValueError: there are fewer than two.
    """
    found = set(labels)
    if len(found) < 2:
        rule = f"its examples have {len(found)} class(es): nothing is to be told apart"
        raise refusal(option, name, rule, "Use examples of two classes or more")
    if names is not None:
        return list(names)
    are_numbers = all(label.isdecimal() for label in found)
    return sorted(found, key=lambda label: (int(label) if are_numbers else 0, label))


def numbers_of(labels: Sequence[str], classes: Sequence[str], option: str, name: str) -> list[int]:
    """The number of each label.

    Raises:
        ValueError: one is of no class.
    """
    number = {label: index for index, label in enumerate(classes)}
    unknown = next((label for label in labels if label not in number), None)
    if unknown is not None:
        rule = f"no training example has the class {unknown!r}"
        raise refusal(option, name, rule, "Give all splits the same classes")
    return [number[label] for label in labels]
