"""Mixup: one mixture for all evaluations of a step, whose loss is that of a plain loop."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from nso_hf import NSOConfig, NSOTrainer, NSOTrainerMixin
from nso_hf.companions import MixupArguments, MixupConfig, MixupMixin, MixupTrainer
from nso_hf.companions.mixup import MixedLabels
from nso_hf.curvature import hessian_trace
from tests.reference import draw, largest_difference

SIGMA, LEARNING_RATE = 0.05, 0.5
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_labels": 3}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def vit():
    torch.manual_seed(0)
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return ViTForImageClassification(ViTConfig(**SIZES, **QUIET, **images, num_hidden_layers=1))


def bert():
    torch.manual_seed(0)
    text = {"vocab_size": 30, "max_position_embeddings": 16}
    settings = BertConfig(**SIZES, **QUIET, **text, num_hidden_layers=1)
    return BertForSequenceClassification(settings)


def rows(kind, number=24):
    generator = torch.Generator().manual_seed(1)
    data = []
    for i in range(number):
        if kind is vit:
            row = {"pixel_values": torch.randn(1, 8, 8, generator=generator)}
        else:
            length = 4 + i % 5
            ids = torch.randint(1, 30, (9,), generator=generator)
            mask = (torch.arange(9) < length).long()
            row = {"input_ids": ids * mask, "attention_mask": mask}
        data.append({**row, "labels": torch.tensor(i % 3)})
    return data


PLACE = {vit: "inputs", bert: "embeddings"}


class Collator:
    """The default one, which keeps what it made."""

    def __init__(self):
        self.made = []

    def __call__(self, examples):
        batch = default_data_collator(examples)
        self.made.append({name: value.clone() for name, value in batch.items()})
        return batch


def watched(trainer_class):
    """Remembers the labels of every evaluation of mixtures."""

    class Watched(trainer_class):
        seen: ClassVar[list] = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            if isinstance(inputs["labels"], MixedLabels):
                self.seen.append(inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Watched


def arguments(folder, kind, config_class=MixupConfig, **options):
    settings = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "mixup_place": PLACE[kind],
        "mixup_alpha": 0.4,
        **({"sigma": SIGMA} if "method" not in options and config_class is MixupConfig else {}),
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return config_class(str(folder), **{**settings, **options})


def trained(folder, kind, trainer_class=MixupTrainer, resume=None, **options):
    trainer = watched(trainer_class)(
        model=kind(),
        args=arguments(folder, kind, **options),
        train_dataset=rows(kind, 48),
        eval_dataset=rows(kind, 6),
        data_collator=Collator(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def mixed_logits(model, inputs, share, order):
    """Of mixtures made by hand."""
    if "pixel_values" in inputs:
        x = inputs["pixel_values"]
        return model(pixel_values=share * x + (1 - share) * x[order]).logits
    embeddings = model.bert.embeddings.word_embeddings(inputs["input_ids"])
    mask = torch.maximum(inputs["attention_mask"], inputs["attention_mask"][order])
    embeddings = share * embeddings + (1 - share) * embeddings[order]
    return model(inputs_embeds=embeddings, attention_mask=mask).logits


def loop(kind, taken, smoothing=0.0, sigma=SIGMA):
    """SGD on the mean gradient at W + U and W - U of lambda CE(y_i) + (1 - lambda) CE(y_j), with
    `taken`: for each step its micro-batches and their mixtures."""
    model = kind()
    model.train()
    parameters = list(model.parameters())
    for step, micro_batches in enumerate(taken):
        W = [p.detach().clone() for p in parameters]
        U = draw(model, 42, step, 0, sigma, "normal")
        gradient = [torch.zeros_like(p) for p in parameters]
        total = sum(len(inputs["labels"]) for inputs, _ in micro_batches)
        for sign in (1, -1):
            for p, w, u in zip(parameters, W, U, strict=True):
                p.data = w + sign * u
            for inputs, (share, order) in micro_batches:
                logits = mixed_logits(model, inputs, share, order)
                p, y = logits.log_softmax(-1), inputs["labels"]
                soft = share * nn.functional.one_hot(y, 3)
                soft = soft + (1 - share) * nn.functional.one_hot(y[order], 3)
                soft = (1 - smoothing) * soft + smoothing / 3
                loss = -(soft * p).sum() / total
                own = torch.autograd.grad(loss, parameters, materialize_grads=True)
                for g, part in zip(gradient, own, strict=True):
                    g.add_(part, alpha=0.5)
        norm = torch.stack([g.norm() for g in gradient]).norm().item()
        for p, w, g in zip(parameters, W, gradient, strict=True):
            p.data = w - LEARNING_RATE * min(1.0, 1 / (norm + 1e-6)) * g
    return model


def taken_by(trainer, accumulation, evaluations=2):
    """For each step its micro-batches and the mixture that every evaluation of one had."""
    assert len(trainer.seen) == 3 * accumulation * evaluations
    taken = []
    for i in range(3 * accumulation):
        batch, seen = trainer.data_collator.made[i], trainer.seen[evaluations * i :][:evaluations]
        for labels in seen:
            assert labels.share == seen[0].share and torch.equal(labels.order, seen[0].order)
            assert torch.equal(labels.first, batch["labels"])
            assert torch.equal(labels.second, batch["labels"][labels.order])
        taken.append((batch, (seen[0].share, seen[0].order)))
    assert len({share for _, (share, _) in taken}) == len(taken)
    return [taken[i : i + accumulation] for i in range(0, len(taken), accumulation)]


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2}])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [vit, bert])
def test_it_is_a_plain_loop_with_the_mixtures(tmp_path, kind, accumulation, options):
    sizes = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = trained(tmp_path, kind, **sizes, **options)
    taken = taken_by(trainer, accumulation)
    expected = loop(kind, taken, options.get("label_smoothing_factor", 0.0))
    # float32, three steps: as the engine's own comparison with a loop.
    assert largest_difference(trainer.model, expected) <= 1e-6
    unmixed = [[(batch, (1.0, order)) for batch, (_, order) in step] for step in taken]
    assert largest_difference(loop(kind, unmixed), expected) > 1e-3


@pytest.mark.parametrize("method", ["sam", "cr_sam", "zo"])
def test_the_evaluations_of_any_method_share_a_mixture(tmp_path, method):
    trainer = trained(tmp_path, vit, method=method, learning_rate=0.01)
    taken_by(trainer, 1, evaluations={"sam": 2, "cr_sam": 3, "zo": 2}[method])


def test_so_they_do_without_common_random_numbers(tmp_path):
    taken_by(trained(tmp_path, vit, common_random_numbers=False), 1)


def test_without_nso_too(tmp_path):
    class PlainTrainer(MixupMixin, Trainer):
        pass

    @dataclass
    class PlainConfig(MixupArguments, TrainingArguments):
        pass

    trainer = trained(tmp_path, vit, PlainTrainer, config_class=PlainConfig)
    expected = loop(vit, taken_by(trainer, 1, evaluations=1), sigma=0.0)
    assert largest_difference(trainer.model, expected) <= 1e-6
    nso = trained(tmp_path, vit, sigma=0.0)
    assert largest_difference(trainer.model, nso.model) == 0


@pytest.mark.parametrize("kind", [vit, bert])
def test_evaluation_and_measurement_mix_nothing(tmp_path, kind):
    trainer = trained(tmp_path, kind)
    trainer.model.eval()
    batch = trainer._prepare_inputs(default_data_collator(rows(kind, 6)))
    with torch.no_grad():
        expected = trainer.model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    batches = [default_data_collator(rows(kind, 6))]
    plain = hessian_trace(trainer.model, batches, num_samples=2)
    # The same products in float32, the loss once the model's and once mixup's.
    assert torch.allclose(
        hessian_trace(trainer, batches, num_samples=2).samples, plain.samples, rtol=1e-3, atol=1e-4
    )


def test_a_resumed_run_draws_the_same(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path, bert, **options)
    resumed = trained(tmp_path, bert, resume=str(tmp_path / "checkpoint-1"), **options)
    assert largest_difference(whole.model, resumed.model) == 0
    assert [s.share for s in resumed.seen] == [s.share for s in whole.seen[2:]]


def test_lambda_is_beta(tmp_path):
    """Mean 1/2, variance 1/(4 (2 alpha + 1)): within four standard errors of 2000 draws."""
    alpha, draws = 0.4, 2000
    args = arguments(tmp_path, vit, mixup_alpha=alpha)
    trainer = MixupTrainer(model=vit().train(), args=args, train_dataset=rows(vit))
    batch = default_data_collator(rows(vit, 4))
    shares = torch.tensor([trainer._mixed(batch)["labels"].share for _ in range(draws)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) <= 4 * (variance / draws) ** 0.5
    # The variance of a square is below a sixteenth: shares are within 1/2 of their mean.
    assert abs(shares.var() - variance) <= 4 * (1 / 16 / draws) ** 0.5


def test_adapters_and_compilation(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        adapters = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        return get_peft_model(bert(), adapters)

    seen = []
    trainer = MixupTrainer(
        model=adapted(), args=arguments(tmp_path, bert), train_dataset=rows(bert)
    )
    encoder = trainer.model.base_model.model.bert.encoder
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    trainer.train()
    assert len(seen) == 6 and trainer.state.log_history[0]["nso/perturbation_norm"] > 0
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = trained(tmp_path, bert, **options)
    plain = trained(tmp_path, bert)
    assert largest_difference(compiled.model, plain.model) <= 1e-6


def test_the_options_go_into_any_config(tmp_path):
    assert MixupConfig(str(tmp_path), use_cpu=True).mixup_alpha == 0.2
    trainer = MixupTrainer(
        model=vit(), args=NSOConfig(str(tmp_path), use_cpu=True), train_dataset=rows(vit)
    )
    assert trainer._mixup == MixupArguments(0.2, "inputs")
    assert isinstance(trainer, NSOTrainer) is False and isinstance(trainer, NSOTrainerMixin)
