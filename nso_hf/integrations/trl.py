"""TRL's own training scripts with NSO: `nso sft`, `nso dpo`, `nso kto` and `nso reward`.

    nso sft --model_name_or_path MODEL --dataset_name DATA --sigma 0.01 --output_dir runs/sft

They take what `trl sft` and its neighbours take, the options of NSO and of `accelerate launch`, on
the command line or in a YAML file (`--config`); `--accelerate_config NAME` is one of this
library's, TRL's, or a path. For programs of one's own:

    from nso_hf.integrations.trl import NSOSFTConfig, NSOSFTTrainer  # and of DPO, KTO, Reward
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from accelerate.commands.launch import launch_command, launch_command_parser

from nso_hf.arguments import NSOArguments
from nso_hf.refusal import needs, refusal
from nso_hf.running.launching import accelerate_configs, is_launched
from nso_hf.trainer import NSOTrainerMixin

KINDS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}
"""Name of a script of TRL -> how its trainer's and its arguments' names begin."""


_MIXINS = {"Trainer": NSOTrainerMixin, "Config": NSOArguments}


@cache
def with_nso(name: str) -> type:
    """TRL's class of this name, a trainer or its arguments, with NSO: `NSONAME` of this module."""
    import trl

    mixin = next(mixin for ending, mixin in _MIXINS.items() if name.endswith(ending))
    return type(f"NSO{name}", (mixin, getattr(trl, name)), {"__module__": __name__})


def __getattr__(name: str) -> type:
    kind = name.removeprefix("NSO").removesuffix("Trainer").removesuffix("Config")
    if name.startswith("NSO") and name.endswith(tuple(_MIXINS)) and kind in KINDS.values():
        return with_nso(name.removeprefix("NSO"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def script_with_nso(name: str) -> Iterator[ModuleType]:
    """The module of TRL's script, which trains with NSO inside.

    Raises:
        MissingPackage: TRL is not installed.
    """
    needs(f"nso {name}", "trl", "trl")
    import trl

    names = [KINDS[name] + ending for ending in _MIXINS]
    before = {key: getattr(trl, key) for key in names}
    module = f"trl.scripts.{name}"
    sys.modules.pop(module, None)  # some versions look the classes up when it is imported
    try:
        vars(trl).update({key: with_nso(key) for key in names})
        yield import_module(module)
    finally:
        vars(trl).update(before)
        sys.modules.pop(module, None)


def train(name: str, words: Sequence[str]) -> None:
    """Run the script in this process.

    Raises:
        Refusal: one of the words belongs to nobody, or an option is out of its range.
    """
    with script_with_nso(name) as script:
        *groups, others = parsed(script, name, words)
        launch_options(name, others, words)
        script.main(*groups)


def launch(name: str, words: Sequence[str]) -> None:
    """Run it in processes of their own, by `accelerate launch`."""
    with script_with_nso(name) as script:
        *_, others = parsed(script, name, words)
    launch_command(launch_options(name, others, words))


def parsed(script: ModuleType, name: str, words: Sequence[str]) -> tuple[Any, ...]:
    """The script's groups of options, and the words that belong to none of them."""
    parser = script.make_parser()
    parser.prog = f"nso {name}"
    found: tuple[Any, ...] = parser.parse_args_and_config(
        list(words), return_remaining_strings=True
    )
    return found


def launch_options(name: str, others: Sequence[str], words: Sequence[str]) -> Namespace:
    """Those of `accelerate launch`, of `others`, to run `nso NAME WORDS`.

    Raises:
        Refusal: there is none of that name, or no such configuration.
    """
    parser = launch_command_parser()

    def error(message: str) -> NoReturn:
        cure = f"nso {name} --help and accelerate launch --help list what there is"
        raise refusal("options", " ".join(others), message, cure)

    parser.error = error
    given = list(others)
    if "--accelerate_config" in given:
        place = given.index("--accelerate_config")
        given[place : place + 2] = ["--config_file", _accelerate_config(given[place + 1 :])]
    program = ["--module", "nso_hf", name, *words]
    found: Namespace = parser.parse_args([*given, *program])
    if found.training_script != "nso_hf":
        error(f"{found.training_script!r} is no option")
    return found


def _accelerate_config(words: Sequence[str]) -> str:
    """The file that the first word names."""
    given = words[0] if words else ""
    if Path(given).is_file():
        return given
    trls = resources.files("trl") / "accelerate_configs"
    there = {
        Path(str(file)).stem: Path(str(file)) for file in trls.iterdir()
    } | accelerate_configs()
    if given not in there:
        cure = f"Choose one of {', '.join(sorted(there))}, or a file"
        raise refusal("accelerate_config", given, "neither a file nor a name", cure)
    return str(there[given])


def main() -> None:
    """`nso NAME`: launches processes, and trains in those that were launched."""
    name = sys.argv[0].split()[-1]
    (train if is_launched() else launch)(name, sys.argv[1:])
