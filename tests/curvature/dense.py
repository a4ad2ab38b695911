"""Small models whose Hessian fits into a matrix, and that matrix, row by row.

`torch.func.hessian` is no reference here: in torch 2.14 its matrices of transformers' models are
not symmetric (by 0.2 of entries of at most 9)."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification


class Classifier(nn.Module):
    """A multilayer perceptron that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.dropout(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(self.second(hidden), labels)}


class Quadratic(nn.Module):
    """f(w) = mean over the rows a of a batch of (a'w)^2/2 + w'Dw/2: its Hessian is closed form."""

    def __init__(self, dimension: int = 12) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(dimension, dtype=torch.float64))
        self.D = torch.linspace(-3, 5, dimension, dtype=torch.float64)

    def forward(self, a: Tensor) -> dict[str, Tensor]:
        loss = (a @ self.w).square().mean() / 2 + (self.D * self.w.square()).sum() / 2
        return {"loss": loss}

    def hessian(self, a: Tensor) -> Tensor:
        return a.T @ a / len(a) + torch.diag(self.D)


def classifier() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """In batches of unequal size."""
    x, labels = torch.randn(20, 6), torch.randint(4, (20,))
    batches = [{"x": x[i:j], "labels": labels[i:j]} for i, j in [(0, 8), (8, 16), (16, 20)]]
    return Classifier(), batches


def gpt2() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    config = GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=6,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    tokens = torch.randint(11, (2, 4, 8))
    return GPT2LMHeadModel(config), [{"input_ids": t, "labels": t} for t in tokens]


def vit() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=5,
        initializer_range=0.3,
    )
    model = ViTForImageClassification(config)
    batches = [
        {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.randint(5, (4,))}
        for _ in range(2)
    ]
    return model, batches


MODELS: dict[str, Callable[[], tuple[nn.Module, list[dict[str, Tensor]]]]] = {
    "perceptron": classifier,
    "GPT-2": gpt2,
    "ViT": vit,
}


def made(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model in float64 and its batches."""
    torch.manual_seed(5)
    model, batches = MODELS[name]()
    doubled = [
        {key: value.double() if value.is_floating_point() else value for key, value in b.items()}
        for b in batches
    ]
    return model.double(), doubled


def gradient(model: nn.Module, batches: list[dict[str, Tensor]], **options: bool) -> Tensor:
    """Of the mean over the examples, by every parameter, in evaluation mode."""
    model.eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    counts = [len(next(iter(batch.values()))) for batch in batches]
    losses = [n * model(**batch)["loss"] for n, batch in zip(counts, batches, strict=True)]
    parameters = list(model.parameters())
    parts = torch.autograd.grad(sum(losses) / sum(counts), parameters, **options)
    return torch.cat([part.flatten() for part in parts])


def dense_hessian(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Row i is the gradient of element i of the gradient."""
    parameters = list(model.parameters())
    rows = []
    for element in gradient(model, batches, create_graph=True):
        parts = torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@cache
def dense(name: str) -> Tensor:
    return dense_hessian(*made(name))
