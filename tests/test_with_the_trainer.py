"""What people use with the Trainer, under NSO: each compared with something independent."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from nso_hf import (
    NSOArguments,
    NSOConfig,
    NSOSeq2SeqConfig,
    NSOSeq2SeqTrainer,
    NSOTrainer,
    NSOTrainerMixin,
)
from tests.reference import (
    DEVICE,
    causal_loss_sum,
    config,
    largest_difference,
    reference_nso,
    tiny_llama,
    token_data,
    train,
)

SIGMA = 0.05


def reference_weights(data, **options):
    model = tiny_llama()
    reference_nso(model, data, steps=3, global_batch=8, learning_rate=1.0, sigma=SIGMA, **options)
    return model


def sgd_run(tmp_path, model=None, trainer_class=NSOTrainer, data=None, kwargs=None, **options):
    model = tiny_llama() if model is None else model
    options = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"} | options
    args = config(tmp_path, **({"sigma": SIGMA} | options))
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data or token_data(24),
        optimizers=(SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), None),
        **(kwargs or {}),
    )
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path, reentrant):
    model, _ = sgd_run(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert largest_difference(model, reference_weights(token_data(24))) <= 1e-6


def test_torch_compile(tmp_path):
    compiled, _ = sgd_run(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    # On a GPU the Trainer and Accelerate switch TF32 on, which keeps 11 bits of gradients of norm
    # <= 1, and leave it on.
    error = 1e-6 if DEVICE.type == "cpu" else 3 * 2**-10
    assert largest_difference(compiled, reference_weights(token_data(24))) <= error
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("options", [{}, {"sign": "alternate"}, {"backup": "cpu"}])
def test_nothing_is_compiled_after_the_second_step(tmp_path, options):
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = config(
        tmp_path,
        max_steps=6,
        gradient_accumulation_steps=2,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **options,
    )
    train(tiny_llama(), token_data(48), args, callbacks=[Count()])
    assert graphs[0] > 0 and graphs[1:] == [graphs[1]] * 5
    torch.backends.cuda.matmul.allow_tf32 = False


def test_bf16_autocast_is_the_formula_within_bf16(tmp_path):
    casts = []
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda m, i, output: casts.append(output.dtype))
    sgd_run(tmp_path, model=model, bf16=True)
    assert set(casts) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # bf16 keeps 8 bits: gradients of norm <= 1 (clipped) are good to 2^-8 in each of 3 steps.
    difference = largest_difference(model, reference_weights(token_data(24)))
    assert 1e-6 < difference < 3 * 2**-8


def test_compute_loss_func_and_label_smoothing_see_every_pass(tmp_path):
    data = token_data(24)

    def loss_func(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    model, _ = sgd_run(tmp_path, kwargs={"compute_loss_func": loss_func})
    assert largest_difference(model, reference_weights(data)) <= 1e-6
    # Label smoothing takes the labels out of the inputs: each pass needs its own copy of them.
    smoothed, _ = sgd_run(tmp_path, label_smoothing_factor=0.1)
    again, _ = sgd_run(tmp_path, label_smoothing_factor=0.1, gradient_accumulation_steps=1)
    assert torch.equal(next(smoothed.parameters()), next(again.parameters()))
    assert largest_difference(smoothed, model) > 1e-4


def test_lora_perturbs_and_trains_the_adapters_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(3)
        adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(tiny_llama(), adapters)

    data = token_data(24)
    reference = adapted()
    reference_nso(reference, data, steps=3, global_batch=8, learning_rate=1.0, sigma=SIGMA)
    start = adapted()
    seen = []
    model = adapted()
    base = model.base_model.model.model.layers[0].mlp.up_proj
    kept = base.weight.detach().clone()
    base.register_forward_hook(lambda module, *_: seen.append(torch.equal(module.weight, kept)))
    _, trainer = sgd_run(tmp_path, model=model, data=data)
    assert largest_difference(model, reference) <= 1e-6
    assert largest_difference(start, reference) > 1e-3
    assert len(seen) == 6 and all(seen)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    norm = trainer.state.log_history[0]["nso/perturbation_norm"]
    assert norm == pytest.approx(SIGMA * trainable**0.5, rel=0.1)


def test_only_selected_parameters_are_perturbed(tmp_path):
    cases = [
        ({"perturb_include": ["self_attn"]}, lambda n, p: "self_attn" in n),
        ({"perturb_exclude": ["embed", "norm"]}, lambda n, p: "embed" not in n and "norm" not in n),
        ({"perturb_min_ndim": 2}, lambda n, p: p.ndim >= 2),
        (
            {"perturb_include": [r"layers\.0"], "perturb_exclude": [r"mlp"]},
            lambda n, p: "layers.0" in n and "mlp" not in n,
        ),
    ]
    for options, selected in cases:
        model = tiny_llama()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        moved = set()

        def look(module, *_, before=before, moved=moved):
            for name, p in module.named_parameters():
                if not torch.equal(p, before[name]):
                    moved.add(name)

        model.register_forward_pre_hook(look)
        train(model, token_data(4), config(tmp_path, max_steps=1, learning_rate=0.0, **options))
        assert moved == {n for n, p in before.items() if selected(n, p)}
        assert 0 < len(moved) < len(before)


class Normalised(nn.Module):
    """Batch normalisation and dropout, with a loss on top."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.masks = []
        self.body[2].register_forward_hook(lambda m, i, output: self.masks.append(output == 0))

    def forward(self, x, labels=None):
        return {"loss": ((self.body(x)[:, 0] - labels) ** 2).mean()}


