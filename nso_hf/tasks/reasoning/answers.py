"""Reading an answer out of generated text and comparing it with the right one."""

import re
import unicodedata
from dataclasses import dataclass

from nso_hf.refusal import refusal
from nso_hf.tasks.reasoning.notation import boxed, is_word_character, plain
from nso_hf.tasks.reasoning.quantities import from_last_number, numbers, quantity

MARKER = "-->"
"""What stands between a rationale and the answer."""


@dataclass(frozen=True)
class Judgement:
    """What was read out of one generated text."""

    prediction: str
    correct: bool
    """The prediction is the answer: the same number, with no other unit, or the same text."""
    contains_answer: bool
    """The answer stands somewhere in the text."""
    correct_format: bool
    """There is a marker, and the last one has an answer after it."""


def judge(text: str, answer: str) -> Judgement:
    """Compare a generated text with the right answer.

    The prediction is what follows the last marker: its first line, or as many as the answer has.
    Where there is no marker, so that a model that was never taught it gets its due, it is the last
    \\boxed{...}, else the last number (numeric answers), else the last lines. A number must be the
    only one of its line: "5 or 6" is wrong for either.

    Raises:
        ValueError: the answer is no text.
    """
    if not isinstance(answer, str):
        raise refusal("answer", answer, "a right answer is a text", "Write it as one")
    right = _lines(answer)
    number = quantity(answer) if len(right) == 1 else None
    # The answer may hold the marker itself.
    _, *after = text.rsplit(MARKER, answer.count(MARKER) + 1)
    marked = len(after) > answer.count(MARKER)
    if marked:
        predicted = _block(MARKER.join(after), len(right))
    elif (box := boxed(text)) is not None:
        predicted = _lines(box)
    elif number:
        predicted = _lines(from_last_number(text))
    else:
        predicted = _lines(text)[-len(right) :] if right else []
    correct = len(predicted) == len(right) and all(map(_same, predicted, right))
    if number:
        contains = number.value in numbers(text.replace(MARKER, " "))
    else:
        contains = _contains(normalise(text), normalise(answer))
    formatted = marked and (bool(predicted) or not right)
    return Judgement("\n".join(predicted), correct, correct or contains, formatted)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _block(text: str, count: int) -> list[str]:
    """The first `count` lines that are not blank; where several are wanted, with the next line too
    if it follows at once: a grid with a row more is another grid."""
    lines = text.splitlines()
    filled = [i for i, line in enumerate(lines) if line.strip()]
    wanted = filled[: max(count, 1)]
    if count > 1 and len(filled) > count and filled[count] == wanted[-1] + 1:
        wanted = filled[: count + 1]
    return [lines[i].strip() for i in wanted]


_LEAD_IN = re.compile(r"\banswer(?: is|:| is:)\s", re.IGNORECASE)


def _same(prediction: str, answer: str) -> bool:
    """Whether one line of a prediction is that line of the answer."""
    if normalise(prediction) == normalise(answer):
        return True
    inside = boxed(prediction)
    prediction = _LEAD_IN.split(prediction if inside is None else inside)[-1]
    inside = boxed(answer)
    answer = answer if inside is None else inside
    number = quantity(answer)
    if number:
        return number.is_stated_by(prediction)
    return normalise(prediction) == normalise(answer)


_ARTICLE = re.compile(r"^(?:a|an|the) (?=\w\S)", re.IGNORECASE)
_QUOTED = re.compile(r"([\"'])([^\"']+)\1")
_BRACKETED = re.compile(r"(?<![\w)\]}])\((\w+)\)(?!\w)")
_ENDS = ".,;:?\u3002\u0964"  # of Chinese and of Hindi sentences too


def normalise(text: str) -> str:
    """One writing of a text: plain characters, no case, no leading article, no quotes or full stop
    around it, no white space beside symbols: "(B)." -> "b", "x + 1" -> "x+1"."""
    text = " ".join(plain(text).split())
    bare = text.rstrip(_ENDS)
    shouted = bare.rstrip("!")
    bare = bare if shouted[-1:].isdigit() else shouted  # 5! is another number
    if bare and (is_word_character(bare[-1]) or bare[-1] in ")]}\"'"):
        text = bare
    quoted = _QUOTED.fullmatch(text)
    text = _BRACKETED.sub(r"\1", _ARTICLE.sub("", quoted[2] if quoted else text))
    text = unicodedata.normalize("NFKC", text.casefold()).replace("i\u0307", "i")
    return _without_spaces_beside_symbols(text)


def _without_spaces_beside_symbols(text: str) -> str:
    kept = []
    for i, character in enumerate(text):
        beside = text[i - 1 : i] + text[i + 1 : i + 2]
        if character != " " or all(map(is_word_character, beside)):
            kept.append(character)
    return "".join(kept)


def _contains(text: str, part: str) -> bool:
    """Whether a text holds another that does not begin or end within a word."""
    start = text.find(part)
    while part and start >= 0:
        before, end = text[max(0, start - 1) : start], start + len(part)
        after = text[end : end + 1]
        within = (before and is_word_character(before) and is_word_character(part[0])) or (
            after and is_word_character(after) and is_word_character(part[-1])
        )
        if not within:
            return True
        start = text.find(part, start + 1)
    return False
