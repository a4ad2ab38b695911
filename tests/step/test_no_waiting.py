"""A step waits for the device no more often than plain training does, and keeps no more tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from nso_hf import NSOTrainer
from tests.reference import config, tiny_llama, token_data

WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
"""Operations that read from the device: `.item()`, `bool(tensor)`, `torch.equal`. Copies to the CPU
are no operation of their own where the tensors are there already."""


class Watch(TorchDispatchMode, TrainerCallback):
    """What waited in each step, apart from what the model itself waits for in its passes."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.is_in_the_model = False

    def on_step_begin(self, *args, **kwargs):
        self.steps.append([])

    def on_step_end(self, *args, **kwargs):
        self.steps.append([])  # of what is between the steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if self.steps and name in WAITS and not self.is_in_the_model:
            self.steps[-1].append(name)
        return func(*args, **(kwargs or {}))


def waits(tmp_path, trainer_class, **options):
    watch = Watch()
    args = config(
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=2,
        logging_strategy="no",
        **options,
    )
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: setattr(watch, "is_in_the_model", True))
    model.register_forward_hook(lambda *_: setattr(watch, "is_in_the_model", False))
    data = token_data(64)
    trainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=[watch])
    with watch:
        trainer.train()
    return watch.steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sign": "alternate"},
        {"num_perturbations": 2, "clean_weight": 0.5},
        {"distribution": "rademacher", "interval": 2},
        {"method": "sam"},
        {"method": "msam"},
        {"method": "fsam"},
        {"method": "zo"},
        {"backup": "cpu"},
    ],
)
def test_no_step_but_the_first_waits_more_often_than_plain_training(tmp_path, options):
    plain = waits(tmp_path / "plain", Trainer)
    found = waits(tmp_path / "nso", NSOTrainer, **options)
    assert len(plain) == len(found) == 8
    assert found[2:] == plain[2:]
    # The watch sees waits: the first step looks for weights that are edited through `.data`.
    assert found[0] or options.get("method") in ("msam", "zo")


def test_the_watch_sees_a_wait():
    watch = Watch()
    watch.steps.append([])
    with watch:
        assert torch.ones(()).item() == 1 and torch.ones(1).tolist() == [1]
        assert bool(torch.ones(())) and torch.equal(torch.ones(1), torch.ones(1))
    assert len(watch.steps[0]) >= 3
