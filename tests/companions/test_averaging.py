"""Averages of the weights: what torch's own makes of the weights after each step, whatever the
method, without a trace in the training."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import TrainerCallback

from nso_hf import NSOTrainer
from nso_hf.companions import EMACallback, SWACallback
from tests.reference import DEVICE, batched, config, largest_difference, tiny_llama, token_data

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}


class Watch(TrainerCallback):
    """The weights after each step, and torch's own average of them."""

    def __init__(self, multi_avg_fn, steps):
        self.multi_avg_fn, self.steps = multi_avg_fn, steps
        self.path = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.path.append([p.detach().clone() for p in model.parameters()])
        if not hasattr(self, "average"):
            self.average = AveragedModel(model, multi_avg_fn=self.multi_avg_fn)
        if state.global_step in self.steps:
            self.average.update_parameters(model)


def trained(folder, callbacks, model=None, resume=None, **options):
    settings = {"max_steps": 6, "learning_rate": 1e-2, "optim": "adamw_torch"}
    settings |= {"sigma": 0.05} if "method" not in options else {}
    trainer = NSOTrainer(
        model=model or tiny_llama(dropout=0.1),
        args=config(folder, **{**settings, **options}),
        train_dataset=token_data(24),
        eval_dataset=token_data(8, seed=2),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def steps_with(name, trainer):
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


def averages(callback):
    with callback.averaged():
        return weights_of(callback.trainer.model)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [{}, {"method": "sam"}, {"gradient_accumulation_steps": 2}])
def test_an_average_is_the_one_of_torch_over_the_weights_after_each_step(tmp_path, options):
    cases = [
        (EMACallback(0.7), get_ema_multi_avg_fn(0.7), [1, 2, 3, 4, 5, 6]),
        (EMACallback(0.7, start=0.3, every_steps=2), get_ema_multi_avg_fn(0.7), [3, 5]),
        (SWACallback(start=0.5), get_swa_multi_avg_fn(), [4, 5, 6]),
        (SWACallback(), get_swa_multi_avg_fn(), [5, 6]),
    ]
    for callback, multi_avg_fn, steps in cases:
        watch = Watch(multi_avg_fn, steps)
        trained(tmp_path, [watch, callback], **options)
        assert callback.count == len(steps)
        assert equal(averages(callback), weights_of(watch.average.module))


def test_swa_is_the_mean_and_ema_its_formula(tmp_path):
    ema, swa = EMACallback(0.6), SWACallback(start=0.5)
    watch = Watch(None, [])
    trained(tmp_path, [ema, swa, watch])
    for i, (a, b) in enumerate(zip(averages(ema), averages(swa), strict=True)):
        path = torch.stack([weights[i] for weights in watch.path]).double()
        # float32: a handful of roundings of weights below 2.
        assert (b - path[3:].mean(0)).abs().max() <= 1e-6
        shares = [0.6**5, *(0.4 * 0.6 ** (5 - t) for t in range(1, 6))]
        shares = torch.tensor(shares, device=DEVICE)
        assert shares.sum() == pytest.approx(1)
        expected = (shares.double().view(-1, *[1] * a.dim()) * path).sum(0)
        assert (a - expected).abs().max() <= 1e-6
    assert (b - a).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"method": "fsam"}])
def test_training_does_not_see_it(tmp_path, options):
    plain = trained(tmp_path, [], **EVALUATES, **options)
    callbacks = [EMACallback(0.5, evaluate=True), SWACallback(start=0.2, evaluate=True)]
    watched = trained(tmp_path, callbacks, **EVALUATES, **options)
    assert largest_difference(plain.model, watched.model) == 0

    def own(trainer):
        timed = ("runtime", "second")
        return [
            {k: v for k, v in entry.items() if not any(word in k for word in timed)}
            for entry in trainer.state.log_history
            if "eval_ema_loss" not in entry and "eval_swa_loss" not in entry and "loss" in entry
        ]

    assert own(plain) == own(watched)
    evaluated = [e["step"] for e in watched.state.log_history if "eval_ema_loss" in e]
    assert (
        evaluated == [2, 4, 6] == [e["step"] for e in plain.state.log_history if "eval_loss" in e]
    )


def test_the_average_is_evaluated(tmp_path):
    callback = EMACallback(0.5, evaluate=True)
    trainer = trained(tmp_path, [callback], **EVALUATES)
    logged = [e["eval_ema_loss"] for e in trainer.state.log_history if "eval_ema_loss" in e][-1]
    before = weights_of(trainer.model)
    with callback.averaged():
        inside = trainer.evaluate()["eval_loss"]
    assert logged == inside != trainer.evaluate()["eval_loss"]
    assert equal(before, weights_of(trainer.model))


