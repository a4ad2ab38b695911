"""What is perturbed follows what is trained, and is not looked up where nothing has changed."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from nso_hf import NSOTrainer
from nso_hf.refusal import Refusal
from tests.reference import config
from tests.step.test_passes import Net, regression

STEPS = 4


class Seen(Net):
    """Keeps its parameters as each pass finds them."""

    def look(self):
        return {name: p.detach().clone() for name, p in self.named_parameters()}


class Before(TrainerCallback):
    """Changes something before the third step."""

    def __init__(self, change):
        self.change = change

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            self.change(args, model)


def displaced(tmp_path, change):
    """Of each step the names of the parameters that differ between W + U and W - U."""
    model = Seen()
    args = config(tmp_path, sigma=0.1, max_steps=STEPS, learning_rate=0.01)
    callbacks = [Before(change)]
    trainer = NSOTrainer(model, args, train_dataset=regression(), callbacks=callbacks)
    selections = []
    select = trainer._nso_select_for_training

    def counted(model):
        selections.append(trainer.state.global_step)
        return select(model)

    trainer._nso_select_for_training = counted
    trainer.train()
    passes = [model.seen[2 * step : 2 * step + 2] for step in range(STEPS)]
    names = [{n for n in up if not torch.equal(up[n], down[n])} for up, down in passes]
    return names, selections


ALL = {"body.weight", "body.bias", "out.weight", "out.bias"}


def freeze(args, model):
    model.body.weight.requires_grad_(False)


def put_another_in_its_place(args, model):
    model.out = nn.Linear(8, 1, bias=False)


def move_in_memory(args, model):
    model.body.weight.data = model.body.weight.data.clone()


def narrow_the_options(args, model):
    args.perturb_min_ndim = 2


@pytest.mark.parametrize(
    ("change", "then"),
    [
        (lambda args, model: None, ALL),
        (freeze, ALL - {"body.weight"}),
        (put_another_in_its_place, ALL - {"out.bias"}),
        (move_in_memory, ALL),
        (narrow_the_options, {"body.weight", "out.weight"}),
    ],
    ids=["nothing", "freeze", "replace", "move", "options"],
)
def test_what_is_perturbed_follows_what_is_trained(tmp_path, change, then):
    names, selections = displaced(tmp_path, change)
    assert names == [ALL, ALL, then, then]
    # Once when the training begins, once in its first step, and where something has changed.
    changes = [2] if then != ALL or change is move_in_memory else []
    assert selections == [0, 0, *changes]


def test_a_hook_that_steps_is_refused_when_it_appears(tmp_path):
    def register(args, model):
        model.body.weight.register_post_accumulate_grad_hook(lambda p: None)

    with pytest.raises(Refusal, match=r"body\.weight.*a hook on its gradient"):
        displaced(tmp_path, register)
