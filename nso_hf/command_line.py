"""Command lines: how a program ends, and recipes' options, from flags or a YAML file."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from nso_hf.refusal import Refusal, refusal


def run(main: Callable[[], None]) -> None:
    """Run the `main` of a program: a refusal or an interrupt ends in a line, not in a traceback."""
    try:
        main()
    except Refusal as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    leave_process_group()


def leave_process_group() -> None:
    """End the communication between processes, before they end themselves.

    A thread of Gloo drops the tensors of a collective after it has reported the result. It needs
    Python's lock for that, and aborts a process that is finalising (pytorch issue 190489).
    Destroying the group does not wait for that thread where something else still holds the group.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.1)


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` with `--config FILE.yaml`, whose values the command line overrides.

    Errors are one line, since the usage message of all training arguments is longer than a screen.
    """

    def __init__(self, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE] [options]",
            **kwargs,
        )
        self.add_argument(
            "--config", metavar="FILE", help="YAML file of options; flags override it."
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n(--help lists the options)\n")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The filled dataclasses, each checked by its own `__post_init__`.

        Raises:
            ValueError: an option is unknown or refused.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        config, _ = first.parse_known_args(argv)
        if config.config is not None:
            self._set_defaults_from(Path(config.config))
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            self._refuse_unknown(unknown[0])
        values = vars(namespace)
        values.pop("config")
        return tuple(self._fill(kind, values) for kind in self.dataclass_types)

    @staticmethod
    def _fill(kind: Any, values: dict[str, Any]) -> Any:
        names = [name for name, field in kind.__dataclass_fields__.items() if field.init]
        try:
            return kind(**{name: values[name] for name in names if name in values})
        except Refusal:
            raise
        except ValueError as error:  # of the training arguments' own checks
            raise Refusal(str(error)) from error

    def _set_defaults_from(self, path: Path) -> None:
        import yaml

        if not path.is_file():
            raise refusal("config", str(path), "no such file", "Give the path of a YAML file")
        try:
            options = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise refusal(
                "config", str(path), f"not YAML ({error})", "Write 'option: value' lines"
            ) from error
        if not isinstance(options, dict):
            raise refusal("config", str(path), "not a mapping", "Write 'option: value' lines")
        known = {action.dest: action for action in self._actions}
        for name in options:
            if name not in known or name in ("config", "help"):
                self._refuse_unknown(f"--{name}", f" in {path}")
            known[name].required = False
        self.set_defaults(**options)

    def _refuse_unknown(self, flag: str, where: str = "") -> NoReturn:
        name = flag.split("=")[0]
        flags = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(name, flags, n=1)
        cure = f"Did you mean {near[0]}" if near else "--help lists the options"
        raise refusal("option", name, f"unknown{where}", cure)
