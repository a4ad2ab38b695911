"""A pass leaves nothing behind but gradients, and every pass of a step sees the same."""

import collections
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerCallback as Callback

from nso_hf import NSOTrainer, NSOTrainerMixin
from nso_hf.step.counts import counts_kept
from nso_hf.step.generators import generators_of
from nso_hf.step.noise import Noise
from nso_hf.step.selection import parameters_beside
from nso_hf.step.side_effects import Buffers, copied
from tests.reference import DEVICE, config, whole_noise

SIGMA = 0.05
STILL = {"learning_rate": 0.0, "max_grad_norm": 0.0, "optim": "sgd"}


def regression(examples: int = 24):
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randn((), generator=generator)}
        for _ in range(examples)
    ]


class Net(nn.Module):
    """A small regression, with `layer` on the way; `seen` has what each pass computed with."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.layer, self.out = nn.Linear(6, 8), layer, nn.Linear(8, 1)
        self.seen: list = []

    def look(self):
        return self.body.weight.detach().clone()

    def forward(self, x, labels):
        self.seen.append(self.look())
        hidden = torch.tanh(self.body(x))
        if self.layer is not None:
            hidden = self.layer(hidden)
        return {"loss": (self.out(hidden).squeeze(-1) - labels).square().mean()}


def train(model, folder, trainer_class=NSOTrainer, data=None, **options):
    callbacks = options.pop("callbacks", None)
    args = config(folder, **{"sigma": SIGMA, **options})
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data or regression(),
        eval_dataset=regression(8),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


# Buffers


class Counter(nn.Module):
    """Counts its passes in training, in the way that `kind` says."""

    def __init__(self, kind: str, size: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("count", torch.zeros(size))

    def forward(self, x):
        if self.training:
            if self.kind == "in place":
                self.count += 1
            elif self.kind == "through .data":
                self.count.data.add_(1)
            else:
                self.count = self.count + 1
        return x + self.count[0]


class Codebook(nn.Module):
    """Its nearest code, which moves towards what it stood for, as in vector quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))

    def forward(self, x):
        nearest = torch.cdist(x.detach(), self.codes).argmin(dim=1)
        out = x + (self.codes[nearest] - x).detach()
        if self.training:
            for code in nearest.unique():
                mean = x.detach()[nearest == code].mean(dim=0)
                self.codes.data[code] = 0.9 * self.codes[code] + 0.1 * mean
        return out


