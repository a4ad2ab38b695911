"""Options from a YAML file, each of the type that its dataclass declares."""

import argparse
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from transformers.hf_argparser import string_to_bool

from nso_hf.refusal import Refusal, refusal


class Loader(yaml.SafeLoader):
    """YAML 1.1, which would read 1e-4 as text, with numbers as everyone writes them."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

_WORDS = {int: "an integer", float: "a number", string_to_bool: "true or false"}


def keys_of(path: Path) -> set[str]:
    """The options that a file names."""
    return set(yaml.safe_load(path.read_text(encoding="utf-8")) or {})


def read_config(
    path: Path, actions: dict[str, argparse.Action], hints: dict[str, Any]
) -> dict[str, Any]:
    """The options in a file. Single values are read as the command line reads them, so that `no` is
    the text or the truth value that the option takes.

    Args:
        path: the file.
        actions: how the command line reads each option, by name.
        hints: the type of each option.

    Raises:
        ValueError: the file is no YAML mapping of known options to values of their types.
    """
    if not path.is_file():
        raise refusal(
            "config",
            str(path),
            "no such file",
            "Give the path of a YAML file, or a name that --help lists",
        )
    cure = "Write 'option: value' lines"
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise refusal("config", str(path), f"not UTF-8 ({error})", "Save it so") from error
    except yaml.YAMLError as error:
        raise refusal("config", str(path), f"not YAML ({error})", cure) from error
    if not isinstance(root, yaml.MappingNode):
        raise refusal("config", str(path), "not a mapping", cure)
    options: dict[str, Any] = {}
    for key, node in root.value:
        name = str(key.value)
        if name in options:
            raise refusal("config", str(path), f"it has {name} twice", "Remove one of them")
        options[name] = None
        if name in hints:
            options[name] = _value(name, node, actions[name], _kinds(hints[name]), loader)
    return options


def _kinds(hint: Any) -> list[Any]:
    """`dict[str, Any] | str | None` -> [dict, str, NoneType]"""
    is_union = get_origin(hint) in (Union, types.UnionType)
    parts = get_args(hint) if is_union else (hint,)
    return [get_origin(part) or part for part in parts]


def _value(
    name: str, node: yaml.Node, action: argparse.Action, kinds: list[Any], loader: Loader
) -> Any:
    written = loader.construct_object(node, deep=True)
    if written is None and types.NoneType in kinds:
        return None
    if isinstance(node, yaml.ScalarNode) and written is not None:
        if action.nargs == "+":
            raise refusal(name, node.value, "must be a list", f"Write it as [{node.value}]")
        return _converted(name, node.value, action)
    if isinstance(node, yaml.SequenceNode) and action.nargs == "+":
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode):
                raise refusal(name, written, "must be a list of single values", "Write [a, b]")
        return [_converted(name, item.value, action) for item in node.value]
    if any(isinstance(written, kind) for kind in (dict, list) if kind in kinds):
        return written
    raise _wrong_type(name, written, action)


def _converted(name: str, text: str, action: argparse.Action) -> Any:
    convert: Any = action.type or str
    try:
        value = convert(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise _wrong_type(name, text, action) from error
    if action.choices is not None and value not in action.choices:
        raise _wrong_type(name, text, action)
    return value


def _wrong_type(name: str, value: Any, action: argparse.Action) -> Refusal:
    choices = ", ".join(str(getattr(choice, "value", choice)) for choice in action.choices or ())
    kind: Any = action.type
    words = _WORDS.get(kind, f"one of {choices}" if choices else "a single value")
    return refusal(name, value, f"must be {words}", "Correct it in the configuration file")
