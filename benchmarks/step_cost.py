"""What an optimizer step costs, each way of training against plain training and against a bare loop
of as many passes.

    python -m benchmarks.step_cost [--models gpt2-14m smollm2-lora] [--accumulation 1 2 4]
        [--output FOLDER]

Ways of training take turns in one process, `--rounds` times, so that a slow minute falls on all of
them; figures are medians over the timed steps, and their ratios. "bare" are loops of PyTorch
alone, of one or two passes; "naive" is NSO as commonly written: noise, gradients and weights kept
as three copies, a pass at W although its weight is 0, the weights restored by assignment. "Extra
copies" is what tensors hold at most in a training, beyond the same of plain training, in copies of
the trained weights.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from benchmarks.allocations import CountAllocations
from nso_hf import NSOConfig, NSOTrainer

Batch = dict[str, Tensor]
RESULTS = Path(__file__).parent / "results" / "step_cost"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_WARM = 2  # steps of each training that are not timed
_LEARNING_RATE = 1e-5


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# Models, each with the examples it is trained on.


def toy() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))


def gpt2_14m() -> nn.Module:
    config = GPT2Config(vocab_size=8192, n_embd=384, n_layer=6, n_head=6, n_positions=1024)
    return GPT2LMHeadModel(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config())


def llama_of(
    vocabulary: int, width: int, inner: int, layers: int, heads: int, keys: int, *, tied: bool
) -> nn.Module:
    """A Llama of these sizes: `keys` are the heads of keys and values."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def smollm2() -> nn.Module:
    """The shapes of SmolLM2-135M."""
    return llama_of(49152, 576, 1536, 30, 9, 3, tied=True)


def llama() -> nn.Module:
    """The shapes of Llama 3.2 1B."""
    return llama_of(128256, 2048, 8192, 16, 32, 8, tied=True)


def llama_8b() -> nn.Module:
    """The shapes of Llama 3.1 8B."""
    return llama_of(128256, 4096, 14336, 32, 32, 8, tied=False)


def with_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


class Contrastive(nn.Module):
    """A CLIP model of open_clip with its loss, as a model of transformers has one."""

    def __init__(self) -> None:
        super().__init__()
        import open_clip

        self.clip = open_clip.create_model("ViT-S-16", output_dict=True)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        found = self.clip(image=image, text=text)
        logits = found["logit_scale"] * found["image_features"] @ found["text_features"].T
        labels = torch.arange(len(logits), device=logits.device)
        return {"loss": (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy": toy,
    "gpt2-14m": gpt2_14m,
    "gpt2": gpt2,
    "smollm2": smollm2,
    "smollm2-lora": lambda: with_lora(smollm2()),
    "llama": llama,
    "llama-lora": lambda: with_lora(llama()),
    "llama-8b": llama_8b,
    "vit-s-16": Contrastive,
}


def examples(model: nn.Module, number: int, length: int) -> list[Batch]:
    if isinstance(model, Contrastive):
        context = model.clip.context_length
        return [
            {"image": torch.randn(3, 224, 224), "text": torch.randint(1, 400, (context,))}
            for _ in range(number)
        ]
    config: Any = model.config
    rows = torch.randint(config.vocab_size, (number, length))
    return [{"input_ids": row, "labels": row} for row in rows]


# Ways of training.


@dataclass(frozen=True)
class Setting:
    """What all ways of training have in common."""

    data: list[Batch]
    batch: int
    """Examples of a micro-batch."""
    accumulation: int
    steps: int
    """That are timed."""
    options: dict[str, Any]
    """Of the training arguments."""


Way = Callable[[nn.Module, Setting], list[float]]
"""Trains a model; returns the seconds of the timed steps."""


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self._start)