class Rows(nn.Module):
    """A normalisation of (batch, channels, length), for rows of features."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.view(len(x), 2, 4)).flatten(1)


LAYERS = {
    "BatchNorm": lambda: nn.BatchNorm1d(8),
    "BatchNorm, cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "InstanceNorm": lambda: Rows(nn.InstanceNorm1d(2, track_running_stats=True)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm, hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "code book": Codebook,
    "in place": lambda: Counter("in place"),
    "through .data": lambda: Counter("through .data"),
    "replaced": lambda: Counter("replaced"),
    "large, in place": lambda: Counter("in place", 2**17),
    "large, through .data": lambda: Counter("through .data", 2**17),
}


@pytest.mark.parametrize("options", [{}, {"log_sharpness": True, "num_perturbations": 2}])
@pytest.mark.parametrize("name", LAYERS)
def test_buffers_are_those_of_one_pass(tmp_path, name, options):
    """At a tiny sigma they are those of plain training, also after an evaluation."""
    kept = []
    for trainer_class in (Trainer, NSOTrainer):
        torch.manual_seed(1)
        model = Net(LAYERS[name]())
        more = {**STILL, "sigma": 1e-6, "eval_strategy": "steps", "eval_steps": 1, **options}
        train(model, tmp_path, trainer_class, **more)
        kept.append(dict(model.named_buffers()))
    plain, noisy = kept
    assert plain.keys() == noisy.keys() and plain
    for buffer, expected in plain.items():
        # Noise of 1e-6 in the weights moves what is computed from them by some 1e-5; a second
        # update of any of these moves it by 1e-2 at least.
        torch.testing.assert_close(noisy[buffer], expected, rtol=0, atol=1e-4)


def test_every_pass_starts_from_the_same_buffers(tmp_path):
    model = Net(LAYERS["code book"]())
    model.look = lambda: model.layer.codes.clone()
    train(model, tmp_path, num_perturbations=2)
    steps = [model.seen[i : i + 4] for i in range(0, 12, 4)]
    for passes in steps:
        assert all(torch.equal(passes[0], codes) for codes in passes[1:])
    assert not torch.equal(steps[0][0], steps[1][0])


def test_buffers_added_in_a_pass_are_gone_after_it():
    model = Net(Counter("in place"))
    buffers = Buffers(model)
    with buffers.kept():
        model.layer.register_buffer("cache", torch.ones(3))
        model.register_buffer("other", None)
        del model.layer.count
    assert list(dict(model.named_buffers())) == ["layer.count"]
    assert "other" not in model._buffers


def test_a_graph_from_before_may_have_saved_a_buffer():
    model = nn.Module()
    model.register_buffer("mask", torch.tensor([1.0, 2.0]))
    x = torch.ones(2, requires_grad=True)
    loss = (x * model.mask).sum()
    with Buffers(model).kept():
        model.mask.data.zero_()
    loss.backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0]))


def test_large_constant_buffers_are_not_copied(monkeypatch):
    large = torch.zeros(2**17)
    model = Net()
    model.register_buffer("table", large)
    model.register_buffer("small", torch.zeros(3))
    copies = []
    clone = torch.Tensor.clone

    def counting(self, *args, **kwargs):
        copies.append(self.numel())
        return clone(self, *args, **kwargs)

    buffers = Buffers(model)
    monkeypatch.setattr(torch.Tensor, "clone", counting)
    for _ in range(3):
        with buffers.kept():
            pass
    assert copies == [2**17, 3, 3, 3]


# Weights that a pass writes to


class Clamped(nn.Linear):
    """Clamps its own weight in training, as Gemma 3n does, from pass `start` on."""

    through_data, start = True, 0

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.passes = 0

    def forward(self, x):
        if self.training and self.passes >= self.start:
            with torch.no_grad():
                (self.weight.data if self.through_data else self.weight).clamp_(-0.1, 0.1)
        self.passes += self.training
        return super().forward(x)


class Rescaled(nn.Linear):
    """Divides its weight for evaluation and multiplies it for training, as RWKV does."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.for_evaluation = False

    def forward(self, x):
        if self.training == self.for_evaluation:
            self.weight.data.mul_(2 if self.training else 0.5)
            self.for_evaluation = not self.training
        return super().forward(x)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4, max_norm=1.0)
        self.out = nn.Linear(4, 1)

    def forward(self, ids, labels):
        return {"loss": (self.out(self.table(ids)).squeeze(-1) - labels).square().mean()}


def edits_late():
    layer = Clamped()
    layer.through_data, layer.start = False, 5
    return Net(layer)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Net(Clamped()), "layer.weight"),
        (edits_late, "layer.weight"),
        (lambda: Net(Rescaled()), "layer.weight"),
        (Words, "table.weight"),
    ],
)
def test_weights_that_a_pass_writes_to_are_refused(tmp_path, make, name):
    model = make()
    words = [{"ids": torch.tensor(i % 5), "labels": torch.randn(())} for i in range(24)]
    options = {"eval_strategy": "steps", "eval_steps": 1} if isinstance(model, Net) else {}
    data = None if isinstance(model, Net) else words
    with pytest.raises(ValueError, match=f"parameter='{name}': the model or its trainer writes"):
        train(model, tmp_path, data=data, **options)
    train(make(), tmp_path, sigma=0.0, data=data)  # plain training is as it was


# Memory


def test_weights_over_one_memory_are_one(tmp_path):
    model = Net().to(DEVICE)
    model.layer = nn.Linear(8, 8, bias=False).to(DEVICE)
    model.twin = nn.Linear(8, 8, bias=False).to(DEVICE)
    model.twin.weight.data = model.layer.weight.data.t()
    model.look = lambda: (model.layer.weight.detach().clone(), model.twin.weight.detach().clone())
    W = model.look()
    train(model, tmp_path, max_steps=1, **STILL)
    for before, plus, minus in zip(W, *model.seen, strict=True):
        norm = (plus - before).norm() / (SIGMA * 8)  # of 64 draws: 1 +- 0.09
        assert 0.7 < norm < 1.3
        torch.testing.assert_close(plus + minus, 2 * before, rtol=0, atol=1e-6)  # two roundings
    assert torch.equal(model.layer.weight, W[0])


