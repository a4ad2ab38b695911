"""One way of writing for what Unicode, LaTeX and Markdown write in many."""

import re
import unicodedata

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u301c\ufe58\ufe63\uff0d"
_INVISIBLE = "\u00ad\u200b\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"
_CHARACTERS = str.maketrans(
    dict.fromkeys(_DASHES, "-")
    | dict.fromkeys("\u2018\u2019", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
    | dict.fromkeys("\u00d7\u00b7\u22c5\u2219", "*")
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
    | {"\u066b": ".", "\u066c": ",", "\u060c": ","}  # Arabic: decimal, thousands, comma
    | dict.fromkeys(_INVISIBLE)
)
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u207a\u207b]+")
_FRACTION_AFTER_DIGIT = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")  # 2½
_THOUSANDS = re.compile(r"(?<=\d)(?:[\u00a0\u2009\u202f'\u2019_]|\{,\}|\\,)(?=\d{3}(?!\d))")

_LATEX_NAMES = {
    "cdot": "*", "times": "*", "div": "/", "pm": "±", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥",
    "ne": "≠", "neq": "≠", "to": "→", "rightarrow": "→", "infty": "∞", "pi": "π", "theta": "θ",
    "alpha": "α", "beta": "β", "lambda": "λ", "sqrt": "√", "cup": "∪", "cap": "∩", "in": "∈",
    "circ": "°", "degree": "°", "left": "", "right": "", "displaystyle": "", "quad": " ",
}  # fmt: skip
_LATEX_NAME = re.compile(r"\\([A-Za-z]+)")
_LATEX_SPACE = re.compile(r"(?<!\\)\\[,;:!]")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(
    r"(?P<digit>(?<=\d))?\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|\s?(\d)\s?(\d))"
)
_MATHS = re.compile(
    r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]"
)
_ONE_IN_BRACES = re.compile(r"(?<=[\^_√])\{(\w|-?\d+)\}")
_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w(-])")
_EMPHASIS = re.compile(r"\*\*|`|(?<![\w*)])\*([^*\s][^*]*)\*(?![\w*(])")


def plain(text: str) -> str:
    """The text in plain characters: NFKC and ASCII digits, dashes and quotes, 10² as 10^2, \\frac34
    as 3/4, 1{,}000 as 1,000; without the signs of LaTeX and Markdown that are not seen."""
    text = _SUPERSCRIPTS.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = _THOUSANDS.sub(",", _FRACTION_AFTER_DIGIT.sub(" ", text))
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    text = re.sub(r"[^\D0-9]", lambda m: str(unicodedata.decimal(m[0])), text)
    if "\\" in text or "$" in text:
        text = _without_latex(text)
    return _EMPHASIS.sub(r"\1", _POWER.sub("^", text))


def _without_latex(text: str) -> str:
    text = _MATHS.sub(lambda m: m[1] or m[2] or m[3], text)
    text = text.replace("^\\circ", "\\circ").replace("^{\\circ}", "\\circ")
    text = _LATEX_SPACE.sub("", _LATEX_TEXT.sub(r" \1", text)).replace("\\$", "$")
    text = _LATEX_FRACTION.sub(_fraction, text.replace("\\%", "%"))
    text = _LATEX_NAME.sub(lambda m: _LATEX_NAMES.get(m[1], m[0]), text)
    return _ONE_IN_BRACES.sub(r"\1", text)


def _fraction(match: re.Match[str]) -> str:
    above, below = match[2] or match[4] or "", match[3] or match[5] or ""
    if above.isdecimal() and below.isdecimal():
        return f"{' ' if match['digit'] is not None else ''}{above}/{below}"
    return f"({above})/({below})"


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds, if there is one."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:end]
    return rest if box else None


def is_word_character(character: str) -> bool:
    """Letters, digits and the marks that combine with them, which `\\w` leaves out."""
    return unicodedata.category(character)[0] in "LMN" or character == "_"
