"""What a step costs on one GPU: `benchmarks.step_cost` in the precisions of a GPU, and a draw of
the noise against a copy of the weights on the device.

    python -m benchmarks.gpu [--models gpt2 llama] [--precisions bf16 fp16] [--output FOLDER]

Without a GPU, and with `--models toy`, it runs on the CPU.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.step_cost import DEVICE, made, measured, parser, table, wait, written
from nso_hf.backends import Weight
from nso_hf.step.noise import Noise

RESULTS = Path(__file__).parent / "results" / "gpu"
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    "bf16-weights": {},
    "fp16": {"fp16": True},
    "bf16-compiled": {"bf16": True, "torch_compile": True},
}


def milliseconds(function: Callable[[], Any], times: int = 5) -> float:
    function()
    wait()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        wait()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def draw_against_copy(model: nn.Module) -> dict[str, float]:
    """Milliseconds of adding one draw to all trainable weights, and of copying these."""
    weights = [
        Weight(name, index, parameter, parameter.data, 0, parameter.shape)
        for index, (name, parameter) in enumerate(model.named_parameters())
        if parameter.requires_grad
    ]
    data = [weight.data for weight in weights]
    kept: list[Tensor] = [torch.empty_like(each) for each in data]
    copy = milliseconds(lambda: torch._foreach_copy_(kept, data))
    results = {"copy": copy}
    for distribution in ("normal", "rademacher"):
        noise = Noise(0, 0, 0, 0.0, distribution)
        results[distribution] = milliseconds(lambda noise=noise: noise.add_to(weights))
    return results | {"weights": len(weights), "elements": sum(each.numel() for each in data)}


def main(argv: Sequence[str] | None = None) -> None:
    made_parser = parser(["gpt2", "llama", "llama-lora"])
    made_parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    made_parser.set_defaults(
        accumulation=[2], length=512, steps=7, rounds=2, memory=False, output=RESULTS
    )
    made_parser.description = __doc__
    options = made_parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    results = []
    for name, precision in product(options.models, options.precisions):
        model = made(name)
        if precision == "bf16-weights":
            model.to(torch.bfloat16)
        draw = draw_against_copy(model)
        print(f"{name}, {precision}: {json.dumps(draw)}", flush=True)
        for accumulation in options.accumulation:
            found = measured(name, model, accumulation, options, PRECISIONS[precision])
            results.append(found | {"precision": precision, "draw_ms": draw})
            print(table(results[-1]), flush=True)
            written(results, options.output)
        del model
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
