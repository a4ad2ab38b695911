r"""Pretrain a model of open_clip on image-caption pairs with Noise Stability Optimization.

    python recipes/clip_pretraining.py --config recipes/configs/demo_clip.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/clip_pretraining.py \
        --config recipes/configs/cc3m.yaml --train_data 'cc3m/{00000..00331}.tar' \
        --output_dir runs/cc3m

The loss is that of the global batch: the pairs of all processes and accumulated micro-batches. The
model is evaluated by retrieval among held-out pairs (with --eval_strategy during training too) and,
after training, by zero-shot classification and a linear probe. The output folder is one that
open_clip loads. Everything of `TrainingArguments` is an option too.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import IntervalStrategy, set_seed

from nso_hf import NSOArguments
from nso_hf.checkpoints import checkpoint_to_resume, resumable
from nso_hf.clip.arguments import CLIPConfig
from nso_hf.clip.options import DataOptions, EvaluationOptions, ModelOptions
from nso_hf.command_line import RecipeParser, run
from nso_hf.curvature import hessian_eigenvalues, hessian_trace
from nso_hf.readiness import check_ready
from nso_hf.recorded_options import RecordedOptions, fingerprint
from nso_hf.refusal import Refusal, needs, refusal

if TYPE_CHECKING:
    from nso_hf.clip.pairs import Pairs
    from nso_hf.clip.trainer import CLIPTrainer

OPTIONS = [ModelOptions, DataOptions, EvaluationOptions, CLIPConfig]
PACKAGES = ("open_clip", "webdataset", "datasets", "sklearn", "matplotlib", "rich")


def measure_curvature(
    trainer: "CLIPTrainer", train: "Pairs", options: EvaluationOptions
) -> dict[str, dict[str, float]]:
    """Trace and largest eigenvalue of the loss, by all trained weights and by tower."""
    from nso_hf.clip.stream import PairStream

    clip, size = trainer.clip, trainer.args.per_device_train_batch_size
    stream = iter(PairStream(train, clip.eval_transform, clip.tokenizer, batch_size=size))
    batches = []
    for _ in range(options.curvature_batches):
        examples = [next(stream) for _ in range(size)]
        batches.append(trainer.data_collator(examples))
    trained = [name for name, p in clip.model.named_parameters() if p.requires_grad]
    towers = {
        "all": trained,
        "image tower": [name for name in trained if name.startswith("visual.")],
        "text tower": [name for name in trained if not re.match(r"visual\.|logit_", name)],
    }
    measured = {}
    for tower, names in towers.items():
        if not names:
            continue
        params = [f"^{re.escape(name)}$" for name in names]
        began = time.monotonic()
        trace = hessian_trace(
            trainer, batches, num_samples=options.curvature_samples, params=params
        )
        top = hessian_eigenvalues(trainer, batches, tolerance=1e-2, params=params)
        measured[tower] = {
            "trace": trace.estimate,
            "trace_stderr": trace.stderr,
            "lambda_max": top.values[0],
            "lambda_max_residual": top.residuals[0],
            "seconds": round(time.monotonic() - began, 1),
        }
    return measured


@contextmanager
def named(option: str) -> Iterator[None]:
    """Errors in the data name the option that they came from."""
    try:
        yield
    except Refusal as error:
        raise Refusal(re.sub(r"^(data|labels)=", f"{option}=", str(error))) from error


def main(argv: list[str] | None = None) -> None:
    options = RecipeParser(OPTIONS, description=__doc__.split("\n")[0]).parse(argv)
    needs("clip_pretraining.py", "clip", *PACKAGES)
    pretrain(*options)


def pretrain(
    model_options: ModelOptions, data: DataOptions, evaluation: EvaluationOptions, args: CLIPConfig
) -> None:
    """From data to results, for options that were read without these packages."""
    from nso_hf.clip.classification import check_probe, class_names, linear_probe, zero_shot
    from nso_hf.clip.encoding import Encoded, encode
    from nso_hf.clip.report import report
    from nso_hf.clip.retrieval import METRICS, retrieval
    from nso_hf.clip.stream import PairStream, check_usable
    from nso_hf.clip.trainer import CLIPTrainer

    check_ready(args, ["loss", *METRICS])
    checkpoint = checkpoint_to_resume(args)
    recorded = RecordedOptions(args, model_options, data, evaluation, checkpoint=checkpoint)
    started = time.monotonic()
    set_seed(args.seed)
    if args.eval_strategy != "no" and data.eval_data is None:
        value = IntervalStrategy(args.eval_strategy).value
        raise refusal("eval_strategy", value, "nothing to evaluate on", "Set --eval_data")
    if evaluation.linear_probe and data.zero_shot_data is None:
        raise refusal("linear_probe", True, "needs images with classes", "Set --zero_shot_data")
    held_out = labelled = None
    classes: list[str] = []
    names: dict[str, str] = {}
    with args.main_process_first():
        with named("train_data"):
            train = data.open(data.train_data, data.train_split, data.train_num_pairs, labels=False)
            check_usable(train)
        recorded.check("train_data", data.train_data, "training pairs", train.digest())
        if data.eval_data is not None:
            with named("eval_data"):
                held_out = data.open(data.eval_data, data.eval_split, labels=False)
                check_usable(held_out)
            recorded.check("eval_data", data.eval_data, "held-out pairs", held_out.digest())
        if data.zero_shot_data is not None:
            with named("zero_shot_data"):
                labelled = data.open(data.zero_shot_data, data.zero_shot_split, labels=True)
                labels = labelled.labels()
                names = evaluation.names([*labelled.classes, *filter(None, labels)])
                classes = class_names(labels, data.zero_shot_data, names)
                if evaluation.linear_probe:
                    check_probe(labels)
                check_usable(labelled, "label")
    batch = args.per_device_train_batch_size
    if evaluation.curvature and evaluation.curvature_batches > len(train) // batch:
        rule = f"{len(train)} training pairs make {len(train) // batch} batches of {batch}"
        raise refusal("curvature_batches", evaluation.curvature_batches, rule, "Lower it")
    clip = model_options.load(data.augmentation if isinstance(data.augmentation, dict) else None)
    clip.check_tokens()
    weights = [(n, p.shape, p.flatten()[:8].tolist()) for n, p in clip.model.named_parameters()]
    tokens = clip.tokenizer(["A photo of 2 cats."]).tolist()
    recorded.check("model", model_options.model, "architecture", fingerprint([clip.config]))
    recorded.check("model", model_options.model, "weights", fingerprint(weights))
    recorded.check("model", model_options.model, "tokenizer", fingerprint(tokens))
    stream = PairStream(
        train,
        clip.train_transform,
        clip.tokenizer,
        batch_size=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        process=args.process_index,
        processes=args.world_size,
    )
    trainer = CLIPTrainer(clip, args, train_dataset=stream, eval_dataset=held_out)
    backend = trainer.nso_backend.name
    recorded.check("backend", backend, "back end", backend)
    trainer.add_callback(recorded)
    is_first, output = trainer.is_world_process_zero(), Path(str(args.output_dir))
    if is_first:
        parameters = sum(p.numel() for p in clip.model.parameters())
        batch = (
            args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        )
        print(
            f"{type(clip.model).__name__} {model_options.model}, "
            f"{parameters / 1e6:.1f}M parameters; "
            f"{len(train)} training pairs, global batch {batch}; "
            f"{len(held_out) if held_out else 0} held-out pairs, {len(names)} classes",
            flush=True,
        )
    results: dict[str, Any] = {
        "training_pairs": len(train),
        "model_options": asdict(model_options),
        "data_options": asdict(data),
        "evaluation_options": asdict(evaluation),
        "nso_options": {option.name: getattr(args, option.name) for option in fields(NSOArguments)},
        "options": recorded.history,
    }

    def write() -> None:  # after each measurement, since the next one can fail
        results["total_seconds"] = round(time.monotonic() - started, 1)
        if is_first:
            text = json.dumps(results, indent=2) + "\n"
            (output / "results.json").write_text(text, encoding="utf-8")

    encoded: Encoded | None = None
    train_started = time.monotonic()
    with resumable(args, lambda: trainer.state):
        trainer.train(resume_from_checkpoint=checkpoint)
        results |= {
            "train_seconds": round(time.monotonic() - train_started, 1),
            "steps": trainer.state.global_step,
            "backend": backend,
            "processes": trainer.nso_backend.num_processes,
            "log": trainer.state.log_history,
        }
        trainer.save_model()
        write()
        encoding: dict[str, Any] = {
            "batch_size": args.per_device_eval_batch_size,
            "workers": args.dataloader_num_workers,
        }
        if held_out is not None:
            loss = trainer.loss_of_batch
            encoded = encode(
                trainer.module, clip, held_out, trainer.accelerator, loss=loss, **encoding
            )
            found = retrieval(encoded, args.device)
            texts, images = found.candidates
            results["validation_loss"] = encoded.loss
            results["retrieval"] = {
                "images": images,
                "texts": texts,
                "metrics": found.metrics,
                "chance": found.chance,
            }
            write()
        if labelled is not None:
            with_class = encode(
                trainer.module, clip, labelled, trainer.accelerator, needs="label", **encoding
            )
            accuracy, _ = zero_shot(
                trainer.module,
                clip,
                with_class,
                list(names),
                evaluation.prompts,
                list(names.values()),
                device=args.device,
            )
            results["zero_shot"] = asdict(accuracy)
            write()
            if evaluation.linear_probe:
                results["linear_probe"] = asdict(linear_probe(with_class, classes))
        if evaluation.curvature:
            results["curvature"] = measure_curvature(trainer, train, evaluation)
    opened = {"training pairs, over all passes": train, "held-out pairs": held_out}
    opened["images with classes"] = labelled
    counts = gather_object([{n: p.skipped.counts for n, p in opened.items() if p is not None}])
    results["skipped"] = {
        name: dict(sum((Counter(count[name]) for count in counts), Counter())) for name in counts[0]
    }
    write()
    if is_first:
        report(results, output, encoded, held_out)


if __name__ == "__main__":
    run(main)
