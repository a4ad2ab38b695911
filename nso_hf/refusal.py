"""The one form of every error a user can cause: option, value, rule, cure."""


def refusal(option: str, value: object, rule: str, cure: str) -> ValueError:
    """The error for `option` set to `value` against a `rule`; `cure` says what to do instead."""
    return ValueError(f"{option}={value!r}: {rule}. {cure}.")
