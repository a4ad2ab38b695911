"""A penalty on, or a ball for, the distance to the first weights, against loops whose loss contains
it."""

import re

import pytest
import torch

from nso_hf.companions import DistancePenalty, DistanceProjection, EMACallback
from tests.reference import (
    batched,
    causal_loss_sum,
    config,
    draw,
    largest_difference,
    tiny_llama,
    token_data,
    train,
)

DATA = token_data(24)
SIGMA, LEARNING_RATE = 0.05, 0.5
PER_LAYER = {r"layers\.0": 0.0, r"layers\.1": 3.0, "": 0.3}


def strength_of(name, strengths):
    return next((s for pattern, s in strengths.items() if re.search(pattern, name)), 0.0)


def loop(strengths=None, project=None, sigma=SIGMA, ascent=0.0, clip=1.0, steps=3, batch=8):
    """SGD on the mean gradient at W + U and W - U (at W + e of SAM with `ascent`) of a loss that
    contains sum_i s_i/2 ||W_i - W_i0||^2, after clipping; `project` changes W after each step."""
    model = tiny_llama()
    names, parameters = zip(*model.named_parameters(), strict=True)
    first = [p.detach().clone() for p in parameters]
    for step in range(steps):
        rows = DATA[batch * step : batch * (step + 1)]
        inputs = batched(rows)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        W = [p.detach().clone() for p in parameters]
        gradient = [torch.zeros_like(p) for p in parameters]

        def differentiate(at, weight, penalised):
            for p, w in zip(parameters, at, strict=True):
                p.data = w.clone()
            loss = causal_loss_sum(model, inputs) / tokens
            if penalised:
                for name, p, w0 in zip(names, parameters, first, strict=True):
                    loss = loss + strength_of(name, strengths or {}) / 2 * (p - w0).square().sum()
            for g, own in zip(gradient, torch.autograd.grad(loss, parameters), strict=True):
                g.add_(own, alpha=weight)

        if ascent:
            differentiate(W, 1.0, penalised=False)
            norm = torch.stack([g.norm() for g in gradient]).norm()
            e = [ascent * g / norm for g in gradient]
            gradient = [torch.zeros_like(p) for p in parameters]
            differentiate([w + u for w, u in zip(W, e, strict=True)], 1.0, penalised=False)
            for name, g, w, w0 in zip(names, gradient, W, first, strict=True):
                g.add_(w - w0, alpha=strength_of(name, strengths or {}))
        else:
            U = draw(model, 42, step, 0, sigma, "normal")
            for sign in (1, -1):
                displaced = [w + sign * u for w, u in zip(W, U, strict=True)]
                differentiate(displaced, 0.5, penalised=True)
        norm = torch.stack([g.norm() for g in gradient]).norm().item()
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for p, w, g in zip(parameters, W, gradient, strict=True):
            p.data = w - LEARNING_RATE * scale * g
        if project:
            project(names, parameters, first)
    return model


def trained(folder, callbacks, data=DATA, resume=None, **options):
    settings = {
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        **({} if "method" in options else {"sigma": SIGMA}),
    }
    args = config(folder, **{**settings, **options})
    if resume is None:
        return train(tiny_llama(), data, args, callbacks=callbacks)
    from nso_hf import NSOTrainer

    trainer = NSOTrainer(model=tiny_llama(), args=args, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}])
@pytest.mark.parametrize("strengths", [0.5, PER_LAYER])
def test_the_penalty_is_in_the_loss(tmp_path, strengths, options):
    by_pattern = strengths if isinstance(strengths, dict) else {"": strengths}
    expected = loop(by_pattern, clip=options.get("max_grad_norm", 1.0))
    assert largest_difference(expected, loop()) > 1e-3
    trainer = trained(tmp_path, [DistancePenalty(strengths)], **options)
    # float32, three steps: as the engine's own comparison with a loop.
    assert largest_difference(trainer.model, expected) <= 1e-6


