"""Pretrain a small language model, then see what it keeps: after fine-tuning, and in few bits.

    python -m benchmarks.language_model --max_steps 1000 --sigma 0.01 --output_dir runs/lm

The protocol of arXiv 2605.02105, small: a Llama of single bytes learns the source code of Python's
standard library (12 MB, each byte seen at most once in the default's steps), and is fine-tuned
plainly on the English of Python's reference manual at several learning rates. The loss on code
before and after says what was forgotten, that on English what was learned; both are in nats per
byte, on texts that nothing was trained on. A script as `nso compare` runs them.
"""

import copy
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import check_integer
from nso_hf.robustness import robustness
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.recorded_options import RecordedOptions
from nso_hf.running.results import Results, trained

Rows = list[dict[str, Tensor]]


@dataclass
class LanguageOptions:
    _argument_group_name = "language model"

    hidden_size: int = field(default=128, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers."})
    length: int = field(default=128, metadata={"help": "Bytes of a training example."})
    judged_on: int = field(default=512, metadata={"help": "Examples of each judgement."})
    fine_tune_steps: int = field(default=100, metadata={"help": "Steps of fine-tuning; 0: none."})
    fine_tune_learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3],
        metadata={"help": "A model is fine-tuned with each of them."},
    )
    test: bool = field(default=True, metadata={"help": "false: judged on validation alone."})

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "length", "judged_on"):
            check_integer(name, getattr(self, name), 1, "Give a positive number")

    def model(self) -> LlamaForCausalLM:
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": 3 * self.hidden_size}
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=4,
                max_position_embeddings=self.length,
                tie_word_embeddings=True,
                **sizes,
            )
        )


def texts() -> dict[str, list[bytes]]:
    """Code and English, each as files or topics in an order that is none of theirs."""
    library = Path(sysconfig.get_paths()["stdlib"])
    manual = library / "pydoc_data" / "topics.py"
    code = [
        path.read_bytes()
        for path in library.rglob("*.py")
        if path != manual and not {"site-packages", "test", "tests"} & set(path.parts)
    ]
    topics: dict[str, Any] = {}
    exec(compile(manual.read_bytes(), manual, "exec"), topics)  # a dictionary of texts
    english = [text.encode() for text in topics["topics"].values()]
    return {
        name: sorted(set(parts), key=lambda text: sha256(text).digest())
        for name, parts in {"code": code, "English": english}.items()
    }


def examples(parts: Sequence[bytes], length: int) -> Rows:
    """Consecutive bytes of these texts, one after another."""
    joined = torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)
    whole = joined[: len(joined) // length * length].view(-1, length).long()
    return [{"input_ids": row, "labels": row} for row in whole]


def split(parts: Sequence[bytes], length: int, judged_on: int) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test examples, of different texts; the latter so many."""
    tenth = len(parts) // 10
    held = [parts[:tenth], parts[tenth : 2 * tenth]]
    generator = torch.Generator().manual_seed(0)
    judged = []
    for each in held:
        rows = examples(each, length)
        order = torch.randperm(len(rows), generator=generator)[:judged_on]
        judged.append([rows[i] for i in order])
    return examples(parts[2 * tenth :], length), judged[0], judged[1]


def batches(rows: Rows, size: int = 64) -> list[dict[str, Tensor]]:
    return [
        {name: torch.stack([row[name] for row in rows[i : i + size]]) for name in rows[0]}
        for i in range(0, len(rows), size)
    ]


def figures(model: nn.Module, rows: Rows, **measured: Any) -> list[dict[str, Any]]:
    """The loss of this model, and of what `measured` makes of it."""
    nothing: dict[str, Any] = {"bits": (), "noise": (), "relative_noise": (), "sparsity": ()}
    nothing["group_sizes"] = (None,)
    found = robustness(model, batches(rows), **(nothing | measured))
    return [
        {"kind": r.kind, "strength": r.strength, "loss": r.loss, "stderr": r.stderr} for r in found
    ]


def loss(model: nn.Module, rows: Rows) -> dict[str, float]:
    (found,) = figures(model, rows)
    return {"loss": found["loss"], "loss_stderr": found["stderr"]}


def fine_tuned(
    model: LlamaForCausalLM, rows: Rows, rate: float, options: LanguageOptions, args: NSOConfig
) -> LlamaForCausalLM:
    """A copy of the model, trained plainly on these."""
    tuned = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        plain = TrainingArguments(
            folder,
            max_steps=options.fine_tune_steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.fine_tune_steps // 10,
            per_device_train_batch_size=args.per_device_train_batch_size,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            seed=args.seed,
            use_cpu=args.use_cpu,
        )
        Trainer(tuned, plain, train_dataset=rows).train()
    return tuned


OPTIONS = [LanguageOptions, CompanionOptions, NSOConfig]


def main(argv: list[str] | None = None) -> None:
    options, companions, args = RecipeParser(OPTIONS, description=__doc__).parse(argv)
    companions.check(args)
    checkpoint = checkpoint_to_resume(args)
    recorded = RecordedOptions(args, options, companions, checkpoint=checkpoint)
    results = Results(args, recorded, language_options=options, companion_options=companions)
    splits = {n: split(p, options.length, options.judged_on) for n, p in texts().items()}
    train, validation, test = splits["code"]
    set_seed(args.seed)
    model = options.model()
    trainer = NSOTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=companions.callbacks(),
    )
    with resumable(args, lambda: trainer.state):
        results.add(
            parameters=sum(p.numel() for p in model.parameters()),
            training_bytes=len(train) * options.length,
            **trained(trainer, recorded, checkpoint),
        )
        results.add(validation=loss(model, validation))
        if not options.test:
            return
        results.add(test=loss(model, test))
        noise = {"noise": (0.01, 0.02), "num_samples": 2}
        rows = figures(model, test, bits=(8, 4, 3, 2), sparsity=(0.3, 0.5, 0.7), **noise)
        bits = {f"{row['strength']}": row["loss"] for row in rows if row["kind"] == "bits"}
        results.add(robustness=rows, loss_in_bits=bits)
        forgetting: dict[str, Any] = {}
        for rate in options.fine_tune_learning_rates if options.fine_tune_steps else ():
            tuned = fine_tuned(model, splits["English"][0], rate, options, args)
            forgetting[f"{rate:g}"] = {
                "kind": "text",
                "before": loss(model, test),
                "after": loss(tuned, test),
                "learned": loss(tuned, splits["English"][2]),
                "after_robustness": figures(tuned, test, bits=(4, 3)),
            }
            results.add(forgetting=forgetting)


if __name__ == "__main__":
    run(main)
