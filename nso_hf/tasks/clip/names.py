"""What prompts call the classes."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nso_hf.refusal import Refusal, refusal
from nso_hf.running.tables import kind

_WORDNET_ID = re.compile(r"n\d{8}")


def named_classes(source: str, classes: Iterable[str]) -> dict[str, str]:
    """Class -> its name, of all classes that `source` has.

    Args:
        source: a JSON file with an object of class -> name, a list of the names of the classes 0,
            1, ... (or of the classes themselves), or ImageNet's index, number -> [WordNet id, name]
            (of which either can be the class); or imagenet: the names that open_clip has for the
            classes 0 to 999.
        classes: those that need a name.

    Raises:
        ValueError: the file cannot be read, a name in it is no text, or a class has none.
    """
    needed = sorted(set(classes))
    readings = [_imagenet()] if source == "imagenet" else _readings(source)
    for names in readings:
        if all(label in names for label in needed):
            for label, name in names.items():
                if not isinstance(name, str) or not name.strip():
                    rule = f"the name of class {label!r} is {kind(name)}"
                    rule += " without letters" if isinstance(name, str) else ", no text"
                    raise refusal(
                        "class_names", source, rule, "Write a name, or leave out the class"
                    )
            return names
    missing = [label for label in needed if label not in readings[0]]
    rule = f"has no name for the classes {', '.join(missing[:5])}"
    raise refusal("class_names", source, rule, "Add them")


def _imagenet() -> dict[str, Any]:
    from nso_hf.tasks.clip.classification import IMAGENET_NAMES

    return IMAGENET_NAMES


def _readings(source: str) -> list[dict[str, Any]]:
    """The ways in which a file can be read as class -> name."""

    def refuse(rule: str) -> Refusal:
        return refusal("class_names", source, rule, """Write it as '{"class": "name"}'""")

    try:
        entries = json.loads(Path(source).read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON ({error})") from error
    if isinstance(entries, list):
        by_number = {str(number): name for number, name in enumerate(entries)}
        return [by_number, {str(name): name for name in entries}]
    if not isinstance(entries, dict):
        raise refuse("neither a mapping nor a list")
    if entries and all(_is_of_the_index(entry) for entry in entries.values()):
        # As the index spells them: great_white_shark.
        by_number = {number: _spaced(name) for number, (_, name) in entries.items()}
        return [by_number, {label: _spaced(name) for label, name in entries.values()}]
    return [entries]


def _is_of_the_index(entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2):
        return False
    return isinstance(entry[0], str) and bool(_WORDNET_ID.fullmatch(entry[0]))


def _spaced(name: Any) -> Any:
    return name.replace("_", " ") if isinstance(name, str) else name
