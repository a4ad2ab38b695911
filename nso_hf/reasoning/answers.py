"""Reading an answer out of generated text and comparing it with the right one."""

import re
from dataclasses import dataclass
from fractions import Fraction

MARKER = "-->"
"""What stands between a rationale and the answer."""

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_MOST_DIGITS = 100  # more are a model's stammer, not a number


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text in their order: thousands separators, decimals and a/b are read as one
    number."""
    found = []
    # A minus sign belongs to the number unless something is subtracted from: 3-4 is 3 and 4.
    text = text.replace("\N{MINUS SIGN}", "-")
    for match in _NUMBER.finditer(text):
        if len(match.group()) > _MOST_DIGITS:
            continue
        digits = match.group().replace(",", "")
        before = text[: match.start()].rstrip()
        if digits.startswith("-") and before and (before[-1].isdigit() or before[-1] == ")"):
            digits = digits[1:]
        numerator, _, denominator = digits.partition("/")
        if denominator and int(denominator) == 0:
            continue
        found.append(Fraction(numerator) / Fraction(denominator or 1))
    return found


def is_numeric(answer: str) -> bool:
    """Whether an answer is one number, such as "-4", "1,200", "$3.50" or "3/4"."""
    number = answer.strip().lstrip("$").rstrip(".%").replace("\N{MINUS SIGN}", "-")
    return _NUMBER.fullmatch(number) is not None and len(numbers(number)) == 1


_WORD = re.compile(r"-?\d+(?:\.\d+)?|\w+")
_SYMBOL = re.compile(r"""[^\w\s.,;:!?'"()-]""")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space: "(B)" -> "b"."""
    words = _words(text)
    return " ".join(word for word in words if word not in ("a", "an", "the") or len(words) == 1)


def _compare(prediction: str, text: str, answer: str) -> tuple[bool, bool]:
    """Whether the prediction equals the answer, and whether the text contains it."""
    if _SYMBOL.search(answer) or not _words(answer):  # in [-1, 2] or x + y symbols carry meaning
        same, inside, wanted = ("".join(s.lower().split()) for s in (prediction, text, answer))
        return same == wanted, wanted in inside
    # Contained with its articles, since "A" may be the answer.
    contained = f" {' '.join(_words(answer))} " in f" {' '.join(_words(text))} "
    return normalise(prediction) == normalise(answer), contained


@dataclass(frozen=True)
class Judgement:
    """What was read out of one generated text."""

    prediction: str
    correct: bool
    """The prediction equals the answer: as a number where the answer is one, else as a normalised
    string, or to white space and case where the answer has symbols."""
    contains_answer: bool
    """The answer stands somewhere in the text."""
    correct_format: bool
    """There is one marker, and something after it."""


def judge(text: str, answer: str) -> Judgement:
    """Compare a generated text with the right answer.

    The prediction is what follows the marker, to the end of the line. Where there is no marker, so
    that a model that was never taught it gets its due, it is the last number (numeric answers) or
    the last line.
    """
    _, marker, after = text.partition(MARKER)
    prediction = next((line.strip() for line in after.splitlines() if line.strip()), "")
    correct_format = bool(prediction) and MARKER not in after
    if is_numeric(answer):
        right = numbers(answer.strip().lstrip("$"))[0]
        found = numbers(prediction if marker else text)
        correct = bool(found) and found[0 if marker else -1] == right
        contains = right in numbers(text)
        if not marker:
            prediction = str(found[-1]) if found else ""
    else:
        lines = text.strip().splitlines()
        if not marker:
            prediction = lines[-1].strip() if lines else ""
        correct, contains = _compare(prediction, text, answer)
    return Judgement(prediction, correct, contains, correct_format)
