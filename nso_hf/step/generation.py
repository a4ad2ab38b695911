"""Trainers that generate text, or count their calls, in a training step, which NSO repeats at
displaced weights."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch import nn
from transformers import Trainer

from nso_hf.refusal import Refusal, refusal

_REPEATED = ("training_step", "_prepare_inputs")
_GENERATES = re.compile(r"generat(e|ion)|^_step|^_buffered_inputs")
"""Names in the code of these methods that tell: as in GRPO, online DPO and distillation of TRL, and
in what was made of them."""

_RULE = "it generates or counts its calls inside a training step, which NSO repeats at W + U"


def check_generates_nothing(trainer: type[Trainer]) -> None:
    """
    Raises:
        ValueError: the class, or one it inherits from, generates in a training step.
    """
    for base in trainer.__mro__[: trainer.__mro__.index(Trainer)]:
        for method in _REPEATED:
            code = getattr(inspect.unwrap(vars(base).get(method, len)), "__code__", None)
            if code is not None and any(map(_GENERATES.search, code.co_names)):
                cure = "Use a trainer whose training_step is one forward and backward pass"
                raise refusal("trainer", base.__qualname__, _RULE, cure)


@contextmanager
def generation_refused(model: nn.Module) -> Iterator[None]:
    """Inside, `model.generate` raises a `ValueError`."""
    if not hasattr(model, "generate"):
        yield
        return
    own = vars(model).get("generate")
    object.__setattr__(model, "generate", _refuse)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(model, "generate")
        else:
            object.__setattr__(model, "generate", own)


def _refuse(*args: object, **kwargs: object) -> NoReturn:
    raise _generating()


def _generating() -> Refusal:
    cure = "Generate in a callback, or in _prepare_inputs, which is called once, at W"
    return refusal("generate", "called in an evaluation of the loss", _RULE, cure)
