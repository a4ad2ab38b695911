r"""Pretrain a masked autoencoder for a task to come, with Noise Stability Optimization.

    python recipes/mae_pretraining.py --config recipes/configs/demo_mae.yaml
    python recipes/mae_pretraining.py --train_data fashion_mnist --target_data fashion_mnist \
        --image_size 28 --num_channels 1 --rademacher_strength 0.1 --examples_per_class 10 \
        --output_dir runs/mae

With --rademacher_strength the loss has the complexity of the representations of the task's images,
unlabelled, as a further term. After training, the encoder is judged on the task's test images by a
linear probe or by fine-tuning, beside the encoder that training began with. The output folder is
one that transformers loads. Everything of `TrainingArguments` is an option too.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import IntervalStrategy, set_seed

from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import needs, refusal
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.results import Results, trained
from nso_hf.tasks.images.arguments import MAEConfig
from nso_hf.tasks.images.options import DataOptions, EvaluationOptions, ModelOptions

if TYPE_CHECKING:
    from nso_hf.tasks.images.dataset import Images, Labelled, Pixels
    from nso_hf.tasks.images.models import ViTMAEForPreTraining
    from nso_hf.tasks.images.trainer import MAETrainer

CONFIGS = Path(__file__).with_name("configs")
OPTIONS = [ModelOptions, DataOptions, EvaluationOptions, CompanionOptions, MAEConfig]
PACKAGES = ("datasets", "sklearn", "matplotlib", "rich")


def check_together(data: DataOptions, evaluation: EvaluationOptions, args: MAEConfig) -> None:
    """
    Raises:
        ValueError: options do not go with each other.
    """
    cure = "Set --target_data"
    if args.rademacher_strength and data.target_data is None:
        strength = args.rademacher_strength
        raise refusal("rademacher_strength", strength, "needs images of the task to come", cure)
    if evaluation.evaluation != "none" and data.target_data is None:
        rule = "needs images with classes"
        raise refusal("evaluation", evaluation.evaluation, rule, f"{cure}, or --evaluation none")
    if args.eval_strategy != "no" and not data.validation_size:
        value = IntervalStrategy(args.eval_strategy).value
        raise refusal("eval_strategy", value, "nothing to evaluate on", "Set --validation_size")


@dataclass(frozen=True)
class Collections:
    """What is trained on, and the task to come."""

    train: "Images"
    target: "Images | None"
    """Its training images."""
    labelled: "Labelled | None"
    """Those whose classes are used after training."""
    test: "Labelled | None"
    classes: list[str]


def open_collections(
    data: DataOptions,
    evaluation: EvaluationOptions,
    pixels: "Pixels",
    recorded: RecordedOptions,
    seed: int,
) -> Collections:
    """Open what the options name; refuse what cannot be trained on, or judged by."""
    from nso_hf.tasks.images.evaluation import labelled_sets

    train = data.open("train_data", pixels, labelled=False)
    recorded.check("train_data", data.train_data, "training images", train.digest())
    if data.validation_size >= len(train):
        rule = f"there are {len(train)} training images"
        raise refusal("validation_size", data.validation_size, rule, "Lower it")
    if data.target_data is None:
        return Collections(train, None, None, None, [])
    judged = evaluation.evaluation != "none"
    target = data.open("target_data", pixels, labelled=judged)
    recorded.check("target_data", data.target_data, "target images", target.digest())
    if not judged:
        return Collections(train, target, None, None, [])
    tested = data.open("target_data", pixels, split="test_split", labelled=True)
    recorded.check("target_data", data.target_data, "test images", tested.digest())
    per_class = evaluation.examples_per_class
    labelled, test, classes = labelled_sets(target, tested, per_class, seed)
    return Collections(train, target, labelled, test, classes)


def load_model(
    options: ModelOptions, seed: int, recorded: RecordedOptions | None = None
) -> "tuple[ViTMAEForPreTraining, Pixels]":
    """The model that a run begins with; refused where it is not the one that it began with."""
    set_seed(seed)
    model, pixels = options.load()
    if recorded is not None:
        weights = fingerprint((n, p.flatten()[:8].tolist()) for n, p in model.named_parameters())
        recorded.check("model_name_or_path", options.model_name_or_path, "weights", weights)
    return model, pixels


def judged(
    collections: Collections, options: EvaluationOptions, model: ModelOptions, args: MAEConfig
) -> "Iterator[tuple[str, dict[str, Any]]]":
    """Which encoder, and how well it does on the test images."""
    from nso_hf.tasks.images.evaluation import fine_tuned, probed
    from nso_hf.tasks.images.models import load_autoencoder

    labelled, test, classes = collections.labelled, collections.test, collections.classes
    assert labelled is not None and test is not None
    encoders: dict[str, Callable[[], ViTMAEForPreTraining]] = {
        "before pretraining": lambda: load_model(model, args.seed)[0],
        "pretrained": lambda: load_autoencoder(str(args.output_dir)),  # as it was written
    }
    for name, load in encoders.items():
        if options.evaluation == "linear_probe":
            found = probed(load(), labelled, test, classes, args)
        else:
            epochs, rate = options.fine_tune_epochs, options.fine_tune_learning_rate
            found = fine_tuned(
                load(), labelled, test, classes, args, epochs=epochs, learning_rate=rate
            )
        yield name, asdict(found)


def make_trainer(
    model: "ViTMAEForPreTraining", collections: Collections, data: DataOptions, args: MAEConfig
) -> "MAETrainer":
    from torch.utils.data import Subset

    from nso_hf.tasks.images.dataset import WithTargetImages
    from nso_hf.tasks.images.trainer import MAETrainer

    train: Any = collections.train
    held_out = None
    if data.validation_size:
        kept = len(train) - data.validation_size
        order = range(len(train))
        train, held_out = Subset(train, order[:kept]), Subset(train, order[kept:])
    if args.rademacher_strength and collections.target is not None:
        seed = args.data_seed if args.data_seed is not None else args.seed
        train = WithTargetImages(train, collections.target, seed)
    return MAETrainer(model=model, args=args, train_dataset=train, eval_dataset=held_out)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0], configs=CONFIGS)
    options = parser.parse(argv)
    needs("mae_pretraining.py", "images", *PACKAGES)
    pretrain(*options)


def pretrain(
    model_options: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    companions: CompanionOptions,
    args: MAEConfig,
) -> None:
    """From data to results, for options that were read without these packages."""
    from nso_hf.tasks.images.models import load_autoencoder
    from nso_hf.tasks.images.report import report

    check_ready(args, ["loss"])
    check_together(data, evaluation, args)
    companions.check(args)
    checkpoint = checkpoint_to_resume(args)
    groups = (model_options, data, evaluation, companions)
    recorded = RecordedOptions(args, *groups, checkpoint=checkpoint)
    results = Results(
        args,
        recorded,
        model_options=model_options,
        data_options=data,
        evaluation_options=evaluation,
        companion_options=companions,
    )
    model, pixels = load_model(model_options, args.seed, recorded)
    with args.main_process_first():
        collections = open_collections(data, evaluation, pixels, recorded, args.seed)
    trainer = make_trainer(model, collections, data, args)
    for callback in companions.callbacks():
        trainer.add_callback(callback)
    is_first, output = trainer.is_world_process_zero(), Path(str(args.output_dir))
    trained_on = len(collections.train) - data.validation_size
    size = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if is_first:
        parameters = sum(p.numel() for p in model.parameters())
        target = f"{len(collections.target)}" if collections.target else "no"
        print(
            f"masked autoencoder, {parameters / 1e6:.2f}M parameters; {trained_on} training "
            f"images, global batch {size}; {target} images of the task to come, "
            f"{len(collections.classes)} classes",
            flush=True,
        )
    with resumable(args, lambda: trainer.state):
        results.add(
            training_images=trained_on,
            labelled_images=len(collections.labelled) if collections.labelled else 0,
            classes=collections.classes,
            evaluation={},
            **trained(trainer, recorded, checkpoint),
        )
        trainer.save_model()
        if is_first:
            pixels.write(output)
        trainer.accelerator.wait_for_everyone()  # the model has been written
        if evaluation.evaluation != "none":
            for name, found in judged(collections, evaluation, model_options, args):
                results["evaluation"][name] = found
                results.add()
    if is_first:
        report(results, output, load_autoencoder(str(output)), collections.train)


if __name__ == "__main__":
    run(main)
