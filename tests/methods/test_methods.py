"""What all methods have in common: their options, and what the engine does for each."""

import math
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.methods import METHODS
from tests.methods.documentation import page
from tests.methods.equations import BY_OPTIONS, EQUATIONS, OPTIONS, SHARED, learning_rate, momentum
from tests.reference import config, largest_difference, tiny_llama, token_data, train

DOCUMENTED = Path(__file__).parents[2] / "docs" / "methods.md"
NEIGHBOURS = [name for name in METHODS if name != "nso"]


def options(name):
    return {"method": name, "method_kwargs": OPTIONS[name], **SHARED.get(name, {})}


def optimizer_arguments(name):
    return {
        "optim": "sgd",
        "optim_args": f"momentum={momentum(name)}",
        "learning_rate": learning_rate(name),
    }


def test_every_method_has_its_equation():
    assert {*EQUATIONS, "flat_lora"} == set(NEIGHBOURS)  # that one in test_flat_lora.py


def test_the_documentation_is_that_of_the_code():
    assert "".join(page()) == DOCUMENTED.read_text()


def test_a_method_takes_its_own_options_alone(tmp_path):
    NSOConfig(str(tmp_path), method="sam", method_kwargs='{"rho": 0.1}')
    with pytest.raises(ValueError, match=r"sigma=0\.1: method 'sam' does not read it"):
        NSOConfig(str(tmp_path), method="sam", sigma=0.1)
    with pytest.raises(ValueError, match="method 'sam' takes rho, not 'sigma'"):
        NSOConfig(str(tmp_path), method="sam", method_kwargs={"sigma": 1})
    with pytest.raises(ValueError, match="method 'nso' takes none, not 'rho'"):
        NSOConfig(str(tmp_path), method_kwargs={"rho": 1})


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "0.1", True, None])
@pytest.mark.parametrize(("name", "option"), [("sam", "rho"), ("hero", "h"), ("zo", "mu")])
def test_a_length_is_a_finite_number_above_0(tmp_path, name, option, value):
    with pytest.raises(ValueError, match=f"{option}=.*: must be a finite number above 0"):
        NSOConfig(str(tmp_path), method=name, method_kwargs={option: value})


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_option_says_what_it_is(name):
    for option in METHODS[name].Options.__dataclass_fields__.values():
        assert option.metadata["help"] and option.metadata["typical"]


@pytest.mark.parametrize("name", BY_OPTIONS)
def test_a_rate_of_0_gives_the_weights_back_bit_for_bit(tmp_path, name):
    model, before = tiny_llama(), tiny_llama()
    arguments = {**optimizer_arguments(name), "learning_rate": 0.0}
    args = config(tmp_path, gradient_accumulation_steps=2, **options(name), **arguments)
    trainer = train(model, token_data(24), args)
    assert largest_difference(model, before) == 0
    first = 1 if name in ("msam", "async_sam") else 0  # they have nothing to go along before
    norms = [e.get("nso/perturbation_norm", 0) for e in trainer.state.log_history[:-1]]
    assert all(norm > 0 for norm in norms[first:])


