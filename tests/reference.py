"""A tiny real model with data, and NSO written as a plain-PyTorch loop from the paper's formula."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tests.older  # noqa: F401 - before a configuration is made
from nso_hf import NSOConfig, NSOTrainer
from nso_hf.backends import Weight
from nso_hf.step.noise import Noise

VOCABULARY = 50
DEVICE = torch.device(os.environ.get("NSO_TEST_DEVICE", "cpu"))
"""Where the models of most tests are: "cuda" has the same tests run on a GPU."""


def tiny_llama(dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def normalised_llama(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with batch normalisation of its embeddings."""
    norm = model.norm_of_embeddings = nn.BatchNorm1d(32)

    def normalise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return norm(output.flatten(0, 1)).view_as(output)

    model.model.embed_tokens.register_forward_hook(normalise)
    return model


def token_data(examples: int, length: int = 12, seed: int = 1) -> list[dict[str, Tensor]]:
    """Random token sequences with a fifth of the labels masked, so that micro-batches differ in
    weight."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(examples):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        masked = torch.rand(length, generator=generator) < 0.2
        masked[0] = True  # nothing predicts it, and not every transformers leaves it uncounted
        labels = torch.where(masked, -100, ids)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return data


def batched(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one batch, where the models are."""
    return {key: torch.stack([row[key] for row in rows]).to(DEVICE) for key in rows[0]}


def config(output_dir: Any, **options: Any) -> NSOConfig:
    """Deterministic training without shuffling, saving or reporting, unless asked for."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": DEVICE.type == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    return NSOConfig(**(defaults | options))


def whole_noise(parameter: nn.Parameter, index: int, noise: Noise) -> Tensor:
    """U of one whole parameter, in float32."""
    U = torch.zeros(parameter.shape, device=parameter.device)
    noise.add_to([Weight("", index, parameter, U, 0, parameter.shape)])
    return U


def draw(
    model: nn.Module, seed: int, step: int, j: int, sigma: float, distribution: str
) -> list[Tensor]:
    noise = Noise(seed, step, j, sigma, distribution)
    return [
        whole_noise(p, i, noise) if p.requires_grad else torch.zeros(())
        for i, p in enumerate(model.parameters())
    ]


def deviations(model: nn.Module) -> list[Tensor]:
    """Of each element, the root mean square of the trained weights in its row, or a tenth of that
    of all of them where this is more."""
    trained = [p.detach().double() for p in model.parameters() if p.requires_grad]
    least = 0.1 * torch.cat([p.flatten() for p in trained]).square().mean().sqrt()
    spread = []
    for p in model.parameters():
        rows = p.detach().double().reshape(len(p) if p.dim() > 1 else 1, -1)
        rms = rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=least)
        spread.append(rms.expand_as(rows).reshape(p.shape).float())
    return spread


def causal_loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum over the predicted tokens of the cross-entropy: labels are shifted by one, -100 is left
    out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def reference_nso(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    *,
    steps: int,
    global_batch: int | list[int],
    learning_rate: float = 1.0,
    sigma: float,
    k: int = 1,
    lam: float = 0.0,
    two_sided: bool = True,
    alternate_micro_batches: int = 0,
    distribution: str = "normal",
    relative: bool = False,
    max_grad_norm: float = 1.0,
    seed: int = 42,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rates: list[float] | None = None,
) -> list[float]:
    """SGD on g = lam grad f(W) + (1 - lam)/(2k) sum_j [grad f(W + U_j) + grad f(W - U_j)], whole
    batches of `global_batch` examples (a list: for each step), or another optimizer on the same g.

    With `relative` U_j is in units of the root mean square of the rows of W.

    With `alternate_micro_batches` = M the batch is cut into M parts, part m being evaluated at
    W + (-1)^m U_j with j = (m // 2) mod k alone; with lam, every other part at W. Trains `model` in
    place; returns the loss of each step.
    """
    parameters = list(model.parameters())
    losses = []
    sizes = [global_batch] * steps if isinstance(global_batch, int) else global_batch
    for step in range(steps):
        examples = data[sum(sizes[:step]) : sum(sizes[: step + 1])]
        batch = batched(examples)
        tokens = (batch["labels"][:, 1:] != -100).sum()
        W = [p.detach().clone() for p in parameters]
        U = [draw(model, seed, step, j, sigma, distribution) for j in range(k)]
        if relative:
            D = deviations(model)
            U = [[d * u for d, u in zip(D, each, strict=True)] for each in U]
        gradient = [torch.zeros_like(p) for p in parameters]
        loss = 0.0

        def add(weight, displacement, part):
            nonlocal loss
            for p, w, u in zip(parameters, W, displacement, strict=True):
                p.data = w + u
            model.zero_grad()
            f = causal_loss_sum(model, part) / tokens
            f.backward()
            loss += weight * f.item()
            for g, p, w in zip(gradient, parameters, W, strict=True):
                if p.grad is not None:
                    g.add_(p.grad, alpha=weight)
                p.data = w

        if alternate_micro_batches:
            size = sizes[step] // alternate_micro_batches
            for m in range(alternate_micro_batches):
                part = {key: value[m * size : (m + 1) * size] for key, value in batch.items()}
                i, weight = m, 1.0
                if lam > 0:
                    i, noisy = divmod(m, 2)
                    weight = 2 * (1 - lam) if noisy else 2 * lam
                    if not noisy:
                        add(weight, [torch.zeros_like(w) for w in W], part)
                        continue
                pair, odd = divmod(i, 2) if two_sided else (i, 0)
                add(weight, [(-1) ** odd * u for u in U[pair % k]], part)
        else:
            if lam > 0:
                add(lam, [torch.zeros_like(w) for w in W], batch)
            for j in range(k):
                weight = (1 - lam) / (2 * k if two_sided else k)
                add(weight, U[j], batch)
                if two_sided:
                    add(weight, [-u for u in U[j]], batch)

        norm = torch.stack([g.norm() for g in gradient]).norm()
        scale = min(1.0, max_grad_norm / (norm.item() + 1e-6)) if max_grad_norm else 1.0
        if optimizer is not None:
            for p, g in zip(parameters, gradient, strict=True):
                p.grad = scale * g if p.requires_grad else None
            for group in optimizer.param_groups if learning_rates else []:
                group["lr"] = learning_rates[step]
            optimizer.step()
        else:
            for p, g in zip(parameters, gradient, strict=True):
                if p.requires_grad:
                    p.data = p.data - learning_rate * scale * g
        losses.append(loss)
    model.zero_grad()
    return losses


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max(
        (p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def train(
    model: nn.Module, data: list[dict[str, Tensor]], args: NSOConfig, **kwargs: Any
) -> NSOTrainer:
    trainer = NSOTrainer(model=model, args=args, train_dataset=data, **kwargs)
    trainer.train()
    return trainer
