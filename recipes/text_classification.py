r"""Train a classifier of texts with Noise Stability Optimization.

    python recipes/text_classification.py --config recipes/configs/demo_text.yaml
    python recipes/text_classification.py --model_name_or_path bert-base-uncased \
        --dataset stanfordnlp/imdb --label_noise 0.2 --output_dir runs/imdb

All weights are trained, or adapters with --lora_r, or the head alone with --linear_probe. It is
evaluated on validation texts (with --eval_strategy during training too) and, once, on test texts;
where labels were made wrong, it is told how many of them were memorised. The output folder is one
that transformers loads. Everything of `TrainingArguments` is an option too.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import needs
from nso_hf.robustness.options import RobustnessOptions
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.results import Results, trained
from nso_hf.tasks.classification.evaluation import METRICS, compute_metrics, judged, logits_alone
from nso_hf.tasks.classification.labels import classes_of, numbers_of
from nso_hf.tasks.classification.options import ProtocolOptions
from nso_hf.tasks.classification.report import PACKAGES, report
from nso_hf.tasks.classification.splitting import Splits
from nso_hf.tasks.measurements import MeasurementOptions, plainly
from nso_hf.tasks.text.encoding import check_length, encode
from nso_hf.tasks.text.models import ModelOptions
from nso_hf.tasks.text.options import DataOptions
from nso_hf.tasks.text.reading import Texts

CONFIGS = Path(__file__).with_name("configs")
OPTIONS = [
    ModelOptions,
    DataOptions,
    ProtocolOptions,
    MeasurementOptions,
    RobustnessOptions,
    CompanionOptions,
    NSOConfig,
]


@dataclass(frozen=True)
class Examples:
    """The texts of each split, and the numbers of their classes."""

    splits: Splits
    classes: list[str]
    texts: dict[str, Texts]
    labels: dict[str, Sequence[int]]


def open_examples(
    data: DataOptions, protocol: ProtocolOptions, recorded: RecordedOptions, seed: int
) -> Examples:
    """Read and deal out what the options name; refuse what cannot be trained on, or judged by."""
    name, found = data.dataset, data.train()
    recorded.check("dataset", name, "training texts", found.digest())
    classes = classes_of(found.labels, "dataset", name, found.classes)
    numbers = numbers_of(found.labels, classes, "dataset", name)
    has_test = data.has_test()
    splits = protocol.split(numbers, classes, seed, has_test=has_test)
    texts = {"training": found.part(splits.train)}
    labels: dict[str, Sequence[int]] = {"training": splits.labels.tolist()}
    if splits.validation:
        texts["validation"] = found.part(splits.validation)
        labels["validation"] = [numbers[i] for i in splits.validation]
    if protocol.test and has_test:
        texts["test"] = data.test()
        recorded.check("dataset", name, "test texts", texts["test"].digest())
        tested = texts["test"].labels
        labels["test"] = numbers_of(tested, classes, "dataset", name, trained=found.labels)
    elif protocol.test and splits.test:
        texts["test"] = found.part(splits.test)
        labels["test"] = [numbers[i] for i in splits.test]
    return Examples(splits, classes, texts, labels)


def prepared(
    options: ModelOptions, data: DataOptions, examples: Examples, recorded: RecordedOptions
) -> tuple[Any, PreTrainedTokenizerBase, dict[str, Any], dict[str, int]]:
    """The model, its tokenizer, the rows of each split, and how many texts of it are cut off."""
    model, tokenizer = options.load(examples.classes, examples.texts["training"].each())
    check_length(data.max_length, model, tokenizer, pairs=data.text_pair_column is not None)
    rows, cut = {}, {}
    for split, texts in examples.texts.items():
        labels = examples.labels[split]
        rows[split], cut[split] = encode(texts, labels, tokenizer, data.max_length)
    name = options.model_name_or_path
    recorded.check("model_name_or_path", name, "tokens of the texts", fingerprint(rows["training"]))
    weights = fingerprint((n, p.flatten()[:8].tolist()) for n, p in model.named_parameters())
    recorded.check("model_name_or_path", name, "weights", weights)
    return options.trainable(model), tokenizer, rows, cut


def described(
    model: Any, name: str, examples: Examples, cut: dict[str, int], args: NSOConfig
) -> str:
    """What is about to be trained, on what."""
    counts = [p.numel() for p in model.parameters() if p.requires_grad]
    every = sum(p.numel() for p in model.parameters())
    size = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    texts = ", ".join(f"{len(texts)} {split}" for split, texts in examples.texts.items())
    wrong = (
        f" ({len(examples.splits.wrong)} training labels wrong)" if examples.splits.wrong else ""
    )
    longer = f"; {sum(cut.values())} texts are cut off" if any(cut.values()) else ""
    return (
        f"{name}, {every / 1e6:.2f}M parameters, {sum(counts) / 1e6:.2f}M of them trained; "
        f"{texts} texts{wrong}, {len(examples.classes)} classes, global batch {size}{longer}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0], configs=CONFIGS)
    model_options, data, protocol, measurements, robustness, companions, args = parser.parse(argv)
    needs("text_classification.py", "text", "datasets", "peft", *PACKAGES)
    check_ready(args, METRICS)
    for options in (protocol, measurements, companions):
        options.check(args)
    groups = (model_options, data, protocol)
    results = trained_once(*groups, measurements, robustness, companions, args, args)
    if measurements.compare_plain:
        gc.collect()  # the first model, before the second is loaded
        if args.process_index == 0:
            print("Plain training, for comparison, from the same start.", flush=True)
        once = replace(measurements, curvature_steps=None)
        results["plain"] = trained_once(*groups, once, robustness, companions, plainly(args), args)
    if args.process_index == 0:
        report(results, Path(str(args.output_dir)))


def trained_once(
    model_options: ModelOptions,
    data: DataOptions,
    protocol: ProtocolOptions,
    measurements: MeasurementOptions,
    robustness: RobustnessOptions,
    companions: CompanionOptions,
    args: NSOConfig,
    asked: NSOConfig,
) -> Results:
    """Train, write the model, judge it; return what goes into results.json.

    `asked` are the training options of the command, which `args` are made from.
    """
    checkpoint = checkpoint_to_resume(args)
    groups = (model_options, data, protocol, measurements, robustness, companions)
    recorded = RecordedOptions(args, *groups, checkpoint=checkpoint)
    results = Results(
        args,
        recorded,
        model_options=model_options,
        data_options=data,
        protocol_options=protocol,
        curvature_options=measurements,
        companion_options=companions,
    )
    seed = args.data_seed if args.data_seed is not None else args.seed
    with args.main_process_first():
        examples = open_examples(data, protocol, recorded, seed)
    set_seed(args.seed)
    model, tokenizer, rows, cut = prepared(model_options, data, examples, recorded)
    trainer = NSOTrainer(
        model=model,
        args=args,
        train_dataset=rows["training"],
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=logits_alone,
        callbacks=companions.callbacks(),
    )
    robustness.check(trainer.nso_backend)
    if trainer.is_world_process_zero():
        name = model_options.model_name_or_path
        print(described(model, name, examples, cut, args), flush=True)
    with resumable(asked, lambda: trainer.state):
        results.add(
            training_examples=len(rows["training"]),
            wrong_labels=len(examples.splits.wrong),
            classes=examples.classes,
            texts_cut_off=cut,
            **trained(
                trainer, recorded, checkpoint, measurements.callback(trainer, rows["training"])
            ),
        )
        trainer.save_model()
        if model_options.lora_r is not None and trainer.is_world_process_zero():
            model.config.save_pretrained(args.output_dir)  # the names of the classes
        results.add(
            **judged(
                trainer,
                examples.splits,
                train=rows["training"],
                validation=rows.get("validation"),
                test=rows.get("test"),
            )
        )
        if robustness.robustness and "test" in rows:
            results.add(robustness=robustness.measure(trainer, rows["test"]))
    return results


if __name__ == "__main__":
    run(main)
