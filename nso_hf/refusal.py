"""The one form of every error a user can cause: option, value, rule, cure."""

from importlib.util import find_spec


class Refusal(ValueError):  # noqa: N818
    """A value that would make the library do something else than it says."""


def refusal(option: str, value: object, rule: str, cure: str) -> Refusal:
    """The error for `option` set to `value` against a `rule`; `cure` says what to do instead."""
    return Refusal(f"{option}={value!r}: {rule}. {cure}.")


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
