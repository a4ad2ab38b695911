r"""Train a classifier of images with Noise Stability Optimization.

    python recipes/image_classification.py --config recipes/configs/demo_images.yaml
    python recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --data food101 --test_split validation --augmentation resized_crop flip \
        --learning_rate 5e-5 --output_dir runs/food101

All weights are trained, or the last layer alone (--linear_probe). It is evaluated on training
images held out with right labels and, once, on the test images. With --label_noise some of the
training labels are wrong, and how many of these it remembers is counted. Everything of
`TrainingArguments` is an option too.
"""

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, set_seed

from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import needs
from nso_hf.robustness.options import RobustnessOptions
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.results import Results, trained
from nso_hf.tasks.classification.arguments import ClassificationConfig
from nso_hf.tasks.classification.options import ProtocolOptions
from nso_hf.tasks.images.classifier_options import ClassifiedDataOptions, ClassifierOptions
from nso_hf.tasks.measurements import MeasurementOptions, plainly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nso_hf.tasks.classification.splitting import Splits
    from nso_hf.tasks.images.dataset import Labelled, Pixels
    from nso_hf.trainer import NSOTrainer

CONFIGS = Path(__file__).with_name("configs")
OPTIONS = [
    ClassifierOptions,
    ClassifiedDataOptions,
    ProtocolOptions,
    MeasurementOptions,
    RobustnessOptions,
    CompanionOptions,
    ClassificationConfig,
]
PACKAGES = ("datasets", "PIL", "sklearn", "matplotlib", "rich")


@dataclass(frozen=True)
class Collections:
    """What is trained on and what is judged by."""

    classes: list[str]
    splits: "Splits"
    train: "Labelled"
    """With the labels that are trained on."""
    validation: "Labelled | None"
    test: "Labelled | None"
    without_class: int
    """Images that were left out."""


def open_collections(
    data: ClassifiedDataOptions,
    protocol: ProtocolOptions,
    pixels: "Pixels",
    recorded: RecordedOptions,
    seed: int,
) -> Collections:
    """Open what the options name; refuse what cannot be trained on, or judged by."""
    from nso_hf.tasks.classification.labels import classes_of, numbers_of
    from nso_hf.tasks.images.dataset import Labelled, with_classes

    images = data.open("data", pixels, labelled=True)
    recorded.check("data", data.data, "training images", images.digest())
    indices, labels = with_classes(images)
    classes = classes_of(labels, "data", data.data, images.classes)
    numbers = numbers_of(labels, classes, "data", data.data)
    has_test = data.test_split is not None
    splits = protocol.split(numbers, classes, seed, has_test=has_test)

    def some(places: list[int]) -> "Labelled":
        targets = [numbers[place] for place in places]
        return Labelled(images, [indices[place] for place in places], targets)

    train = Labelled(images, some(splits.train).indices, splits.labels.tolist())
    without = len(images) - len(indices)
    test = some(splits.test) if protocol.test and not has_test else None
    if protocol.test and has_test:
        tested = data.open("data", pixels, split="test_split", labelled=True)
        recorded.check("data", data.data, "test images", tested.digest())
        found, tests = with_classes(tested)
        targets = numbers_of(tests, classes, "data", data.data, trained=labels)
        test = Labelled(tested, found, targets)
        without += len(tested) - len(found)
    validation = some(splits.validation) if splits.validation else None
    return Collections(classes, splits, train, validation, test, without)


def load_model(
    options: ClassifierOptions,
    classes: list[str],
    pixels: "Pixels",
    recorded: RecordedOptions,
    seed: int,
) -> "PreTrainedModel":
    """The model that a run begins with; refused where it is not the one that it began with."""
    set_seed(seed)
    model = options.load(classes, pixels)
    weights = fingerprint((n, p.flatten()[:8].tolist()) for n, p in model.named_parameters())
    recorded.check("model_name_or_path", options.model_name_or_path, "weights", weights)
    return model


