"""Classes and their numbers."""

import math
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
        ValueError: there are fewer than two, or two are one number written in two ways.
    """
    found = set(labels)
    if len(found) < 2:
        rule = f"its examples have {len(found)} class(es): nothing is to be told apart"
        raise refusal(option, name, rule, "Use examples of two classes or more")
    if names is not None:
        return list(names)
    value = {label: _value(label) for label in found}
    written: dict[float, str] = {}
    for label in sorted(found):
        number = value[label]
        if number is not None and written.setdefault(number, label) != label:
            rule = f"the classes {written[number]!r} and {label!r} are one number"
            raise refusal(option, name, rule, "Write it in one way")
    are_numbers = None not in value.values()
    return sorted(found, key=lambda label: (value[label] if are_numbers else 0, label))


def _value(label: str) -> float | None:
    """Of a label that is a number."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def numbers_of(
    labels: Sequence[str],
    classes: Sequence[str],
    option: str,
    name: str,
    trained: Sequence[str] | None = None,
) -> list[int]:
    """The number of each label.

    Args:
        trained: the labels of the training examples, where these are others.

    Raises:
        ValueError: one is of no class, or of one without a training example.
    """
    number = {label: index for index, label in enumerate(classes)}
    known = set(classes if trained is None else trained)
    unknown = next((label for label in labels if label not in known), None)
    if unknown is not None:
        rule = f"no training example has the class {unknown!r}"
        raise refusal(option, name, rule, "Give all splits the same classes")
    return [number[label] for label in labels]
