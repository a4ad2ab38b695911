"""The one form of every error a user can cause: option, value, rule, cure."""

import math
from importlib.util import find_spec


class Refusal(ValueError):  # noqa: N818
    """A value that would make the library do something else than it says."""


def refusal(option: str, value: object, rule: str, cure: str) -> Refusal:
    """The error for `option` set to `value` against a `rule`; `cure` says what to do instead."""
    return Refusal(f"{option}={value!r}: {rule}. {cure}.")


def check_choice(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise refusal(option, value, "unknown", f"Choose one of {', '.join(map(repr, choices))}")


def check_range(option: str, value: float, low: float, high: float, hint: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and math.isfinite(value)):
        bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise refusal(option, value, f"must be a finite number, {bounds}", hint)


def check_positive(option: str, value: float, hint: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise refusal(option, value, "must be a finite number above 0", hint)


def check_integer(option: str, value: int, low: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise refusal(option, value, f"must be an integer, at least {low}", hint)


def check_seed(option: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise refusal(option, value, "must be an integer from 0 to 4294967295", "Typical: 42")


class MissingPackage(ImportError):  # noqa: N818
    """A package of an extra is not installed."""


def needs(part: str, extra: str, *packages: str) -> None:
    """
    Raises:
        MissingPackage: one of the packages of this optional part of the library is not installed.
    """
    for name in packages:
        if find_spec(name) is None:
            raise MissingPackage(f"{part} needs {name}: run pip install 'nso_hf[{extra}]'")
