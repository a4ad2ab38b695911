"""sigma="auto": found by its effect on the training data, the same everywhere, and held."""

import math

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.automatic_sigma import AutomaticSigma
from nso_hf.curvature import find_sigma, noise_stability, training_batches
from tests.reference import config, largest_difference, tiny_llama, token_data, train


def automatic(folder, **options):
    return config(folder, sigma="auto", learning_rate=1e-2, **options)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("sigma_scale", ["absolute", "relative"])
def test_it_is_the_one_of_the_first_batches(tmp_path, sigma_scale):
    options = {"sigma_scale": sigma_scale, "sigma_rise": 0.05, "perturb_exclude": ["norm"]}
    data = token_data(40)
    trainer = train(tiny_llama(), data, automatic(tmp_path, max_steps=2, **options))
    other = NSOTrainer(model=tiny_llama(), args=config(tmp_path), train_dataset=data)
    expected = find_sigma(
        other,
        training_batches(other, 4),
        rise=0.05,
        sigma_scale=sigma_scale,
        params=["proj", "embed"],
        num_samples=16,
        seed=42,
    )
    assert logged(trainer, "nso/sigma") == [pytest.approx(expected.sigma, rel=1e-6)] * 2


def test_training_is_that_with_the_number(tmp_path):
    first, second = tiny_llama(), tiny_llama()
    trainer = train(first, token_data(40), automatic(tmp_path))
    sigma = logged(trainer, "nso/sigma")[0]
    train(second, token_data(40), config(tmp_path, sigma=sigma, learning_rate=1e-2))
    assert largest_difference(first, second) == 0  # and no random number was drawn for it
    assert largest_difference(first, tiny_llama()) > 1e-3


def test_it_is_found_where_the_method_begins(tmp_path):
    options = {"max_steps": 6, "start": 0.5}
    trainer = train(tiny_llama(), token_data(40), automatic(tmp_path, **options))
    late = [entry["step"] for entry in trainer.state.log_history if "nso/sigma" in entry]
    assert late == [4, 5, 6]
    at_start = train(tiny_llama(), token_data(40), automatic(tmp_path, max_steps=1))
    assert logged(trainer, "nso/sigma")[0] != logged(at_start, "nso/sigma")[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"sigma_hold": True}, {"start": 0.6}, {"sigma_hold": True, "logging_steps": 2}],
)
def test_resume_is_bit_equal(tmp_path, options):
    shared = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    whole, halves = tiny_llama(), tiny_llama()
    one = train(whole, token_data(40), automatic(tmp_path / "whole", **shared))
    args = automatic(tmp_path / "whole", **shared)
    two = NSOTrainer(model=halves, args=args, train_dataset=token_data(40))
    two.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(whole, halves) == 0
    assert logged(one, "nso/sigma") == logged(two, "nso/sigma")


def test_half_precision_has_a_default_that_its_rounding_leaves_alone(tmp_path):
    for given, expected in (({}, 0.01), ({"sigma_rise": 0.05}, 0.05)):
        model = tiny_llama().to(torch.bfloat16)
        trainer = train(model, token_data(40), automatic(tmp_path, max_steps=1, **given))
        assert trainer._nso_automatic.state_dict()["target"] == expected
        assert logged(trainer, "nso/sigma")[0] > 0
    with pytest.raises(ValueError, match=r"rise=0.004: torch.bfloat16 rounds the loss"):
        train(model, token_data(40), automatic(tmp_path, max_steps=1, sigma_rise=0.004))


class Normalised(nn.Module):
    """The logits of a classifier of 10 features, by BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(10), nn.Linear(10, 3)

    def forward(self, features, labels):
        return {"loss": nn.functional.cross_entropy(self.head(self.norm(features)), labels)}


@pytest.mark.parametrize("is_learned", [False, True])
def test_batch_norm_needs_statistics_first(tmp_path, is_learned):
    features = 5 * torch.randn(40, 10, generator=torch.Generator().manual_seed(0)) + 1
    data = [{"features": row, "labels": (row[0] > 1).long()} for row in features]
    if is_learned:
        trainer = train(Normalised(), data, automatic(tmp_path, max_steps=4, start=0.5))
        assert logged(trainer, "nso/sigma")[0] > 0
    else:
        with pytest.raises(ValueError, match=r"norm has met no batch.*Set start"):
            train(Normalised(), data, automatic(tmp_path, max_steps=4))


def test_a_second_training_finds_its_own(tmp_path):
    trainer = NSOTrainer(
        model=tiny_llama(), args=automatic(tmp_path, max_steps=1), train_dataset=token_data(40)
    )
    trainer.train()
    first = logged(trainer, "nso/sigma")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    trainer.train()
    assert logged(trainer, "nso/sigma") != first


def test_the_rise_that_is_logged(tmp_path):
    """Of the step's own batch and draw, at the sigma in use."""
    model, data = tiny_llama(), token_data(40)
    trainer = train(model, data, automatic(tmp_path, max_steps=1, sigma_hold=True))
    (rise,), (sigma,) = logged(trainer, "nso/rise"), logged(trainer, "nso/sigma")
    other = tiny_llama()
    batch = training_batches(trainer, 1)
    found = noise_stability(other, batch, sigma=sigma, num_samples=1, seed=42)
    # One draw of the same seed, step and number; losses in float32 rounded at 1e-7 of 4.
    assert rise == pytest.approx(found.gap / found.loss, abs=1e-5)


class RiseNow(TrainerCallback):
    """That of a training, at its sigma, by many draws on the same batches."""

    def __init__(self):
        self.trainer, self.found = None, []

    def on_step_end(self, args, state, *rest, **kwargs):
        if state.global_step % 30 == 0:
            sigma = self.trainer._nso_automatic.value
            batches = training_batches(self.trainer, 2)
            found = noise_stability(self.trainer, batches, sigma=sigma, num_samples=60)
            self.found.append(found.gap / found.loss)


