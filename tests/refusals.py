"""Wrong inputs and what each is answered with: `python -m tests.refusals` prints the table of
docs/refusals.md."""

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, DistributedType
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from nso_hf import NSOConfig, NSOSeq2SeqTrainer, NSOTrainer, NSOTrainerMixin
from nso_hf.backends import check, select
from nso_hf.companions import (
    DistancePenalty,
    DistanceProjection,
    EMACallback,
    MixupConfig,
    MixupMixin,
    MixupTrainer,
    SWACallback,
    with_label_noise,
)
from nso_hf.curvature import (
    CurvatureCallback,
    find_sigma,
    hessian_eigenvalues,
    hessian_trace,
    loss_slice,
    noise_stability,
    pac_bayes_bound,
)
from nso_hf.curvature.__main__ import main as measure_checkpoints
from nso_hf.refusal import Refusal
from recipes.compare import main as compare
from recipes.cot_finetuning import main
from tests.reference import config, tiny_llama, token_data
from tests.tiny_models import save_model


def option(**options) -> Callable[[Path], object]:
    return lambda folder: config(folder, **options)


def trainer(model=None, trainer_class=NSOTrainer, **options) -> Callable[[Path], object]:
    def build(folder: Path) -> object:
        the_model = model() if model else tiny_llama()
        return trainer_class(
            model=the_model, args=config(folder, **options), train_dataset=token_data(4)
        )

    return build


def training(**arguments) -> Callable[[Path], object]:
    """What is refused when training starts, since evaluation would be right."""
    return lambda folder: trainer(**arguments)(folder).train()


ROWS = "\n".join(
    '{"question": "1 + %d =", "rationale": "count", "answer": "%d"}' % (i, i + 1) for i in range(20)
)


def recipe(
    *flags: str, write: dict[str, str] | None = None, model: str = "gpt2"
) -> Callable[[Path], object]:
    """The recipe with `{folder}` standing for a folder that holds `model`, train.jsonl and the
    files of `write`."""

    def run(folder: Path) -> object:
        save_model(model, folder / "model")
        files = {"data/train.jsonl": ROWS, **(write or {})}
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text(text)
        base = {
            "--model_name_or_path": f"{folder}/model",
            "--dataset": f"{folder}/data",
            "--output_dir": f"{folder}/out",
            "--use_cpu": "true",
            "--report_to": "none",
            "--validation_size": "4",
            "--test_size": "4",
            "--max_new_tokens": "20",
        }
        given = [flag.format(folder=folder) for flag in flags]
        command = [
            *given,
            *(word for flag, value in base.items() if flag not in given for word in (flag, value)),
        ]
        return main(command)

    return run


def resumed(*flags: str, **settings) -> Callable[[Path], object]:
    """A short run of the recipe with adapters, gone on with with other flags."""

    def run(folder: Path) -> object:
        short = ("--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
        short += ("--lora_r", "4", "--evaluate_before", "false", "--disable_tqdm", "true")
        recipe(*short)(folder)
        return recipe(*short, *flags, "--resume_from_checkpoint", "last", **settings)(folder)

    return run


def accelerator(
    kind: DistributedType, fsdp: int = 2, deepspeed: dict | None = None, **settings
) -> SimpleNamespace:
    """What `nso_hf.backends` reads of an `Accelerator` in the second of two processes."""
    plugins = {
        "fsdp_plugin": SimpleNamespace(fsdp_version=fsdp) if kind == DistributedType.FSDP else None
    }
    if kind == DistributedType.DEEPSPEED:
        zero = {"zero_optimization": {"stage": 2, **(deepspeed or {})}, "train_batch_size": 2}
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=zero | settings)
    return SimpleNamespace(
        distributed_type=kind,
        process_index=1,
        num_processes=2,
        state=SimpleNamespace(**plugins),
        parallelism_config=None,
    )


def run_of(kind: DistributedType, **settings) -> Callable[[Path], object]:
    def check_run(folder: Path) -> object:
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}):
            return check(accelerator(kind, **settings))

    return check_run


def zero(**settings) -> Callable[[Path], object]:
    return run_of(DistributedType.DEEPSPEED, deepspeed={"stage": 3, **settings})


def zero_2_of_old(folder: Path) -> object:
    with mock.patch("nso_hf.backends.versions.version", lambda package: "0.18.9"):
        return run_of(DistributedType.DEEPSPEED)(folder)


def fsdp_that_became_ddp(folder: Path) -> object:
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"}):
        return check(accelerator(DistributedType.MULTI_CPU))


def one_process_of_two(folder: Path) -> object:
    run = accelerator(DistributedType.NO)
    run.num_processes = 1
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}):
        return check(run)


def split_by_tensors(folder: Path) -> object:
    run = accelerator(DistributedType.MULTI_GPU)
    run.parallelism_config = ParallelismConfig(tp_size=2)
    return check(run)


def loaded_with_tensor_parallelism(folder: Path) -> object:
    model = tiny_llama()
    model.config.distributed_config = DistributedConfig(tp_size=2)
    return select(accelerator(DistributedType.MULTI_GPU), model)


def frozen() -> nn.Module:
    return tiny_llama().requires_grad_(False)


def in_integers() -> nn.Module:
    model = tiny_llama()
    model.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))
    return model


def offloaded() -> nn.Module:
    """As a model dispatched over several devices, part of it not in memory."""
    model = tiny_llama()
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model.model.layers[1].to("meta")
    return model


class GRPOTrainer(Trainer):
    """Stands for TRL's: refused, since it generates inside `training_step`."""

    def training_step(self, model, *args):
        model.generate()
        return super().training_step(model, *args)


class Grouped(NSOTrainerMixin, GRPOTrainer):
    pass


def clamped() -> nn.Module:
    """Clamps a weight of its own in each forward pass."""
    model = tiny_llama()
    weight = model.model.norm.weight

    def clamp(*_: object) -> None:
        weight.data.clamp_(max=0.5)

    model.register_forward_pre_hook(clamp)
    return model


def projected() -> nn.Module:
    """Puts another tensor in a weight's place in each forward pass, as peft's CPT does."""
    model = tiny_llama()

    def project(module, inputs):
        module.weight.data = module.weight.data.clamp(-1, 1)

    model.lm_head.register_forward_pre_hook(project)
    return model


def update(parameter: torch.Tensor) -> None:
    parameter.data.sub_(parameter.grad)


def stepping_in_hooks() -> nn.Module:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    return model


def overlapping() -> nn.Module:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data = attention.q_proj.weight.data[:16]
    return model


class Differentiates(Trainer):
    def training_step(self, model, inputs, *args):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


class Differentiating(NSOTrainerMixin, Differentiates):
    pass


class Forgetful(NSOTrainer):
    training_step = Differentiates.training_step


class TwoGPUs(NSOConfig):
    @property
    def n_gpu(self) -> int:
        return 2


def two_gpus(folder: Path) -> object:
    args = TwoGPUs(str(folder), use_cpu=True, report_to=[])
    return NSOTrainer(model=tiny_llama(), args=args, train_dataset=token_data(4))


def deep(**options) -> Callable[[Path], object]:
    """Deep LoRA of a tiny Llama with other settings of peft's and of its own."""

    def make(folder: Path) -> object:
        from nso_hf.deep_lora import deepen
        from tests.deep_loras import first_batch, lora

        own = {name: options[name] for name in ("scale", "gamma") if name in options}
        batch = first_batch() if options.get("compressed") else None
        peft = {k: v for k, v in options.items() if k not in {*own, "compressed", "trained"}}
        model = lora(**peft)
        if options.get("trained"):
            for name, parameter in model.named_parameters():
                parameter.data += "lora_B" in name
        return deepen(model, first_batch=batch, **own)

    return make


def deep_without_adapters(folder: Path) -> object:
    from nso_hf.deep_lora import deepen

    return deepen(tiny_llama())


def deep_of_another_kind(folder: Path) -> object:
    from peft import IA3Config, get_peft_model

    from nso_hf.deep_lora import deepen

    adapters = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    return deepen(get_peft_model(tiny_llama(), adapters))