@pytest.mark.parametrize("name", BY_OPTIONS)
def test_resume_is_bit_equal(tmp_path, name):
    arguments = {
        **options(name),
        **optimizer_arguments(name),
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    data = token_data(48)
    whole = tiny_llama(dropout=0.1)
    train(whole, data, config(tmp_path, **arguments))
    resumed = tiny_llama(dropout=0.1)
    trainer = NSOTrainer(model=resumed, args=config(tmp_path, **arguments), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(resumed, whole) == 0


@pytest.mark.parametrize("name", [name for name in NEIGHBOURS if METHODS[name].remembers])
def test_a_checkpoint_without_what_the_method_remembers_is_refused(tmp_path, name):
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(tiny_llama(), token_data(24), config(tmp_path, method="sam", **arguments))
    args = config(tmp_path, **arguments, **options(name), **optimizer_arguments(name))
    trainer = NSOTrainer(model=tiny_llama(), args=args, train_dataset=token_data(24))
    with pytest.raises(ValueError, match=r"it has no method_0\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_gradient_of_zero_is_no_displacement(tmp_path):
    class Still(NSOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 0 * super().compute_loss(model, inputs, *args, **kwargs)

    for name in ("sam", "asam", "fsam", "cr_sam", "hero", "async_sam"):
        model = tiny_llama()
        args = config(tmp_path, **options(name), **optimizer_arguments(name))
        Still(model=model, args=args, train_dataset=token_data(24)).train()
        assert largest_difference(model, tiny_llama()) == 0


class Counting(NSOTrainer):
    """Remembers at which steps how many passes were run."""

    def compute_loss(self, *args, **kwargs):
        self.passes = getattr(self, "passes", None) or Passes()
        self.passes.at.append(self.state.global_step)
        return super().compute_loss(*args, **kwargs)


class Passes:
    def __init__(self):
        self.at = []


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({}, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
        ({"start": 0.8}, [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]),
        ({"interval": 3}, [2, 1, 1, 2, 1, 1, 2, 1, 1, 2]),
        ({"start": 0.25, "interval": 4}, [1, 1, 1, 2, 1, 1, 1, 2, 1, 1]),
    ],
)
@pytest.mark.parametrize("method", [{"sigma": 0.05}, {"method": "sam"}])
def test_plain_steps_cost_one_pass(tmp_path, given, passes, method):
    args = config(tmp_path, max_steps=10, **given, **method)
    trainer = Counting(model=tiny_llama(), args=args, train_dataset=token_data(40))
    trainer.train()
    assert [trainer.passes.at.count(step) for step in range(10)] == passes
    for entry, count in zip(trainer.state.log_history, passes, strict=False):
        assert ("nso/perturbation_norm" in entry) == (count > 1)
        if "nso/sigma" in entry:
            assert entry["nso/sigma"] == pytest.approx(0.05 * math.sqrt(given.get("interval", 1)))


def test_sigma_stays_where_it_is_asked_to(tmp_path):
    args = config(tmp_path, sigma=0.05, interval=3, interval_scaling=False)
    trainer = train(tiny_llama(), token_data(24), args)
    assert trainer.state.log_history[0]["nso/sigma"] == 0.05


def test_plain_steps_are_the_trainers(tmp_path):
    """Up to the first step of the method, bit for bit."""
    args = {"max_steps": 4, "learning_rate": 1e-3}
    plain, late = tiny_llama(dropout=0.1), tiny_llama(dropout=0.1)
    train(plain, token_data(24), config(tmp_path, sigma=0.0, **args))
    train(late, token_data(24), config(tmp_path, sigma=0.5, start=0.99, **args))
    assert largest_difference(plain, late) == 0  # the method would begin after the last step


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": 1.0}, r"start=1\.0: all of training would be plain"),
        ({"start": -0.1}, r"start=-0\.1: must be a finite number, in \[0, 1\]"),
        ({"interval": 0}, "interval=0: must be an integer, at least 1"),
        ({"method": "bsam"}, "num_examples=None: must be an integer, at least 1"),
        ({"method": "sam", "interval_scaling": False}, "method 'sam' does not read it"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        NSOConfig(str(tmp_path), **given)


@pytest.mark.parametrize(
    ("name", "optim", "message"),
    [
        ("bsam", "adamw_torch", "optim='AdamW': bsam has its own momentum and precision"),
        ("msam", "sgd", "optim='SGD': it keeps no moving average of the gradient"),
    ],
)
def test_optimizers_that_do_not_go_with_a_method_are_refused(tmp_path, name, optim, message):
    model = tiny_llama()
    args = config(tmp_path, **options(name), optim=optim)
    trainer = NSOTrainer(model=model, args=args, train_dataset=token_data(24))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert largest_difference(model, tiny_llama()) == 0


def test_the_momentum_of_adam_is_read(tmp_path):
    """Against the formula: the second step's displacement is along the first moment."""
    model = tiny_llama()
    args = config(tmp_path, method="msam", method_kwargs={"rho": 0.1}, learning_rate=0.0)
    seen = []

    class Seeing(NSOTrainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().compute_loss(model, *args, **kwargs)

    trainer = Seeing(model=model, args=args, train_dataset=token_data(24))
    trainer.train()
    W = [p.detach() for p in model.parameters()]
    moved = [a - w for a, w in zip(seen[2], W, strict=True)]
    state = trainer.optimizer.optimizer.state
    length = torch.stack([m.norm() for m in moved]).norm()
    assert length.item() == pytest.approx(0.1, rel=1e-3)
    # The moments before the last step are not kept: they are those after it less its gradient.
    v = [state[p]["exp_avg"] for p in model.parameters()]
    cosine = sum((-a * b).sum() for a, b in zip(moved, v, strict=True)) / length
    assert 0.5 < cosine / torch.stack([b.norm() for b in v]).norm() < 1


def test_msam_reads_what_sgd_had_before_the_step(tmp_path):
    model = tiny_llama()
    args = config(tmp_path, method="msam", method_kwargs={"rho": 0.1}, max_steps=1)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    v = [torch.randn_like(p) for p in model.parameters()]
    for p, buffer in zip(model.parameters(), v, strict=True):
        optimizer.state[p]["momentum_buffer"] = buffer.clone()
    seen = []

    class Seeing(NSOTrainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().compute_loss(model, *args, **kwargs)

    before = [p.detach().clone() for p in model.parameters()]
    Seeing(
        model=model, args=args, train_dataset=token_data(24), optimizers=(optimizer, None)
    ).train()
    length = torch.stack([x.norm() for x in v]).norm()
    for w, at, x in zip(before, seen[0], v, strict=True):
        # A displacement of 1e-3 an element, in weights up to 2: their rounding.
        assert torch.allclose(at - w, -0.1 * x / length, atol=2e-7)