def make_trainer(
    model: "PreTrainedModel",
    collections: Collections,
    augmentation: list[str],
    args: ClassificationConfig,
) -> "NSOTrainer":
    from nso_hf.tasks.classification.evaluation import compute_metrics, logits_alone
    from nso_hf.tasks.epochs import TellEpoch
    from nso_hf.tasks.images.augmentation import Augmented, transform_of

    train: Any = collections.train
    callbacks: list[TrainerCallback] = []
    if augmentation != ["none"]:
        size = train.images.pixels.image_size
        train = Augmented(train, transform_of(augmentation, size), args.seed_of_data)
        callbacks.append(TellEpoch(train))
    return args.trainer_class(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=collections.validation,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=logits_alone,
        callbacks=callbacks,
    )


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0], configs=CONFIGS)
    options = parser.parse(argv)
    needs("image_classification.py", "images", *PACKAGES)
    classify(*options)


def classify(
    model_options: ClassifierOptions,
    data: ClassifiedDataOptions,
    protocol: ProtocolOptions,
    measurements: MeasurementOptions,
    robustness: RobustnessOptions,
    companions: CompanionOptions,
    args: ClassificationConfig,
) -> None:
    """From data to results, for options that were read without these packages."""
    from nso_hf.tasks.classification.evaluation import METRICS
    from nso_hf.tasks.classification.report import report

    check_ready(args, METRICS)
    for group in (protocol, measurements, companions):
        group.check(args)
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
    model_options: ClassifierOptions,
    data: ClassifiedDataOptions,
    protocol: ProtocolOptions,
    measurements: MeasurementOptions,
    robustness: RobustnessOptions,
    companions: CompanionOptions,
    args: ClassificationConfig,
    asked: ClassificationConfig,
) -> Results:
    """Train, write the model, judge it; return what goes into results.json.

    `asked` are the training options of the command, which `args` are made from.
    """
    from nso_hf.tasks.classification.evaluation import judged

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
    pixels = model_options.pixels(data.data)
    with args.main_process_first():
        collections = open_collections(data, protocol, pixels, recorded, args.seed_of_data)
    model = load_model(model_options, collections.classes, pixels, recorded, args.seed)
    trainer = make_trainer(model, collections, data.augmentation, args)
    # What is frozen has the statistics that it was trained with.
    for callback in companions.callbacks(update_bn=not model_options.linear_probe):
        trainer.add_callback(callback)
    robustness.check(trainer.nso_backend)
    if trainer.is_world_process_zero():
        print(described(model, collections), flush=True)
    curvature = measurements.callback(trainer, collections.train)
    with resumable(asked, lambda: trainer.state):
        results.add(
            training_examples=len(collections.train),
            classes=collections.classes,
            **trained(trainer, recorded, checkpoint, curvature),
        )
        trainer.save_model()
        if trainer.is_world_process_zero():
            pixels.write(Path(str(args.output_dir)))
        found = judged(
            trainer,
            collections.splits,
            train=collections.train,
            validation=collections.validation,
            test=collections.test,
        )
        results.add(**found)
        if robustness.robustness and collections.test is not None:
            results.add(robustness=robustness.measure(trainer, collections.test))
    return results


def described(model: "PreTrainedModel", collections: Collections) -> str:
    weights, train = list(model.parameters()), collections.train
    learned = sum(p.numel() for p in weights if p.requires_grad)
    in_all = sum(p.numel() for p in weights)
    counts = [len(c) if c else "no" for c in (collections.validation, collections.test)]
    without = collections.without_class
    left_out = f"; {without} without a class left out" if without else ""
    size, wrong = train.images.pixels.image_size, len(collections.splits.wrong)
    return (
        f"{type(model).__name__}, {learned:,} of {in_all:,} parameters trained; "
        f"{len(train)} training images of {size} x {size} pixels in {len(collections.classes)} "
        f"classes, {wrong} with a wrong label; {counts[0]} validation and {counts[1]} test images"
        f"{left_out}"
    )


if __name__ == "__main__":
    run(main)