def test_an_epoch_is_an_evaluation_too(tmp_path):
    callback = SWACallback(start=0.5, evaluate=True)
    options = {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    trainer = trained(tmp_path, [callback], **options)
    assert [e["epoch"] for e in trainer.state.log_history if "eval_swa_loss" in e] == [2.0]


def test_the_weights_come_back_from_a_failure(tmp_path):
    callback = EMACallback(0.5)
    trainer = trained(tmp_path, [callback])
    before = weights_of(trainer.model)
    with pytest.raises(KeyError), callback.averaged():
        assert not equal(before, weights_of(trainer.model))
        raise KeyError
    assert equal(before, weights_of(trainer.model))


def test_it_is_in_checkpoints_and_resumes_bit_for_bit(tmp_path):
    def run(resume=None):
        callbacks = [EMACallback(0.8), SWACallback(start=0.3)]
        saves = {"save_strategy": "steps", "save_steps": 3}
        trainer = trained(tmp_path, callbacks, resume=resume, **saves)
        return trainer, callbacks

    whole, first = run()
    resumed, second = run(str(tmp_path / "checkpoint-3"))
    assert largest_difference(whole.model, resumed.model) == 0
    for a, b in zip(first, second, strict=True):
        assert a.count == b.count and equal(averages(a), averages(b))
    (tmp_path / "checkpoint-3" / "swa_0.pt").unlink()
    with pytest.raises(ValueError, match=r"it has no swa_0\.pt, which the training's swa"):
        run(str(tmp_path / "checkpoint-3"))


def test_a_second_training_has_an_average_of_its_own(tmp_path):
    callback = EMACallback(0.8)
    trainer = trained(tmp_path, [callback], max_steps=2)
    trainer.train()
    assert callback.count == 2


def test_it_is_left_in_the_model(tmp_path):
    kept, applied = EMACallback(0.8), EMACallback(0.8, apply_at_end=True)
    expected = averages(trained(tmp_path, [kept]) and kept)
    trainer = trained(tmp_path, [applied])
    assert equal(expected, weights_of(trainer.model))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert equal(expected, weights_of(loaded))


def test_adapters_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    callback = EMACallback(0.5)
    trained(tmp_path, [callback], model=model)
    names = set(callback.state_dict()["average"]["average"])
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in names)


def test_half_precision_is_averaged_in_float32(tmp_path):
    """In bfloat16 a hundredth of a step is lost in rounding."""
    callback = EMACallback(0.99)
    watch = Watch(None, [])
    trained(tmp_path, [callback, watch], model=tiny_llama().bfloat16(), sigma=0.0)
    average = list(callback.state_dict()["average"]["average"].values())
    assert {part.dtype for part in average} == {torch.float32}
    for i, part in enumerate(average):
        expected = watch.path[0][i].double()
        for weights in watch.path[1:]:
            expected = 0.99 * expected + 0.01 * weights[i].double()
        assert (part - expected).abs().max() <= 1e-6
    for a, part in zip(averages(callback), average, strict=True):
        assert torch.equal(a, part.bfloat16())


class Images(nn.Module):
    """A classifier with batch-norm statistics, and dropout, which they do not see."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def image_rows(number):
    generator = torch.Generator().manual_seed(3)
    x = 2 + torch.randn(number, 6, generator=generator)
    return [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(x)]


def image_trainer(folder, callbacks, **options):
    settings = {"max_steps": 6, "learning_rate": 0.1, "sigma": 0.05, "optim": "sgd"}
    return NSOTrainer(
        model=Images(),
        args=config(folder, **{**settings, **options}),
        train_dataset=image_rows(24),
        eval_dataset=image_rows(6),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("applied", [False, True])
def test_batch_norm_statistics_are_those_of_the_average(tmp_path, applied):
    callback = SWACallback(start=0.5, apply_at_end=applied)
    trainer = image_trainer(tmp_path, [callback])
    trainer.train()
    model, before = trainer.model, {k: v.clone() for k, v in trainer.model.state_dict().items()}
    generator_state = torch.get_rng_state()
    if applied:
        averaged = before
    else:
        with callback.averaged():
            averaged = {k: v.clone() for k, v in model.state_dict().items()}
        assert torch.equal(generator_state, torch.get_rng_state())
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    norm = "body.1."
    x = batched(image_rows(24))["x"]
    hidden = x @ averaged["body.0.weight"].T + averaged["body.0.bias"]
    batches = hidden.split(4)  # the mean over batches, as update_bn has it
    assert averaged[norm + "num_batches_tracked"] == 6
    mean, var = (torch.stack([f(b, 0) for b in batches]).mean(0) for f in (torch.mean, torch.var))
    # float32, values below 10.
    assert (averaged[norm + "running_mean"] - mean).abs().max() <= 1e-5
    assert (averaged[norm + "running_var"] - var).abs().max() <= 1e-4
    assert model.body[1].momentum == 0.1
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_batch_norm_is_left_alone_where_asked(tmp_path):
    callback = SWACallback(start=0.5, update_bn=False)
    trainer = image_trainer(tmp_path, [callback])
    trainer.train()
    before = trainer.model.body[1].running_mean.clone()
    with callback.averaged():
        assert torch.equal(before, trainer.model.body[1].running_mean)


def test_evaluation_with_batch_norm_leaves_the_training_as_it_is(tmp_path):
    models = []
    for callbacks in ([], [EMACallback(0.5, evaluate=True)]):
        trainer = image_trainer(tmp_path, callbacks, **EVALUATES)
        trainer.train()
        models.append(trainer.model.state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def test_bema_of_trl_averages_w(tmp_path):
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "BEMACallback"):
        pytest.skip("this trl has no BEMACallback")
    torch.manual_seed(0)
    bema = trl.BEMACallback(update_freq=1, ema_power=0.5, bias_power=0.2, lag=10)
    watch = Watch(None, [])
    start = weights_of(tiny_llama(dropout=0.1))
    trained(tmp_path, [bema, watch])
    averages = start
    for t, W in enumerate(watch.path, start=1):
        beta, alpha = (10 + t) ** -0.5, (10 + t) ** -0.2
        averages = [(1 - beta) * a + beta * w for a, w in zip(averages, W, strict=True)]
        result = [a + alpha * (w - s) for a, w, s in zip(averages, W, start, strict=True)]
    # float32, a few roundings of weights below 2 in each of 6 steps.
    pairs = zip(result, bema.running_model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) <= 1e-6
