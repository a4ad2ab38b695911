"""Deep LoRA: its factors and their first values, its training against loops with the factors
written out, and what is saved of it."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nso_hf import NSOTrainer
from nso_hf.deep_lora import deepen, load_deep_lora
from nso_hf.deep_lora.saving import multiplied
from nso_hf.step.rates import slow_down
from tests.deep_loras import FORMS, SCALE, R, deep, explicit, factors, first_batch, layers, lora
from tests.methods.equations import OPTIONS, reference_method
from tests.reference import (
    DEVICE,
    causal_loss_sum,
    config,
    largest_difference,
    reference_nso,
    tiny_llama,
    token_data,
)

TOLERANCE = 1e-6  # as in tests/methods/equations.py


def test_the_plain_factors_are_orthogonal_at_their_scale():
    model = deep("plain", scale=1e-3)
    assert len(layers(model)) == 4
    for layer in layers(model).values():
        W3, W2, W1 = factors(layer)
        assert W3.shape == (layer.out_features, R) and W1.shape == (R, layer.in_features)
        for W in (W3.T @ W3, W2 @ W2.T, W2.T @ W2, W1 @ W1.T):
            # Unit vectors in float32, times 1e-6.
            assert (W - 1e-6 * torch.eye(R, device=DEVICE)).abs().max() <= 1e-12
        # The singular values of a product of three such are all 1e-9.
        dW = layer.get_delta_weight("default")
        assert torch.allclose(
            torch.linalg.svdvals(dW)[:R], torch.full((R,), 1e-9, device=DEVICE), rtol=1e-5, atol=0
        )


def test_a_width_beyond_the_matrix_is_orthogonal_in_the_other_way():
    """The form without a choice of rank: as wide as the matrix's longer side."""
    for layer in layers(deep("plain", scale=1.0, r=32)).values():
        W3, W2, W1 = factors(layer)
        assert (W3 @ W3.T - torch.eye(layer.out_features, device=DEVICE)).abs().max() <= 1e-5
        assert (W1 @ W1.T - torch.eye(32, device=DEVICE)).abs().max() <= 1e-5 and W2.shape == (
            32,
            32,
        )


def test_the_compressed_factors_are_singular_vectors_of_the_first_gradient():
    model = deep("compressed", scale=1e-3)
    base = tiny_llama()
    base(**first_batch()).loss.backward()
    for name, layer in layers(model).items():
        U, *cores, Vh = factors(layer)
        assert len(cores) == 3
        assert all(torch.equal(C, 1e-3 * torch.eye(R, device=DEVICE)) for C in cores)
        assert len({C.data_ptr() for C in cores}) == 3
        G = base.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        u, s, vh = (x.double() for x in torch.linalg.svd(G.double(), full_matrices=False))
        # A rotation of the first r by the gradient's rounding, 1e-7 of it over the gap in s.
        tolerance = 1e-6 * (s[0] / (s[R - 1] - s[R])).item()
        assert tolerance < 1e-3
        for one, other in [(U, u[:, :R]), (Vh.T, vh[:R].T)]:
            assert (one.double() @ one.double().T - other @ other.T).abs().max() <= tolerance
        # Each pair has its sign: a step down, whose size is the sum of the singular values.
        fall = (layer.get_delta_weight("default").double() * G).sum() / 1e-9
        assert fall.item() == pytest.approx(-s[:R].sum().item(), rel=1e-4)


def test_the_first_gradient_leaves_no_trace():
    model, untouched = lora(), lora()
    torch.manual_seed(5)
    model.train()
    deepen(model, first_batch=first_batch())
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert model.training and all(p.grad is None for p in model.parameters())
    frozen = {n: p for n, p in untouched.named_parameters() if "lora_" not in n}
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[n]) and not now[n].requires_grad for n, p in frozen.items())
    assert not any(m._forward_hooks for m in model.modules())


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    )