def regression(n=24):
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randn((), generator=generator)}
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"clean_weight": 0.3, "num_perturbations": 2}, {"log_sharpness": True}]
)
def test_batch_norm_statistics_are_updated_once_per_micro_batch(tmp_path, options):
    model = Normalised()
    reference = copy.deepcopy(model.body[1]).to(DEVICE)
    inputs = []
    model.body[1].register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().clone()))
    args = config(tmp_path, gradient_accumulation_steps=2, **options)
    train(model, regression(), args)
    layer = model.body[1]
    assert layer.num_batches_tracked == 6 and layer.track_running_stats
    # By the last evaluation of each micro-batch, and by no other.
    evaluations = len(inputs) // 6 if "log_sharpness" not in options else 3
    for x in inputs[evaluations - 1 :: evaluations]:
        reference(x)
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)


@pytest.mark.parametrize("common", [True, False])
def test_evaluations_of_a_micro_batch_share_their_dropout_masks(tmp_path, common):
    model = Normalised()
    args = config(
        tmp_path, num_perturbations=2, clean_weight=0.1, common_random_numbers=common, sigma=1e-6
    )
    train(model, regression(), args)
    steps = [model.masks[i : i + 5] for i in range(0, 15, 5)]
    for masks in steps:
        assert all(torch.equal(masks[0], mask) for mask in masks[1:]) is common
    assert not torch.equal(steps[0][0], steps[1][0])


def test_numpy_and_python_random_numbers_are_common_too(tmp_path):
    import random

    drawn = []
    model = Normalised()
    model.register_forward_pre_hook(lambda *_: drawn.append((random.random(), np.random.rand())))
    train(model, regression(), config(tmp_path, max_steps=2))
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_frozen_and_unused_parameters_do_no_harm(tmp_path):
    model = tiny_llama()
    model.unused = nn.Parameter(torch.ones(3))
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.detach().clone()
    train(model, token_data(12), config(tmp_path))
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    assert torch.equal(model.unused.cpu(), torch.ones(3))


def test_a_last_window_that_is_not_full(tmp_path):
    """5 micro-batches at accumulation 2: the last step has one, and weighs its tokens alone."""
    data = token_data(20)
    model, trainer = sgd_run(
        tmp_path,
        data=data,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=1,
    )
    assert trainer.state.global_step == 3
    reference = reference_weights(data)  # batches of 8, 8 and the remaining 4
    assert largest_difference(model, reference) <= 1e-6


def test_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    before = copy.deepcopy(t5)
    args = NSOSeq2SeqConfig(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        learning_rate=0.0,
        logging_steps=1,
        max_steps=3,
        predict_with_generate=True,
        generation_max_length=5,
    )
    trainer = NSOSeq2SeqTrainer(
        model=t5, args=args, train_dataset=token_data(24), processing_class=_tokenizer()
    )
    trainer.train()
    assert len(trainer.predict(token_data(2)).predictions) == 2
    assert all(torch.equal(a, b) for a, b in zip(t5.parameters(), before.parameters(), strict=True))
    assert trainer.state.log_history[0]["nso/perturbation_norm"] > 0


def test_gpt2_shares_its_noise_over_tied_weights(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )
    seen = []
    model.register_forward_pre_hook(
        lambda m, *_: seen.append(
            m.lm_head.weight.data_ptr() == m.transformer.wte.weight.data_ptr()
        )
    )
    trainer = train(model, token_data(4), config(tmp_path, max_steps=1))
    norm = trainer.state.log_history[0]["nso/perturbation_norm"]
    assert norm == pytest.approx(0.01 * sum(p.numel() for p in model.parameters()) ** 0.5, rel=0.05)
    assert seen == [True, True]


def test_hyperparameter_search_over_sigma(tmp_path):
    norms = []

    class Looking(NSOTrainer):
        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            norms.extend([logs["nso/perturbation_norm"]] if "nso/perturbation_norm" in logs else [])

    data = token_data(8)
    trainer = Looking(
        model_init=lambda trial: tiny_llama(),
        args=config(tmp_path, max_steps=1),
        train_dataset=data,
        eval_dataset=data,
    )
    sigmas = [0.01, 0.03, 0.0]
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"sigma": trial.suggest_categorical("sigma", sigmas)},
        backend="optuna",
        n_trials=3,
        sampler=__import__("optuna").samplers.GridSampler({"sigma": sigmas}),
    )
    assert best.hyperparameters["sigma"] in sigmas
    scale = sum(p.numel() for p in tiny_llama().parameters()) ** 0.5
    assert sorted(n / scale for n in norms) == pytest.approx([0.01, 0.03], rel=0.05)
    with pytest.raises(ValueError, match=r"sigma=-1.0: must be a finite number, at least 0"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"sigma": trial.suggest_float("sigma", -1, -1)},
            backend="optuna",
            n_trials=1,
        )


