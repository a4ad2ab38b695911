"""One model from several."""

import pytest
import torch
from torch import nn

from nso_hf.robustness import average, task_arithmetic
from tests.reference import tiny_llama


def net(seed, width=3):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
    made(torch.randn(8, 4))  # statistics of its own
    return made


def test_average():
    models = [net(seed) for seed in range(3)]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    merged = average(models)
    for name, tensor in merged.state_dict().items():
        each = [state[name] for state in before]
        expected = sum(each) / 3 if tensor.is_floating_point() else each[0]
        # Two additions and a division in float32, in another order.
        torch.testing.assert_close(tensor, expected, rtol=3e-7, atol=1e-7)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_task_arithmetic():
    base, first, second = (net(seed) for seed in range(3))
    merged = task_arithmetic(base, [first, second], scale=0.3)
    for w, w0, w1, w2 in zip(
        *(model.parameters() for model in (merged, base, first, second)), strict=True
    ):
        torch.testing.assert_close(w, w0 + 0.3 * (w1 - w0) + 0.3 * (w2 - w0), rtol=0, atol=1e-6)
    one = task_arithmetic(base, [first], scale=1.0)
    for w, w1 in zip(one.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(w, w1, rtol=0, atol=1e-7)


def test_in_bfloat16_it_is_rounded_once():
    models = [tiny_llama(seed=seed).bfloat16() for seed in range(3)]
    merged = average(models)
    for w, *each in zip(*(m.parameters() for m in (merged, *models)), strict=True):
        exact = torch.stack([part.float() for part in each]).mean(dim=0)
        assert torch.equal(w, exact.bfloat16())


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"models=\[\]: there are none"):
        average([])
    with pytest.raises(ValueError, match=r"models=\[\]: there are none"):
        task_arithmetic(net(0), [], scale=1.0)
    with pytest.raises(ValueError, match=r"0.weight has the shape \[5, 4\], and \[3, 4\] in"):
        average([net(0), net(1, width=5)])
    with pytest.raises(ValueError, match="is not in both it and number 1"):
        average([net(0), nn.Linear(4, 3)])
    with pytest.raises(ValueError, match=r"scale=nan: must be a finite number"):
        task_arithmetic(net(0), [net(1)], scale=float("nan"))