def test_weights_that_overlap_are_refused(tmp_path):
    model = Net().to(DEVICE)
    memory = torch.randn(10, 8, device=DEVICE)
    model.a, model.b = nn.Parameter(memory[:6]), nn.Parameter(memory[5:])
    with pytest.raises(ValueError, match=r"parameter='b': it shares a part of its memory with a"):
        train(model, tmp_path)
    model.a, model.b = nn.Parameter(memory[:, :4]), nn.Parameter(memory[:, 4:])
    train(model, tmp_path)  # side by side in it
    model.a = nn.Parameter(torch.randn(1, device=DEVICE).expand(4))
    with pytest.raises(ValueError, match=r"parameter='a': several of its elements are one place"):
        train(model, tmp_path)


def test_a_weight_that_is_given_other_memory_between_micro_batches(tmp_path):
    class Moves(Callback):
        def on_substep_end(self, *args, model=None, **kwargs):
            model.body.weight.data = model.body.weight.data.clone()

    model = Net()
    train(model, tmp_path, gradient_accumulation_steps=2, callbacks=[Moves()], **STILL)
    plus = model.seen[::2]
    assert all(torch.equal(a, b) for a, b in zip(plus[::2], plus[1::2], strict=True))
    assert not torch.equal(plus[0], model.body.weight)


# Inputs and random numbers


class Edits(Trainer):
    """Edits its batch in place, however deep."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.batches.append(
            (inputs["x"].clone(), inputs["more"][0]["n"].clone(), list(inputs["more"][1]))
        )
        inputs["x"] += torch.randn_like(inputs["x"])
        inputs["more"][0]["n"].add_(1)
        inputs["more"][1].append(0)
        labels = inputs.pop("labels")
        return super().compute_loss(model, {"x": inputs["x"], "labels": labels})


class Seen:
    """What is noted here stays; a list of the trainer's would be as before after each pass."""

    def __init__(self):
        self.batches = []


class NSOEdits(NSOTrainerMixin, Edits):
    seen: Seen


def test_every_pass_sees_the_batch_as_it_came(tmp_path):
    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"more": ({"n": torch.zeros(2)}, [])}

    args = config(tmp_path, remove_unused_columns=False, num_perturbations=2)
    trainer = NSOEdits(Net(), args, train_dataset=regression(), data_collator=collate)
    trainer.seen = Seen()
    trainer.train()
    batches = trainer.seen.batches
    assert len(batches) == 12
    for i in range(0, 12, 4):
        x, n, grown = batches[i]
        assert not n.any() and grown == []
        for other in batches[i + 1 : i + 4]:
            assert torch.equal(other[0], x) and torch.equal(other[1], n) and other[2] == grown


def test_a_copy_of_a_batch_shares_nothing_with_it_and_no_more_than_it_shares_with_itself():
    table = torch.randn(1000, 4)
    cache = DynamicCache()
    cache.update(torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8), 0)
    batch = {"x": table[:2], "same": table[:2], "past": cache, "names": ["a"]}
    batch["again"] = batch["x"]
    own = copied(batch)
    assert own["again"] is own["x"] and own["x"].untyped_storage().nbytes() == 2 * 4 * 4
    own["past"].update(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8), 0)
    assert cache.get_seq_length() == 3 and own["past"].get_seq_length() == 4
    assert own["names"] == ["a"] and own["names"] is not batch["names"]
    with pytest.raises(ValueError, match=r"inputs=\{'rows': 'generator'\}: it cannot be copied"):
        copied({"rows": (i for i in range(3))})


class Prepares(Trainer):
    prepared = 0

    def _prepare_inputs(self, inputs):
        self.prepared += self.model.training
        return super()._prepare_inputs(inputs)


class NSOPrepares(NSOTrainerMixin, Prepares):
    pass


def test_inputs_are_prepared_once(tmp_path):
    trainer = train(Net(), tmp_path, NSOPrepares, num_perturbations=3, eval_strategy="epoch")
    assert trainer.prepared == 3