def factors_of_none(folder: Path) -> object:
    from nso_hf.deep_lora import load_deep_lora
    from tests.deep_loras import lora

    lora().save_pretrained(folder)
    return load_deep_lora(tiny_llama(), folder)


def rate_of_its_own(folder: Path) -> object:
    from transformers.optimization import Adafactor

    from nso_hf.step.rates import slow_down
    from tests.deep_loras import deep

    model = deep("compressed")
    return slow_down(Adafactor(model.parameters()), model)


def mixin_last(folder: Path) -> object:
    return type("Wrong", (Trainer, NSOTrainerMixin), {})


def plain_arguments_for_seq2seq(folder: Path) -> object:
    return NSOSeq2SeqTrainer(model=tiny_llama(), args=TrainingArguments(str(folder), use_cpu=True))


LIBRARY: dict[str, Callable[[Path], object]] = {
    "sigma negative": option(sigma=-0.1),
    "sigma infinite": option(sigma=float("inf")),
    "sigma not a number": option(sigma=float("nan")),
    "sigma as text": option(sigma="big"),
    "sigma of nothing": option(sigma=None),
    "unknown scale of sigma": option(sigma_scale="rows"),
    "a rise of nothing": option(sigma="auto", sigma_rise=0.0),
    "a rise beside a number": option(sigma=0.1, sigma_rise=0.2),
    "a rise held beside a number": option(sigma_hold=True),
    "a rise held where it is not measured": option(sigma="auto", sigma_hold=True, sign="alternate"),
    "sigma found for a method without it": option(sigma="auto", method="sam"),
    "no perturbations": option(num_perturbations=0),
    "half a perturbation": option(num_perturbations=1.5),
    "lambda above 1": option(clean_weight=1.1),
    "unknown distribution": option(distribution="binomial"),
    "unknown method": option(method="sharpness"),
    "backup on a disk": option(backup="disk"),
    "unknown schedule": option(sigma_schedule="step"),
    "unknown sign": option(sign="minus"),
    "negative dimensions": option(perturb_min_ndim=-1),
    "pattern not in a list": option(perturb_include="attn"),
    "pattern that is no regular expression": option(perturb_exclude=["("]),
    "options of another method": option(method_kwargs={"rho": 0.05}),
    "method options that are no JSON": option(method_kwargs="{rho: 1"),
    "method options that are a list": option(method_kwargs=[1]),
    "alternate, one-sided": option(sign="alternate", two_sided=False),
    "alternate with sharpness": option(sign="alternate", log_sharpness=True),
    "sharpness, one-sided": option(log_sharpness=True, two_sided=False),
    "sharpness without noise": option(log_sharpness=True, sigma=0.0),
    "sharpness with other dropout masks": option(log_sharpness=True, common_random_numbers=False),
    "alternate over an odd count": trainer(sign="alternate", gradient_accumulation_steps=3),
    "alternate with lambda, for two signs": trainer(
        sign="alternate", gradient_accumulation_steps=2, clean_weight=0.3
    ),
    "alternate with too few micro-batches": trainer(
        sign="alternate", gradient_accumulation_steps=2, num_perturbations=2
    ),
    "pattern that matches nothing": trainer(perturb_include=["attention_of_another_model"]),
    "exclusion that matches nothing": trainer(perturb_exclude=["lm_heads"]),
    "everything excluded": training(perturb_exclude=["."]),
    "no trainable parameters": training(model=frozen),
    "weights that a pass writes to": training(model=clamped),
    "weights that a pass replaces": training(model=projected),
    "optimizer that steps in hooks": trainer(model=stepping_in_hooks),
    "weights that overlap": trainer(model=overlapping),
    "backward of the trainer's own": training(trainer_class=Differentiating),
    "training step without NSO": training(trainer_class=Forgetful),
    "quantised parameter": trainer(model=in_integers),
    "offloaded weights": trainer(model=offloaded),
    "LOMO": trainer(optim="lomo"),
    "AdaLOMO": trainer(optim="adalomo"),
    "layer-wise GaLore": trainer(optim="galore_adamw_layerwise", optim_target_modules=["mlp"]),
    "DataParallel": two_gpus,
    "one process of several": one_process_of_two,
    "FSDP that became DDP": fsdp_that_became_ddp,
    "FSDP1": run_of(DistributedType.FSDP, fsdp=1),
    "Megatron": run_of(DistributedType.MEGATRON_LM),
    "XLA": run_of(DistributedType.XLA),
    "tensor parallelism": split_by_tensors,
    "tensor parallelism at load time": loaded_with_tensor_parallelism,
    "ZeRO-2 of an old DeepSpeed": zero_2_of_old,
    "ZeRO with secondary partitions": zero(zero_hpz_partition_size=2),
    "ZeRO with quantised weights": zero(zero_quantized_weights=True),
    "ZeRO with weights on NVMe": zero(offload_param={"device": "nvme"}),
    "ZeRO with SuperOffload": zero(offload_optimizer={"device": "cpu", "super_offload": True}),
    "ZeRO with ZenFlow": zero(zenflow={"topk_ratio": 0.1}),
    "DeepSpeed's compiler": run_of(DistributedType.DEEPSPEED, compile={"deepcompile": True}),
    "DeepSpeed's tensor parallelism": run_of(
        DistributedType.DEEPSPEED, tensor_parallel={"autotp_size": 2}
    ),
    "DeepSpeed's sequence parallelism": run_of(DistributedType.DEEPSPEED, sequence_parallel_size=2),
    "trainer that generates": trainer(trainer_class=Grouped),
    "mixin behind the trainer": mixin_last,
    "Deep LoRA without adapters": deep_without_adapters,
    "Deep LoRA of another kind of adapter": deep_of_another_kind,
    "Deep LoRA with a scale of LoRA": deep(lora_alpha=8),
    "Deep LoRA with rank-stabilised scale": deep(use_rslora=True),
    "Deep LoRA of an embedding": deep(target_modules=["embed_tokens"]),
    "Deep LoRA of a weight that is no layer's": deep(
        target_modules=[], target_parameters=["q_proj.weight"]
    ),
    "Deep LoRA as DoRA": deep(use_dora=True),
    "Deep LoRA with biases": deep(lora_bias=True),
    "Deep LoRA of a trained adapter": deep(trained=True),
    "Deep LoRA of a rank above the matrix's": deep(r=24, compressed=True),
    "Deep LoRA, gamma in the plain form": deep(gamma=0.1),
    "Deep LoRA of scale 0": deep(scale=0.0),
    "Deep LoRA's factors where there are none": factors_of_none,
    "Deep LoRA with an optimizer's own learning rate": rate_of_its_own,
    "seq2seq trainer with plain arguments": plain_arguments_for_seq2seq,
}


def measured(measure, model=None, batches=None, **options) -> Callable[[Path], object]:
    """A measurement of a tiny Llama, or of what `model` makes, on a batch."""

    def run(folder: Path) -> object:
        the_model = tiny_llama() if model is None else model()
        rows = token_data(4)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return measure(the_model, [batch] if batches is None else batches(batch), **options)

    return run


def command(
    *flags: str, model: str = "gpt2", rows: str = '{"text": "a"}'
) -> Callable[[Path], object]:
    """The curvature command on a checkpoint of `model` with `rows` of data."""

    def run(folder: Path) -> object:
        save_model(model, folder / "model")
        (folder / "rows.jsonl").write_text(rows)
        (folder / "rows.txt").write_text("a")
        given = [flag.format(folder=folder) for flag in flags]
        base = {"--data": f"{folder}/rows.jsonl", "--output": f"{folder}/out"}
        words = [w for flag, v in base.items() if flag not in given for w in (flag, v)]
        first = [] if given and not given[0].startswith("--") else [f"{folder}/model"]
        return measure_checkpoints([*first, *given, *words])

    return run


def bfloat16_llama() -> nn.Module:
    return tiny_llama().bfloat16()