def test_layers_that_hold_their_matrix_transposed():
    made = lora(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    model = deepen(made, first_batch=first_batch())
    base = tiny_gpt2().eval()
    base(**first_batch()).loss.backward()
    for name, layer in layers(model).items():
        G = base.get_submodule(name.removeprefix("base_model.model.")).weight.grad.T
        fall = (layer.get_delta_weight("default").T * G).sum().item() / 1e-9
        assert fall == pytest.approx(-torch.linalg.svdvals(G)[:R].sum().item(), rel=1e-3)


@pytest.mark.parametrize("method", ["nso", "sam"])
@pytest.mark.parametrize("form", FORMS)
def test_training_is_that_of_a_model_with_the_factors_written_out(tmp_path, form, method):
    model = deep(form)
    expected, before = explicit(model), explicit(model)
    assert largest_difference(model, expected) == 0
    data = token_data(24)
    options = {"sigma": 0.05} if method == "nso" else {"method_kwargs": OPTIONS["sam"]}
    # SGD at 0.3, without the compressed form's second rate, which is tried below.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    args = config(
        tmp_path,
        method=method,
        **options,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    trainer = NSOTrainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    if method == "nso":
        reference_nso(
            expected,
            data,
            steps=3,
            global_batch=8,
            learning_rate=0.3,
            sigma=0.05,
            max_grad_norm=0.0,
        )
    else:
        reference_method(expected, "sam", data, steps=3, batch=8, micro_batches=1)
    assert largest_difference(model, expected) <= TOLERANCE
    assert largest_difference(model, before) > 100 * TOLERANCE


def test_the_outer_factors_are_trained_at_their_share_of_the_learning_rate(tmp_path):
    """Adam divides by the size of the gradient: its first step is the learning rate, everywhere."""
    model = deep("compressed")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = config(
        tmp_path, sigma=0.01, max_steps=4, learning_rate=1e-3, weight_decay=0.1, save_steps=2
    )
    args.lr_scheduler_type = "linear"
    trainer = NSOTrainer(model=model, args=args, train_dataset=token_data(24))
    steps = []
    trainer.create_optimizer()
    optimizer = trainer.optimizer
    groups = [len(group["params"]) for group in optimizer.param_groups]
    assert (groups[0], groups[-1], sum(groups)) == (12, 8, 20)
    optimizer.register_step_pre_hook(lambda o, *_: steps.append([g["lr"] for g in o.param_groups]))
    trainer.train()
    for number, (inner, *_, outer) in enumerate(steps):
        assert inner == pytest.approx(1e-3 * (1 - number / 4), rel=1e-12)
        assert outer == pytest.approx(1e-2 * inner, rel=1e-12)
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-3)
    rates = sum(inner for inner, *_ in steps)
    for name, p in model.named_parameters():
        moved = (p - before[name]).abs().max().item()
        share = 0.01 if name.endswith((".original", "lora_A.default.weight")) else 1
        assert p.requires_grad or moved == 0
        # No element moves further than the sum of the rates, decay included, nor all by much less.
        assert not p.requires_grad or 0.2 * share * rates < moved < 1.2 * share * rates
    assert (
        optimizer.param_groups[0]["weight_decay"]
        == optimizer.param_groups[-1]["weight_decay"]
        == 0.1
    )


def test_an_optimizer_made_elsewhere_can_be_slowed_down():
    model = deep("compressed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    slow_down(optimizer, model)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-5]
    own = torch.optim.AdamW(deep("plain").parameters(), lr=1e-3)
    slow_down(own, deep("plain"))
    assert len(own.param_groups) == 1


@pytest.mark.parametrize("form", FORMS)
def test_anybody_loads_what_is_saved_as_ordinary_lora(tmp_path, form):
    model = deep(form).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in saved} == {"A.weight", "B.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    settings = plain.peft_config["default"]
    assert settings.r == settings.lora_alpha == R and not settings.use_rslora
    batch = first_batch()
    # The product that is saved is the one that is computed with, and peft does the same with it.
    assert torch.equal(plain(**batch).logits, model(**batch).logits)
    assert type(plain) is not type(model)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_loaded_to_be_trained_on(tmp_path, form):
    model = deep(form)
    model.save_pretrained(tmp_path)
    again = load_deep_lora(tiny_llama(), tmp_path)
    pairs = zip(model.named_parameters(), again.named_parameters(), strict=True)
    for (name, p), (other, q) in pairs:
        assert name == other and torch.equal(p, q) and p.requires_grad == q.requires_grad
    groups = []
    for each in (model, again):
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0)
        slow_down(optimizer, each)
        groups.append([(g["lr"], len(g["params"])) for g in optimizer.param_groups])
    assert groups[0] == groups[1]


def test_several_adapters_and_modules_saved_whole(tmp_path):
    """One adapter deep, one ordinary, and a head beside them."""
    model = deep("plain", modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "deep_lora.safetensors").exists()
    assert not (tmp_path / "other" / "deep_lora.safetensors").exists()
    again = load_deep_lora(tiny_llama(), tmp_path)
    with torch.no_grad():
        for p in again.parameters():
            if p.requires_grad:
                p.add_(1.0)
    result = again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert not result.missing_keys
    ours = {n: p for n, p in model.named_parameters() if ".other." not in n}
    for name, p in again.named_parameters():
        assert torch.equal(p, ours[name])
    again.load_adapter(str(tmp_path / "other"), "other")