class Draws(nn.Module):
    """Random numbers of generators that are held in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3)
        self.held = {"numpy": [np.random.default_rng(0)], "old": (np.random.RandomState(0),)}
        self.partial = functools.partial(random.Random(0).uniform, 0)
        hidden = random.Random(1)
        self.closure = lambda: hidden.random()
        self.object = collections.namedtuple("Object", "deep")([[random.Random(2)]])
        self.drawn: list = []

    def forward(self, x):
        self.drawn.append(
            (
                torch.rand((), generator=self.own).item(),
                self.held["numpy"][0].random(),
                self.held["old"][0].rand(),
                self.partial(1),
                self.closure(),
                self.object.deep[0][0].random(),
            )
        )
        return x


@pytest.mark.parametrize("common", [True, False])
def test_generators_of_the_models_own_are_common_too(tmp_path, common):
    model = Net(Draws())
    train(model, tmp_path, common_random_numbers=common)
    for plus, minus in zip(model.layer.drawn[::2], model.layer.drawn[1::2], strict=True):
        assert [a == b for a, b in zip(plus, minus, strict=True)] == [common] * 6
    firsts = list(zip(*model.layer.drawn[::2], strict=True))
    assert all(len(set(values)) == 3 for values in firsts)


def test_generators_are_not_looked_for_in_data():
    class Holder:
        def __init__(self):
            self.rows = [random.Random(0)] * 20_000
            self.rng = random.Random(1)
            self.system = random.SystemRandom()
            self.itself = self

    holder = Holder()
    assert generators_of(holder) == [holder.rng]


# Trainers


class OwnBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class NSOOwnBackward(NSOTrainerMixin, OwnBackward):
    pass


@pytest.mark.parametrize("options", [{}, {"log_sharpness": True}, {"clean_weight": 0.5}])
def test_a_backward_that_cannot_be_weighted_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"'NSOOwnBackward': it does not call accelerator\.back"):
        train(Net(), tmp_path, NSOOwnBackward, **options)
    plain, same = Net(), Net()
    train(plain, tmp_path, OwnBackward)
    train(same, tmp_path, NSOOwnBackward, sigma=0.0)
    assert torch.equal(plain.body.weight, same.body.weight)


class Forgets(NSOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return OwnBackward.training_step(self, model, inputs)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_training_step_without_the_method_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=r"training_step='Forgets': it does not call super\(\)"):
        train(Net(), tmp_path, Forgets, max_steps=steps)
    train(Net(), tmp_path, Forgets, sigma=0.0)


class DistillationTrainer(Trainer):
    """As in the documentation of transformers: it generates nothing."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class OnPolicy(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["labels"] = self.model.generate(inputs["x"])
        return super().training_step(model, inputs, num_items_in_batch)


class Buffering(Trainer):
    def _prepare_inputs(self, inputs):
        if self._step % 2 == 0:
            self._buffered_inputs = inputs
        self._step += 1
        return self._buffered_inputs