def test_a_rise_is_held(tmp_path):
    """While the loss falls from 4 to 1, and the rise at a constant sigma doubles."""
    rows = token_data(8) * 60
    shared = {"max_steps": 120, "sigma_rise": 0.05, "optim": "adamw_torch"}
    shared |= {"learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    means = {}
    for hold in (False, True):
        args, now = config(tmp_path, sigma="auto", sigma_hold=hold, **shared), RiseNow()
        now.trainer = NSOTrainer(model=tiny_llama(), args=args, train_dataset=rows, callbacks=[now])
        now.trainer.train()
        means[hold] = sum(now.found) / len(now.found)
    assert means[False] > 0.08
    # The controller follows the loss with a delay of some ten logs.
    assert means[True] == pytest.approx(0.05, rel=0.4)


def test_the_controller():
    automatic = AutomaticSigma()
    automatic.hold(0.3)  # before it is found
    assert automatic.value is None
    automatic.load_state_dict({"value": 0.02, "found": 0.02, "target": 0.1})
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(2000):  # rise = sigma^2 100, with noise of a half of it
        assert automatic.value is not None
        noise = (1 + 0.5 * torch.randn((), generator=generator)).item()
        automatic.hold(automatic.value**2 * 100 * noise)
        values.append(automatic.value)
    rises = torch.tensor(values[100:]).square() * 100
    assert rises.mean().item() == pytest.approx(0.1, rel=0.1)
    automatic.hold(math.nan)
    assert automatic.value == values[-1]
    for rise, bound in ((0.0, 0.2), (9.0, 0.002)):
        for _ in range(100):
            automatic.hold(rise)
        assert automatic.value == pytest.approx(bound)
    assert automatic.state_dict() == {"value": automatic.value, "found": 0.02, "target": 0.1}


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("0.05", 0.05), ("0", 0.0)])
def test_as_a_flag(tmp_path, word, value):
    parser = HfArgumentParser(NSOConfig)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--sigma", word, "--use_cpu", "true"]
    )
    assert args.sigma == value and isinstance(args.sigma, type(value))
    assert args.to_dict()["sigma"] == value


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"sigma": "automatic"}, "sigma='automatic': neither a number nor 'auto'"),
        ({"sigma": None}, "sigma=None: must be a finite number, at least 0"),
        ({"sigma": "nan"}, "sigma=nan: must be a finite number"),
        ({"sigma": -0.1}, "sigma=-0.1: must be a finite number"),
        ({"sigma": 0.1, "sigma_rise": 0.2}, "sigma_rise=0.2: sigma is 0.1, and not found"),
        ({"sigma": 0.1, "sigma_hold": True}, "sigma_hold=True: sigma is 0.1, and not found"),
        ({"sigma": "auto", "sigma_rise": 0}, "sigma_rise=0: must be a finite number, at least"),
        ({"sigma": "auto", "sigma_rise": -1}, "sigma_rise=-1: must be a finite number"),
        ({"sigma": "auto", "method": "sam"}, "sigma='auto': method 'sam' does not read it"),
        (
            {"sigma": "auto", "sigma_hold": True, "sign": "alternate"},
            "sigma_hold=True: the rise is not measured with sign='alternate'",
        ),
        (
            {"sigma": "auto", "sigma_hold": True, "sigma_schedule": "cosine"},
            "sigma_hold=True: the rise is not measured with sigma_schedule='cosine'",
        ),
        (
            {"sigma": "auto", "sigma_hold": True, "two_sided": False},
            "sigma_hold=True: the rise is not measured with two_sided=False",
        ),
    ],
)
def test_refusals(tmp_path, options, refused):
    with pytest.raises(ValueError, match=refused):
        NSOConfig(str(tmp_path), use_cpu=True, **options)


def test_a_rise_that_there_is_not(tmp_path):
    model = tiny_llama()
    before = [p.detach().clone() for p in model.parameters()]
    args = automatic(tmp_path, sigma_rise=1e6, perturb_include=["norm"])
    trainer = NSOTrainer(model=model, args=args, train_dataset=token_data(40))
    refused = r"sigma='auto': none was found. rise=1000000.0: the loss rises by .* at most"
    with pytest.raises(ValueError, match=refused):
        trainer.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_a_checkpoint_of_a_number(tmp_path):
    args = config(tmp_path, sigma=0.01, save_strategy="steps", save_steps=1, max_steps=2)
    train(tiny_llama(), token_data(40), args)
    later = NSOTrainer(
        model=tiny_llama(), args=automatic(tmp_path, max_steps=2), train_dataset=token_data(40)
    )
    with pytest.raises(ValueError, match=r"has no sigma_0\.pt, which the training's sigma"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_weights_of_a_loss_beside_the_model(tmp_path):
    """They are displaced in training, and not while sigma is looked for."""

    class WithLoss(NSOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return (
                super().compute_loss(model, inputs, *args, **kwargs) * self.scale.weight.exp()[0, 0]
            )

    model, scale = tiny_llama(), torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD([*model.parameters(), *scale.parameters()], lr=1e-3)
    args = automatic(tmp_path, max_steps=1)
    trainer = WithLoss(
        model=model, args=args, train_dataset=token_data(40), optimizers=(optimizer, None)
    )
    trainer.scale = scale
    trainer.train()
    alone = train(tiny_llama(), token_data(40), automatic(tmp_path, max_steps=1))
    found = logged(trainer, "nso/sigma")[0]
    assert found == pytest.approx(logged(alone, "nso/sigma")[0], rel=1e-3)
