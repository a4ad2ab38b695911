"""Writes what docs/methods.md says of each method, from the code:
`python -m tests.methods.documentation`."""

import inspect
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path

from nso_hf import NSOTrainer
from nso_hf.backends.deepspeed import DeepSpeed
from nso_hf.backends.fsdp2 import FSDP2
from nso_hf.backends.replicated import Replicated
from nso_hf.methods import METHODS
from tests.distributed.back_ends import lora
from tests.methods.equations import OPTIONS
from tests.reference import config, tiny_llama, token_data

COLUMNS = {
    "one process": Replicated,
    "DDP": Replicated,
    "FSDP2": FSDP2,
    "ZeRO 0 to 3": DeepSpeed,
}
MEMORY = {
    "nso": "W",
    "sam": "W, g1",
    "asam": "W, g1; another in between",
    "usam": "W, g1",
    "rsam": "W, u or g1",
    "bsam": "W, m, s, g1, the mean size of g1",
    "fsam": "W, m, g1, the mean of g1",
    "cr_sam": "W, g0",
    "hero": "W, g0, g1, two displacements",
    "msam": "W",
    "async_sam": "W, the gradient before",
    "flat_lora": "the base weights that are adapted",
    "zo": "W, in place of the activations",
}
"""Tensors of the weights' size beside the weights, their gradient and what the optimizer keeps."""

MARK = "## Which method runs where\n"
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def passes(name: str) -> int:
    """Forward passes of a micro-batch, counted."""
    counted = []

    class Counting(NSOTrainer):
        def compute_loss(self, *args, **kwargs):
            counted.append(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        options = {"method_kwargs": OPTIONS[name]} if name in OPTIONS else {}
        optimizer = {"optim": "sgd"} if name == "bsam" else {}
        args = config(folder, method=name, max_steps=2, **options, **optimizer)
        model = lora(tiny_llama()) if name == "flat_lora" else tiny_llama()
        Counting(model=model, args=args, train_dataset=token_data(8)).train()
    return counted.count(1)


def has(name: str, column: str) -> bool:
    return COLUMNS[column].keeps_gradients_apart or not METHODS[name].reads_gradients


def page() -> Iterator[str]:
    yield PAGE.read_text().partition(MARK)[0] + MARK + "\n"
    yield f"| method | passes | {' | '.join(COLUMNS)} | kept beside the weights |\n"
    yield f"|---|---|{'---|' * len(COLUMNS)}---|\n"
    for name in METHODS:
        cells = ["yes" if has(name, column) else "refused" for column in COLUMNS]
        yield f"| `{name}` | {passes(name)} | {' | '.join(cells)} | {MEMORY[name]} |\n"
    for name, method in METHODS.items():
        text = inspect.getdoc(sys.modules[method.__module__]) or ""
        title, _, rest = text.partition("\n\n")
        yield f"\n## {name}\n\n{title}\n\n{rest}\n"
        own = fields(method.Options)
        if own:
            yield "\n| option | default | |\n|---|---|---|\n"
        for each in own:
            default = "none" if each.default is None else each.default
            text = f"{each.metadata['help']} {each.metadata['typical']}"
            yield f"| `{each.name}` | {default} | {text} |\n"
        if method.reads:
            names = ", ".join(f"`{name}`" for name in sorted(method.reads))
            yield f"\nReads {names} of [NSO's options](method.md#options).\n"


if __name__ == "__main__":
    PAGE.write_text("".join(page()))