def test_options_and_mixin_go_with_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class MyConfig(NSOArguments, trl.SFTConfig):
        pass

    class MyTrainer(NSOTrainerMixin, trl.SFTTrainer):
        pass

    rows = [
        {"input_ids": e["input_ids"].tolist(), "labels": e["labels"].tolist()}
        for e in token_data(16)
    ]

    def run(trainer_class, config_class, **nso):
        args = config_class(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            max_steps=2,
            save_strategy="no",
            logging_steps=1,
            bf16=False,
            per_device_train_batch_size=8,
            gradient_checkpointing=False,
            **nso,
        )
        trainer = trainer_class(
            model=tiny_llama(),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
        )
        trainer.train()
        return trainer.state.log_history

    plain, noisy = run(trl.SFTTrainer, trl.SFTConfig), run(MyTrainer, MyConfig, sigma=0.05)
    assert [e["num_tokens"] for e in noisy[:2]] == [e["num_tokens"] for e in plain[:2]]
    assert noisy[0]["nso/sigma"] == 0.05
    still = run(MyTrainer, MyConfig, sigma=0.0)
    for name in ("loss", "mean_token_accuracy", "entropy", "grad_norm"):
        assert still[1][name] == plain[1][name]
    for name in ("loss", "entropy", "grad_norm"):
        assert noisy[1][name] != plain[1][name]


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", unk_token="w1"
    )


def test_options_are_saved_with_the_run(tmp_path):
    args = config(
        tmp_path,
        sigma=0.02,
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
        sign="alternate",
        gradient_accumulation_steps=2,
    )
    trainer = train(tiny_llama(), token_data(8), args)
    assert trainer.args.to_dict()["sigma"] == 0.02
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert isinstance(saved, NSOConfig) and saved.sigma == 0.02 and saved.sign == "alternate"


def test_half_precision_weights_that_cannot_carry_the_noise_are_reported(tmp_path, caplog):
    import logging

    import transformers

    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers").propagate = True
    logger = logging.getLogger("nso_hf.trainer")
    logger.propagate = True
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    with caplog.at_level("WARNING", logger="nso_hf.trainer"):
        train(model, token_data(4), config(tmp_path, max_steps=1, sigma=1e-4))
        # At 1, bf16 steps by 2^-8 above and 2^-9 below: |u| <= 2^-10 = 10 sigma moves nothing.
        assert "0% of the perturbed weights changed: bfloat16 cannot carry noise" in caplog.text
        caplog.clear()
        train(tiny_llama(), token_data(4), config(tmp_path, max_steps=1))
        assert "cannot carry" not in caplog.text
    transformers.logging.set_verbosity_error()


def test_non_contiguous_weights(tmp_path):
    data = token_data(24)
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight.data = module.weight.data.t().contiguous().t()
    model, _ = sgd_run(tmp_path, model=model, data=data)
    assert not model.model.layers[0].mlp.up_proj.weight.is_contiguous()
    assert largest_difference(model, reference_weights(data)) <= 1e-6


def test_reference_loss_is_the_models_own():
    model, (example,) = tiny_llama(), token_data(1)
    batch = {name: value[None].to(DEVICE) for name, value in example.items()}
    tokens = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(causal_loss_sum(model, batch) / tokens, model(**batch).loss)


def test_an_outer_autocast_does_not_serve_stale_weights(tmp_path):
    """Autocast caches the bf16 copy of a weight until it ends: each displacement has to drop it."""
    data = token_data(24)
    with torch.autocast("cpu", torch.bfloat16):
        model, _ = sgd_run(tmp_path, data=data, logging_steps=1)
    reference = reference_weights(data)
    plain = tiny_llama()
    reference_nso(plain, data, steps=3, global_batch=8, learning_rate=1.0, sigma=0.0)
    # bf16 gradients of norm <= 1 in 3 steps, as in the test of bf16 above; noise moves 5e-2.
    assert largest_difference(model, reference) < 3 * 2**-8 < largest_difference(model, plain)


@dataclasses.dataclass
class WithOptions(NSOArguments, TrainingArguments):
    """As people write them: options of their own, with help and a default factory."""

    names: list[str] = dataclasses.field(default_factory=lambda: ["a"], metadata={"help": "Names."})


def test_a_decorated_config_keeps_its_options_whole(tmp_path):
    args = WithOptions(str(tmp_path), sigma=0.03, names=["b"])
    assert args.sigma == 0.03 and args.names == ["b"]
    assert WithOptions(str(tmp_path)).names == ["a"]
    (option,) = [f for f in dataclasses.fields(WithOptions) if f.name == "names"]
    assert option.metadata["help"] == "Names."
    with pytest.raises(ValueError, match="sigma=-1: "):
        WithOptions(str(tmp_path), sigma=-1)