@pytest.mark.parametrize("form", FORMS)
def test_merging_adds_the_product(form):
    model = deep(form).eval()
    before, base = model(**first_batch()).logits, tiny_llama()
    products = {n: torch.linalg.multi_dot(factors(layer)) for n, layer in layers(model).items()}
    merged = copy.deepcopy(model).merge_and_unload()
    for name, dW in products.items():
        path = f"{name.removeprefix('base_model.model.')}.weight"
        moved = merged.get_parameter(path) - base.get_parameter(path)
        # Two float32 roundings of weights below 0.5, and the product's own.
        assert (moved - dW).abs().max() <= 1e-7 and dW.abs().max() > 1e-3
    # Rounded in other places: 1e-7 of activations of the order of 1, over two layers.
    assert (merged(**first_batch()).logits - before).abs().max() <= 1e-5
    model.merge_adapter()
    model.unmerge_adapter()
    assert (model(**first_batch()).logits - before).abs().max() <= 1e-5
    with model.disable_adapter():
        assert (model(**first_batch()).logits - base(**first_batch()).logits).abs().max() <= 1e-5


def test_under_autocast_it_computes_what_the_saved_adapter_computes(tmp_path):
    model = deep("plain").eval()
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(**first_batch()).logits, model(**first_batch()).logits)


def test_adapters_in_half_precision():
    made = get_peft_model(
        tiny_llama().bfloat16(),
        LoraConfig(r=R, lora_alpha=R, target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    model = deepen(made, scale=SCALE)
    assert {f.dtype for layer in layers(model).values() for f in factors(layer)} == {torch.bfloat16}
    loss = model(**first_batch()).loss
    loss.backward()
    merged = model.merge_and_unload()
    # bfloat16 keeps 8 bits: 2^-8 of a loss of 4.
    assert merged(**first_batch()).loss.item() == pytest.approx(loss.item(), abs=2**-6)


@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bit_equal(tmp_path, form):
    options = {
        "sigma": 0.05,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "train_sampling_strategy": "random",
    }

    def trainer(seed):
        args = config(tmp_path, **options)
        return NSOTrainer(model=deep(form, seed=seed), args=args, train_dataset=token_data(40))

    whole, resumed = trainer(1), trainer(2)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(whole.model, deep(form)) > 1e-3
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    a, b = (t.optimizer.state_dict() for t in (whole, resumed))
    assert a["param_groups"] == b["param_groups"]
    assert all(
        torch.equal(a["state"][i][n], b["state"][i][n]) for i in a["state"] for n in a["state"][i]
    )
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-6")
    batch = first_batch()
    assert torch.equal(plain(**batch).logits, whole.model.eval()(**batch).logits)


def test_the_best_checkpoint_comes_back(tmp_path):
    args = config(
        tmp_path,
        sigma=0.0,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first
    )
    data = token_data(24)
    trainer = NSOTrainer(model=deep("plain"), args=args, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    best = load_deep_lora(tiny_llama(), trainer.state.best_model_checkpoint)
    assert largest_difference(best, trainer.model) == 0


def test_a_folder_without_the_factors_is_refused(tmp_path):
    lora().save_pretrained(tmp_path / "plain")
    deep("compressed").save_pretrained(tmp_path / "compressed")
    model = deep("plain")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"it has no deep_lora\.safetensors, the factors that"):
        model.load_adapter(str(tmp_path / "plain"), "default")
    with pytest.raises(ValueError, match=r"its deep_lora\.safetensors is of other adapters"):
        model.load_adapter(str(tmp_path / "compressed"), "default")
    assert largest_difference(model, before) == 0
    with pytest.raises(ValueError, match=r"it has no deep_lora\.safetensors"):
        load_deep_lora(tiny_llama(), tmp_path / "plain")


def test_a_layer_without_a_gradient_is_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return type("Output", (), {"loss": self.used(x).square().mean()})

    made = lora(Unused(), r=2, target_modules=["used", "unused"])
    with pytest.raises(ValueError, match=r"no gradient reaches base_model\.model\.unused"):
        deepen(made, first_batch={"x": torch.ones(3, 6)})


def test_the_gradient_of_a_layer_that_is_called_twice_is_its_sum():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return type("Output", (), {"loss": self.layer(self.layer(x).relu_()).square().mean()})

    x, plain = torch.randn(5, 6), Twice()
    plain(x).loss.backward()
    model = deepen(lora(Twice(), r=2, target_modules=["layer"]), first_batch={"x": x})
    (layer,) = layers(model).values()
    G = plain.layer.weight.grad
    fall = (layer.get_delta_weight("default") * G).sum().item() / 1e-9
    assert fall == pytest.approx(-torch.linalg.svdvals(G)[:2].sum().item(), rel=1e-4)
    assert math.isfinite(causal_loss_sum(deep("plain"), first_batch()).item())


def test_parametrised_weights_of_others_are_saved_as_they_are():
    """Such as weight normalisation, of PyTorch's own."""
    state = {
        "conv.parametrizations.weight.original0": torch.ones(2),
        "conv.parametrizations.weight.original": torch.ones(2),
    }
    assert multiplied(state) == state
