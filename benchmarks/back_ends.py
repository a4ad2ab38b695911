"""What an optimizer step sends and holds on each back end, against plain training.

    python -m benchmarks.back_ends [--processes 2] [--hidden 384] [--layers 8]

Each back end is started once, on CPUs. Bytes sent are those of gradients and weights (the larger
side of each collective), in copies of the whole model. Memory is the peak of what a process
allocates during a step beyond what it held before, in copies of the weights it holds itself: less
that of plain training, and less that of the same passes at unperturbed weights, where gradients
are held during the forward pass as in accumulation. A step after the first is measured.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.allocations import CountAllocations
from benchmarks.collectives import CountCollectives
from nso_hf import NSOConfig, NSOTrainer
from nso_hf.backends import select
from nso_hf.running.program import leave_process_group
from nso_hf.step.perturbation import Perturbation
from tests.distributed.back_ends import BACK_ENDS, allow_fsdp_on_cpu
from tests.distributed.launch import torchrun

GATHERS = ("allgather_base", "allgather_into_tensor", "broadcast")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "same passes": {},
    "nso": {},
    "plain, accumulation 2": {"gradient_accumulation_steps": 2},
    "nso, accumulation 2": {"gradient_accumulation_steps": 2},
}


class Measure(TrainerCallback):
    """Allocations of the second step, collectives of the third."""

    def __init__(self) -> None:
        self.allocations, self.collectives = CountAllocations(), CountCollectives()
        self.of_step = {1: self.allocations, 2: self.collectives}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.of_step:
            self.of_step[state.global_step].__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step - 1 in self.of_step:
            self.of_step[state.global_step - 1].__exit__(None, None, None)


def measure(back_end: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=6,
        max_position_embeddings=64,
    )
    tokens = torch.randint(2048, (64, 32))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    counts = Measure()
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_steps=3,
            disable_tqdm=True,
            per_device_train_batch_size=2,
            logging_steps=10_000,
            **BACK_ENDS[back_end],
            **WAYS[way],
        )
        model = LlamaForCausalLM(config)
        size = sum(4 * p.numel() for p in model.parameters())
        trainer_class = transformers.Trainer if way.startswith("plain") else NSOTrainer
        trainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=[counts])
        with mock.patch.object(Perturbation, "move_to") if way == "same passes" else nullcontext():
            trainer.train()
        weights = select(trainer.accelerator, trainer.model_wrapped).weights()
    sent = {name: counts.collectives.bytes[name] for name in counts.collectives.bytes}
    return {
        "model": size,
        "local": sum(w.data.nbytes for w in weights),
        "peak": counts.allocations.peak,
        "gathered": sum(n for name, n in sent.items() if name in GATHERS) / size,
        "reduced": sum(n for name, n in sent.items() if name not in GATHERS) / size,
        "calls": sum(counts.collectives.calls.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--back_end", choices=BACK_ENDS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.back_end:
        allow_fsdp_on_cpu()
        results = {way: measure(options.back_end, way, options) for way in WAYS}
        if torch.distributed.get_rank() == 0:
            options.output.write_text(json.dumps(results))
        leave_process_group()
        return
    everything = {}
    print(
        "| back end | gathered: plain | nso | reduced: plain | nso | reduced, accumulation 2 "
        "| memory over plain | over the same passes |\n|---|---|---|---|---|---|---|---|"
    )
    for back_end in BACK_ENDS:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "results.json"
            own = ["--back_end", back_end, "--output", str(output)]
            torchrun(["-m", "benchmarks.back_ends", *sys.argv[1:], *own], options.processes)
            results = everything[back_end] = json.loads(output.read_text())
        plain, nso = results["plain"], results["nso"]
        extra = [
            (nso["peak"] - results[way]["peak"]) / nso["local"] for way in ("plain", "same passes")
        ]
        print(
            f"| {back_end} | {plain['gathered']:.1f} | {nso['gathered']:.1f} | "
            f"{plain['reduced']:.1f} | {nso['reduced']:.1f} | "
            f"{results['nso, accumulation 2']['reduced']:.1f} | "
            f"{extra[0]:.2f} | {extra[1]:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
