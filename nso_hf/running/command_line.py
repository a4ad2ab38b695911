"""Recipes' options, from flags or a YAML file."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from nso_hf.arguments import NSOArguments
from nso_hf.refusal import Refusal, refusal
from nso_hf.running.config_file import keys_of, read_config
from nso_hf.running.program import end_with

_MOST_USED = {
    "output_dir",
    "resume_from_checkpoint",
    "seed",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "activation_checkpointing",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "report_to",
    "use_cpu",
}
"""The training options that `--help` shows."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, and only defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        name = action.option_strings[0]
        if action.nargs == "?":
            return f"{name} {{true,false}}"
        if action.choices is None:
            return f"{name} {self._format_args(action, action.dest.rpartition('_')[2].upper())}"
        choices = [str(getattr(choice, "value", choice)) for choice in action.choices]
        return f"{name} {{{','.join(choices)}}}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_unset = action.default is None or action.default == []
        return action.help if is_unset else super()._get_help_string(action)


class _HelpAll(argparse.Action):
    """`--help_all`."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        assert isinstance(parser, RecipeParser)
        parser.help_is_whole = True
        parser.print_help()
        parser.exit()


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` with `--config FILE.yaml`, whose values the command line overrides.

    `--help` shows the recipe's own options and NSO's, and the most used of training; `--help_all`
    shows all. Errors are one line, since either is longer than a screen.
    """

    def __init__(
        self, dataclass_types: Sequence[Any], configs: Path | None = None, **kwargs: Any
    ) -> None:
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE] [options]",
            formatter_class=_HelpFormatter,
            **kwargs,
        )
        self.help_is_whole = False
        self._configs = configs  # a folder of files that are found by name
        names = ", ".join(self._named_configs())
        named = f", or the name of one that is installed: {names}" if names else ""
        self.add_argument("--help_all", action=_HelpAll, help="Show all training options too.")
        self.add_argument(
            "--config", metavar="FILE", help=f"YAML file of options{named}; flags override it."
        )
        for action in self._actions:
            if action.dest == "resume_from_checkpoint":
                action.help = "The checkpoint to go on from; 'last': the last one in --output_dir."

    def _named_configs(self) -> list[str]:
        """Of the folder's files those that hold options of this program alone."""
        known = {action.dest for action in self._actions}
        files = sorted(self._configs.glob("*.yaml")) if self._configs is not None else []
        return [file.stem for file in files if keys_of(file) <= known]

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        # --two_sided false says what --no_two_sided does.
        shown = [a for a in self._actions if not isinstance(a, argparse._StoreFalseAction)]
        for title, names in self._sections():
            formatter.start_section(title)
            formatter.add_arguments([action for action in shown if action.dest in names])
            formatter.end_section()
        if not self.help_is_whole:
            formatter.add_text("--help_all shows all options of transformers.TrainingArguments.")
        return formatter.format_help()

    def _sections(self) -> Iterator[tuple[str, set[str]]]:
        """Titles and the names of the options under them."""
        nso, training = (
            {o.name for o in fields(kind)} for kind in (NSOArguments, TrainingArguments)
        )
        for kind in self.dataclass_types:
            own = {option.name for option in fields(kind)} - nso - training
            yield getattr(kind, "_argument_group_name", "options"), own
        yield "noise stability optimization", nso
        yield "trainer", training if self.help_is_whole else _MOST_USED
        yield "this program", {"config", "help", "help_all"}

    def error(self, message: str) -> NoReturn:
        end_with(f"error: {message}\n(--help lists the options)", status=2)

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The filled dataclasses, each checked by its own `__post_init__`.

        Raises:
            ValueError: an option is unknown or refused.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        config, _ = first.parse_known_args(argv)
        if config.config is not None:
            self._set_defaults_from(self._config_file(config.config))
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

    def _config_file(self, asked: str) -> Path:
        named = self._configs / f"{asked}.yaml" if self._configs is not None else Path(asked)
        return named if named.is_file() and not Path(asked).is_file() else Path(asked)

    def _set_defaults_from(self, path: Path) -> None:
        known = {action.dest: action for action in self._actions}
        hints = {n: h for kind in self.dataclass_types for n, h in get_type_hints(kind).items()}
        options = read_config(path, known, hints)
        for name in options:
            if name not in hints:
                self._refuse_unknown(f"--{name}", f" in {path}")
            known[name].required = False
        self.set_defaults(**options)

    def _refuse_unknown(self, flag: str, where: str = "") -> NoReturn:
        name = flag.split("=")[0]
        flags = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(name, flags, n=1)
        cure = f"Did you mean {near[0]}" if near else "--help lists the options"
        raise refusal("option", name, f"unknown{where}", cure)