def cut_off(folder: Path) -> str:
    """A model whose weights were copied in part."""
    weights = save_model("gpt2", folder / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return str(weights.parent)


def weights_cut_off(folder: Path) -> object:
    return command(cut_off(folder))(folder)


def saved_batches(content: Any, model: str = "gpt2") -> Callable[[Path], object]:
    """The curvature command on a .pt file of these batches, or of these bytes."""

    def run(folder: Path) -> object:
        file = folder / "batches.pt"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        return command("--data", str(file), model=model)(folder)

    return run


CURVATURE: dict[str, Callable[[Path], object]] = {
    "unknown product": measured(hessian_trace, hvp="double"),
    "no samples": measured(hessian_trace, num_samples=0),
    "unknown estimator": measured(hessian_trace, method="xtrace"),
    "too few samples for Hutch++": measured(hessian_trace, method="hutch++", num_samples=4),
    "unknown selection": measured(hessian_trace, params="frozen"),
    "pattern without a parameter": measured(hessian_trace, params=["lora_A"]),
    "no adapters": measured(hessian_trace, params="lora"),
    "weights in half precision": measured(hessian_trace, model=bfloat16_llama),
    "no batches": measured(hessian_trace, batches=lambda batch: []),
    "one batch, not a list": measured(hessian_trace, batches=lambda batch: batch),
    "batches of pairs": measured(hessian_trace, batches=lambda batch: [(1, 2)]),
    "a model without data": lambda folder: hessian_trace(tiny_llama()),
    "batches without labels": measured(
        hessian_trace, batches=lambda batch: [{"input_ids": batch["input_ids"]}]
    ),
    "unknown eigenvalues": measured(hessian_eigenvalues, which="top"),
    "more eigenvalues than weights": measured(hessian_eigenvalues, k=10**6, max_products=10**6),
    "basis too small": measured(hessian_eigenvalues, k=3, basis_size=4),
    "noise of no size": measured(noise_stability, sigma=0.0),
    "sigma for no rise": measured(find_sigma, rise=0.0),
    "sigma for a rise that there is not": measured(find_sigma, rise=1e6, num_samples=1),
    "relative eigenvectors": measured(hessian_trace, method="hutch++", sigma_scale="relative"),
    "loss above its bound": measured(
        pac_bayes_bound, reference=tiny_llama(), sigma=0.1, loss_bound=1.0, num_samples=1
    ),
    "start without a parameter": measured(pac_bayes_bound, reference={}, sigma=0.1, loss_bound=9.0),
    "line without its middle": measured(loss_slice, num_points=10),
    "callback of no trainer": lambda folder: CurvatureCallback(tiny_llama()),
    "no such checkpoint": command("{folder}/none"),
    "no such package of a checkpoint": command("package:not_installed"),
    "no package at all": command("package:"),
    "no such package of a tokenizer": command("--tokenizer", "package:not-installed"),
    "one checkpoint twice": command("{folder}/model", "{folder}/model"),
    "no such data": command("--data", "{folder}/none.jsonl"),
    "data of another format": command("--data", "{folder}/rows.txt"),
    "columns of another task": command(rows='{"question": "a"}'),
    "even number of points": command("--slice_points", "20"),
    "a row without text": command(rows='{"text": ""}'),
    "a prompt that leaves no room": command(
        "--max_length", "4", rows='{"prompt": "2 + 2 =", "completion": " 4"}'
    ),
    "a checkpoint that is none": command("{folder}"),
    "weights that were cut off": weights_cut_off,
    "batches in no file of torch's": saved_batches(b"junk"),
    "file without batches": saved_batches([]),
    "saved batches without labels": saved_batches([{"input_ids": torch.ones(2, 4).long()}]),
    "saved batches of another model": saved_batches([{"pixel_values": torch.ones(2, 3, 8, 8)}]),
    "slice of no extent": command("--slice_extent", "0"),
    "seed below 0 for measurements": command("--seed", "-1"),
    "measurements into a file": command("--output", "{folder}/rows.txt"),
    "pattern of no parameter, by flag": command("--params", "lora_A", rows='{"text": "a b c"}'),
}


def accompanied(*callbacks, trainer_class=NSOTrainer, model=tiny_llama, data=None, **options):
    """A trainer with companions, from its making to its end."""

    def run(folder: Path) -> object:
        made = trainer_class(
            model=model(),
            args=config(folder, **options),
            train_dataset=token_data(4) if data is None else data,
            eval_dataset=token_data(4),
            callbacks=[make() for make in callbacks],
        )
        return made.train()

    return run


def schedule_free(folder: Path) -> object:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

    model = tiny_llama()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    trainer = NSOTrainer(
        model=model,
        args=config(folder),
        train_dataset=token_data(4),
        optimizers=(optimizer, None),
        callbacks=[EMACallback()],
    )
    return trainer.train()


def average_before_it_begins(folder: Path) -> object:
    callback = SWACallback(start=0.9)
    accompanied(lambda: callback, max_steps=1)(folder)
    with callback.averaged():
        return None


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from token_data(4)


def normalised() -> nn.Module:
    model = tiny_llama()
    model.norm = nn.BatchNorm1d(2)
    return model


def mixed(loss=None, **options) -> Callable[[Path], object]:
    """Training with mixup on tokens with a label for each."""

    def run(folder: Path) -> object:
        args = MixupConfig(str(folder), use_cpu=True, report_to=[], max_steps=1, **options)
        made = MixupTrainer(
            model=tiny_llama(), args=args, train_dataset=token_data(8), compute_loss_func=loss
        )
        return made.train()

    return run


def mixed_inputs(model: Callable[[], nn.Module], **options) -> Callable[[Path], object]:
    """Training with mixup on one label for each row of tokens."""

    def run(folder: Path) -> object:
        args = MixupConfig(str(folder), use_cpu=True, report_to=[], max_steps=1, **options)
        rows = [{"input_ids": row["input_ids"], "labels": torch.tensor(1)} for row in token_data(8)]
        return MixupTrainer(model=model(), args=args, train_dataset=rows).train()

    return run


class OfTokens(nn.Module):
    """A classifier that does not say what embeds its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 3)

    def forward(self, input_ids: torch.Tensor, labels: object = None) -> dict[str, torch.Tensor]:
        return {"logits": self.embed(input_ids).mean(1)}


def mixup_in_front(folder: Path) -> object:
    return type("Wrong", (MixupMixin, NSOTrainer), {})


def noisy(labels: object = (0, 1, 2), **options) -> Callable[[Path], object]:
    return lambda folder: with_label_noise(labels, **{"rate": 0.2, "num_labels": 3, **options})


COMPANIONS: dict[str, Callable[[Path], object]] = {
    "decay above 1": lambda folder: EMACallback(decay=1.5),
    "decay that keeps everything": lambda folder: EMACallback(decay=1.0),
    "average of nothing": lambda folder: SWACallback(start=1.0),
    "average every half step": lambda folder: EMACallback(every_steps=0.5),
    "name that is no word": lambda folder: EMACallback(name="ema 0.9"),
    "average in a plain trainer": accompanied(EMACallback, trainer_class=Trainer),
    "two averages of one name": accompanied(EMACallback, lambda: EMACallback(0.9)),
    "average and best model": accompanied(
        lambda: EMACallback(apply_at_end=True),
        load_best_model_at_end=True,
        save_strategy="steps",
        eval_strategy="steps",
    ),
    "average that is never evaluated": accompanied(lambda: EMACallback(evaluate=True)),
    "average of a schedule-free optimizer": schedule_free,
    "average before it begins": average_before_it_begins,
    "statistics of a stream": accompanied(EMACallback, model=normalised, data=Stream()),
    "negative strength": lambda folder: DistancePenalty(-0.1),
    "strength as text": lambda folder: DistancePenalty("much"),
    "no radius": lambda folder: DistanceProjection(0),
    "radius by no regular expression": lambda folder: DistanceProjection({"(": 1.0}),
    "strength of no parameter": accompanied(lambda: DistancePenalty({"classifier": 0.1})),
    "mixup of nothing": mixed(mixup_alpha=0.0),
    "mixup in an unknown place": mixed(mixup_place="logits"),
    "mixup in front": mixup_in_front,
    "mixup with another loss": mixed(loss=nn.functional.mse_loss),
    "mixup of tokens' labels": mixed(),
    "mixup of token numbers": mixed_inputs(tiny_llama),
    "mixup of unknown embeddings": mixed_inputs(OfTokens, mixup_place="embeddings"),
    "label noise above 1": noisy(rate=1.2),
    "label noise with one class": noisy(num_labels=1),
    "label noise on -100": noisy(labels=[0, -100, 2]),
}


def without_tokenizer(folder: Path) -> object:
    model = save_model("gpt2", folder / "silent")
    for file in (*model.glob("*token*"), *model.glob("vocab*"), *model.glob("merges*")):
        file.unlink()
    return recipe("--model_name_or_path", str(model))(folder)


RECIPE: dict[str, Callable[[Path], object]] = {
    "unknown flag": recipe("--sigmma", "0.1"),
    "sigma negative, by flag": recipe("--sigma", "-1"),
    "config that does not exist": recipe("--config", "{folder}/none.yaml"),
    "config with an unknown option": recipe(
        "--config", "{folder}/c.yaml", write={"c.yaml": "sgima: 0.1"}
    ),
    "config that is no mapping": recipe("--config", "{folder}/c.yaml", write={"c.yaml": "- sigma"}),
    "config that is no YAML": recipe("--config", "{folder}/c.yaml", write={"c.yaml": "a: [1"}),
    "config with a value of another type": recipe(
        "--config", "{folder}/c.yaml", write={"c.yaml": "max_new_tokens: 2.5"}
    ),
    "config with a word for a number": recipe(
        "--config", "{folder}/c.yaml", write={"c.yaml": "sigma: small"}
    ),
    "config with an option twice": recipe(
        "--config", "{folder}/c.yaml", write={"c.yaml": "sigma: 0.1\nsigma: 0.2"}
    ),
    "no steps": recipe("--max_steps", "0"),
    "best by a measure that there is not": recipe("--metric_for_best_model", "acuracy"),
    "tracker that is not installed": recipe("--report_to", "neptune"),
    "optimizer that is not installed": recipe("--optim", "grokadamw"),
    "half precision on a CPU": recipe("--fp16", "true"),
    "output folder that is a file": recipe("--output_dir", "{folder}/f", write={"f": ""}),
    "no such model": recipe("--model_name_or_path", "{folder}/none"),
    "no such package": recipe("--model_name_or_path", "package:not_installed"),
    "no such file": recipe("--dataset", "{folder}/none.jsonl"),
    "folder without data": recipe("--dataset", "{folder}/x", write={"x/x.txt": ""}),
    "file with a broken quote": recipe(
        "--dataset", "{folder}/q.csv", write={"q.csv": 'question,answer\n"1 + 1,2\n2 + 2,4\n'}
    ),
    "file with a comma too many": recipe(
        "--dataset", "{folder}/q.csv", write={"q.csv": "question,answer\n1, 2 or 3?,2\n"}
    ),
    "file that was cut off": recipe(
        "--dataset", "{folder}/q.jsonl", write={"q.jsonl": '{"question": "1 + 1'}
    ),
    "file without rows": recipe("--dataset", "{folder}/q.csv", write={"q.csv": ""}),
    "answer that is null": recipe(
        "--dataset", "{folder}/q.jsonl", write={"q.jsonl": '{"question": "1?", "answer": null}'}
    ),
    "shards that are missing": recipe(
        "--dataset", "{folder}/copy", write={"copy/data/train-00000-of-00002.jsonl": "{}"}
    ),
    "no such column": recipe("--question_column", "problem"),
    "not the preset's format": recipe("--preset", "gsm8k"),
    "no rationales": recipe(
        "--rationale_column",
        "reason",
        write={
            "data/train.jsonl": "\n".join(
                '{"question": "%d", "answer": "a"}' % i for i in range(20)
            )
        },
    ),
    "too few questions": recipe("--test_size", "30"),
    "no such task": recipe("--dataset", "reasoning_gym:chain_sums"),
    "task options refused by the task": recipe(
        "--dataset", "reasoning_gym:chain_sum", "--dataset_kwargs", '{{"min_terms": -3}}'
    ),
    "task options without a task": recipe("--dataset_kwargs", '{{"min_terms": 3}}'),
    "LoRA rank 0": recipe("--lora_r", "0"),
    "LoRA rank of a half": recipe("--config", "{folder}/c.yaml", write={"c.yaml": "lora_r: 16.5"}),
    "LoRA targets not in a list": recipe(
        "--config", "{folder}/c.yaml", write={"c.yaml": "lora_r: 4\nlora_target_modules: c_attn"}
    ),
    "no such data set": recipe("--dataset", "nobody/nothing"),
    "more tokens than the model has positions": recipe("--max_new_tokens", "250"),
    "LoRA options without LoRA": recipe("--lora_alpha", "16"),
    "Deep LoRA of an unknown form": recipe(
        "--config", "{folder}/c.yaml", write={"c.yaml": "lora_r: 4\ndeep_lora: deeper"}
    ),
    "Deep LoRA without LoRA": recipe("--deep_lora", "plain"),
    "Deep LoRA with a scale, by flag": recipe(
        "--lora_r", "4", "--deep_lora", "plain", "--lora_alpha", "8"
    ),
    "LoRA target that the model lacks": recipe("--lora_r", "4", "--lora_target_modules", "q_proj"),
    "chat format without a template": recipe("--template", "chat"),
    "every text too long": recipe("--max_length", "3"),
    "test of no questions": recipe("--test_size", "0"),
    "output of an earlier run": recipe(write={"out/results.json": "{{}}"}),
    "resume one run over another": recipe(
        "--resume_from_checkpoint", "{folder}/model", write={"out/results.json": "{{}}"}
    ),
    "nothing to resume": recipe("--resume_from_checkpoint", "last"),
    "resume with another rank": resumed("--lora_r", "8"),
    "resume with another learning rate": resumed("--learning_rate", "0.1"),
    "resume on other data": resumed(write={"data/train.jsonl": ROWS.replace("count", "add")}),
    "resume from nowhere": recipe("--resume_from_checkpoint", "{folder}/none"),
    "curvature of no examples": recipe("--curvature_examples", "0"),
    "steps of no curvature": recipe("--curvature_steps", "2"),
    "output folder without a name": recipe("--output_dir", ""),
    "seed below 0": recipe("--seed", "-1"),
    "average of no steps": recipe("--swa_start", "1"),
    "adapters of scale 0": recipe("--lora_r", "2", "--lora_alpha", "0"),
    "size of no further data": recipe("--further_size", "5"),
    "further data without a name of theirs": recipe("--forgetting_data", "prose="),
    "bits named twice": recipe("--accuracy_in_bits", "4", "4"),
    "model whose weights were cut off": lambda folder: recipe(
        "--model_name_or_path", cut_off(folder)
    )(folder),
    "model without a tokenizer": without_tokenizer,
    "answers in one bit": recipe("--accuracy_in_bits", "4", "1"),
    "answers in groups of no weights": recipe(
        "--accuracy_in_bits", "4", "--accuracy_group_size", "0"
    ),
    "answers in groups, but in no few bits": recipe("--accuracy_group_size", "64"),
    "robustness by test texts that are all too long": recipe(
        *("--robustness", "true", "--max_length", "60"),
        write={
            "data/test.jsonl": '{"question": "%s", "rationale": "count", "answer": "2"}'
            % ("1 " * 60)
        },
    ),
    "robustness by test questions without rationales": recipe(
        *("--robustness", "true"),
        write={"data/test.jsonl": '{"question": "1 + 30 =", "answer": "31"}'},
    ),
    "forgetting of a file that is not there": recipe("--forgetting_data", "{folder}/none.txt"),
    "forgetting of two data sets of one name": recipe(
        "--forgetting_data", "a=reasoning_gym:chain_sum", "a=reasoning_gym:leg_counting"
    ),
    "forgetting of one question": recipe(
        "--forgetting_data",
        "{folder}/one.jsonl",
        write={"one.jsonl": '{"question": "1 + 1 =", "answer": "2"}'},
    ),
    "forgetting of a text by an encoder-decoder": recipe(
        "--forgetting_data", "{folder}/one.txt", write={"one.txt": "a b " * 999}, model="t5"
    ),
    "further test questions with options that are no JSON": recipe(
        "--also_test", "reasoning_gym:chain_sum{{min_terms: 5}}"
    ),
    "further data of one text": recipe("--further_size", "1"),
    "plain training beside plain training": recipe("--compare_plain", "true", "--sigma", "0"),
    "pattern that matches nothing, by flag": recipe("--perturb_include", "lora_A"),
}


def clip_recipe(
    *flags: str, write: dict[str, str | bytes] | None = None
) -> Callable[[Path], object]:
    """The CLIP recipe on four shards of tiny images and a tiny model, with other flags."""

    def run(folder: Path) -> object:
        from recipes.clip_pretraining import main
        from tests.tasks.clip.test_pairs import shards

        (folder / "model.json").write_text(json.dumps(SMALL_CLIP))
        urls = shards(folder, [6, 6])
        for name, content in (write or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(data)
        base = ["--model", "{folder}/model.json", "--train_data", urls]
        base += ["--output_dir", "{folder}/out", "--use_cpu", "true", "--report_to", "none"]
        base += ["--max_steps", "1", "--per_device_train_batch_size", "4"]
        return main([*(f.replace("{folder}", str(folder)) for f in [*base, *flags])])

    return run


SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 8,
        "head_width": 8,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 8,
        "heads": 1,
        "layers": 1,
    },
}

CLIP: dict[str, Callable[[Path], object]] = {
    "no such open_clip model": clip_recipe("--model", "ViT-S-61"),
    "no such model file": clip_recipe("--model", "{folder}/none.json"),
    "model file that is no JSON": clip_recipe("--model", "{folder}/m.json", write={"m.json": "{"}),
    "model file without a text model": clip_recipe(
        "--model", "{folder}/m.json", write={"m.json": '{"embed_dim": 8, "vision_cfg": {}}'}
    ),
    "model that cannot be built": clip_recipe(
        "--model",
        "{folder}/m.json",
        write={"m.json": json.dumps({**SMALL_CLIP, "vision_cfg": {"width": "wide"}})},
    ),
    "vocabulary smaller than the tokenizer's": clip_recipe(
        "--model",
        "{folder}/m.json",
        write={
            "m.json": json.dumps(
                {**SMALL_CLIP, "text_cfg": {**SMALL_CLIP["text_cfg"], "vocab_size": 99}}
            )
        },
    ),
    "no such weights": clip_recipe("--pretrained", "laion"),
    "weights of another model": clip_recipe(
        "--model",
        "ViT-S-16",
        "--pretrained",
        "{folder}/w.safetensors",
        write={"w.safetensors": safetensors.torch.save({"logit_scale": torch.ones(())})},
    ),
    "image size no multiple of the patches": clip_recipe("--image_size", "20"),
    "augmentation that open_clip has not": clip_recipe("--augmentation", '{"crop": 0.5}'),
    "augmentation that is no JSON": clip_recipe("--augmentation", "scale=0.5"),
    "patch dropout of 1": clip_recipe("--patch_dropout", "1.0"),
    "unlocked groups of a trained tower": clip_recipe("--lock_image_unlocked_groups", "2"),
    "missing shards": clip_recipe("--train_data", "{folder}/s-{000..009}.tar"),
    "names of shards with an asterisk": clip_recipe("--train_data", "{folder}/*.tar"),
    "batches of no pair": clip_recipe("--per_device_eval_batch_size", "0"),
    "no such CSV file": clip_recipe("--train_data", "{folder}/none.csv"),
    "CSV file without the column": clip_recipe(
        "--train_data", "{folder}/p.csv", write={"p.csv": "image\ttext\na.png\ta\n"}
    ),
    "no such data set on the hub": clip_recipe("--train_data", "nobody/nothing"),
    "no shard can be read": clip_recipe(
        "--train_data", "{folder}/b.tar", "--train_num_pairs", "8", write={"b.tar": b"x" * 2000}
    ),
    "fewer pairs than a batch": clip_recipe("--per_device_train_batch_size", "64"),
    "no captions to evaluate": clip_recipe(
        "--eval_data", "{folder}/u.csv", write={"u.csv": "filepath\ttitle\na.png\t\n"}
    ),
    "number of pairs of no shard": clip_recipe(
        "--train_data",
        "{folder}/u.csv",
        "--train_num_pairs",
        "8",
        write={"u.csv": "filepath\ttitle\na.png\ta\n"},
    ),
    "images of one class": clip_recipe(
        "--zero_shot_data", "{folder}/s-000.tar", "--label_column", "style"
    ),
    "class without a name": clip_recipe(
        "--zero_shot_data",
        "{folder}/s-000.tar",
        "--label_column",
        "kind",
        "--class_names",
        "{folder}/n.json",
        write={"n.json": '{"even": "an even number"}'},
    ),
    "no such templates": clip_recipe("--templates", "imagenet"),
    "template without a place": clip_recipe(
        "--templates", "{folder}/t.txt", write={"t.txt": "a photo of\n"}
    ),
    "probe without classes": clip_recipe("--linear_probe", "true"),
    "probe of single images": clip_recipe(
        "--zero_shot_data", "{folder}/s-000.tar", "--label_column", "txt", "--linear_probe", "true"
    ),
    "class names that are no JSON": clip_recipe(
        "--zero_shot_data",
        "{folder}/s-000.tar",
        "--label_column",
        "kind",
        "--class_names",
        "{folder}/n.json",
        write={"n.json": "{"},
    ),
    "template with two places": clip_recipe(
        "--templates", "{folder}/t.txt", write={"t.txt": "a {} {x}\n"}
    ),
    "templates of none": clip_recipe("--templates", "{folder}/t.txt", write={"t.txt": "\n"}),
    "robustness of no evaluation": clip_recipe("--robustness", "true"),
    "robustness on images that stay unseen": clip_recipe(
        *("--robustness", "true", "--zero_shot_data", "{folder}/s-000.tar", "--test", "false")
    ),
    "evaluation without pairs": clip_recipe("--eval_strategy", "steps"),
    "curvature of more batches than there are": clip_recipe(
        "--curvature", "true", "--curvature_batches", "4"
    ),
    "best by an unknown measure": clip_recipe(
        "--eval_data",
        "{folder}/s-000.tar",
        "--load_best_model_at_end",
        "true",
        "--metric_for_best_model",
        "recall@10",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ),
    "caption loss without a decoder": clip_recipe("--coca_caption_weight", "1.0"),
    "image size 0": clip_recipe("--image_size", "0"),
    "augmentation of another type": clip_recipe("--augmentation", '{"scale": 0.5}'),
    "augmentation that is no mapping": clip_recipe("--augmentation", "[0.5, 1.0]"),
    "model file that is a list": clip_recipe("--model", "{folder}/m.json", write={"m.json": "[]"}),
    "texts without room": clip_recipe(
        "--model",
        "{folder}/m.json",
        write={
            "m.json": json.dumps(
                {**SMALL_CLIP, "text_cfg": {**SMALL_CLIP["text_cfg"], "context_length": 2}}
            )
        },
    ),
    "name that open_clip takes for SigLIP's": clip_recipe(
        "--model", "{folder}/my-siglip.json", write={"my-siglip.json": json.dumps(SMALL_CLIP)}
    ),
    "no batches for curvature": clip_recipe("--curvature_batches", "0"),
    "other images without a name": clip_recipe("--eval_also", "{folder}/s-001.tar"),
    "other images for random weights": clip_recipe("--eval_also", "style={folder}/s-001.tar"),
    "weights between without images": clip_recipe("--wise_ft", "0", "1"),
    "weights beyond those after training": clip_recipe("--wise_ft", "0", "1.5"),
    "folder of another run": clip_recipe(write={"out/results.json": "{}"}),
}

SMALL_MAE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}


def folder_of_images(folder: Path, splits: dict[str, int]) -> None:
    """So many images of each of two classes, in each split."""
    for split, number in splits.items():
        for name, level in {"dark": 0, "light": 255}.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (10, 8 + i), (level,) * 3).save(place / f"{i}.png")


def idx_files(folder: Path, number: int = 30) -> tuple[dict[str, Any], dict[str, Any]]:
    """Images and labels in the files of Debian's dataset-fashion-mnist."""
    folder.mkdir(exist_ok=True)
    arrays, labels = {}, {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        rng = np.random.default_rng(number)
        arrays[split] = rng.integers(0, 256, (number, 28, 28), np.uint8)
        labels[split] = (np.arange(number) % 10).astype(np.uint8)
        for kind, values in {"images-idx3": arrays[split], "labels-idx1": labels[split]}.items():
            header = bytes([0, 0, 8, values.ndim])
            header += b"".join(size.to_bytes(4, "big") for size in values.shape)
            file = gzip.compress(header + values.tobytes())
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(file)
    return arrays, labels


def mae_recipe(
    *flags: str,
    write: Callable[[Path], object] | None = None,
    without: Collection[str] = (),
) -> Callable[[Path], object]:
    """The recipe of masked autoencoders on the digits, with other flags, and `without` some."""

    def run(folder: Path) -> object:
        from recipes.mae_pretraining import main

        if write is not None:
            write(folder)
        base = {"train_data": "digits", "target_data": "digits", "max_steps": 1}
        base |= {"output_dir": "{folder}/out", "use_cpu": "true", "report_to": "none"}
        given = {n: v for n, v in {**base, **SMALL_MAE}.items() if n not in without}
        words = [str(w) for n, v in given.items() for w in (f"--{n}", v)]
        return main([word.replace("{folder}", str(folder)) for word in [*words, *flags]])

    return run


def with_images(splits: dict[str, int]) -> Callable[[Path], object]:
    return lambda folder: folder_of_images(folder / "data", splits)


def cut_short(folder: Path) -> None:
    idx_files(folder / "data")
    path = folder / "data" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])


