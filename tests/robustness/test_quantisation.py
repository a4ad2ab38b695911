"""Rounding to nearest against PyTorch's own fake quantisation, element by element."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nso_hf.robustness import round_to_nearest
from tests.reference import tiny_llama


def expected(matrix, bits, group_size):
    """By `fake_quantize_per_channel_affine`, a group at a time."""
    levels = 2 ** (bits - 1) - 1
    parts = []
    for part in matrix.float().split(group_size or matrix.shape[1], dim=1):
        scale = part.abs().amax(dim=1) / levels
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        parts.append(torch.fake_quantize_per_channel_affine(part, scale, zeros, 0, -levels, levels))
    return torch.cat(parts, dim=1)


LAYERS = {
    "linear": (lambda: nn.Linear(150, 7), lambda weight: weight),
    "convolution": (lambda: nn.Conv2d(6, 7, 5), lambda weight: weight.flatten(1)),
    "transposed": (lambda: Conv1D(7, 150), lambda weight: weight.t()),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_an_independent_quantiser(name, bits, group_size):
    make, rows = LAYERS[name]
    layer = make()
    before = layer.weight.detach().clone()
    quantised = expected(rows(before), bits, group_size)
    with round_to_nearest(layer, bits=bits, group_size=group_size):
        inside = rows(layer.weight.detach()).clone()
    # The quotient is rounded twice by one of them: values half-way may go either way.
    scale = quantised.abs().max() / (2 ** (bits - 1) - 1)
    assert ((inside - quantised).abs() > 1e-6).float().mean() < 1e-3
    assert (inside - quantised).abs().max() <= scale * 1.001
    assert len(inside[0, : group_size or None].unique()) <= 2**bits - 1
    assert torch.equal(layer.weight, before)


def test_the_weights_come_back_after_an_error_and_ties_are_quantised_once():
    model = tiny_llama()
    model.tie_weights()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), round_to_nearest(model, bits=2):
        assert len(model.lm_head.weight[0].unique()) <= 3
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (model.model.norm.weight == 1).all()
        raise KeyError
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_half_precision_and_rows_of_zeros():
    layer = nn.Linear(64, 3).to(torch.bfloat16)
    layer.weight.data[1] = 0
    with round_to_nearest(layer, bits=3):
        assert not layer.weight.isnan().any() and (layer.weight[1] == 0).all()
        assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1: not a whole number from 2 to 16. Use 8, 4, 3 or 2."),
        ({"bits": 2.5}, "bits=2.5: not a whole number"),
        ({"bits": 4, "group_size": 0}, "group_size=0: not a whole number above 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message), round_to_nearest(nn.Linear(2, 2), **options):
        pass
    with (
        pytest.raises(ValueError, match="model='LayerNorm': it has no linear"),
        round_to_nearest(nn.LayerNorm(3), bits=4),
    ):
        pass
