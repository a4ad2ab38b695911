"""What a step costs on one GPU: time and memory of an optimizer step against plain training, and a
draw of the noise against a copy of the weights on the device.

    python -m benchmarks.gpu [--models gpt2 llama] [--precisions bf16 bf16-weights] [--output FILE]

Ways of training take turns, `--rounds` times; the table has medians over all timed steps. Without a
GPU, and with `--models toy`, it runs on the CPU.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.backends import Weight
from nso_hf.step.noise import Noise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two passes": {},
    "nso": {},
    "nso, alternate": {"sign": "alternate"},
    "nso, interval 10": {"interval": 10},
    "sam": {"method": "sam"},
    "msam": {"method": "msam"},
    "zo": {"method": "zo"},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    "bf16-weights": {},
    "fp16": {"fp16": True},
    "bf16-compiled": {"bf16": True, "torch_compile": True},
}


def toy() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config())


def llama() -> nn.Module:
    """The shapes of Llama 3.2 1B."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def llama_lora() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


MODELS = {"toy": toy, "gpt2": gpt2, "llama": llama, "llama-lora": llama_lora}


class TwoPasses(Trainer):
    """The least that two gradients a step can cost."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, dict(inputs), num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.start)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that afterwards holds the bytes that were allocated on the device at most."""
    peak = [0]
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if DEVICE.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated()


def trained(
    model: nn.Module, way: str, precision: str, options: argparse.Namespace
) -> tuple[list[float], int]:
    """Seconds of each step but the first few, and the peak memory in bytes."""
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    tokens = torch.randint(vocabulary, (options.batch, options.length))
    data = [{"input_ids": row, "labels": row} for row in tokens.repeat(2, 1)]
    trainer_class = {"plain": Trainer, "two passes": TwoPasses}.get(way, NSOTrainer)
    watch, warm = Stopwatch(), 3
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        args = NSOConfig(
            folder,
            use_cpu=DEVICE.type == "cpu",
            report_to="none",
            save_strategy="no",
            max_steps=options.steps + warm,
            disable_tqdm=True,
            per_device_train_batch_size=options.batch // 2,
            gradient_accumulation_steps=2,
            logging_steps=10_000,
            learning_rate=1e-5,
            **PRECISIONS[precision],
            **WAYS[way],
        )
        trainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=[watch])
        trainer.train()
    del trainer
    model.zero_grad()
    gc.collect()
    return watch.seconds[warm:], peak[0]


def milliseconds(function: Any, times: int = 5) -> float:
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


def measured(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    with DEVICE:
        model = MODELS[name]()
    if precision == "bf16-weights":
        model.to(torch.bfloat16)
    result: dict[str, Any] = {"model": name, "precision": precision}
    result["draw_ms"] = draw_against_copy(model)
    print(f"{name}, {precision}: {json.dumps(result['draw_ms'])}", flush=True)
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    peaks: dict[str, int] = {}
    for _ in range(options.rounds):
        for way in options.ways:
            taken, peaks[way] = trained(model, way, precision, options)
            seconds[way] += taken
    result["ways"] = {
        way: {"seconds": statistics.median(taken), "peak_bytes": peaks[way], "all": taken}
        for way, taken in seconds.items()
    }
    return result


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | precision | way | ms/step | x plain | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        plain = result["ways"]["plain"]["seconds"]
        for way, of in result["ways"].items():
            lines.append(
                f"| {result['model']} | {result['precision']} | {way} | "
                f"{1000 * of['seconds']:.1f} | {of['seconds'] / plain:.3f} | "
                f"{of['peak_bytes'] / 2**30:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["gpt2", "llama", "llama-lora"]
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--batch", type=int, default=16, help="sequences per step, in two micro-batches"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=7, help="timed, of each way in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = []
    for name in options.models:
        for precision in options.precisions:
            results.append(measured(name, precision, options))
            print(table(results[-1:]), flush=True)
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"\n{hardware}, {versions}\n{table(results)}")
    if options.output:
        written = {"hardware": hardware, "versions": versions, "results": results}
        options.output.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