def model_of_another_kind(folder: Path) -> None:
    save_model("gpt2", folder / "model")


MAE: dict[str, Callable[[Path], object]] = {
    "negative strength": mae_recipe("--rademacher_strength", "-0.1"),
    "no draws of signs": mae_recipe("--rademacher_draws", "0"),
    "radius 0": mae_recipe("--rademacher_radius", "0"),
    "image size no multiple of the patches'": mae_recipe("--image_size", "9"),
    "images too large to pretrain on": mae_recipe("--image_size", "8192"),
    "column of what has none, to pretrain on": mae_recipe("--image_column", "picture"),
    "width that positions and heads do not divide": mae_recipe("--hidden_size", "18"),
    "decoder width that the heads do not divide": mae_recipe("--decoder_num_attention_heads", "3"),
    "two channels": mae_recipe("--num_channels", "2"),
    "no layers": mae_recipe("--num_hidden_layers", "0"),
    "all patches masked": mae_recipe("--mask_ratio", "0.95"),
    "no patch masked": mae_recipe("--mask_ratio", "0"),
    "sizes of a model that has its own": mae_recipe("--model_name_or_path", "{folder}/model"),
    "no such folder of images": mae_recipe("--train_data", "{folder}/none"),
    "no Fashion-MNIST": mae_recipe(
        "--train_data", "fashion_mnist", "--fashion_mnist_folder", "{folder}/none"
    ),
    "Fashion-MNIST cut short": mae_recipe(
        *("--train_data", "fashion_mnist", "--fashion_mnist_folder", "{folder}/data"),
        write=cut_short,
    ),
    "split that the digits have not": mae_recipe("--train_split", "validation"),
    "folder without test images": mae_recipe(
        "--target_data", "{folder}/data", write=with_images({"train": 2})
    ),
    "column that there is not": mae_recipe(
        *("--target_data", "{folder}/data", "--label_column", "kind"),
        write=with_images({"train": 2, "test": 1}),
    ),
    "more labelled images than there are": mae_recipe(
        *("--target_data", "{folder}/data", "--examples_per_class", "3"),
        write=with_images({"train": 2, "test": 1}),
    ),
    "no labelled images": mae_recipe("--examples_per_class", "0"),
    "batch larger than the target": mae_recipe(
        *("--target_data", "{folder}/data", "--rademacher_strength", "0.1"),
        write=with_images({"train": 2, "test": 1}),
    ),
    "evaluation without the task": mae_recipe(without=["target_data"]),
    "regularization without the task": mae_recipe(
        *("--evaluation", "none", "--rademacher_strength", "0.1"), without=["target_data"]
    ),
    "reconstruction loss of nothing": mae_recipe("--eval_strategy", "epoch"),
    "all images held out": mae_recipe("--validation_size", "1437"),
    "model of another type": mae_recipe(
        *("--model_name_or_path", "{folder}/model"),
        write=model_of_another_kind,
        without=SMALL_MAE,
    ),
    "fine-tuning of no passes": mae_recipe("--fine_tune_epochs", "0"),
    "output of an earlier pretraining": mae_recipe(
        write=lambda folder: (
            (folder / "out").mkdir(),
            (folder / "out" / "results.json").write_text("{}"),
        )
    ),
}


