"""Losses and models that are not a plain forward pass: what is measured is the loss of training."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.llama.modeling_llama import repeat_kv

from nso_hf import NSOTrainer
from nso_hf.curvature import (
    CurvatureCallback,
    hessian_eigenvalues,
    hessian_trace,
    noise_stability,
    training_batches,
)
from tests.curvature.dense import gpt2
from tests.reference import config, largest_difference


def matrix(model, batches):
    """The Hessian by all parameters, row by row, of the model as it is."""
    parameters = list(model.parameters())
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    with sdpa_kernel(SDPBackend.MATH):  # the one with second derivatives
        losses = [model(**b)["loss"] * len(next(iter(b.values()))) / count for b in batches]
    parts = torch.autograd.grad(sum(losses), parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in parts])
    rows = []
    for element in flat:
        row = torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten().double() for part in row]))
    return torch.stack(rows)


def agrees(model, batches, **options):
    exact = matrix(copy.deepcopy(model).eval(), batches)
    trace = hessian_trace(model, batches, num_samples=200, **options)
    assert abs(trace.estimate - exact.trace().item()) <= 4 * trace.stderr
    top = hessian_eigenvalues(model, batches, **options).values[0]
    # By differences to (eps of float32)^(2/3), times a few.
    assert top == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-3)
    return trace


class Penalised(nn.Module):
    """A loss with the norm of its gradient by the inputs in it."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5).to(dtype), nn.Linear(5, 1, dtype=dtype)

    def forward(self, x, labels):
        x = x.detach().requires_grad_()
        out = self.second(torch.tanh(self.first(x))).squeeze(-1)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=torch.is_grad_enabled())
        return {"loss": (out - labels).square().mean() + slope.square().sum(dim=1).mean()}


class PenalisedInTraining(Penalised):
    """Without gradients it leaves the penalty out, and says nothing."""

    def forward(self, x, labels):
        if torch.is_grad_enabled():
            return super().forward(x, labels)
        out = self.second(torch.tanh(self.first(x))).squeeze(-1)
        return {"loss": (out - labels).square().mean()}


def regression(dtype=torch.float64):
    torch.manual_seed(1)
    return [
        {"x": torch.randn(n, 4, dtype=dtype), "labels": torch.randn(n, dtype=dtype)} for n in (6, 3)
    ]


@pytest.mark.parametrize("kind", [Penalised, PenalisedInTraining])
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_losses_that_differentiate_inside(kind, hvp):
    model, batches = kind(), regression()
    trace = agrees(model, batches, hvp=hvp)
    rise = noise_stability(model, batches, sigma=1e-3, num_samples=200)
    error = (rise.trace_stderr**2 + trace.stderr**2) ** 0.5
    assert abs(rise.trace_estimate - trace.estimate) <= 4 * error
    whole = sum(model(**b)["loss"].item() * n for b, n in zip(batches, (6, 3), strict=True)) / 9
    assert rise.loss == pytest.approx(whole)


class Cached(nn.Module):
    """A loss that hands its gradient over by a hook, as GradCache does; `direct` times it comes by
    autograd too."""

    def __init__(self, direct):
        super().__init__()
        self.layer, self.direct = nn.Linear(3, 2), direct

    def forward(self, x):
        loss = torch.tanh(self.layer(x)).square().mean()
        if not torch.is_grad_enabled():
            return {"loss": (1 + self.direct) * loss}
        cached = loss.detach().requires_grad_()
        cached.register_hook(lambda above: (above * loss).backward(retain_graph=True))
        return {"loss": cached + self.direct * loss if self.direct else cached}


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("measure", [hessian_trace, hessian_eigenvalues])
@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_a_gradient_that_does_not_come_by_autograd_is_refused(direct, measure, hvp):
    model = Cached(direct)
    with pytest.raises(ValueError, match=r"model='Cached': .* Measure the loss without the cache"):
        measure(model, [{"x": torch.ones(2, 3)}], hvp=hvp)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_refused_before_training(tmp_path):
    data = [{"x": torch.ones(3)} for _ in range(4)]
    trainer = NSOTrainer(model=Cached(0), args=config(tmp_path, sigma=0.0), train_dataset=data)
    trainer.add_callback(CurvatureCallback(trainer, at_start=False))
    with pytest.raises(ValueError, match="hands its gradient to the weights by a hook"):
        trainer.train()


