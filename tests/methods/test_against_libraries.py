"""SAM, ASAM and F-SAM against pytorch_optimizer, on the same model and batches."""

import pytest
import torch
from pytorch_optimizer import SAM, FriendlySAM
from torch.optim import SGD

from nso_hf import NSOTrainer
from tests.reference import causal_loss_sum, config, largest_difference, tiny_llama, token_data

RHO, RATE = 0.1, 0.3


@pytest.mark.parametrize(
    ("name", "options", "library"),
    [
        ("sam", {}, lambda p: SAM(p, SGD, rho=RHO, lr=RATE)),
        ("asam", {}, lambda p: SAM(p, SGD, rho=RHO, adaptive=True, lr=RATE)),
        (
            "fsam",
            {"forget": 1.0, "decay": 0.7},
            lambda p: FriendlySAM(p, SGD, rho=RHO, sigma=1.0, lmbda=0.7, lr=RATE),
        ),
    ],
)
def test_three_steps_are_those_of_pytorch_optimizer(tmp_path, name, options, library):
    data = token_data(24)
    theirs = tiny_llama()
    optimizer = library(theirs.parameters())
    if name == "fsam":
        # Its average begins with the first gradient, the paper's with nothing; it takes out the
        # average before this step, which at sigma = 1 is along the paper's direction.
        for parameter in theirs.parameters():
            optimizer.state[parameter]["momentum"] = torch.zeros_like(parameter)
    for step in range(3):
        batch = {k: torch.stack([e[k] for e in data[8 * step : 8 * step + 8]]) for k in data[0]}
        tokens = (batch["labels"][:, 1:] != -100).sum()
        for pass_ in (optimizer.first_step, optimizer.second_step):
            (causal_loss_sum(theirs, batch) / tokens).backward()
            pass_(zero_grad=True)
    model = tiny_llama()
    args = config(
        tmp_path,
        method=name,
        method_kwargs={"rho": RHO, **options},
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    sgd = SGD(model.parameters(), lr=RATE)
    NSOTrainer(model=model, args=args, train_dataset=data, optimizers=(sgd, None)).train()
    # As in tests/methods/equations.py; it restores by a copy, too.
    assert largest_difference(model, theirs) <= 1e-6
    assert largest_difference(model, tiny_llama()) > 1e-2