def comparison(**lines: str) -> Callable[[Path], object]:
    """`nso compare` on a file with these lines, of a recipe that trains nothing."""

    def run(folder: Path) -> object:
        toy = Path(__file__).parent / "running" / "comparison" / "toy_recipe.py"
        text = {"recipe": str(toy), "seeds": "[0]", "methods": "{plain: {sigma: 0}, nso: {}}"}
        file = folder / "file.yaml"
        file.write_text("\n".join(f"{name}: {line}" for name, line in (text | lines).items()))
        return compare([str(file), "--output_dir", str(folder / "out")])

    return run


def of_no_recipe(folder: Path) -> object:
    (folder / "script_alone.py").write_text("print(1)")
    return comparison(recipe=str(folder / "script_alone.py"))(folder)


_TUNE = "{seeds: [100], options: {learning_rate: [1e-3, 1e-2]}}"
COMPARISON: dict[str, Callable[[Path], object]] = {
    "no file": lambda folder: compare(["none.yaml"]),
    "no runs at a time": lambda folder: compare(["none.yaml", "--jobs", "0"]),
    "unknown key": comparison(method="{}"),
    "unknown recipe": comparison(recipe="imges"),
    "script that is no recipe": of_no_recipe,
    "no methods": comparison(methods="{}"),
    "method without options in a mapping": comparison(methods="{plain: sgd}"),
    "method named twice": comparison(methods="{plain: {}, plain: {}}"),
    "unknown baseline": comparison(baseline="sgd"),
    "seed twice": comparison(seeds="[0, 1, 0]"),
    "number of seeds": comparison(seeds="5"),
    "seed that NumPy does not take": comparison(seeds="[4294967296]"),
    "no figures to compare": comparison(metrics="[]"),
    "list of output folders": comparison(output_dir="[a, b]"),
    "launcher that is not installed": comparison(launcher="no_such_launcher"),
    "time of several methods": comparison(methods="{plain: {time_of: [nso]}, nso: {}}"),
    "seed as an option": comparison(options="{seed: 3}"),
    "option that the recipe has not": comparison(methods="{plain: {sgima: 0}}"),
    "option of a setting that is no number": comparison(settings="{many: {max_steps: many}}"),
    "time of a method that is not there": comparison(methods="{plain: {time_of: sam}, nso: {}}"),
    "time of one with a time": comparison(
        methods="{plain: {time_of: nso}, nso: {time_of: plain}, sam: {}}"
    ),
    "time of another, and steps": comparison(
        methods="{plain: {time_of: nso, max_steps: 9}, nso: {}}"
    ),
    "trials of unequal number": comparison(
        methods="{plain: {}, nso: {tune: {sigma: [1, 2]}}}", tune=_TUNE
    ),
    "option that is fixed and tuned": comparison(methods="{nso: {learning_rate: 1}}", tune=_TUNE),
    "tuned without tune": comparison(methods="{nso: {tune: {sigma: [1, 2]}}}"),
    "tuned without seeds": comparison(tune="{options: {learning_rate: [1, 2]}}"),
    "tuned on test data": comparison(tune="{seeds: [100], metric: test.accuracy}"),
    "figure that is not there": comparison(metrics="[test.f1]"),
}

