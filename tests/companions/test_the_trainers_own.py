"""The Trainer's own NEFTune, label smoothing and weight decay, with NSO and SAM: plain loops."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from nso_hf import NSOTrainer
from tests.reference import batched, config, draw, largest_difference, tiny_llama, token_data

DATA, STEPS, BATCH = token_data(24), 3, 8
SIGMA, RHO, LEARNING_RATE = 0.05, 0.05, 0.3
METHODS = {"nso": {"sigma": SIGMA}, "sam": {"method_kwargs": {"rho": RHO}}}
TOLERANCE = 1e-6  # float32, three steps: as the engine's own comparison with a loop


def batch_of(step):
    rows = DATA[BATCH * step : BATCH * (step + 1)]
    return batched(rows)


def loss_of(model, step, noise=None, smoothing=0.0):
    """Cross-entropy over the predicted tokens, of embeddings with `noise`, of labels of which
    `smoothing` is spread over all classes."""
    batch = batch_of(step)
    embeddings = model.model.embed_tokens(batch["input_ids"])
    embeddings = embeddings if noise is None else embeddings + noise[step]
    mask = batch["attention_mask"]
    log_p = model(inputs_embeds=embeddings, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    losses = -(1 - smoothing) * chosen - smoothing * log_p.mean(-1)
    return losses[counted].sum() / counted.sum()


def loop(method, optimizer=None, **options):
    """The gradient of `loss_of` by the method, given to an optimizer."""
    model = tiny_llama()
    parameters = list(model.parameters())
    optimizer = (optimizer or plain_sgd)(model)

    def gradient_at(W, direction, step):
        for p, w, d in zip(parameters, W, direction, strict=True):
            p.data = w + d
        own = torch.autograd.grad(loss_of(model, step, **options), parameters)
        for p, w in zip(parameters, W, strict=True):
            p.data = w.clone()
        return own

    for step in range(STEPS):
        W = [p.detach().clone() for p in parameters]
        if method == "nso":
            U = draw(model, 42, step, 0, SIGMA, "normal")
            above = gradient_at(W, U, step)
            below = gradient_at(W, [-u for u in U], step)
            gradient = [(a + b) / 2 for a, b in zip(above, below, strict=True)]
        else:
            ascent = gradient_at(W, [torch.zeros_like(w) for w in W], step)
            norm = torch.stack([g.norm() for g in ascent]).norm()
            gradient = gradient_at(W, [RHO * g / norm for g in ascent], step)
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = g
        optimizer.step()
    return model


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def trainer_of(folder, method, callbacks=(), **options):
    settings = {
        "method": method,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "max_grad_norm": 0.0,
    }
    return NSOTrainer(
        model=tiny_llama(),
        args=config(folder, **{**settings, **METHODS[method], **options}),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=list(callbacks),
    )


class Noise(TrainerCallback):
    """What NEFTune adds to the embeddings in each pass."""

    def __init__(self):
        self.training, self.evaluating = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().register_forward_hook(self.look)

    def look(self, module, inputs, output):
        noise = output - nn.functional.embedding(inputs[0], module.weight)
        (self.training if module.training else self.evaluating).append(noise.detach())


@pytest.mark.parametrize("method", METHODS)
def test_neftune_adds_one_noise_to_all_evaluations(tmp_path, method):
    alpha, noise = 5.0, Noise()
    options = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, method, [noise], neftune_noise_alpha=alpha, **options)
    trainer.train()
    assert len(noise.training) == 2 * STEPS and noise.evaluating
    bound = alpha / (12 * 32) ** 0.5  # tokens x sizes of an embedding
    for first, second in zip(noise.training[::2], noise.training[1::2], strict=True):
        # The difference of two numbers below 1, in float32, twice.
        assert (first - second).abs().max() <= 1e-6
        assert 0.9 * bound < first.abs().max() <= bound + 1e-6
    assert (noise.training[0] - noise.training[2]).abs().max() > 0.1 * bound
    assert all(each.abs().max() == 0 for each in noise.evaluating)
    expected = loop(method, noise=noise.training[::2])
    assert largest_difference(expected, loop(method)) > 1e-3
    assert largest_difference(trainer.model, expected) <= TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_label_smoothing_is_in_every_evaluation(tmp_path, method):
    trainer = trainer_of(tmp_path, method, label_smoothing_factor=0.2)
    trainer.train()
    expected = loop(method, smoothing=0.2)
    assert largest_difference(expected, loop(method)) > 1e-3
    assert largest_difference(trainer.model, expected) <= TOLERANCE
    with torch.no_grad():
        loss = loss_of(trainer.model, 0, smoothing=0.2).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)


def decayed(model):
    """The Trainer leaves out gains, of one dimension."""
    return [
        {"params": [p for p in model.parameters() if (p.dim() > 1) is matrices], "weight_decay": wd}
        for matrices, wd in ((True, 0.1), (False, 0.0))
    ]


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(decayed(model), lr=LEARNING_RATE),
    # Adam divides by what may be small: with eps 1e-3 an error of 1e-8 in a gradient moves a
    # weight by at most 1e-2 * 1e-8/1e-3 in a step.
    "adamw_torch": lambda model: torch.optim.AdamW(decayed(model), lr=1e-2, eps=1e-3),
}
OF = {"sgd": {}, "adamw_torch": {"learning_rate": 1e-2, "adam_epsilon": 1e-3}}


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_is_of_the_weights_not_of_where_they_are_evaluated(tmp_path, method, optim):
    trainer = trainer_of(tmp_path, method, optim=optim, weight_decay=0.1, **OF[optim])
    trainer.train()
    expected = loop(method, OPTIMIZERS[optim])
    assert largest_difference(trainer.model, expected) <= TOLERANCE
    without = trainer_of(tmp_path, method, optim=optim, **OF[optim])
    without.train()
    assert largest_difference(without.model, expected) > 1e-4