def sharp(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention at another temperature, which nothing but this function knows."""
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling * 8
    future = torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("sharp", sharp)


@pytest.mark.parametrize("attention", ["sharp", "sdpa", "eager"])
def test_the_attention_is_the_models_own(attention):
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    ids = {"bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**sizes, **heads, **ids), attn_implementation=attention
    ).double()
    tokens = torch.randint(9, (3, 6))
    assert agrees(model, [{"input_ids": tokens, "labels": tokens}]).hvp == "autograd"


class Mixed(Penalised):
    """Its head is in float64."""

    def __init__(self):
        super().__init__(torch.float32)
        self.second.double()

    def forward(self, x, labels):
        out = self.second(torch.tanh(self.first(x.float())).double()).squeeze(-1)
        return {"loss": (out - labels).square().mean()}


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_weights_of_two_precisions(hvp, reverse):
    model = Mixed()
    if reverse:  # the other precision comes first
        model.first, model.second = model._modules.pop("first"), model._modules.pop("second")
        model._modules = dict(reversed(model._modules.items()))
    agrees(model, regression(), hvp=hvp)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(5, 4), nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 3, 4))
        self.head = nn.Conv1d(4, 1, 1)

    def forward(self, x):
        hidden = self.lstm(self.table(x) + self.position_embeddings)[0]
        hidden = self.attention(hidden, hidden, hidden)[0]
        return {"loss": self.head(hidden.transpose(1, 2)).square().mean()}


def test_weight_matrices_of_all_kinds_of_layers():
    torch.manual_seed(0)
    batches = [{"x": torch.randint(5, (2, 3))}]
    trace = hessian_trace(Several(), batches, params="weight_matrices", num_samples=2)
    assert set(trace.names) == {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    left = "position_embeddings, table.weight"
    assert f"embeddings are left out of weight_matrices: {left}" in trace.notes


def mixtral():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, bos_token_id=None))
    tokens = torch.randint(20, (2, 6))
    return model, [{"input_ids": tokens, "labels": tokens}]


def test_experts_and_routers_are_weight_matrices():
    model, batches = mixtral()
    trace = hessian_trace(model, batches, params="weight_matrices", num_samples=2)
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in n}
    assert set(trace.names) == matrices


def test_merged_weights_of_experts():
    model, batches = mixtral()
    if not any("gate_up_proj" in name for name, _ in model.named_parameters()):
        pytest.skip("this version of transformers holds each expert apart")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapters = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    adapted = get_peft_model(model, adapters)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    merged = hessian_eigenvalues(adapted, batches, params="merged")
    patterns = ["q_proj.weight", "gate_up_proj", "down_proj"]
    plain = hessian_eigenvalues(adapted.merge_and_unload(), batches, params=patterns)
    assert merged.num_parameters == plain.num_parameters
    assert merged.values == pytest.approx(plain.values, rel=1e-4)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"use_dora": True}])
def test_merged_weights_that_are_not_the_adapters_alone_are_refused(options):
    model, batches = gpt2()
    adapted = get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["c_attn"], **options}))
    with pytest.raises(ValueError, match=r"params='merged': the .*adapter of"):
        hessian_trace(adapted, batches, params="merged", num_samples=1)


class Augmented(Dataset):
    """Rows with noise from a generator of its own, which it counts."""

    def __init__(self):
        self.rows, self.generator, self.count = list(range(2000)), np.random.default_rng(0), 0

    def __len__(self):
        return 16

    def __getitem__(self, index):
        self.count += 1
        x = torch.tensor(self.generator.normal(size=3), dtype=torch.float32) + self.count
        return {"x": x}


class Stream(IterableDataset):
    """Of which each example is read once."""

    def __init__(self):
        self.left = iter([{"x": torch.full((3,), i / 40)} for i in range(40)])

    def __iter__(self):
        yield from self.left


class Once(Stream):
    def __init__(self):
        self.left = ({"x": torch.full((3,), i / 40)} for i in range(40))


HIDDEN = np.random.default_rng(0)


class Hidden(Augmented):
    def __getitem__(self, index):
        return {"x": torch.tensor(HIDDEN.normal(size=3), dtype=torch.float32)}


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return {"loss": torch.tanh(self.layer(x)).square().mean()}


def trained(folder, data, watched):
    trainer = NSOTrainer(
        model=Squares(), args=config(folder, learning_rate=0.1), train_dataset=data()
    )
    if watched:
        trainer.add_callback(CurvatureCallback(trainer, every_steps=1, num_samples=2))
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("data", [Augmented, Stream])
def test_data_with_a_state_are_not_read_by_measuring(data, tmp_path):
    plain, watched = (trained(tmp_path, data, watched) for watched in (False, True))
    assert largest_difference(plain, watched) == 0


@pytest.mark.parametrize(("data", "why"), [(Once, "cannot be copied"), (Hidden, "read twice")])
def test_data_whose_state_cannot_be_put_back_are_refused(data, why, tmp_path):
    with pytest.raises(ValueError, match=rf"train_dataset='{data.__name__}': .*{why}"):
        trained(tmp_path, data, watched=True)


def test_the_batches_are_those_of_a_loader_that_a_trainer_wrote(tmp_path):
    class Own(NSOTrainer):
        def get_train_dataloader(self):
            self.last = torch.utils.data.DataLoader(
                self.train_dataset,
                batch_sampler=[[5, 1], [0]],
                collate_fn=lambda rows: {"x": torch.stack([row["x"] for row in rows])},
            )
            return self.accelerator.prepare(self.last)

    rows = [{"x": torch.full((3,), float(i))} for i in range(6)]
    trainer = Own(model=Squares(), args=config(tmp_path), train_dataset=rows)
    batches = training_batches(trainer)
    assert [batch["x"][:, 0].tolist() for batch in batches] == [[5.0, 1.0], [0.0]]
    assert not hasattr(trainer, "last") and not trainer.accelerator._dataloaders
    assert hessian_trace(trainer, num_samples=2).num_examples == 3


def test_inputs_that_a_model_writes_into():
    class Greedy(Squares):
        def forward(self, x):
            x += 1
            return super().forward(x)

    x = torch.zeros(2, 3)
    found = hessian_trace(Greedy(), [{"x": x}], num_samples=2)
    expected = hessian_trace(Squares(), [{"x": x + 1}], num_samples=2)
    assert torch.equal(found.samples, expected.samples) and not x.any()


def test_weights_over_one_memory_as_two_parameters_are_refused():
    """The derivative by one of them is not that by what they share."""
    model, batches = gpt2()
    first, second = model.transformer.h[0].mlp.c_fc, model.transformer.h[1].mlp.c_fc
    second.weight.data = first.weight.data
    for params in ("all", [r"h\.0\."]):
        with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight': it lies over the memory"):
            hessian_trace(model, batches, num_samples=1, params=params)
    second.weight = first.weight
    assert hessian_trace(model, batches, num_samples=2, params="all").num_parameters > 0
