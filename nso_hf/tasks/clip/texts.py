"""Captions and labels as text, whatever they are stored as."""

from numbers import Number
from typing import Any

from nso_hf.running.tables import encoding_of, kind


class NotText(ValueError):  # noqa: N818
    """Something stands there, and it is no text. Raised, or left in the place of it."""


def text_of(value: Any) -> str | None:
    """A text, encoded or not; a number as it is written, true or false. None: nothing stands there.

    Raises:
        NotText: it is a list, an object, or in no encoding that is known.
    """
    if isinstance(value, NotText):
        raise value
    if value is None or (isinstance(value, Number) and value != value):  # an empty cell of pandas
        return None
    if isinstance(value, Number):
        return str(value).lower() if isinstance(value, bool) else str(value)
    text = _decoded(value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise NotText(kind(text))
    if "\0" in text:
        raise NotText("it has NUL characters, as UTF-16 without a byte-order mark")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotText("it has half of a character") from error
    return text


def _decoded(value: bytes) -> str:
    encoding = encoding_of(value)
    try:
        return value.decode(encoding)
    except UnicodeDecodeError as error:
        raise NotText(f"it is not in {encoding}") from error
