"""Numbers and quantities in a text, read exactly."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from nso_hf.tasks.reasoning.notation import plain

_MOST_DIGITS = 100  # more are a model's stammer, not a number
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SYMBOLS = {
    "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent",
    "%": "percent", "per cent": "percent", "°": "degree",
}  # fmt: skip
_CURRENCY = r"[$\u00a2-\u00a5\u20a0-\u20cf]"

_NUMBER = re.compile(
    rf"""(?P<name>[A-Za-z_]\w*+(?:-\d\w*+)?+(?:(?<=\d)\.\d++)*+)  # B12, x_1, v1.2, COVID-19: names
    | (?P<sign>[+-]?)(?:(?P<currency>{_CURRENCY})\s?)?(?P<inner_sign>[+-]?)
      (?P<digits>\.?\d++(?:[.,]\d++)*+)
      (?: e(?P<e>[+-]?\d++)(?!\w)
        | \s?[*x]\s?10\^\{{?(?P<times_ten>[+-]?\d++)\}}?
        | \^\{{?(?P<power>[+-]?\d++)\}}?
        | \s(?P<mixed>\d++/\d++)(?![\d/])
        | (?P<slashes>(?:\s?/\s?\d++(?:\.\d++)?)++) )?
      (?:[ -]?(?P<scale>{"|".join(_SCALES)})\b)?
      (?P<letters>[A-Za-z\u0370-\u03ff√∞]++)?""",
    re.VERBOSE | re.IGNORECASE,
)
_ENGLISH = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d\d)+,\d{3}(?:\.\d+)?")
_EUROPEAN = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}")
_DECIMAL = re.compile(r"\d*\.?\d+")
_UNIT_LETTERS = "mgshlLdCFKVWANJ"  # 5 m, but 5 x is a formula and 5k a number of its own


@dataclass(frozen=True)
class _Number:
    """One number of a text: where it begins and ends, and its value if it can be told."""

    value: Fraction | None
    currency: str
    start: int
    end: int


def _pieces(digits: str) -> list[str]:
    """The numerals of a run of digits, points and commas: "1,234" is one, "1,2" are two."""
    if _ENGLISH.fullmatch(digits):
        return [digits.replace(",", "")]
    if _EUROPEAN.fullmatch(digits):
        return [digits.replace(".", "").replace(",", ".")]
    pieces = []
    for piece in digits.split(","):
        pieces += [piece] if _DECIMAL.fullmatch(piece) else piece.strip(".").split(".")
    return pieces


def _ratio(text: str) -> Fraction | None:
    numerator, _, denominator = text.replace(" ", "").partition("/")
    if max(len(numerator), len(denominator)) > _MOST_DIGITS:
        return None
    below = Fraction(denominator or 1)
    return Fraction(numerator) / below if below else None


def _scaled(match: re.Match[str], numeral: str) -> Fraction | None:
    """The numeral with what follows it: an exponent, a fraction, "million"."""
    value = _ratio(numeral + (match["slashes"] or ""))
    if value is None:
        return None
    if match["mixed"]:
        part = _ratio(match["mixed"])
        value = value + part if part is not None and value.denominator == 1 else None
    exponent = match["e"] or match["times_ten"] or match["power"]
    if exponent and value is not None:
        if len(exponent) > 4 or abs(int(exponent)) > 400 or (match["power"] and value != 10):
            return None
        value = Fraction(10) ** int(exponent) * (1 if match["power"] else value)
    letters = match["letters"] or ""
    if value is None or (len(letters) == 1 and letters not in _UNIT_LETTERS):
        return None
    return value * _SCALES.get((match["scale"] or "").lower(), 1)


def _read(text: str) -> Iterator[_Number]:
    for match in _NUMBER.finditer(text):
        if match["name"]:
            continue
        start, end = match.start(), match.end("scale")
        end = max(end, *map(match.end, ("digits", "e", "times_ten", "power", "mixed", "slashes")))
        *listed, last = _pieces(match["digits"])
        slashes = (match["slashes"] or "").count("/")
        if slashes > 1:  # a date
            listed, last = [*listed, last, *re.findall(r"\d+", match["slashes"])], ""
        values = [_ratio(numeral) for numeral in listed]
        if last:
            values.append(_scaled(match, last))
        # A minus sign belongs to the number unless something is subtracted from: 3-4 is 3 and 4.
        before = text[max(0, start - 2) : start].rstrip()[-1:]
        subtracted = match["sign"] and (before.isdigit() or before == ")")
        if subtracted:
            start += 1
        negative = ((match["sign"] == "-") and not subtracted) != (match["inner_sign"] == "-")
        if negative and values[0] is not None:
            values[0] = -values[0]
        for value in values:
            yield _Number(value, match["currency"] or "", start, end)


_MINUS_IN_WORDS = re.compile(r"\b(?:minus|negative)\s(?=[.\d]|" + _CURRENCY + ")", re.IGNORECASE)


def _prepared(text: str) -> str:
    return _MINUS_IN_WORDS.sub("-", " ".join(plain(text).split()))


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text in their order: thousands separators, decimals, a/b, exponents and
    "5 million" are read as one number; names such as B12 are not."""
    return [n.value for n in _read(_prepared(text)) if n.value is not None]