TEXTS = "text,label\n" + "".join(
    f"the {w} number {i},{w}\n" for i in range(6) for w in ("cat", "sun")
)


def text_recipe(
    *flags: str, write: dict[str, str] | None = None, model: str | None = None
) -> Callable[[Path], object]:
    """The recipe of texts with `{folder}` standing for a folder that holds train.csv, the files of
    `write` and the `model` of a kind."""

    def run(folder: Path) -> object:
        from recipes.text_classification import main as classify

        for name, text in {"data/train.csv": TEXTS, **(write or {})}.items():
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text(text)
        base = {"--dataset": f"{folder}/data", "--output_dir": f"{folder}/out"}
        base |= {"--use_cpu": "true", "--report_to": "none"}
        if model is not None:
            base["--model_name_or_path"] = str(save_model(model, folder / "model"))
        given = [flag.format(folder=folder) for flag in flags]
        rest = (word for name, word in base.items() if name not in given for word in (name, word))
        return classify([*given, *rest])

    return run


def without_padding(folder: Path) -> object:
    save_model("gpt2", folder / "unpadded")
    path = folder / "unpadded" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    special = folder / "unpadded" / "special_tokens_map.json"  # of earlier versions
    special.unlink(missing_ok=True)
    return text_recipe("--model_name_or_path", "{folder}/unpadded")(folder)


