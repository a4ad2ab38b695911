"""Texts that pip brings: the names of emoji in eight languages (Unicode CLDR), by the package
`emoji`. Which language is it?"""

from functools import cache

from nso_hf.refusal import refusal
from nso_hf.tasks.images.openmoji import concept

LANGUAGES = ("de", "en", "es", "fr", "id", "it", "pt", "tr")
"""Those of the package that are written in Latin letters: no letter gives the others away."""

_FULLY_QUALIFIED = 2  # others are further spellings of the same emoji
_HELD_OUT = 5  # one concept in so many


def emoji_names(split: str) -> tuple[list[str], list[str]]:
    """Names, and the language of each, of the emoji of training concepts or of held-out ones.

    No concept (woman running, man running) is in both splits. Flags and skin tones are left out,
    which each language says by one word, and names that several languages have.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: the package is not installed.
    """
    rows = [row for row in _rows() if row[2] == (split == "test")]
    return [name for name, _, _ in rows], [language for _, language, _ in rows]


@cache
def _rows() -> list[tuple[str, str, bool]]:
    """Name, language, and whether it is held out."""
    try:
        import emoji
    except ImportError as error:
        cure = "Run pip install 'nso_hf[text]', or name other texts"
        raise refusal("dataset", "emoji_languages", "emoji is not installed", cure) from error
    emoji.config.load_language(list(LANGUAGES))
    named: dict[tuple[str, str], str] = {}  # the first emoji of that name
    for characters, entry in sorted(emoji.EMOJI_DATA.items()):
        is_flag = any(part in entry["en"] for part in ("flag", "Flag")) or _is_region(characters)
        if entry["status"] != _FULLY_QUALIFIED or "skin_tone" in entry["en"] or is_flag:
            continue
        for language in LANGUAGES:
            named.setdefault((_spaced(entry[language]), language), _spaced(entry["en"]))
    languages: dict[str, list[str]] = {}
    for name, language in named:
        languages.setdefault(name, []).append(language)
    held_out = set(sorted({concept(english) for english in named.values()})[::_HELD_OUT])
    return [
        (name, language, concept(english) in held_out)
        for (name, language), english in named.items()
        if len(languages[name]) == 1
    ]


def _is_region(characters: str) -> bool:
    return 0x1F1E6 <= ord(characters[0]) <= 0x1F1FF


def _spaced(name: str) -> str:
    return name.strip(":").replace("_", " ")
