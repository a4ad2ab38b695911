"""Runs training cases in each of several processes and saves what came out: `torchrun ... worker.py
CASES OUTPUT`."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import PartialState
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from benchmarks.collectives import CountCollectives
from nso_hf import NSOTrainer
from tests.distributed.back_ends import BACK_ENDS, allow_fsdp_on_cpu, is_partitioned, lora, masters
from tests.reference import config, tiny_llama, token_data


class Trainer(NSOTrainer):
    """Counts what the first optimizer step communicates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counted = []
        self.computed_in = None

    def _remember_dtype(self, module, inputs, output):
        self.computed_in = str(output.dtype).removeprefix("torch.")

    def training_step(self, *args, **kwargs):
        with CountCollectives() as count:
            result = super().training_step(*args, **kwargs)
        self.counted.append((self.state.global_step, dict(count.calls), dict(count.bytes)))
        return result


def make_trainer(case, directory, **kwargs):
    """A trainer for `case`: the name of a back end, options of training, and a few of the test's
    own."""
    case = dict(case)
    options = BACK_ENDS[case.pop("back_end", "ddp")] | case.pop("back_end_options", {})
    use_sgd, use_lora = case.pop("sgd", True), case.pop("lora", False)
    model = tiny_llama(dropout=case.pop("dropout", 0.0))
    projection = model.model.layers[0].mlp.down_proj
    model = lora(model) if use_lora else model
    args = config(
        directory,
        **{
            "lr_scheduler_type": "constant",
            "optim": "sgd" if use_sgd else "adamw_torch",
            "learning_rate": 1.0 if use_sgd else 1e-2,
            **options,
            **case,
        },
    )
    trainer = Trainer(model=model, args=args, train_dataset=token_data(48), **kwargs)
    projection.register_forward_hook(trainer._remember_dtype)
    return trainer


def facts(trainer):
    """What tells which back end, and which precision, the run got."""
    state = trainer.accelerator.state
    stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin is not None else None
    wrapped = trainer.model_wrapped
    parameters = list(trainer.accelerator.unwrap_model(wrapped).parameters())
    engine_stage = wrapped.zero_optimization_stage() if stage is not None else None
    return {
        "world_size": torch.distributed.get_world_size(),
        "processes": trainer.accelerator.num_processes,
        "wrapped": type(wrapped).__name__,
        "backend": type(trainer.nso_backend).__name__,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "stage": stage,
        "engine_stage": engine_stage,
        "dtensors": sum(isinstance(p, DTensor) for p in parameters),
        "partitioned": sum(map(is_partitioned, parameters)),
        "parameters": len(parameters),
        "fsdp_modules": sum(isinstance(m, FSDPModule) for m in wrapped.modules()),
        "offloads": _offloads(trainer, stage),
        "computed_in": trainer.computed_in,
    }


def _offloads(trainer, stage):
    if stage is not None:
        engine = trainer.model_wrapped
        parameters = engine.zero_offload_param()
        return engine.zero_cpu_offload() and (stage < 3 or parameters is not None)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def run(case, directory):
    resume = case.pop("resume", None)
    trainer = make_trainer(case, directory)
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "weights": masters(model, getattr(trainer.model_wrapped, "optimizer", None)),
        "losses": [entry["loss"] for entry in log],
        "norms": [entry.get("nso/perturbation_norm") for entry in log],
        "traces": [entry.get("nso/trace_estimate") for entry in log],
        "grad_norms": [entry.get("grad_norm") for entry in log],
        "counted": trainer.counted,
        **facts(trainer),
    }


if __name__ == "__main__":
    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    allow_fsdp_on_cpu()
    results = {}
    for name, case in cases.items():
        results[name] = run(case, case.pop("output_dir", None) or tempfile.mkdtemp())
    torch.save(results, output / f"rank{torch.distributed.get_rank()}.pt")
    PartialState().destroy_process_group()
