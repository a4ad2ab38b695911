"""Landscapes whose flattest minima are known: where does each method go?

    python -m benchmarks.landscapes [--steps 2000] [--output docs/landscapes]

The valley f(x, y) = (x y - 1)^2: its minima are the curve x y = 1, where the trace of the Hessian
is 2 (x^2 + y^2), least at |x| = |y| = 1. All methods start at (2.5, 0.8).

Matrix sensing: X = V V' of rank 5 in 100 x 100 is to be found from 1500 linear measurements
<A_i, X>, exact or with noise, by minimising the mean squared error over U U' with U of 100 x 100,
from a large start. Many U fit; the trace of the Hessian is least at those of small nuclear norm, as
X is. Reported are the distance of U U' from X relative to X, the loss and the trace.

Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.curvature import hessian_trace

VALLEY: dict[str, dict[str, Any]] = {
    "SGD": {"sigma": 0.0},
    "NSO": {"sigma": 0.3},
    "SAM": {"method": "sam", "method_kwargs": {"rho": 0.3}},
    "ASAM": {"method": "asam", "method_kwargs": {"rho": 0.3}},
    "zeroth order": {"method": "zo", "method_kwargs": {"mu": 0.3}},
}
SENSING: dict[str, dict[str, Any]] = {
    "SGD": {"sigma": 0.0},
    "NSO": {"sigma": 0.02},
    "SAM": {"method": "sam", "method_kwargs": {"rho": 0.5}},
    "CR-SAM": {"method": "cr_sam", "method_kwargs": {"rho": 0.5}},
}
SIZE, RANK, MEASUREMENTS = 100, 5, 1500


class Valley(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([2.5]))
        self.y = nn.Parameter(torch.tensor([0.8]))

    def forward(self, index: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.x * self.y - 1) ** 2).sum()}


class Sensing(nn.Module):
    def __init__(self, A: Tensor, y: Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A, self.y = A, y  # not buffers: nothing writes to them
        self.U = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5)

    def forward(self, index: Tensor) -> dict[str, Tensor]:
        predicted = self.A @ (self.U @ self.U.T).reshape(-1)
        return {"loss": (predicted - self.y).square().mean()}


class Path_(transformers.TrainerCallback):  # noqa: N801 - pathlib has the other
    """Where the valley's point was before each step."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, model: Valley, **kwargs: Any) -> None:
        self.points.append((model.x.item(), model.y.item()))


def train(
    model: nn.Module, steps: int, rate: float, given: dict[str, Any], *callbacks: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = NSOConfig(
            folder,
            max_steps=steps,
            learning_rate=rate,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **given,
        )
        data: Any = [{"index": torch.tensor(0)}]
        NSOTrainer(model=model, args=args, train_dataset=data, callbacks=[*callbacks]).train()


def valley(steps: int) -> dict[str, Any]:
    results = {}
    for name, given in VALLEY.items():
        model, path = Valley(), Path_()
        train(model, steps, 0.01, given, path)
        tail = torch.tensor(path.points[-200:]).abs().mean(dim=0).tolist()
        results[name] = {"end": tail, "trace": 2 * sum(t**2 for t in tail), "path": path.points}
        print(f"valley   {name:14} |x|, |y| = {tail[0]:.2f}, {tail[1]:.2f}", flush=True)
    return results


def measurements(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(SIZE, RANK, generator=generator) / SIZE**0.5
    A = torch.randn(MEASUREMENTS, SIZE * SIZE, generator=generator)
    X = V @ V.T
    y = A @ X.reshape(-1)
    return A, y + noise * torch.randn(MEASUREMENTS, generator=generator), X


def sensing(steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind, noise in (("clean", 0.0), ("noisy", 0.5)):
        A, y, X = measurements(noise)
        true = torch.linalg.matrix_norm(X, "nuc").item()
        for name, given in SENSING.items():
            model = Sensing(A, y, seed=1)
            train(model, steps, 0.03, given)
            batch = {"index": torch.tensor([0])}
            with torch.no_grad():
                error = ((model.U @ model.U.T - X).norm() / X.norm()).item()
                loss = model(**batch)["loss"].item()
            trace = hessian_trace(model, [batch], num_samples=20)
            nuclear = model.U.square().sum().item() / true  # of U U'
            row = {"error": error, "nuclear": nuclear, "loss": loss, "trace": trace.estimate}
            results[f"{kind}, {name}"] = row
            print(
                f"{kind:8} {name:8} error {error:.3f}, loss {loss:.1e}, trace {trace.estimate:.3g}",
                flush=True,
            )
    return results


def draw(results: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    x, y = np.meshgrid(np.linspace(0.2, 3, 300), np.linspace(0.2, 2, 300))
    axes.contourf(
        x, y, (x * y - 1) ** 2, levels=np.geomspace(1e-3, 30, 15), cmap="Greys", norm="log"
    )
    ridge = np.linspace(0.5, 3, 200)
    axes.plot(ridge, 1 / ridge, color="black", lw=0.8, ls="--", label="minima, x y = 1")
    for name, result in results.items():
        path = np.array(result["path"])[::10]
        axes.plot(path[:, 0], path[:, 1], lw=1.2, alpha=0.8, label=name)
        axes.plot(*result["end"], "o", ms=7, color=axes.lines[-1].get_color())
    axes.plot(1, 1, "*", ms=14, color="gold", mec="black", label="flattest minimum")
    axes.set(xlabel="x", ylabel="y", xlim=(0.2, 3), ylim=(0.2, 2))
    axes.set_title("(xy - 1)²: where methods come to rest")
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("docs/landscapes"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = {"valley": valley(options.steps), "sensing": sensing(options.steps)}
    draw(results["valley"], options.output.with_suffix(".png"))
    for result in results["valley"].values():
        result["path"] = result["path"][::100]
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