TEXT = {
    "texts that do not exist": text_recipe("--dataset", "{folder}/none"),
    "column of texts that there is not": text_recipe("--text_column", "sentence"),
    "column of classes that there is not": text_recipe("--label_column", "stars"),
    "text that is the class": text_recipe("--label_column", "text"),
    "columns of the names of emoji": text_recipe(
        *("--dataset", "emoji_languages", "--text_column", "name")
    ),
    "blank text": text_recipe(write={"data/train.csv": TEXTS + " ,cat\n"}),
    "text without a class": text_recipe(write={"data/train.csv": TEXTS + "the cat,\n"}),
    "texts of one class": text_recipe(write={"data/train.csv": "text,label\na,x\nb,x\n"}),
    "class in the test alone": text_recipe(write={"data/test.csv": "text,label\na,dog\n"}),
    "test split that there is not": text_recipe("--test_split", "validation"),
    "test on the training texts": text_recipe("--test_split", "train"),
    "more texts of a class than there are": text_recipe("--examples_per_class", "6"),
    "no place for a text": text_recipe("--max_length", "2"),
    "more tokens than places": text_recipe("--max_length", "1000"),
    "more tokens than a pretrained model has places for": text_recipe(
        "--max_length", "129", model="bert"
    ),
    "data without a name": text_recipe("--dataset", ""),
    "configuration of a file": text_recipe(
        *("--dataset", "{folder}/data/train.csv", "--dataset_config", "main")
    ),
    "GGUF file of a new model": text_recipe("--gguf_file", "model.gguf"),
    "one number as two classes": text_recipe(write={"data/train.csv": "text,label\na,1\nb,1.0\n"}),
    "row without the class's column": text_recipe(
        *("--dataset", "{folder}/rows.jsonl"),
        write={"rows.jsonl": '{"text": "a", "label": "x"}\n{"text": "b"}'},
    ),
    "class twice in a row": text_recipe(
        *("--dataset", "{folder}/rows.jsonl"),
        write={"rows.jsonl": '{"text": "a", "label": "x", "label": "y"}'},
    ),
    "share of test texts that is none": text_recipe("--test_size", "0.01"),
    "share of validation texts that is none": text_recipe("--validation_size", "0.01"),
    "vocabulary of nothing": text_recipe("--vocabulary_size", "10"),
    "adapters of a new model": text_recipe("--lora_r", "4"),
    "adapters and a linear probe": text_recipe(
        *("--lora_r", "4", "--linear_probe", "true"), model="bert"
    ),
    "adapters of modules that there are not, of a classifier": text_recipe(
        *("--lora_r", "4", "--lora_target_modules", "classifier"), model="bert"
    ),
    "model that is not there": text_recipe("--model_name_or_path", "{folder}/none"),
    "folder without a model": text_recipe("--model_name_or_path", "{folder}/data"),
    "tokenizer without a token to pad with": without_padding,
    "evaluation of no validation texts": text_recipe(
        *("--validation_size", "0", "--eval_strategy", "epoch")
    ),
    "comparison of plain training with itself": text_recipe(
        *("--compare_plain", "true", "--sigma", "0")
    ),
    "output of an earlier classifier": text_recipe(write={"out/results.json": "{}"}),
}


def images_recipe(
    *flags: str, write: Callable[[Path], object] | None = None
) -> Callable[[Path], object]:
    """The recipe of classifiers of images on the digits, with other flags."""

    def run(folder: Path) -> object:
        from recipes.image_classification import main

        if write is not None:
            write(folder)
        base = {"output_dir": "{folder}/out", "use_cpu": "true", "report_to": "none"}
        words = [w for n, v in base.items() for w in (f"--{n}", v)]
        return main([word.replace("{folder}", str(folder)) for word in [*words, *flags]])

    return run


def vit_folder(folder: Path) -> None:
    """A classifier with weights for images of 8 x 8 pixels."""
    from nso_hf.tasks.images.classifier_options import ClassifierOptions

    options = ClassifierOptions()
    pixels = options.pixels("digits")
    options.load(["a", "b"], pixels).save_pretrained(folder / "model")
    pixels.write(folder / "model")


def unreadable_image(folder: Path) -> None:
    folder_of_images(folder / "data", {"train": 3, "test": 1})
    (folder / "data" / "train" / "dark" / "1.png").write_bytes(b"no image")


def saved_images(**labels: list[Any]) -> Callable[[Path], object]:
    """Splits with these labels, as `save_to_disk` writes them."""

    def write(folder: Path) -> None:
        import datasets

        image = Image.new("RGB", (8, 8))
        splits = {
            split: datasets.Dataset.from_dict({"image": [image] * len(found), "label": found})
            for split, found in labels.items()
        }
        datasets.DatasetDict(splits).save_to_disk(str(folder / "data"))

    return write


def without_timm(folder: Path) -> object:
    with mock.patch("nso_hf.tasks.images.classifiers.find_spec", return_value=None):
        return images_recipe(*("--model_name_or_path", "timm/resnet18", "--pretrained", "false"))(
            folder
        )


def without_a_head(folder: Path) -> object:
    from nso_hf.tasks.images.classifiers import train_head_alone

    return train_head_alone(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Linear(4, 4)), 10)


_FOLDER = ("--data", "{folder}/data", "--validation_size", "0")
_HELD_OUT = ("--test_split", "none")


def class_in_the_test_alone(folder: Path) -> None:
    folder_of_images(folder / "data", {"train": 3, "test": 1})
    (folder / "data" / "test" / "dark").rename(folder / "data" / "test" / "darker")


def images_of_one_class(folder: Path) -> None:
    folder_of_images(folder / "data", {"train": 3})
    shutil.rmtree(folder / "data" / "train" / "dark")