class NaiveTrainer(Trainer):
    """What NSO costs when written without care."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        old = [p.data.clone() for p in weights]
        kept = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        noise = [0.01 * torch.randn_like(p) for p in weights]
        for sign in (1, -1):
            for p, u, w in zip(weights, noise, old, strict=True):
                p.data = w + sign * u
                p.grad = None
            super().training_step(model, dict(inputs), num_items_in_batch)
            for g, p in zip(kept, weights, strict=True):
                if p.grad is not None:
                    g.add_(p.grad, alpha=0.5)
        for p, w, g in zip(weights, old, kept, strict=True):
            p.data, p.grad = w, g
        return loss


def by_trainer(kind: type[Trainer] = NSOTrainer, **options: Any) -> Way:
    def train(model: nn.Module, setting: Setting) -> list[float]:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            args = NSOConfig(
                folder,
                use_cpu=DEVICE.type == "cpu",
                report_to="none",
                save_strategy="no",
                max_steps=setting.steps + _WARM,
                disable_tqdm=True,
                per_device_train_batch_size=setting.batch,
                gradient_accumulation_steps=setting.accumulation,
                logging_strategy="no",
                learning_rate=_LEARNING_RATE,
                **setting.options,
                **options,
            )
            trainer = kind(model=model, args=args, train_dataset=setting.data, callbacks=[watch])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return watch.seconds[_WARM:]

    return train


def micro_batches(setting: Setting) -> Iterator[Batch]:
    """Without end."""
    while True:
        for first in range(0, len(setting.data), setting.batch):
            rows = setting.data[first : first + setting.batch]
            yield {name: torch.stack([row[name] for row in rows]).to(DEVICE) for name in rows[0]}


def gradients(model: nn.Module, batches: Sequence[Batch], passes: int, options: Any) -> None:
    """The mean gradient over micro-batches, each evaluated so many times."""
    is_mixed = bool(options.get("bf16"))
    for batch in batches:
        for _ in range(passes):
            with torch.autocast(DEVICE.type, torch.bfloat16) if is_mixed else nullcontext():
                loss = model(**batch)["loss"]
            (loss / (passes * len(batches))).backward()


def bare(passes: int) -> Way:
    """The least that so many gradients of each micro-batch can cost."""

    def train(model: nn.Module, setting: Setting) -> list[float]:
        weights = [p for p in model.to(DEVICE).train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, fused=True)
        following, seconds = micro_batches(setting), []
        for _ in range(setting.steps + _WARM):
            wait()
            start = time.perf_counter()
            batches = list(islice(following, setting.accumulation))
            gradients(model, batches, passes, setting.options)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            wait()
            seconds.append(time.perf_counter() - start)
        return seconds[_WARM:]

    return train


def bare_sam(model: nn.Module, setting: Setting) -> list[float]:
    """pytorch_optimizer's SAM, as its documentation has it: the ascent is of the whole batch."""
    from pytorch_optimizer import SAM

    weights = [p for p in model.to(DEVICE).train().parameters() if p.requires_grad]
    optimizer = SAM(weights, torch.optim.AdamW, rho=0.05, lr=_LEARNING_RATE)
    following, seconds = micro_batches(setting), []
    for _ in range(setting.steps + _WARM):
        wait()
        start = time.perf_counter()
        batches = list(islice(following, setting.accumulation))
        gradients(model, batches, 1, setting.options)
        optimizer.first_step(zero_grad=True)
        gradients(model, batches, 1, setting.options)
        optimizer.second_step(zero_grad=True)
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds[_WARM:]


WAYS: dict[str, Way] = {
    "plain": by_trainer(Trainer),
    "bare, one pass": bare(1),
    "bare, two passes": bare(2),
    "bare, SAM of pytorch_optimizer": bare_sam,
    "naive": by_trainer(NaiveTrainer),
    "nso, sigma 0": by_trainer(sigma=0),
    "nso": by_trainer(),
    "nso, rademacher": by_trainer(distribution="rademacher"),
    "nso, k=2": by_trainer(num_perturbations=2),
    "nso, alternate": by_trainer(sign="alternate"),
    "nso, start 0.8": by_trainer(start=0.8),
    "nso, interval 10": by_trainer(interval=10),
    "sam": by_trainer(method="sam"),
    "msam": by_trainer(method="msam"),
    "zo": by_trainer(method="zo"),
}
OVER_ALL_STEPS = ("nso, start 0.8", "nso, interval 10")
"""Whose steps differ: the figure is their mean."""


def memory(way: Way, model: nn.Module, setting: Setting) -> int:
    """The most bytes that tensors hold in a training, beyond those before it."""
    short = Setting(setting.data, setting.batch, setting.accumulation, 0, setting.options)
    with CountAllocations() as allocations:
        way(model, short)
    return allocations.peak


def made(name: str) -> nn.Module:
    """A model, on the device."""
    torch.manual_seed(0)
    with DEVICE:
        return MODELS[name]()