def test_accumulation_adds_it_once(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = trained(tmp_path, [DistancePenalty(0.5)], **options)
    assert largest_difference(trainer.model, loop({"": 0.5})) <= 1e-6


def test_an_ascent_is_that_of_the_loss_alone(tmp_path):
    trainer = trained(tmp_path, [DistancePenalty(0.5)], method="sam")
    assert largest_difference(trainer.model, loop({"": 0.5}, ascent=0.05)) <= 1e-6


def test_no_strength_changes_nothing(tmp_path):
    a, b = (trained(tmp_path, c) for c in ([], [DistancePenalty(0.0), DistanceProjection(1e6)]))
    assert largest_difference(a.model, b.model) == 0


def groups_of(names, pattern):
    found = [(i, re.search(pattern, name)) for i, name in enumerate(names)]
    groups = {}
    for i, match in found:
        if match:
            groups.setdefault(match[0], []).append(i)
    return list(groups.values())


@pytest.mark.parametrize(
    ("radius", "balls"), [(0.2, 1), ({r"layers\.\d+": 0.1}, 2), ({".*": 0.05}, 20)]
)
def test_the_projection_keeps_each_ball(tmp_path, radius, balls):
    ((pattern, length),) = radius.items() if isinstance(radius, dict) else [("", radius)]
    reached = []

    def project(names, parameters, first):
        groups = groups_of(names, pattern)
        assert len(groups) == balls
        for group in groups:
            differences = [(parameters[i].data - first[i]).double() for i in group]
            distance = torch.stack([d.norm() for d in differences]).norm().item()
            if distance > length:
                reached.append(distance)
                for i, d in zip(group, differences, strict=True):
                    parameters[i].data = (first[i] + length / distance * d).float()

    expected = loop(project=project, clip=0.0)
    assert reached and max(reached) > 1.5 * length
    trainer = trained(tmp_path, [DistanceProjection(radius)], max_grad_norm=0.0)
    assert largest_difference(trainer.model, expected) <= 1e-6
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    first = list(tiny_llama().parameters())
    for group in groups_of(names, pattern):
        squares = [(parameters[i] - first[i]).double().square().sum() for i in group]
        # float32 weights: rounding of each element below 2^-25 of its size.
        assert torch.stack(squares).sum().sqrt() <= length + 1e-5


def test_an_average_is_of_projected_weights(tmp_path):
    ema = EMACallback(0.5)
    trainer = trained(tmp_path, [ema, DistanceProjection(0.1)], max_grad_norm=0.0)
    first = list(tiny_llama().parameters())
    with ema.averaged():
        pairs = zip(trainer.model.parameters(), first, strict=True)
        distance = torch.stack([(p - w).norm() for p, w in pairs]).norm()
    assert 0.01 < distance <= 0.1 + 1e-5


@pytest.mark.parametrize("kind", [DistancePenalty, DistanceProjection])
def test_the_first_weights_stay_the_first_in_a_resumed_run(tmp_path, kind):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_grad_norm": 0.0}
    data = token_data(40)
    whole = trained(tmp_path, [kind(0.5)], data, **options)
    resumed = trained(tmp_path, [kind(0.5)], data, str(tmp_path / "checkpoint-2"), **options)
    assert largest_difference(whole.model, resumed.model) == 0
    without = trained(tmp_path / "without", [], data, **options)
    assert largest_difference(whole.model, without.model) > 1e-3
    with pytest.raises(
        ValueError, match=r"it has no distance_p\w+_0\.pt, which the training's distance_p"
    ):
        trained(tmp_path, [kind(0.5)], data, str(tmp_path / "without" / "checkpoint-2"), **options)


def test_fp16_scales_it_with_the_loss(tmp_path):
    """As under a loss scaler: gradients come multiplied by what `_nso_loss_scale` says."""
    from nso_hf import NSOTrainer

    callback = DistancePenalty(0.5)
    trainer = NSOTrainer(
        model=tiny_llama(), args=config(tmp_path), train_dataset=DATA, callbacks=[callback]
    )
    callback.join(trainer)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    for p in trainer.model.parameters():
        p.data.add_(1.0)
        p.grad = torch.zeros_like(p)
    callback.add_to_gradient(loss_scale=1024.0)
    # Each W - W_0 is 1 but for rounding of weights below 2.
    assert all((p.grad - 512).abs().max() <= 512 * 2**-22 for p in trainer.model.parameters())
