"""The command `nso`: recipes and measurements by name."""

import sys
from importlib import import_module

from nso_hf.running.launching import accelerate_configs

COMMANDS = {
    "cot": ("nso_hf.recipes.cot_finetuning", "fine-tune a language model on chains of thought"),
    "clip": ("nso_hf.recipes.clip_pretraining", "pretrain a model of open_clip on captions"),
    "mae": ("nso_hf.recipes.mae_pretraining", "pretrain a masked autoencoder on images"),
    "images": ("nso_hf.recipes.image_classification", "train a classifier of images"),
    "text": ("nso_hf.recipes.text_classification", "train a classifier of texts"),
    "sft": ("nso_hf.integrations.trl", "TRL's script for supervised fine-tuning, with NSO"),
    "dpo": ("nso_hf.integrations.trl", "TRL's script for direct preference optimization, with NSO"),
    "kto": ("nso_hf.integrations.trl", "TRL's script for KTO, with NSO"),
    "reward": ("nso_hf.integrations.trl", "TRL's script for reward models, with NSO"),
    "compare": ("nso_hf.recipes.compare", "compare methods over settings and seeds"),
    "robustness": ("nso_hf.robustness.__main__", "measure what survives changes to the weights"),
    "sigma": ("nso_hf.curvature.suggest", "find the sigma that raises the loss by so much"),
    "curvature": ("nso_hf.curvature.__main__", "measure and compare checkpoints"),
}
"""Name -> the module whose `main` it is, and what it does."""


def usage() -> str:
    lines = [f"  {name:<24}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nso COMMAND [options]",
            "",
            "Flat minima for Hugging Face training: Noise Stability Optimization.",
            "",
            *lines,
            f"  {'accelerate-config NAME':<24}print the path of a configuration of accelerate",
            "",
            "nso COMMAND --help lists the options of a command, nso --version the version.",
            "In several processes:",
            "  accelerate launch --config_file $(nso accelerate-config NAME) -m nso_hf cot ...",
        ]
    )


def accelerate_config(names: list[str]) -> str:
    """The path of a configuration that is installed with the library; without a name, all names."""
    there = accelerate_configs()
    if not names:
        return "\n".join(there)
    if len(names) > 1 or names[0] not in there:
        fail(f"accelerate-config={' '.join(names)!r}: unknown. Choose one of {', '.join(there)}.")
    return str(there[names[0]])


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command that the command line names."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
    elif name == "--version":
        from nso_hf import __version__

        print(__version__)
    elif name == "accelerate-config":
        print(accelerate_config(words))
    elif name in COMMANDS:
        sys.argv = [f"nso {name}", *words]
        try:
            module = import_module(COMMANDS[name][0])
        except KeyboardInterrupt:
            sys.exit("\nInterrupted.")
        from nso_hf.running.program import run

        run(module.main)
    else:
        fail(f"command={name!r}: unknown. Choose one of {', '.join(COMMANDS)}, accelerate-config.")


if __name__ == "__main__":
    main()
