"""Lines that only an accelerator runs. Most other tests run there too: NSO_TEST_DEVICE=cuda."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nso_hf.backends import Weight
from nso_hf.step.noise import BLOCK, Noise
from nso_hf.step.side_effects import random_state_kept
from tests.methods.equations import OPTIONS, SHARED, learning_rate
from tests.reference import config, largest_difference, tiny_llama, token_data, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_noise_is_drawn_where_the_weight_is():
    data = torch.zeros(2 * BLOCK + 5, device="cuda")
    weight = Weight("w", 0, torch.nn.Parameter(data), data, 0, data.shape)
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
    before = [p.detach().cpu() for p in model.parameters()]
    args = config(tmp_path, use_cpu=False, learning_rate=0.0, num_perturbations=2, **precision)
    trainer = train(model, token_data(12), args)
    assert next(model.parameters()).device.type == "cuda"
    assert trainer.state.log_history[0]["nso/perturbation_norm"] > 0
    assert all(torch.equal(p.cpu(), w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["sam", "fsam", "bsam", "async_sam", "zo"])
def test_methods_under_the_loss_scaler(tmp_path, name):
    """Half precision keeps 11 bits: of weights that move by 1e-1 to 1 in three steps, gradients
    that are good to 2^-9 leave an error of 1e-3 of that, and SAM's direction as much again."""
    data = token_data(24)

    def trained(**precision):
        model = tiny_llama()
        args = config(
            tmp_path,
            use_cpu=False,
            method=name,
            method_kwargs=OPTIONS[name],
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            **SHARED.get(name, {}),
            **precision,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate(name))
        return train(model, data, args, optimizers=(optimizer, None))

    half, exact = trained(fp16=True), trained()
    assert half.accelerator.scaler.is_enabled() and half.accelerator.scaler.get_scale() > 1
    moved = largest_difference(exact.model, tiny_llama().cuda())
    assert 0 < largest_difference(half.model, exact.model) <= 2e-2 * moved


def test_flash_attention_is_displaced_too(tmp_path):
    """The flash kernel alone is allowed, so that another would fail."""
    model = tiny_llama()
    args = config(tmp_path, use_cpu=False, bf16=True, sigma=0.05)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        data = [
            {key: value for key, value in row.items() if key != "attention_mask"}
            for row in token_data(12)
        ]
        trainer = train(model, data, args)
    assert trainer.state.log_history[0]["nso/perturbation_norm"] > 0