IMAGES: dict[str, Callable[[Path], object]] = {
    "class of test images alone": images_recipe(*_FOLDER, write=class_in_the_test_alone),
    "folder of one class": images_recipe(*_FOLDER, *_HELD_OUT, write=images_of_one_class),
    "tested on the training images": images_recipe("--train_split", "test"),
    "images without a name": images_recipe("--data", ""),
    "number of classes as an option of the model": images_recipe(
        *("--model_kwargs", '{"num_labels": 3}')
    ),
    "option of a model that is of another type": images_recipe(
        *("--model_name_or_path", "cnn", "--model_kwargs", '{"depths": 3}')
    ),
    "share of wrong labels above 1": images_recipe("--label_noise", "1.5"),
    "all images held out for validation": images_recipe("--validation_size", "1437"),
    "so many that a class is left without": images_recipe("--validation_size", "1435"),
    "neither a share nor a number": images_recipe("--validation_size", "1.5"),
    "evaluation without validation images": images_recipe(
        "--validation_size", "0", "--eval_strategy", "epoch"
    ),
    "more training images than there are": images_recipe("--train_size", "1500"),
    "more of each class than there are": images_recipe("--examples_per_class", "200"),
    "none of each class": images_recipe("--examples_per_class", "0"),
    "two sizes": images_recipe("--examples_per_class", "2", "--train_size", "9"),
    "test images of no split": images_recipe(*_HELD_OUT, "--test_size", "0"),
    "unknown augmentation": images_recipe(
        "--config",
        "{folder}/config.yaml",
        write=lambda folder: (folder / "config.yaml").write_text("augmentation: [rotate]"),
    ),
    "none beside an augmentation": images_recipe("--augmentation", "none", "flip"),
    "mixtures of nothing": images_recipe("--mixup", "true", "--mixup_alpha", "0"),
    "option of mixtures without them": images_recipe("--mixup_alpha", "0.4"),
    "column of what has none": images_recipe("--data", "digits", "--label_column", "kind"),
    "folder of Fashion-MNIST for digits": images_recipe("--fashion_mnist_folder", "{folder}"),
    "images too large for any memory": images_recipe("--image_size", "100000"),
    "no such folder of images": images_recipe("--data", "{folder}/none"),
    "split that there is not": images_recipe(*_FOLDER, write=with_images({"train": 3})),
    "column of classes that there is not": images_recipe(
        *_FOLDER, "--label_column", "kind", write=with_images({"train": 3, "test": 1})
    ),
    "several classes for an image": images_recipe(
        *_FOLDER, *_HELD_OUT, write=saved_images(train=[["a"], ["a", "b"]])
    ),
    "unreadable image": images_recipe(*_FOLDER, write=unreadable_image),
    "class in the test alone": images_recipe(
        *_FOLDER, write=saved_images(train=["a", "b"], test=["a", "c"])
    ),
    "images of one class": images_recipe(
        *_FOLDER, write=saved_images(train=["a", "a"], test=["a"])
    ),
    "model that classifies no images": images_recipe(
        "--model_name_or_path", "{folder}/model", write=model_of_another_kind
    ),
    "no such model of timm": images_recipe(
        "--model_name_or_path", "timm/resnet17", "--pretrained", "false"
    ),
    "timm not installed": without_timm,
    "size that the weights are not for": images_recipe(
        *("--model_name_or_path", "{folder}/model", "--image_size", "16"), write=vit_folder
    ),
    "size that 4 patches do not divide": images_recipe("--image_size", "10"),
    "size that timm's model does not take": images_recipe(
        *("--model_name_or_path", "timm/vit_tiny_patch16_224", "--pretrained", "false"),
        *("--image_size", "64"),
    ),
    "options of the model that are no JSON": images_recipe("--model_kwargs", "width: 3"),
    "option that the model has not": images_recipe("--model_kwargs", '{"width": 3}'),
    "linear probe without a last layer": without_a_head,
    "plain training beside itself": images_recipe("--compare_plain", "true", "--sigma", "0"),
    "output of an earlier training": images_recipe(
        write=lambda folder: (
            (folder / "out").mkdir(),
            (folder / "out" / "results.json").write_text("{}"),
        )
    ),
    "no examples for robustness": images_recipe("--robustness_examples", "0"),
}


def robustness_command(*flags: str, kinds: Collection[str] = ("gpt2",)) -> Callable[[Path], object]:
    """`nso robustness` on models of these kinds, with `{folder}` standing for where they are."""

    def run(folder: Path) -> object:
        from nso_hf.robustness.__main__ import main as measure

        for kind in kinds:
            save_model(kind, folder / kind)
        (folder / "data.jsonl").write_text('{"text": "a text of some length"}\n' * 8)
        words = [str(folder / kind) for kind in kinds]
        words += ["--data", "{folder}/data.jsonl", "--output", "{folder}/out", *flags]
        return measure([word.replace("{folder}", str(folder)) for word in words])

    return run


def robustness_of_clip(
    *flags: str, write: dict[str, str] | None = None, weights: bool = True
) -> Callable[[Path], object]:
    """The same on a folder of a model of open_clip, with shards of labelled pairs."""

    def run(folder: Path) -> object:
        from nso_hf.robustness.__main__ import main as measure
        from nso_hf.tasks.clip.models import load_clip
        from tests.tasks.clip.test_pairs import shards

        (folder / "small.json").write_text(json.dumps(SMALL_CLIP))
        clip = load_clip(str(folder / "small.json"))
        (folder / "clip").mkdir()
        clip.write_config(folder / "clip")
        if weights:
            state = clip.model.state_dict()
            safetensors.torch.save_file(state, folder / "clip" / "model.safetensors")
        for name, text in (write or {}).items():
            (folder / name).write_text(text)
        given = [flag.replace("{folder}", str(folder)) for flag in flags]
        base = {"--data": shards(folder, [6]), "--output": f"{folder}/out"}
        rest = [word for name, it in base.items() if name not in given for word in (name, it)]
        return measure([f"{folder}/clip", *given, *rest])

    return run


def robustness_of_shards(folder: Path) -> object:
    from nso_hf.robustness.options import RobustnessOptions

    sharded = select(accelerator(DistributedType.FSDP), nn.Linear(2, 2))
    return RobustnessOptions(robustness=True).check(sharded)


ROBUSTNESS: dict[str, Callable[[Path], object]] = {
    "one bit": robustness_command("--bits", "1"),
    "groups of no weights": robustness_command("--group_sizes", "0"),
    "noise of deviation 0": robustness_command("--noise", "0"),
    "negative relative noise": robustness_command("--relative_noise", "-0.1"),
    "all weights pruned": robustness_command("--sparsity", "1"),
    "no draws of noise": robustness_command("--num_samples", "0"),
    "no batches": robustness_command("--num_batches", "0"),
    "bits twice": robustness_command("--bits", "4", "3", "4"),
    "bits without a scale": robustness_command("--bits", "4", "--group_sizes"),
    "scale twice": robustness_command("--base", "gpt2", "--scales", "0.5", "0.5"),
    "scales without a base": robustness_command("--scales", "0.5"),
    "no scale of changes": robustness_command("--scales", "0"),
    "second checkpoint that there is not": robustness_command("--base", "someone/no-such-model"),
    "average of one checkpoint": robustness_command("--merge"),
    "average of models of two kinds": robustness_command("--merge", kinds=("gpt2", "llama")),
    "base that does not exist": robustness_command("--base", "./none"),
    "data that does not exist": robustness_command("--data", "./none.jsonl"),
    "what survives, of weights in shards": robustness_of_shards,
    "classes of images for a language model": robustness_command("--label_column", "kind"),
    "prompts without classes": robustness_of_clip("--templates", "simple"),
    "prompts that there are not": robustness_of_clip(
        "--label_column", "kind", "--templates", "imagenet"
    ),
    "tokenizer for a model of open_clip": robustness_of_clip("--tokenizer", "gpt2"),
    "model of open_clip without weights": robustness_of_clip(weights=False),
    "model of open_clip whose configuration is cut off": robustness_of_clip(
        write={"clip/open_clip_config.json": "{"}
    ),
    "saved batches for a model of open_clip": robustness_of_clip(
        "--data", "{folder}/b.pt", write={"b.pt": ""}
    ),
    "batches of one pair": robustness_of_clip("--batch_size", "1"),
    "column of classes that shards have not": robustness_of_clip("--label_column", "cls"),
}

SECTIONS = {
    "Library": LIBRARY,
    "Companions": COMPANIONS,
    "Curvature": CURVATURE,
    "Chain-of-thought recipe": RECIPE,
    "CLIP recipe": CLIP,
    "Recipe of masked autoencoders": MAE,
    "Recipe of image classifiers": IMAGES,
    "Recipe of text classification": TEXT,
    "What survives": ROBUSTNESS,
    "Comparison": COMPARISON,
}


def message(case: Callable[[Path], object]) -> str:
    """The message of the refusal, without the path of the temporary folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            case(Path(folder))
        except Refusal as error:
            text = str(error).replace(folder, "FOLDER")
            return re.sub(r"\s*\n\s*", " ", text)
    raise AssertionError("it was not refused")


def table() -> str:
    lines = [
        "# Wrong inputs and their messages",
        "",
        "Made by `python -m tests.refusals > docs/refusals.md`; a test compares. Everything here "
        "is refused when the",
        "options, the trainer or the recipe are built: before anything is trained or overwritten.",
    ]
    for title, cases in SECTIONS.items():
        lines += ["", f"## {title}", "", "| wrong input | message |", "|---|---|"]
        for name, case in cases.items():
            lines.append(f"| {name} | `{message(case).replace('|', '¦')}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from tests import refusals  # whose classes are named as in the tests

    print(refusals.table(), end="")
