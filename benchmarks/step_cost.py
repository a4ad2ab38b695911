"""Time and memory of an optimizer step, each way of training in a process of its own, as ratios to
plain training.

    python benchmarks/step_cost.py [--steps 20] [--hidden 384] [--layers 6]
    python benchmarks/step_cost.py --against ../nso_hf-before

With `--against`, two-sided NSO of this checkout and of another one take turns, five times.

"naive" is NSO as commonly written: noise, gradients and weights kept as three copies, the clean
pass run although its weight is 0 (2k + 1 passes), the weights restored by subtraction.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from nso_hf import NSOConfig, NSOTrainer

WAYS = {
    "plain": {},
    "nso": {},
    "nso, one-sided": {"two_sided": False},
    "nso, alternate": {"sign": "alternate"},
    "nso, k=2": {"num_perturbations": 2},
    "naive": {},
    "nso, start 0.8": {"start": 0.8},
    "nso, interval 10": {"interval": 10},
    "sam": {"method": "sam"},
    "sam, interval 10": {"method": "sam", "interval": 10},
    "asam": {"method": "asam"},
    "rsam": {"method": "rsam"},
    "bsam": {"method": "bsam", "method_kwargs": {"num_examples": 64}, "optim": "sgd"},
    "fsam": {"method": "fsam"},
    "cr_sam": {"method": "cr_sam"},
    "hero": {"method": "hero"},
    "msam": {"method": "msam"},
    "async_sam": {"method": "async_sam"},
    "zo": {"method": "zo"},
}


class NaiveTrainer(Trainer):
    """What NSO costs when written without care."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        weights = [p for p in model.parameters() if p.requires_grad]
        old = [p.data.clone() for p in weights]
        kept = [torch.zeros_like(p) for p in weights]
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        noise = [0.01 * torch.randn_like(p) for p in weights]
        for sign in (1, -1):
            for p, u, w in zip(weights, noise, old, strict=True):
                p.data = w + sign * u
                p.grad = None
            super().training_step(model, dict(inputs), num_items_in_batch)
            for g, p in zip(kept, weights, strict=True):
                g.add_(p.grad, alpha=0.5)
        for p, w, g in zip(weights, old, kept, strict=True):
            p.data, p.grad = w, g
        return loss


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter() - self.start)


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Mean seconds per optimizer step (the first left out), and the peak resident memory in MiB."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=6,
        n_positions=options.length,
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(8192, (64, options.length))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer_class = {"plain": Trainer, "naive": NaiveTrainer}.get(way, NSOTrainer)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_steps=options.steps + 1,
            disable_tqdm=True,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=2,
            logging_steps=10_000,
            **WAYS[way],
        )
        trainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=[watch])
        gc.collect()
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": statistics.mean(watch.times[1:]), "peak": peak, "parameters": parameters}


def in_a_process(way: str, checkout: Path | None = None) -> dict[str, float]:
    """What `measure` says, of the library in `checkout`, or of the one that is installed."""
    environment = os.environ | ({} if checkout is None else {"PYTHONPATH": str(checkout)})
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    if "--against" in command:
        del command[(place := command.index("--against")) : place + 2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        sys.exit(done.stderr[-2000:])
    result: dict[str, float] = json.loads(line.removeprefix("RESULT"))
    return result


def compare(other: Path) -> None:
    """Print the ratio of a step's time here and in another checkout."""
    checkouts = [Path(__file__).parent.parent, other]
    rounds = [[in_a_process("nso", folder)["seconds"] for folder in checkouts] for _ in range(5)]
    ratios = [here / there for here, there in rounds]
    print("seconds/step here, there: " + ", ".join(f"{a:.4f} {b:.4f}" for a, b in rounds))
    best = min(here for here, _ in rounds) / min(there for _, there in rounds)
    print(f"ratio: median {statistics.median(ratios):.3f}, of the fastest {best:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps timed")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument(
        "--batch", type=int, default=4, help="sequences per micro-batch; two micro-batches per step"
    )
    parser.add_argument("--way", choices=WAYS, help="measure this one and print JSON")
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    options = parser.parse_args()
    if options.against:
        compare(options.against)
        return
    if options.way:
        print("RESULT", json.dumps(measure(options.way, options)))
        return
    results = {}
    for way in WAYS:
        results[way] = in_a_process(way)
        print(f"{way}: {results[way]['seconds']:.3f} s", file=sys.stderr, flush=True)
    plain = results["plain"]
    copy = plain["parameters"] * 4 / 2**20
    print(
        f"GPT-2 of {plain['parameters'] / 1e6:.1f}M parameters (one float32 copy: {copy:.0f} MiB), "
        f"{torch.get_num_threads()} threads"
    )
    print(
        "| way | seconds/step | x plain | extra memory, in copies of the weights "
        "|\n|---|---|---|---|"
    )
    for way, result in results.items():
        extra = (result["peak"] - plain["peak"]) / copy
        print(
            f"| {way} | {result['seconds']:.3f} | {result['seconds'] / plain['seconds']:.2f} | "
            f"{extra:.2f} |"
        )


if __name__ == "__main__":
    main()
