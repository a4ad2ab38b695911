"""Lines that only an accelerator runs: marked gpu, and never run on a machine without one."""

import pytest
import torch

from nso_hf.backends import Weight
from nso_hf.step.noise import Noise, block_size
from nso_hf.step.side_effects import random_state_kept
from tests.reference import config, tiny_llama, token_data, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_noise_is_drawn_where_the_weight_is():
    data = torch.zeros(2 * block_size(torch.device("cuda")) + 5, device="cuda")
    weight = Weight("w", 0, torch.nn.Parameter(data), data, 0, data.numel())
    noise = Noise(0, 0, 0, 1.0)
    noise.add_to([weight])
    assert noise.block(weight, 0).device.type == "cuda"
    assert abs(data.std().item() - 1) < 0.01


def test_random_state_of_the_device_is_kept():
    with random_state_kept({torch.device("cuda", torch.cuda.current_device())}):
        inside = torch.rand(3, device="cuda")
    assert torch.equal(inside, torch.rand(3, device="cuda"))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_weights_are_bit_identical_at_learning_rate_zero(tmp_path, precision):
    model = tiny_llama()
    before = [p.detach().clone() for p in model.parameters()]
    args = config(tmp_path, use_cpu=False, learning_rate=0.0, num_perturbations=2, **precision)
    trainer = train(model, token_data(12), args)
    assert next(model.parameters()).device.type == "cuda"
    assert trainer.state.log_history[0]["nso/perturbation_norm"] > 0
    assert all(torch.equal(p.cpu(), w) for p, w in zip(model.parameters(), before, strict=True))