class Samples(Trainer):
    """Generates where no name in its training step tells."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        model.generate()
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_trainers_that_generate_are_told_by_what_they_do(tmp_path):
    class Fine(NSOTrainerMixin, DistillationTrainer):
        pass

    train(Fine.__mro__ and Net(), tmp_path, Fine)
    for base in (OnPolicy, Buffering):
        kind = type("Mine", (NSOTrainerMixin, base), {})
        with pytest.raises(ValueError, match=rf"trainer='{base.__name__}'"):
            kind(model=Net(), args=config(tmp_path))
    model = Net()
    calls = []
    model.generate = lambda: calls.append(True)
    with pytest.raises(ValueError, match=r"generate='called in an evaluation of the loss'"):
        train(model, tmp_path, type("Mine", (NSOTrainerMixin, Samples), {}))
    model.generate()
    assert calls == [True]


class Penalised(Net):
    """A gradient penalty: the loss differentiates inside."""

    def forward(self, x, labels):
        x.requires_grad_()
        loss = super().forward(x, labels)["loss"]
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return {"loss": loss + slope.square().sum()}


def test_the_sharpness_of_a_loss_that_differentiates_inside(tmp_path):
    options = {"log_sharpness": True, "max_steps": 1, **STILL}
    trainer = train(Penalised().double(), tmp_path, data=double_data(), **options)
    plain = train(Net().double(), tmp_path, data=double_data(), **options)
    estimates = [t.state.log_history[0]["nso/trace_estimate"] for t in (trainer, plain)]
    assert np.isfinite(estimates).all() and estimates[0] != estimates[1]


def double_data():
    return [{name: value.double() for name, value in row.items()} for row in regression()]


def test_losses_of_float64_models_are_float64(tmp_path):
    estimates = []
    for sigma in (1e-3, 1e-5):
        trainer = train(
            Net().double(),
            tmp_path,
            data=double_data(),
            sigma=sigma,
            log_sharpness=True,
            max_steps=1,
            **STILL,
        )
        estimates.append(trainer.state.log_history[0]["nso/trace_estimate"])
    # Of the same draw: u'Hu + O(sigma^2), and eps / sigma^2 = 2e-6 of rounding.
    assert estimates[0] == pytest.approx(estimates[1], abs=1e-4)
    assert abs(estimates[0]) > 1e-2


# Evaluation alone, resuming, signatures


def test_evaluation_asks_for_no_trainable_weights(tmp_path):
    frozen = Net().requires_grad_(False)
    scalar = Net()
    scalar.requires_grad_(False)
    scalar.temperature = nn.Parameter(torch.tensor(1.0))
    for model in (frozen, scalar):
        trainer = NSOTrainer(
            model=model,
            args=config(tmp_path),
            train_dataset=regression(),
            eval_dataset=regression(8),
        )
        expected = Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path), use_cpu=DEVICE.type == "cpu", report_to=[]),
            eval_dataset=regression(8),
        ).evaluate()
        assert trainer.evaluate()["eval_loss"] == expected["eval_loss"]
        with pytest.raises(ValueError, match=r"\d of \d parameters are trainable, none of them"):
            trainer.train()
    scalar.body.bias.requires_grad_()  # of one dimension
    train(scalar, tmp_path)


def test_epochs_that_begin_end(tmp_path):
    class Events(TrainerCallback):
        def __init__(self):
            self.events = []

        def on_epoch_begin(self, *args, **kwargs):
            self.events.append("begin")

        def on_epoch_end(self, *args, **kwargs):
            self.events.append("end")

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(Net(), tmp_path, **options)
    events = Events()
    args = config(tmp_path, **options)
    trainer = NSOTrainer(Net(), args, train_dataset=regression(), callbacks=[events])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert events.events == ["begin", "end"]


def test_signatures_are_those_of_the_trainers():
    import inspect

    from transformers import Seq2SeqTrainer

    from nso_hf import NSOSeq2SeqTrainer

    class Own(NSOTrainer):
        def __init__(self, extra, **kwargs):
            super().__init__(**kwargs)

    class Heir(Own):
        pass

    assert inspect.signature(NSOTrainer) == inspect.signature(Trainer)
    assert inspect.signature(NSOSeq2SeqTrainer) == inspect.signature(Seq2SeqTrainer)
    assert list(inspect.signature(Heir).parameters) == ["extra", "kwargs"]


class Counts(Trainer):
    """Counts tokens as axolotl does, and collects metrics as TRL does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not hasattr(self.state, "tokens"):
            self.state.tokens = {"total": torch.zeros(()), "trained": 0}
        self.state.tokens["total"] += inputs["x"].numel()
        self.state.tokens["trained"] += 1
        self._metrics["train"]["norm"].append(float(inputs["x"].norm()))
        self.long.append(0)
        self.last = float(inputs["x"].sum())
        self.pair = (self.pair[0] + 1, "text")
        self.recent.append(self.pair[0])
        return super().compute_loss(model, inputs, *args, **kwargs)


class NSOCounts(NSOTrainerMixin, Counts):
    pass


def test_what_a_trainer_counts_it_counts_once(tmp_path):
    """By what it is, not by its name: numbers, tensors and containers of them, new or there
    before, of the trainer and of its state."""
    counted = []
    for trainer_class, options in [(Counts, {"sigma": 0.0}), (NSOCounts, {"num_perturbations": 3})]:
        args = config(tmp_path, gradient_accumulation_steps=2, **options)
        trainer = trainer_class(Net(), args, train_dataset=regression())
        trainer._metrics = {"train": collections.defaultdict(list), "eval": {}}
        trainer.long, trainer.pair = [0] * 500, (0, "text")
        metrics, trainer.recent = trainer._metrics, collections.deque(maxlen=3)
        trainer.train()
        assert trainer._metrics is metrics  # the same containers, for who holds them
        lengths = len(trainer.long), list(trainer.recent), trainer.pair, trainer.last
        counted.append((trainer.state.tokens, metrics, lengths))
    assert counted[0] == counted[1]
    assert counted[0][0] == {"total": 6 * 4 * 6, "trained": 6}


def test_objects_of_a_trainer_are_left_alone():
    class Holder:
        pass

    trainer = Holder()
    trainer.model, trainer.objects, trainer.cache = nn.Linear(2, 2), [Holder()], {}
    trainer._nso_micro_batch = 0
    with counts_kept(trainer):
        trainer.objects.append(Holder())
        trainer.cache["key"] = made = Holder()
        trainer.model.weight.data.fill_(1.0)
        trainer._nso_micro_batch = 1
        trainer.new_model = nn.Linear(2, 2)
    assert len(trainer.objects) == 2 and trainer.cache == {"key": made}
    assert trainer.model.weight.eq(1.0).all() and trainer._nso_micro_batch == 1
    assert trainer.new_model is not None


