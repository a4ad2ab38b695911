"""Noise in the units of each row: of the right deviation, wherever a row is cut, and gone without a
trace."""

import pytest
import torch
from torch import nn

from nso_hf import NSOConfig
from nso_hf.backends import Weight
from nso_hf.step.noise import DISTRIBUTIONS
from nso_hf.step.rows import FLOOR, row_rms
from tests.reference import (
    config,
    deviations,
    largest_difference,
    reference_nso,
    tiny_llama,
    token_data,
    train,
)


class Sharded:
    """A back end of several processes, whose sums were made beforehand."""

    def __init__(self, processes):
        self.num_processes, self.shares = processes, []

    def total(self, values):
        self.shares.append(values)
        return sum(self.shares)


def cut(tensors, processes):
    """What each process holds: pieces of equal size, which end within rows."""
    held = [[] for _ in range(processes)]
    for index, tensor in enumerate(tensors):
        size = -(-tensor.numel() // processes)
        for process in range(processes):
            start = min(process * size, tensor.numel())
            data = tensor.reshape(-1)[start : start + size].clone()
            held[process].append(Weight("", index, nn.Parameter(data), data, start, tensor.shape))
    return held


def some(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3, 4, 2, 2), (11,), (1, 13), (), (40, 3), (5, 6)]
    tensors = [torch.randn(shape, generator=generator) * 3**i for i, shape in enumerate(shapes)]
    tensors[3].zero_()
    tensors[6][2] = 0
    return [tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_root_mean_squares_wherever_rows_are_cut(processes, dtype):
    tensors, backend = some(dtype), Sharded(processes)
    for held in cut(tensors, processes):
        found = row_rms(held, backend)
    everything = torch.cat([t.double().flatten() for t in tensors])
    floor = FLOOR * everything.square().mean().sqrt()
    for index, tensor in enumerate(tensors):
        rows = tensor.double().view(len(tensor), -1) if tensor.dim() > 1 else tensor.double()[None]
        expected = rows.view(len(rows), -1).square().mean(dim=1).sqrt().clamp(min=floor)
        assert found[index].dtype == torch.float32
        # Rounded to 16 bits.
        torch.testing.assert_close(found[index].double(), expected, rtol=2**-16, atol=0)
    assert (found[3] > 0).all() and found[6][2] > 0  # rows of zeros
    whole = row_rms(cut(tensors, 1)[0], Sharded(1))
    assert all(torch.equal(found[i], whole[i]) for i in whole)


def test_rows_of_a_matrix_of_columns_are_those_of_its_first_dimension():
    tensor = torch.randn(30, 20)
    parameter = nn.Parameter(tensor.t())
    weight = Weight("", 0, parameter, parameter.data, 0, parameter.shape)
    found = row_rms([weight], Sharded(1))[0]
    torch.testing.assert_close(found, tensor.square().mean(dim=0).sqrt(), rtol=2**-16, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_deviations_in_the_passes_of_a_step(tmp_path, distribution, accumulation):
    model, seen = tiny_llama(), []
    hook = lambda *_: seen.append([p.detach().clone() for p in model.parameters()])  # noqa: E731
    model.register_forward_pre_hook(hook)
    before = [p.detach().clone() for p in model.parameters()]
    options = {"sigma": 0.1, "sigma_scale": "relative", "distribution": distribution}
    args = config(
        tmp_path,
        learning_rate=0.0,
        max_steps=20,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    log = train(model, token_data(40), args).state.log_history
    after = [p.detach() for p in model.parameters()]
    assert all(torch.equal(w, p) for w, p in zip(before, after, strict=True))
    assert len(seen) == 20 * accumulation * 2
    assert log[0]["nso/sigma"] == 0.1
    kurtosis = {"normal": 3, "uniform": 1.8, "laplace": 6, "rademacher": 1}[distribution]
    for number, (w, d) in enumerate(zip(before, deviations(model), strict=True)):
        U = torch.stack([weights[number] - w for weights in seen])  # evaluations x shape
        in_units = (U / (0.1 * d)).double()
        if w.dim() > 1:
            squares = in_units.square().mean(dim=tuple(range(2, in_units.dim())))[::2]
            if accumulation == 2:
                squares = squares[::2]  # one draw for both micro-batches
            mean, draws = squares.mean(dim=0), 20 * w[0].numel()
            # Five standard errors of the mean of as many squares; some hundred rows are looked at.
            assert (mean - 1).abs().max() < 5 * ((kurtosis - 1) / draws) ** 0.5 + 1e-4
        # W + U and W - U.
        pairs = U.view(-1, 2, *w.shape).sum(dim=1)
        assert pairs.abs().max() <= 8 * 2**-23 * (w.abs().max() + U.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"two_sided": False},
        {"num_perturbations": 2, "clean_weight": 0.3},
        {"sign": "alternate", "gradient_accumulation_steps": 2},
    ],
)
def test_steps_are_those_of_a_plain_loop(tmp_path, options):
    accumulation = options.get("gradient_accumulation_steps", 1)
    args = config(
        tmp_path,
        sigma=0.1,
        sigma_scale="relative",
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=1.0,
        per_device_train_batch_size=4 // accumulation,
        **options,
    )
    model, expected, absolute = tiny_llama(), tiny_llama(), tiny_llama()
    train(model, token_data(16), args)
    loop = {
        "k": options.get("num_perturbations", 1),
        "lam": options.get("clean_weight", 0.0),
        "two_sided": options.get("two_sided", True),
        "alternate_micro_batches": 2 if "sign" in options else 0,
    }
    shared = {"steps": 3, "global_batch": 4, "sigma": 0.1, **loop}
    reference_nso(expected, token_data(16), relative=True, **shared)
    reference_nso(absolute, token_data(16), **shared)
    # As in tests/distributed/test_matrix.py; D is rounded to 16 bits: 2^-17 of a displacement whose
    # effect on the weights is below 0.1.
    assert largest_difference(model, expected) <= 2e-6
    assert largest_difference(expected, absolute) > 1e-3


def test_what_relative_sharpness_is_called(tmp_path):
    args = config(tmp_path, sigma=0.02, sigma_scale="relative", log_sharpness=True, max_steps=1)
    log = train(tiny_llama(), token_data(8), args).state.log_history
    assert "nso/relative_trace_estimate" in log[0] and "nso/trace_estimate" not in log[0]


def test_a_scale_that_there_is_not():
    with pytest.raises(ValueError, match=r"sigma_scale='rows': unknown. Choose one of 'absolute'"):
        NSOConfig("x", sigma_scale="rows")