def measured(
    name: str,
    model: nn.Module,
    accumulation: int,
    options: argparse.Namespace,
    training: dict[str, Any],
) -> dict[str, Any]:
    """What every way of training takes for a model.

    Args:
        training: arguments of training.
    """
    data = examples(model, 4 * options.batch * accumulation, options.length)
    setting = Setting(data, options.batch, accumulation, options.steps, training)
    # One micro-batch has no second one for the other sign.
    ways = [way for way in options.ways if accumulation > 1 or way != "nso, alternate"]
    if not training.keys() <= {"bf16"}:  # which is all that the bare loops know
        ways = [way for way in ways if not way.startswith("bare")]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peak: dict[str, int] = {}
    for number, way in product(range(options.rounds), ways):
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds[way] += WAYS[way](model, setting)
        if DEVICE.type == "cuda":
            peak[way] = torch.cuda.max_memory_allocated()
        model.zero_grad()
        gc.collect()
        said = f"{name}, accumulation {accumulation}, round {number + 1}: {way}"
        print(f"{said}: {seconds[way][-1]:.3f} s", flush=True)
    model.zero_grad()
    copy = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    peaks = {}
    if options.memory:
        peaks = {way: memory(WAYS[way], model, setting) / copy for way in ways}
    return {
        "model": name,
        "accumulation": accumulation,
        "batch": options.batch,
        "length": options.length,
        "training": training,
        "trained_bytes": copy,
        "seconds": seconds,
        "copies": peaks,
        "peak_bytes": peak,
    }


def typical(way: str, seconds: Sequence[float]) -> float:
    return (statistics.mean if way in OVER_ALL_STEPS else statistics.median)(seconds)


def table(result: dict[str, Any]) -> str:
    """A row for each way."""
    times = {way: typical(way, taken) for way, taken in result["seconds"].items()}
    against = [way for way in ("plain", "bare, two passes") if way in times]
    titles = ["way", "ms a step", *(f"x {way}" for way in against)]
    titles += ["extra copies"] * bool(result["copies"]) + ["peak GiB"] * bool(result["peak_bytes"])
    lines = [titles, ["---"] * len(titles)]
    for way, taken in times.items():
        ratios = [f"{taken / times[other]:.3f}" for other in against]
        held = []
        if result["copies"]:
            held.append(f"{result['copies'][way] - result['copies']['plain']:.2f}")
        if result["peak_bytes"]:
            held.append(f"{result['peak_bytes'][way] / 2**30:.2f}")
        lines.append([way, f"{1000 * taken:.1f}", *ratios, *held])
    training = ", ".join(result["training"])
    what = f"{result['model']}, {result['accumulation']} x {result['batch']} examples"
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{what}{training and f', {training}'}\n\n{rows}\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Times plain training, for each way."""
    from matplotlib import pyplot as plt

    ways = list(dict.fromkeys(way for result in results for way in result["seconds"]))
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(ways) + 1.5), layout="constrained")
    width = 0.8 / len(results)
    for number, result in enumerate(results):
        plain = typical("plain", result["seconds"]["plain"])
        found = [(ways.index(way), typical(way, of)) for way, of in result["seconds"].items()]
        places = [place + (number - (len(results) - 1) / 2) * width for place, _ in found]
        label = f"{result['model']}, accumulation {result['accumulation']}"
        axes.barh(places, [taken / plain for _, taken in found], width, label=label)
    axes.set_yticks(range(len(ways)), ways)
    axes.invert_yaxis()
    for passes in (1, 2):
        axes.axvline(passes, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xlabel("time of a step / plain training's")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def written(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """results.json, results.md and step_cost.png."""
    folder.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    about = {
        "hardware": hardware if DEVICE.type == "cuda" else f"{hardware} CPU, {threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    text = json.dumps(about | {"results": list(results)}, indent=1) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    tables = "\n".join(map(table, results))
    (folder / "results.md").write_text(f"{about}\n\n{tables}", encoding="utf-8")
    plot(results, folder / "step_cost.png")


def parser(models: Sequence[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--models", nargs="+", choices=MODELS, default=models)
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    add("--accumulation", nargs="+", type=int, default=[1, 2, 4], help="micro-batches of a step")
    add("--batch", type=int, default=8, help="examples of a micro-batch")
    add("--length", type=int, default=128, help="tokens of an example")
    add("--steps", type=int, default=4, help="timed, of each way in each round")
    add("--rounds", type=int, default=3)
    add("--no_memory", dest="memory", action="store_false", help="measure time alone")
    add("--output", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(["gpt2-14m", "smollm2-lora", "vit-s-16"]).parse_args(argv)
    transformers.logging.set_verbosity_error()
    results = []
    for name, accumulation in product(options.models, options.accumulation):
        results.append(measured(name, made(name), accumulation, options, {}))
        print(table(results[-1]), flush=True)
        written(results, options.output)


if __name__ == "__main__":
    main()
