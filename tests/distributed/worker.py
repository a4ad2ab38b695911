"""Runs cases in each of several processes, and saves what came out."""

import contextlib
import json
from types import SimpleNamespace

import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from benchmarks.collectives import CountCollectives
from nso_hf import NSOTrainer
from nso_hf.backends import select
from nso_hf.companions import DistancePenalty, DistanceProjection, EMACallback, SWACallback
from nso_hf.curvature import (
    CurvatureCallback,
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
    noise_stability,
    pac_bayes_bound,
    training_batches,
)
from nso_hf.step.noise import Noise
from nso_hf.step.rows import RowNoise, row_rms
from tests.deep_loras import deep
from tests.distributed.back_ends import (
    BACK_ENDS,
    allow_fsdp_on_cpu,
    gathered,
    is_partitioned,
    lora,
    masters,
)
from tests.older import IS_VERSION_4
from tests.reference import config, normalised_llama, tiny_llama, token_data


class Counting:
    """Counts what each micro-batch communicates, and remembers what it was computed in."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counted = []
        self.seen = SimpleNamespace(computed_in=None)  # an object: a pass leaves no attribute
        self.perturbed = None  # weights

    def training_step(self, *args, **kwargs):
        with CountCollectives() as count:
            result = super().training_step(*args, **kwargs)
        self.perturbed = len(getattr(self, "_nso_weights", []))
        self.counted.append((self.state.global_step, dict(count.calls), dict(count.bytes)))
        return result

    def remember_dtype(self, module, inputs, output):
        self.seen.computed_in = str(output.dtype).removeprefix("torch.")


class CountingTrainer(Counting, NSOTrainer):
    pass


class PlainTrainer(Counting, transformers.Trainer):
    pass


MODEL_OPTIONS = ["lora", "deep", "plain", "dropout", "loaded", "parallel", "counts", "normalised"]


def make_trainer(case, directory, **kwargs):
    """A trainer for `case`: the name of a back end, options of training, and a few of the test's
    own."""
    case = dict(case)
    back_end = BACK_ENDS[case.pop("back_end", "ddp")]
    for key, value in case.pop("settings", {}).items():  # of the back end
        back_end = {
            key: {**back_end[key], **value},
            **{k: back_end[k] for k in set(back_end) - {key}},
        }
    own = {name: case.pop(name, None) for name in MODEL_OPTIONS}
    defaults = {
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "learning_rate": 1.0,
        "per_device_eval_batch_size": 4,
    }
    if own["parallel"]:
        defaults["parallelism_config"] = ParallelismConfig(**own["parallel"])
    args = config(directory, **{**defaults, **back_end, **case})
    if own["loaded"]:
        path, sizes = own["loaded"]
        sharding = DistributedConfig(**sizes)
        model = LlamaForCausalLM.from_pretrained(path, distributed_config=sharding)
    else:
        model = tiny_llama(dropout=own["dropout"] or 0.0)
    projection = model.model.layers[0].mlp.down_proj
    model = lora(model) if own["lora"] else model
    model = deep(own["deep"], model) if own["deep"] else model
    model = normalised_llama(model) if own["normalised"] else model
    if IS_VERSION_4:  # what users had to write, where activations are checkpointed
        model.config.use_cache = False
        if own["lora"] or own["deep"]:
            model.enable_input_require_grads()
    trainer = (PlainTrainer if own["plain"] else CountingTrainer)(
        model=model,
        args=args,
        train_dataset=token_data(48),
        eval_dataset=token_data(8, seed=2),
        **kwargs,
    )
    projection.register_forward_hook(trainer.remember_dtype)
    if own["counts"]:
        model.register_buffer("counter", torch.zeros(()))
        model.register_forward_hook(count_passes)
    return trainer


def count_passes(model, *args):
    """In a buffer, which differs between processes."""
    if model.training:
        model.counter += 1 + torch.distributed.get_rank()


def facts(trainer):
    """What tells which back end, and which precision, the run got."""
    select(trainer.accelerator, trainer.model_wrapped).discard_gathered()
    state = trainer.accelerator.state
    stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin is not None else None
    wrapped = trainer.model_wrapped
    parameters = list(trainer.accelerator.unwrap_model(wrapped).parameters())
    return {
        "world_size": torch.distributed.get_world_size(),
        "processes": trainer.accelerator.num_processes,
        "wrapped": type(wrapped).__name__,
        "backend": type(trainer.nso_backend).__name__,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "stage": stage,
        "engine_stage": wrapped.zero_optimization_stage() if stage is not None else None,
        "dtensors": sum(isinstance(p, DTensor) for p in parameters),
        "partitioned": sum(map(is_partitioned, parameters)),
        "parameters": len(parameters),
        "fsdp_modules": sum(isinstance(m, FSDPModule) for m in wrapped.modules()),
        "optimizer": type(getattr(wrapped, "optimizer", None)).__name__,
        "perturbed": trainer.perturbed,
        "copies": trainer.nso_backend.num_copies,
        "offloads": _offloads(trainer, stage),
        "computed_in": trainer.seen.computed_in,
    }


def _offloads(trainer, stage):
    if stage is not None:
        engine = trainer.model_wrapped
        return engine.zero_cpu_offload() and (stage < 3 or engine.zero_offload_param() is not None)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def train(case, directory):
    """Weights, logs, and what was communicated."""
    resume = case.pop("resume", None)
    trainer = make_trainer(case, directory)
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        hook.remove()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    what_ran = {} if case.get("plain") else facts(trainer)
    history = trainer.state.log_history
    log = [entry for entry in history if "loss" in entry]
    return {
        "weights": masters(model, getattr(trainer.model_wrapped, "optimizer", None)),
        "losses": [entry["loss"] for entry in log],
        "eval_losses": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "norms": [entry.get("nso/perturbation_norm") for entry in log],
        "traces": [entry.get("nso/trace_estimate") for entry in log],
        "sigmas": [entry.get("nso/sigma") for entry in log],
        "rises": [entry.get("nso/rise") for entry in log],
        "rates": rates,
        "counter": getattr(model, "counter", torch.zeros(())).item(),
        "counted": trainer.counted,
        **what_ran,
    }


class Snapshot(TrainerCallback):
    """The local weights as the first step finds them."""

    def on_step_begin(self, *args, **kwargs):
        if not hasattr(self, "before"):
            self.before = self.now()

    def now(self):
        trainer = self.trainer
        return {
            w.name: w.data.clone()
            for w in select(trainer.accelerator, trainer.model_wrapped).weights()
        }


class Failure(Exception):
    pass


def restore(case, directory):
    """Whether the local weights are bit for bit as before after training at learning rate 0, which
    an exception ends in evaluation `fail_in` of a step, at the place `fail_at`."""
    place, number = case.pop("fail_at", None), case.pop("fail_in", None)
    snapshot = Snapshot()
    trainer = make_trainer({**case, "learning_rate": 0.0}, directory, callbacks=[snapshot])
    snapshot.trainer = trainer
    evaluations = 0

    def fail(*args):
        if evaluations == number:
            raise Failure

    compute_loss = trainer.compute_loss

    def counted_loss(*args, **kwargs):
        nonlocal evaluations
        evaluations += 1
        result = compute_loss(*args, **kwargs)
        if place == "loss":
            fail()
        return result

    trainer.compute_loss = counted_loss
    layer = trainer.model.model.layers[1]
    if place == "forward":
        layer.mlp.register_forward_hook(fail)
    if place == "backward":
        layer.mlp.register_full_backward_hook(fail)
    failed = False
    try:
        trainer.train()
    except Failure:
        failed = True
    after, evaluations_of_training = snapshot.now(), evaluations
    return {
        "failed": failed,
        "evaluations": evaluations_of_training,
        "eval_loss": trainer.evaluate()["eval_loss"],
        "differ": [n for n, w in snapshot.before.items() if not torch.equal(w, after[n])],
        "elements": sum(w.numel() for w in after.values()),
        "left": [
            "backward" in vars(trainer.accelerator),
            "step" in vars(trainer.model_wrapped),
        ],
        **facts(trainer),
    }


def retrain(case, directory):
    """The weights of a training that comes after one which an exception ended, and after what
    `first` says: "evaluate", or nothing."""
    first = case.pop("first", None)
    trainer = make_trainer(case, directory)
    compute_loss, evaluations = trainer.compute_loss, 0

    def failing_loss(*args, **kwargs):
        nonlocal evaluations
        evaluations += 1
        result = compute_loss(*args, **kwargs)
        if evaluations == FAIL_IN:
            raise Failure
        return result

    refused = None
    try:
        if first == "evaluate":
            trainer.evaluate()
        else:
            trainer.compute_loss = failing_loss
            with contextlib.suppress(Failure):
                trainer.train()
            trainer.compute_loss = compute_loss
        trainer.train()
    except ValueError as error:
        refused = str(error)
    select(trainer.accelerator, trainer.model_wrapped).discard_gathered()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    weights = masters(model, None) if refused is None else []
    return {"refused": refused, "weights": weights, **facts(trainer)}


FAIL_IN = 8  # in the second micro-batch, whose gradients and those of the first are held


def noise(case, directory):
    """U of one draw as the back end adds it to weights of zero, whole; and one in the units of the
    rows of W."""
    trainer = make_trainer({**case, "max_steps": 1, "learning_rate": 0.0}, directory)
    trainer.train()
    backend = select(trainer.accelerator, trainer.model_wrapped)
    weights = backend.weights()
    at = {"seed": 3, "step": 5, "draw": 1, "std": 0.1}
    found = {}
    for name, U in {
        "relative": RowNoise(**at, rows=row_rms(weights, backend)),
        "noise": Noise(**at),
    }.items():
        for weight in weights:
            weight.data.zero_()
        backend.discard_gathered()
        U.add_to(weights)
        found[name] = []
        for weight in weights:
            with gathered(weight.parameter) as data:
                found[name].append(data.clone())
    return {**found, "local": [w.data.numel() for w in weights], **facts(trainer)}


def curvature(case, directory):
    """Measurements at the end of a training, and the local weights before and after them."""
    options = case.pop("options")
    trainer = make_trainer({"max_steps": 1, "learning_rate": 0.0, **case}, directory)
    trainer.train()
    snapshot = Snapshot()
    snapshot.trainer = trainer
    start = {name: 0.9 * p for name, p in tiny_llama().named_parameters()}
    before, state = snapshot.now(), torch.get_rng_state()
    batches = training_batches(trainer, 3)
    trace = hessian_trace(trainer, batches, num_samples=4, **options)
    top = hessian_eigenvalues(trainer, batches, k=2, **options)
    bottom = hessian_eigenvalues(trainer, batches, which="smallest", **options)
    spectrum = hessian_spectrum(trainer, batches, num_samples=1, num_steps=5, **options)
    bound = pac_bayes_bound(
        trainer,
        batches,
        reference=start,
        sigma=0.05,
        loss_bound=10.0,
        num_samples=2,
        **options,
    )
    stability = noise_stability(trainer, batches, sigma=0.02, num_samples=3)
    after = snapshot.now()
    return {
        "trace": trace.samples,
        "values": [*top.values, *bottom.values],
        "nodes": spectrum.nodes,
        "stability": stability.samples,
        "bound": {"trace_max": bound.trace_max, "distance": bound.distance, "bound": bound.bound},
        "hvp": trace.hvp,
        "notes": trace.notes,
        "differ": [n for n, w in before.items() if not torch.equal(w, after[n])],
        "random_state_kept": torch.equal(state, torch.get_rng_state()),
        "gradients": [n for n, p in trainer.model.named_parameters() if p.grad is not None],
        **facts(trainer),
    }


def watch(case, directory):
    """The weights after a training with the curvature measured during it, and without."""
    results = {}
    for name in ("with", "without"):
        trainer = make_trainer(dict(case), f"{directory}/{name}")
        if name == "with":
            options = {"every_steps": 2, "num_samples": 2, "num_batches": 2}
            trainer.add_callback(CurvatureCallback(trainer, **options))
        trainer.train()
        history = trainer.state.log_history
        results |= {
            f"weights {name}": masters(
                trainer.accelerator.unwrap_model(trainer.model_wrapped),
                getattr(trainer.model_wrapped, "optimizer", None),
            ),
            f"losses {name}": [entry["loss"] for entry in history if "loss" in entry],
            f"curvature {name}": [e for e in history if "curvature/trace" in e],
        }
    return {**results, **facts(trainer)}


COMPANIONS = {
    "ema": EMACallback,
    "swa": SWACallback,
    "penalty": DistancePenalty,
    "projection": DistanceProjection,
}


def companions(case, directory):
    """Weights and averages after a training with companions, or what refuses them."""
    resume, kinds = case.pop("resume", None), case.pop("companions")
    callbacks = [COMPANIONS[kind](**options) for kind, options in kinds.items()]
    try:
        trainer = make_trainer(case, directory, callbacks=callbacks)
    except ValueError as error:
        return {"refused": str(error)}
    trainer.train(resume_from_checkpoint=resume)
    wrapped, history = trainer.model_wrapped, trainer.state.log_history
    model = trainer.accelerator.unwrap_model(wrapped)
    snapshot = Snapshot()
    snapshot.trainer = trainer
    before, averages, losses, saved = snapshot.now(), {}, {}, {}
    buffers, statistics = dict(model.named_buffers()), {}
    for callback in callbacks:
        if hasattr(callback, "averaged"):
            with callback.averaged():
                averages[callback.name] = [_whole(p) for p in model.parameters()]
                statistics[callback.name] = {name: b.clone() for name, b in buffers.items()}
                losses[callback.name] = trainer.evaluate()["eval_loss"]
                trainer.save_model(f"{directory}/{callback.name}")
            if trainer.is_world_process_zero():
                file = load_file(f"{directory}/{callback.name}/model.safetensors")
                names = [name for name, _ in model.named_parameters()]
                saved[callback.name] = [file[name] for name in names]
    after = snapshot.now()
    return {
        "weights": masters(model, getattr(wrapped, "optimizer", None)),
        "averages": averages,
        "losses": losses,
        "statistics": statistics,
        "saved": saved,
        "logged": [e["eval_ema_loss"] for e in history if "eval_ema_loss" in e],
        "differ": [n for n, w in before.items() if not torch.equal(w, after[n])],
        **facts(trainer),
    }


def _whole(parameter):
    with gathered(parameter) as data:
        return data.clone()


def clip(case, directory):
    """A model of open_clip trained on the global batch, then evaluated and measured."""
    from nso_hf.tasks.clip.pairs import Fields
    from nso_hf.tasks.clip.table import Table
    from nso_hf.tasks.clip.trainer import CLIPTrainer
    from tests.tasks.clip.reference import clip_config, image_rows, pair_data, tiny_clip

    kind, dtype = case.pop("kind", "clip"), getattr(torch, case.pop("dtype", "float32"))
    resume = case.pop("resume", None)
    back_end = dict(BACK_ENDS[case.pop("back_end")])
    if "fsdp_config" in back_end:
        layers = {"transformer_layer_cls_to_wrap": None}  # those that the model names
        back_end["fsdp_config"] = {**back_end["fsdp_config"], **layers}
    built = tiny_clip(kind, **case.pop("model", {}))
    built.model.to(dtype)
    data = [{**row, "image": row["image"].to(dtype)} for row in pair_data(48)]
    rows = Table("rows", image_rows(11), Fields("image", "caption", "label"), None)
    args = clip_config(directory, **back_end, **case)
    try:
        trainer = CLIPTrainer(built, args, train_dataset=data, eval_dataset=rows)
    except ValueError as error:
        return {"refused": str(error)}
    trainer.perturbed, trainer.seen = None, SimpleNamespace(computed_in=None)
    trainer.train(resume_from_checkpoint=resume)
    wrapped = trainer.model_wrapped
    model = trainer.accelerator.unwrap_model(wrapped)
    batches = [trainer.data_collator(data[i : i + 8]) for i in (0, 8, 16)]
    trace = hessian_trace(trainer, batches, num_samples=2)
    log = trainer.state.log_history
    result = {
        "weights": masters(model, getattr(wrapped, "optimizer", None)),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [entry.get("nso/perturbation_norm") for entry in log if "loss" in entry],
        "trace": trace.samples,
        **facts(trainer),
    }
    if dtype == torch.float32:
        result["evaluation"] = trainer.evaluate()
    trainer.save_model(f"{directory}/saved")
    if trainer.is_world_process_zero():
        saved = load_file(f"{directory}/saved/model.safetensors")
        result["saved"] = [saved[name] for name, _ in built.model.named_parameters()]
    return result


def refused(case, directory):
    """What a trainer says that is refused when it is built, or before its first step."""
    try:
        make_trainer(case, directory).train()
    except ValueError as error:
        return {"refused": str(error)}
    return {"refused": None}


EXPERIMENTS = {
    "train": train,
    "refused": refused,
    "clip": clip,
    "companions": companions,
    "restore": restore,
    "noise": noise,
    "retrain": retrain,
    "curvature": curvature,
    "watch": watch,
}


def run_cases(directory):
    """Those of `cases.json`, in the process that this one is."""
    allow_fsdp_on_cpu()
    results = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        experiment = EXPERIMENTS[case.pop("experiment", "train")]
        results[name] = experiment(case, case.pop("output_dir", None) or f"{directory}/run")
    torch.save(results, directory / f"rank{torch.distributed.get_rank()}.pt")
