"""Time and memory of the trace (100 probes) and of the largest eigenvalue of a GPT-2's Hessian,
against PyHessian, hessian-eigenthings and curvlinops.

    python -m benchmarks.curvature [--batches 1] [--batch 4] [--length 64] [--probes 100]

Every way runs in a process of its own, on the same model (trained for a few steps, so that its
spectrum has outliers), data and attention. Each finds the largest eigenvalue by its own method, to
the same relative error of 1e-3 as far as that can be asked for; the error it reached is printed.
On Linux, whose peak of resident memory can be begun anew.
"""

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

TOLERANCE = 1e-3


class Logits(nn.Module):
    """The model as the others want it: a tensor in, a tensor out."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)


class NextToken(nn.Module):
    """Their loss: the mean over all predicted tokens."""

    reduction = "mean"

    def forward(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def made(options: argparse.Namespace) -> tuple[GPT2LMHeadModel, list[Tensor]]:
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192,
        n_embd=384,
        n_layer=6,
        n_head=6,
        n_positions=options.length,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)

    def sequences(count: int) -> Tensor:
        start, step = torch.randint(8000, (count, 1)), torch.randint(1, 4, (count, 1))
        return (start + torch.arange(options.length) * step) % 8192

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(100):
        tokens = sequences(16)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.config.use_cache = False
    return model, [sequences(options.batch) for _ in range(options.batches)]


Result = dict[str, float]


def ours(hvp: str) -> Callable[..., None]:
    def measure(
        model: GPT2LMHeadModel, data: list[Tensor], probes: int, report: Callable[..., None]
    ) -> None:
        from nso_hf.curvature import hessian_eigenvalues, hessian_trace

        batches = [{"input_ids": tokens, "labels": tokens} for tokens in data]
        trace = hessian_trace(model, batches, num_samples=probes, hvp=hvp)
        report(trace=trace.estimate, trace_stderr=trace.stderr)
        # The error of an eigenvalue is about the square of its residual over the gap to the next.
        top = hessian_eigenvalues(model, batches, tolerance=10 * TOLERANCE, hvp=hvp)
        report(lambda_max=top.values[0])

    return measure


def pyhessian(
    model: GPT2LMHeadModel, data: list[Tensor], probes: int, report: Callable[..., None]
) -> None:
    from pyhessian import hessian

    model.set_attn_implementation("eager")
    pairs = [(tokens, tokens) for tokens in data]
    one = {"data": pairs[0]} if len(pairs) == 1 else {"dataloader": pairs}
    operator = hessian(Logits(model), NextToken(), cuda=False, **one)
    traces = torch.tensor(operator.trace(maxIter=probes, tol=0))
    report(trace=traces.mean().item(), trace_stderr=traces.std().item() / math.sqrt(probes))
    values, _ = operator.eigenvalues(maxIter=200, tol=TOLERANCE, top_n=1)
    report(lambda_max=values[0])


def eigenthings(
    model: GPT2LMHeadModel, data: list[Tensor], probes: int, report: Callable[..., None]
) -> None:
    from hessian_eigenthings import HessianOperator, lanczos, trace

    model.set_attn_implementation("eager")
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in data]
    operator = HessianOperator(model, batches, lambda model, batch: model(**batch).loss)
    found = trace(operator, num_matvecs=probes, method="hutchinson", seed=0)
    report(trace=found.estimate, trace_stderr=found.stderr)
    top = lanczos(operator, k=1, max_iter=20, which="LA", seed=0)  # it takes no tolerance to reach
    report(lambda_max=top.eigenvalues[0].item())


def curvlinops(
    model: GPT2LMHeadModel, data: list[Tensor], probes: int, report: Callable[..., None]
) -> None:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    model.set_attn_implementation("eager")
    operator = HessianLinearOperator(
        Logits(model),
        NextToken(),
        list(model.parameters()),
        [(tokens, tokens) for tokens in data],
        check_deterministic=False,
        num_data=sum(len(tokens) for tokens in data),
    )
    samples = []
    for _ in range(probes):  # all at once, as its `hutchinson_trace`, does not fit into memory
        v = torch.randint(2, (operator.shape[1],)).float() * 2 - 1
        samples.append(torch.dot(v, operator @ v).item())
    traces = torch.tensor(samples)
    report(trace=traces.mean().item(), trace_stderr=traces.std().item() / math.sqrt(probes))
    values = eigsh(operator.to_scipy(), k=1, which="LA", tol=TOLERANCE, return_eigenvectors=False)
    report(lambda_max=float(values[0]))


WAYS: dict[str, Callable[..., None]] = {
    "nso_hf, autograd": ours("autograd"),
    "nso_hf, finite_difference": ours("finite_difference"),
    "PyHessian": pyhessian,
    "hessian-eigenthings": eigenthings,
    "curvlinops": curvlinops,
}


def measure(options: argparse.Namespace) -> Result:
    """Figures, and of each the seconds and the memory beyond the model and its data, in MiB."""
    model, data = made(options)
    result: Result = {}
    before, started = _forget_peak(), time.perf_counter()

    def report(**figures: float) -> None:
        nonlocal started
        name = next(iter(figures))
        result.update(figures)
        result[f"{name}_seconds"] = time.perf_counter() - started
        result[f"{name}_memory"] = _resident("VmHWM") - before
        _forget_peak()
        started = time.perf_counter()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WAYS[options.way](model, data, options.probes, report)
    return result | {"parameters": sum(p.numel() for p in model.parameters())}


def _forget_peak() -> float:
    """Give back what is free, begin a new peak; the resident memory in MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="sequences in each")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--probes", type=int, default=100)
    parser.add_argument("--way", choices=WAYS, help="measure this one and print JSON")
    options = parser.parse_args()
    if options.way:
        print("RESULT", json.dumps(measure(options)))
        return
    results: dict[str, Result] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.curvature", *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
        if line is None:
            print(f"{way} failed: {done.stderr[-1500:]}", file=sys.stderr)
            continue
        results[way] = json.loads(line.removeprefix("RESULT"))
        print(way, results[way], file=sys.stderr, flush=True)
    first = next(iter(results.values()))
    size = f"{options.batches} x {options.batch} x {options.length} tokens"
    print(
        f"GPT-2 of {first['parameters'] / 1e6:.1f}M parameters, {size}, {options.probes} probes\n"
    )
    print("| | trace | seconds | ratio | MiB | lambda_max | seconds | ratio | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way, result in results.items():
        cells = [f"{result['trace']:.5g} ± {result['trace_stderr']:.2g}"]
        for name in ("trace", "lambda_max"):
            if name == "lambda_max":
                error = abs(result[name] / first[name] - 1)
                cells.append(f"{result[name]:.6g} ({error:.0e})")
            seconds = result[f"{name}_seconds"]
            cells.append(f"{seconds:.1f}")
            cells.append(f"{seconds / first[f'{name}_seconds']:.2f}")
            cells.append(f"{result[f'{name}_memory']:.0f}")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
