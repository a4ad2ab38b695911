"""The loss and its gradient against open_clip's own losses in a plain loop."""

import math

import open_clip
import pytest
import torch
from transformers import TrainerCallback

from nso_hf.step.noise import Noise
from nso_hf.tasks.clip.trainer import CLIPTrainer
from tests.older import IS_VERSION_4, LOGGED
from tests.reference import largest_difference
from tests.tasks.clip.reference import TINY, clip_config, pair_data, reference_clip, tiny_clip

ROUNDED = LOGGED if IS_VERSION_4 else 3e-6  # float32: of losses up to 16, three times

SIGMA, BATCH, STEPS = 0.02, 8, 3

# float64: roundings of 1e-16, which ill-conditioned normalisations of a model at its start (its
# features are nearly equal, gradients reach 16) and three steps of training make a million larger.
# float32: roundings of 6e-8 in the same places, in one step; the losses agree to 3e-6.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6}


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])


def trained(kind, tmp_path, data, dtype=torch.float32, **options):
    clip, seen = tiny_clip(kind), Gradients()
    clip.model.to(dtype)
    args = clip_config(tmp_path, **options)
    trainer = CLIPTrainer(clip, args, train_dataset=data, callbacks=[seen])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clip.model, losses, seen.steps, trainer


POINTS = {
    "at W": ({"sigma": 0.0}, (0,)),
    "at W + U": ({"sigma": SIGMA, "two_sided": False}, (1,)),
    "at W + U and W - U": ({"sigma": SIGMA}, (1, -1)),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("points", list(POINTS))
@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_loss_and_gradient_are_those_of_open_clip(kind, points, accumulation, dtype, tmp_path):
    options, signs = POINTS[points]
    steps = STEPS if dtype == torch.float64 else 1
    data = [{**row, "image": row["image"].to(dtype)} for row in pair_data(BATCH * steps)]
    model, losses, gradients, _ = trained(
        kind,
        tmp_path,
        data,
        dtype,
        max_steps=steps,
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    start, expected = tiny_clip(kind).model.to(dtype), tiny_clip(kind).model.to(dtype)
    expected_losses, expected_gradients = reference_clip(
        expected,
        kind,
        data,
        steps=steps,
        global_batch=BATCH,
        sigma=SIGMA,
        signs=signs,
        parts=accumulation,
    )
    assert losses == pytest.approx(expected_losses, abs=ROUNDED)
    for step, expected_step in zip(gradients, expected_gradients, strict=True):
        largest = max(g.abs().max().item() for g in expected_step)
        assert largest > 0.01
        for g, e in zip(step, expected_step, strict=True):
            difference = (e if g is None else g - e).abs().max().item()
            assert difference <= TOLERANCE[dtype] * max(1, largest)
    assert largest_difference(model, expected) <= TOLERANCE[dtype] * max(1, largest)
    assert largest_difference(model, start) > 1e-2


def test_the_logit_scale_is_not_perturbed_unless_asked_for(tmp_path):
    seen = {}

    class Watching(CLIPTrainer):
        def compute_loss(self, model, *args, **kwargs):
            for name, p in model.named_parameters():
                seen.setdefault(name, []).append(p.detach().clone())
            return super().compute_loss(model, *args, **kwargs)

    for asked in (False, True):
        seen.clear()
        clip = tiny_clip("siglip")
        args = clip_config(tmp_path, sigma=SIGMA, max_steps=1, perturb_logit_scale=asked)
        Watching(clip, args, train_dataset=pair_data(BATCH)).train()
        moved = {name for name, (a, b) in seen.items() if not torch.equal(a, b)}
        assert moved == {n for n in seen if asked or not n.startswith("logit_")}
        if asked:
            index = list(seen).index("logit_scale")
            assert Noise(42, 0, 0, SIGMA).std == SIGMA and index >= 0


@pytest.mark.parametrize("start", [5.0, -1.0])
def test_the_logit_scale_is_kept_in_bounds(start, tmp_path):
    clip = tiny_clip()
    with torch.no_grad():
        clip.model.logit_scale.fill_(start)
    args = clip_config(tmp_path, max_steps=1, learning_rate=1e-6)
    trainer = CLIPTrainer(clip, args, train_dataset=pair_data(BATCH))
    trainer.train()
    bound = math.log(100) if start > 0 else 0.0
    assert clip.model.logit_scale.item() == pytest.approx(bound, abs=1e-6)
    logged = [e["clip/logit_scale"] for e in trainer.state.log_history if "loss" in e]
    assert logged == pytest.approx([math.exp(start)], rel=1e-5)  # as the step found it


def test_what_has_no_weight_decay(tmp_path):
    """The groups are those of open_clip's training script, with logit_scale in one of its own."""
    clip = tiny_clip("siglip")
    args = clip_config(tmp_path, optim="adamw_torch", weight_decay=0.1)
    trainer = CLIPTrainer(clip, args, train_dataset=pair_data(BATCH))
    groups = trainer.create_optimizer().param_groups
    name_of = {id(p): name for name, p in clip.model.named_parameters()}
    decayed = {name_of[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    every = {name_of[id(p)] for g in groups for p in g["params"]}

    def is_excluded(name, p):  # open_clip_train/main.py
        return p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    named = dict(clip.model.named_parameters())
    assert every == set(named)
    assert decayed == {name for name, p in named.items() if not is_excluded(name, p)}
    assert [len(g["params"]) for g in groups if g.get("logit_scale")] == [1]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_cached_features_have_the_masks_of_their_own_turn(accumulation, tmp_path):
    """Patch dropout draws anew for each micro-batch: cached features must be those that the
    micro-batch itself has at that point, so that all losses of a step are the same number."""
    vision = {**TINY["vision_cfg"], "patch_size": 4, "patch_dropout": 0.5}
    clip = tiny_clip(vision_cfg=vision)
    losses = []

    class Watching(CLIPTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    args = clip_config(
        tmp_path,
        sigma=SIGMA,
        max_steps=2,
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    Watching(clip, args, train_dataset=pair_data(2 * BATCH)).train()
    steps = torch.tensor(losses).view(2, accumulation, 2)  # step, micro-batch, sign
    assert (steps - steps[:, :1]).abs().max() <= 1e-6
    assert (steps[:, 0, 0] - steps[:, 0, 1]).abs().min() > 1e-4


def test_alternating_signs_with_accumulation(tmp_path):
    """Micro-batch m is evaluated at W + (-1)^m U, all negatives too."""
    data = pair_data(BATCH)
    _, losses, _, _ = trained(
        "clip",
        tmp_path,
        data,
        sigma=SIGMA,
        sign="alternate",
        max_steps=1,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
    )
    halves = []
    for sign in (1, -1):
        clip = tiny_clip()
        loss, _ = reference_clip(
            clip.model, "clip", data, steps=1, global_batch=BATCH, sigma=SIGMA, signs=(sign,)
        )
        halves.append(loss[0])
    assert losses[0] == pytest.approx(sum(halves) / 2, abs=ROUNDED)


def test_outside_of_training_the_loss_is_of_the_batch(tmp_path):
    clip = tiny_clip()
    trainer = CLIPTrainer(clip, clip_config(tmp_path), train_dataset=pair_data(BATCH))
    batch = trainer.data_collator(pair_data(4))
    clip.model.eval()
    expected = open_clip.ClipLoss()(**clip.model(**batch))
    assert trainer.compute_loss(clip.model, batch).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


def test_sam_of_the_whole_batch(tmp_path):
    """One ascent along the gradient of the contrastive loss, in a plain loop in float64. The
    temperature is not displaced, unless it is asked for."""
    rho, rate = 0.05, 0.01
    data = [
        {key: value.double() if value.is_floating_point() else value for key, value in pair.items()}
        for pair in pair_data(BATCH)
    ]
    clip = tiny_clip()
    clip.model.double()
    options = {"method": "sam", "method_kwargs": {"rho": rho}, "learning_rate": rate}
    args = clip_config(tmp_path, max_steps=1, **options)
    trainer = CLIPTrainer(clip, args, train_dataset=data)
    trainer.train()

    model = tiny_clip().model.double().train()
    batch = trainer.data_collator(data)
    named = dict(model.named_parameters())
    W = {name: p.detach().clone() for name, p in named.items()}

    def gradient():
        loss = open_clip.ClipLoss()(**model(**batch))
        return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))

    g1 = gradient()
    moved = [name for name in named if name != "logit_scale"]
    length = torch.stack([g1[name].norm() for name in moved]).norm()
    for name in moved:
        named[name].data.add_(rho * g1[name] / length)
    g2 = gradient()
    for name, p in clip.model.named_parameters():
        # Gradients of up to 23 to the roundings of float64, times the rate.
        assert (p - (W[name] - rate * g2[name])).abs().max() <= 1e-12


def test_an_ascent_of_one_micro_batch_is_refused(tmp_path):
    args = clip_config(tmp_path, method="sam", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="all pairs of a step are compared"):
        CLIPTrainer(tiny_clip(), args, train_dataset=pair_data(BATCH))
