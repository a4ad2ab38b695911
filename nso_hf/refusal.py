"""The one form of every error a user can cause: option, value, rule, cure."""


class Refusal(ValueError):  # noqa: N818
    """A value that would make the library do something else than it says."""


def refusal(option: str, value: object, rule: str, cure: str) -> Refusal:
    """The error for `option` set to `value` against a `rule`; `cure` says what to do instead."""
    return Refusal(f"{option}={value!r}: {rule}. {cure}.")
