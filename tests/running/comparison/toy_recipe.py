"""A recipe that trains nothing: its figures are a closed form of its options."""

import json
import math
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nso_hf.running.command_line import RecipeParser


@dataclass
class ToyOptions:
    output_dir: str
    seed: int = 0
    learning_rate: float = 0.1
    sigma: float = 0.0
    label_noise: float = 0.0
    max_steps: int = 10
    test: bool = True
    pause: float = 0.0
    wrong: str = ""
    wrong_seed: int = 1
    measures: bool = False


OPTIONS = [ToyOptions]


def accuracy(options: ToyOptions, split: str) -> float:
    """Best at a learning rate of 0.1, and at a sigma of the share of wrong labels."""
    noise = random.Random(f"{options.seed} {split}").gauss(0, 0.02)
    own = random.Random(f"{options.seed} {options.sigma:g} {split}").gauss(0, 0.005)
    rate = math.log10(options.learning_rate / 0.1) ** 2
    done = 1 - math.exp(-options.max_steps / 5)
    fit = (options.sigma - options.label_noise) ** 2
    return done * (0.9 - 0.1 * rate - fit) + noise + own


def main(argv: list[str] | None = None) -> None:
    (options,) = RecipeParser(OPTIONS).parse(argv)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if (output / "begun").exists():
        raise RuntimeError("the folder holds an unfinished run")
    (output / "begun").write_text(str(os.getpid()))
    time.sleep(options.pause)
    if options.wrong and options.seed == options.wrong_seed:
        if options.wrong == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if options.wrong == "silent":
            return
        if options.wrong != "diverged":
            raise RuntimeError(f"loss is nan at step {options.max_steps}")
    splits = ["validation", "test"] if options.test else ["validation"]
    figures: dict[str, Any] = {s: {"accuracy": accuracy(options, s)} for s in splits}
    if options.wrong == "diverged" and options.seed == options.wrong_seed:
        figures["validation"]["loss"] = math.nan
    passes = 2 if options.sigma else 1
    figures |= {
        "train_seconds": 0.01 * options.max_steps * passes,
        "steps": options.max_steps,
        "peak_memory_bytes": 1000,
        "versions": {"python": "3"},
        "log": [{"loss": 1.0}] * 1000,
        "toy_options": {"seed": options.seed},
    }
    if options.measures:
        trace = 100 / (1 + 100 * options.sigma)
        figures |= {
            "curvature": {"curvature/trace": trace * (1 + 0.1 * options.seed)},
            "robustness": [
                {
                    "kind": kind,
                    "strength": strength,
                    "accuracy": figures["validation"]["accuracy"] * share * (1 + options.sigma),
                    "loss": 1.0,
                }
                for kind, values in {
                    "none": {None: 1},
                    "bits": {8: 1, 4: 0.9, 3: 0.7, 2: 0.3},
                    "sparsity": {0.5: 0.95, 0.7: 0.8, 0.9: 0.4},
                }.items()
                for strength, share in values.items()
            ],
            "forgetting": {
                "before": {"loss": 1.0},
                "after": {"loss": 1.5 - options.sigma + 0.01 * options.seed},
            },
        }
    (output / "results.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