def test_a_trainer_may_look_at_a_weight(tmp_path):
    """A tensor over a weight's memory is put back too, which is no edit of the weight."""

    class Looking(NSOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.bias = model.body.bias.detach()
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = config(tmp_path, gradient_accumulation_steps=2)
    trainer = Looking(Net(), args, train_dataset=regression())
    trainer.train()
    plainly = NSOTrainer(Net(), args, train_dataset=regression())
    plainly.train()
    for a, b in zip(trainer.model.parameters(), plainly.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Projected(nn.Module):
    """Puts another tensor in a weight's place in each forward pass, as peft's CPT does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden):
        self.inner.weight.data = self.inner.weight.data / self.inner.weight.data.norm()
        return self.inner(hidden)


def test_a_weight_that_a_pass_replaces_is_refused(tmp_path):
    rule = "parameter='layer.inner.weight': the model or its trainer writes to it"
    with pytest.raises(ValueError, match=rule):
        train(Net(Projected()), tmp_path)


class StepsInHooks(torch.optim.SGD):
    """Updates each weight as soon as its gradient is there."""

    def __init__(self, model, lr):
        super().__init__(model.parameters(), lr=lr)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.update)

    def update(self, parameter):
        parameter.data.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    def step(self, closure=None):
        pass


def test_an_optimizer_that_steps_in_hooks_is_refused_when_the_trainer_is_built(tmp_path):
    model = Net()
    optimizers = (StepsInHooks(model, 0.1), None)
    rule = "parameter='body.weight': StepsInHooks.update, a hook on its gradient, would update it"
    with pytest.raises(ValueError, match=rule):
        NSOTrainer(model, config(tmp_path), train_dataset=regression(), optimizers=optimizers)
    options = {"train_dataset": regression(), "optimizers": optimizers}
    NSOTrainer(model, config(tmp_path, sigma=0.0), **options).train()  # plain training is as before


class Classifier(nn.Module):
    """A loss with weights of its own, as SoftmaxLoss of sentence-transformers has."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = nn.Linear(1, 1).to(DEVICE)


class WithLoss(Trainer):
    def create_optimizer(self, *args, **kwargs):
        parameters = [*self.model.parameters(), *self.loss.scale.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.5)
        return self.optimizer

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.notes.moved.append(self.loss.scale.weight.detach().clone())
        loss = model(**inputs)["loss"]
        return self.loss.scale(loss.view(1, 1)).square().sum()


class NSOWithLoss(NSOTrainerMixin, WithLoss):
    pass


class Notes:
    def __init__(self):
        self.moved = []


def test_weights_of_the_loss_are_perturbed_as_those_of_the_model(tmp_path):
    model = Net()
    args = config(tmp_path, max_steps=2, lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer = NSOWithLoss(model, args, train_dataset=regression())
    trainer.loss, trainer.notes = Classifier(model), Notes()
    trainer.teacher = nn.Linear(3, 3)  # requires gradients, but nobody trains it
    trainer.args.sigma = SIGMA
    trainer.train()
    above, below = trainer.notes.moved[:2]
    middle = (above + below) / 2
    assert not torch.equal(above, below)
    names = [name for name, _ in parameters_beside(trainer, model)]
    assert names == ["loss.scale.weight", "loss.scale.bias", "teacher.weight", "teacher.bias"]
    index = len(list(model.parameters()))  # the noise of the parameter after the model's
    U = whole_noise(trainer.loss.scale.weight, index, Noise(42, 0, 0, SIGMA))
    torch.testing.assert_close(above - middle, U, rtol=1e-4, atol=1e-7)


def test_patterns_choose_weights_of_the_loss(tmp_path):
    model = Net()

    class Built(NSOWithLoss):
        def __init__(self, *args, **kwargs):
            self.loss, self.notes = Classifier(model), Notes()
            super().__init__(*args, **kwargs)

    args = config(tmp_path, max_steps=1, sigma=SIGMA, perturb_include=["loss.scale"])
    trainer = Built(model, args, train_dataset=regression())
    before = model.look()
    trainer.train()
    assert all(torch.equal(weight, before) for weight in model.seen)
    above, below = trainer.notes.moved
    assert not torch.equal(above, below)