def from_last_number(text: str) -> str:
    """The text from its last number to the end of that line, or nothing."""
    for line in reversed(text.splitlines()):
        prepared = _prepared(line)
        found = list(_read(prepared))
        if found:
            return prepared[found[-1].start :]
    return ""


@dataclass(frozen=True)
class Quantity:
    """A number, and the words of its unit where it has one."""

    value: Fraction
    unit: tuple[str, ...] = ()

    def is_stated_by(self, text: str) -> bool:
        """Whether the text has this number and no other, and no other unit where both have one."""
        before, _, result = (prepared := _prepared(text)).rpartition("=")
        if _SUM.fullmatch(before):  # 2 + 3 = 5
            prepared = result
        prepared = re.sub(rf"^- (?={_CURRENCY}?[.\d])", "-", prepared)
        if _SPACED.fullmatch(prepared):
            prepared = prepared.replace(" ", ",")
        found = list(_read(prepared))
        if len(found) != 1 or found[0].value != self.value:
            return False
        before, after = prepared[: found[0].start], prepared[found[0].end :]
        if _OTHERWISE.search(before + " 0 " + after) or _OPERATOR.match(after):
            return False
        unit = _unit(found[0].currency or after)
        rest = unit[len(self.unit) :]
        return not (self.unit and unit) or (
            unit[: len(self.unit)] == self.unit and rest[:1] not in _UNIT_GOES_ON
        )


_SUM = re.compile(r"[-\d\s.,+*/^()$%=]+")
_SPACED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+")
_OTHERWISE = re.compile(
    r"\b(?:not|or|than|least|most|between|except)\b|[±≠≤≥+*/^√]\s?0|(?<![-=])[<>]=?\s?0",
    re.IGNORECASE,
)
"""What makes another answer of the number, written 0 here: "5 or more", "x + 5", "> 5"."""
_OPERATOR = re.compile(rf"\s?[+*/^√]|\s(?![{_UNIT_LETTERS}])[A-Za-z]\b")
"""What goes on with the number: "5 + ...", "5 x"."""
_UNIT_WORD = re.compile(r"[^\W\d_]{1,3}|[^\W\d_A-Z]+")  # no names: 12 Monkeys
_NO_UNIT = {"and", "or", "to", "of", "per", "than", "not", "in"}
_UNIT_GOES_ON = [(word,) for word in ("per", "a", "an", "each", "squared", "cubed")]
_CODE = re.compile(r"[+-]?0\d+")


def quantity(text: str) -> Quantity | None:
    """What an answer states that is a number and at most three words of a unit: "-4", "$3.50",
    "3/4", "5 %", "18 dollars". Codes as 007 are none."""
    prepared = _prepared(text).rstrip(".,;:")
    found = list(_read(prepared))
    if len(found) != 1 or _CODE.fullmatch(prepared):
        return None
    number, words = found[0], _named(prepared[found[0].end :]).split()
    if number.value is None or number.start > 0 or len(words) > 3 or (number.currency and words):
        return None
    if not all(map(_UNIT_WORD.fullmatch, words)) or not _NO_UNIT.isdisjoint(words):
        return None
    return Quantity(number.value, _unit(number.currency or " ".join(words)))


def _named(text: str) -> str:
    for symbol, name in _SYMBOLS.items():
        text = text.replace(symbol, f" {name} ")
    return text


def _unit(text: str) -> tuple[str, ...]:
    """The words up to the first punctuation, without the plural's s."""
    words = re.split(r"[.,;:!?()]", _named(text), maxsplit=1)[0].casefold().split()
    return tuple(re.sub(r"(?<!s)s$", "", word) for word in words)
